//! A namespace on a queue pair that one thread has for itself.

use std::fmt;
use std::ops::Range;
use std::rc::Rc;
use std::slice;
use std::sync::Arc;

use super::{Namespace, NamespaceInner, Zeroes};
use crate::Error;
use crate::engine::LocalQueue;
use crate::io::{Compare, Read, ReadBuffer, ReadInto, Write, WriteBuffer};
use crate::memory::DmaBuf;

/// An open namespace, for the tasks of one thread.
///
/// It has a queue pair of its own and takes no lock. It works inside of a
/// [`LocalSet`](tokio::task::LocalSet) or a [`LocalRuntime`](tokio::runtime::LocalRuntime); its
/// operations are those of [`Namespace`], with the same errors and cancellation behaviour.
///
/// Clones share the queue pair. It goes back to the controller when the last of them is dropped.
#[derive(Clone)]
pub struct LocalNamespace {
    inner: Arc<NamespaceInner>,
    lease: Rc<Lease>,
}

struct Lease {
    queue: Rc<LocalQueue>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.queue.give_back();
    }
}

impl LocalNamespace {
    pub(super) fn new(inner: Arc<NamespaceInner>) -> Result<Self, Error> {
        inner.controller.check_open()?;
        let queues = &inner.controller.inner.local_queues;
        let queue = queues.iter().find_map(LocalQueue::take).ok_or_else(|| Error::NoFreeQueue {
            address: inner.address().to_owned(),
            reason: format!(
                "all {} queue pairs for LocalNamespaces are in use; OpenOptions::local_queues asks \
                 for more",
                queues.len()
            ),
        })?;
        Ok(Self {
            lease: Rc::new(Lease { queue }),
            inner,
        })
    }

    /// The handle for all threads.
    pub fn shared(&self) -> Namespace {
        Namespace {
            inner: self.inner.clone(),
            pinned: None,
        }
    }

    /// As [`Namespace::block_size`].
    pub fn block_size(&self) -> u32 {
        self.inner.block_size()
    }

    /// As [`Namespace::capacity`].
    pub fn capacity(&self) -> u64 {
        self.inner.capacity()
    }

    /// As [`Namespace::allocate`].
    pub fn allocate(&self, len: usize) -> Result<DmaBuf, Error> {
        self.inner.controller.allocate(len)
    }

    /// As [`Namespace::read`].
    pub fn read(&self, offset: u64, len: usize) -> Read<'_, Rc<LocalQueue>> {
        Read::new(&self.inner, self.queues(), offset, len)
    }

    /// As [`Namespace::read_into`].
    pub fn read_into<B: ReadBuffer>(
        &self,
        offset: u64,
        buffer: B,
    ) -> ReadInto<'_, B, Rc<LocalQueue>> {
        ReadInto::new(&self.inner, self.queues(), offset, buffer)
    }

    /// As [`Namespace::write`].
    pub fn write<B: WriteBuffer>(&self, offset: u64, buffer: B) -> Write<'_, B, Rc<LocalQueue>> {
        Write::new(&self.inner, self.queues(), offset, buffer)
    }

    /// As [`Namespace::compare`].
    pub fn compare<B: WriteBuffer>(
        &self,
        offset: u64,
        buffer: B,
    ) -> Compare<'_, B, Rc<LocalQueue>> {
        Compare::new(&self.inner, self.queues(), offset, buffer)
    }

    /// As [`Namespace::verify`].
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, a command that is under way goes on.
    pub async fn verify(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.inner.verify(self.queues(), offset, len).await
    }

    /// As [`Namespace::copy`].
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, any of the blocks may or may not be copied.
    pub async fn copy(&self, sources: &[Range<u64>], destination_offset: u64) -> Result<(), Error> {
        self.inner
            .copy(self.queues(), sources, destination_offset)
            .await
    }

    /// As [`Namespace::flush`].
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, the command goes on.
    pub async fn flush(&self) -> Result<(), Error> {
        self.inner.flush(self.queues()).await
    }

    /// As [`Namespace::write_zeroes`].
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, any of the blocks may or may not become zero.
    pub async fn write_zeroes(&self, offset: u64, len: u64, zeroes: Zeroes) -> Result<(), Error> {
        self.inner
            .write_zeroes(self.queues(), offset, len, zeroes)
            .await
    }

    /// As [`Namespace::discard`].
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, any of the ranges may or may not be discarded.
    pub async fn discard(&self, ranges: &[Range<u64>]) -> Result<(), Error> {
        self.inner.discard(self.queues(), ranges).await
    }

    /// As [`Namespace::quiesce`], for the commands of this handle and its clones.
    ///
    /// # Cancel safety
    ///
    /// Dropping it has no effect on the commands.
    pub async fn quiesce(&self) -> Result<(), Error> {
        self.inner.quiesce(self.queues()).await
    }

    fn queues(&self) -> &[Rc<LocalQueue>] {
        slice::from_ref(&self.lease.queue)
    }
}

impl fmt::Debug for LocalNamespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LocalNamespace")
            .field(&self.shared())
            .finish()
    }
}
