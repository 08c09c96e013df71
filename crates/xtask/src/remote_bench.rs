//! `cargo xtask remote-bench`: a controller in another process beside one in the same.

use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::table::{median, write_table};
use crate::workspace::Workspace;

const MEMORY: &str = "mem:?size=256M";

/// Compares 4 KiB random reads of memory behind vfio-user with those of a controller in the same process.
///
/// All by turns, `--rounds` times; the table has medians, and of the ratio to in-process IOPS the median of
/// those within a round.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How often everything is measured.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Seconds of each measurement.
    #[arg(long, default_value = "1")]
    seconds: String,

    /// Commands in flight.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32, 128])]
    depths: Vec<u32>,
}

/// What is measured, in this order: the doorbells of the server, if there is one, and how the client polls.
const WAYS: [(&str, Option<&str>, &str); 5] = [
    ("in process", None, "adaptive"),
    ("mapped doorbells", Some("mapped"), "adaptive"),
    ("mapped doorbells, paired", Some("mapped"), "paired"),
    ("trapped doorbells", Some("trapped"), "adaptive"),
    ("trapped doorbells, paired", Some("trapped"), "paired"),
];

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let build = ["build", "--release", "--package", "nvme-cli"];
    let status = workspace.cargo().args(build).status();
    ensure!(
        status.context("cargo build")?.success(),
        "the program can't be built"
    );
    let program = workspace.target.join("release/nvme-async");
    let directory = workspace.target.join("remote-bench");
    std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let servers = [
        Server::start(&program, &directory, "mapped")?,
        Server::start(&program, &directory, "trapped")?,
    ];
    let url = |doorbells: Option<&str>| match doorbells {
        None => MEMORY.to_owned(),
        Some(doorbells) => {
            let socket = directory.join(doorbells);
            format!("vfio-user:{}", socket.display())
        }
    };
    for &depth in &arguments.depths {
        let mut runs: [Vec<Figures>; WAYS.len()] = Default::default();
        for _ in 0..arguments.rounds {
            for ((_, doorbells, poll), runs) in WAYS.iter().zip(&mut runs) {
                let depth = depth.to_string();
                let bench = [
                    "bench",
                    &url(*doorbells),
                    "--rw=randread",
                    "--bs=4k",
                    "--iodepth",
                    &depth,
                    "--runtime",
                    &arguments.seconds,
                    "--poll",
                    poll,
                    "--json",
                ];
                runs.push(Figures::measure(Command::new(&program).args(bench))?);
            }
        }
        println!("{}", Table { depth, runs: &runs });
    }
    drop(servers);
    Ok(ExitCode::SUCCESS)
}

/// What one measurement found.
#[derive(Debug)]
struct Figures {
    iops: f64,
    /// In nanoseconds.
    p50: f64,
    p99: f64,
    /// Of one processor, the client's threads.
    cpu_percent: f64,
    interrupts_per_io: f64,
}

impl Figures {
    fn measure(command: &mut Command) -> Result<Self> {
        let output = command.stderr(Stdio::inherit()).output();
        let output = output.context("the benchmark")?;
        ensure!(output.status.success(), "the benchmark failed");
        let report: Value = serde_json::from_slice(&output.stdout).context("its report")?;
        let figure = |value: &Value| value.as_f64().context("a report without some figure");
        Ok(Self {
            iops: figure(&report["iops"])?,
            p50: figure(&report["latency_ns"]["p50"])?,
            p99: figure(&report["latency_ns"]["p99"])?,
            cpu_percent: figure(&report["cpu_percent"])?,
            interrupts_per_io: figure(&report["interrupts"])? / figure(&report["ios"])?,
        })
    }
}

/// All of one depth.
struct Table<'a> {
    depth: u32,
    runs: &'a [Vec<Figures>],
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = [
            "",
            "IOPS",
            "ratio",
            "p50 µs",
            "p99 µs",
            "CPU %",
            "interrupts/IO",
        ];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        let base = &self.runs[0];
        for ((name, ..), runs) in WAYS.iter().zip(self.runs) {
            let of = |figure: fn(&Figures) -> f64| {
                median(runs.iter().map(figure).collect()).unwrap_or(f64::NAN)
            };
            let ratios = runs
                .iter()
                .zip(base)
                .map(|(run, base)| run.iops / base.iops);
            rows.push(vec![
                (*name).to_owned(),
                format!("{:.0}", of(|run| run.iops)),
                format!("{:.2}", median(ratios.collect()).unwrap_or(f64::NAN)),
                format!("{:.1}", of(|run| run.p50 / 1e3)),
                format!("{:.1}", of(|run| run.p99 / 1e3)),
                format!("{:.0}", of(|run| run.cpu_percent)),
                format!("{:.3}", of(|run| run.interrupts_per_io)),
            ]);
        }
        writeln!(f, "QD {}", self.depth)?;
        write_table(f, &rows)
    }
}

/// A process that serves memory.
struct Server {
    process: Child,
    socket: PathBuf,
}

impl Server {
    fn start(program: &Path, directory: &Path, doorbells: &str) -> Result<Self> {
        let socket = directory.join(doorbells);
        let mut process = Command::new(program)
            .args(["serve", "vfio-user", "--doorbells", doorbells, "--socket"])
            .arg(&socket)
            .arg(MEMORY)
            .stdout(Stdio::piped())
            .spawn()
            .context("the server")?;
        let stdout = process.stdout.take().context("its output")?;
        let server = Self { process, socket };
        // It says so when it can be reached.
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line.starts_with("serving"), "the server does not serve");
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end and nothing to remove.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}
