//! `cargo xtask vm`: one command in a virtual machine.

use std::env;
use std::ffi::OsString;
use std::io;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::forward::Forward;
use crate::guest::GuestCommand;
use crate::machine::{Controller, Machine};
use crate::packages::Bed;
use crate::run::{HARNESS_FAILURE, Job, Outcome};
use crate::workspace::Workspace;

/// The exit status that says that the command did not end in time, as timeout(1) has it.
const TIMED_OUT: u8 = 124;

/// Runs a command of the freshly built tree in a virtual machine with NVMe controllers.
///
/// The machine is QEMU's software emulation of a PC with an IOMMU, and runs a kernel of Debian's.
/// `nvme-async` is the release build of crates/nvme-cli. The file system is the one of this
/// machine, the working directory included; what the command writes to it stays in the guest's
/// memory and is lost. The machine ends with this program, also when that is killed.
///
/// The controllers are bound to vfio-pci. The first is at 0000:00:10.0, each further one a
/// slot higher; the command finds the addresses in the variables NVME0, NVME1 and so on.
///
/// The exit status is the command's; 124 if the time limit ended it, 125 if the machine failed.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A controller: comma-separated settings; may be given several times.
    ///
    /// `size=1G` of each namespace, `lba=512`, `namespaces=1`, `drive=temporary|null|PATH`,
    /// `write_iops=NUMBER` (most writes in a second; further ones wait), `name=NAME` (its address is in
    /// the variable NVME_NAME, too), `sibling` (a function of the device before, in the same IOMMU
    /// group), `port` (in a hot-plug slot of its own, and therefore at another
    /// address), `subsystem` (with an NVM subsystem of its own). Any other KEY=VALUE is a property of QEMU's device
    /// `nvme` (mdts, max_ioqpairs, mqes, ...), or of `nvme-ns` when KEY begins with `ns.`.
    #[arg(long, value_name = "SETTINGS")]
    nvme: Vec<Controller>,
    /// Let the kernel's own driver have the controllers (/dev/nvme0n1).
    #[arg(long)]
    kernel_driver: bool,
    /// Let the IOMMU not remap interrupts.
    #[arg(long)]
    no_intremap: bool,
    /// Let the command reach QEMU's own monitor: QMP at the device that NVME_ASYNC_MONITOR names.
    #[arg(long)]
    monitor: bool,
    /// Let TCP port HOST of this machine's loopback lead to port GUEST of the guest's; may be given
    /// several times. The guest has no other network.
    #[arg(long, value_name = "HOST:GUEST")]
    forward: Vec<Forward>,
    /// Number of processors.
    #[arg(long, value_name = "NUMBER", default_value_t = 2)]
    cpus: u32,
    /// Memory, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    memory: u32,
    /// Seconds, boot included, after which the command has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    time_limit: u64,
    /// A variable for the command; RUST_*, PROPTEST_* and NVME_ASYNC_* pass anyway.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Show the kernel's messages on standard error.
    #[arg(long)]
    kernel_log: bool,
    /// Run what was built before.
    #[arg(long)]
    no_build: bool,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let machine = Machine {
        controllers: match arguments.nvme.as_slice() {
            [] => vec![Controller::default()],
            controllers => controllers.to_vec(),
        },
        disks: Vec::new(),
        disk_files: Vec::new(),
        interrupt_remapping: !arguments.no_intremap,
        kernel_driver: arguments.kernel_driver,
        monitor: arguments.monitor,
        forwards: arguments.forward.clone(),
        processors: arguments.cpus,
        memory_mib: arguments.memory,
    };
    let mut environment = machine.environment()?;
    for variable in &arguments.env {
        let (name, value) = variable.split_once('=').context("--env takes NAME=VALUE")?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        ensure!(
            name.bytes().all(plain),
            "--env: `{name}` is no name of a variable"
        );
        environment.push((name.to_owned(), OsString::from(value)));
    }
    if !arguments.no_build {
        build(workspace)?;
    }
    let directory = workspace.vm_directory();
    let bed = Bed::prepare(&directory)?;
    let job = Job {
        bed: &bed,
        directory: &directory,
        machine: &machine,
        command: GuestCommand {
            words: arguments.command.clone(),
            directory: env::current_dir().context("the working directory")?,
            programs: workspace.target.join("release"),
            environment,
        },
        time_limit: Duration::from_secs(arguments.time_limit),
        show_kernel_log: arguments.kernel_log,
        output: Box::new(io::stdout()),
        errors: Box::new(io::stderr()),
    };
    Ok(ExitCode::from(match job.run()? {
        Outcome::Exited(status) => status,
        Outcome::TimedOut => {
            eprintln!(
                "error: the command did not end within {} s",
                arguments.time_limit
            );
            TIMED_OUT
        }
        Outcome::EmulatorCrashed => {
            eprintln!("error: QEMU crashed before the command ended; try again, or --cpus 1");
            HARNESS_FAILURE
        }
    }))
}

/// Builds the program `nvme-async` for the guest.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--quiet", "--release", "--package", "nvme-cli"]);
    ensure!(
        cargo.status().context("cargo build")?.success(),
        "nvme-cli does not build"
    );
    Ok(())
}
