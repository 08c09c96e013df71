//! What stands in for the thread under a fuzzer: a task of the runtime that opened the controller. The
//! fuzzer's clock does not pass while somebody waits, which threads must not see.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::supervisor::{Next, Supervisor};
use crate::device::Notice;
use crate::engine::sync::lock_std;
use crate::engine::trouble::Inbox;

/// Between two looks at what was reported.
const PAUSE: Duration = Duration::from_millis(1);

/// Runs a supervisor.
pub(crate) struct Runner(Arc<Mutex<Option<Supervisor>>>);

/// A supervisor that was told to end.
pub(crate) struct Retired(Arc<Mutex<Option<Supervisor>>>);

impl Runner {
    pub(super) fn start(
        supervisor: Supervisor,
        _inbox: Arc<Inbox>,
        _notices: Vec<(Notice, Arc<OwnedFd>)>,
    ) -> io::Result<Self> {
        let supervisor = Arc::new(Mutex::new(Some(supervisor)));
        let stepped = supervisor.clone();
        tokio::spawn(async move {
            while let Some(next) = step(&stepped) {
                match next {
                    Next::At(at) => tokio::time::sleep_until(at.into()).await,
                    Next::Never | Next::Over => tokio::time::sleep(PAUSE).await,
                }
            }
        });
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
