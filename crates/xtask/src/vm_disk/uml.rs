//! The same disks in user-mode Linux: Linux as a process, whose block layer is not emulated.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

use super::GUEST;
use super::server::{Server, Trust};
use crate::guest::GuestCommand;
use crate::initramfs::Archive;
use crate::kernel::module;
use crate::packages::{Bed, UserModeLinux};
use crate::relay::random;
use crate::run::BOOT_ATTEMPTS;
use crate::tally::{Counting, Tally, counts};
use crate::workspace::Workspace;

/// What the guest does.
const SCRIPT: &str = include_str!("uml.sh");
/// Its first process.
const INIT: &str = include_str!("uml-init.sh");
/// What is not built into it.
const MODULES: [&str; 2] = ["virtio_blk", "overlay"];
/// Seconds after which it has failed; it takes about ten.
const TIME_LIMIT: &str = "300";
/// The status with which timeout(1) says so.
const TIMED_OUT: i32 = 124;
/// What the kernel says when it can't run a process, which is then lost, or the kernel with it. Linux 6.1's does so now and
/// then, once in some thousands of processes, whatever its disks are.
const LOST_PROCESS: &str = "wait_stub_done : failed to wait for SIGTRAP";
/// The device number of a block device (virtio 1.2, section 5).
const BLOCK_DEVICE: u32 = 2;

/// Runs it, with the server of the directory `programs`, again if user-mode Linux itself fails.
pub(crate) fn suite(
    workspace: &Workspace,
    bed: &Bed,
    linux: &UserModeLinux,
    programs: &Path,
) -> Result<Tally> {
    for attempt in 1..=BOOT_ATTEMPTS {
        if let Some(tally) = boot(workspace, bed, linux, programs)? {
            return Ok(tally);
        }
        eprintln!("xtask: that was attempt {attempt} of {BOOT_ATTEMPTS}");
    }
    bail!("user-mode Linux lost processes {BOOT_ATTEMPTS} times");
}

/// One boot; nothing if a process was lost.
fn boot(
    workspace: &Workspace,
    bed: &Bed,
    linux: &UserModeLinux,
    programs: &Path,
) -> Result<Option<Tally>> {
    let directory = workspace.vm_directory();
    // Its memory is a file that is not sealed.
    let mut server = Server::new(&directory, programs, Trust::Trusted);
    server.start()?;
    let command = GuestCommand {
        words: ["sh", "-c", &format!("{GUEST}{SCRIPT}")]
            .map(Into::into)
            .to_vec(),
        directory: PathBuf::from("/"),
        programs: programs.to_owned(),
        environment: Vec::new(),
    };
    let files = Files::create(&directory)?;
    let marker = random();
    fs::write(files.initramfs(), initramfs(bed, linux, &command, &marker)?)
        .context("the initramfs")?;
    let (counting, tally) = Counting::new(io::stdout());
    let mut process = Process::start(linux, &files, &server)?;
    let end = process.copy(&format!("{marker} "), counting)?;
    drop(process);
    match end {
        End::Said(said) if said == "exit 0" => {}
        End::LostProcess => return Ok(None),
        End::Said(said) => match said.strip_prefix("exit ") {
            Some(status) => bail!("the guest failed with status {status}"),
            None => bail!("user-mode Linux did not come up: {said}"),
        },
        End::Exited(status) if status.code() == Some(TIMED_OUT) => {
            bail!("user-mode Linux did not end within {TIME_LIMIT} s")
        }
        End::Exited(status) => {
            bail!("user-mode Linux ended before the command did ({status})")
        }
    }
    server.end()?;
    Ok(Some(counts(&tally)))
}

/// How it ended.
enum End {
    /// What followed the marker.
    Said(String),
    /// It failed, after it had lost a process.
    LostProcess,
    Exited(ExitStatus),
}

fn initramfs(
    bed: &Bed,
    linux: &UserModeLinux,
    command: &GuestCommand,
    marker: &str,
) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in [
        "bin", "dev", "guest", "host", "memory", "modules", "proc", "sys",
    ] {
        archive.directory(directory);
    }
    let busybox = fs::read(&bed.busybox).with_context(|| bed.busybox.display().to_string())?;
    archive.file("bin/busybox", &busybox);
    archive.file("init", INIT.as_bytes());
    for name in MODULES {
        let module = module(&linux.modules, name)?;
        archive.file(&format!("modules/{}", module.file), &module.content);
    }
    archive.file("config", format!("marker={marker}\n").as_bytes());
    archive.file("command", &command.script());
    Ok(archive.finish())
}

/// What is kept while it runs.
struct Files(PathBuf);

impl Files {
    fn create(parent: &Path) -> Result<Self> {
        let path = parent.join(format!("uml-{}", std::process::id()));
        // Of a process that had the same number and was killed.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }

    fn initramfs(&self) -> PathBuf {
        self.0.join("initramfs")
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The process of the kernel, which ends with this value, or with xtask.
struct Process(Child);

impl Process {
    fn start(linux: &UserModeLinux, files: &Files, server: &Server) -> Result<Self> {
        let mut command = Command::new("setpriv");
        // Killed, it would leave processes behind; SIGTERM ends them all, unless it hangs.
        command
            .args(["--pdeathsig", "TERM", "--"])
            .args(["timeout", "--kill-after=5", TIME_LIMIT])
            .arg(&linux.program)
            .args(["mem=256M", "quiet"])
            .args(["con=null", "con0=null,fd:1", "ssl=null"])
            .arg(format!("initrd={}", files.initramfs().display()))
            .arg(format!("uml_dir={}", files.0.display()));
        for socket in server.sockets() {
            let socket = socket.display();
            command.arg(format!("virtio_uml.device={socket}:{BLOCK_DEVICE}"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(Self(command.spawn().context("setpriv")?))
    }

    /// Passes on what the console says, up to the marker or the end.
    fn copy(&mut self, marker: &str, mut to: impl Write) -> Result<End> {
        let output = self.0.stdout.take().context("no pipe from the console")?;
        let mut has_lost = false;
        for line in BufReader::new(output).split(b'\n') {
            let line = line.context("the console")?;
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches('\r');
            if let Some(said) = line.strip_prefix(marker) {
                return Ok(match has_lost && said != "exit 0" {
                    true => End::LostProcess,
                    false => End::Said(said.to_owned()),
                });
            }
            has_lost |= line.contains(LOST_PROCESS);
            writeln!(to, "{line}")?;
        }
        let status = self.0.wait()?;
        Ok(match has_lost {
            true => End::LostProcess,
            false => End::Exited(status),
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let timeout = self.0.id();
        let children = fs::read_to_string(format!("/proc/{timeout}/task/{timeout}/children"));
        // It may have ended by itself.
        kill(&[&timeout.to_string()]);
        let _ = self.0.wait();
        // One that hangs leaves helpers behind, in the session that it has made itself the leader of.
        for leader in children.unwrap_or_default().split_whitespace() {
            kill(&["-KILL", "--", &format!("-{leader}")]);
        }
    }
}

fn kill(arguments: &[&str]) {
    let mut kill = Command::new("kill");
    // There may be nobody any more.
    let _ = kill.args(arguments).stderr(Stdio::null()).status();
}
