//! `cargo xtask fuzz`: the fuzz targets, for a while each.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::workspace::Workspace;

/// What libFuzzer needs of the compiler: coverage counters and comparisons to be guided by, and
/// AddressSanitizer to notice what Rust does not, and leaks. As cargo-fuzz has it.
const RUSTFLAGS: &str = "--cfg fuzzing -Zsanitizer=address -Ccodegen-units=1 \
     -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
     -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";

/// The line of libFuzzer's statistics that says how often the target ran.
const RUNS: &str = "stat::number_of_executed_units:";

/// Runs the fuzz targets of crates/fuzz, each for a while, from the inputs that are checked in and those
/// that earlier runs found.
///
/// An input that makes a target fail is kept in crates/fuzz/artifacts.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How long each target runs.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    seconds: u32,
    /// The nightly toolchain, by the name that rustup has for it.
    #[arg(long, default_value = "nightly")]
    toolchain: String,
    /// Say what is missing, and succeed, where the targets can't be built.
    #[arg(long)]
    if_possible: bool,
    /// Only these targets.
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let manifest = workspace.root.join("crates/fuzz/Cargo.toml");
    let targets = chosen(targets(workspace, &manifest)?, &arguments.targets)?;
    let toolchain = match Toolchain::find(&arguments.toolchain) {
        Ok(toolchain) => toolchain,
        Err(missing) if arguments.if_possible => {
            println!("fuzz: LEFT OUT, nothing was fuzzed: {missing:#}");
            return Ok(ExitCode::SUCCESS);
        }
        Err(missing) => return Err(missing.context("the fuzz targets can't be built")),
    };
    let build = Build {
        manifest: &manifest,
        target_directory: workspace.target.join("fuzz"),
        toolchain: &toolchain,
    };
    build.cargo(&["test", "--lib"], "the tests of the fuzz targets' device")?;
    build.cargo(&["build", "--bins"], "the build of the fuzz targets")?;
    for target in &targets {
        let runs = build.fuzz(target, arguments.seconds)?;
        println!("fuzz: {target}: {runs} runs, no failure");
    }
    Ok(ExitCode::SUCCESS)
}

/// The names of all targets.
fn targets(workspace: &Workspace, manifest: &Path) -> Result<Vec<String>> {
    let output = workspace
        .cargo()
        .args(["metadata", "--no-deps", "--format-version=1"])
        .arg("--manifest-path")
        .arg(manifest)
        .stderr(Stdio::inherit())
        .output()
        .context("cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata failed");
    let metadata: Value =
        serde_json::from_slice(&output.stdout).context("output of cargo metadata")?;
    let targets = metadata["packages"][0]["targets"]
        .as_array()
        .context("cargo metadata names no targets")?;
    Ok(targets
        .iter()
        .filter(|target| target["kind"][0] == "bin")
        .filter_map(|target| target["name"].as_str().map(str::to_owned))
        .collect())
}

/// Those that are wanted, or all.
fn chosen(all: Vec<String>, wanted: &[String]) -> Result<Vec<String>> {
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
        bail!(
            "there is no fuzz target {unknown:?}; there are {}",
            all.join(", ")
        );
    }
    Ok(if wanted.is_empty() {
        all
    } else {
        wanted.to_vec()
    })
}

/// A compiler with what the targets need.
struct Toolchain {
    name: String,
    host: String,
}

impl Toolchain {
    fn find(name: &str) -> Result<Self> {
        let ask = |arguments: &[&str]| -> Result<String> {
            let output = Command::new("rustup")
                .args(["run", name, "rustc"])
                .args(arguments)
                .output()
                .context("rustup is missing, which finds the nightly toolchain")?;
            ensure!(
                output.status.success(),
                "there is no toolchain {name:?}: rustup toolchain install {name}"
            );
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let version = ask(&["-vV"])?;
        let field = |key: &str| {
            let line = version.lines().find_map(|line| line.strip_prefix(key));
            line.with_context(|| format!("rustc -vV of {name:?} has no {key:?}"))
        };
        let release = field("release: ")?;
        ensure!(
            release.contains("nightly") || release.contains("dev"),
            "the toolchain {name:?} is {release}, which has no sanitizers; they need a nightly one"
        );
        let host = field("host: ")?.to_owned();
        let runtime = PathBuf::from(ask(&["--print", "sysroot"])?)
            .join("lib/rustlib")
            .join(&host)
            .join("lib/librustc-nightly_rt.asan.a");
        ensure!(
            runtime.exists(),
            "the toolchain {name:?} has no AddressSanitizer for {host}: {} is missing",
            runtime.display()
        );
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let found = Command::new(&compiler)
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        ensure!(
            found.is_ok_and(|status| status.success()),
            "the C++ compiler {compiler:?}, with which libFuzzer is built, is missing"
        );
        Ok(Self {
            name: name.to_owned(),
            host,
        })
    }
}

struct Build<'a> {
    manifest: &'a Path,
    target_directory: PathBuf,
    toolchain: &'a Toolchain,
}

impl Build<'_> {
    fn cargo(&self, task: &[&str], what: &str) -> Result<()> {
        let status = Command::new("rustup")
            .args(["run", &self.toolchain.name, "cargo"])
            .args(task)
            .args(["--release", "--target", &self.toolchain.host])
            .arg("--manifest-path")
            .arg(self.manifest)
            .arg("--target-dir")
            .arg(&self.target_directory)
            .env("RUSTFLAGS", RUSTFLAGS)
            .status()
            .with_context(|| what.to_owned())?;
        ensure!(status.success(), "{what} failed");
        Ok(())
    }

    /// Runs a target; returns how often it ran.
    fn fuzz(&self, target: &str, seconds: u32) -> Result<u64> {
        let root = self
            .manifest
            .parent()
            .context("a manifest has a directory")?;
        let corpus = root.join("corpus").join(target);
        let artifacts = root.join("artifacts").join(target);
        for directory in [&corpus, &artifacts] {
            fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        }
        let program = self
            .target_directory
            .join(&self.toolchain.host)
            .join("release")
            .join(target);
        let mut leaks = OsString::from("print_suppressions=0:suppressions=");
        leaks.push(root.join("leaks.supp"));
        let mut fuzzer = Command::new(&program)
            .env("LSAN_OPTIONS", leaks)
            .arg(format!("-max_total_time={seconds}"))
            // Of real time: no input takes nearly as long, even on a busy machine.
            .args(["-timeout=60", "-max_len=1024", "-print_final_stats=1"])
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg(&corpus)
            .arg(root.join("seeds").join(target))
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| program.display().to_string())?;
        let output = fuzzer.stderr.take().context("it was just piped")?;
        let mut runs = 0;
        for line in BufReader::new(output).lines() {
            let line = line.context("libFuzzer's output")?;
            if let Some(number) = line.strip_prefix(RUNS) {
                runs = number.trim().parse().context("libFuzzer's statistics")?;
            }
            eprintln!("{line}");
        }
        let status = fuzzer.wait().context("libFuzzer")?;
        ensure!(
            status.success(),
            "fuzz target {target} failed ({status}); the input is in {}, and `{} FILE` runs it again",
            artifacts.display(),
            program.display()
        );
        ensure!(runs > 0, "fuzz target {target} did not run");
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_known_by_name() {
        let all = || vec!["one".to_owned(), "two".to_owned()];
        assert_eq!(chosen(all(), &[]).expect("all"), all());
        assert_eq!(chosen(all(), &["two".to_owned()]).expect("one"), ["two"]);
        let error = chosen(all(), &["three".to_owned()]).expect_err("unknown");
        assert!(error.to_string().contains("one, two"), "{error}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let missing = Toolchain::find("no-such-toolchain")
            .err()
            .expect("there is none");
        assert!(format!("{missing:#}").contains("rustup"), "{missing:#}");
    }
}
