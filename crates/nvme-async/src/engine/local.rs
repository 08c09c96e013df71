//! A queue pair that one thread has for itself.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use nvme_spec::event::AsyncEvent;

use super::SharedQueue;
use super::access::Access;
use super::reaper::{Reaper, check_spawned, vacate};
use super::state::{Aftermath, Failure, Outcome, State};

/// A queue pair taken from its [`SharedQueue`] and used without a lock.
pub struct LocalQueue {
    state: RefCell<Option<State>>,
    home: Arc<SharedQueue>,
}

impl LocalQueue {
    /// Takes the queue pair, or nothing if it is taken already or about to end.
    pub(crate) fn take(home: &Arc<SharedQueue>) -> Option<Rc<Self>> {
        let state = home.lend()?;
        Some(Rc::new(Self {
            state: RefCell::new(Some(state)),
            home: home.clone(),
        }))
    }

    /// Gives the queue pair back; the reaper ends.
    pub(crate) fn give_back(&self) {
        let mut aftermath = Aftermath::default();
        let state = self.state.borrow_mut().take().map(|mut state| {
            state.dismiss_reapers(&mut aftermath);
            state
        });
        aftermath.run();
        if let Some(state) = state {
            self.home.put_back(state);
        }
    }
}

impl Access for Rc<LocalQueue> {
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> Option<R> {
        // Never entered twice: `f` runs no code of others.
        self.state.borrow_mut().as_mut().map(f)
    }

    fn spawn_reaper(&self) -> Result<(), Failure> {
        let Some(term) = self.with(State::claim_reaper).flatten() else {
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

    fn late_outcome(&self, _key: usize) -> Option<Outcome> {
        // Its futures borrow the handle that the queue pair is lent to.
        None
    }

    fn report(&self, event: AsyncEvent) {
        // Only the admin queue has event requests, and it is never local.
        tracing::debug!(?event, "an event on an I/O queue");
    }
}
