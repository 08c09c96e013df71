//! A controller's recovery at work.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::watch;

use super::runner::{Retired, Runner};
use super::supervisor::Supervisor;
use super::{ControllerState, Plant, Settings};
use crate::device::Notice;
use crate::engine::trouble::{Inbox, Trouble};

/// Watches over a controller. Dropping it changes nothing about that; [`retire`](Self::retire) ends
/// it.
pub(crate) struct Supervision {
    inbox: Arc<Inbox>,
    state: Arc<watch::Sender<ControllerState>>,
    runner: Runner,
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
        let runner = Runner::start(supervisor, inbox.clone(), notices)?;
        Ok(Self {
            inbox,
            state,
            runner,
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
        self.runner.retired()
    }
}
