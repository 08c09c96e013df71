//! A controller: bring-up, what belongs to all of its namespaces, and shutdown.

pub(crate) mod admin;
mod bring_up;
mod counters;
mod event_stream;
pub(crate) mod events;
mod logs;
pub(crate) mod registers;
pub(crate) mod registry;
mod shutdown;
pub(crate) mod tenure;

use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nvme_spec::identify::IdentifyController;
use nvme_spec::registers::{Capabilities, Version};
use tokio::runtime::{Handle, worker_index};
use tokio::sync::watch;

pub use self::counters::Counters;
pub use self::event_stream::{ControllerEvent, EventStream, NamespaceChange};

use self::admin::Admin;
use self::events::Events;
use self::tenure::Tenure;
use crate::engine::SharedQueue;
use crate::io::{DmaContext, Registration};
use crate::memory::{DmaBuf, Registered};
use crate::namespace::pinned::Pins;
use crate::queue_pair::QueuePair;
use crate::recovery::{ControllerState, Supervision};
use crate::{Error, Namespace};

/// An open NVMe controller.
///
/// It is a handle: clones refer to the same controller, and so do the namespaces and queue pairs
/// that were opened from it.
///
/// [`shutdown`](Self::shutdown) is the way to end its use. When the last handle is dropped
/// without it, the controller may no longer access memory from then on, and a thread resets it and
/// frees what it used; a volatile write cache is not flushed then.
#[derive(Clone)]
pub struct Controller {
    pub(crate) inner: Arc<ControllerInner>,
}

pub(crate) struct ControllerInner {
    pub(crate) tenure: Arc<Tenure>,
    pub(crate) software_thread: Option<u32>,
    pub(crate) capabilities: Capabilities,
    pub(crate) version: Version,
    pub(crate) admin: Admin,
    pub(crate) events: Arc<Events>,
    /// For all threads.
    pub(crate) queues: Vec<Arc<SharedQueue>>,
    pub(crate) pins: Pins,
    /// To be lent to one thread each.
    pub(crate) local_queues: Vec<Arc<SharedQueue>>,
    pub(crate) dma: DmaContext,
    pub(crate) identify: Box<IdentifyController>,
    pub(crate) limits: CommandLimits,
    pub(crate) ready_timeout: Duration,
    pub(crate) timeout: Option<Duration>,
    pub(crate) repeat_writes: bool,
    /// Whether shutdown has begun.
    pub(crate) closing: AtomicBool,
    /// Held by the shutdown that is under way; whether one has begun to delete the queues.
    pub(crate) ending: tokio::sync::Mutex<bool>,
    pub(crate) supervision: Supervision,
}

/// Limits of the controller on single commands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CommandLimits {
    /// Bytes of a read or write.
    pub(crate) max_transfer: u64,
    /// Logical blocks of a Write Zeroes are limited in bytes (WZSL); nothing for no limit.
    pub(crate) write_zeroes_bytes: Option<u64>,
    /// As for Write Zeroes, those of a Verify (VSL).
    pub(crate) verify_bytes: Option<u64>,
    /// Ranges of a Dataset Management command (DMRL).
    pub(crate) discard_ranges: usize,
    /// Logical blocks of one of its ranges (DMRSL).
    pub(crate) discard_range_blocks: u64,
    /// Logical blocks of all of its ranges (DMSL).
    pub(crate) discard_blocks: u64,
}

impl Controller {
    /// The address by which it was opened.
    pub fn address(&self) -> &str {
        &self.inner.admin.address
    }

    /// What the controller says of itself (NVMe base specification 2.0, "Identify Controller").
    pub fn identify(&self) -> &IdentifyController {
        &self.inner.identify
    }

    /// The version of the specification that it follows (VS).
    pub fn version(&self) -> Version {
        self.inner.version
    }

    /// Its capabilities register (CAP).
    pub fn capabilities(&self) -> Capabilities {
        self.inner.capabilities
    }

    /// The active namespaces, in order.
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives up the result only.
    pub async fn active_namespaces(&self) -> Result<Vec<u32>, Error> {
        self.inner.active_namespaces().await
    }

    /// Opens a namespace.
    ///
    /// # Errors
    ///
    /// [`Error::NoNamespace`] if it is not active, and [`Error::Unusable`] if its format is not
    /// supported: metadata is not, and logical blocks must be of 512 bytes to 64 KiB.
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives up the result only.
    pub async fn namespace(&self, nsid: u32) -> Result<Namespace, Error> {
        Namespace::open(self.clone(), nsid).await
    }

    /// Allocates a buffer of `len` bytes that the device reaches without a copy. Its contents are
    /// unspecified.
    ///
    /// Where the controller is in another process, what is larger than 2 MiB is copied: to map memory
    /// is to wait for that process.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] when the pool has reached its limit
    /// ([`OpenOptions::pool_limit`](crate::OpenOptions::pool_limit)) or more memory can't be mapped,
    /// which says why.
    pub fn allocate(&self, len: usize) -> Result<DmaBuf, Error> {
        self.inner.dma.buffer(len)
    }

    /// Maps foreign memory, so that reads and writes of it need no copy. When a limit is reached,
    /// it waits for requests that have memory mapped for their own time.
    ///
    /// # Errors
    ///
    /// [`Error::Mapping`], which says which limit was reached and how to raise it.
    ///
    /// # Cancel safety
    ///
    /// Dropping it leaves nothing mapped.
    pub async fn register(&self, memory: Arc<dyn Registered>) -> Result<Registration, Error> {
        let space = &self.inner.dma.space;
        if !self.inner.tenure.waits_for_peer() {
            return Registration::new(space, memory, false).await;
        }
        let space = space.clone();
        let register = move || {
            let registration = Registration::new(&space, memory, true);
            Handle::current().block_on(registration)
        };
        registers::apart(self.address(), register).await
    }

    /// What is mapped for the device, and who waits for room.
    pub fn mappings(&self) -> iova::Usage {
        self.inner.dma.space.usage()
    }

    /// The admin queue, for commands that this crate has no function for.
    pub fn admin_queue(&self) -> QueuePair {
        QueuePair::new(self.clone(), self.inner.admin.queue.clone())
    }

    /// The I/O queue pairs that all threads share, for raw commands.
    pub fn io_queues(&self) -> impl ExactSizeIterator<Item = QueuePair> + '_ {
        self.inner
            .queues
            .iter()
            .map(|queue| QueuePair::new(self.clone(), queue.clone()))
    }

    /// How it is at the moment.
    pub fn state(&self) -> ControllerState {
        self.inner.supervision.state()
    }

    /// Tells of each change of its state. A receiver that is slow sees the latest only.
    pub fn watch_state(&self) -> watch::Receiver<ControllerState> {
        self.inner.supervision.watch()
    }

    /// The kernel's number of the thread that the embedded software controller runs in; nothing
    /// for other controllers.
    pub fn software_thread(&self) -> Option<u32> {
        self.inner.software_thread
    }

    /// Ends the use of the controller in order: waits for what was submitted, deletes the queues,
    /// tells the controller to shut down (which flushes its volatile cache), disables it and
    /// frees everything. Later operations on any handle fail with [`Error::Closed`].
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] while a [`LocalNamespace`](crate::LocalNamespace) exists, and
    /// [`Error::RuntimeGone`] or [`Error::NoRuntime`] outside of a Tokio runtime with I/O and time
    /// drivers; nothing has happened then. Otherwise the first error on the way; the rest is done nevertheless, and
    /// [`Error::NotReady`] or [`Error::Device`] say that the controller may not have flushed its
    /// cache.
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, the controller stays half shut down and refuses
    /// commands; call it again or drop all handles.
    pub async fn shutdown(&self) -> Result<(), Error> {
        tracing::debug!(address = self.address(), counters = ?self.counters(), "shutdown");
        shutdown::shut_down(&self.inner).await
    }
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller")
            .field("address", &self.address())
            .field("model", &self.inner.identify.model_number())
            .finish_non_exhaustive()
    }
}

impl ControllerInner {
    pub(crate) async fn active_namespaces(&self) -> Result<Vec<u32>, Error> {
        self.events.resume();
        self.admin.active_namespaces(self.identify.nn.get()).await
    }

    pub(crate) fn all_queues(&self) -> impl Iterator<Item = &Arc<SharedQueue>> {
        let queues = self.queues.iter().chain(&self.local_queues);
        queues.flat_map(SharedQueue::both)
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Whether commands have a chance, now or after a recovery.
    pub(crate) fn is_usable(&self) -> bool {
        let state = self.supervision.state();
        !self.is_closing()
            && matches!(
                state,
                ControllerState::Live | ControllerState::Recovering { .. }
            )
    }
}

/// The queue for the current thread.
///
/// The first queue serves all that are no worker of a runtime; the others are spread over the
/// workers, starting at a place that differs from runtime to runtime.
#[inline]
pub(crate) fn choose_queue<Q>(queues: &[Q]) -> &Q {
    match queues {
        [only] => only,
        [first, others @ ..] => choose_among(first, others),
        [] => unreachable!("a controller has at least one queue"),
    }
}

#[inline(never)]
fn choose_among<'a, Q>(first: &'a Q, others: &'a [Q]) -> &'a Q {
    let Some(worker) = worker_index() else {
        return first;
    };
    let runtime = Handle::try_current().map_or(0, |handle| {
        BuildHasherDefault::<DefaultHasher>::default().hash_one(handle.id()) as usize
    });
    &others[runtime.wrapping_add(worker) % others.len()]
}
