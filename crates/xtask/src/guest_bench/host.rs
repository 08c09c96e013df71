//! On the host: a front end on either server, and fio on the file.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::Arguments;
use super::figures::Figures;
use super::image::{Image, file_system};
use super::report::Comparison;
use super::server::{Access, Server};
use crate::vm_bench::{WORKLOADS, Workload};
use crate::workspace::Workspace;

/// Seconds that a run goes on before it measures.
const RAMP: &str = "0.25";

/// Who does the I/O.
#[derive(Clone, Copy, Debug)]
enum Peer {
    Fio,
    StorageDaemon(&'static str),
    Ours,
}

/// One way to the file.
#[derive(Debug)]
struct Way {
    name: &'static str,
    peer: Peer,
    is_direct: bool,
}

const fn way(name: &'static str, peer: Peer, is_direct: bool) -> Way {
    Way {
        name,
        peer,
        is_direct,
    }
}

/// POSIX first. In a round those that are direct go by turns, and then those that are not.
const WAYS: [Way; 5] = [
    way("fio, direct", Peer::Fio, true),
    way(
        "storage-daemon, direct",
        Peer::StorageDaemon("native"),
        true,
    ),
    way("fio, cached", Peer::Fio, false),
    way(
        "storage-daemon, cached",
        Peer::StorageDaemon("io_uring"),
        false,
    ),
    way("ours, cached", Peer::Ours, false),
];

/// What and where it is measured.
pub(super) fn notes(directory: &Path) -> Result<String> {
    let version = |program: &str| -> Result<String> {
        let output = Command::new(program).arg("--version").output();
        let output = output.with_context(|| program.to_owned())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().next().unwrap_or_default().to_owned())
    };
    let kernel =
        fs::read_to_string("/proc/sys/kernel/osrelease").context("the kernel's release")?;
    let processors = std::thread::available_parallelism()?;
    Ok(format!(
        "Linux {}, {processors} processors, {}; {}; {}",
        kernel.trim(),
        file_system(directory)?,
        version("fio")?,
        version("qemu-storage-daemon")?
    ))
}

/// Measures everything, in rounds.
pub(super) fn compare(
    workspace: &Workspace,
    arguments: &Arguments,
    directory: &Path,
) -> Result<Comparison> {
    let bench = Bench {
        programs: &workspace.target.join("release"),
        directory,
        image: &Image::create(directory.join("host.img"), arguments.size)?,
        seconds: arguments.seconds,
    };
    let mut comparison = Comparison::new("on the host", WAYS.map(|way| way.name).to_vec());
    for round in 1..=arguments.rounds {
        eprintln!("xtask: round {round} of {} on the host", arguments.rounds);
        for is_direct in [true, false] {
            bench.image.leave_cache()?;
            if !is_direct {
                bench.image.enter_cache()?;
            }
            for (row, workload) in WORKLOADS.iter().enumerate() {
                for (column, way) in WAYS.iter().enumerate() {
                    if way.is_direct == is_direct {
                        let figures = bench.measure(way, workload, round);
                        let figures =
                            figures.with_context(|| format!("{workload}, {}", way.name))?;
                        comparison.add(row, column, figures);
                        bench.image.settle()?;
                    }
                }
            }
        }
    }
    Ok(comparison)
}

struct Bench<'a> {
    programs: &'a Path,
    directory: &'a Path,
    image: &'a Image,
    seconds: u32,
}

impl Bench<'_> {
    fn measure(&self, way: &Way, workload: &Workload, round: u32) -> Result<Figures> {
        let socket = self.directory.join("host.sock");
        let server = match way.peer {
            Peer::Fio => return self.fio(way.is_direct, workload, round),
            Peer::Ours => Server::ours(self.programs, self.image, &socket, 1)?,
            Peer::StorageDaemon(aio) => {
                let is_direct = way.is_direct;
                Server::storage_daemon(Access { is_direct, aio }, self.image, &socket, 1)?
            }
        };
        let mut command = Command::new(self.programs.join("vhost-bench"));
        command.arg("--socket").arg(&server.socket);
        command.args(["--rw", workload.rw, "--ramp", RAMP]);
        command.args(["--iodepth", &workload.iodepth.to_string()]);
        command.args(["--runtime", &self.seconds.to_string()]);
        command.args(["--seed", &round.to_string()]);
        let (began, cpu) = (Instant::now(), server.cpu_time()?);
        let output = output(&mut command)?;
        let cpu = server.cpu_time()? - cpu;
        let mut figures = Figures::of_front_end(&output)?;
        figures.server_cpu = Some(cpu.as_secs_f64() / began.elapsed().as_secs_f64());
        Ok(figures)
    }

    fn fio(&self, is_direct: bool, workload: &Workload, round: u32) -> Result<Figures> {
        let mut command = Command::new("fio");
        command.arg("--name=guest-bench").arg({
            let mut filename = std::ffi::OsString::from("--filename=");
            filename.push(&self.image.path);
            filename
        });
        command.args([
            "--ioengine=libaio",
            &format!("--direct={}", u8::from(is_direct)),
            // It would empty the page cache.
            "--invalidate=0",
            &format!("--rw={}", workload.rw),
            &format!("--iodepth={}", workload.iodepth),
            &format!("--randseed={round}"),
            &format!("--ramp_time={RAMP}s"),
            &format!("--runtime={}s", self.seconds),
        ]);
        Figures::of_fio(&output(command.args(FIO))?, 0)
    }
}

/// fio's options for all that it measures.
pub(super) const FIO: [&str; 7] = [
    "--bs=4k",
    "--norandommap",
    "--time_based",
    "--unified_rw_reporting=mixed",
    "--lat_percentiles=1",
    "--clat_percentiles=0",
    "--output-format=json",
];

fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = output.output().with_context(|| name.clone())?;
    ensure!(
        output.status.success(),
        "{name} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stdout).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
