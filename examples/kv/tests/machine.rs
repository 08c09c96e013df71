//! The program in a virtual machine, on a controller of QEMU's through VFIO, and its clients outside of it: all
//! of the machine is killed under load.
//!
//! What a machine left is looked at in the next one, which goes on from there, and in the end on this one by
//! `file:`.
//!
//! This tests the driver and the store at an end of everything at once: nobody shuts down, and of the
//! commands in flight the controller has done some and answered some of those. Most machines write slowly,
//! so that some are in flight at nearly any moment.
//!
//! It does not test the loss of a volatile cache: what QEMU wrote is in the page cache of this machine, which
//! outlives QEMU. A write that lacks its FUA or its flush is not noticed here; `power` does that.

use std::env;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::Signal;

use super::full;
use super::history::{self, WRITERS, check};
use super::kill::{Client, Process, SERVE, free_port, server, under_load};

/// The program that runs virtual machines, `xtask`.
const XTASK: &str = "NVME_ASYNC_XTASK";
/// Its exit status if the machine failed.
const MACHINE_FAILED: i32 = 125;
/// How often a machine may fail in a row: now and then QEMU crashes.
const ATTEMPTS: u32 = 3;
/// Where the server listens in the machine.
const PORT: u16 = 6380;
/// Of the device: so small that the log goes round, with checkpoints and compaction.
const SIZE: u64 = 4 << 20;
/// Changes that are acknowledged before a machine is killed.
const LEAST: usize = 200;

/// Starts the machine, which lives as long as the process does that runs it.
fn boot(image: &Path, durability: &str, write_iops: u32) -> Process {
    let xtask = env::var_os(XTASK)
        .unwrap_or_else(|| panic!("{XTASK} is not set; `cargo xtask test` runs this test"));
    let port = free_port();
    let child = Command::new(xtask)
        .args(["vm", "--no-build", "--memory", "1024"])
        .arg(format!(
            "--nvme=drive={},write_iops={write_iops}",
            image.display()
        ))
        .arg(format!("--forward={port}:{PORT}"))
        .arg("--")
        .args(server())
        .env(
            SERVE,
            format!(
                "kv --device nvme://0000:00:10.0/1 --durability {durability} \
                 --listen 0.0.0.0:{PORT}"
            ),
        )
        .stdout(Stdio::null())
        .spawn();
    let child = child.expect("xtask can be run");
    Process { child, port }
}

/// Starts a machine, until one comes up that serves all writers.
fn serve(image: &Path, durability: &str, write_iops: u32) -> (Process, Vec<Client>) {
    for _ in 0..ATTEMPTS {
        let mut machine = boot(image, durability, write_iops);
        let clients = (0..WRITERS).map(|_| machine.try_connect()).collect();
        match clients {
            Ok(clients) => return (machine, clients),
            Err(status) if status.code() == Some(MACHINE_FAILED) => {}
            Err(status) => panic!("the server ended: {status}"),
        }
    }
    panic!("{ATTEMPTS} machines failed");
}

#[test]
fn nothing_acknowledged_is_lost_when_the_machine_is_killed() {
    let rounds = if full() { 10 } else { 2 };
    let directory = tempfile::tempdir().expect("there is room");
    let image = directory.path().join("kv.img");
    let file = File::create_new(&image).expect("there is room");
    file.set_len(SIZE).expect("there is room");
    let mut histories = history::fresh();
    let mut failed = 0;
    let mut seed = 0;
    while seed < rounds {
        let mut random = fastrand::Rng::with_seed(seed);
        let durability = if seed % 2 == 0 { "fua" } else { "flush" };
        // Without a limit a write takes so little time that hardly any machine would die before it is done.
        let write_iops = [100, 300, 0][(seed % 3) as usize];
        let (mut machine, mut clients) = serve(&image, durability, write_iops);
        check(&mut histories, clients[0].contents(), seed);
        // The many fill several batches at a time.
        let depth = random.usize(1..=40);
        let delay = Duration::from_micros(random.u64(..4_000_000));
        // QEMU has the sockets and the image. They are closed when the last of its threads ends: when the
        // clients have lost them, it does not write any more.
        let acknowledged = under_load(clients, depth, &mut histories, &mut random, |load| {
            while load.acknowledged() < LEAST && !load.has_ended() {
                sleep(Duration::from_millis(1));
            }
            sleep(delay);
            if !load.has_ended() {
                machine.child.kill().expect("it runs");
            }
        });
        let status = machine.child.wait().expect("it is a child");
        if status.signal() == Some(Signal::KILL.as_raw()) {
            println!(
                "{acknowledged} changes, {depth} at a time, {durability}, write_iops={write_iops}"
            );
            failed = 0;
            seed += 1;
        } else {
            // What a machine that failed has left is looked at as well; but it is not one that was killed.
            assert_eq!(status.code(), Some(MACHINE_FAILED), "the server ended");
            failed += 1;
            assert!(failed < ATTEMPTS, "{failed} machines failed");
        }
    }
    let mut process = Process::start(&format!("file:{}", image.display()));
    check(&mut histories, process.connect().contents(), rounds);
}
