//! What stands in for the thread under a fuzzer: a task of the runtime that opened the controller. The
//! fuzzer's clock does not pass while somebody waits, which threads must not see.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Instant;

use super::supervisor::{Next, Supervisor};
use crate::device::Notice;
use crate::engine::eventfd::Wakeups;
use crate::engine::sync::lock_std;
use crate::engine::trouble::Inbox;

/// Runs a supervisor.
pub(crate) struct Runner(Arc<Mutex<Option<Supervisor>>>);

/// A supervisor that was told to end.
pub(crate) struct Retired(Arc<Mutex<Option<Supervisor>>>);

impl Runner {
    pub(super) fn start(
        supervisor: Supervisor,
        inbox: Arc<Inbox>,
        _notices: Vec<(Notice, Arc<OwnedFd>)>,
    ) -> io::Result<Self> {
        let supervisor = Arc::new(Mutex::new(Some(supervisor)));
        let stepped = supervisor.clone();
        let mut wakeups = Wakeups::register(inbox.signal()).map_err(|_| io::ErrorKind::Other)?;
        tokio::spawn(poll_fn(move |cx| {
            wakeups.poll_timer(cx);
            loop {
                // Before the step, so that nothing that is reported later goes unnoticed.
                while wakeups.poll_interrupt(cx) {}
                match step(&stepped) {
                    None => return Poll::Ready(()),
                    Some(Next::At(at)) if at <= Instant::now() => {}
                    Some(Next::At(at)) => {
                        wakeups.arm(at, cx);
                        return Poll::Pending;
                    }
                    Some(Next::Never | Next::Over) => return Poll::Pending,
                }
            }
        }));
        Ok(Self(supervisor))
    }

    pub(super) fn retired(&self) -> Retired {
        Retired(self.0.clone())
    }
}

impl Retired {
    /// Goes on until it has ended.
    pub(crate) fn wait(self) {
        while step(&self.0).is_some() {
            std::thread::yield_now();
        }
    }
}

/// Nothing once it has ended.
fn step(supervisor: &Mutex<Option<Supervisor>>) -> Option<Next> {
    let mut supervisor = lock_std(supervisor);
    let next = supervisor.as_mut()?.step(&Instant::now);
    if next == Next::Over {
        *supervisor = None;
        return None;
    }
    Some(next)
}
