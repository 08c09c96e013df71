//! Polling where a runtime would otherwise go to sleep.
//!
//! A runtime of [`runtime::Builder`](crate::runtime::Builder) calls its [`Hook`] when none of its tasks
//! can run. The hook rings the doorbells that were left, takes completions, and polls for as long as
//! that pays and nothing else can run. Then the runtime sleeps, and reapers that sleep too are woken by
//! interrupts.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use tokio::runtime::{self, Handle, RuntimeMetrics};

use super::access::Access;
use super::state::{Aftermath, Look, Place, Term};
use super::sync::lock_std;
use super::window::Wait;

/// Looks at the completion queues between two looks at the clock.
const BURST: u32 = 32;
/// After so long the runtime looks for timers and sockets, which it can't while the hook polls.
const SLICE: Duration = Duration::from_micros(20);

/// All hooks that there are. A runtime's reapers find theirs by its identifier.
static HOOKS: Mutex<Vec<(runtime::Id, Weak<Hook>)>> = Mutex::new(Vec::new());

thread_local! {
    /// The runtime whose hook was called last on this thread, and how often it was.
    static DRIVEN: Cell<Option<(runtime::Id, u64)>> = const { Cell::new(None) };
    /// Queues that are this thread's own, with their runtime.
    static LOCAL: RefCell<Vec<(runtime::Id, Box<dyn Parked>)>> = const { RefCell::new(Vec::new()) };
}

/// What one runtime calls when it has nothing to do.
#[derive(Default)]
pub(crate) struct Hook {
    /// Queues that all threads share.
    shared: Mutex<Vec<Box<dyn Parked + Send>>>,
    calls: AtomicU64,
}

/// What became of a look at a queue.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Idle {
    /// Its reaper is gone: the queue is not to be looked at any more.
    Gone,
    /// Nobody need look until an interrupt, or its reaper's timer.
    Rests,
    /// A completion is expected soon.
    Polls,
    /// Tasks were woken.
    Woken,
}

/// A queue whose reaper leaves the polling to the hook.
pub(crate) trait Parked {
    /// Does what there is to do. `spun` is the time that was spent polling since the last call.
    fn attend(&self, now: Instant, spun: &mut Duration) -> Idle;

    /// Whether a completion is there.
    fn is_ready(&self) -> bool;

    /// Makes the runtime go round once without sleeping.
    fn nudge(&self);
}

impl Hook {
    /// Makes it known to the reapers of a runtime.
    pub(crate) fn serve(self: &Arc<Self>, runtime: runtime::Id) {
        let mut hooks = lock_std(&HOOKS);
        hooks.retain(|(_, hook)| hook.strong_count() > 0);
        hooks.push((runtime, Arc::downgrade(self)));
    }

    /// The hook of the current runtime, if it has one.
    pub(crate) fn current() -> Option<Arc<Self>> {
        let here = Handle::try_current().ok()?.id();
        let hooks = lock_std(&HOOKS);
        let (_, hook) = hooks.iter().find(|(runtime, _)| *runtime == here)?;
        hook.upgrade()
    }

    /// How often it was called.
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, queue: Box<dyn Parked + Send>) {
        lock_std(&self.shared).push(queue);
    }

    /// Adds a queue of this thread's own.
    pub(crate) fn add_local(queue: Box<dyn Parked>) {
        if let Ok(here) = Handle::try_current() {
            LOCAL.with_borrow_mut(|local| local.push((here.id(), queue)));
        }
    }

    /// Called when no task of the current runtime can run. Where tasks can when it returns, the runtime
    /// does not sleep.
    pub(crate) fn park(&self) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let calls = self.calls.load(Ordering::Relaxed) + 1;
        // One thread at a time drives the runtime.
        self.calls.store(calls, Ordering::Relaxed);
        DRIVEN.set(Some((runtime.id(), calls)));
        let mut queues = Queues::take(self, runtime.id());
        if queues.is_empty() {
            return;
        }
        // What wakers do that are no task's is not known; a panic here would end the runtime.
        let polled = catch_unwind(AssertUnwindSafe(|| queues.poll(&runtime.metrics())));
        if polled.is_err() {
            tracing::error!("a waker panicked while completions were taken in the park hook");
        }
    }
}

/// How often the hook of the runtime `here` was called, if it has one, and this thread drives it.
pub(crate) fn calls(here: Option<runtime::Id>) -> Option<u64> {
    let (runtime, calls) = DRIVEN.get()?;
    (here == Some(runtime)).then_some(calls)
}

/// The queues of a hook, taken out while it works: wakers that it runs may add others.
struct Queues<'a> {
    hook: &'a Hook,
    shared: Vec<Box<dyn Parked + Send>>,
    runtime: runtime::Id,
    local: Vec<(runtime::Id, Box<dyn Parked>)>,
}

impl<'a> Queues<'a> {
    fn take(hook: &'a Hook, runtime: runtime::Id) -> Self {
        Self {
            shared: std::mem::take(&mut lock_std(&hook.shared)),
            local: LOCAL.take(),
            hook,
            runtime,
        }
    }

    fn is_empty(&self) -> bool {
        self.shared.is_empty() && self.local.is_empty()
    }

    fn iter(&self) -> impl Iterator<Item = &dyn Parked> {
        let shared = self.shared.iter().map(|queue| &**queue as &dyn Parked);
        let local = self.local.iter();
        let local = local.filter(|(runtime, _)| *runtime == self.runtime);
        shared.chain(local.map(|(_, queue)| &**queue))
    }

    fn poll(&mut self, metrics: &RuntimeMetrics) {
        let begun = Instant::now();
        let mut now = begun;
        let mut spun = Duration::ZERO;
        loop {
            match self.attend(now, &mut spun) {
                Idle::Gone | Idle::Rests | Idle::Woken => return,
                Idle::Polls => {}
            }
            if now - begun >= SLICE {
                return self.nudge();
            }
            for _ in 0..BURST {
                // Another thread has made a task runnable; the runtime would not see it.
                if metrics.global_queue_depth() > 0 {
                    return;
                }
                if self.iter().any(Parked::is_ready) {
                    break;
                }
                std::hint::spin_loop();
            }
            let last = std::mem::replace(&mut now, Instant::now());
            spun = now - last;
        }
    }

    /// Looks at each queue; what is most urgent counts.
    fn attend(&mut self, now: Instant, spun: &mut Duration) -> Idle {
        let mut most = Idle::Gone;
        let mut attend = |queue: &dyn Parked| {
            let idle = queue.attend(now, spun);
            most = most.max(idle);
            idle != Idle::Gone
        };
        self.shared.retain(|queue| attend(&**queue));
        let here = self.runtime;
        self.local
            .retain(|(runtime, queue)| *runtime != here || attend(&**queue));
        most
    }

    fn nudge(&self) {
        if let Some(queue) = self.iter().next() {
            queue.nudge();
        }
    }
}

impl Drop for Queues<'_> {
    fn drop(&mut self) {
        let mut shared = lock_std(&self.hook.shared);
        shared.splice(0..0, self.shared.drain(..));
        drop(shared);
        LOCAL.with_borrow_mut(|local| {
            local.splice(0..0, self.local.drain(..));
        });
    }
}

/// A queue, for the hook of the runtime of one of its reapers.
pub(crate) struct ParkedQueue<Q: Access> {
    pub(crate) queue: Q,
    pub(crate) term: Term,
}

impl<Q: Access> Parked for ParkedQueue<Q> {
    fn attend(&self, now: Instant, spun: &mut Duration) -> Idle {
        let mut aftermath = Aftermath::default();
        let idle = self.queue.with(|state| {
            state.window.counters.spun += std::mem::take(spun);
            state.ring_deferred();
            let taken = match state.completion_ready() {
                true => state.reap(Look::Polled, now, &mut aftermath),
                false => 0,
            };
            // For commands that waited for a slot.
            state.ring_deferred();
            let wait = state.wait(now);
            if taken == 0 && state.completion_ready() {
                return Some(Idle::Polls);
            }
            let seat = state.seat(self.term)?;
            Some(match (wait, &seat.place) {
                _ if taken > 0 => Idle::Woken,
                // The reaper will run.
                (_, Place::Awake) => Idle::Woken,
                (Wait::Poll, _) => Idle::Polls,
                (Wait::Pause { until }, Place::Asleep { pause, .. }) => {
                    if pause.is_none_or(|pause| until < pause) {
                        // It has the timer.
                        seat.wake(&mut aftermath);
                        Idle::Woken
                    } else {
                        Idle::Rests
                    }
                }
                (Wait::Sleep, _) => Idle::Rests,
            })
        });
        aftermath.run();
        idle.flatten().unwrap_or(Idle::Gone)
    }

    fn is_ready(&self) -> bool {
        self.queue.with(|state| state.completion_ready()) == Some(true)
    }

    fn nudge(&self) {
        let mut aftermath = Aftermath::default();
        self.queue.with(|state| {
            if let Some(seat) = state.seat(self.term) {
                seat.wake(&mut aftermath);
            }
        });
        aftermath.run();
    }
}
