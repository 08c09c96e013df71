//! The end of a controller's use, in order or not.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use nvme_spec::admin;

use super::registers::Registers;
use super::{Controller, ControllerInner};
use crate::Error;
use crate::engine::access::Access;
use crate::engine::state::Aftermath;
use crate::engine::submission::Drain;
use crate::engine::{Failure, SharedQueue, State};

/// How long outstanding commands may take when nothing says how long a command may take.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a controller that does not say so (RTD3E) may take to shut down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn shut_down(inner: &Arc<ControllerInner>) -> Result<(), Error> {
    // Several tasks may call it, and again after it was dropped half-way.
    let _ending = inner.ending.lock().await;
    if inner.admin.queue.is_taken() {
        // The device may have another owner by now.
        return Ok(());
    }
    if !inner.is_closing() {
        end_lending(inner)?;
    }
    inner.closing.store(true, Ordering::Release);
    for queue in inner.all_queues() {
        queue.with(|state| state.set_refusing(true));
    }
    drain(inner).await;
    let mut first_error = None;
    let mut note = |result: Result<(), Error>| {
        if let Err(error) = result {
            tracing::debug!(%error, "on the way to shut down");
            first_error.get_or_insert(error);
        }
    };
    for id in 1..=inner.all_queues().count() as u16 {
        note(
            inner
                .admin
                .run(admin::delete_submission_queue(id))
                .await
                .map(drop),
        );
    }
    for id in 1..=inner.all_queues().count() as u16 {
        note(
            inner
                .admin
                .run(admin::delete_completion_queue(id))
                .await
                .map(drop),
        );
    }
    inner.admin.queue.with(|state| state.set_refusing(true));
    let timeout = match inner.identify.rtd3e.get() {
        0 => SHUTDOWN_TIMEOUT,
        micros => Duration::from_micros(micros.into()).max(SHUTDOWN_TIMEOUT),
    };
    note(inner.registers.shut_down(timeout).await);
    let disabled = inner.registers.disable(inner.ready_timeout).await;
    // From here on nobody rings a doorbell, which during a reset would be fatal where the
    // kernel takes the BAR away for that time.
    let states: Vec<State> = inner
        .all_queues()
        .chain([&inner.admin.queue])
        .filter_map(|queue| queue.take())
        .collect();
    let stopped = match disabled {
        Ok(()) => true,
        Err(error) => {
            note(Err(error));
            let reset = inner.registers.device.reset();
            let stopped = reset.is_ok();
            note(reset.map_err(Error::from));
            stopped
        }
    };
    note(
        inner
            .registers
            .device
            .set_bus_master(false)
            .map_err(Error::from),
    );
    end(states, stopped);
    if let Ok(mut release) = inner.release.lock() {
        *release = None;
    }
    first_error.map_or(Ok(()), Err)
}

/// Sees to it that no LocalNamespace has a queue pair or gets one.
fn end_lending(inner: &ControllerInner) -> Result<(), Error> {
    let set_refusing =
        |queue: &Arc<SharedQueue>, refusing| queue.with(|state| state.set_refusing(refusing));
    if inner
        .local_queues
        .iter()
        .all(|queue| set_refusing(queue, true).is_some())
    {
        return Ok(());
    }
    for queue in &inner.local_queues {
        set_refusing(queue, false);
    }
    Err(Error::InUse {
        address: inner.admin.address.to_string(),
        reason: "a LocalNamespace of it exists; drop it first",
    })
}

/// Waits for everything that was submitted, for as long as commands may take.
async fn drain(inner: &ControllerInner) {
    let timeout = inner.timeout.unwrap_or(DRAIN_TIMEOUT);
    let drained = tokio::time::timeout(timeout, async {
        for queue in inner.all_queues() {
            // A queue that failed or that nobody drives has nothing to wait for.
            let _ = Drain::new(queue).await;
        }
    });
    if drained.await.is_err() {
        tracing::warn!(
            address = &*inner.admin.address,
            "commands are outstanding; the controller is stopped nevertheless"
        );
    }
}

/// Fails what is still waited for and frees the memory of the queues, if the device is known to be
/// stopped.
fn end(mut states: Vec<State>, stopped: bool) {
    let mut aftermath = Aftermath::default();
    for state in &mut states {
        state.fail(Failure::Closed, &mut aftermath);
    }
    aftermath.run();
    if !stopped {
        // The device may still write there.
        std::mem::forget(states);
    }
}

/// Stops a controller that is not used any more, in a thread of its own, and drops `keep` when
/// that is done: memory that the controller may access until then above all.
pub(super) fn stop_and_drop(
    registers: Registers,
    ready_timeout: Duration,
    keep: impl Send + 'static,
) {
    // From here on it accesses no memory, whatever the thread takes.
    if let Err(error) = registers.device.set_bus_master(false) {
        tracing::warn!(%error, "an unused controller could not be cut off from memory");
    }
    let stop = move || {
        let disabled = registers.disable_blocking(ready_timeout);
        let stopped = disabled.is_ok() || registers.device.reset().is_ok();
        if !stopped {
            tracing::warn!(
                address = registers.device.address(),
                "an unused controller could not be stopped; its memory is never freed"
            );
            std::mem::forget(keep);
        }
    };
    // Without a thread the closure, and what it keeps, is dropped by `spawn`; the memory must
    // not be, so it is put where the failure can get at it.
    let stop = Arc::new(std::sync::Mutex::new(Some(stop)));
    let in_thread = stop.clone();
    let run = move || {
        let stop = in_thread.lock().ok().and_then(|mut stop| stop.take());
        if let Some(stop) = stop {
            stop();
        }
    };
    let spawned = thread::Builder::new()
        .name("nvme-async-stop".to_owned())
        .spawn(run);
    if spawned.is_err()
        && let Some(stop) = stop.lock().ok().and_then(|mut stop| stop.take())
    {
        stop();
    }
}

impl Drop for ControllerInner {
    fn drop(&mut self) {
        let queues: Vec<_> = self
            .all_queues()
            .chain([&self.admin.queue])
            .cloned()
            .collect();
        let states: Vec<State> = queues.iter().filter_map(|queue| queue.take()).collect();
        if states.is_empty() {
            // Shut down in order.
            return;
        }
        let release = self.release.get_mut().ok().and_then(Option::take);
        // In order: what commands use, the pool that it is from, and then the word to those who
        // wait for the device.
        let keep = (states, self.admin.pool.clone(), release);
        stop_and_drop(self.registers.clone(), self.ready_timeout, keep);
    }
}

impl Controller {
    pub(crate) fn check_open(&self) -> Result<(), Error> {
        if self.inner.is_closing() {
            return Err(Error::Closed {
                address: self.address().to_owned(),
            });
        }
        Ok(())
    }
}
