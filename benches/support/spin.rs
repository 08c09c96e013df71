//! Reads that wait inside of their own poll: the baseline that lets nothing else run meanwhile.
//!
//! Only the reaper takes completions, so it is in a [`LocalSet`] here that a pending read runs in its
//! poll, for as long as the reaper polls. What the reaper learns and decides is as everywhere. A set runs
//! its tasks up to 61 times at once, while a read that has completed waits for the others that are
//! outstanding; so this is fair at a depth of 1 only.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use nvme_async::{DmaBuf, LocalNamespace};
use tokio::task::{JoinHandle, LocalSet, spawn_local};

use crate::way::Reads;

/// A namespace whose reads spin.
#[derive(Clone)]
pub(crate) struct Spinning {
    pub(crate) namespace: LocalNamespace,
    reaper: Rc<RefCell<LocalSet>>,
    doze: Arc<Doze>,
}

/// What wakes the reaper's set: it runs in a task while no read spins.
#[derive(Default)]
struct Doze {
    woken: AtomicBool,
    task: Mutex<Option<Waker>>,
}

impl Wake for Doze {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::Relaxed);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = &*task {
            task.wake_by_ref();
        }
    }
}

impl Spinning {
    pub(crate) fn new(namespace: LocalNamespace) -> Self {
        Self {
            namespace,
            reaper: Rc::default(),
            doze: Arc::default(),
        }
    }

    /// Spawns the task that runs the reaper while no read spins, for interrupts and timers.
    pub(crate) fn attend(&self) -> JoinHandle<()> {
        let this = self.clone();
        spawn_local(poll_fn(move |cx| {
            let task = cx.waker().clone();
            let doze = this.doze.task.lock();
            *doze.unwrap_or_else(PoisonError::into_inner) = Some(task);
            this.run_reaper();
            Poll::Pending
        }))
    }

    /// Polls a read, whose reaper is spawned in the set.
    fn poll<F: Future>(&self, read: Pin<&mut F>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let _in_the_set = self.reaper.borrow().enter();
        read.poll(cx)
    }

    /// Runs the reaper; returns whether it is to be run again at once.
    fn run_reaper(&self) -> bool {
        self.doze.woken.store(false, Ordering::Relaxed);
        let waker = Waker::from(self.doze.clone());
        let mut set = self.reaper.borrow_mut();
        // It is done when it is empty, and goes on when there is a reaper again.
        let _ = Pin::new(&mut *set).poll(&mut Context::from_waker(&waker));
        self.doze.woken.load(Ordering::Relaxed)
    }
}

impl Reads for Spinning {
    async fn read(&self, offset: u64, buffer: DmaBuf) -> DmaBuf {
        let mut read = pin!(self.namespace.read_into(offset, buffer));
        let read = poll_fn(|cx| {
            // A task that spins need not be woken.
            let mut spin = Context::from_waker(Waker::noop());
            loop {
                if let Poll::Ready(read) = self.poll(read.as_mut(), &mut spin) {
                    return Poll::Ready(read);
                }
                if !self.run_reaper() {
                    return self.poll(read.as_mut(), cx);
                }
            }
        });
        read.await.expect("the read succeeds")
    }
}
