//! `cargo xtask instructions`: what a read costs in instructions, counted by callgrind.
//!
//! A program (`benches/instructions.rs`) reads 4 KiB at a time from a model device that has no thread
//! and completes commands inside of a doorbell call: at queue depth 1 in the one by which it gets the
//! command, so that nothing is waited for; at depth 32, when it has 32, so that each read waits and is
//! woken. It runs twice, with few reads and with many; the difference is what the reads cost, without
//! beginning and end. The instructions of the device are not counted.
//!
//! What an instruction is for is decided by the innermost function that is known to submit, to reap or
//! to wake ([`phases`]), among the functions that it is inlined into and those that called them. So the
//! split does not depend on what the compiler inlines. Code of the standard library and the C library
//! belongs to who uses it. Tokio's column is a part of the others: most of it is in `wake`.
//!
//! An instruction is one, whatever it takes: an atomic one, a system call. Under valgrind a look at the
//! clock is a system call, and counts for less than it takes.

mod costs;
mod phases;
mod profile;
mod source;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};

use self::costs::Costs;
use self::phases::Phase;
use self::profile::Profile;
use crate::workspace::Workspace;

/// The most that a read may cost at queue depth 32 with a `LocalNamespace`, Tokio's part included; some
/// percent above what it costs. The goal is 600.
const BUDGET: f64 = 1640.0;

/// Reads of the two runs, all tasks together.
const FEW: u64 = 4096;
const MANY: u64 = 20_480;

/// The functions of a chain that callgrind tells apart.
const CALLERS: u32 = 24;

/// Counts the instructions of a read of 4 KiB, by a `LocalNamespace` and by a `Namespace`, at queue depth
/// 32 and 1.
///
/// Fails if a read by a `LocalNamespace` at depth 32 costs more than the budget. It needs valgrind, which
/// it installs.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Show so many of the functions, and of the lines, that cost most by a `LocalNamespace` at depth
    /// 32.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    top: usize,
}

/// How the program reads.
struct Case {
    handle: &'static str,
    depth: u64,
}

/// The one that has a budget.
const BUDGETED: Case = Case {
    handle: "local",
    depth: 32,
};

const OTHERS: [Case; 3] = [
    Case {
        handle: "local",
        depth: 1,
    },
    Case {
        handle: "shared",
        depth: 32,
    },
    Case {
        handle: "shared",
        depth: 1,
    },
];

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let directory = workspace.target.join("instructions");
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    crate::packages::install_valgrind(&directory)?;
    let bench = Bench {
        program: workspace.build_bench("instructions")?,
        directory,
    };
    let budgeted = bench.count(&BUDGETED)?;
    println!("Instructions for each read of 4 KiB:");
    println!(
        "| handle, depth | total | submit | reap | wake | the program | of the total, Tokio | besides, \
         the model device |"
    );
    println!("| --- | --: | --: | --: | --: | --: | --: | --: |");
    print(&BUDGETED, &budgeted);
    for case in &OTHERS {
        print(case, &bench.count(case)?);
    }
    println!("\nIn the first case, calls of the C library for each read:");
    budgeted.print_calls();
    if arguments.top > 0 {
        budgeted.print_top(arguments.top);
    }
    for phase in [Phase::Submit, Phase::Reap, Phase::Wake] {
        ensure!(
            budgeted.of_phase(phase) > 0.0,
            "there is no {phase:?}: the functions that xtask's phases.rs knows have other names now"
        );
    }
    let total = budgeted.total();
    if total > BUDGET {
        println!("\n{total:.0} instructions are more than the budget of {BUDGET}.");
        return Ok(ExitCode::FAILURE);
    }
    println!("\n{total:.0} instructions are within the budget of {BUDGET}.");
    Ok(ExitCode::SUCCESS)
}

fn print(case: &Case, costs: &Costs) {
    let columns = [
        costs.total(),
        costs.of_phase(Phase::Submit),
        costs.of_phase(Phase::Reap),
        costs.of_phase(Phase::Wake),
        costs.of_phase(Phase::Program),
        costs.of_tokio(),
        costs.of_phase(Phase::Device),
    ];
    let columns = columns.map(|cost| format!("{cost:.0}")).join(" | ");
    println!("| {}, {} | {columns} |", case.handle, case.depth);
}

struct Bench {
    program: PathBuf,
    /// Where callgrind writes.
    directory: PathBuf,
}

impl Bench {
    fn count(&self, case: &Case) -> Result<Costs> {
        let many = self.profile(case, MANY)?;
        let profile = many.minus(self.profile(case, FEW)?);
        Costs::new(&self.program, profile, MANY - FEW)
    }

    fn profile(&self, case: &Case, reads: u64) -> Result<Profile> {
        let Case { handle, depth } = case;
        let name = format!("callgrind.{handle}.{depth}.{reads}");
        let output = self.directory.join(name);
        let mut valgrind = Command::new("valgrind");
        valgrind
            .args(["--tool=callgrind", "--dump-instr=yes", "--dump-line=no"])
            .args(["--compress-strings=no", "--compress-pos=no"])
            .arg(format!("--separate-callers={CALLERS}"))
            .arg(format!("--callgrind-out-file={}", output.display()))
            .arg(&self.program)
            .arg(handle)
            .args([*depth, reads / depth].map(|number| number.to_string()))
            .stdin(Stdio::null());
        let done = valgrind.output().context("valgrind")?;
        ensure!(
            done.status.success(),
            "the reads failed under valgrind: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        let text = fs::read_to_string(&output).with_context(|| output.display().to_string())?;
        Profile::parse(&text).with_context(|| output.display().to_string())
    }
}
