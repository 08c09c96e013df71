//! Requests that wait for room, in order of arrival, and what is done to make some.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::task::Waker;

use crate::Error;
use crate::cache::Wanted;
use crate::inner::Space;
use crate::lease::Lease;
use crate::state::{Amount, State};
use crate::sync::lock;
use crate::table::SlotRef;

/// A place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

/// The queue. Only the one at its head is ever woken; when it leaves, the next one is.
#[derive(Debug, Default)]
pub(crate) struct Waiters {
    next: u64,
    left: u64,
    /// Without a waker: one that is at work, or was woken and not polled yet.
    queue: BTreeMap<Ticket, Option<Waker>>,
}

impl Waiters {
    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    /// How many have left since the beginning.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// Whether one with this ticket, or without one, has nobody before it.
    pub(crate) fn is_first(&self, ticket: Option<Ticket>) -> bool {
        match self.queue.first_key_value() {
            None => true,
            Some((head, _)) => ticket == Some(*head),
        }
    }

    /// Takes a place behind all others, if there is none yet. Gives the waker that was there, to be
    /// dropped outside of locks.
    fn set(&mut self, ticket: &mut Option<Ticket>, waker: Option<Waker>) -> Option<Waker> {
        let ticket = *ticket.get_or_insert_with(|| {
            self.next += 1;
            Ticket(self.next)
        });
        self.queue.insert(ticket, waker).flatten()
    }

    /// Leaves the queue, done or not. To be woken is whoever is first now, if it was not before.
    fn leave(&mut self, ticket: Ticket) -> Left {
        let was_first = self.is_first(Some(ticket));
        let own = self.queue.remove(&ticket).flatten();
        self.left += 1;
        let next = was_first.then(|| self.wake_first()).flatten();
        Left { next, _own: own }
    }

    /// The waker of the first, when there may be room for it. It is given out once for each wait.
    #[must_use = "whoever waits is to be woken"]
    pub(crate) fn wake_first(&mut self) -> Option<Waker> {
        self.queue.first_entry()?.get_mut().take()
    }
}

/// What someone who left leaves to do outside of locks.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) next: Option<Waker>,
    _own: Option<Waker>,
}

impl Left {
    pub(crate) fn wake_next(self) {
        if let Some(waker) = self.next {
            waker.wake();
        }
    }
}

/// One request's part in the queue. Its drop leaves the queue.
pub(crate) struct Turn {
    space: Arc<Space>,
    ticket: Option<Ticket>,
    /// What was retired for this request and may not have gone yet.
    retired: Amount,
}

/// The waker of the task that attempts something; none if it is not going to wait. Those that
/// others leave to it are dropped with it, outside of locks.
pub(crate) struct Alarm {
    ours: Option<Waker>,
    unused: Option<Waker>,
}

impl Alarm {
    /// Clones the waker, which may run arbitrary code, so not under a lock.
    pub(crate) fn new(waker: Option<&Waker>) -> Self {
        Self {
            ours: waker.cloned(),
            unused: None,
        }
    }
}

/// What to do about a limit.
pub(crate) enum Verdict {
    /// There may be room now.
    Retry,
    /// We are the first, and will be woken.
    Wait,
    /// Others are before us. We will be woken, and are to hold nothing until then.
    Queue,
    /// There will be no room by itself.
    Fail(Error),
}

impl Turn {
    pub(crate) fn new(space: Arc<Space>) -> Self {
        Self {
            space,
            ticket: None,
            retired: Amount::default(),
        }
    }

    pub(crate) fn space(&self) -> &Arc<Space> {
        &self.space
    }

    pub(crate) fn ticket(&self) -> Option<Ticket> {
        self.ticket
    }

    /// Whether it is our turn. If not, we queue up, given a waker; without one, that is an error.
    ///
    /// That is in one critical section with the look at the queue, or those before us might have
    /// gone before we come.
    pub(crate) fn check(
        &mut self,
        state: &mut State,
        alarm: &mut Alarm,
    ) -> Result<(), Option<Error>> {
        let is_first = state.waiters.is_first(self.ticket);
        if is_first && self.ticket.is_some() {
            // At work, we wake nobody, least of all ourselves. What others release meanwhile shows
            // in the state's `releases`.
            alarm.unused = state.waiters.set(&mut self.ticket, None);
        } else if !is_first && alarm.ours.is_some() {
            alarm.unused = state.waiters.set(&mut self.ticket, alarm.ours.take());
            return Err(None);
        } else if !is_first {
            let waiting = state.waiters.len() as u64;
            return Err(Some(Error::Queued { waiting }));
        }
        Ok(())
    }

    /// Does something about a limit that was reached when the state's `releases` were so many:
    /// removes what is kept and unused, or waits if nothing is.
    ///
    /// `own` of the temporary mappings that are not kept are the request's, and those that are
    /// `spared` are in its hands, too: to wait for either, or to give them up, is no help to it.
    pub(crate) fn make_room(
        &mut self,
        error: Error,
        releases: u64,
        own: Amount,
        spared: impl Fn(SlotRef<Lease>) -> bool,
        mut alarm: Alarm,
    ) -> Verdict {
        let space = Arc::clone(&self.space);
        let mut state = lock(&space.state);
        if self.ticket.is_none() && state.waiters.is_first(None) {
            // Whoever comes from now on comes after us, and gets nothing of what we make room for.
            state.waiters.set(&mut self.ticket, None);
        }
        if let Err(queued) = self.check(&mut state, &mut alarm) {
            drop(state);
            return queued.map_or(Verdict::Queue, Verdict::Fail);
        }
        let victims = space.give_up(&mut state, error.need());
        if !victims.is_empty() {
            drop(state);
            space.dismantle(victims);
            return Verdict::Retry;
        }
        if state.releases != releases {
            // Others have released something since. It may have been what was in the way, and the
            // last that was.
            drop(state);
            return Verdict::Retry;
        }
        let Some(waker) = alarm.ours.take() else {
            drop(state);
            return Verdict::Fail(error);
        };
        let leaving = state.leaving().less(own);
        if leaving.is_zero() {
            self.retired = Amount::default();
        }
        let (retired, amount) = state.cache.retire(error.need().less(self.retired), &spared);
        self.retired = self.retired.plus(amount);
        let kept = state.cache.want(&spared);
        let verdict = match kept {
            // Some have become idle just now.
            Wanted::Idle => Verdict::Retry,
            Wanted::Nothing if leaving.is_zero() && retired.is_empty() => Verdict::Fail(error),
            Wanted::Nothing | Wanted::InUse => {
                alarm.unused = state.waiters.set(&mut self.ticket, Some(waker));
                drop(state);
                space.retire(retired);
                return Verdict::Wait;
            }
        };
        drop(state);
        // The waker is dropped here, outside of the lock.
        drop(waker);
        space.retire(retired);
        verdict
    }

    /// Leaves the queue, if we are in it.
    pub(crate) fn end(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let left = lock(&self.space.state).waiters.leave(ticket);
            left.wake_next();
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ticket.fmt(f)
    }
}
