//! The virtual machine as QEMU's command line.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};

use crate::forward::{self, Forward};

/// Where on the guest's PCI bus the first controller sits; each further one is a slot higher.
const FIRST_SLOT: usize = 0x10;
/// Where the first disk sits that a server of ours has, after all that the guest's init looks for.
const DISK_SLOT: usize = 0x4;
/// The last slot before the chipset's own functions.
const LAST_SLOT: usize = 0x1e;

/// The guest's virtio-serial port that leads to the monitor.
pub(crate) const MONITOR_PORT: u32 = 4;

/// A machine with NVMe controllers behind an IOMMU.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) controllers: Vec<Controller>,
    /// The sockets of vhost-user-blk servers, each of which is a disk.
    pub(crate) disks: Vec<PathBuf>,
    /// Virtio disks of QEMU's own, in slots after those.
    pub(crate) disk_files: Vec<DiskFile>,
    /// Whether the IOMMU remaps interrupts, without which VFIO refuses its service.
    pub(crate) interrupt_remapping: bool,
    /// Whether the kernel's own driver gets the controllers.
    pub(crate) kernel_driver: bool,
    /// Whether the guest reaches QEMU's own monitor, and with it can do to the machine what the
    /// user who runs it can.
    pub(crate) monitor: bool,
    /// By which the guest can be reached.
    pub(crate) forwards: Vec<Forward>,
    pub(crate) processors: u32,
    pub(crate) memory_mib: u32,
}

/// A virtio disk over a file, of which the page cache has nothing, with a thread of its own.
#[derive(Debug)]
pub(crate) struct DiskFile {
    pub(crate) path: PathBuf,
    /// How QEMU does the I/O: `native` or `io_uring`.
    pub(crate) aio: &'static str,
}

/// One NVMe controller and its namespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Controller {
    /// The serial number and the beginning of QEMU's names for it and its parts, and in upper case
    /// the end of the name of a variable.
    name: Option<String>,
    /// Bytes of each namespace.
    size: u64,
    /// Bytes of a logical block.
    lba: u32,
    namespaces: u32,
    drive: Drive,
    /// Most writes in a second to each namespace; further ones wait. 0 is no limit.
    write_iops: u32,
    /// Whether it shares slot and IOMMU group with the controller before.
    sibling: bool,
    /// Whether it sits in a hot-plug slot of its own, a PCI Express root port.
    port: bool,
    /// Whether it has an NVM subsystem, to which namespaces belong and can be attached from.
    subsystem: bool,
    /// Properties of QEMU's devices `nvme` and `nvme-ns`, as they are.
    device: String,
    namespace: String,
}

/// What a namespace keeps its data in.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Drive {
    /// A sparse file that goes with the machine.
    Temporary,
    /// Nothing: reads yield zeros.
    Null,
    /// A file of the user's.
    File(PathBuf),
}

impl Default for Controller {
    fn default() -> Self {
        Self {
            name: None,
            size: 1 << 30,
            lba: 512,
            namespaces: 1,
            drive: Drive::Temporary,
            write_iops: 0,
            sibling: false,
            port: false,
            subsystem: false,
            device: String::new(),
            namespace: String::new(),
        }
    }
}

impl FromStr for Controller {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut controller = Self::default();
        for setting in text
            .split(',')
            .map(str::trim)
            .filter(|setting| !setting.is_empty())
        {
            let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
            let number = || value.parse().with_context(|| format!("`{setting}`"));
            match key {
                "name" => {
                    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
                    ensure!(
                        value.starts_with(|first: char| first.is_ascii_lowercase())
                            && value.bytes().all(|byte| plain(byte) || byte == b'_'),
                        "`{setting}`: a name is of lower-case letters, digits and `_`, a letter first"
                    );
                    controller.name = Some(value.to_owned());
                }
                "size" => controller.size = size(value).with_context(|| format!("`{setting}`"))?,
                "lba" => controller.lba = number()?,
                "namespaces" => controller.namespaces = number()?,
                "drive" => {
                    controller.drive = match value {
                        "" => bail!("`drive` is `temporary`, `null` or a path"),
                        "temporary" => Drive::Temporary,
                        "null" => Drive::Null,
                        path => Drive::File(PathBuf::from(path)),
                    }
                }
                "write_iops" => controller.write_iops = number()?,
                "sibling" => controller.sibling = true,
                "port" => controller.port = true,
                "subsystem" => controller.subsystem = true,
                _ => {
                    ensure!(!value.is_empty(), "`{setting}`: KEY=VALUE is expected");
                    match key.strip_prefix("ns.") {
                        Some(key) => controller.namespace += &format!(",{key}={value}"),
                        None => controller.device += &format!(",{key}={value}"),
                    }
                }
            }
        }
        ensure!(
            controller.namespaces > 0,
            "a controller has at least one namespace"
        );
        ensure!(
            controller.namespaces == 1 || !matches!(controller.drive, Drive::File(_)),
            "several namespaces can't share one file"
        );
        Ok(controller)
    }
}

fn size(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(['K', 'M', 'G']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => bail!("a size is bytes, or ends in one of K, M, G"),
    };
    let number: u64 = digits.parse()?;
    number.checked_mul(1 << shift).context("too large")
}

/// Escapes a path inside of an option of QEMU's.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

impl Machine {
    /// Where on the first bus the controllers sit, or the root ports that they are behind.
    fn slots(&self) -> Result<Vec<(usize, usize)>> {
        let mut slots: Vec<(usize, usize)> = Vec::new();
        for controller in &self.controllers {
            slots.push(match (slots.last(), controller.sibling) {
                (Some(_), true) if controller.port => bail!("behind a port there are no siblings"),
                (Some(&(slot, function)), true) => (slot, function + 1),
                (None, true) => bail!("the first controller can't be a sibling"),
                (Some(&(slot, _)), false) => (slot + 1, 0),
                (None, false) => (FIRST_SLOT, 0),
            });
        }
        let fits = |&(slot, function): &(usize, usize)| slot <= LAST_SLOT && function < 8;
        ensure!(slots.iter().all(fits), "too many controllers for one bus");
        Ok(slots)
    }

    /// The PCI addresses of the controllers. The firmware numbers the buses behind root ports in
    /// the order of the ports.
    fn addresses(&self) -> Result<Vec<String>> {
        let mut buses = 0;
        let address = |(controller, (slot, function)): (&Controller, (usize, usize))| {
            if controller.port {
                buses += 1;
                format!("0000:{buses:02x}:00.0")
            } else {
                format!("0000:00:{slot:02x}.{function}")
            }
        };
        let places = self.controllers.iter().zip(self.slots()?);
        Ok(places.map(address).collect())
    }

    /// The PCI addresses of the disks, those of [`Machine::disks`] first.
    pub(crate) fn disk_addresses(&self) -> Vec<String> {
        let slots = DISK_SLOT..DISK_SLOT + self.disks.len() + self.disk_files.len();
        slots.map(|slot| format!("0000:00:{slot:02x}.0")).collect()
    }

    /// The variables that tell a command in the guest where the controllers are: `NVME0` and on,
    /// and `NVME_` with the name in upper case for those that have one. `NVME_ASYNC_MONITOR` is
    /// the port of the monitor, if there is one.
    pub(crate) fn environment(&self) -> Result<Vec<(String, OsString)>> {
        let mut environment = Vec::new();
        for (index, address) in self.addresses()?.into_iter().enumerate() {
            if let Some(name) = &self.controllers[index].name {
                let name = format!("NVME_{}", name.to_ascii_uppercase());
                environment.push((name, OsString::from(&address)));
            }
            environment.push((format!("NVME{index}"), OsString::from(address)));
        }
        if self.monitor {
            let port = OsString::from(format!("/dev/vport0p{MONITOR_PORT}"));
            environment.push(("NVME_ASYNC_MONITOR".to_owned(), port));
        }
        Ok(environment)
    }

    /// QEMU's arguments for all but boot and consoles. `directory` receives the temporary drives.
    pub(crate) fn arguments(&self, directory: &Path) -> Result<Vec<String>> {
        let interrupt_remapping = if self.interrupt_remapping {
            "on"
        } else {
            "off"
        };
        let has_ports = self.controllers.iter().any(|controller| controller.port);
        // With a thread for each processor QEMU 10.0 is soon killed by SIGSEGV, or keeps half of a
        // device, when one is pulled out under load.
        let threads = if has_ports { "single" } else { "multi" };
        let mut arguments: Vec<String> = [
            "-nodefaults -no-user-config -no-reboot -display none",
            &format!("-accel tcg,thread={threads}"),
            // One processor's access to memory-mapped registers while another one moves a BAR, as
            // resets do, may end at the wrong device or end the emulator. So the guest has no
            // HPET as its clock, and with EIM reaches its interrupt controller by other means.
            "-machine q35,kernel-irqchip=split,hpet=off -cpu max",
            &format!("-smp {} -m {}M", self.processors, self.memory_mib),
            &format!(
                "-device intel-iommu,intremap={interrupt_remapping},eim={interrupt_remapping}"
            ),
            // The root of the host, which the guest can't write to.
            "-fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
            "-device virtio-9p-pci,addr=0x3,fsdev=host,mount_tag=host",
        ]
        .iter()
        .flat_map(|words| words.split(' '))
        .map(str::to_owned)
        .collect();
        if has_ports {
            // Without help of the firmware's, as in real machines: the kernel's driver of the port
            // sees to what is plugged and unplugged.
            arguments.push("-global".to_owned());
            arguments.push("ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off".to_owned());
        }
        ensure!(
            DISK_SLOT + self.disks.len() + self.disk_files.len() <= forward::SLOT,
            "too many disks for one bus"
        );
        if !self.disks.is_empty() {
            // Memory that the servers share, and that can't be taken away from them.
            let size = self.memory_mib;
            arguments.extend([
                "-object".to_owned(),
                format!("memory-backend-memfd,id=ram,size={size}M,share=on"),
                "-machine".to_owned(),
                "memory-backend=ram".to_owned(),
            ]);
        }
        for (index, socket) in self.disks.iter().enumerate() {
            let path = escaped(socket);
            let (queues, slot) = (self.processors, DISK_SLOT + index);
            arguments.extend([
                "-chardev".to_owned(),
                format!("socket,id=disk{index},path={path},reconnect=1"),
                "-device".to_owned(),
                format!(
                    "vhost-user-blk-pci,addr={slot:#x},chardev=disk{index},num-queues={queues}"
                ),
            ]);
        }
        for (index, file) in self.disk_files.iter().enumerate() {
            let (path, aio) = (escaped(&file.path), file.aio);
            let (queues, slot) = (self.processors, DISK_SLOT + self.disks.len() + index);
            arguments.extend([
                "-object".to_owned(),
                format!("iothread,id=file{index}-thread"),
                "-blockdev".to_owned(),
                format!("file,node-name=file{index},filename={path},cache.direct=on,aio={aio}"),
                "-device".to_owned(),
                format!(
                    "virtio-blk-pci,addr={slot:#x},drive=file{index},iothread=file{index}-thread,num-queues={queues}"
                ),
            ]);
        }
        arguments.extend(forward::arguments(&self.forwards));
        let slots = self.slots()?;
        for (index, (controller, (slot, function))) in
            self.controllers.iter().zip(&slots).enumerate()
        {
            let name = controller
                .name
                .clone()
                .unwrap_or_else(|| format!("nvme{index}"));
            let mut device = |properties: String| {
                arguments.push("-device".to_owned());
                arguments.push(properties);
            };
            let place = if controller.port {
                device(format!(
                    "pcie-root-port,id={name}-port,addr={slot:#x}.0,chassis={index},slot={index}"
                ));
                format!("bus={name}-port,addr=0x0")
            } else {
                let shared = slots.iter().filter(|(other, _)| other == slot).count() > 1;
                let multifunction = if shared { ",multifunction=on" } else { "" };
                format!("addr={slot:#x}.{function}{multifunction}")
            };
            let subsystem = if controller.subsystem {
                device(format!("nvme-subsys,id={name}-subsystem,nqn={name}"));
                format!(",subsys={name}-subsystem")
            } else {
                String::new()
            };
            // Not the plain name: QEMU has no devices that are named like their properties.
            device(format!(
                "nvme,id={name}-nvme,serial={name},{place}{subsystem}{}",
                controller.device
            ));
            for namespace in 1..=controller.namespaces {
                let drive = format!("{name}n{namespace}");
                let file = directory.join(format!("{drive}.img"));
                arguments.extend(controller.drive(&drive, &file)?);
                arguments.push("-device".to_owned());
                arguments.push(format!(
                    "nvme-ns,id={drive},bus={name}-nvme,nsid={namespace},drive={drive},\
                     logical_block_size={lba},physical_block_size={lba}{}",
                    controller.namespace,
                    lba = controller.lba,
                ));
            }
        }
        Ok(arguments)
    }
}

impl Controller {
    /// QEMU's arguments for the drive of a namespace.
    fn drive(&self, name: &str, temporary: &Path) -> Result<Vec<String>> {
        let option = "-blockdev".to_owned();
        let iops = self.write_iops;
        if iops == 0 {
            return Ok(vec![option, self.block_device(name, temporary)?]);
        }
        let unlimited = self.block_device(&format!("{name}-data"), temporary)?;
        Ok(vec![
            "-object".to_owned(),
            format!(
                r#"{{"qom-type":"throttle-group","id":"{name}-limit","limits":{{"iops-write":{iops}}}}}"#
            ),
            option.clone(),
            unlimited,
            option,
            format!("throttle,node-name={name},throttle-group={name}-limit,file={name}-data"),
        ])
    }

    fn block_device(&self, name: &str, temporary: &Path) -> Result<String> {
        let path = match &self.drive {
            Drive::Null => {
                return Ok(format!(
                    "null-co,node-name={name},size={},read-zeroes=on",
                    self.size
                ));
            }
            Drive::Temporary => {
                File::create_new(temporary)
                    .and_then(|file| file.set_len(self.size))
                    .with_context(|| temporary.display().to_string())?;
                temporary
            }
            Drive::File(path) => path,
        };
        // Durability is no matter: the host does not fail here.
        let path = escaped(path);
        Ok(format!(
            "file,node-name={name},filename={path},cache.no-flush=on,discard=unmap"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(controllers: &[&str]) -> Machine {
        Machine {
            controllers: controllers
                .iter()
                .map(|text| text.parse().unwrap())
                .collect(),
            disks: Vec::new(),
            disk_files: Vec::new(),
            interrupt_remapping: true,
            kernel_driver: false,
            monitor: false,
            forwards: Vec::new(),
            processors: 2,
            memory_mib: 2048,
        }
    }

    #[test]
    fn settings_are_ours_or_go_to_qemu() {
        let controller: Controller =
            "name=small, size=64M, lba=4096, drive=null, mdts=1, ns.zoned=on"
                .parse()
                .unwrap();
        let expected = Controller {
            name: Some("small".to_owned()),
            size: 64 << 20,
            lba: 4096,
            drive: Drive::Null,
            device: ",mdts=1".to_owned(),
            namespace: ",zoned=on".to_owned(),
            ..Controller::default()
        };
        assert_eq!(controller, expected);
        assert_eq!("".parse::<Controller>().unwrap(), Controller::default());
    }

    #[test]
    fn bad_settings_are_refused() {
        for text in [
            "size=1T",
            "size=",
            "lba=x",
            "namespaces=0",
            "name=A",
            "drive=",
            "mdts",
            "drive=/a,namespaces=2",
        ] {
            assert!(text.parse::<Controller>().is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_are_told_by_number_and_name() {
        let environment = machine(&["name=a", "", "sibling,name=b_c"])
            .environment()
            .unwrap();
        let text: Vec<String> = environment
            .into_iter()
            .map(|(name, value)| format!("{name}={}", value.display()))
            .collect();
        assert_eq!(
            text,
            [
                "NVME_A=0000:00:10.0",
                "NVME0=0000:00:10.0",
                "NVME1=0000:00:11.0",
                "NVME_B_C=0000:00:11.1",
                "NVME2=0000:00:11.1"
            ]
        );
        assert!(machine(&["sibling"]).environment().is_err());
        assert!(machine(&["", "port,sibling"]).environment().is_err());
        assert!(machine(&[""; 16]).environment().is_err());
    }

    #[test]
    fn the_firmware_numbers_the_buses_behind_ports() {
        let machine = Machine {
            monitor: true,
            ..machine(&["", "name=first,port", "port", "name=last"])
        };
        let environment = machine.environment().unwrap();
        let value = |wanted: &str| {
            let found = environment.iter().find(|(name, _)| name == wanted);
            found.unwrap().1.to_str().unwrap()
        };
        assert_eq!(value("NVME0"), "0000:00:10.0");
        assert_eq!(value("NVME_FIRST"), "0000:01:00.0");
        assert_eq!(value("NVME2"), "0000:02:00.0");
        assert_eq!(value("NVME_LAST"), "0000:00:13.0");
        assert_eq!(value("NVME_ASYNC_MONITOR"), "/dev/vport0p4");
    }

    #[test]
    fn ports_and_subsystems_come_before_what_is_in_them() {
        let machine = machine(&["name=a,drive=null,port", "name=b,drive=null,subsystem"]);
        let arguments = machine.arguments(Path::new("/run")).unwrap();
        let place = |wanted: &str| {
            let found = arguments.iter().position(|words| words.starts_with(wanted));
            found.unwrap_or_else(|| panic!("{wanted} in {arguments:?}"))
        };
        assert!(
            place("pcie-root-port,id=a-port,addr=0x10.0,")
                < place("nvme,id=a-nvme,serial=a,bus=a-port,addr=0x0")
        );
        assert!(
            place("nvme-subsys,id=b-subsystem,")
                < place("nvme,id=b-nvme,serial=b,addr=0x11.0,subsys=b-subsystem")
        );
        assert!(place("ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off") > 0);
    }

    #[test]
    fn disks_over_files_come_after_those_of_servers() {
        let file = |path: &str, aio| DiskFile {
            path: path.into(),
            aio,
        };
        let machine = Machine {
            disks: vec!["/run/a.sock".into()],
            disk_files: vec![file("/b", "native"), file("/c,d", "io_uring")],
            ..machine(&[])
        };
        assert_eq!(
            machine.disk_addresses(),
            ["0000:00:04.0", "0000:00:05.0", "0000:00:06.0"]
        );
        let arguments = machine.arguments(Path::new("/run")).unwrap().join(" ");
        for expected in [
            "vhost-user-blk-pci,addr=0x4,",
            "file,node-name=file0,filename=/b,cache.direct=on,aio=native",
            "virtio-blk-pci,addr=0x5,drive=file0,iothread=file0-thread,",
            "filename=/c,,d,cache.direct=on,aio=io_uring",
            "virtio-blk-pci,addr=0x6,drive=file1,",
        ] {
            assert!(arguments.contains(expected), "{expected} in {arguments}");
        }
    }

    #[test]
    fn every_namespace_has_a_drive() {
        let arguments = machine(&[
            "drive=null,namespaces=2,mdts=1",
            "drive=/a,,sibling",
            "drive=/b,write_iops=9",
        ]);
        let arguments = arguments.arguments(Path::new("/run")).unwrap().join(" ");
        for expected in [
            "nvme,id=nvme0-nvme,serial=nvme0,addr=0x10.0,multifunction=on,mdts=1",
            "nvme,id=nvme1-nvme,serial=nvme1,addr=0x10.1,multifunction=on",
            "null-co,node-name=nvme0n2,size=1073741824",
            "nvme-ns,id=nvme0n2,bus=nvme0-nvme,nsid=2,drive=nvme0n2,logical_block_size=512",
            "file,node-name=nvme1n1,filename=/a,",
            r#""id":"nvme2n1-limit","limits":{"iops-write":9}} -blockdev file,node-name=nvme2n1-data,"#,
            "throttle,node-name=nvme2n1,throttle-group=nvme2n1-limit,file=nvme2n1-data",
        ] {
            assert!(arguments.contains(expected), "{expected} in {arguments}");
        }
    }
}
