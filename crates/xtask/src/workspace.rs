//! The workspace as cargo describes it, and cargo itself.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The workspace that this program was built from.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// The directory of the workspace's manifest.
    pub(crate) root: PathBuf,
    /// The directory that cargo builds into.
    pub(crate) target: PathBuf,
    /// The packages of the workspace, as `cargo metadata` lists them.
    pub(crate) packages: Vec<Value>,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn find() -> Result<Self> {
        let output = cargo()
            .args(["metadata", "--no-deps", "--format-version=1"])
            .stderr(Stdio::inherit())
            .output()
            .context("cargo metadata")?;
        ensure!(output.status.success(), "cargo metadata failed");
        let metadata: Value =
            serde_json::from_slice(&output.stdout).context("output of cargo metadata")?;
        let path = |key: &str| {
            let path = metadata[key].as_str().map(PathBuf::from);
            path.with_context(|| format!("cargo metadata names no {key}"))
        };
        Ok(Self {
            root: path("workspace_root")?,
            target: path("target_directory")?,
            packages: metadata["packages"].as_array().cloned().unwrap_or_default(),
        })
    }

    /// Where everything for virtual machines is kept.
    pub(crate) fn vm_directory(&self) -> PathBuf {
        self.target.join("vm")
    }

    /// Cargo, started at the root of the workspace.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = cargo();
        command.current_dir(&self.root);
        command
    }

    /// Builds the programs that the VM tests are made of; returns the path of the test program.
    ///
    /// All at once and as members of the workspace, so that they share what `cargo test` built.
    pub(crate) fn build_vm_tests(&self) -> Result<PathBuf> {
        let what = ["--features", "nvme-async-workspace/vm", "--test", "vm"];
        let built = self.build(&[&["build", "--workspace", "--bin", "nvme-async"], &what[..]])?;
        executable(&built, |target| target["kind"][0] == "test").context("cargo built no VM tests")
    }

    /// Builds a benchmark; returns the path of the program.
    pub(crate) fn build_bench(&self, name: &str) -> Result<PathBuf> {
        let built = self.build(&[&["bench", "--no-run", "--bench", name]])?;
        executable(&built, |target| target["name"] == name)
            .with_context(|| format!("cargo built no benchmark {name}"))
    }

    /// What cargo says of what it builds.
    fn build(&self, arguments: &[&[&str]]) -> Result<Vec<Value>> {
        let output = self
            .cargo()
            .args(arguments.concat())
            .arg("--message-format=json-render-diagnostics")
            .stderr(Stdio::inherit())
            .output()
            .context("cargo")?;
        ensure!(output.status.success(), "the build failed");
        let text = String::from_utf8_lossy(&output.stdout);
        let messages = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        Ok(messages.collect())
    }
}

fn executable(messages: &[Value], is_it: impl Fn(&Value) -> bool) -> Option<PathBuf> {
    let mut targets = messages.iter().filter(|message| is_it(&message["target"]));
    targets.find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
}
