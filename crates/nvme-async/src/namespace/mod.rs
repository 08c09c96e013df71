//! A namespace: reads, writes and what else there is to do with logical blocks.

mod batches;
mod copy;
mod limits;
mod live;
mod local;
mod maintenance;
pub(crate) mod pinned;
pub(crate) mod registry;
pub(crate) mod seen;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use nvme_spec::identify::IdentifyNamespace;

pub use self::local::LocalNamespace;
pub use self::maintenance::Zeroes;

use self::live::Live;
use self::pinned::PinnedQueue;
use crate::engine::SharedQueue;
use crate::io::{Compare, DmaContext, Read, ReadBuffer, ReadInto, Write, WriteBuffer};
use crate::memory::DmaBuf;
use crate::{Controller, Error};

/// An open namespace, for any thread and any task.
///
/// It is a handle: clones refer to the same namespace. Commands go to the queue pair of the
/// worker on which their future is first polled, and take one short lock there;
/// [`LocalNamespace`] takes none. [`pinned`](Self::pinned) handles keep to one queue pair instead.
///
/// Offsets and lengths are in bytes and must be multiples of the
/// [logical block size](Self::block_size). NVMe orders nothing between commands: of a read and a
/// write of the same blocks that are outstanding together either may come first.
///
/// # Namespaces that change
///
/// When the controller reports that a namespace has changed, its handles follow: after a change of
/// size, requests are checked against the new one. While the namespace is not active, operations
/// fail with [`Error::NamespaceGone`]; they work again when it comes back. When it comes back as
/// another one, or with another format, the handle is of no use any more
/// ([`Error::NamespaceChanged`]); open it again. What is under way at that moment, and what is
/// submitted until the change is known, the controller may refuse with a status of its own
/// ([`Error::Command`]). All handles of a namespace see the same, however often it was opened.
#[derive(Clone)]
pub struct Namespace {
    inner: Arc<NamespaceInner>,
    pinned: Option<Arc<PinnedQueue>>,
}

/// What the handles of a namespace share.
pub(crate) struct NamespaceInner {
    controller: Controller,
    nsid: u32,
    block_shift: u32,
    /// Most blocks in one command that transfers data.
    max_blocks: u64,
    live: Live,
}

impl Namespace {
    pub(crate) async fn open(controller: Controller, nsid: u32) -> Result<Self, Error> {
        controller.check_open()?;
        let events = controller.inner.events.clone();
        let active = controller.inner.active_namespaces().await?;
        let registry = events.namespaces();
        let ticket = registry.ticket();
        let seen = match active.contains(&nsid) {
            true => events.see(nsid).await?,
            false => Ok(None),
        };
        let address = || controller.address().to_owned();
        let seen = match seen {
            Ok(Some(seen)) => seen,
            Ok(None) => {
                return Err(Error::NoNamespace {
                    address: address(),
                    nsid,
                    active,
                });
            }
            Err(claim) => {
                return Err(Error::Unusable {
                    address: address(),
                    reason: format!("namespace {nsid} claims {claim}"),
                });
            }
        };
        let new = NamespaceInner::new(controller.clone(), nsid, seen)?;
        let inner = registry.adopt(ticket, new);
        // A change in between was told to those handles that there were.
        if registry.is_stale(ticket) {
            events.look_at(nsid).await?;
        }
        Ok(Self {
            inner,
            pinned: None,
        })
    }

    /// Its controller.
    pub fn controller(&self) -> &Controller {
        &self.inner.controller
    }

    /// Its number.
    pub fn nsid(&self) -> u32 {
        self.inner.nsid
    }

    /// The logical block size in bytes, a power of two.
    pub fn block_size(&self) -> u32 {
        self.inner.block_size()
    }

    /// How many bytes there are at present; 0 while it can't be used.
    pub fn capacity(&self) -> u64 {
        self.inner.capacity()
    }

    /// What the controller said of it last (NVM command set specification 1.0, "Identify
    /// Namespace"): when it was opened, or when the controller reported a change.
    pub fn identify(&self) -> Arc<IdentifyNamespace> {
        self.inner.identify()
    }

    /// The largest write in bytes, at any offset that suits its boundary, that a power failure
    /// leaves either wholly done or wholly undone (NAWUPF or AWUPF): at least one logical block.
    pub fn atomic_write_limit(&self) -> u64 {
        self.inner.atomic_write_limit()
    }

    /// Allocates a buffer of `len` bytes that the device reaches without a copy; see
    /// [`Controller::allocate`].
    pub fn allocate(&self, len: usize) -> Result<DmaBuf, Error> {
        self.inner.controller.allocate(len)
    }

    /// Reads `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::Unaligned`] and [`Error::OutOfRange`] before anything is submitted,
    /// [`Error::Command`] with the status when the controller refuses or the media fails, and
    /// those of a controller that is gone. A request that is larger than the controller takes is
    /// split; then it is [`Error::Split`].
    ///
    /// # Cancel safety
    ///
    /// Nothing happens before the first poll. When it is dropped later, the data is lost and the
    /// memory is freed when the device is done with it.
    pub fn read(&self, offset: u64, len: usize) -> Read<'_> {
        Read::new(&self.inner, self.queues(), offset, len)
    }

    /// Reads into `buffer`, all of it, and gives it back.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read); the buffer comes back inside of the error, except when the device
    /// may still write to it.
    ///
    /// # Cancel safety
    ///
    /// Nothing happens before the first poll. When it is dropped later, the buffer is dropped
    /// when the device is done with it.
    pub fn read_into<B: ReadBuffer>(&self, offset: u64, buffer: B) -> ReadInto<'_, B> {
        ReadInto::new(&self.inner, self.queues(), offset, buffer)
    }

    /// Writes `buffer`, all of it, and gives it back.
    ///
    /// The write is durable once a [`flush`](Self::flush) that was first polled after it resolved
    /// has succeeded, or at once with [`fua`](Write::fua). A request that is larger than the
    /// controller takes is split and is not atomic as a whole.
    ///
    /// # Errors
    ///
    /// As [`read_into`](Self::read_into). After an error the blocks hold old or new data.
    ///
    /// # Cancel safety
    ///
    /// Nothing happens before the first poll. When it is dropped later, the write may still reach
    /// the media until [`quiesce`](Self::quiesce) has resolved, and the buffer is dropped when the
    /// device is done with it.
    pub fn write<B: WriteBuffer>(&self, offset: u64, buffer: B) -> Write<'_, B> {
        Write::new(&self.inner, self.queues(), offset, buffer)
    }

    /// Compares what lies at `offset` with `buffer`, all of it, and gives it back if they are equal
    /// (NVM command set specification 1.0, section 3.2.1). The controller reads the buffer.
    ///
    /// A comparison that is larger than the controller takes is split; a write of the same blocks
    /// that is outstanding together with it may come between its parts.
    ///
    /// ```
    /// # #[cfg(feature = "soft")]
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), nvme_async::Error> {
    /// let namespace = nvme_async::open("mem:?size=1M").await?;
    /// let equal = match namespace.compare(0, vec![7; 4096]).await {
    ///     Ok(_) => true,
    ///     Err(error) if error.error.is_compare_failure() => false,
    ///     Err(error) => return Err(error.into()),
    /// };
    /// assert!(!equal);
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "soft"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    ///
    /// One of which [`Error::is_compare_failure`] is true if the data differ;
    /// [`Error::Unsupported`] if the controller has no such command; otherwise as
    /// [`read_into`](Self::read_into).
    ///
    /// # Cancel safety
    ///
    /// Nothing happens before the first poll. When it is dropped later, the buffer is dropped
    /// when the device is done with it.
    pub fn compare<B: WriteBuffer>(&self, offset: u64, buffer: B) -> Compare<'_, B> {
        Compare::new(&self.inner, self.queues(), offset, buffer)
    }

    /// Checks that the device can read the `len` bytes at `offset`, without transferring any (NVM
    /// command set specification 1.0, section 3.2.5).
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if the controller has no such command, and those of
    /// [`read`](Self::read), the first one where the range is larger than the controller takes at
    /// a time.
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, a command that is under way goes on.
    pub async fn verify(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.inner.verify(self.queues(), offset, len).await
    }

    /// Copies the bytes of all `sources`, one after the other, to `destination_offset` and after,
    /// inside of the device (NVM command set specification 1.0, section 3.2.2). It is as durable
    /// as a write. Several commands are used, in turn, where one does not take as much (MSSRL, MCL,
    /// MSRC); so it is not atomic, and a write of a source that is outstanding together with it may
    /// or may not be copied.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if the controller has no such command, and [`Error::Overlap`] if a
    /// source overlaps the destination: what is copied then would depend on the controller.
    /// Otherwise as [`write`](Self::write); an error names the blocks of the
    /// destination, which hold old or new data then, as do those after them.
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, any of the blocks may or may not be copied, until
    /// [`quiesce`](Self::quiesce) has resolved.
    pub async fn copy(&self, sources: &[Range<u64>], destination_offset: u64) -> Result<(), Error> {
        self.inner
            .copy(self.queues(), sources, destination_offset)
            .await
    }

    /// Makes all writes durable that had resolved before its first poll (NVM command set
    /// specification 1.0, "Flush command"). Without a volatile write cache there is nothing to do.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read). After an error nothing is known to be durable.
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, the command goes on.
    pub async fn flush(&self) -> Result<(), Error> {
        self.inner.flush(self.queues()).await
    }

    /// Makes `len` bytes at `offset` read as zeroes, without transferring any where the
    /// controller can (Write Zeroes); otherwise by writing zeroes. It is as durable as a write.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, any of the blocks may or may not become zero,
    /// until [`quiesce`](Self::quiesce) has resolved.
    pub async fn write_zeroes(&self, offset: u64, len: u64, zeroes: Zeroes) -> Result<(), Error> {
        self.inner
            .write_zeroes(self.queues(), offset, len, zeroes)
            .await
    }

    /// Tells the device that the data in `ranges` (bytes) is not needed any more (Dataset
    /// Management, Deallocate). It is a hint: afterwards the blocks hold their old data or what
    /// the controller returns for deallocated blocks.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if the controller has no such command; otherwise as
    /// [`write`](Self::write).
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, any of the ranges may or may not be discarded.
    pub async fn discard(&self, ranges: &[Range<u64>]) -> Result<(), Error> {
        self.inner.discard(self.queues(), ranges).await
    }

    /// Resolves when all commands on the shared queues, or on the one that the handle is
    /// [pinned](Self::pinned) to, that were submitted before its first poll are done, those whose
    /// futures were dropped included. Afterwards no dropped write of theirs reaches the media any more.
    ///
    /// # Errors
    ///
    /// If there are such commands: [`Error::RuntimeGone`] if nothing drives their queue, and the
    /// error of the controller if it has failed without having been stopped. They may still be under
    /// way then. A command that has missed its deadline is waited for as well: it ends with its
    /// recovery.
    ///
    /// # Cancel safety
    ///
    /// Dropping it has no effect on the commands.
    pub async fn quiesce(&self) -> Result<(), Error> {
        self.inner.quiesce(self.queues()).await
    }

    /// A handle with a queue pair of its own, which pays no lock but stays on this thread.
    ///
    /// # Errors
    ///
    /// [`Error::NoFreeQueue`] if all queue pairs that were set apart for this are in use; see
    /// [`OpenOptions::local_queues`](crate::OpenOptions::local_queues).
    pub fn local(&self) -> Result<LocalNamespace, Error> {
        LocalNamespace::new(self.inner.clone())
    }

    /// A handle whose commands all go to one of the [queue pairs](Controller::io_queues) that all
    /// threads share, wherever their futures are polled: to one that the fewest such handles are
    /// pinned to. Clones of it go there too, and it is free when the last of them is dropped.
    ///
    /// It is for servers that keep the commands of one client apart from those of others: a
    /// controller takes turns between submission queues (NVMe base specification 2.0, section 3.4.4),
    /// so that who has a queue pair of its own is not behind whatever others have outstanding. When
    /// there are more such handles than queue pairs, some share one;
    /// [`fair_depth`](Self::fair_depth) is then what each may have outstanding.
    /// [`OpenOptions::queues`](crate::OpenOptions::queues) asks for more of them.
    ///
    /// Handles that are not pinned use the same queue pairs.
    #[must_use]
    pub fn pinned(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            pinned: Some(PinnedQueue::new(self.controller().clone())),
        }
    }

    /// How many commands a [pinned](Self::pinned) handle may have outstanding so that all that are
    /// pinned to the same queue pair can have as many: the depth of the queue pair, divided by their
    /// number at present, and at least 1. Nobody is kept from having more; then commands wait for room,
    /// in the order in which they came. For other handles it is the depth of a queue pair.
    pub fn fair_depth(&self) -> usize {
        match &self.pinned {
            Some(pinned) => pinned.fair_depth(),
            None => self
                .queues()
                .first()
                .map_or(1, |queue| pinned::depth(queue)),
        }
    }

    fn queues(&self) -> &[Arc<SharedQueue>] {
        match &self.pinned {
            Some(pinned) => pinned.queues(),
            None => &self.inner.controller.inner.queues,
        }
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Namespace")
            .field("controller", &self.inner.controller.address())
            .field("nsid", &self.inner.nsid)
            .field("capacity", &self.capacity())
            .field("block_size", &self.block_size())
            .finish_non_exhaustive()
    }
}

impl NamespaceInner {
    pub(crate) fn address(&self) -> &str {
        self.controller.address()
    }

    pub(crate) fn nsid(&self) -> u32 {
        self.nsid
    }

    pub(crate) fn dma(&self) -> &DmaContext {
        &self.controller.inner.dma
    }

    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.controller.inner.timeout
    }

    pub(crate) fn repeats_writes(&self) -> bool {
        self.controller.inner.repeat_writes
    }

    pub(crate) fn has_volatile_cache(&self) -> bool {
        self.controller.inner.identify.has_volatile_write_cache()
    }
}
