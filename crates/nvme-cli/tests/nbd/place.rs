//! A directory, servers that run there, and other programs.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// What is tested.
pub(crate) fn program() -> String {
    env!("CARGO_BIN_EXE_nvme-async").to_owned()
}

pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Starts a server, and waits until clients can connect.
    pub(crate) fn serve(&self, line: &str) -> Server {
        let mut child = self
            .command(&program())
            .args(["serve", "nbd"])
            .args(line.split_whitespace())
            .stdout(Stdio::piped())
            .spawn()
            .expect("run nvme-async");
        let mut output = BufReader::new(child.stdout.take().expect("it is piped"));
        let is_url = |word: &&str| word.contains("mem:") || word.contains("file:");
        let exports = line.split_whitespace().filter(is_url).count();
        let lines = (0..exports).map(|_| {
            let mut line = String::new();
            output.read_line(&mut line).expect("a line");
            line.trim_end().to_owned()
        });
        Server {
            lines: lines.collect(),
            directory: self.0.path().to_owned(),
            child,
            _output: output,
        }
    }

    /// Runs a program, of which `line` are the first words, and returns what it says.
    pub(crate) fn run(&self, line: &str, more: &[&str]) -> String {
        let output = self.output(line, more);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line} {more:?}: {errors}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Runs a program that is to fail with `status`, and returns its complaint.
    pub(crate) fn fails(&self, program: &str, line: &str, status: i32) -> String {
        let words: Vec<_> = line.split_whitespace().collect();
        let output = self.output(program, &words);
        assert_eq!(output.status.code(), Some(status), "{program} {line}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn output(&self, line: &str, more: &[&str]) -> Output {
        let mut words = line.split_whitespace();
        let program = words.next().expect("a program");
        let output = self.command(program).args(words).args(more).output();
        output.unwrap_or_else(|error| panic!("{program}: {error}; {}", missing(program)))
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.0.path())
            .env("RUST_LOG", "off")
            .env("LC_ALL", "C");
        command
    }
}

/// What to do where a program is not there.
pub(crate) fn missing(program: &str) -> String {
    let package = match program {
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        _ => "qemu-utils",
    };
    format!("Debian's package {package} has it, and `cargo xtask test` installs that")
}

/// A server, which is killed when it is dropped.
pub(crate) struct Server {
    /// What it has said: a line for each export.
    pub(crate) lines: Vec<String>,
    directory: PathBuf,
    child: Child,
    // If it were closed, the server could not say anything.
    _output: BufReader<ChildStdout>,
}

impl Server {
    /// How clients in any directory call an export.
    pub(crate) fn uri(&self, name: &str) -> String {
        let ends = |uri: &&str| uri.split('?').next().is_some_and(|uri| uri.ends_with(name));
        let mut uris = self.lines.iter().filter_map(|line| {
            let (_, uri) = line.rsplit_once(" at ")?;
            Some(uri)
        });
        let uri = uris.find(ends).expect("it is served");
        absolute(uri, &self.directory)
    }

    /// Ends it by a signal.
    pub(crate) fn end(mut self, signal: Signal) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
        self.child.wait().expect("it ends")
    }
}

/// The same URI with an absolute path of its socket.
fn absolute(uri: &str, directory: &Path) -> String {
    uri.replace("socket=", &format!("socket={}/", directory.display()))
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already if the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes that differ from place to place, with stretches of zeroes.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut data = vec![0; len];
    for (number, part) in data.chunks_mut(64 << 10).enumerate() {
        if number % 4 != 3 {
            random.fill(part);
        }
    }
    data
}
