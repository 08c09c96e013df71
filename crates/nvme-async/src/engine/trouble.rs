//! What goes wrong on queue pairs, on its way to who deals with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nvme_spec::Cqe;
use rustix::event::{EventfdFlags, eventfd};

use crate::device::Notice;
use crate::queue::Lie;

/// Something that a queue pair can't deal with by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trouble {
    /// A command's deadline has passed.
    Overdue { queue: u16, cid: u16 },
    /// The device broke the protocol; the queue pair believes nothing any more.
    Lie { queue: u16, lie: Lie },
    /// Commands are outstanding, and none was completed for long.
    Stalled,
    /// An admin command of a recovery is done.
    Step { id: u32, cqe: Cqe },
    /// The transport has something to say.
    Notice(Notice),
    /// There is nothing to be dealt with any more: the controller is about to be shut down.
    Retire,
}

/// Troubles of one controller that were not dealt with yet.
pub(crate) struct Inbox {
    troubles: Mutex<Vec<Trouble>>,
    /// Readable when there are some.
    signal: OwnedFd,
}

impl Inbox {
    /// # Errors
    ///
    /// When there can be no more file descriptors.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            troubles: Mutex::default(),
            signal: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Leaves a trouble to whoever deals with them. It runs no code of others and never blocks for
    /// long, so it may be called under a queue pair's lock.
    pub(crate) fn report(&self, trouble: Trouble) {
        self.lock().push(trouble);
        // It can only fail where the counter is at its end, and then it is readable.
        let _ = rustix::io::write(&self.signal, &1_u64.to_ne_bytes());
    }

    /// What was reported since the last call, in order.
    pub(crate) fn take(&self) -> Vec<Trouble> {
        // Before the troubles are taken, so that none of them goes without a signal.
        let _ = rustix::io::read(&self.signal, &mut [0; 8]);
        std::mem::take(&mut *self.lock())
    }

    /// Whether nothing was reported since.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Trouble>> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }
}
