//! `cargo xtask vm-bench`: our driver beside others, on one controller in a virtual machine.

mod output;
mod plan;
mod summary;
mod watch;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::PoisonError;

use anyhow::{Context, Result, anyhow, bail};
use clap::value_parser;

pub(crate) use self::output::{fio_job, number};
use self::plan::Plan;
pub(crate) use self::plan::{WORKLOADS, Workload};
use self::summary::Summary;
use self::watch::{Told, Watch};
use crate::guest::GuestCommand;
use crate::machine::Machine;
use crate::packages::Bed;
use crate::run::{BOOT_ATTEMPTS, Job, Outcome};
use crate::vm::build;
use crate::workspace::Workspace;

/// What it measures against, and the packages that have it.
const PROGRAMS: [(&str, &str); 2] = [("fio", "fio"), ("qemu-img", "qemu-utils")];

/// Compares nvme-async with others on QEMU's controller, in a virtual machine.
///
/// These take turns, all in one boot, and again in each round: fio with libaio and with io_uring on
/// the kernel's driver; `qemu-img bench` with QEMU's own driver, `nvme://`; and the release build of
/// `nvme-async bench`. Each reads, writes and mixes both at random, 4 KiB at a time, with one and
/// with four requests in flight; but `qemu-img bench` goes through the blocks in order, and does not
/// mix. The drive keeps nothing, so that what is measured is the way to it.
///
/// Medians are printed, and their ratios to libaio's. A run that takes four times as long as it
/// should, and ten seconds more, is ended and reported as hung. It is a failure if one of ours does
/// that, or reports an error; what others do is reported only. fio and qemu-img are installed where
/// they are missing.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Seconds that each run measures.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 2,
        value_parser = value_parser!(u32).range(1..=3600)
    )]
    seconds: u32,
    /// How often everything runs.
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t = 3,
        value_parser = value_parser!(u32).range(1..=1000)
    )]
    rounds: u32,
    /// Number of processors.
    #[arg(long, value_name = "NUMBER", default_value_t = 2)]
    cpus: u32,
    /// Write all figures to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Run what was built before.
    #[arg(long)]
    no_build: bool,
    /// Additional arguments of `nvme-async bench`, such as `--poll busy`.
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let plan = Plan::new(arguments.seconds, arguments.rounds);
    // Before the time is spent.
    let file = match &arguments.json {
        Some(path) => Some(File::create(path).with_context(|| path.display().to_string())?),
        None => None,
    };
    if !arguments.no_build {
        build(workspace)?;
    }
    let bed = Bed::prepare_with(&workspace.vm_directory(), &PROGRAMS)?;
    let (told, ended) = boot(workspace, arguments, &plan, &bed)?;
    let summary = Summary::new(&plan, &told);
    print!("{summary}");
    if let Some(mut file) = file {
        writeln!(file, "{:#}", summary.json()).context("the JSON of the summary")?;
    }
    ended?;
    Ok(match summary.failures() {
        0 => ExitCode::SUCCESS,
        failures => {
            eprintln!("error: {failures} runs of nvme-async failed or hung");
            ExitCode::FAILURE
        }
    })
}

/// Runs everything in one boot, again if the emulator itself fails. Returns what was found, and
/// what kept the guest from finding more.
fn boot(
    workspace: &Workspace,
    arguments: &Arguments,
    plan: &Plan,
    bed: &Bed,
) -> Result<(Told, Result<()>)> {
    for attempt in 1..=BOOT_ATTEMPTS {
        let (watch, told) = Watch::new(io::stdout(), &plan.runs);
        let outcome = job(workspace, arguments, plan, bed, watch)?;
        let ended = match outcome {
            Outcome::Exited(0) => Ok(()),
            Outcome::Exited(status) => Err(anyhow!("the guest gave up, exit status {status}")),
            Outcome::TimedOut => Err(anyhow!("the guest did not end in time")),
            Outcome::EmulatorCrashed => {
                eprintln!("xtask: that was attempt {attempt} of {BOOT_ATTEMPTS}");
                continue;
            }
        };
        let told = told.lock().unwrap_or_else(PoisonError::into_inner);
        return Ok((told.clone(), ended));
    }
    bail!("QEMU crashed {BOOT_ATTEMPTS} times");
}

fn job(
    workspace: &Workspace,
    arguments: &Arguments,
    plan: &Plan,
    bed: &Bed,
    watch: Watch<io::Stdout>,
) -> Result<Outcome> {
    let machine = Machine {
        controllers: vec!["drive=null".parse()?],
        disks: Vec::new(),
        disk_files: Vec::new(),
        interrupt_remapping: true,
        kernel_driver: false,
        monitor: false,
        forwards: Vec::new(),
        processors: arguments.cpus,
        memory_mib: 2048,
    };
    let mut words: Vec<OsString> = ["sh", "-c", &plan.script(), "vm-bench"]
        .map(OsString::from)
        .to_vec();
    words.extend(arguments.arguments.iter().cloned());
    let mut environment = machine.environment()?;
    // What the programs say is passed on between lines of our own.
    environment.push(("NO_COLOR".to_owned(), OsString::from("1")));
    let job = Job {
        bed,
        directory: &workspace.vm_directory(),
        machine: &machine,
        command: GuestCommand {
            words,
            directory: workspace.root.clone(),
            programs: workspace.target.join("release"),
            environment,
        },
        time_limit: plan.time_limit(),
        show_kernel_log: false,
        output: Box::new(watch),
        errors: Box::new(io::stderr()),
    };
    job.run()
}
