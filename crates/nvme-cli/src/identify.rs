//! `nvme-async identify`: what a controller and its namespaces say of themselves.

use std::fmt::Write as _;
use std::io::Write as _;

use clap::Args;
use nvme_async::nvme_spec::identify::{IdentifyController, IdentifyNamespace};
use nvme_async::{Controller, Error, Namespace, OpenOptions};
use serde::Serialize;

use crate::failure::Failure;
use crate::{block_on, format};

/// Shows what a controller and its namespaces say of themselves.
#[derive(Args, Clone, Debug)]
pub(crate) struct Arguments {
    /// The controller, such as nvme://0000:44:00.0; a namespace in the URL makes no difference.
    url: String,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Identity {
    address: String,
    controller: ControllerFacts,
    namespaces: Vec<NamespaceEntry>,
}

#[derive(Debug, Serialize)]
struct ControllerFacts {
    model: String,
    serial: String,
    firmware: String,
    subsystem: String,
    vendor_id: u16,
    subsystem_vendor_id: u16,
    controller_id: u16,
    /// Of the specification.
    version: String,
    max_queue_entries: u32,
    /// Bytes of one command; null for no limit.
    max_transfer_bytes: Option<u64>,
    min_page_bytes: u32,
    doorbell_stride_bytes: u32,
    ready_timeout_ms: u32,
    /// The largest namespace identifier.
    max_namespace: u32,
    volatile_write_cache: bool,
    sgl: bool,
    /// Logical blocks.
    atomic_write_blocks: u32,
    /// Logical blocks.
    atomic_write_power_fail_blocks: u32,
    optional_commands: Vec<&'static str>,
}

/// A namespace, or why it can't be used.
#[derive(Debug, Serialize)]
struct NamespaceEntry {
    nsid: u32,
    #[serde(flatten)]
    facts: Option<NamespaceFacts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct NamespaceFacts {
    size_bytes: u64,
    block_size: u32,
    blocks: u64,
    capacity_blocks: u64,
    used_blocks: u64,
    /// Bytes.
    atomic_write_limit: u64,
    /// Logical blocks; 0 for no boundary.
    optimal_io_boundary: u16,
    thin_provisioning: bool,
    write_protected: bool,
    nguid: Option<String>,
    eui64: Option<String>,
    formats: Vec<Format>,
}

#[derive(Debug, Serialize)]
struct Format {
    block_size: Option<u32>,
    metadata_bytes: u16,
    in_use: bool,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    block_on(async {
        let controller = OpenOptions::new()
            .url(&arguments.url)
            .queues(1)
            .local_queues(0)
            .open_controller()
            .await?;
        let identity = identify(&controller).await;
        let closed = controller.shutdown().await;
        print(&identity?, arguments.json)?;
        Ok(closed?)
    })
}

async fn identify(controller: &Controller) -> Result<Identity, Error> {
    let mut namespaces = Vec::new();
    for nsid in controller.active_namespaces().await? {
        let (facts, error) = match controller.namespace(nsid).await {
            Ok(namespace) => (Some(NamespaceFacts::new(&namespace)), None),
            // One that the driver can't use does not make the others uninteresting.
            Err(error @ Error::Unusable { .. }) => (None, Some(error.to_string())),
            Err(error) => return Err(error),
        };
        namespaces.push(NamespaceEntry { nsid, facts, error });
    }
    Ok(Identity {
        address: controller.address().to_owned(),
        controller: ControllerFacts::new(controller),
        namespaces,
    })
}

impl ControllerFacts {
    fn new(controller: &Controller) -> Self {
        let identify = controller.identify();
        let capabilities = controller.capabilities();
        let min_page_bytes = 4096 << capabilities.mpsmin();
        Self {
            model: identify.model_number().to_owned(),
            serial: identify.serial_number().to_owned(),
            firmware: identify.firmware_revision().to_owned(),
            subsystem: identify.subsystem_name().to_owned(),
            vendor_id: identify.vid.get(),
            subsystem_vendor_id: identify.ssvid.get(),
            controller_id: identify.cntlid.get(),
            version: controller.version().to_string(),
            max_queue_entries: capabilities.max_queue_entries(),
            max_transfer_bytes: identify.max_transfer_bytes(min_page_bytes),
            min_page_bytes,
            doorbell_stride_bytes: 4 << capabilities.dstrd(),
            ready_timeout_ms: capabilities.timeout_ms(),
            max_namespace: identify.nn.get(),
            volatile_write_cache: identify.has_volatile_write_cache(),
            sgl: identify.sgls.get() & 0b11 != 0,
            atomic_write_blocks: u32::from(identify.awun.get()) + 1,
            atomic_write_power_fail_blocks: u32::from(identify.awupf.get()) + 1,
            optional_commands: optional_commands(identify),
        }
    }
}

/// The optional commands that a controller has, by the specification's names.
fn optional_commands(identify: &IdentifyController) -> Vec<&'static str> {
    let admin = identify.optional_admin_commands();
    let nvm = identify.optional_nvm_commands();
    [
        (admin.security(), "Security Send and Receive"),
        (admin.format_nvm(), "Format NVM"),
        (admin.firmware(), "Firmware Commit and Image Download"),
        (admin.namespace_management(), "Namespace Management"),
        (admin.self_test(), "Device Self-test"),
        (admin.directives(), "Directives"),
        (admin.nvme_mi(), "NVMe-MI Send and Receive"),
        (admin.virtualization(), "Virtualization Management"),
        (admin.doorbell_buffer_config(), "Doorbell Buffer Config"),
        (admin.get_lba_status(), "Get LBA Status"),
        (admin.lockdown(), "Lockdown"),
        (nvm.compare(), "Compare"),
        (nvm.write_uncorrectable(), "Write Uncorrectable"),
        (nvm.dataset_management(), "Dataset Management"),
        (nvm.write_zeroes(), "Write Zeroes"),
        (nvm.reservations(), "Reservations"),
        (nvm.verify(), "Verify"),
        (nvm.copy(), "Copy"),
    ]
    .into_iter()
    .filter_map(|(there, name)| there.then_some(name))
    .collect()
}

impl NamespaceFacts {
    fn new(namespace: &Namespace) -> Self {
        let identify = namespace.identify();
        Self {
            size_bytes: namespace.capacity(),
            block_size: namespace.block_size(),
            blocks: identify.nsze.get(),
            capacity_blocks: identify.ncap.get(),
            used_blocks: identify.nuse.get(),
            atomic_write_limit: namespace.atomic_write_limit(),
            optimal_io_boundary: identify.noiob.get(),
            thin_provisioning: identify.features().thin_provisioning(),
            write_protected: identify.is_write_protected(),
            nguid: hex(&identify.nguid),
            eui64: hex(&identify.eui64),
            formats: formats(&identify),
        }
    }
}

fn formats(identify: &IdentifyNamespace) -> Vec<Format> {
    let count = usize::from(identify.nlbaf) + 1;
    let formats = identify.lbaf.iter().take(count).enumerate();
    formats
        // LBADS 0: the format is not available.
        .filter(|(_, format)| format.lbads != 0)
        .map(|(index, format)| Format {
            block_size: format.lba_size(),
            metadata_bytes: format.ms.get(),
            in_use: index == identify.format_index(),
        })
        .collect()
}

/// An identifier in hexadecimal; nothing if it is all zero, which means that there is none.
fn hex(identifier: &[u8]) -> Option<String> {
    identifier.iter().any(|&byte| byte != 0).then(|| {
        identifier.iter().fold(String::new(), |mut text, byte| {
            // Writing to a String does not fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    })
}

fn print(identity: &Identity, json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, identity).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        out.write_all(table(identity).as_bytes())?;
    }
    Ok(())
}

fn table(identity: &Identity) -> String {
    let Identity {
        address,
        controller,
        namespaces,
    } = identity;
    let max_transfer = controller
        .max_transfer_bytes
        .map_or_else(|| "no limit".to_owned(), format::bytes);
    let yes_no = |yes| if yes { "yes" } else { "no" };
    let rows = [
        ("model", controller.model.clone()),
        ("serial number", controller.serial.clone()),
        ("firmware", controller.firmware.clone()),
        ("subsystem", controller.subsystem.clone()),
        (
            "PCI vendor",
            format!(
                "{:#06x}, subsystem {:#06x}",
                controller.vendor_id, controller.subsystem_vendor_id
            ),
        ),
        ("NVMe version", controller.version.clone()),
        ("controller ID", controller.controller_id.to_string()),
        ("queue entries", controller.max_queue_entries.to_string()),
        ("transfer", max_transfer),
        ("page", format::bytes(controller.min_page_bytes.into())),
        (
            "write cache",
            yes_no(controller.volatile_write_cache).to_owned(),
        ),
        ("SGL", yes_no(controller.sgl).to_owned()),
        (
            "atomic writes",
            format!(
                "{} blocks, {} across a power failure",
                controller.atomic_write_blocks, controller.atomic_write_power_fail_blocks
            ),
        ),
        ("optional", controller.optional_commands.join(", ")),
    ];
    let mut text = format!("{address}\n");
    for (name, value) in rows {
        text += format!("  {name:<14} {value}\n").as_str();
    }
    for NamespaceEntry { nsid, facts, error } in namespaces {
        text += &format!("  namespace {nsid}\n");
        if let Some(facts) = facts {
            text += &namespace_table(facts);
        }
        if let Some(error) = error {
            text += &format!("    {error}\n");
        }
    }
    text
}

fn namespace_table(facts: &NamespaceFacts) -> String {
    let formats = facts.formats.iter().map(|format| {
        let size = format
            .block_size
            .map_or_else(|| "unknown".to_owned(), |size| size.to_string());
        let metadata = match format.metadata_bytes {
            0 => String::new(),
            bytes => format!("+{bytes}"),
        };
        let in_use = if format.in_use { " (in use)" } else { "" };
        format!("{size}{metadata}{in_use}")
    });
    let rows = [
        (
            "size",
            format!(
                "{} ({} bytes)",
                format::bytes(facts.size_bytes),
                facts.size_bytes
            ),
        ),
        (
            "blocks",
            format!(
                "{} of {} bytes, {} used",
                facts.blocks, facts.block_size, facts.used_blocks
            ),
        ),
        (
            "atomic writes",
            format!("{} bytes", facts.atomic_write_limit),
        ),
        ("formats", formats.collect::<Vec<_>>().join(", ")),
    ];
    let mut text = String::new();
    for (name, value) in rows {
        text += &format!("    {name:<14} {value}\n");
    }
    let identifiers = [("NGUID", &facts.nguid), ("EUI-64", &facts.eui64)];
    for (name, value) in identifiers {
        if let Some(value) = value {
            text += &format!("    {name:<14} {value}\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use nvme_async::nvme_spec::identify::{LbaFormat, OptionalNvmCommands};

    use super::*;

    #[test]
    fn identifiers() {
        assert_eq!(hex(&[0; 8]), None);
        assert_eq!(hex(&[0x00, 0x1b, 0xff]), Some("001bff".to_owned()));
    }

    #[test]
    fn names_of_optional_commands() {
        let mut identify = IdentifyController::default();
        assert!(optional_commands(&identify).is_empty());
        let nvm = OptionalNvmCommands::new()
            .with_compare(true)
            .with_copy(true);
        identify.oncs.set(nvm.into_bits());
        assert_eq!(optional_commands(&identify), ["Compare", "Copy"]);
    }

    #[test]
    fn formats_that_exist() {
        let mut identify = IdentifyNamespace {
            nlbaf: 2,
            flbas: 2,
            ..Default::default()
        };
        identify.lbaf[0] = LbaFormat {
            lbads: 9,
            ..Default::default()
        };
        identify.lbaf[2] = LbaFormat {
            lbads: 12,
            ms: 8.into(),
            ..Default::default()
        };
        identify.lbaf[3] = LbaFormat {
            lbads: 12,
            ..Default::default()
        };
        let formats = formats(&identify);
        let facts: Vec<_> = formats
            .iter()
            .map(|format| (format.block_size, format.metadata_bytes, format.in_use))
            .collect();
        assert_eq!(facts, [(Some(512), 0, false), (Some(4096), 8, true)]);
    }
}
