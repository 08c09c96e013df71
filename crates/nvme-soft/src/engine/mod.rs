//! The controller's thread: looks for work, does it, sleeps.

pub(crate) mod background;
mod changes;
mod deferred;
mod faults;
mod interrupts;
mod lifecycle;
pub(crate) mod queues;
mod spin;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::{Sqe, Status};

use self::background::Background;
pub(crate) use self::background::Place;
use self::deferred::Deferred;
use self::faults::Faults;
use self::interrupts::Coalescing;
use self::queues::{Completion, QueueError, Queues, Tamper};
use self::spin::Spin;
use crate::admin::Admin;
use crate::config::Config;
use crate::control::{Hold, Shared};
use crate::data::Transfer;
use crate::dma::Dma;
use crate::doorbells::HostDoorbells;
use crate::namespace::Namespaces;
use crate::pool::Work;
use crate::wake::Urgency;
use crate::{HostMemory, Interrupts};

/// Commands that are fetched in one access to host memory.
const BATCH: usize = 16;
/// An interrupt is not put off for longer than this to collect more completions.
const MAX_INTERRUPT_DELAY: Duration = Duration::from_micros(4);
/// Timers are late by about this much, so the end of a wait is spent awake.
const TIMER_MARGIN: Duration = Duration::from_micros(60);

/// The first sleep between two looks at doorbells that are memory; each further one is twice as long.
const FIRST_NAP: Duration = Duration::from_micros(50);
/// The longest time between two looks at whether an interrupt is held back no more.
const LONGEST_HOLD: Duration = Duration::from_millis(100);

/// Whether commands are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// CC.EN is clear.
    Disabled,
    /// CC.EN is set and CSTS.RDY is not, yet or for ever.
    NotReady,
    /// CSTS.RDY is set.
    Ready,
    /// A shutdown is complete; only a reset leads out.
    ShutDown,
    /// CSTS.CFS is set; only a reset leads out.
    Failed,
    /// The function is not there.
    Gone,
}

/// What a command leads to: its dword 0 of the completion, or the status that says why not.
pub(crate) type Outcome = Result<u32, Status>;

/// What to do about a fetched command.
pub(crate) enum Reply {
    Now(Outcome),
    /// Another part of the controller completes it some time.
    Later,
    /// It completes once this is done.
    HandOver(Box<Work>),
    /// It is to be served again, when there is room for its work.
    PutOff,
}

/// The limits that commands are checked against, fixed while the controller is enabled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The memory page size that the host chose (CC.MPS), in bytes.
    pub(crate) page_size: u64,
    /// The largest data transfer in bytes (MDTS).
    pub(crate) max_transfer: u64,
    /// The largest Write Zeroes in bytes (WZSL).
    pub(crate) max_write_zeroes: u64,
    /// The largest Verify in bytes (VSL).
    pub(crate) max_verify: u64,
}

/// All that the controller's thread owns.
pub(crate) struct Engine {
    pub(crate) config: Config,
    pub(crate) shared: Arc<Shared>,
    pub(crate) doorbells: HostDoorbells,
    pub(crate) dma: Dma,
    pub(crate) interrupts: Arc<dyn Interrupts>,
    pub(crate) limits: Limits,
    pub(crate) queues: Queues,
    pub(crate) namespaces: Namespaces,
    pub(crate) admin: Admin,
    pub(crate) background: Background,
    /// The command that is being served was preceded by a flush.
    pub(crate) is_flushed: bool,
    pub(crate) transfer: Transfer,
    /// Through which data passes between host memory and stores.
    pub(crate) buffer: Vec<u8>,
    state: State,
    bus_master: bool,
    hold: Hold,
    /// The last sleep between two looks at doorbells that are memory; zero when there was work since.
    nap: Duration,
    /// When a slow controller becomes ready.
    ready_at: Option<Instant>,
    spin: Spin,
    /// The same while commands wait for their time, for which the host may be waiting too.
    spin_deferred: Spin,
    /// In the order in which it is due.
    deferred: VecDeque<Deferred>,
    /// There is none until the host sets some.
    coalescing: Option<Coalescing>,
    /// There is none until a fault is injected.
    faults: Option<Box<Faults>>,
    fetched: [Sqe; BATCH],
}

impl Engine {
    pub(crate) fn new(
        mut config: Config,
        shared: Arc<Shared>,
        memory: Arc<dyn HostMemory>,
        interrupts: Arc<dyn Interrupts>,
    ) -> Self {
        let min_page = 4096u64 << config.mpsmin;
        let limit = |shift: u8| {
            if shift == 0 {
                u64::MAX
            } else {
                min_page << shift
            }
        };
        let namespaces = std::mem::take(&mut config.namespaces);
        let max_namespaces = config.max_namespaces.max(namespaces.len() as u32);
        let mut namespaces = Namespaces::new(namespaces, max_namespaces);
        if config.track_unflushed {
            namespaces.track_unflushed();
        }
        let faults = std::mem::take(&mut config.faults);
        let mut engine = Self {
            limits: Limits {
                page_size: min_page,
                max_transfer: limit(config.mdts),
                max_write_zeroes: limit(config.wzsl),
                max_verify: limit(config.vsl),
            },
            doorbells: HostDoorbells::new(shared.doorbells.clone()),
            dma: Dma::new(memory, shared.clone()),
            queues: Queues::new(config.io_queue_pairs),
            admin: Admin::new(&config, namespaces.max(), interrupts.count()),
            namespaces,
            background: Background::new(shared.doorbells.clone()),
            is_flushed: false,
            transfer: Transfer::default(),
            buffer: Vec::new(),
            state: State::Disabled,
            bus_master: true,
            hold: Hold::Nothing,
            nap: Duration::ZERO,
            ready_at: None,
            spin: Spin::new(config.spin),
            spin_deferred: Spin::new(config.spin),
            deferred: VecDeque::new(),
            coalescing: None,
            faults: None,
            fetched: [Sqe::default(); BATCH],
            config,
            shared,
            interrupts,
        };
        for fault in faults {
            engine.inject(fault);
        }
        engine
    }

    /// Serves until the embedder stops the controller.
    pub(crate) fn run(mut self) {
        // A late end of a command's latency is the price of the default slack of 50 µs; refused
        // only where the kernel lacks it.
        if !self.config.latency.is_zero() {
            let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
        }
        loop {
            if self.doorbells.registers.wants_attention() && !self.attend() {
                return;
            }
            if self.turn() {
                self.nap = Duration::ZERO;
            } else {
                self.rest();
            }
        }
    }

    fn is_serving(&self) -> bool {
        self.state == State::Ready && self.bus_master
    }

    /// Goes over all queues once; returns whether there was anything to do.
    fn turn(&mut self) -> bool {
        if !self.is_serving() {
            return self.become_ready();
        }
        let mut busy = false;
        if self.queues.waits_for_room() {
            let posted = self.queues.post_waiting(&self.dma, &self.doorbells);
            busy |= self.check_queue(posted).unwrap_or(false);
        }
        busy |= self.serve_finished();
        busy |= self.serve_due();
        busy |= self.raise_due();
        let mut index = 0;
        // By index, since commands of the admin queue create and delete queues.
        while let Some(&id) = self.queues.active().get(index) {
            busy |= self.serve(id);
            index += 1;
        }
        self.signal();
        busy
    }

    /// Serves a batch of one submission queue; returns whether there was one.
    fn serve(&mut self, id: u16) -> bool {
        let count = self.fetch(id);
        if count == 0 {
            return false;
        }
        self.admin.begin_batch();
        self.background.is_alone = count == 1;
        let mut since = Instant::now();
        for index in 0..count {
            if !self.is_serving() {
                break;
            }
            self.dispatch(id, self.fetched[index]);
            if index + 1 < count && since.elapsed() > MAX_INTERRUPT_DELAY {
                self.signal();
                since = Instant::now();
            }
        }
        self.signal();
        true
    }

    /// Fetches a batch; returns how many commands it has.
    fn fetch(&mut self, id: u16) -> usize {
        if !self.may_fetch(id) || !self.is_serving() {
            return 0;
        }
        let completion_queue = match self.queues.submission(id) {
            Some(queue) => queue.completion_queue,
            None => return 0,
        };
        if self.queues.is_congested(completion_queue) {
            return 0;
        }
        let Some(queue) = self.queues.submission(id) else {
            return 0;
        };
        let tail = queue.look(id, &self.doorbells);
        if !queue.has_entries() {
            self.check_queue(tail);
            return 0;
        }
        let fetched = queue.fetch(&self.dma, &mut self.fetched);
        let head = self.queues.look_at_head(completion_queue, &self.doorbells);
        self.check_queue(tail);
        self.check_queue(head);
        self.check_queue(fetched).unwrap_or(0)
    }

    fn may_fetch(&self, id: u16) -> bool {
        match self.hold {
            Hold::Nothing => id == 0 || !self.background.is_congested(),
            Hold::Io => id == 0,
            Hold::Everything => false,
        }
    }

    fn dispatch(&mut self, id: u16, command: Sqe) {
        let counters = &self.shared.counters;
        if id == 0 {
            counters.admin_commands.add(1)
        } else {
            counters.commands.add(1)
        }
        let cid = command.cid();
        if self
            .queues
            .submission(id)
            .is_some_and(|queue| !queue.begin(cid))
        {
            let status = Status::COMMAND_ID_CONFLICT.with_dnr(true);
            self.note_failure(id, &command, status);
            return self.post(Completion {
                submission_queue: id,
                cid,
                status,
                result: 0,
                ends_command: false,
                tamper: Tamper::Nothing,
            });
        }
        if self.faults.is_some() && self.strike_command(id, &command) {
            return;
        }
        self.serve_after(Duration::ZERO, id, &command);
    }

    /// Does a command's work and completes it, or leaves that to another part of the controller.
    fn serve_command(&mut self, id: u16, command: &Sqe) {
        if id != 0 && self.background.is_busy() && self.puts_off(id, command) {
            return;
        }
        if self.faults.is_some() {
            self.prepare_tamper(id, command.cid());
        }
        let reply = if id == 0 {
            self.admin_command(command)
        } else {
            self.io_command(command)
        };
        self.follow(id, command, reply);
    }

    fn follow(&mut self, id: u16, command: &Sqe, reply: Reply) {
        match reply {
            Reply::Now(outcome) => self.complete(id, command, outcome),
            Reply::HandOver(work) => self.hand_over(id, command, work),
            Reply::PutOff => self.background.put_off(id, command),
            Reply::Later => {}
        }
    }

    /// Completes a fetched command.
    pub(crate) fn complete(&mut self, submission_queue: u16, command: &Sqe, outcome: Outcome) {
        let (status, result) = match outcome {
            Ok(result) => (Status::SUCCESS, result),
            Err(status) => (status.with_dnr(!is_transient(status)), 0),
        };
        let completion = Completion {
            submission_queue,
            cid: command.cid(),
            status,
            result,
            ends_command: true,
            tamper: Tamper::Nothing,
        };
        if self.faults.is_some() {
            return self.complete_struck(command, completion);
        }
        self.finish(command, completion);
    }

    fn finish(&mut self, command: &Sqe, completion: Completion) {
        if !completion.status.is_success() {
            self.note_failure(completion.submission_queue, command, completion.status);
        }
        self.post(completion);
    }

    fn note_failure(&mut self, submission_queue: u16, command: &Sqe, status: Status) {
        self.shared.counters.failed_commands.add(1);
        self.admin.note_failure(submission_queue, command, status);
    }

    fn post(&mut self, completion: Completion) {
        let posted = self.queues.complete(&self.dma, &self.doorbells, completion);
        self.check_queue(posted);
    }

    /// Completes the requests for asynchronous events that there are events for.
    pub(crate) fn deliver_events(&mut self) {
        while self.is_serving()
            && let Some((request, event)) = self.admin.events.next_delivery()
        {
            self.complete(0, &request, Ok(event));
        }
    }

    /// Turns trouble with a queue into what the host sees of it.
    fn check_queue<T>(&mut self, result: Result<T, QueueError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(QueueError::InvalidDoorbell) => {
                self.invalid_doorbell_value();
                None
            }
            Err(QueueError::HostMemory) => {
                self.fail("a queue is not reachable in host memory");
                None
            }
        }
    }

    /// Waits for work: awake for a moment, then asleep.
    fn rest(&mut self) {
        let began = Instant::now();
        // Between naps there is one look only.
        let spin = match self.nap.is_zero() {
            true => self.spin().time(),
            false => Duration::ZERO,
        };
        // One that cannot be counted to never comes.
        let spin_end = began.checked_add(spin);
        let mut holds_back;
        loop {
            if self.has_work() {
                return;
            }
            holds_back = self.interrupts.raise_unmasked();
            if spin_end.is_some_and(|end| Instant::now() >= end) {
                break;
            }
            std::hint::spin_loop();
        }
        let limit = match self.next_due() {
            None => None,
            Some(due) => {
                let left = due.saturating_duration_since(Instant::now());
                if left <= TIMER_MARGIN {
                    return;
                }
                Some(left - TIMER_MARGIN)
            }
        };
        let listen = if self.queues.waits_for_room() {
            Urgency::Low
        } else {
            Urgency::High
        };
        if self.is_serving() {
            let listening = self.queues.listen(&mut self.doorbells);
            if self.check_queue(listening).is_none() {
                return;
            }
        }
        let limit = self.next_nap(holds_back).into_iter().chain(limit).min();
        // The fence in `sleep` is the one that `HostDoorbells::listen` wants.
        if self
            .doorbells
            .registers
            .wake()
            .sleep(listen, limit, || !self.has_work())
        {
            self.shared.counters.sleeps.add(1);
            // To wait for a command's time is not to wait for the host, and of naps it is not known how long
            // the host has been waiting.
            let is_due = self
                .next_due()
                .is_some_and(|due| due <= Instant::now() + TIMER_MARGIN);
            match is_due {
                _ if !self.nap.is_zero() => {}
                true => self.spin().has_slept(Duration::MAX),
                false => self.spin().has_slept(began.elapsed()),
            }
        }
    }

    fn spin(&mut self) -> &mut Spin {
        match self.deferred.is_empty() {
            true => &mut self.spin,
            false => &mut self.spin_deferred,
        }
    }

    /// How long to sleep at most because the host may write to memory meanwhile: to doorbells, or to the
    /// masks of interrupts that are held back.
    fn next_nap(&mut self, holds_back: bool) -> Option<Duration> {
        let longest = match &self.config.polled_doorbells {
            Some(polled) if self.is_serving() => polled.idle_interval,
            _ if holds_back => LONGEST_HOLD,
            _ => return None,
        };
        self.nap = (2 * self.nap).max(FIRST_NAP).min(longest);
        Some(self.nap)
    }

    fn has_work(&self) -> bool {
        self.doorbells.registers.wants_attention()
            || (self.is_serving()
                && self
                    .queues
                    .has_work(&self.doorbells, |id| self.may_fetch(id)))
            || (self.is_serving() && self.background.has_finished())
            || self.next_due().is_some_and(|due| due <= Instant::now())
    }

    fn next_due(&self) -> Option<Instant> {
        if self.is_serving() {
            let interrupt = self.first_interrupt_due();
            self.first_due().into_iter().chain(interrupt).min()
        } else {
            self.ready_at
        }
    }
}

/// Whether the same command could succeed when it is tried again.
fn is_transient(status: Status) -> bool {
    [
        Status::INTERNAL_ERROR,
        Status::ABORT_REQUESTED,
        Status::ABORTED_SQ_DELETION,
        Status::ABORT_LIMIT_EXCEEDED,
        Status::ASYNC_EVENT_LIMIT_EXCEEDED,
        Status::CAPACITY_EXCEEDED,
        Status::UNRECOVERED_READ_ERROR,
        Status::WRITE_FAULT,
    ]
    .iter()
    .any(|transient| transient.is(status))
}
