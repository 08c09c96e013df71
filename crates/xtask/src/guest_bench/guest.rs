//! In a guest: fio on disks that are reached in different ways.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::Arguments;
use super::figures::Figures;
use super::host::FIO;
use super::image::Image;
use super::report::Comparison;
use super::server::{Access, Server};
use crate::guest::GuestCommand;
use crate::machine::{DiskFile, Machine};
use crate::packages::Bed;
use crate::run::{BOOT_ATTEMPTS, Job, Outcome};
use crate::vm_bench::WORKLOADS;
use crate::workspace::Workspace;

/// In the order of the fio jobs; POSIX first.
const WAYS: [&str; 4] = [
    "virtio-blk, native",
    "virtio-blk, io_uring",
    "storage-daemon, direct",
    "ours, cached",
];
const PROCESSORS: u32 = 2;
/// Less than the host's: what is measured is mostly the emulation.
const MIB: u64 = 256;

/// Boots, again if the emulator itself fails, and measures everything in that one boot.
pub(super) fn compare(
    workspace: &Workspace,
    arguments: &Arguments,
    directory: &Path,
    bed: &Bed,
) -> Result<Comparison> {
    let image = |name: &str| Image::create(directory.join(name), MIB);
    // One for each disk: these are open at the same time.
    let images = [
        image("native.img")?,
        image("io_uring.img")?,
        image("storage-daemon.img")?,
        image("ours.img")?,
    ];
    let programs = workspace.target.join("release");
    for attempt in 1..=BOOT_ATTEMPTS {
        for image in &images {
            image.leave_cache()?;
        }
        let [native, io_uring, served, ours] = &images;
        ours.enter_cache()?;
        let access = Access {
            is_direct: true,
            aio: "native",
        };
        let socket = |name: &str| directory.join(name);
        let daemon =
            Server::storage_daemon(access, served, &socket("storage-daemon.sock"), PROCESSORS)?;
        let ours = Server::ours(&programs, ours, &socket("ours.sock"), PROCESSORS)?;
        let file = |image: &Image, aio| DiskFile {
            path: image.path.clone(),
            aio,
        };
        let machine = Machine {
            controllers: Vec::new(),
            disks: vec![daemon.socket.clone(), ours.socket.clone()],
            disk_files: vec![file(native, "native"), file(io_uring, "io_uring")],
            interrupt_remapping: true,
            kernel_driver: false,
            monitor: false,
            forwards: Vec::new(),
            processors: PROCESSORS,
            memory_mib: 1024,
        };
        let collected = Collected::default();
        let vm_directory = workspace.vm_directory();
        let job = job(
            &vm_directory,
            arguments,
            bed,
            &machine,
            &programs,
            &collected,
        );
        match job.run()? {
            Outcome::Exited(0) => return read(&collected.text(), arguments.guest_rounds),
            Outcome::Exited(status) => bail!("the guest failed with status {status}"),
            Outcome::TimedOut => bail!("the guest did not end in time"),
            Outcome::EmulatorCrashed => {
                eprintln!("xtask: that was attempt {attempt} of {BOOT_ATTEMPTS}");
            }
        }
    }
    bail!("QEMU crashed {BOOT_ATTEMPTS} times");
}

fn job<'a>(
    vm_directory: &'a Path,
    arguments: &Arguments,
    bed: &'a Bed,
    machine: &'a Machine,
    programs: &Path,
    collected: &Collected,
) -> Job<'a> {
    let (seconds, rounds) = (arguments.seconds, arguments.guest_rounds);
    let script = format!(
        "seconds={seconds} rounds={rounds} options='{}'\n{}",
        FIO.join(" "),
        include_str!("guest.sh")
    );
    let mut words: Vec<OsString> = ["sh", "-c", &script, "guest-bench"]
        .map(OsString::from)
        .to_vec();
    // Those of servers come first in the machine, and last here.
    let mut addresses = machine.disk_addresses();
    addresses.rotate_left(machine.disks.len());
    words.extend(addresses.into_iter().map(OsString::from));
    let runs = rounds * (WORKLOADS.len() * WAYS.len()) as u32;
    Job {
        bed,
        directory: vm_directory,
        machine,
        command: GuestCommand {
            words,
            directory: PathBuf::from("/"),
            programs: programs.to_owned(),
            environment: Vec::new(),
        },
        // Amply: what is measured, and what an emulated machine needs around it.
        time_limit: Duration::from_secs(u64::from(runs * (4 * seconds + 10) + 120)),
        show_kernel_log: false,
        output: Box::new(collected.clone()),
        errors: Box::new(io::stderr()),
    }
}

/// What the guest prints.
#[derive(Clone, Debug, Default)]
struct Collected(Arc<Mutex<Vec<u8>>>);

impl Collected {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what the script prints.
fn read(text: &str, rounds: u32) -> Result<Comparison> {
    let mut comparison = Comparison::new("fio in an emulated guest", WAYS.to_vec());
    let mut runs = 0;
    for run in text.split("\nrun ").skip(1) {
        let (head, output) = run.split_once('\n').context("a run without output")?;
        let (_round, workload) = head.split_once(' ').context("a run without a workload")?;
        let row = WORKLOADS
            .iter()
            .position(|known| format!("{} {}", known.rw, known.iodepth) == workload);
        let row = row.with_context(|| format!("an unknown workload, {workload}"))?;
        let output = output.rsplit_once('}').map(|(json, _)| format!("{json}}}"));
        let output = output.context("a run without JSON")?;
        for (column, way) in WAYS.iter().enumerate() {
            let figures = Figures::of_fio(&output, column);
            comparison.add(
                row,
                column,
                figures.with_context(|| format!("{head}, {way}"))?,
            );
        }
        runs += 1;
    }
    let planned = rounds as usize * WORKLOADS.len();
    ensure!(runs == planned, "{runs} runs of {planned}");
    Ok(comparison)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_read_by_workload_and_disk() {
        let job = |iops: u32| {
            format!(
                "{{ \"error\": 0, \"mixed\": {{ \"iops\": {iops}, \"lat_ns\": {{ \"percentile\": {{ \
                 \"50.000000\": 1, \"99.000000\": 2 }} }} }} }}"
            )
        };
        let mut text = "begin\n".to_owned();
        for (index, workload) in WORKLOADS.iter().enumerate() {
            let first = 100 * (index as u32 + 1);
            let jobs = [first, first, first / 2, first * 3].map(job).join(", ");
            let (rw, iodepth) = (workload.rw, workload.iodepth);
            text += &format!("run 1 {rw} {iodepth}\nnote\n{{ \"jobs\": [ {jobs} ] }}\n\n");
        }
        text += "end\n";
        let comparison = read(&text, 1).unwrap();
        for workload in 0..WORKLOADS.len() {
            assert_eq!(comparison.ratio(workload, 2), Some(0.5));
            assert_eq!(comparison.ratio(workload, 3), Some(3.0));
        }
        assert!(comparison.to_string().contains("300 (3.00)"));
        read(&text, 2).unwrap_err();
        read(&text.replace("randrw 4", "randrw 8"), 1).unwrap_err();
    }
}
