//! The end of a controller's use, in order or not.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nvme_spec::admin;

use super::bring_up::check_runtime;
use super::registers::Registers;
use super::tenure::{Held, Tenure};
use super::{Controller, ControllerInner};
use crate::engine::State;
use crate::engine::state::Remains;
use crate::engine::submission::Drain;
use crate::recovery::{ControllerState, Retired};
use crate::{Error, Fate};

/// How long outstanding commands may take when nothing says how long a command may take.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a controller that does not say so (RTD3E) may take to shut down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn shut_down(inner: &Arc<ControllerInner>) -> Result<(), Error> {
    // Several tasks may call it, and again after it was dropped half-way.
    let mut deleting = inner.ending.lock().await;
    let Some(registers) = inner.tenure.registers() else {
        // The device may have another owner by now. The shutdown that gave it up may have been dropped
        // before it said so.
        inner.supervision.close();
        return gone(inner);
    };
    // What follows waits with timers, which panic where there are none.
    check_runtime(&*registers.device)?;
    if !inner.is_closing() {
        end_lending(inner)?;
    }
    inner.closing.store(true, Ordering::Release);
    inner.events.close();
    for queue in inner.all_queues() {
        queue.with(|state| state.set_refusing(true));
    }
    drain(inner).await;
    // What goes wrong from here on is not worth a recovery.
    let supervisor = inner.supervision.retire();
    if let Err(error) = tokio::task::spawn_blocking(move || supervisor.wait()).await {
        tracing::warn!(%error, "while recovery ended");
    }
    if inner.tenure.registers().is_none() {
        return gone(inner);
    }
    let mut first_error = None;
    let mut note = |result: Result<(), Error>| {
        if let Err(error) = result {
            tracing::debug!(%error, "on the way to shut down");
            first_error.get_or_insert(error);
        }
    };
    // The one before may have got anywhere, and a queue is deleted once.
    if !std::mem::replace(&mut *deleting, true) {
        note(delete_queues(inner, &registers).await);
    }
    inner.admin.queue.with(|state| state.set_refusing(true));
    let timeout = match inner.identify.rtd3e.get() {
        0 => SHUTDOWN_TIMEOUT,
        micros => Duration::from_micros(micros.into()).max(SHUTDOWN_TIMEOUT),
    };
    note(registers.shut_down(timeout).await);
    let disabled = registers.disable(inner.ready_timeout).await;
    // From here on nobody rings a doorbell, which during a reset would be fatal where the
    // kernel takes the BAR away for that time.
    for queue in inner.all_queues().chain([&inner.admin.queue]) {
        queue.with(|state| state.fence());
    }
    let disabled = match disabled {
        Ok(()) => true,
        Err(error) => {
            note(Err(error));
            let reset = |registers: &Registers| Ok(registers.device.reset()?);
            let reset = registers.access(reset).await;
            let disabled = reset.is_ok();
            note(reset);
            disabled
        }
    };
    let cut_off = |registers: &Registers| Ok(registers.device.set_bus_master(false)?);
    let cut_off = registers.access(cut_off).await;
    // A controller that goes on can't do so with memory.
    let stopped = disabled || cut_off.is_ok();
    note(cut_off);
    let remains: Vec<Remains> = inner
        .all_queues()
        .chain([&inner.admin.queue])
        .filter_map(|queue| queue.end(stopped))
        .collect();
    if stopped {
        drop(remains);
    } else {
        // The device may still write there.
        std::mem::forget(remains);
    }
    drop(registers);
    give_up(inner).await;
    inner.supervision.close();
    first_error.map_or(Ok(()), Err)
}

/// How the shutdown of a controller ends that is not there any more.
fn gone(inner: &ControllerInner) -> Result<(), Error> {
    let address = inner.admin.address.to_string();
    let fate = Fate::NotExecuted;
    match inner.supervision.state() {
        ControllerState::Removed => Err(Error::Removed { address, fate }),
        ControllerState::Failed { csts } => Err(Error::ControllerFailed {
            address,
            csts,
            fate,
        }),
        _ => Ok(()),
    }
}

/// Deletes the I/O queues, until that fails or takes too long: with a controller that does not answer
/// there is no point in asking for each of them.
async fn delete_queues(inner: &ControllerInner, registers: &Registers) -> Result<(), Error> {
    let count = inner.all_queues().count() as u16;
    let deletion = async {
        for id in 1..=count {
            inner.admin.run(admin::delete_submission_queue(id)).await?;
        }
        for id in 1..=count {
            inner.admin.run(admin::delete_completion_queue(id)).await?;
        }
        Ok(())
    };
    // A command has its own deadline, but only once it has its place in the queue.
    let timeout = inner.timeout.unwrap_or(DRAIN_TIMEOUT).saturating_mul(2);
    match tokio::time::timeout(timeout, deletion).await {
        Ok(deleted) => deleted,
        Err(_) => Err(registers.not_ready("delete its queues", timeout)),
    }
}

/// Closes the device, which may block, and lets those know who wait for it.
async fn give_up(inner: &ControllerInner) {
    let tenure = inner.tenure.clone();
    let space = inner.dma.space.clone();
    let closing = tokio::task::spawn_blocking(move || {
        space.end_retention();
        // If it has not stopped, what it may use was leaked before.
        tenure.give_up(true);
    });
    if let Err(error) = closing.await {
        tracing::warn!(%error, "while the device was closed");
    }
}

/// Sees to it that no LocalNamespace has a queue pair or gets one.
fn end_lending(inner: &ControllerInner) -> Result<(), Error> {
    let refuse = |refusing| {
        for queue in &inner.local_queues {
            queue.with(|state| state.set_refusing(refusing));
        }
    };
    // From here on nobody becomes the owner of one.
    refuse(true);
    if !inner.local_queues.iter().any(|queue| queue.is_owned()) {
        return Ok(());
    }
    refuse(false);
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

/// Stops a controller that is not used any more, in a thread of its own, and drops `keep` when
/// that is done: memory that the controller may access until then above all.
pub(super) fn stop_and_drop(
    tenure: &Arc<Tenure>,
    ready_timeout: Duration,
    keep: impl Send + 'static,
    supervisor: Option<Retired>,
) {
    let waits_for_peer = tenure.waits_for_peer();
    // From here on it accesses no memory, whatever the thread takes.
    if !waits_for_peer
        && let Some(registers) = tenure.registers()
        && let Err(error) = registers.device.set_bus_master(false)
    {
        tracing::warn!(%error, "an unused controller could not be cut off from memory");
    }
    let taken = (!waits_for_peer).then(|| tenure.take());
    let tenure = tenure.clone();
    let stop = move || {
        let held = taken.unwrap_or_else(|| tenure.take());
        let Some(Held { registers, release }) = held else {
            // It was given up before.
            if tenure.runs_on() {
                std::mem::forget(keep);
            }
            return;
        };
        if let Some(supervisor) = supervisor {
            supervisor.wait();
        }
        let disabled = registers.disable_blocking(ready_timeout);
        // A recovery that ended just now may have allowed it to access memory again.
        let stopped = disabled.is_ok()
            || registers.device.reset().is_ok()
            || registers.device.set_bus_master(false).is_ok();
        if !stopped {
            tracing::warn!(
                address = registers.device.address(),
                "an unused controller could be neither stopped nor cut off from memory, which is \
                 never freed"
            );
            std::mem::forget(keep);
        } else if waits_for_peer {
            // Mappings end with it, so that nobody who still has memory will have to wait for that.
            registers.device.close();
            drop(keep);
        } else {
            drop(keep);
        }
        // The device is closed before another opens it.
        registers.device.close();
        drop(registers);
        drop(release);
    };
    // Without a thread the closure, and what it keeps, is dropped by `spawn`; the memory must
    // not be, so it is put where the failure can get at it.
    let stop = Arc::new(Mutex::new(Some(stop)));
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
        let supervisor = self.supervision.retire();
        let states: Vec<State> = queues.iter().filter_map(|queue| queue.take()).collect();
        let keep = (states, self.admin.pool.clone());
        stop_and_drop(&self.tenure, self.ready_timeout, keep, Some(supervisor));
        self.supervision.close();
    }
}

impl Controller {
    pub(crate) fn check_open(&self) -> Result<(), Error> {
        if self.inner.is_closing() {
            return Err(Error::Closed {
                address: self.address().to_owned(),
                fate: Fate::NotExecuted,
            });
        }
        gone(&self.inner)
    }
}

#[cfg(all(test, feature = "soft"))]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use crate::{Error, open};

    #[tokio::test]
    async fn a_result_that_was_not_taken_before_the_end_is_not_lost() {
        // Slow enough that the first poll does not find it done.
        let namespace = open("mem:?size=1M&latency=200ms").await.unwrap();
        let mut write = pin!(namespace.write(4096, vec![7; 4096]));
        let mut context = Context::from_waker(Waker::noop());
        if let Poll::Ready(written) = write.as_mut().poll(&mut context) {
            panic!("resolved at once: {written:?}");
        }
        namespace.controller().shutdown().await.unwrap();
        assert_eq!(write.await.unwrap(), vec![7; 4096]);
    }

    #[test]
    fn outside_of_a_runtime_it_is_an_error_and_nothing_happens() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let namespace = runtime.block_on(open("mem:?size=1M")).unwrap();
        {
            let mut shutdown = pin!(namespace.controller().shutdown());
            let mut context = Context::from_waker(Waker::noop());
            let polled = shutdown.as_mut().poll(&mut context);
            let gone = matches!(polled, Poll::Ready(Err(Error::RuntimeGone { .. })));
            assert!(gone, "{polled:?}");
        }
        runtime.block_on(async {
            namespace.write(0, vec![7; 4096]).await.unwrap();
            namespace.controller().shutdown().await.unwrap();
        });
    }

    #[tokio::test]
    async fn a_closed_controller_refuses_and_gives_buffers_back() {
        let namespace = open("mem:?size=1M").await.unwrap();
        namespace.controller().shutdown().await.unwrap();
        let refused = namespace.write(0, vec![7; 4096]).await.unwrap_err();
        assert!(matches!(refused.error, Error::Closed { .. }), "{refused}");
        assert_eq!(refused.buffer, Some(vec![7; 4096]));
        namespace.controller().shutdown().await.unwrap();
    }
}
