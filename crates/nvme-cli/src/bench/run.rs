//! One run, from opening the namespace to what was found.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;
use nvme_async::{Controller, Counters};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval_at};

use super::Arguments;
use super::cpu::CpuSample;
use super::ledger::Ledger;
use super::passes;
use super::pattern::{self, MismatchKind};
use super::plan::{self, Plan};
use super::report::{Findings, Report, difference};
use super::worker::{Measured, Phase, PhaseCell, Shared, Tally, Task, Verification};
use crate::failure::Failure;
use crate::target::Target;
use crate::{format, progress};

/// How often the line of progress changes.
const REFRESH: Duration = Duration::from_millis(200);

/// Runs the workload.
pub(super) async fn run(arguments: &Arguments) -> Result<Report, Failure> {
    let target = Target::open(&arguments.url, plan::open_options(arguments)).await?;
    let shared = match prepare(arguments, &target).await {
        Ok(shared) => shared,
        Err(failure) => {
            target.discard().await;
            return Err(failure);
        }
    };
    let report = measure(arguments, &shared).await;
    let closed = target.namespace.controller().shutdown().await;
    let report = report?;
    closed.map_err(|error| Failure::from(error).context("closing the controller"))?;
    Ok(report)
}

/// Checks the request against the namespace. Nothing is written.
async fn prepare(arguments: &Arguments, target: &Target) -> Result<Arc<Shared>, Failure> {
    let namespace = target.namespace.clone();
    let plan = Plan::new(arguments, namespace.capacity(), namespace.block_size())?;
    let reads_only = !plan.workload.writes();
    if arguments.verify && reads_only && !fills(arguments) {
        check_earlier_run(&plan, target).await?;
    }
    let verification = arguments.verify.then(|| Verification {
        run: run_id(),
        ledger: Ledger::new(plan.blocks),
        earlier_run: reads_only,
    });
    Ok(Arc::new(Shared {
        plan,
        namespace,
        verification,
        phase: PhaseCell::new(),
        first_error: OnceLock::new(),
    }))
}

/// Whether the region is to be written before the run: on request, and where reads would find
/// nothing to check and nothing can be lost.
fn fills(arguments: &Arguments) -> bool {
    let new_memory = arguments.url.starts_with("mem:") && !arguments.rw.writes();
    arguments.fill || arguments.verify && new_memory
}

/// A read that is to be checked makes sense only where there is something to check.
async fn check_earlier_run(plan: &Plan, target: &Target) -> Result<(), Failure> {
    let data = target.namespace.read(plan.offset, plan.bs).await?;
    match pattern::check(&data, plan.block_size, plan.offset, None) {
        Err(mismatch) if mismatch.kind == MismatchKind::Unwritten => {
            Err(Failure::request(format_args!(
                "{mismatch}; to check reads, the region must have been written by a run with \
                 --verify; add --fill to write it first, which destroys what is in it"
            )))
        }
        // Other damage is what the run is to find.
        _ => Ok(()),
    }
}

/// A number that two runs do not share: nanoseconds since 1970.
fn run_id() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    now.as_nanos() as u64
}

async fn measure(arguments: &Arguments, shared: &Arc<Shared>) -> Result<Report, Failure> {
    if fills(arguments) {
        eprintln!(
            "writing {} at offset {} first, for --verify",
            format::bytes(shared.plan.size()),
            shared.plan.offset
        );
        passes::fill(shared).await?;
    }
    let mut crew = Crew::start(shared);
    let line = progress::line();
    crew.work("ramp", arguments.ramp, &line).await;
    let before = Sample::take(shared.namespace.controller());
    shared.phase.enter(Phase::Measure);
    crew.work("run", arguments.runtime, &line).await;
    shared.phase.enter(Phase::Over);
    let after = Sample::take(shared.namespace.controller());
    line.finish_and_clear();
    let (measured, mut errors) = crew.finish().await?;
    let mut read_back = 0;
    if shared.verification.is_some() && shared.plan.workload.writes() {
        let (checked, failed) = passes::read_back(shared).await?;
        read_back = checked;
        errors += failed;
    }
    let findings = Findings {
        measured,
        elapsed: after.at - before.at,
        counters: difference(after.counters, before.counters),
        cpu: after.cpu.since(&before.cpu),
        errors,
        first_error: shared.first_error.get().cloned(),
        read_back,
    };
    Ok(Report::new(arguments, &shared.plan, findings))
}

/// All that is counted, at one time.
struct Sample {
    at: Instant,
    counters: Counters,
    cpu: CpuSample,
}

impl Sample {
    fn take(controller: &Controller) -> Self {
        Self {
            at: Instant::now(),
            counters: controller.counters(),
            cpu: CpuSample::now(controller.software_thread()),
        }
    }
}

/// All tasks of a run.
struct Crew {
    tasks: JoinSet<Measured>,
    tallies: Vec<Arc<Tally>>,
    bs: u64,
    measured: Measured,
    panicked: bool,
}

impl Crew {
    fn start(shared: &Arc<Shared>) -> Self {
        let plan = &shared.plan;
        let mut tasks = JoinSet::new();
        let mut tallies = Vec::new();
        for job in 0..plan.jobs {
            let cursor = Arc::new(AtomicU64::new(plan.first_block(job)));
            for slot in 0..plan.iodepth {
                let index = u64::from(job) << 32 | u64::from(slot);
                let tally = Arc::new(Tally::default());
                tallies.push(tally.clone());
                tasks.spawn(Task::new(shared.clone(), tally, cursor.clone(), index).run());
            }
        }
        let bs = plan.bs as u64;
        Self {
            tasks,
            tallies,
            bs,
            measured: Measured::new(),
            panicked: false,
        }
    }

    /// Lets the tasks work for some time, or until none is left.
    async fn work(&mut self, what: &str, time: Duration, line: &ProgressBar) {
        let start = Instant::now();
        let end = tokio::time::sleep(time);
        tokio::pin!(end);
        let mut refresh = interval_at((start + REFRESH).into(), REFRESH);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = (start, self.completed());
        while !self.tasks.is_empty() {
            tokio::select! {
                biased;
                () = &mut end => break,
                Some(joined) = self.tasks.join_next() => self.join(joined),
                _ = refresh.tick(), if !line.is_hidden() => {
                    let (now, completed) = (Instant::now(), self.completed());
                    let seconds = (now - last.0).as_secs_f64();
                    if seconds > 0.0 {
                        let iops = (completed - last.1) as f64 / seconds;
                        line.set_message(self.progress(what, now - start, time, iops));
                    }
                    last = (now, completed);
                }
            }
        }
    }

    /// Waits for the requests that are under way.
    async fn finish(mut self) -> Result<(Measured, u64), Failure> {
        while let Some(joined) = self.tasks.join_next().await {
            self.join(joined);
        }
        if self.panicked {
            return Err(Failure::operation("a task panicked; please report this"));
        }
        Ok((
            self.measured,
            self.tallies.iter().map(|tally| tally.errors()).sum(),
        ))
    }

    fn join(&mut self, joined: Result<Measured, tokio::task::JoinError>) {
        match joined {
            Ok(measured) => self.measured.add(&measured),
            Err(_) => self.panicked = true,
        }
    }

    fn completed(&self) -> u64 {
        self.tallies.iter().map(|tally| tally.completed()).sum()
    }

    fn progress(&self, what: &str, elapsed: Duration, of: Duration, iops: f64) -> String {
        let errors: u64 = self.tallies.iter().map(|tally| tally.errors()).sum();
        let errors = if errors > 0 {
            format!(", {errors} errors")
        } else {
            String::new()
        };
        format!(
            "{what} {:.1}/{:.1} s, {} IOPS, {}/s{errors}",
            elapsed.as_secs_f64(),
            of.as_secs_f64(),
            format::rate(iops),
            format::bytes((iops * self.bs as f64) as u64),
        )
    }
}
