//! Does what the recovery machine says, to real queue pairs and registers. It never waits.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::feature::InterruptCoalescing;
use nvme_spec::registers::ControllerConfiguration;
use nvme_spec::{Cqe, DataPointer, Sqe, admin, feature};
use tokio::sync::watch;

use super::ControllerState;
use super::action::{Action, AdminStep, End, Place, Scope, Settings, StepId};
use super::machine::Recovery;
use crate::controller::registers::{AdminRings, Registers};
use crate::controller::tenure::Tenure;
use crate::engine::state::{Aftermath, Failure, Look};
use crate::engine::trouble::{Inbox, Trouble};
use crate::engine::{SharedQueue, State};
use crate::memory::DmaBuf;
use crate::queue::DoorbellBuffers;

/// Between two looks at the admin queue while its commands are waited for; grows from the first to
/// the last.
const FIRST_PAUSE: Duration = Duration::from_micros(50);
const LAST_PAUSE: Duration = Duration::from_millis(2);

/// An I/O queue pair as the controller is told of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueLayout {
    pub(crate) id: u16,
    pub(crate) entries: u16,
    /// I/O virtual addresses of the rings.
    pub(crate) submission: u64,
    pub(crate) completion: u64,
    /// The interrupt vector, if interrupts are on.
    pub(crate) vector: Option<u16>,
}

impl QueueLayout {
    pub(crate) fn create_completion_queue(&self) -> Sqe {
        let Self { id, entries, .. } = *self;
        admin::create_completion_queue(id, entries.into(), self.completion, self.vector)
    }

    pub(crate) fn create_submission_queue(&self) -> Sqe {
        let Self { id, entries, .. } = *self;
        admin::create_submission_queue(id, entries.into(), self.submission, id, Default::default())
    }
}

/// What a controller consists of, and what it was told when it was brought up.
pub(crate) struct Plant {
    pub(crate) tenure: Arc<Tenure>,
    pub(crate) configuration: ControllerConfiguration,
    pub(crate) admin_rings: AdminRings,
    pub(crate) admin: Arc<SharedQueue>,
    pub(crate) queues: Vec<(QueueLayout, Arc<SharedQueue>)>,
    /// Where its identify data goes, and what must be in the first bytes: vendor and serial number.
    pub(crate) identify: DmaBuf,
    pub(crate) identity: Box<[u8]>,
    /// The data of Host Behavior Support, if that is to be set.
    pub(crate) host_behavior: Option<DmaBuf>,
    /// Interrupt Coalescing, if that is to be set.
    pub(crate) coalescing: Option<InterruptCoalescing>,
    /// Where doorbells are left, if not in registers alone.
    pub(crate) doorbell_buffers: Option<Arc<DoorbellBuffers>>,
    /// Asynchronous Event Configuration, and the requests that are kept outstanding.
    pub(crate) events: u32,
    pub(crate) event_requests: u8,
}

/// Recovery of one controller.
pub(crate) struct Supervisor {
    recovery: Recovery,
    plant: Plant,
    inbox: Arc<Inbox>,
    state: Arc<watch::Sender<ControllerState>>,
    /// The Identify command that was not answered yet.
    identifying: Option<StepId>,
    pause: Duration,
    retiring: bool,
    /// Where the recovery was, in order.
    #[cfg(test)]
    pub(super) trail: Vec<Place>,
}

/// When a supervisor has to look again without having been told of anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Never,
    At(Instant),
    /// Its work is done.
    Over,
}

impl Supervisor {
    pub(crate) fn new(
        plant: Plant,
        settings: Settings,
        inbox: Arc<Inbox>,
        state: Arc<watch::Sender<ControllerState>>,
    ) -> Self {
        for queue in plant.all_queues() {
            queue.with(|state| state.supervise(inbox.clone()));
        }
        Self {
            recovery: Recovery::new(settings),
            plant,
            inbox,
            state,
            identifying: None,
            pause: FIRST_PAUSE,
            retiring: false,
            #[cfg(test)]
            trail: vec![Place::Live],
        }
    }

    #[cfg(test)]
    pub(super) fn place(&self) -> Place {
        self.recovery.place()
    }

    #[cfg(test)]
    fn note_place(&mut self) {
        let place = self.recovery.place();
        if self.trail.last() != Some(&place) {
            self.trail.push(place);
        }
    }

    /// Deals with what was reported and with what is due, by `clock`.
    pub(crate) fn step(&mut self, clock: &dyn Fn() -> Instant) -> Next {
        if self.recovery.place() != Place::Live {
            // Nobody else may be there to take the completions.
            let now = clock();
            attend(&self.plant.admin, |state, aftermath| {
                state.reap(Look::Polled, now, aftermath);
                state.ring_deferred();
            });
        }
        for trouble in self.inbox.take() {
            self.pause = FIRST_PAUSE;
            self.dispatch(clock(), trouble);
            self.perform_all(clock);
        }
        let plant = &self.plant;
        self.recovery.settle(clock(), |queue, cid| {
            let queue = plant.queue(queue);
            queue.and_then(|queue| queue.with(|state| state.is_overdue(cid))) == Some(true)
        });
        self.recovery.tick(clock());
        self.perform_all(clock);
        match self.recovery.place() {
            Place::Ended => self.leave(),
            Place::Live | Place::Aborting if self.retiring => self.leave(),
            Place::Live => Next::Never,
            _ => {
                let look = clock() + self.pause;
                self.pause = (self.pause * 2).min(LAST_PAUSE);
                Next::At(
                    self.recovery
                        .next_tick()
                        .map_or(look, |tick| tick.min(look)),
                )
            }
        }
    }

    fn dispatch(&mut self, now: Instant, trouble: Trouble) {
        tracing::debug!(address = self.plant.tenure.address(), ?trouble, "reported");
        match trouble {
            Trouble::Overdue { queue, cid } => self.recovery.overdue(queue, cid),
            Trouble::Lie { queue, lie } => self.recovery.lie(now, queue, lie),
            Trouble::Stalled => self.recovery.stalled(),
            Trouble::Notice(notice) => self.recovery.notice(now, notice),
            Trouble::Step { id, cqe } => {
                let cqe = self.check_identity(id, cqe);
                self.recovery.step_done(now, id, cqe);
            }
            Trouble::Retire => self.retiring = true,
        }
    }

    fn perform_all(&mut self, clock: &dyn Fn() -> Instant) {
        loop {
            #[cfg(test)]
            self.note_place();
            let Some(action) = self.recovery.next_action() else {
                return;
            };
            tracing::trace!(address = self.plant.tenure.address(), ?action, "recovery");
            self.perform(action, clock);
        }
    }

    fn perform(&mut self, action: Action, clock: &dyn Fn() -> Instant) {
        let now = clock();
        match action {
            Action::ReadStatus => {
                let csts = self
                    .registers()
                    .and_then(|registers| registers.live_status());
                self.recovery.status(clock(), csts);
            }
            Action::Admin { id, step } => {
                if step == AdminStep::Identify {
                    self.identifying = Some(id);
                    // What a device leaves there that writes nothing must not pass for its answer.
                    self.plant.identify.fill(0);
                }
                let submitted = self.command(step).is_some_and(|sqe| {
                    let submit = |state: &mut State| state.submit_step(id, sqe);
                    self.plant.admin.with(submit) == Some(true)
                });
                if !submitted {
                    self.recovery.step_done(now, id, None);
                }
            }
            Action::Fence(scope) => {
                for queue in self.plant.scope(scope) {
                    queue.with(|state| state.fence());
                }
            }
            Action::Release(scope, cause) => {
                for queue in self.plant.scope(scope) {
                    attend(queue, |state, aftermath| {
                        state.release(cause, now, aftermath)
                    });
                }
            }
            Action::Resume(scope) => {
                for queue in self.plant.scope(scope) {
                    attend(queue, |state, aftermath| state.resume(now, aftermath));
                }
            }
            // Whether these had an effect is seen in CSTS.
            Action::Disable => self.control(|registers| registers.clear_enable()),
            Action::Enable => self.control(|registers| {
                registers.set_up_admin(&self.plant.admin_rings)?;
                registers.enable(self.plant.configuration)
            }),
            Action::ResetFunction => {
                let done = self
                    .registers()
                    .is_some_and(|registers| registers.reset_function());
                self.recovery.function_reset(clock(), done);
            }
            Action::Rearm => {
                let requests = self.plant.event_requests;
                self.plant.admin.with(|state| {
                    for _ in 0..requests {
                        state.request_event();
                    }
                    state.note_reset();
                });
            }
            Action::Announce(state) => self.announce(state),
            Action::End(end) => {
                let stopped = self.cut_off();
                self.end(end, stopped);
            }
        }
    }

    /// The command of a step of recovery, if the controller is one that has it.
    fn command(&self, step: AdminStep) -> Option<Sqe> {
        let layout = |id: u16| {
            let index = usize::from(id).checked_sub(1)?;
            Some(&self.plant.queues.get(index)?.0)
        };
        let data = |buffer: &DmaBuf| {
            let prp1 = buffer.iova()?;
            Some(DataPointer::Prp { prp1, prp2: 0 })
        };
        let set = |id, value| admin::set_features(id, value, false);
        Some(match step {
            AdminStep::Abort { queue, cid } => admin::abort(queue, cid),
            AdminStep::DeleteSubmissionQueue(id) => admin::delete_submission_queue(id),
            AdminStep::DeleteCompletionQueue(id) => admin::delete_completion_queue(id),
            AdminStep::Identify => {
                admin::identify_controller().with_data(data(&self.plant.identify)?)
            }
            AdminStep::HostBehavior => set(feature::id::HOST_BEHAVIOR_SUPPORT, 0)
                .with_data(data(self.plant.host_behavior.as_ref()?)?),
            AdminStep::Coalescing => {
                let value = self.plant.coalescing?.into_bits();
                set(feature::id::INTERRUPT_COALESCING, value)
            }
            AdminStep::DoorbellBuffers => {
                let (values, event_index) = self.plant.doorbell_buffers.as_ref()?.iovas();
                admin::doorbell_buffer_config(values, event_index)
            }
            AdminStep::QueueCount => {
                let pairs = self.plant.queues.len() as u16;
                let value = feature::NumberOfQueues::pairs(pairs).into_bits();
                set(feature::id::NUMBER_OF_QUEUES, value)
            }
            AdminStep::CreateCompletionQueue(id) => layout(id)?.create_completion_queue(),
            AdminStep::CreateSubmissionQueue(id) => layout(id)?.create_submission_queue(),
            AdminStep::Events => set(feature::id::ASYNC_EVENT_CONFIGURATION, self.plant.events),
        })
    }

    /// The answer to an Identify command only if it is the controller that was there before.
    fn check_identity(&mut self, id: StepId, cqe: Cqe) -> Option<Cqe> {
        if self.identifying != Some(id) {
            return Some(cqe);
        }
        self.identifying = None;
        let expected = &*self.plant.identity;
        let same = self.plant.identify.get(..expected.len()) == Some(expected);
        if !same && cqe.status().is_success() {
            let address = self.plant.tenure.address();
            tracing::error!(address, "another controller answers than before the reset");
        }
        same.then_some(cqe)
    }

    fn announce(&self, state: ControllerState) {
        let address = self.plant.tenure.address();
        match state {
            ControllerState::Recovering { cause } => {
                tracing::warn!(address, %cause, "recovery begins");
            }
            ControllerState::Live => tracing::info!(address, "the controller works again"),
            _ => tracing::error!(address, ?state, "the controller is not used any more"),
        }
        self.state.send_replace(state);
    }

    /// Ends after a panic, of the device's code or of this: nobody knows what is still to be done, but
    /// nobody may wait for it for ever.
    pub(super) fn break_down(&mut self) {
        let address = self.plant.tenure.address();
        tracing::error!(address, "recovery has panicked");
        // It may panic again.
        let status = || self.registers()?.live_status();
        let csts = catch_unwind(AssertUnwindSafe(status)).ok().flatten();
        let stopped = catch_unwind(AssertUnwindSafe(|| self.cut_off())).unwrap_or(false);
        let csts = csts.unwrap_or(u32::MAX);
        self.end(End::Failed { csts }, stopped);
    }

    /// Keeps the device from memory; returns whether that is certain.
    fn cut_off(&self) -> bool {
        self.registers().is_none_or(|registers| {
            let cut_off = registers.device.set_bus_master(false);
            cut_off.is_ok() || registers.is_disabled()
        })
    }

    /// Fails everything and gives the device up.
    fn end(&self, end: End, stopped: bool) {
        if !stopped {
            let address = self.plant.tenure.address();
            tracing::warn!(
                address,
                "what was in flight keeps its memory: the device may use it"
            );
        }
        let (failure, state) = match end {
            End::Removed => (Failure::Removed, ControllerState::Removed),
            End::Failed { csts } => (
                Failure::ControllerFailed { csts },
                ControllerState::Failed { csts },
            ),
        };
        for queue in self.plant.all_queues() {
            queue.with(|state| state.fence());
        }
        // Before anybody sees the error, and before the device is closed, which may take long.
        self.announce(state);
        for queue in self.plant.all_queues() {
            attend(queue, |state, aftermath| {
                state.fail(failure, stopped, aftermath)
            });
        }
        self.plant.tenure.give_up(stopped);
    }

    fn leave(&self) -> Next {
        for queue in self.plant.all_queues() {
            attend(queue, |state, aftermath| state.forsake(aftermath));
        }
        Next::Over
    }

    fn registers(&self) -> Option<Registers> {
        self.plant.tenure.registers()
    }

    fn control(&self, f: impl FnOnce(&Registers) -> Result<(), crate::Error>) {
        if let Some(registers) = self.registers()
            && let Err(error) = f(&registers)
        {
            tracing::debug!(%error, "in recovery");
        }
    }
}

/// Runs `f` on a queue pair's state, and then what follows from it. That is the code of others, and
/// recovery goes on if it panics.
fn attend(queue: &SharedQueue, f: impl FnOnce(&mut State, &mut Aftermath)) {
    let mut aftermath = Aftermath::default();
    queue.with(|state| f(state, &mut aftermath));
    if catch_unwind(AssertUnwindSafe(|| aftermath.run())).is_err() {
        tracing::error!("a waker, or the owner of memory, has panicked");
    }
}

impl Plant {
    fn all_queues(&self) -> impl Iterator<Item = &Arc<SharedQueue>> {
        let io = self.queues.iter().map(|(_, queue)| queue);
        [&self.admin].into_iter().chain(io)
    }

    fn queue(&self, id: u16) -> Option<&Arc<SharedQueue>> {
        self.all_queues().nth(id.into())
    }

    fn scope(&self, scope: Scope) -> impl Iterator<Item = &Arc<SharedQueue>> {
        let (skip, take) = match scope {
            Scope::Queue(id) => (id.into(), 1),
            Scope::Io => (1, usize::MAX),
            Scope::All => (0, usize::MAX),
        };
        self.all_queues().skip(skip).take(take)
    }
}
