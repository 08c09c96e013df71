//! What the embedder's threads and the controller's thread share besides the doorbells.

use std::fmt;
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::counters::Cells;
use crate::doorbells::{ATTENTION_CONTROL, Doorbells};
use crate::engine::Engine;
use crate::log_limit::LogLimit;
use crate::registers::Registers;

/// Which commands the controller leaves in their queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Hold {
    #[default]
    Nothing,
    Io,
    Everything,
}

/// Something to do on the controller's thread, between two commands.
pub(crate) struct Call(Box<dyn FnOnce(&mut Engine) + Send>);

impl Call {
    pub(crate) fn run(self, engine: &mut Engine) {
        (self.0)(engine);
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").finish_non_exhaustive()
    }
}

/// State that is set by the embedder and acted on by the controller's thread.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) registers: Registers,
    pub(crate) bus_master: bool,
    pub(crate) hold: Hold,
    pub(crate) reset_pending: bool,
    /// Whether the last reset had no effect.
    pub(crate) reset_failed: bool,
    /// The function is not there: its registers read as all ones.
    pub(crate) vanished: bool,
    pub(crate) stop: bool,
    pub(crate) calls: Vec<Call>,
    /// Counts the changes that someone waits for, and how many of them are in effect.
    requested: u64,
    acknowledged: u64,
    /// The thread is gone, so that nothing will be acknowledged any more.
    ended: bool,
}

impl Control {
    /// Whether the controller is about to be disabled.
    pub(crate) fn stops_service(&self) -> bool {
        self.reset_pending || self.registers.disable_pending
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    control: Mutex<Control>,
    acknowledged: Condvar,
    pub(crate) doorbells: Arc<Doorbells>,
    pub(crate) counters: Cells,
    pub(crate) log: LogLimits,
}

/// Limits of what is logged, for each kind.
#[derive(Debug, Default)]
pub(crate) struct LogLimits {
    pub(crate) refused_accesses: LogLimit,
    pub(crate) refused_enables: LogLimit,
    pub(crate) failures: LogLimit,
}

impl Shared {
    pub(crate) fn new(registers: Registers, doorbells: Arc<Doorbells>) -> Self {
        Self {
            control: Mutex::new(Control {
                registers,
                bus_master: true,
                hold: Hold::Nothing,
                reset_pending: false,
                reset_failed: false,
                vanished: false,
                stop: false,
                calls: Vec::new(),
                requested: 0,
                acknowledged: 0,
                ended: false,
            }),
            acknowledged: Condvar::new(),
            doorbells,
            counters: Cells::default(),
            log: LogLimits::default(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Control> {
        // The state is plain data, valid after any partial change.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a change and returns when the controller's thread has acted on it, which it does
    /// between two commands.
    pub(crate) fn change_and_wait(
        &self,
        change: impl FnOnce(&mut Control),
    ) -> MutexGuard<'_, Control> {
        let mut control = self.lock();
        change(&mut control);
        control.requested += 1;
        let ticket = control.requested;
        self.doorbells.raise_attention(ATTENTION_CONTROL);
        while control.acknowledged < ticket && !control.ended {
            control = self
                .acknowledged
                .wait(control)
                .unwrap_or_else(PoisonError::into_inner);
        }
        control
    }

    /// Does something on the controller's thread, between two commands, and returns the result;
    /// nothing if the thread has ended.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let mut control = self.lock();
        if control.ended {
            return None;
        }
        control.calls.push(Call(Box::new(move |engine| {
            // The receiver waits below.
            let _ = sender.send(work(engine));
        })));
        drop(control);
        self.doorbells.raise_attention(ATTENTION_CONTROL);
        // Without a result the call was dropped, because the thread ended.
        receiver.recv().ok()
    }

    /// Called by the controller's thread once all changes made under this guard's lock or before
    /// are in effect.
    pub(crate) fn acknowledge(&self, control: &mut Control) {
        if control.acknowledged != control.requested {
            control.acknowledged = control.requested;
            self.acknowledged.notify_all();
        }
    }

    /// Called when the controller's thread ends, in whatever way.
    pub(crate) fn end(&self) {
        let mut control = self.lock();
        control.ended = true;
        let calls = std::mem::take(&mut control.calls);
        if !control.stop {
            // It panicked: to the host this is a controller that died.
            control.registers.status.set_cfs(true);
        }
        self.acknowledged.notify_all();
        drop(control);
        // Those who wait for them are told by that.
        drop(calls);
    }
}
