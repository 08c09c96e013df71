//! The virtual machine as QEMU's command line.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};

/// Where on the guest's PCI bus the first controller sits; each further one is a slot higher.
const FIRST_SLOT: usize = 0x10;
/// The last slot before the chipset's own functions.
const LAST_SLOT: usize = 0x1e;

/// A machine with NVMe controllers behind an IOMMU.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) controllers: Vec<Controller>,
    /// Whether the IOMMU remaps interrupts, without which VFIO refuses its service.
    pub(crate) interrupt_remapping: bool,
    /// Whether the kernel's own driver gets the controllers.
    pub(crate) kernel_driver: bool,
    pub(crate) processors: u32,
    pub(crate) memory_mib: u32,
}

/// One NVMe controller and its namespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Controller {
    /// The serial number, and in upper case the end of the name of a variable.
    name: Option<String>,
    /// Bytes of each namespace.
    size: u64,
    /// Bytes of a logical block.
    lba: u32,
    namespaces: u32,
    drive: Drive,
    /// Whether it shares slot and IOMMU group with the controller before.
    sibling: bool,
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
            sibling: false,
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
                        !value.is_empty() && value.bytes().all(|byte| plain(byte) || byte == b'_'),
                        "`{setting}`: a name is of lower-case letters, digits and `_`"
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
                "sibling" => controller.sibling = true,
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
    /// The PCI addresses of the controllers.
    fn slots(&self) -> Result<Vec<(usize, usize)>> {
        let mut slots: Vec<(usize, usize)> = Vec::new();
        for controller in &self.controllers {
            slots.push(match (slots.last(), controller.sibling) {
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

    /// The variables that tell a command in the guest where the controllers are: `NVME0` and on,
    /// and `NVME_` with the name in upper case for those that have one.
    pub(crate) fn environment(&self) -> Result<Vec<(String, OsString)>> {
        let mut environment = Vec::new();
        for (index, (slot, function)) in self.slots()?.into_iter().enumerate() {
            let address = format!("0000:00:{slot:02x}.{function}");
            if let Some(name) = &self.controllers[index].name {
                let name = format!("NVME_{}", name.to_ascii_uppercase());
                environment.push((name, OsString::from(&address)));
            }
            environment.push((format!("NVME{index}"), OsString::from(address)));
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
        let mut arguments: Vec<String> = [
            "-nodefaults -no-user-config -no-reboot -display none -accel tcg,thread=multi",
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
        let slots = self.slots()?;
        for (index, (controller, (slot, function))) in
            self.controllers.iter().zip(&slots).enumerate()
        {
            let serial = controller
                .name
                .clone()
                .unwrap_or_else(|| format!("nvme{index}"));
            let shared = slots.iter().filter(|(other, _)| other == slot).count() > 1;
            let multifunction = if shared { ",multifunction=on" } else { "" };
            arguments.push("-device".to_owned());
            arguments.push(format!(
                "nvme,id=nvme{index},serial={serial},addr={slot:#x}.{function}{multifunction}{}",
                controller.device
            ));
            for namespace in 1..=controller.namespaces {
                let drive = format!("nvme{index}n{namespace}");
                let file = directory.join(format!("{drive}.img"));
                arguments.push("-blockdev".to_owned());
                arguments.push(controller.block_device(&drive, &file)?);
                arguments.push("-device".to_owned());
                arguments.push(format!(
                    "nvme-ns,bus=nvme{index},nsid={namespace},drive={drive},\
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
            interrupt_remapping: true,
            kernel_driver: false,
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
        assert!(machine(&[""; 16]).environment().is_err());
    }

    #[test]
    fn every_namespace_has_a_drive() {
        let arguments = machine(&["drive=null,namespaces=2,mdts=1", "drive=/a,,sibling"]);
        let arguments = arguments.arguments(Path::new("/run")).unwrap().join(" ");
        for expected in [
            "nvme,id=nvme0,serial=nvme0,addr=0x10.0,multifunction=on,mdts=1",
            "nvme,id=nvme1,serial=nvme1,addr=0x10.1,multifunction=on",
            "null-co,node-name=nvme0n2,size=1073741824",
            "nvme-ns,bus=nvme0,nsid=2,drive=nvme0n2,logical_block_size=512",
            "file,node-name=nvme1n1,filename=/a,",
        ] {
            assert!(arguments.contains(expected), "{expected} in {arguments}");
        }
    }
}
