//! The thread that watches over one controller.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tokio::sync::watch;

use super::supervisor::{Next, Supervisor};
use super::{ControllerState, Plant, Settings};
use crate::device::Notice;
use crate::engine::sync::lock_std;
use crate::engine::trouble::{Inbox, Trouble};

/// A controller's recovery at work. Dropping it leaves the thread alone; [`retire`](Self::retire)
/// ends it.
pub(crate) struct Supervision {
    inbox: Arc<Inbox>,
    state: Arc<watch::Sender<ControllerState>>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// The thread of a supervision that is about to end.
pub(crate) struct Retired(Arc<Mutex<Option<JoinHandle<()>>>>);

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

impl Supervision {
    /// # Errors
    ///
    /// When there can be no more threads or file descriptors.
    pub(crate) fn start(
        plant: Plant,
        settings: Settings,
        notices: Vec<(Notice, Arc<OwnedFd>)>,
    ) -> io::Result<Self> {
        let inbox = Arc::new(Inbox::new()?);
        let state = Arc::new(watch::Sender::new(ControllerState::Live));
        let supervisor = Supervisor::new(plant, settings, inbox.clone(), state.clone());
        let watched = inbox.clone();
        let thread = thread::Builder::new()
            .name("nvme-async".to_owned())
            .spawn(move || run(supervisor, &watched, notices))?;
        Ok(Self {
            inbox,
            state,
            thread: Arc::new(Mutex::new(Some(thread))),
        })
    }

    pub(crate) fn state(&self) -> ControllerState {
        *self.state.borrow()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<ControllerState> {
        self.state.subscribe()
    }

    /// Announces that the controller was shut down, if it was one until then.
    pub(crate) fn close(&self) {
        self.state.send_if_modified(|state| {
            let was_open = matches!(
                state,
                ControllerState::Live | ControllerState::Recovering { .. }
            );
            if was_open {
                *state = ControllerState::Closed;
            }
            was_open
        });
    }

    /// Ends the supervision, once a recovery that is under way has ended.
    pub(crate) fn retire(&self) -> Retired {
        self.inbox.report(Trouble::Retire);
        Retired(self.thread.clone())
    }
}

fn run(mut supervisor: Supervisor, inbox: &Inbox, mut notices: Vec<(Notice, Arc<OwnedFd>)>) {
    loop {
        let timeout = match supervisor.step(&Instant::now) {
            Next::Over => return,
            Next::Never => None,
            Next::At(at) => {
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
