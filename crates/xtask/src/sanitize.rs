//! `cargo xtask sanitize`: the tests of everything that does I/O, watched by a sanitizer.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::test::{FEATURES, Report, run_cargo};
use crate::workspace::Workspace;

/// With a target that is named, what runs during the build is built without the sanitizer.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// How many times longer than usual the tests' own deadlines are.
const SLOWNESS: &str = "4";

/// Functions of the standard library that `std.c` stands in for: its name for each, where in the
/// library it is, and how its symbol ends.
const WRAPPED: [(&str, &str, &str); 6] = [
    ("MUTEX", "5mutex5futex", "5Mutex14lock_contended"),
    ("RWLOCK_READ", "6rwlock5futex", "6RwLock14read_contended"),
    ("RWLOCK_WRITE", "6rwlock5futex", "6RwLock15write_contended"),
    ("CONDVAR_WAIT", "7condvar5futex", "7Condvar4wait"),
    (
        "CONDVAR_WAIT_TIMEOUT",
        "7condvar5futex",
        "7Condvar12wait_timeout",
    ),
    ("ONCE", "4once5futex", "4Once4call"),
];

/// Runs the tests of everything that does I/O, watched by a sanitizer. Needs a nightly toolchain.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What is looked for.
    #[arg(value_enum)]
    sanitizer: Sanitizer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sanitizer {
    /// AddressSanitizer: accesses to memory that is not there, or not any more.
    Address,
    /// ThreadSanitizer: accesses to the same memory by threads that do not wait for each other.
    Thread,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let (task, directory) = match arguments.sanitizer {
        Sanitizer::Address => ("sanitize address", "asan"),
        Sanitizer::Thread => ("sanitize thread", "tsan"),
    };
    check_toolchain()?;
    let directory = workspace.target.join(directory);
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let sources = workspace.root.join("crates/xtask/sanitizers");
    let (flags, options) = match arguments.sanitizer {
        // Memory that a device may yet access is leaked on purpose, and some tests forget futures.
        Sanitizer::Address => (
            "-Zsanitizer=address".into(),
            ("ASAN_OPTIONS", "detect_leaks=0".into()),
        ),
        Sanitizer::Thread => {
            let mut options = OsString::from("suppressions=");
            options.push(sources.join("threads.supp"));
            (
                thread_flags(&sources, &directory)?,
                ("TSAN_OPTIONS", options),
            )
        }
    };
    let cargo = |arguments: &[&str]| {
        let mut cargo = Command::new("rustup");
        cargo
            .args(["run", "nightly", "cargo", "test", "--no-fail-fast"])
            .args(["--target", TARGET])
            .args(arguments)
            .current_dir(&workspace.root)
            .env("CARGO_TARGET_DIR", &directory)
            .env("RUSTFLAGS", &flags)
            .env("NVME_ASYNC_SLOWNESS", SLOWNESS)
            // Some tests panic on purpose. What the standard library keeps for the next backtrace is
            // handed on in ways that ThreadSanitizer does not see.
            .env("RUST_BACKTRACE", "0")
            .env(options.0, &options.1);
        cargo
    };
    let mut report = Report::new(task);
    report.suite("unit tests, software controller", || {
        let packages = ["iova", "nvme-soft", "nvme-async"];
        let packages = packages.iter().flat_map(|name| ["--package", name]);
        let what = ["--lib", "--test", "controller", "--features", FEATURES];
        run_cargo(&mut cargo(&packages.chain(what).collect::<Vec<_>>()), false)
    });
    report.suite("vfio-user", || {
        let packages = ["vfio-user", "nvme-vfio-user"];
        let packages = packages.iter().flat_map(|name| ["--package", name]);
        let what = ["--tests"];
        run_cargo(&mut cargo(&packages.chain(what).collect::<Vec<_>>()), false)
    });
    report.suite("servers of virtual disks", || {
        // A guest that has the device write to where the server reads, which is a race on purpose.
        let skipped = match arguments.sanitizer {
            Sanitizer::Address => &[][..],
            Sanitizer::Thread => &["--", "--skip", "a_guest_that_overwrites_its_queues"],
        };
        let what = ["--package", "nvme-export", "--tests"];
        run_cargo(&mut cargo(&[&what, skipped].concat()), false)
    });
    report.suite("end to end", || {
        run_cargo(&mut cargo(&["--test", "e2e"]), false)
    });
    Ok(report.close(&[]))
}

fn check_toolchain() -> Result<()> {
    let version = Command::new("rustup")
        .args(["run", "nightly", "rustc", "--version"])
        .output();
    match version {
        Ok(output) if output.status.success() => Ok(()),
        Ok(_) => bail!(
            "sanitizers need a nightly toolchain, and there is none: rustup toolchain install \
             nightly"
        ),
        Err(error) => bail!("rustup, which finds the nightly toolchain: {error}"),
    }
}

/// What builds for ThreadSanitizer, and links what it has to be told of the standard library.
fn thread_flags(sources: &Path, directory: &Path) -> Result<OsString> {
    let symbols = wrapped_symbols(sources, directory)?;
    let object = directory.join("std.o");
    let mut cc = Command::new("cc");
    cc.args(["-c", "-O1", "-o"]).arg(&object);
    cc.arg(sources.join("std.c"));
    // The standard library that is linked is none that was built with the sanitizer.
    let mut flags =
        OsString::from("-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer -Clink-arg=");
    flags.push(&object);
    for ((name, ..), symbol) in WRAPPED.iter().zip(&symbols) {
        cc.arg(format!("-D{name}={symbol}"));
        flags.push(format!(" -Clink-arg=-Wl,--wrap={symbol}"));
    }
    succeed(&mut cc, "cc")?;
    Ok(flags)
}

/// The symbols of [`WRAPPED`], in which there is a hash of the toolchain.
fn wrapped_symbols(sources: &Path, directory: &Path) -> Result<Vec<String>> {
    let probe = directory.join("probe");
    let mut rustc = Command::new("rustup");
    rustc.args(["run", "nightly", "rustc", "-o"]).arg(&probe);
    succeed(rustc.arg(sources.join("probe.rs")), "rustc")?;
    let symbols = succeed(Command::new("nm").arg(&probe), "nm")?;
    let find = |&(_, module, end): &(&str, &str, &str)| {
        let is_it = |symbol: &&str| {
            symbol.contains("3std3sys4sync") && symbol.contains(module) && symbol.ends_with(end)
        };
        let symbol = symbols.split_whitespace().find(is_it);
        symbol.map(str::to_owned).with_context(|| {
            format!("this nightly's standard library has no {end}; xtask's sanitize.rs names it")
        })
    };
    WRAPPED.iter().map(find).collect()
}

/// The output of a program that has to succeed.
fn succeed(command: &mut Command, name: &'static str) -> Result<String> {
    let output = command.output().context(name)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} failed: {errors}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
