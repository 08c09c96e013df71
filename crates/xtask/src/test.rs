//! `cargo xtask test`: every test there is, suite by suite.

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::boots::{BOOTS, Boot};
use crate::guest::GuestCommand;
use crate::packages::{self, Bed, UserModeLinux};
use crate::run::{BOOT_ATTEMPTS, Job, Outcome};
use crate::tally::{Counting, Tally, counts};
use crate::vm_disk;
use crate::workspace::Workspace;

/// The variable by which tests know that the full counts are wanted.
const FULL: &str = "NVME_ASYNC_FULL";

/// Packages with loom models, the part of a test's path that tells them from tests that know nothing
/// of loom, and the configuration that they are built with: Tokio takes `loom` for its own.
const LOOM: [(&str, &str, &str); 3] = [
    ("iova", "models::", "loom"),
    ("nvme-soft", "wake::", "loom"),
    ("nvme-async", "models::", "nvme_async_loom"),
];

/// Features that nothing in the workspace turns on, and that have tests.
pub(crate) const FEATURES: &str = "iova/testing,iova/vfio,iova/vm-memory,nvme-async/metrics";

/// Runs every test: those of the workspace, the loom models, and those in virtual machines.
///
/// Nothing is skipped in silence: an ignored test, a suite without tests, or a missing package
/// that can't be installed is a failure.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Run the counts that take long.
    #[arg(long)]
    full: bool,
    /// Run only this suite; may be given several times.
    #[arg(long, value_enum, value_name = "SUITE")]
    suite: Vec<Suite>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Unit, integration and documentation tests of all packages.
    Workspace,
    /// Models of concurrent code.
    Loom,
    /// Tests with VFIO and QEMU's controllers.
    Vm,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let wanted = |suite: &Suite| arguments.suite.is_empty() || arguments.suite.contains(suite);
    let mut report = Report::new("test");
    if wanted(&Suite::Workspace) {
        report.step("clients of Redis", || {
            packages::install_redis(&workspace.vm_directory())
        });
        report.step("clients of NBD", || {
            packages::install_nbd_clients(&workspace.vm_directory())
        });
        report.suite("workspace", || {
            run_cargo(
                workspace
                    .cargo()
                    .args(["test", "--workspace", "--no-fail-fast"])
                    .args(["--features", FEATURES]),
                arguments.full,
            )
        });
        // Without optimization the full count of histories takes too long.
        if arguments.full {
            report.suite("recovery, 100,000 histories", || {
                run_cargo(
                    workspace
                        .cargo()
                        .args(["test", "--release", "--package", "nvme-async", "--lib"])
                        .arg("recovery::tests"),
                    arguments.full,
                )
            });
        }
    }
    if wanted(&Suite::Loom) {
        report.step("loom: list", || every_loom_package_is_listed(workspace));
        for (package, filter, configuration) in LOOM {
            report.suite(&format!("loom: {package}"), || {
                run_cargo(
                    workspace
                        .cargo()
                        .args(["test", "--release", "--package", package, "--lib", filter])
                        .arg("--target-dir")
                        .arg(workspace.target.join(configuration))
                        .env("RUSTFLAGS", format!("--cfg {configuration}"))
                        // It takes longer to link than the models take.
                        .env("CARGO_PROFILE_RELEASE_LTO", "off")
                        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
                    arguments.full,
                )
            });
        }
    }
    if wanted(&Suite::Vm) {
        report.vm(workspace, arguments);
    }
    let left_out = Suite::value_variants()
        .iter()
        .filter(|suite| !wanted(suite));
    let left_out: Vec<String> = left_out
        .map(|suite| format!("{suite:?}").to_lowercase())
        .collect();
    Ok(report.close(&left_out))
}

/// What became of the suites.
#[derive(Debug)]
pub(crate) struct Report {
    task: &'static str,
    start: Instant,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    suite: String,
    time: Duration,
    tests: u64,
    passed: bool,
}

impl Report {
    pub(crate) fn new(task: &'static str) -> Self {
        Self {
            task,
            start: Instant::now(),
            rows: Vec::new(),
        }
    }

    /// Runs a suite, which fails also when tests in it are ignored or when it has none.
    pub(crate) fn suite(&mut self, name: &str, suite: impl FnOnce() -> Result<Tally>) {
        self.row(name, || {
            let tally = suite()?;
            ensure!(tally.failed == 0, "{} tests failed", tally.failed);
            ensure!(
                tally.ignored == 0,
                "{} tests are ignored, and none may be",
                tally.ignored
            );
            ensure!(tally.passed > 0, "no test ran");
            Ok((tally.passed, ()))
        });
    }

    /// Does what suites need beforehand.
    fn step<T>(&mut self, name: &str, step: impl FnOnce() -> Result<T>) -> Option<T> {
        self.row(name, || step().map(|outcome| (0, outcome)))
    }

    fn row<T>(&mut self, name: &str, work: impl FnOnce() -> Result<(u64, T)>) -> Option<T> {
        println!("\n=== {name}");
        let start = Instant::now();
        let outcome = work();
        if let Err(error) = &outcome {
            eprintln!("error: {name}: {error:#}");
        }
        self.rows.push(Row {
            suite: name.to_owned(),
            time: start.elapsed(),
            tests: outcome.as_ref().map_or(0, |(tests, _)| *tests),
            passed: outcome.is_ok(),
        });
        outcome.ok().map(|(_, outcome)| outcome)
    }

    fn vm(&mut self, workspace: &Workspace, arguments: &Arguments) {
        let built = self.step("vm: build", || build_vm_tests(workspace));
        let bed = self.step("vm: kernel and emulator", || {
            Bed::prepare_with(&workspace.vm_directory(), &vm_disk::PROGRAMS)
        });
        let linux = self.step("vm: user-mode Linux", || {
            UserModeLinux::prepare(&workspace.vm_directory())
        });
        let (Some((binary, tests)), Some(bed)) = (built, bed) else {
            return;
        };
        self.suite("vm: disks of ours", || {
            vm_disk::suite(workspace, &bed, &workspace.target.join("debug"))
        });
        if let Some(linux) = linux {
            self.suite("vm: disks in user-mode Linux", || {
                vm_disk::uml::suite(workspace, &bed, &linux, &workspace.target.join("debug"))
            });
        }
        self.suite("vm: kv, killed", || run_kv_in_vm(workspace, arguments.full));
        for boot in &BOOTS {
            let expected = tests.iter().filter(|test| boot.has(test)).count();
            self.suite(&format!("vm: {}", boot.name), || {
                let tally = run_boot(workspace, arguments, boot, &bed, &binary)?;
                let ran = tally.passed + tally.failed + tally.ignored;
                ensure!(
                    ran == u64::try_from(expected)?,
                    "{ran} of {expected} tests ran"
                );
                Ok(tally)
            });
        }
    }

    /// Prints what became of each suite, and a last line that sums it up.
    pub(crate) fn close(self, left_out: &[String]) -> ExitCode {
        println!("\n{:<32} {:>6} {:>10}", "suite", "tests", "time");
        for row in &self.rows {
            let verdict = if row.passed { "passed" } else { "FAILED" };
            let time = row.time.as_secs_f64();
            let tests = if row.tests == 0 {
                String::new()
            } else {
                row.tests.to_string()
            };
            println!("{:<32} {tests:>6} {time:>8.1} s  {verdict}", row.suite);
        }
        let failed = self.rows.iter().filter(|row| !row.passed).count();
        let tests: u64 = self.rows.iter().map(|row| row.tests).sum();
        let verdict = if failed == 0 {
            format!("all {} steps passed, {tests} tests", self.rows.len())
        } else {
            format!("{failed} of {} steps FAILED", self.rows.len())
        };
        let not_run = if left_out.is_empty() {
            String::new()
        } else {
            format!("; NOT RUN, as asked: {}", left_out.join(", "))
        };
        println!(
            "xtask {}: {verdict} in {:.0} s{not_run}",
            self.task,
            self.start.elapsed().as_secs_f64()
        );
        if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// Runs cargo's tests, shows their output, and counts them.
pub(crate) fn run_cargo(cargo: &mut Command, full: bool) -> Result<Tally> {
    if full {
        cargo.env(FULL, "1");
    } else {
        cargo.env_remove(FULL);
    }
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("cargo test")?;
    let mut output = child.stdout.take().context("no pipe from cargo")?;
    let (mut counting, tally) = Counting::new(io::stdout());
    io::copy(&mut output, &mut counting).context("output of cargo test")?;
    counting.flush()?;
    let status = child.wait().context("cargo test")?;
    let tally = counts(&tally);
    ensure!(
        status.success(),
        "cargo test failed ({} tests failed)",
        tally.failed
    );
    Ok(tally)
}

fn every_loom_package_is_listed(workspace: &Workspace) -> Result<()> {
    for package in &workspace.packages {
        let name = package["name"].as_str().unwrap_or_default();
        let mut dependencies = package["dependencies"].as_array().into_iter().flatten();
        if dependencies.any(|dependency| dependency["name"] == "loom") {
            let listed = LOOM.iter().any(|(listed, ..)| *listed == name);
            ensure!(
                listed,
                "{name} has loom models, and xtask does not know where"
            );
        }
    }
    Ok(())
}

/// Builds the VM tests and the command line's program; returns the tests' program and paths.
fn build_vm_tests(workspace: &Workspace) -> Result<(PathBuf, Vec<String>)> {
    let binary = workspace.build_vm_tests()?;
    let tests = list(&binary)?;
    let stray = tests
        .iter()
        .find(|test| !BOOTS.iter().any(|boot| boot.has(test)));
    if let Some(test) = stray {
        bail!("the VM test `{test}` is in no module that is named like a boot");
    }
    Ok((binary, tests))
}

/// Runs the test of the example `kv` that has virtual machines of its own, which this program runs.
fn run_kv_in_vm(workspace: &Workspace, full: bool) -> Result<Tally> {
    let this = env::current_exe().context("this program")?;
    // With the features of the other VM tests, for which the rest was built.
    run_cargo(
        workspace
            .cargo()
            .args(["test", "--workspace", "--example", "kv"])
            .args(["--features", "nvme-async-workspace/vm"])
            .args(["--", "tests::machine::", "--nocapture"])
            .env("NVME_ASYNC_XTASK", this),
        full,
    )
}

/// The paths of the tests of a test program.
fn list(binary: &Path) -> Result<Vec<String>> {
    let output = Command::new(binary)
        .args(["--list", "--format=terse"])
        .output();
    let output = output.with_context(|| binary.display().to_string())?;
    ensure!(
        output.status.success(),
        "{} can't list its tests",
        binary.display()
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.strip_suffix(": test").map(str::to_owned))
        .collect())
}

/// Runs the tests of one boot, again if the emulator itself fails.
fn run_boot(
    workspace: &Workspace,
    arguments: &Arguments,
    boot: &Boot,
    bed: &Bed,
    binary: &Path,
) -> Result<Tally> {
    for attempt in 1..=BOOT_ATTEMPTS {
        if let Some(tally) = try_boot(workspace, arguments, boot, bed, binary)? {
            return Ok(tally);
        }
        eprintln!("xtask: that was attempt {attempt} of {BOOT_ATTEMPTS}");
    }
    bail!("QEMU crashed {BOOT_ATTEMPTS} times");
}

/// Runs the tests of one boot; nothing if the emulator crashed. The tests share controllers, so one
/// runs at a time.
fn try_boot(
    workspace: &Workspace,
    arguments: &Arguments,
    boot: &Boot,
    bed: &Bed,
    binary: &Path,
) -> Result<Option<Tally>> {
    let machine = boot.machine()?;
    let mut environment = machine.environment()?;
    if arguments.full {
        environment.push((FULL.to_owned(), OsString::from("1")));
    }
    let minutes = if arguments.full { 120 } else { 15 };
    let (counting, tally) = Counting::new(io::stdout());
    let directory = workspace.vm_directory();
    let job = Job {
        bed,
        directory: &directory,
        machine: &machine,
        command: GuestCommand {
            words: vec![
                binary.into(),
                format!("{}::", boot.name).into(),
                "--test-threads=1".into(),
            ],
            directory: workspace.root.clone(),
            programs: workspace.target.join("debug"),
            environment,
        },
        time_limit: Duration::from_secs(minutes * 60),
        show_kernel_log: false,
        output: Box::new(counting),
        errors: Box::new(io::stderr()),
    };
    match job.run()? {
        Outcome::Exited(0) => Ok(Some(counts(&tally))),
        Outcome::Exited(status) => {
            let failed = counts(&tally).failed;
            bail!("{failed} tests failed, exit status {status}");
        }
        Outcome::EmulatorCrashed => Ok(None),
        Outcome::TimedOut => bail!("the tests did not end within {minutes} min"),
    }
}
