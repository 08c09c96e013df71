//! `nvme-async list`: the NVMe controllers on the PCI bus.

use std::io::{self, Write};

use crate::pci::{Function, Host};

/// Prints the controllers of a host: as a table, or as a JSON array of objects with `address`,
/// `driver`, `iommu_group`, `model` and `size` (bytes), unknown ones null.
///
/// # Errors
///
/// When sysfs can't be read, or `out` not be written.
pub(crate) fn print(host: &Host, json: bool, out: &mut impl Write) -> io::Result<()> {
    let functions = list(host)?;
    if json {
        serde_json::to_writer_pretty(&mut *out, &functions)?;
        return writeln!(out);
    }
    if functions.is_empty() {
        return writeln!(out, "no NVMe controllers on the PCI bus");
    }
    out.write_all(table(&functions).as_bytes())
}

/// The controllers of a host, by address.
///
/// # Errors
///
/// When sysfs can't be read.
pub(crate) fn list(host: &Host) -> io::Result<Vec<Function>> {
    host.functions()
}

fn table(functions: &[Function]) -> String {
    let titles = ["ADDRESS", "DRIVER", "IOMMU GROUP", "SIZE", "MODEL"].map(str::to_owned);
    let row = |function: &Function| {
        let unknown = || "-".to_owned();
        [
            function.address.to_string(),
            function.driver.clone().unwrap_or_else(unknown),
            function
                .iommu_group
                .map_or_else(unknown, |group| group.to_string()),
            function.size.map_or_else(unknown, human_size),
            function.model.clone().unwrap_or_else(unknown),
        ]
    };
    let rows: Vec<_> = std::iter::once(titles)
        .chain(functions.iter().map(row))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2), width(3), 0];
    let line = |row: &[String; 5]| {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// Bytes in the decimal units that drives are sold by.
fn human_size(bytes: u64) -> String {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let bytes_as_float = bytes as f64;
    let fitting = units.into_iter().find(|(unit, _)| bytes_as_float >= *unit);
    fitting.map_or_else(
        || format!("{bytes} B"),
        |(unit, name)| format!("{:.1} {name}", bytes_as_float / unit),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::testing::{ADDRESS, Machine};

    fn machine() -> Machine {
        let machine = Machine::new();
        machine.function("10000:e1:00.0", "0x010802", "vfio-pci", "3");
        machine.function(ADDRESS, "0x010802", "nvme", "17");
        machine.namespace(ADDRESS, "nvme0n1", "nvme0n1");
        machine.namespace(ADDRESS, "nvme0c2n2", "nvme0n2");
        machine.function("0000:00:1f.0", "0x060100", "", "5");
        machine.function("0000:02:00.0", "0x010802", "", "");
        machine
    }

    fn printed(machine: &Machine, json: bool) -> String {
        let mut out = Vec::new();
        print(&machine.host(), json, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn as_json() {
        let value: serde_json::Value = serde_json::from_str(&printed(&machine(), true)).unwrap();
        let expected = serde_json::json!([
            { "address": "0000:02:00.0", "driver": null, "iommu_group": null, "model": null, "size": null },
            { "address": "0000:44:00.0", "driver": "nvme", "iommu_group": 17, "model": "Model 1000",
              "size": 2_147_483_648_u64 },
            { "address": "10000:e1:00.0", "driver": "vfio-pci", "iommu_group": 3, "model": null,
              "size": null },
        ]);
        assert_eq!(value, expected);
    }

    #[test]
    fn as_table() {
        let expected = "\
ADDRESS        DRIVER    IOMMU GROUP  SIZE    MODEL
0000:02:00.0   -         -            -       -
0000:44:00.0   nvme      17           2.1 GB  Model 1000
10000:e1:00.0  vfio-pci  3            -       -
";
        assert_eq!(printed(&machine(), false), expected);
    }

    #[test]
    fn no_controllers() {
        assert_eq!(
            printed(&Machine::new(), false),
            "no NVMe controllers on the PCI bus\n"
        );
        assert_eq!(printed(&Machine::new(), true), "[]\n");
    }

    #[test]
    fn sizes() {
        let shown = [999, 1000, 268_435_456, 1_600_321_314_816].map(human_size);
        assert_eq!(shown, ["999 B", "1.0 kB", "268.4 MB", "1.6 TB"]);
    }
}
