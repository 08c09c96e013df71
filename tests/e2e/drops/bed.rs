//! A controller in trouble, and what holds of it whatever was dropped.

use std::future::Future;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, poll};
use nvme_async::{ControllerEvent, ControllerState, IoError, LocalNamespace, Namespace};
use nvme_soft::fault::{Behaviour, EnableRefusal, Fault, FaultQueue, Loss};
use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::opcode::{AdminOpcode, NvmOpcode};
use tokio::sync::watch;
use tokio::task::unconstrained;

use crate::support::bounded::comes_true;
use crate::support::owners::Ledger;
use crate::support::rig::{Rig, Setup};
use crate::support::slowness;
use crate::support::suite::target::Target;

pub(super) const BLOCK: usize = 512;
const SIZE: usize = 512 << 10;
/// Where operations write; before that it is all [`OLD`].
pub(super) const CHANGED: Range<u64> = 0..SIZE as u64 / 2;
pub(super) const OLD: u8 = 1;
pub(super) const NEW: u8 = 2;
/// What is everywhere else.
pub(super) const SOURCE: u8 = 3;

/// How long the commands of the operations may take, and each step of a recovery.
fn timeout() -> Duration {
    Duration::from_millis(300) * slowness()
}

/// For commands that are not what is tested.
const LONG: Duration = Duration::from_secs(60);
/// What a slow controller takes for each command.
const SLOW: Duration = Duration::from_micros(200);

/// What happens while an operation is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Each command takes some time.
    Slow,
    /// Its first command hangs until it is aborted.
    Aborted,
    /// Its first command never completes: its queue pair is created anew, or, for an admin command,
    /// the controller is reset.
    Stuck { executed: bool },
    /// The same, and nothing but a reset of the controller helps.
    Reset,
    /// The power fails with its first command.
    PowerLoss,
    /// The function goes away with its first command.
    Vanish,
    /// The controller fails with its first command, and for ever.
    Death,
}

impl Trouble {
    /// Those in which time passes because of deadlines.
    pub(super) const LATE: [Self; 7] = [
        Self::Aborted,
        Self::Stuck { executed: false },
        Self::Stuck { executed: true },
        Self::Reset,
        Self::PowerLoss,
        Self::Vanish,
        Self::Death,
    ];

    /// The time between two polls of a future that nobody wakes.
    pub(super) fn pace(self) -> Duration {
        match self {
            Self::Slow => LONG,
            _ => timeout() / 5,
        }
    }

    fn faults(self, queue: FaultQueue) -> Vec<Fault> {
        let strike = |then| Fault::new(then).queue(queue);
        let loss = Loss::Random(7);
        let swallow = || Behaviour::Swallow { execute: false };
        match self {
            Self::Slow => {
                let delay = Behaviour::Delay(SLOW);
                vec![Fault::new(delay).queue(FaultQueue::Admin).times(0)]
            }
            Self::Aborted => vec![strike(Behaviour::Hold)],
            Self::Stuck { executed: execute } => vec![strike(Behaviour::Swallow { execute })],
            Self::Reset => vec![
                strike(swallow()),
                Fault::new(swallow()).opcode(AdminOpcode::ABORT),
                Fault::new(swallow()).opcode(AdminOpcode::DELETE_IO_SUBMISSION_QUEUE),
            ],
            Self::PowerLoss => vec![strike(Behaviour::PowerLoss(loss))],
            Self::Vanish => vec![strike(Behaviour::Vanish(loss))],
            Self::Death => vec![
                strike(Behaviour::Fail { serve: false }),
                Fault::new(Behaviour::RefuseEnable(EnableRefusal::Fail)).times(0),
            ],
        }
    }

    /// Whether a command that was struck leads to a reset, if it is an admin command.
    fn needs_a_reset(self) -> bool {
        !matches!(self, Self::Slow | Self::Aborted)
    }

    /// Whether the controller is of no use any more once it was struck.
    fn is_the_end(self) -> bool {
        matches!(self, Self::Vanish | Self::Death)
    }
}

/// A namespace by either of its handles.
pub(super) trait Handle: Target + Sized + 'static {
    fn of(namespace: &Namespace) -> Self;

    /// A write that waits for longer than the test is held back.
    fn patient_write(
        &self,
        offset: u64,
        buffer: Bytes,
    ) -> impl Future<Output = Result<Bytes, IoError<Bytes>>>;
}

impl Handle for Namespace {
    fn of(namespace: &Namespace) -> Self {
        namespace.clone()
    }

    async fn patient_write(&self, offset: u64, buffer: Bytes) -> Result<Bytes, IoError<Bytes>> {
        self.write(offset, buffer).fua().timeout(LONG).await
    }
}

impl Handle for LocalNamespace {
    fn of(namespace: &Namespace) -> Self {
        namespace.local().expect("a queue pair is set apart")
    }

    async fn patient_write(&self, offset: u64, buffer: Bytes) -> Result<Bytes, IoError<Bytes>> {
        self.write(offset, buffer).fua().timeout(LONG).await
    }
}

/// One controller, with one operation under way.
pub(super) struct Case<T> {
    pub(super) rig: Rig,
    pub(super) namespace: Namespace,
    pub(super) target: T,
    pub(super) ledger: Ledger,
    trouble: Trouble,
    label: String,
    states: watch::Receiver<ControllerState>,
    /// What is mapped when nothing is under way.
    mappings: u64,
}

/// What became of the future of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Dropped,
    /// What it has itself is never dropped: some of this memory of the caller's.
    Forgotten {
        owners: usize,
    },
}

impl<T: Handle> Case<T> {
    /// A controller that is well, with known contents.
    pub(super) async fn open(trouble: Trouble, label: String) -> Self {
        let mut rig = Setup::memory(SIZE as u64)
            .config(|config| {
                config.io_queue_pairs = 2;
                config.ready_timeout = Duration::from_millis(500) * slowness();
                config.track_unflushed = true;
                if trouble == Trouble::Slow {
                    config.latency = SLOW;
                }
            })
            .options(|options| {
                let options = options.queues(1).local_queues(1).queue_entries(4);
                let options = options.max_transfer(64 << 10);
                match trouble {
                    Trouble::Slow => options,
                    _ => options.timeout(Some(timeout())),
                }
            })
            .open()
            .await;
        rig.lost_power = trouble == Trouble::PowerLoss;
        let namespace = rig.namespace().await;
        let target = T::of(&namespace);
        let mut contents = vec![OLD; CHANGED.end as usize];
        contents.resize(SIZE, SOURCE);
        target
            .patient_write(0, contents.into())
            .await
            .expect("writes");
        Self {
            states: rig.controller().watch_state(),
            mappings: rig.device.iommu().mappings() as u64,
            rig,
            namespace,
            target,
            ledger: Ledger::default(),
            trouble,
            label,
        }
    }

    /// From now on there is trouble with the commands of `queue`.
    pub(super) fn begin(&self, queue: FaultQueue) {
        for fault in self.trouble.faults(queue) {
            let soft = self.rig.device.controller();
            soft.inject(fault).expect("a fault that makes sense");
        }
    }

    /// Whether the controller is gone or dead, and known to be.
    pub(super) fn is_over(&self) -> bool {
        let state = self.rig.controller().state();
        !matches!(
            state,
            ControllerState::Live | ControllerState::Recovering { .. }
        )
    }

    /// What holds after the operation, whose commands go to `queue`, and which may have put `new`
    /// where it writes.
    pub(super) async fn check(self, queue: FaultQueue, new: Option<u8>, end: End) {
        let soft = self.rig.device.controller();
        let kind = self.trouble.faults(queue)[0].then.kind();
        if soft.faults_hit(kind) == 0 || !self.trouble.is_the_end() {
            // What was struck stays so.
            soft.clear_faults();
        }
        let struck = soft.faults_hit(kind) > 0;
        if self.trouble.is_the_end() && struck {
            return self.check_the_end(end).await;
        }
        let label = &self.label;
        let quiet = self.target.quiesce().await;
        quiet.unwrap_or_else(|error| panic!("{label}: {error}"));
        if struck && queue == FaultQueue::Admin && self.trouble.needs_a_reset() {
            // Nobody waits for an admin command that was given up.
            let has_begun = || self.states.has_changed().expect("the controller is there");
            self.comes_true("recovery begins", has_begun).await;
        }
        self.comes_true("it works again", || {
            assert!(
                !self.is_over(),
                "{label}: {:?}",
                self.rig.controller().state()
            );
            self.rig.controller().state() == ControllerState::Live
        })
        .await;
        self.check_memory(end).await;
        let contents = self.contents(new).await;
        self.check_slots().await;
        self.check_events().await;
        let later = self.contents(new).await;
        assert_eq!(later, contents, "{label}: nothing comes late");
        drop((contents, later));
        match end {
            End::Dropped => {
                let Self { rig, ledger, .. } = self;
                drop((self.target, self.namespace));
                rig.close().await;
                assert_eq!(ledger.alive(), 0);
            }
            End::Forgotten { owners } => {
                drop((self.target, self.namespace));
                self.rig.close_keeping(self.mappings).await;
                assert!(self.ledger.alive() <= owners);
            }
        }
    }

    /// Of a controller that is gone or dead nothing is left, once that was noticed.
    async fn check_the_end(self, end: End) {
        // Whatever it says, it says it.
        let _ = self.target.quiesce().await;
        self.check_memory(end).await;
        let Self { rig, ledger, .. } = self;
        drop((self.target, self.namespace));
        match end {
            End::Dropped => {
                rig.abandon().await;
                assert_eq!(ledger.alive(), 0);
            }
            End::Forgotten { owners } => {
                rig.abandon_keeping(self.mappings).await;
                assert!(ledger.alive() <= owners);
            }
        }
    }

    /// All memory of the callers is back. Another thread may be dropping it yet.
    async fn check_memory(&self, end: End) {
        let End::Dropped = end else {
            return;
        };
        self.comes_true("all memory is back", || self.ledger.alive() == 0)
            .await;
        let mapped = || self.rig.controller().mappings();
        self.comes_true("nothing is mapped for a command", || {
            mapped().temporary_mappings == 0 && mapped().waiting == 0
        })
        .await;
    }

    /// Each block holds old or new data, and nothing else has changed.
    async fn contents(&self, new: Option<u8>) -> Bytes {
        let read = self.namespace.read(0, SIZE).timeout(LONG).await;
        let read = read.unwrap_or_else(|error| panic!("{}: {error}", self.label));
        for (offset, block) in (0..).step_by(BLOCK).zip(read.chunks(BLOCK)) {
            let byte = block[0];
            let is_right = if CHANGED.contains(&offset) {
                byte == OLD || Some(byte) == new
            } else {
                byte == SOURCE
            };
            // A block against its own first byte: all are the same.
            let is_whole = block[1..] == block[..BLOCK - 1];
            assert!(
                is_right && is_whole,
                "{}: {byte} at {offset:#x}",
                self.label
            );
        }
        read
    }

    /// As many commands as ever can be outstanding.
    async fn check_slots(&self) {
        let soft = self.rig.device.controller();
        let depth = self.rig.controller().io_queues().next();
        let depth = depth.expect("there is one").depth() as u64;
        let hold = Fault::new(Behaviour::Hold).opcode(NvmOpcode::WRITE);
        soft.inject(hold.times(0)).expect("makes sense");
        let before = soft.counters().commands;
        let mut writes: Vec<_> = (0..depth + 2)
            .map(|index| {
                let buffer = self.ledger.bytes(BLOCK, SOURCE);
                let offset = CHANGED.end + index * BLOCK as u64;
                // The other cases are of the same task: with its budget for one turn used up by them,
                // a write would not begin, and nobody polls it again.
                Box::pin(unconstrained(self.target.patient_write(offset, buffer)))
            })
            .collect();
        for write in &mut writes {
            assert!(poll!(write).is_pending());
        }
        self.comes_true("all slots are taken", || {
            soft.counters().commands - before >= depth
        })
        .await;
        soft.clear_faults();
        assert_eq!(soft.counters().commands - before, depth, "{}", self.label);
        soft.release_stuck();
        for write in writes {
            drop(
                write
                    .await
                    .unwrap_or_else(|error| panic!("{}: {error}", self.label)),
            );
        }
    }

    /// The admin queue is alive, and an event reaches those who want to know.
    async fn check_events(&self) {
        let mut events = self.rig.controller().events();
        let event = AsyncEvent::report(Event::TransientInternalError);
        self.rig.device.controller().raise_event(event);
        loop {
            let event = events.next().await.expect("the controller is open");
            if matches!(event, ControllerEvent::Error { .. }) {
                return;
            }
        }
    }

    async fn comes_true(&self, what: &str, done: impl FnMut() -> bool) {
        comes_true(&format!("{}: {what}", self.label), done).await;
    }
}
