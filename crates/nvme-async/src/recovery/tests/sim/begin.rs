//! What a seed decides: the controller, its queues and users, and what goes wrong.

use std::collections::BinaryHeap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use fastrand::Rng;
use nvme_spec::registers::{
    ControllerConfiguration, DoorbellKind, doorbell_buffer_offset, doorbell_offset,
};
use poll_window::Costs;
use tokio::sync::watch;

use super::{Phase, Simulation, Task, micros};
use crate::controller::registers::{AdminRings, Registers};
use crate::controller::registry::Release;
use crate::controller::tenure::Tenure;
use crate::device::Doorbell;
use crate::engine::trouble::Inbox;
use crate::engine::{PollMode, QueueSettings, SharedQueue, State};
use crate::memory::{DEVICE_PAGE, DmaBuf, DmaWords};
use crate::queue::{CompletionRing, DoorbellBuffers, QueueCore, QueueDoorbell, SubmissionRing};
use crate::recovery::supervisor::Supervisor;
use crate::recovery::tests::disk::History;
use crate::recovery::tests::faults::Plan;
use crate::recovery::tests::host::Reaper;
use crate::recovery::tests::memory::{Clock, Ledger, Memory, Owner};
use crate::recovery::tests::model::{
    COALESCING, Controller, IDENTITY, Model, Sabotage, Times, Traits,
};
use crate::recovery::tests::runs::replayed;
use crate::recovery::{ControllerState, Plant, QueueLayout, Settings};

/// Operations of one history, at least.
const OPERATIONS: usize = 200;

/// An interrupt vector that nobody waits for: the simulation passes interrupts on itself.
static VECTOR: LazyLock<Arc<OwnedFd>> = LazyLock::new(|| {
    let null = File::open("/dev/null").expect("every system has it");
    Arc::new(null.into())
});

/// A queue pair, and where its rings are.
fn queue(
    controller: &Arc<Controller>,
    memory: &Memory,
    ledger: &Ledger,
    id: u16,
    entries: u16,
    settings: QueueSettings,
    buffers: Option<&Arc<DoorbellBuffers>>,
) -> (Arc<SharedQueue>, QueueLayout) {
    let submission = DmaWords::new(&memory.pool, usize::from(entries) * 16).unwrap();
    let completion = DmaWords::new(&memory.pool, usize::from(entries) * 4).unwrap();
    let layout = QueueLayout {
        id,
        entries,
        submission: submission.iova(),
        completion: completion.iova(),
        vector: Some(id),
    };
    ledger.set(layout.submission, Owner::Rings);
    ledger.set(layout.completion, Owner::Rings);
    let doorbell = |kind| {
        let register = Doorbell::Call {
            target: controller.clone(),
            offset: doorbell_offset(id, kind, 0),
        };
        match buffers.filter(|_| id > 0) {
            None => QueueDoorbell::new(register),
            Some(buffers) => {
                let offset = doorbell_buffer_offset(id, kind, 0);
                QueueDoorbell::with_shadow(register, buffers.clone(), offset)
            }
        }
    };
    let core = QueueCore::new(
        id,
        entries,
        SubmissionRing::new(submission, doorbell(DoorbellKind::SubmissionTail), entries),
        CompletionRing::new(completion, doorbell(DoorbellKind::CompletionHead), entries),
    );
    let state = State::new(core, settings);
    (SharedQueue::new(state, VECTOR.clone()), layout)
}

fn doorbell_buffers(memory: &Memory, ledger: &Ledger) -> Arc<DoorbellBuffers> {
    let buffers = DoorbellBuffers::new(&memory.pool).unwrap();
    let (values, event_indices) = buffers.iovas();
    ledger.set(values, Owner::Rings);
    ledger.set(event_indices, Owner::Rings);
    buffers
}

/// A page for the data of a recovery's commands.
fn page(memory: &Memory, ledger: &Ledger) -> DmaBuf {
    let mut page = memory.pool.alloc(DEVICE_PAGE).unwrap();
    page.fill(0);
    ledger.set(page.iova().unwrap(), Owner::Recovery);
    page
}

impl Simulation {
    pub(super) fn begin(seed: u64, memory: &Memory, sabotage: Option<Sabotage>) -> Self {
        let mut rng = Rng::with_seed(seed);
        let timeout = rng.u64(60_000..150_000);
        let times = Times {
            timeout,
            grace: rng.u64(timeout / 4..timeout / 2),
            ready: rng.u64(50_000..150_000),
        };
        let abort_micros = rng.u64(timeout / 2..timeout);
        let traits = Traits {
            queues: rng.u16(2..=3),
            abort_limit: rng.usize(1..=4),
            event_limit: rng.usize(1..=4),
            times,
        };
        let fails_fast = rng.u8(0..5) == 0;
        let host_behavior = rng.bool();
        let coalescing = rng.bool().then_some(COALESCING);
        let remaining = OPERATIONS + rng.usize(0..50);
        let length = rng.u64(300_000..2_000_000);
        let clock = Arc::new(Clock::new(replayed().is_some()));
        let ledger = Arc::new(Ledger::new(memory.clone()));
        let plan = Plan::new(&mut rng, length);
        let controller = Controller::new(Model::new(
            clock.clone(),
            memory.clone(),
            ledger.clone(),
            rng.fork(),
            plan,
            traits,
            sabotage,
        ));

        let settings = QueueSettings {
            mode: PollMode::Interrupt,
            costs: Costs::default(),
            max_window: Duration::ZERO,
            coalescing_time: Duration::ZERO,
            retries: rng.u32(0..4),
            fails_fast,
            retry_delays: [1000, timeout / 3, timeout * 2].map(micros),
        };
        let buffers = rng.bool().then(|| doorbell_buffers(memory, &ledger));
        let make = |id, entries| {
            let buffers = buffers.as_ref();
            queue(&controller, memory, &ledger, id, entries, settings, buffers)
        };
        let (admin, admin_layout) = make(0, rng.u16(16..=32));
        let queues: Vec<_> = (1..=traits.queues)
            .map(|id| {
                let entries = *rng.choice(&[2, 3, 4, 5, 8, 16]).expect("not empty");
                let (queue, layout) = make(id, entries);
                (layout, queue)
            })
            .collect();
        let layouts: Vec<_> = [admin_layout]
            .into_iter()
            .chain(queues.iter().map(|(layout, _)| *layout))
            .collect();
        let iovas = buffers.as_ref().map(|buffers| buffers.iovas());
        controller.lock().begin(&layouts, iovas);

        let device = controller.clone();
        let release = Release::default();
        let mut host_behavior_data = page(memory, &ledger);
        host_behavior_data[0] = 1;
        let plant = Plant {
            tenure: Tenure::new(Registers { device }, release),
            configuration: ControllerConfiguration::new().with_iosqes(6).with_iocqes(4),
            admin_rings: AdminRings {
                entries: admin_layout.entries,
                submission: admin_layout.submission,
                completion: admin_layout.completion,
            },
            admin: admin.clone(),
            queues: queues.clone(),
            identify: page(memory, &ledger),
            identity: IDENTITY
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect(),
            host_behavior: host_behavior.then_some(host_behavior_data),
            coalescing,
            doorbell_buffers: buffers.clone(),
            events: 0x1f,
            event_requests: traits.event_limit as u8,
        };
        let machine = Settings {
            queues: traits.queues,
            abort_limit: traits.abort_limit,
            abort_timeout: micros(abort_micros),
            grace: micros(times.grace),
            step_timeout: micros(timeout),
            ready_timeout: micros(times.ready),
            max_resets: *rng.choice(&[0, 1, 2, 8, 8, 8]).expect("not empty"),
            reset_window: Duration::from_millis(rng.u64(500..10_000)),
            host_behavior,
            coalescing: coalescing.is_some(),
            doorbell_buffers: buffers.is_some(),
        };
        let inbox = Arc::new(Inbox::new().expect("a file descriptor"));
        let state = Arc::new(watch::Sender::new(ControllerState::Live));
        let supervisor = Supervisor::new(plant, machine, inbox.clone(), state.clone());

        let queues: Vec<_> = [admin]
            .into_iter()
            .chain(queues.into_iter().map(|(_, queue)| queue))
            .collect();
        for _ in 0..traits.event_limit {
            queues[0].with(|state| state.request_event());
        }
        let reapers = queues.iter().map(|_| Reaper::default()).collect();
        let admin_share = if rng.u8(0..6) == 0 { 8 } else { 1 };
        let task_lag = if rng.u8(0..4) == 0 { 1000 } else { 20 };
        let thread_lag = if rng.u8(0..4) == 0 { 3000 } else { 100 };
        let mut simulation = Self {
            rng,
            clock,
            memory: memory.clone(),
            ledger,
            controller,
            sabotage,
            queues,
            reapers,
            supervisor,
            over: false,
            supervise_at: None,
            thread_lag,
            task_lag,
            inbox,
            state,
            tasks: BinaryHeap::new(),
            last_task: 0,
            woken: Arc::default(),
            operations: Vec::new(),
            drains: Vec::new(),
            history: History::default(),
            remaining,
            phase: Phase::Busy,
            probes: Vec::new(),
            absent: false,
            absence: 0,
            missed: Vec::new(),
            abort_micros,
            fails_fast,
            admin_share,
            pace: length / (remaining as u64 / 4),
        };
        simulation.schedule(0, Task::Submit);
        simulation
    }
}
