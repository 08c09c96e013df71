//! Against a directory tree that reacts to writes as the kernel does.

use std::os::unix::fs::symlink;

use super::*;
use crate::pci::testing::{ADDRESS, Machine};

const NVME: &str = "0x010802";

fn address() -> PciAddress {
    ADDRESS.parse().unwrap()
}

/// One controller with one namespace, bound to the kernel's driver.
fn machine() -> Machine {
    let machine = Machine::new();
    machine.function(ADDRESS, NVME, "nvme", "17");
    machine.namespace(ADDRESS, "nvme0n1", "nvme0n1");
    machine
}

fn at(driver: &str, reserved: &str) -> (Option<String>, String) {
    (
        Some(driver.to_owned()).filter(|driver| !driver.is_empty()),
        reserved.to_owned(),
    )
}

fn held(machine: &Machine) -> String {
    let error = bind(&machine.host(), address(), false).unwrap_err();
    assert!(matches!(error, BindError::Held { .. }), "{error}");
    assert_eq!(machine.writes(), [], "nothing may be touched");
    assert_eq!(machine.state(ADDRESS), at("nvme", "(null)"));
    error.to_string()
}

#[test]
fn there_and_back() {
    let machine = machine();
    let bound = bind(&machine.host(), address(), false).unwrap();
    assert_eq!(
        bound,
        Bound {
            driver: Some("vfio-pci".to_owned()),
            changed: true
        }
    );
    assert_eq!(machine.state(ADDRESS), at("vfio-pci", "vfio-pci"));

    let bound = unbind(&machine.host(), address(), false).unwrap();
    assert_eq!(
        bound,
        Bound {
            driver: Some("nvme".to_owned()),
            changed: true
        }
    );
    assert_eq!(machine.state(ADDRESS), at("nvme", "(null)"));
}

#[test]
fn twice_is_once() {
    let machine = machine();
    bind(&machine.host(), address(), false).unwrap();
    let writes = machine.writes().len();
    assert!(!bind(&machine.host(), address(), false).unwrap().changed);
    assert_eq!(machine.writes().len(), writes);
    unbind(&machine.host(), address(), false).unwrap();
    let writes = machine.writes().len();
    assert!(!unbind(&machine.host(), address(), false).unwrap().changed);
    assert_eq!(machine.writes().len(), writes);
}

#[test]
fn from_no_driver() {
    let machine = Machine::new();
    machine.function(ADDRESS, NVME, "", "17");
    assert!(bind(&machine.host(), address(), false).unwrap().changed);
    assert_eq!(machine.state(ADDRESS), at("vfio-pci", "vfio-pci"));
}

#[test]
fn back_to_no_driver() {
    let machine = machine();
    bind(&machine.host(), address(), false).unwrap();
    machine.file("sys/bus/pci/drivers/nvme/refuses", "");
    let bound = unbind(&machine.host(), address(), false).unwrap();
    assert_eq!(
        bound,
        Bound {
            driver: None,
            changed: true
        }
    );
    assert_eq!(machine.state(ADDRESS), at("", "(null)"));
}

#[test]
fn a_reservation_alone_is_lifted() {
    let machine = machine();
    machine.file(
        &format!("sys/bus/pci/devices/{ADDRESS}/driver_override"),
        "vfio-pci\n",
    );
    assert!(unbind(&machine.host(), address(), false).unwrap().changed);
    assert_eq!(machine.state(ADDRESS), at("nvme", "(null)"));
    assert_eq!(
        machine.writes(),
        [("driver_override".to_owned(), String::new())]
    );
}

#[test]
fn what_is_no_controller_is_left_alone() {
    let machine = Machine::new();
    let error = bind(&machine.host(), address(), true).unwrap_err();
    assert!(matches!(error, BindError::NoSuchFunction { .. }));
    machine.function(ADDRESS, "0x020000", "e1000", "17");
    for result in [
        bind(&machine.host(), address(), true),
        unbind(&machine.host(), address(), true),
    ] {
        assert!(matches!(result.unwrap_err(), BindError::NotNvme { .. }));
    }
    assert_eq!(machine.writes(), []);
}

#[test]
fn no_iommu_and_no_vfio() {
    let machine = Machine::new();
    machine.function(ADDRESS, NVME, "nvme", "");
    let error = bind(&machine.host(), address(), true).unwrap_err();
    assert!(error.to_string().contains("intel_iommu=on"), "{error}");

    let machine = self::machine();
    std::fs::remove_dir(machine.path("sys/bus/pci/drivers/vfio-pci")).unwrap();
    let error = bind(&machine.host(), address(), true).unwrap_err();
    assert!(error.to_string().contains("modprobe vfio-pci"), "{error}");
    assert_eq!(machine.writes(), []);
}

#[test]
fn a_mounted_partition() {
    let machine = machine();
    machine.file(
        "proc/self/mountinfo",
        "22 1 0:21 / /proc rw shared:12 - proc proc rw\n\
         30 1 259:1 / /srv/my\\040data rw,noatime shared:1 - ext4 /dev/root rw\n",
    );
    assert!(held(&machine).contains("nvme0n1p1 is mounted at /srv/my data"));
}

#[test]
fn a_mount_known_by_its_source() {
    let machine = machine();
    machine.file(
        "proc/self/mountinfo",
        "30 1 0:40 / /home rw - btrfs /dev/nvme0n1 rw\n",
    );
    assert!(held(&machine).contains("nvme0n1 is mounted at /home"));

    machine.directory("dev/disk/by-label");
    symlink(
        machine.path("dev/nvme0n1p1"),
        machine.path("dev/disk/by-label/home"),
    )
    .unwrap();
    machine.file(
        "proc/self/mountinfo",
        "30 1 0:40 / /home rw - btrfs /dev/disk/by-label/home rw\n",
    );
    assert!(held(&machine).contains("nvme0n1p1 is mounted at /home"));
}

#[test]
fn swap_space() {
    let machine = machine();
    machine.file(
        "proc/swaps",
        "Filename Type Size Used Priority\n/dev/nvme0n1p1 partition 1 0 -2\n",
    );
    assert!(held(&machine).contains("nvme0n1p1 is swap space"));
}

#[test]
fn part_of_a_device_mapper_volume() {
    let machine = machine();
    machine.directory("sys/block/nvme0n1/nvme0n1p1/holders/dm-3");
    assert!(held(&machine).contains("nvme0n1p1 is part of dm-3"));
}

#[test]
fn open_in_a_process() {
    let machine = machine();
    machine.process(812, "postgres", "/dev/nvme0n1");
    machine.process(813, "other", "/dev/nvme0n10");
    assert!(held(&machine).contains("nvme0n1 is open in postgres (process 812)."));
}

#[test]
fn one_path_of_several() {
    let machine = Machine::new();
    machine.function(ADDRESS, NVME, "nvme", "17");
    machine.namespace(ADDRESS, "nvme0c0n1", "nvme0n1");
    machine.directory("sys/block/nvme0n1/holders/md0");
    assert!(held(&machine).contains("nvme0n1 is part of md0"));
}

#[test]
fn other_disks_in_use_do_not_matter() {
    let machine = machine();
    machine.file(
        "proc/self/mountinfo",
        "30 1 259:9 / / rw - ext4 /dev/nvme1n1p1 rw\n31 1 0:5 / /x rw - tmpfs nvme0n1 rw\n",
    );
    machine.file(
        "proc/swaps",
        "Filename Type Size Used Priority\n/dev/nvme1n1p2 partition 1 0 -2\n",
    );
    assert!(bind(&machine.host(), address(), false).is_ok());
}

#[test]
fn force_takes_what_is_held() {
    let machine = machine();
    machine.directory("sys/block/nvme0n1/holders/md0");
    assert!(bind(&machine.host(), address(), true).unwrap().changed);
    assert_eq!(machine.state(ADDRESS), at("vfio-pci", "vfio-pci"));
}

#[test]
fn in_use_through_vfio() {
    let machine = machine();
    bind(&machine.host(), address(), false).unwrap();
    machine.process(99, "qemu-system-x86", "/dev/vfio/17");
    let error = unbind(&machine.host(), address(), false).unwrap_err();
    assert!(
        error.to_string().contains("qemu-system-x86 (process 99)"),
        "{error}"
    );
    assert_eq!(machine.state(ADDRESS), at("vfio-pci", "vfio-pci"));
    assert!(unbind(&machine.host(), address(), true).unwrap().changed);
}

/// Whichever step fails, the function is left as it was found.
#[test]
fn failing_steps_are_undone() {
    for step in ["driver_override", "nvme/unbind", "drivers_probe"] {
        let machine = machine();
        machine.fail(step);
        let error = bind(&machine.host(), address(), false).unwrap_err();
        assert_eq!(
            machine.state(ADDRESS),
            at("nvme", "(null)"),
            "{step}: {error}"
        );
    }
    for step in ["driver_override", "vfio-pci/unbind", "drivers_probe"] {
        let machine = machine();
        bind(&machine.host(), address(), false).unwrap();
        machine.fail(step);
        let error = unbind(&machine.host(), address(), false).unwrap_err();
        assert_eq!(
            machine.state(ADDRESS),
            at("vfio-pci", "vfio-pci"),
            "{step}: {error}"
        );
    }
}

#[test]
fn a_driver_that_does_not_want_it_is_undone() {
    let machine = machine();
    machine.file("sys/bus/pci/drivers/vfio-pci/refuses", "");
    let error = bind(&machine.host(), address(), false).unwrap_err();
    assert_eq!(machine.state(ADDRESS), at("nvme", "(null)"));
    assert!(
        error.to_string().contains("all is as it was before"),
        "{error}"
    );
}

#[test]
fn what_can_not_be_undone_is_said() {
    let machine = machine();
    machine.fail("drivers_probe");
    machine.fail("drivers_probe");
    let error = bind(&machine.host(), address(), false).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("undoing the steps before failed too"),
        "{error}"
    );
    assert_eq!(machine.state(ADDRESS), at("", "(null)"));
}
