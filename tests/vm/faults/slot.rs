//! The hot-plug slot of a controller, as someone who stands before the machine sees it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{address, program};
use crate::monitor::{execute, try_execute, wait_until_deleted};

/// Generous: the kernel itself waits 5 s after the button was pressed.
const LIMIT: Duration = Duration::from_secs(60);

/// Capability of PCI Express, and its register Slot Control (PCI Express base specification 6.0,
/// section 7.5.3.10).
const CAPABILITY: u8 = 0x10;
const SLOT_CONTROL: u64 = 0x18;
const HOT_PLUG_INTERRUPT: u16 = 1 << 5;
/// The indicator is off, and so is the power: when both are, QEMU removes what is in the slot.
const OFF: u16 = 3 << 8 | 1 << 10;

/// The slot of the controller that the machine has under this name.
pub(super) struct Slot {
    name: &'static str,
    /// QEMU's name for what is in it.
    device: String,
    address: String,
    port: File,
    control: u64,
}

impl Slot {
    /// The slot with its controller in it.
    pub(super) fn of(name: &'static str) -> Self {
        let address = address(name);
        let path = fs::canonicalize(device(&address)).expect("the controller is there");
        let port = path.parent().expect("a port").join("config");
        let port = OpenOptions::new().read(true).write(true).open(port);
        let port = port.expect("root may configure the port");
        let byte = |at: u64| {
            let mut byte = [0];
            port.read_exact_at(&mut byte, at).expect("reads the port");
            byte[0]
        };
        let mut capability = u64::from(byte(0x34));
        while byte(capability) != CAPABILITY {
            capability = u64::from(byte(capability + 1));
            assert_ne!(capability, 0, "the port is of PCI Express");
        }
        Self {
            name,
            device: format!("{name}-nvme"),
            address,
            port,
            control: capability + SLOT_CONTROL,
        }
    }

    /// Asks for the controller's removal, as by the button of the slot: the kernel gives it up in
    /// order, and only then is it gone.
    pub(super) fn press_button(&self) {
        execute("device_del", json!({ "id": self.device }));
    }

    /// Takes the controller away, in the middle of whatever it does. The kernel hears of it
    /// afterwards.
    pub(super) fn yank(&self) {
        let control = self.read_control();
        let off = control & !HOT_PLUG_INTERRUPT | OFF;
        self.write_control(off);
        eventually("the controller is gone", || !exists(&self.device));
        self.write_control(control);
    }

    /// Waits until the kernel has forgotten the controller and has switched the slot off, and until
    /// QEMU has nothing of it any more.
    pub(super) fn wait_until_empty(&self) {
        eventually("the kernel gives the controller up", || {
            !device(&self.address).exists()
        });
        eventually("the slot is off", || self.read_control() & OFF == OFF);
        wait_until_deleted(&self.device, LIMIT);
    }

    /// Plugs a new controller in, of the same NVM subsystem and so with the namespaces of the old
    /// one, and binds it to vfio-pci. QEMU has reported the end of the old one.
    pub(super) fn plug(&self) {
        let (port, subsystem) = (
            format!("{}-port", self.name),
            format!("{}-subsystem", self.name),
        );
        let properties = json!({
            "driver": "nvme", "id": self.device, "serial": self.name, "bus": port, "subsys": subsystem,
        });
        execute("device_add", properties);
        // The kernel's own driver may be busy with it at first.
        eventually("the new controller is bound", || {
            let bound = program(&["nvme-async", "bind", &self.address]);
            bound.status == Some(0) && driver_is_vfio(&self.address)
        });
    }

    fn read_control(&self) -> u16 {
        let mut bytes = [0; 2];
        let read = self.port.read_exact_at(&mut bytes, self.control);
        read.expect("reads the port");
        u16::from_le_bytes(bytes)
    }

    fn write_control(&self, control: u16) {
        let written = self.port.write_all_at(&control.to_le_bytes(), self.control);
        written.expect("writes the port");
    }
}

fn device(address: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(address)
}

/// Whether QEMU has such a device.
fn exists(name: &str) -> bool {
    let path = format!("/machine/peripheral/{name}");
    try_execute("qom-list", json!({ "path": path })).is_ok()
}

fn driver_is_vfio(address: &str) -> bool {
    let driver = fs::read_link(device(address).join("driver"));
    driver.is_ok_and(|driver| driver.ends_with("vfio-pci"))
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
