//! A queue pair that any thread can use.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};

use tokio::runtime::Handle;

use super::Notification;
use super::access::Access;
use super::biased::{Biased, Owner};
use super::park::{Hook, ParkedQueue};
use super::reaper::{Reaper, check_spawned, vacate};
use super::state::{
    Aftermath, Failure, Here, Outcome, Outcomes, QueueCounters, Remains, State, Term,
};
use super::window::WindowCounters;
use crate::io::HoldingsMut;

/// A queue pair behind a lock, which is held for the time of one submission or one batch of
/// completions and never while anything else runs. A [`LocalQueue`](super::LocalQueue) can own it
/// and then takes no lock.
pub struct SharedQueue {
    /// Empty after the end.
    state: Arc<Biased<Option<State>>>,
    /// What futures have not taken before the end.
    outcomes: Mutex<Outcomes>,
    vector: Arc<OwnedFd>,
    on_event: OnceLock<Box<dyn Fn(Notification) + Send + Sync>>,
    /// The other one of [`PollMode::Paired`](super::PollMode::Paired).
    polled: OnceLock<Arc<Self>>,
}

impl SharedQueue {
    pub(crate) fn new(state: State, vector: Arc<OwnedFd>) -> Arc<Self> {
        Arc::new(Self {
            state: Arc::new(Biased::new(Some(state))),
            outcomes: Mutex::default(),
            vector,
            on_event: OnceLock::new(),
            polled: OnceLock::new(),
        })
    }

    /// Takes the state away; futures that wait are woken and fail, and the reaper ends.
    pub(crate) fn take(&self) -> Option<State> {
        let mut aftermath = Aftermath::default();
        let state = self.state.with(|state| {
            state.take().map(|mut state| {
                state.dismiss_reapers(&mut aftermath);
                state.wake_all(&mut aftermath);
                state
            })
        });
        aftermath.run();
        state
    }

    /// Makes the calling thread the owner, unless there is one or the queue pair is about to end.
    /// The reapers of other threads end.
    pub(super) fn own(&self) -> Option<Owner<Option<State>>> {
        let mut aftermath = Aftermath::default();
        let owner = self.state.own(|state| match state {
            Some(state) if !state.is_refusing() => {
                state.dismiss_reapers(&mut aftermath);
                true
            }
            _ => false,
        });
        aftermath.run();
        owner
    }

    /// Whether a [`LocalQueue`](super::LocalQueue) has it.
    pub(crate) fn is_owned(&self) -> bool {
        self.state.is_owned()
    }

    /// Ends the queue pair and returns what the device may still use, which is nothing if it has
    /// `stopped`. Futures get the outcomes that there are, and the others fail.
    pub(crate) fn end(&self, stopped: bool) -> Option<Remains> {
        let mut aftermath = Aftermath::default();
        let remains = self.state.with(|home| {
            home.take().map(|state| {
                let (outcomes, remains) = state.end(stopped, &mut aftermath);
                *super::sync::lock_std(&self.outcomes) = outcomes;
                remains
            })
        });
        aftermath.run();
        remains
    }

    /// Sees to it that outstanding commands are reaped after its owner has given it up.
    pub(super) fn go_on(self: &Arc<Self>) {
        let unfinished = self.with(|state| state.is_watched());
        // Without a runtime here, the next one to use the queue takes care of them.
        if unfinished == Some(true) && self.spawn_reaper().is_err() {
            tracing::debug!("commands are outstanding on a queue that nobody drives");
        }
    }

    /// Sets the queue pair beside this one that has no interrupt.
    pub(crate) fn pair_with(&self, polled: &Arc<Self>) {
        self.with(|state| polled.with(|polled| state.pair(polled)));
        // Set once, at bring-up.
        let _ = self.polled.set(polled.clone());
    }

    /// It, and the one beside it.
    pub(crate) fn both(self: &Arc<Self>) -> impl Iterator<Item = &Arc<Self>> {
        [Some(self), self.polled.get()].into_iter().flatten()
    }

    /// Sets who is told of asynchronous events.
    pub(crate) fn set_on_event(&self, on_event: Box<dyn Fn(Notification) + Send + Sync>) {
        // Set once, at bring-up.
        let _ = self.on_event.set(on_event);
    }

    pub(crate) fn vector(&self) -> &Arc<OwnedFd> {
        &self.vector
    }

    pub(crate) fn counters(&self) -> (QueueCounters, WindowCounters) {
        self.with(|state| state.counters()).unwrap_or_default()
    }

    /// Runs `f` on the state, if it is there, and then what follows from it.
    #[cfg(test)]
    pub(crate) fn attend<R>(&self, f: impl FnOnce(&mut State, &mut Aftermath) -> R) -> Option<R> {
        let mut aftermath = Aftermath::default();
        let result = self
            .state
            .with(|state| state.as_mut().map(|state| f(state, &mut aftermath)));
        aftermath.run();
        result
    }

    /// Runs `f` on the state, if it is there.
    #[inline]
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> Option<R> {
        self.state.with(|state| state.as_mut().map(f))
    }
}

impl Access for Arc<SharedQueue> {
    #[inline]
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> Option<R> {
        SharedQueue::with(self, f)
    }

    fn polled(&self) -> Option<&Self> {
        self.polled.get()
    }

    fn park(&self, hook: &Hook, term: Term) {
        let queue = self.clone();
        hook.add(Box::new(ParkedQueue { queue, term }));
    }

    fn spawn_reaper(&self) -> Result<(), Failure> {
        let runtime = Handle::try_current().map_err(|_| Failure::RuntimeGone)?;
        let here = Here::now();
        let Some(term) = self.with(|state| state.claim_reaper(here)).flatten() else {
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

    fn late_outcome(&self, key: usize, holdings: HoldingsMut<'_>) -> Option<Outcome> {
        super::sync::lock_std(&self.outcomes).take(key, holdings)
    }

    fn report(&self, event: Notification) {
        if let Some(on_event) = self.on_event.get() {
            on_event(event);
        }
    }
}
