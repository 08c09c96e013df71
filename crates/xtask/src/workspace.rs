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
        let output = self
            .cargo()
            .args([
                "build",
                "--workspace",
                "--message-format=json-render-diagnostics",
            ])
            .args([
                "--features",
                "nvme-async-workspace/vm",
                "--test",
                "vm",
                "--bin",
                "nvme-async",
            ])
            .stderr(Stdio::inherit())
            .output()
            .context("cargo build")?;
        ensure!(output.status.success(), "the VM tests do not build");
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|message| message["target"]["kind"][0] == "test")
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .context("cargo built no VM tests")
    }
}

fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
}
