//! The machines that the tests of `tests/vm.rs` run in.
//!
//! A test belongs to the boot whose name its path begins with: `mod standard` holds those of the
//! first one. It finds a controller by its name, `mdts` in the variable `NVME_MDTS`.

use anyhow::Result;

use crate::machine::{Controller, Machine};

/// One machine, booted once for all of its tests.
#[derive(Debug)]
pub(crate) struct Boot {
    pub(crate) name: &'static str,
    controllers: &'static [&'static str],
    interrupt_remapping: bool,
    monitor: bool,
}

/// All of them.
pub(crate) const BOOTS: [Boot; 3] = [
    Boot {
        name: "standard",
        controllers: &[
            "name=plain,lba=512",
            "name=lba4096,lba=4096",
            "name=two_namespaces,namespaces=2",
            // 8 KiB a command.
            "name=mdts,mdts=1",
            "name=one_queue,max_ioqpairs=1",
            // MQES is zero's based: queues of 8 entries.
            "name=short_queues,mqes=7",
            "name=group_first",
            "name=group_second,sibling",
        ],
        interrupt_remapping: true,
        monitor: false,
    },
    Boot {
        name: "no_interrupt_remapping",
        controllers: &["name=plain"],
        interrupt_remapping: false,
        monitor: false,
    },
    Boot {
        name: "faults",
        controllers: &[
            "name=plain",
            // Namespaces of a subsystem outlive their controller, and can be detached from it.
            "name=removable,port,subsystem",
            "name=attachable,subsystem,namespaces=2",
        ],
        interrupt_remapping: true,
        monitor: true,
    },
];

impl Boot {
    pub(crate) fn machine(&self) -> Result<Machine> {
        let controllers: Result<Vec<Controller>> = self
            .controllers
            .iter()
            .map(|settings| settings.parse())
            .collect();
        Ok(Machine {
            controllers: controllers?,
            disks: Vec::new(),
            disk_files: Vec::new(),
            interrupt_remapping: self.interrupt_remapping,
            kernel_driver: false,
            monitor: self.monitor,
            forwards: Vec::new(),
            processors: 2,
            memory_mib: 2048,
        })
    }

    /// Whether the test of this path belongs here.
    pub(crate) fn has(&self, test: &str) -> bool {
        test.split("::").next() == Some(self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_boot_is_a_machine() {
        for boot in &BOOTS {
            let environment = boot
                .machine()
                .and_then(|machine| machine.environment())
                .unwrap();
            assert_eq!(
                environment.len(),
                2 * boot.controllers.len() + usize::from(boot.monitor),
                "{}",
                boot.name
            );
        }
    }

    #[test]
    fn tests_belong_to_one_boot() {
        let boots = |test| BOOTS.iter().filter(|boot| boot.has(test)).count();
        assert_eq!(boots("standard::reads::every_length"), 1);
        assert_eq!(boots("no_interrupt_remapping::message"), 1);
        assert_eq!(boots("elsewhere::standard"), 0);
    }
}
