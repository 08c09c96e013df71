//! One run of a virtual machine, from boot to the command's exit status.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{self, Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::guest::{GuestCommand, INIT};
use crate::initramfs::Archive;
use crate::machine::{MONITOR_PORT, Machine};
use crate::packages::{Bed, QEMU};
use crate::relay::{Event, KernelLog, Port, random};

/// The exit status that says that the machine, not the command, failed.
pub(crate) const HARNESS_FAILURE: u8 = 125;

/// How often a machine is booted whose emulator crashes.
pub(crate) const BOOT_ATTEMPTS: u32 = 3;

/// Kernel parameters: an IOMMU; an end instead of a hang when the kernel fails; and no trust in
/// what a busy host makes fail, which are the test of the timer at boot and the measured rate of
/// the time stamp counter (found ten times too low, and time then runs ten times too fast).
const KERNEL_PARAMETERS: &str =
    "console=ttyS0 intel_iommu=on oops=panic panic=-1 no_timer_check tsc=unstable";

/// The signals that end a process which has made a mistake: SIGABRT, of assertions, SIGBUS and
/// SIGSEGV.
const CRASHES: [i32; 3] = [6, 7, 11];

/// A command, the machine it runs in, and who gets its output.
pub(crate) struct Job<'a> {
    pub(crate) bed: &'a Bed,
    /// Where the files of the machine are kept while it runs.
    pub(crate) directory: &'a Path,
    pub(crate) machine: &'a Machine,
    pub(crate) command: GuestCommand,
    pub(crate) time_limit: Duration,
    /// Whether the kernel's messages are shown as they come.
    pub(crate) show_kernel_log: bool,
    pub(crate) output: Box<dyn Write + Send>,
    pub(crate) errors: Box<dyn Write + Send>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The command ended with this status.
    Exited(u8),
    /// The command did not end in time.
    TimedOut,
    /// The emulator crashed. QEMU's software emulation of two processors does so now and then when
    /// memory-mapped registers come, move or go (`iotlb_to_section`), often before the guest is up.
    EmulatorCrashed,
}

impl Job<'_> {
    /// Boots the machine and waits for the command's end.
    pub(crate) fn run(self) -> Result<Outcome> {
        let files = RunDirectory::create(self.directory)?;
        let marker = random();
        let ramdisk = files.path.join("initramfs");
        fs::write(&ramdisk, self.initramfs(&marker)?).context("the guest's initramfs")?;

        let [console, output, errors, control] =
            [Port::open()?, Port::open()?, Port::open()?, Port::open()?];
        let mut qemu = Command::new("setpriv");
        // The machine ends with this process, however this process ends.
        qemu.args(["--pdeathsig", "KILL", "--", QEMU])
            .args(self.machine.arguments(&files.path)?)
            .arg("-kernel")
            .arg(&self.bed.kernel.image)
            .arg("-initrd")
            .arg(&ramdisk)
            .args(["-append", KERNEL_PARAMETERS])
            .args([
                "-chardev",
                &console.chardev("console"),
                "-serial",
                "chardev:console",
            ])
            .args(["-device", "virtio-serial-pci,addr=0x2"])
            .args(["-chardev", &output.chardev("output")])
            .args(["-device", "virtserialport,nr=1,chardev=output"])
            .args(["-chardev", &errors.chardev("errors")])
            .args(["-device", "virtserialport,nr=2,chardev=errors"])
            .args(["-chardev", &control.chardev("control")])
            .args(["-device", "virtserialport,nr=3,chardev=control"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if self.machine.monitor {
            qemu.args(monitor());
        }

        let (sender, events) = mpsc::channel();
        let log = console.log(self.show_kernel_log);
        output.copy(format!("\x01{marker}"), self.output, sender.clone());
        errors.copy(format!("\x01{marker}"), self.errors, sender.clone());
        control.control(sender);
        let mut emulator = Emulator(qemu.spawn().context("setpriv")?);
        if let Some(messages) = emulator.0.stderr.take() {
            show_messages(messages);
        }
        wait(emulator, &events, &log, self.time_limit)
    }

    fn initramfs(&self, marker: &str) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for directory in ["bin", "dev", "modules", "proc", "sys"] {
            archive.directory(directory);
        }
        let busybox =
            fs::read(&self.bed.busybox).with_context(|| self.bed.busybox.display().to_string())?;
        archive.file("bin/busybox", &busybox);
        archive.file("init", INIT.as_bytes());
        let mut order = String::new();
        for module in self.bed.kernel.modules()? {
            archive.file(&format!("modules/{}", module.file), &module.content);
            order += &module.file;
            order.push('\n');
        }
        archive.file("modules/order", order.as_bytes());
        let kernel_driver = if self.machine.kernel_driver {
            "yes"
        } else {
            "no"
        };
        let config = format!("kernel_driver={kernel_driver}\nmarker={marker}\n");
        archive.file("config", config.as_bytes());
        archive.file("command", &self.command.script());
        Ok(archive.finish())
    }
}

/// QEMU's arguments for a port by which the guest speaks to QEMU's own monitor, through a socket
/// between the two that nobody else knows.
fn monitor() -> [String; 8] {
    let path = format!("path=nvme-async-xtask-{},abstract=on", random());
    [
        "-chardev".to_owned(),
        format!("socket,id=monitor,{path},server=on,wait=off"),
        "-mon".to_owned(),
        "chardev=monitor,mode=control".to_owned(),
        "-chardev".to_owned(),
        format!("socket,id=monitor-guest,{path}"),
        "-device".to_owned(),
        format!("virtserialport,nr={MONITOR_PORT},chardev=monitor-guest"),
    ]
}

/// Passes on what QEMU has to say, but for each I/O error of a drive, which tests cause.
fn show_messages(messages: ChildStderr) {
    thread::spawn(move || {
        for line in BufReader::new(messages).lines().map_while(Result::ok) {
            if !line.contains(": aio failed: ") {
                eprintln!("{line}");
            }
        }
    });
}

fn wait(
    mut emulator: Emulator,
    events: &mpsc::Receiver<Event>,
    log: &KernelLog,
    time_limit: Duration,
) -> Result<Outcome> {
    let deadline = Instant::now() + time_limit;
    let mut streams = 2;
    let mut status = None;
    loop {
        if let (0, Some(status)) = (streams, status) {
            return Ok(Outcome::Exited(status));
        }
        match events.recv_timeout(Duration::from_millis(100)) {
            Ok(Event::StreamEnded) => streams -= 1,
            Ok(Event::Control(line)) => match line.split_once(' ') {
                Some(("exit", number)) => {
                    status = Some(number.parse().context("the guest's exit status")?);
                }
                _ => {
                    log.show();
                    bail!("the guest did not come up: {line}");
                }
            },
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                if let Some(end) = emulator.ended()? {
                    log.show();
                    if end.signal().is_some_and(|signal| CRASHES.contains(&signal)) {
                        eprintln!("xtask: {QEMU} has crashed ({end})");
                        return Ok(Outcome::EmulatorCrashed);
                    }
                    bail!("the virtual machine ended before the command did ({QEMU}: {end})");
                }
                if Instant::now() >= deadline {
                    log.show();
                    return Ok(Outcome::TimedOut);
                }
            }
        }
    }
}

/// The process of the machine, which does not outlive this value.
struct Emulator(Child);

impl Emulator {
    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.0.try_wait().context(QEMU)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The files of one run.
struct RunDirectory {
    path: PathBuf,
}

impl RunDirectory {
    const PREFIX: &'static str = "run-";

    /// Makes an empty directory, and removes those of processes that were killed.
    fn create(parent: &Path) -> Result<Self> {
        for entry in fs::read_dir(parent)?.filter_map(Result::ok) {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(process) = name.strip_prefix(Self::PREFIX)
                && !Path::new("/proc").join(process).exists()
            {
                // Another process may be doing the same.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let path = parent.join(format!("{}{}", Self::PREFIX, process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self { path })
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
