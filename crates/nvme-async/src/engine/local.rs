//! A queue pair that one thread has for itself.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use super::access::Access;
use super::biased::Owner;
use super::park::{Hook, ParkedQueue};
use super::reaper::{Reaper, check_spawned, vacate};
use super::state::{Aftermath, Failure, Here, Outcome, State, Term};
use super::{Notification, SharedQueue};
use crate::io::HoldingsMut;

/// A [`SharedQueue`] that this thread owns, and uses without its lock.
pub struct LocalQueue {
    owner: Owner<Option<State>>,
    home: Arc<SharedQueue>,
    polled: Option<Rc<Self>>,
}

impl LocalQueue {
    /// Takes the queue pair, or nothing if it is taken already or about to end.
    pub(crate) fn take(home: &Arc<SharedQueue>) -> Option<Rc<Self>> {
        let owner = home.own()?;
        Some(Rc::new(Self {
            owner,
            home: home.clone(),
            polled: home.polled().and_then(Self::take),
        }))
    }

    /// Gives the queue pair back; the reaper ends.
    pub(crate) fn give_back(&self) {
        if let Some(polled) = &self.polled {
            polled.give_back();
        }
        let mut aftermath = Aftermath::default();
        self.with(|state| state.dismiss_reapers(&mut aftermath));
        let resigned = self.owner.resign();
        aftermath.run();
        if resigned {
            self.home.go_on();
        }
    }
}

impl Access for Rc<LocalQueue> {
    #[inline(always)]
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> Option<R> {
        LocalQueue::with(self, f)
    }

    fn polled(&self) -> Option<&Self> {
        self.polled.as_ref()
    }

    fn park(&self, _: &Hook, term: Term) {
        let queue = self.clone();
        Hook::add_local(Box::new(ParkedQueue { queue, term }));
    }

    fn spawn_reaper(&self) -> Result<(), Failure> {
        let here = Here::now();
        let Some(term) = self.with(|state| state.claim_reaper(here)).flatten() else {
            return Ok(());
        };
        let spawned = Reaper::new(self.clone(), term, self.home.vector()).and_then(|reaper| {
            // Outside of a LocalSet or LocalRuntime this panics, and there is no way to ask.
            catch_unwind(AssertUnwindSafe(|| drop(tokio::task::spawn_local(reaper))))
                .map_err(|_| Failure::NotLocal)
        });
        match spawned {
            Ok(()) => check_spawned(self, term),
            Err(failure) => {
                vacate(self, term);
                Err(failure)
            }
        }
    }

    fn late_outcome(&self, key: usize, holdings: HoldingsMut<'_>) -> Option<Outcome> {
        self.home.late_outcome(key, holdings)
    }

    fn report(&self, event: Notification) {
        // Only the admin queue has event requests, and it is never local.
        tracing::debug!(?event, "an event on an I/O queue");
    }
}

impl LocalQueue {
    #[inline(always)]
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> Option<R> {
        self.owner.with(|state| state.as_mut().map(f)).flatten()
    }
}
