//! Against a directory tree that looks like sysfs.

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

/// A made-up machine.
struct Machine {
    tree: TempDir,
    roots: Roots,
}

impl Machine {
    fn new() -> Self {
        let tree = tempfile::tempdir().unwrap();
        let roots = Roots::under(tree.path());
        Self { tree, roots }
    }

    fn function(self, address: &str, class: &str, driver: &str, group: &str) -> Self {
        let dir = self.tree.path().join("sys/bus/pci/devices").join(address);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("class"), format!("{class}\n")).unwrap();
        if !driver.is_empty() {
            let drivers = self.tree.path().join("sys/bus/pci/drivers").join(driver);
            fs::create_dir_all(&drivers).unwrap();
            symlink(&drivers, dir.join("driver")).unwrap();
        }
        if !group.is_empty() {
            let of_group = self.tree.path().join("sys/kernel/iommu_groups").join(group);
            fs::create_dir_all(of_group.join("devices")).unwrap();
            symlink(&of_group, dir.join("iommu_group")).unwrap();
            symlink(&dir, of_group.join("devices").join(address)).unwrap();
        }
        self
    }

    fn process(self, pid: u32, command: &str, opened: &str) -> Self {
        let dir = self.tree.path().join("proc").join(pid.to_string());
        fs::create_dir_all(dir.join("fd")).unwrap();
        fs::write(dir.join("comm"), format!("{command}\n")).unwrap();
        symlink(opened, dir.join("fd/7")).unwrap();
        self
    }

    fn locate(&self, address: &str) -> Result<u32, OpenError> {
        locate(&self.roots, address.parse().unwrap())
    }
}

const ADDRESS: &str = "0000:44:00.0";

#[test]
fn addresses() {
    for (text, shown) in [
        ("0000:44:00.0", "0000:44:00.0"),
        ("44:1f.7", "0000:44:1f.7"),
        ("10000:E1:00.1", "10000:e1:00.1"),
        ("0:2:0.0", "0000:02:00.0"),
    ] {
        assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), shown);
    }
    for text in [
        "",
        "44",
        "44:00",
        "0000:44:00.8",
        "0000:44:20.0",
        "0000:144:00.0",
        "0000:44:00.00",
        "a:b:c:d.0",
        "0000:+4:00.0",
        "0000:44:00.0/1",
        ":44:00.",
        "nvme0",
    ] {
        let error = text.parse::<PciAddress>().unwrap_err();
        assert!(error.to_string().contains("0000:44:00.0"), "{error}");
    }
}

#[test]
fn a_bound_controller_gives_its_group() {
    let machine = Machine::new().function(ADDRESS, "0x010802", "vfio-pci", "17");
    assert_eq!(machine.locate(ADDRESS).unwrap(), 17);
}

#[test]
fn no_such_function() {
    let error = Machine::new().locate(ADDRESS).unwrap_err();
    assert!(matches!(error, OpenError::NoSuchFunction { .. }));
    assert!(error.to_string().contains("nvme-async list"), "{error}");
}

#[test]
fn not_a_controller() {
    let machine = Machine::new().function(ADDRESS, "0x020000", "vfio-pci", "17");
    let error = machine.locate(ADDRESS).unwrap_err();
    assert!(matches!(&error, OpenError::NotNvme { class, .. } if class == "0x020000"));
}

#[test]
fn bound_elsewhere() {
    let machine = Machine::new().function(ADDRESS, "0x010802", "nvme", "17");
    let error = machine.locate(ADDRESS).unwrap_err();
    assert!(matches!(&error, OpenError::NotBound { driver: Some(driver), .. } if driver == "nvme"));
    assert!(
        error.to_string().contains("nvme-async bind 0000:44:00.0"),
        "{error}"
    );
    assert!(error.to_string().contains("`nvme`"), "{error}");
}

#[test]
fn bound_to_nothing() {
    let machine = Machine::new().function(ADDRESS, "0x010802", "", "17");
    let error = machine.locate(ADDRESS).unwrap_err();
    assert!(matches!(error, OpenError::NotBound { driver: None, .. }));
    assert!(error.to_string().contains("no driver"), "{error}");
}

#[test]
fn no_iommu() {
    let machine = Machine::new().function(ADDRESS, "0x010802", "nvme", "");
    let error = machine.locate(ADDRESS).unwrap_err();
    assert!(matches!(error, OpenError::NoIommu { .. }));
    assert!(error.to_string().contains("intel_iommu=on"), "{error}");
}

#[test]
fn the_mode_without_an_iommu_is_none() {
    let machine = Machine::new().function(ADDRESS, "0x010802", "vfio-pci", "0");
    let group = machine.tree.path().join("sys/kernel/iommu_groups/0");
    fs::write(group.join("name"), "vfio-noiommu\n").unwrap();
    assert!(matches!(
        machine.locate(ADDRESS).unwrap_err(),
        OpenError::NoIommu { .. }
    ));
}

#[test]
fn who_keeps_a_group_from_being_viable() {
    let machine = Machine::new()
        .function(ADDRESS, "0x010802", "vfio-pci", "17")
        .function("0000:44:00.2", "0x020000", "ixgbe", "17")
        .function("0000:44:00.1", "0x010802", "nvme", "17")
        .function("0000:43:00.0", "0x060400", "pcieport", "17")
        .function("0000:44:00.3", "0x010802", "", "17");
    let others = others_in_group(&machine.roots, 17, ADDRESS.parse().unwrap());
    let shown: Vec<_> = others.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["0000:44:00.1 (nvme)", "0000:44:00.2 (ixgbe)"]);
    let error = OpenError::GroupNotViable {
        address: ADDRESS.parse().unwrap(),
        group: 17,
        others,
    };
    assert!(
        error
            .to_string()
            .contains("0000:44:00.1 (nvme), 0000:44:00.2 (ixgbe)"),
        "{error}"
    );
}

#[test]
fn who_has_a_group_open() {
    let machine = Machine::new()
        .process(12, "qemu-system-x86", "/dev/vfio/17")
        .process(13, "other", "/dev/vfio/18")
        .process(14, "bystander", "/dev/vfio/170");
    let holders = holders(&machine.roots, 17);
    assert_eq!(
        holders,
        [Holder {
            pid: 12,
            command: "qemu-system-x86".to_owned()
        }]
    );
    let error = OpenError::GroupBusy {
        address: ADDRESS.parse().unwrap(),
        group: 17,
        holders,
    };
    assert!(
        error.to_string().contains("qemu-system-x86 (process 12)"),
        "{error}"
    );
}

#[test]
fn whose_node_it_is() {
    let machine = Machine::new();
    let node = machine.roots.group_node(17);
    fs::create_dir_all(node.parent().unwrap()).unwrap();
    fs::write(&node, "").unwrap();
    let meta = fs::metadata(&node).unwrap();
    let owner = owner(&node);
    assert!(owner.contains(&format!("uid {}", meta.uid())), "{owner}");
    assert!(
        owner.contains(&format!("mode {:04o}", meta.mode() & 0o7777)),
        "{owner}"
    );
}
