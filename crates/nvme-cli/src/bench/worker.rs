//! The tasks that keep requests in flight.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nvme_async::{DmaBuf, Error, IoError, Namespace};
use tokio::task::coop::consume_budget;

use super::ledger::{Claim, Contents, Ledger};
use super::pattern::{self, Origin};
use super::plan::{Operation, Plan};

/// What all tasks of a run share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) plan: Plan,
    pub(super) namespace: Namespace,
    pub(super) verification: Option<Verification>,
    pub(super) phase: PhaseCell,
    pub(super) first_error: OnceLock<String>,
}

/// What `--verify` needs.
#[derive(Debug)]
pub(super) struct Verification {
    /// Differs from run to run.
    pub(super) run: u64,
    pub(super) ledger: Ledger,
    /// Whether blocks that this run has not written were written by an earlier one.
    pub(super) earlier_run: bool,
}

/// What the tasks are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    Ramp,
    /// Count what completes.
    Measure,
    Over,
}

/// The phase that a run is in.
#[derive(Debug)]
pub(super) struct PhaseCell(AtomicU8);

impl PhaseCell {
    pub(super) fn new() -> Self {
        Self(AtomicU8::new(Phase::Ramp as u8))
    }

    // Nothing else is published by it, so no ordering is needed.
    pub(super) fn enter(&self, phase: Phase) {
        self.0.store(phase as u8, Ordering::Relaxed);
    }

    fn is(&self, phase: Phase) -> bool {
        self.0.load(Ordering::Relaxed) == phase as u8
    }
}

/// What one task did. Only that task changes it; others look at it meanwhile.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Tally {
    completed: AtomicU64,
    errors: AtomicU64,
}

impl Tally {
    pub(super) fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }

    pub(super) fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

/// What one task measured.
#[derive(Debug)]
pub(super) struct Measured {
    /// In nanoseconds.
    pub(super) latencies: Histogram<u64>,
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) checked: u64,
}

impl Measured {
    pub(super) fn new() -> Self {
        Self {
            latencies: new_histogram(),
            reads: 0,
            writes: 0,
            checked: 0,
        }
    }

    fn record(&mut self, operation: Operation, latency: Duration) {
        let nanoseconds = latency.as_nanos().min(u64::MAX.into()) as u64;
        // The histogram grows as needed, so this cannot fail.
        let _ = self.latencies.record(nanoseconds);
        match operation {
            Operation::Read => self.reads += 1,
            Operation::Write => self.writes += 1,
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        // Both resize as needed and have the same precision, so this cannot fail.
        let _ = self.latencies.add(&other.latencies);
        self.reads += other.reads;
        self.writes += other.writes;
        self.checked += other.checked;
    }
}

/// A histogram that grows with its values, to three significant digits.
fn new_histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three digits are within the 0 to 5 that there can be")
}

/// One request at a time, again and again.
#[derive(Debug)]
pub(super) struct Task {
    shared: Arc<Shared>,
    tally: Arc<Tally>,
    /// The next sequential block, shared by the tasks of a job.
    cursor: Arc<AtomicU64>,
    rng: fastrand::Rng,
    buffer: Option<DmaBuf>,
    measured: Measured,
}

impl Task {
    /// Task number `index` of all.
    pub(super) fn new(
        shared: Arc<Shared>,
        tally: Arc<Tally>,
        cursor: Arc<AtomicU64>,
        index: u64,
    ) -> Self {
        // Seeds in sequence would give sequences that resemble each other.
        let mut seeds = fastrand::Rng::with_seed(shared.plan.seed ^ index.rotate_left(32));
        let rng = fastrand::Rng::with_seed(seeds.u64(..));
        Self {
            shared,
            tally,
            cursor,
            rng,
            buffer: None,
            measured: Measured::new(),
        }
    }

    /// Works until the run is over, or nothing can work any more.
    pub(super) async fn run(mut self) -> Measured {
        let shared = self.shared.clone();
        let plan = &shared.plan;
        while !shared.phase.is(Phase::Over) {
            let operation = plan
                .workload
                .operation(plan.read_percent, self.rng.u8(0..100));
            let Some((block, claim)) = self.next_block(&shared).await else {
                break;
            };
            let offset = plan.offset_of(block);
            let done = match operation {
                Operation::Read => self.read(&shared, offset, claim).await,
                Operation::Write => self.write(&shared, offset, claim).await,
            };
            if let Err(error) = done {
                shared.report(&self.tally, &error);
                if error.is_final() {
                    break;
                }
            }
            // A device in this process may be so fast that nothing above ever waits.
            consume_budget().await;
        }
        self.measured
    }

    /// The block for the next request, claimed if blocks are; nothing if the run ended before one
    /// became free.
    async fn next_block<'a>(&mut self, shared: &'a Shared) -> Option<(u64, Option<Claim<'a>>)> {
        loop {
            let block = if shared.plan.workload.is_random() {
                self.rng.u64(..shared.plan.blocks)
            } else {
                self.cursor.fetch_add(1, Ordering::Relaxed) % shared.plan.blocks
            };
            let Some(verification) = &shared.verification else {
                return Some((block, None));
            };
            if let Some(claim) = verification.ledger.claim(block) {
                return Some((block, Some(claim)));
            }
            // Those that hold the blocks need their turn if there are more tasks than blocks.
            tokio::task::yield_now().await;
            if shared.phase.is(Phase::Over) {
                return None;
            }
        }
    }

    async fn read(
        &mut self,
        shared: &Shared,
        offset: u64,
        claim: Option<Claim<'_>>,
    ) -> Result<(), TaskError> {
        let buffer = self.take_buffer(shared)?;
        let start = Instant::now();
        let outcome = shared.namespace.read_into(offset, buffer).await;
        let end = Instant::now();
        let buffer = match outcome {
            Ok(buffer) => buffer,
            Err(error) => {
                // The block holds what it did, unless that is still to be seen.
                if error.buffer.is_some()
                    && let Some(claim) = claim
                {
                    let contents = claim.contents();
                    claim.release(contents);
                }
                return Err(self.recover(error));
            }
        };
        self.count(shared, Operation::Read, start, end);
        let mut checked = Ok(());
        if let Some((claim, verification)) = claim.zip(shared.verification.as_ref()) {
            let contents = claim.contents();
            let expected = match contents {
                Contents::Written { sequence } => Some(Some(Origin {
                    run: verification.run,
                    sequence,
                })),
                Contents::Unknown if verification.earlier_run => Some(None),
                Contents::Unknown => None,
            };
            if let Some(expected) = expected {
                checked = pattern::check(&buffer, shared.plan.block_size, offset, expected);
                self.measured.checked += 1;
            }
            claim.release(contents);
        }
        self.buffer = Some(buffer);
        checked.map_err(TaskError::Mismatch)
    }

    async fn write(
        &mut self,
        shared: &Shared,
        offset: u64,
        claim: Option<Claim<'_>>,
    ) -> Result<(), TaskError> {
        let mut buffer = self.take_buffer(shared)?;
        let mut contents = Contents::Unknown;
        if let Some((claim, verification)) = claim.as_ref().zip(shared.verification.as_ref()) {
            let sequence = claim.next_sequence();
            let origin = Origin {
                run: verification.run,
                sequence,
            };
            pattern::stamp(&mut buffer, shared.plan.block_size, offset, origin);
            contents = Contents::Written { sequence };
        }
        let start = Instant::now();
        let write = shared.namespace.write(offset, buffer);
        let outcome = if shared.plan.fua {
            write.fua().await
        } else {
            write.await
        };
        let end = Instant::now();
        match outcome {
            Ok(buffer) => {
                self.count(shared, Operation::Write, start, end);
                self.buffer = Some(buffer);
                if let Some(claim) = claim {
                    claim.release(contents);
                }
                Ok(())
            }
            Err(error) => {
                // A write whose buffer is not back may still reach the media, so that nobody
                // else may have the block.
                if error.buffer.is_some()
                    && let Some(claim) = claim
                {
                    claim.release(Contents::Unknown);
                }
                Err(self.recover(error))
            }
        }
    }

    fn take_buffer(&mut self, shared: &Shared) -> Result<DmaBuf, TaskError> {
        if let Some(buffer) = self.buffer.take() {
            return Ok(buffer);
        }
        let mut buffer = shared
            .namespace
            .allocate(shared.plan.bs)
            .map_err(TaskError::Memory)?;
        // Devices may treat zeroes, and what compresses well, differently.
        self.rng.fill(&mut buffer);
        Ok(buffer)
    }

    fn recover(&mut self, error: IoError<DmaBuf>) -> TaskError {
        self.buffer = error.buffer;
        TaskError::Io(error.error)
    }

    fn count(&mut self, shared: &Shared, operation: Operation, start: Instant, end: Instant) {
        let completed = self.tally.completed.load(Ordering::Relaxed) + 1;
        self.tally.completed.store(completed, Ordering::Relaxed);
        if !shared.phase.is(Phase::Measure) {
            return;
        }
        self.measured.record(operation, end.duration_since(start));
    }
}

impl Shared {
    /// Counts an error and keeps the first one.
    pub(super) fn report(&self, tally: &Tally, error: &TaskError) {
        tally.errors.fetch_add(1, Ordering::Relaxed);
        self.first_error.get_or_init(|| error.to_string());
    }
}

/// What can go wrong with one request.
#[derive(Debug, thiserror::Error)]
pub(super) enum TaskError {
    #[error(transparent)]
    Io(Error),
    /// No buffer could be had.
    #[error(transparent)]
    Memory(Error),
    #[error("{0}")]
    Mismatch(pattern::Mismatch),
}

impl TaskError {
    /// Whether later requests would fail as well.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::Mismatch(_) => false,
            Self::Memory(_) => true,
            Self::Io(error) => !matches!(
                error,
                Error::Command(_) | Error::Split(_) | Error::TimedOut { .. }
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Disk, close, shared};
    use super::super::{Workload, passes};
    use super::*;

    fn task(shared: &Arc<Shared>) -> (Arc<Tally>, Task) {
        let tally = Arc::new(Tally::default());
        (
            tally.clone(),
            Task::new(shared.clone(), tally, Arc::default(), 0),
        )
    }

    async fn run_until(shared: &Shared, task: Task, enough: impl Fn() -> bool) -> Measured {
        shared.phase.enter(Phase::Measure);
        let task = tokio::spawn(task.run());
        while !enough() {
            tokio::task::yield_now().await;
        }
        shared.phase.enter(Phase::Over);
        task.await.expect("the task")
    }

    #[tokio::test]
    async fn reads_are_checked_against_the_last_write() {
        let disk = Disk::new();
        let shared = shared(&disk.url("64k"), 4096, Workload::Read).await;
        passes::fill(&shared).await.expect("fill");
        let (tally, first) = task(&shared);
        let measured = run_until(&shared, first, || tally.completed() >= 32).await;
        assert_eq!(tally.errors(), 0);
        assert!(
            measured.checked >= 32 && measured.reads >= 32,
            "{measured:?}"
        );

        // What was written first is back in the place of what was written last.
        let old = disk.read(0, 64 << 10);
        passes::fill(&shared).await.expect("fill");
        disk.write(0, &old);
        let (tally, second) = task(&shared);
        run_until(&shared, second, || tally.errors() >= 16).await;
        let error = shared.first_error.get().expect("an error");
        assert!(
            error.contains("write 1 of this place, not of write 2"),
            "{error}"
        );
        close(&shared).await;
    }

    #[tokio::test]
    async fn writes_are_what_reads_back() {
        let shared = shared("mem:?size=64k", 4096, Workload::Randwrite).await;
        let (tally, writer) = task(&shared);
        let measured = run_until(&shared, writer, || tally.completed() >= 100).await;
        assert!(measured.writes >= 99 && measured.reads == 0, "{measured:?}");
        let (checked, errors) = passes::read_back(&shared).await.expect("read back");
        assert!((1..=16).contains(&checked), "{checked}");
        assert_eq!((tally.errors(), errors), (0, 0));
        close(&shared).await;
    }

    #[test]
    fn latencies_of_all_tasks_count() {
        let mut sum = Measured::new();
        let mut one = Measured::new();
        (1..=99).for_each(|us| one.record(Operation::Read, Duration::from_micros(us)));
        let mut other = Measured::new();
        other.record(Operation::Write, Duration::from_secs(3));
        sum.add(&one);
        sum.add(&other);
        assert_eq!((sum.reads, sum.writes, sum.latencies.len()), (99, 1, 100));
        let close = |value: u64, expected: u64| value.abs_diff(expected) * 1000 <= expected;
        assert!(close(sum.latencies.value_at_quantile(0.5), 50_000));
        assert!(close(sum.latencies.value_at_quantile(0.99), 99_000));
        assert!(close(sum.latencies.max(), 3_000_000_000));
    }

    #[test]
    fn what_ends_a_task() {
        let closed = Error::Closed {
            address: String::new(),
            fate: nvme_async::Fate::NotExecuted,
        };
        assert!(TaskError::Io(closed).is_final());
        let kind = pattern::MismatchKind::Unwritten;
        assert!(!TaskError::Mismatch(pattern::Mismatch { offset: 0, kind }).is_final());
    }
}
