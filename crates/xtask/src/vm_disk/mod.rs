//! `cargo xtask vm-disk`: a guest whose disks are a vhost-user-blk server's that is killed now and then.

mod server;
pub(crate) mod uml;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use self::server::{Server, Trust};
use crate::guest::GuestCommand;
use crate::machine::Machine;
use crate::packages::{Bed, UserModeLinux};
use crate::run::{BOOT_ATTEMPTS, Job, Outcome};
use crate::tally::{Counting, Tally, counts};
use crate::vm::build;
use crate::workspace::Workspace;

/// What the guest runs, and the packages that have it.
pub(crate) const PROGRAMS: [(&str, &str); 3] = [
    ("fio", "fio"),
    ("mkfs.ext4", "e2fsprogs"),
    ("blkdiscard", "util-linux"),
];

/// What all guests do.
const GUEST: &str = include_str!("guest.sh");
/// What a guest of QEMU's does.
const SCRIPT: &str = include_str!("qemu.sh");
/// How long a server lives while the guest keeps it busy.
const LIFE: Duration = Duration::from_millis(2500);
/// How often it has to have been killed.
const LEAST_KILLS: u32 = 3;

/// Runs a guest with two disks of one `nvme-async serve vhost-user-blk`, ranges of one namespace.
///
/// It writes and verifies with fio on all queues, discards and zeroes blocks, and keeps files in file systems, on both
/// disks at a time. While it is busy, the server is killed (SIGKILL) and started again, several times: the guest must
/// see no error. At the end, what is outside of the disks must be untouched, and no data have been copied on its way.
///
/// Then the same without kills in user-mode Linux, which can't connect again.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Run what was built before.
    #[arg(long)]
    no_build: bool,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    if !arguments.no_build {
        build(workspace)?;
    }
    let bed = Bed::prepare_with(&workspace.vm_directory(), &PROGRAMS)?;
    let linux = UserModeLinux::prepare(&workspace.vm_directory())?;
    let programs = workspace.target.join("release");
    let in_qemu = suite(workspace, &bed, &programs)?;
    let in_uml = uml::suite(workspace, &bed, &linux, &programs)?;
    println!(
        "vm-disk: {} steps in QEMU and {} in user-mode Linux passed",
        in_qemu.passed, in_uml.passed
    );
    Ok(ExitCode::SUCCESS)
}

/// All of it, with the program in the directory `programs`, again if the emulator crashes.
pub(crate) fn suite(workspace: &Workspace, bed: &Bed, programs: &Path) -> Result<Tally> {
    for attempt in 1..=BOOT_ATTEMPTS {
        if let Some(tally) = boot(workspace, bed, programs)? {
            return Ok(tally);
        }
        eprintln!("xtask: that was attempt {attempt} of {BOOT_ATTEMPTS}");
    }
    bail!("QEMU crashed {BOOT_ATTEMPTS} times");
}

/// One boot; nothing if the emulator crashed.
fn boot(workspace: &Workspace, bed: &Bed, programs: &Path) -> Result<Option<Tally>> {
    let directory = workspace.vm_directory();
    let mut server = Server::new(&directory, programs, Trust::Untrusted);
    server.start()?;
    let machine = Machine {
        controllers: Vec::new(),
        disks: server.sockets().to_vec(),
        disk_files: Vec::new(),
        interrupt_remapping: true,
        kernel_driver: false,
        monitor: false,
        forwards: Vec::new(),
        processors: 2,
        memory_mib: 1024,
    };
    let (sender, lines) = mpsc::channel();
    let (counting, tally) = Counting::new(Lines::new(io::stdout(), sender));
    let job = Job {
        bed,
        directory: &directory,
        machine: &machine,
        command: GuestCommand {
            words: vec!["sh".into(), "-c".into(), format!("{GUEST}{SCRIPT}").into()],
            directory: PathBuf::from("/"),
            programs: programs.to_owned(),
            environment: Vec::new(),
        },
        time_limit: Duration::from_secs(600),
        show_kernel_log: false,
        output: Box::new(counting),
        errors: Box::new(io::stderr()),
    };
    let killer = thread::spawn(move || {
        let kills = kill_while_busy(&mut server, &lines);
        kills.map(|kills| (kills, server))
    });
    let outcome = job.run();
    // The guest's output has ended, and with it what the other thread listens to.
    let Ok(killed) = killer.join() else {
        bail!("the thread that kills the server panicked");
    };
    let (kills, server) = killed?;
    match outcome? {
        Outcome::EmulatorCrashed => return Ok(None),
        Outcome::TimedOut => bail!("the guest did not end in time"),
        Outcome::Exited(0) => {}
        Outcome::Exited(status) => bail!("the guest failed with status {status}"),
    }
    ensure!(
        kills >= LEAST_KILLS,
        "the server was killed {kills} times only"
    );
    println!("vm-disk: the server was killed {kills} times");
    server.end()?;
    Ok(Some(counts(&tally)))
}

/// Kills the server, and starts it again, from the line of the guest's that says that it is busy to the one that says
/// that it is not any more. Returns how often.
fn kill_while_busy(server: &mut Server, lines: &Receiver<String>) -> Result<u32> {
    let mut kills = 0;
    let mut is_busy = false;
    loop {
        let wait = if is_busy {
            LIFE
        } else {
            Duration::from_secs(3600)
        };
        match lines.recv_timeout(wait) {
            Ok(line) if line.contains("disk: under load") => is_busy = true,
            Ok(line) if line.contains("disk: load is over") => is_busy = false,
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout) if is_busy => {
                server.kill()?;
                server.start()?;
                kills += 1;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(kills),
        }
    }
}

/// Passes output on, and its lines to another thread.
struct Lines<W> {
    sink: W,
    line: Vec<u8>,
    lines: Sender<String>,
}

impl<W: Write> Lines<W> {
    fn new(sink: W, lines: Sender<String>) -> Self {
        Self {
            sink,
            line: Vec::new(),
            lines,
        }
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.line.push(byte);
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&self.line).into_owned();
                self.line.clear();
                // Nobody listens any more.
                let _ = self.lines.send(line);
            }
        }
        self.sink.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}
