//! The host's side: operations that wait, and who is woken.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};

use crate::engine::state::Term;
use crate::engine::sync::lock_std;

/// Who was woken and not dealt with yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Sleeper {
    Operation(u32),
    Reaper(u16),
    Drain(usize),
}

pub(super) type Woken = Arc<Mutex<Vec<Sleeper>>>;

struct Alarm {
    who: Sleeper,
    woken: Woken,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        lock_std(&self.woken).push(self.who);
    }
}

pub(super) fn waker(who: Sleeper, woken: &Woken) -> Waker {
    let woken = woken.clone();
    Arc::new(Alarm { who, woken }).into()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    /// An admin command of a user.
    Admin,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Waiting { key: usize },
    Resolved,
    Dropped,
}

/// A command that somebody wants done.
#[derive(Debug)]
pub(super) struct Operation {
    pub(super) kind: Kind,
    pub(super) queue: u16,
    pub(super) blocks: Range<usize>,
    pub(super) may_repeat: bool,
    /// In microseconds.
    pub(super) timeout: u64,
    pub(super) began: u64,
    /// What the simulation allows for waiting, as it was then.
    pub(super) allowance: u64,
    pub(super) stage: Stage,
}

/// Somebody who waits for everything on a queue that was started before.
pub(super) struct Drain {
    pub(super) queue: u16,
    pub(super) key: usize,
    /// The operations that it waits for are those below.
    pub(super) mark: u32,
    pub(super) done: bool,
}

/// What drives a queue.
#[derive(Default)]
pub(super) struct Reaper {
    pub(super) term: Option<Term>,
    pub(super) timer: Option<u64>,
    /// Whether it is about to look.
    pub(super) is_due: bool,
    pub(super) idle_checks: u32,
}
