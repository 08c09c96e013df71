//! The registers of a controller that this process has open, past the driver.

use std::fs::{self, File};
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use nvme_async::nvme_spec::registers::offset::{CC, CSTS};

/// Controller Fatal Status (NVMe base specification 2.0, section 3.1.3.6).
const FATAL: u32 = 1 << 1;

/// Where vfio-pci has configuration space in a device's file; BAR 0 begins where the file does.
const CONFIGURATION: u64 = 7 << 40;
/// Command register, and Bus Master Enable in it (PCI local bus specification 3.0, section 6.2.2).
const COMMAND: u64 = CONFIGURATION + 0x04;
const BUS_MASTER: u16 = 1 << 2;

/// Disables the only controller that is open.
pub(super) fn disable() {
    let written = open_device().write_all_at(&[0; 4], CC.into());
    written.expect("writes a register");
}

/// Makes the only controller that is open fail: it can't reach memory for a while, and reports a
/// fatal error. Commands must be under way.
pub(super) fn fail() {
    let device = open_device();
    let mut command = [0; 2];
    let read = device.read_exact_at(&mut command, COMMAND);
    read.expect("reads the command register");
    let without = u16::from_le_bytes(command) & !BUS_MASTER;
    let write = |command: &[u8]| {
        let written = device.write_all_at(command, COMMAND);
        written.expect("writes the command register");
    };
    write(&without.to_le_bytes());
    let start = Instant::now();
    loop {
        let mut status = [0; 4];
        let read = device.read_exact_at(&mut status, CSTS.into());
        read.expect("reads a register");
        if u32::from_le_bytes(status) & FATAL != 0 {
            break;
        }
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "it does not fail"
        );
        thread::sleep(Duration::from_millis(1));
    }
    write(&command);
}

/// The one VFIO device of this process. Until this is dropped, the device stays open.
fn open_device() -> File {
    let descriptors = fs::read_dir("/proc/self/fd").expect("proc is mounted");
    let mut devices = descriptors.filter_map(Result::ok).filter(|entry| {
        fs::read_link(entry.path()).is_ok_and(|target| target.ends_with("anon_inode:[vfio-device]"))
    });
    let device = devices.next().expect("a controller is open");
    assert!(devices.next().is_none(), "one controller only is open");
    let descriptor: Option<RawFd> = device
        .file_name()
        .to_str()
        .and_then(|name| name.parse().ok());
    let descriptor = descriptor.expect("descriptors are numbers");
    // SAFETY: the driver has it open, and closes it only after the test gives the controller up.
    let device = unsafe { BorrowedFd::borrow_raw(descriptor) };
    File::from(device.try_clone_to_owned().expect("a second descriptor"))
}
