//! The thread that watches over one controller.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::supervisor::{Next, Supervisor};
use crate::device::Notice;
use crate::engine::sync::lock_std;
use crate::engine::trouble::{Inbox, Trouble};

/// Runs a supervisor.
pub(crate) struct Runner(Arc<Mutex<Option<JoinHandle<()>>>>);

/// A supervisor that was told to end.
pub(crate) struct Retired(Arc<Mutex<Option<JoinHandle<()>>>>);

impl Runner {
    /// # Errors
    ///
    /// When there can be no more threads.
    pub(super) fn start(
        supervisor: Supervisor,
        inbox: Arc<Inbox>,
        notices: Vec<(Notice, Arc<OwnedFd>)>,
    ) -> io::Result<Self> {
        let thread = thread::Builder::new()
            .name("nvme-async".to_owned())
            .spawn(move || run(supervisor, &inbox, notices))?;
        Ok(Self(Arc::new(Mutex::new(Some(thread)))))
    }

    pub(super) fn retired(&self) -> Retired {
        Retired(self.0.clone())
    }
}

impl Retired {
    /// Waits for its end.
    pub(crate) fn wait(self) {
        // Whoever comes second waits here for the first.
        let mut thread = lock_std(&self.0);
        // A waker that is run there may drop the last handle of the controller.
        let is_other = |handle: &mut JoinHandle<()>| handle.thread().id() != thread::current().id();
        if let Some(handle) = thread.take_if(is_other) {
            // A panic of it was reported when it happened.
            let _ = handle.join();
        }
    }
}

fn run(mut supervisor: Supervisor, inbox: &Inbox, mut notices: Vec<(Notice, Arc<OwnedFd>)>) {
    loop {
        let step = catch_unwind(AssertUnwindSafe(|| supervisor.step(&Instant::now)));
        let timeout = match step {
            Err(_) => return supervisor.break_down(),
            Ok(Next::Over) => return,
            Ok(Next::Never) => None,
            Ok(Next::At(at)) => {
                let timeout = at.saturating_duration_since(Instant::now());
                // Within an i64 for any time that a recovery waits.
                Timespec::try_from(timeout).ok()
            }
        };
        let mut watched = vec![PollFd::new(inbox, PollFlags::IN)];
        watched.extend(
            notices
                .iter()
                .map(|(_, fd)| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)),
        );
        match poll(&mut watched, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR | Errno::AGAIN | Errno::NOMEM) => {}
            Err(error) => unreachable!("poll of open descriptors: {error}"),
        }
        let mut told = watched[1..].iter().map(|fd| !fd.revents().is_empty());
        let told: Vec<bool> = told.by_ref().collect();
        drop(watched);
        let mut told = told.into_iter();
        notices.retain(|(notice, fd)| {
            if told.next() != Some(true) {
                return true;
            }
            let mut count = [0; 8];
            let read = rustix::io::read(fd, &mut count);
            inbox.report(Trouble::Notice(*notice));
            // A descriptor that can't be read would be ready for ever.
            matches!(read, Ok(_) | Err(Errno::AGAIN | Errno::INTR))
        });
    }
}
