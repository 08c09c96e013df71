//! A queue pair that any thread can use.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nvme_spec::event::AsyncEvent;
use tokio::runtime::Handle;

use super::access::Access;
use super::reaper::{Reaper, check_spawned, vacate};
use super::state::{Aftermath, Core, Failure, Outcome, Outcomes, QueueCounters, State};

/// A queue pair behind a lock, which is held for the time of one submission or one batch of
/// completions and never while anything else runs.
pub struct SharedQueue {
    /// Empty while a [`LocalQueue`](super::LocalQueue) has the queue pair, and after the end.
    state: Mutex<Option<State>>,
    /// What futures have not taken before the end.
    outcomes: Mutex<Outcomes>,
    vector: Arc<OwnedFd>,
    on_event: OnceLock<Box<dyn Fn(AsyncEvent) + Send + Sync>>,
}

impl SharedQueue {
    pub(crate) fn new(state: State, vector: Arc<OwnedFd>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(Some(state)),
            outcomes: Mutex::default(),
            vector,
            on_event: OnceLock::new(),
        })
    }

    /// Takes the state away; futures that are still polled fail, and the reaper ends.
    pub(crate) fn take(&self) -> Option<State> {
        self.take_if(|_| true)
    }

    /// Takes the state away for a [`LocalQueue`](super::LocalQueue), unless another one has it or
    /// the queue pair is about to end.
    pub(crate) fn lend(&self) -> Option<State> {
        self.take_if(|state| !state.is_refusing())
    }

    fn take_if(&self, condition: impl FnOnce(&State) -> bool) -> Option<State> {
        let mut aftermath = Aftermath::default();
        let state = self
            .lock()
            .take_if(|state| condition(state))
            .map(|mut state| {
                state.dismiss_reapers(&mut aftermath);
                state
            });
        aftermath.run();
        state
    }

    /// Ends the queue pair and returns what the device may still use. Futures get the outcomes that
    /// there are, and the others fail.
    pub(crate) fn end(&self) -> Option<Core> {
        let mut aftermath = Aftermath::default();
        let core = {
            let mut home = self.lock();
            home.take().map(|state| {
                let (outcomes, core) = state.end(&mut aftermath);
                *lock(&self.outcomes) = outcomes;
                core
            })
        };
        aftermath.run();
        core
    }

    /// Puts a state back that was taken, and sees to it that outstanding commands are reaped.
    pub(crate) fn put_back(self: &Arc<Self>, state: State) {
        let unfinished = state.is_watched();
        *self.lock() = Some(state);
        // Without a runtime here, the next one to use the queue takes care of them.
        if unfinished && self.spawn_reaper().is_err() {
            tracing::debug!("commands are outstanding on a queue that nobody drives");
        }
    }

    /// Sets who is told of asynchronous events.
    pub(crate) fn set_on_event(&self, on_event: Box<dyn Fn(AsyncEvent) + Send + Sync>) {
        // Set once, at bring-up.
        let _ = self.on_event.set(on_event);
    }

    pub(crate) fn vector(&self) -> &Arc<OwnedFd> {
        &self.vector
    }

    pub(crate) fn counters(&self) -> QueueCounters {
        self.lock()
            .as_ref()
            .map(|state| state.counters)
            .unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Option<State>> {
        lock(&self.state)
    }
}

impl Access for Arc<SharedQueue> {
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> Option<R> {
        self.lock().as_mut().map(f)
    }

    fn spawn_reaper(&self) -> Result<(), Failure> {
        let runtime = Handle::try_current().map_err(|_| Failure::RuntimeGone)?;
        let Some(term) = self.with(State::claim_reaper).flatten() else {
            return Ok(());
        };
        match Reaper::new(self.clone(), term, &self.vector) {
            Ok(reaper) => {
                runtime.spawn(reaper);
                check_spawned(self, term)
            }
            Err(failure) => {
                vacate(self, term);
                Err(failure)
            }
        }
    }

    fn late_outcome(&self, key: usize) -> Option<Outcome> {
        lock(&self.outcomes).take(key)
    }

    fn report(&self, event: AsyncEvent) {
        if let Some(on_event) = self.on_event.get() {
            on_event(event);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under the lock in a state that must not be seen.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
