//! The futures of reads, writes and comparisons.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;

use super::payload::{Convert, Payload, ReadBuffer, WriteBuffer};
use super::transfer::{Operation, Transfer};
use crate::Error;
use crate::engine::{QueueAccess, SharedQueue};
use crate::error::IoError;
use crate::memory::DmaBuf;
use crate::namespace::NamespaceInner;

/// A read into memory of the driver's choice. See [`Namespace::read`](crate::Namespace::read).
#[must_use = "futures do nothing unless polled"]
pub struct Read<'a, Q: QueueAccess = Arc<SharedQueue>> {
    start: ReadStart<'a, Q>,
    transfer: Option<Transfer<'a, Q>>,
}

struct ReadStart<'a, Q> {
    namespace: &'a Arc<NamespaceInner>,
    queues: &'a [Q],
    offset: u64,
    len: usize,
    timeout: Option<Duration>,
}

impl<'a, Q: QueueAccess> Read<'a, Q> {
    pub(crate) fn new(
        namespace: &'a Arc<NamespaceInner>,
        queues: &'a [Q],
        offset: u64,
        len: usize,
    ) -> Self {
        let timeout = namespace.timeout();
        Self {
            start: ReadStart {
                namespace,
                queues,
                offset,
                len,
                timeout,
            },
            transfer: None,
        }
    }

    /// Sets the time that each command may take, in place of the controller's default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.start.timeout = Some(timeout);
        self
    }
}

impl<'a, Q: QueueAccess> ReadStart<'a, Q> {
    fn begin(&self) -> Result<Transfer<'a, Q>, Error> {
        // Before memory is allocated for a length that may be absurd.
        self.namespace.blocks(self.offset, self.len as u64)?;
        let buffer = self.namespace.dma().read_buffer(self.len)?;
        let mut transfer = Transfer::new(
            self.namespace,
            self.queues,
            Operation::Read,
            self.offset,
            Payload::Dma(buffer),
        );
        set_timeout(&mut transfer, self.timeout);
        Ok(transfer)
    }
}

impl<Q: QueueAccess> Future for Read<'_, Q> {
    type Output = Result<Bytes, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let transfer = match &mut this.transfer {
            Some(transfer) => transfer,
            None => this.transfer.insert(this.start.begin()?),
        };
        let done = ready!(Pin::new(transfer).poll(cx));
        let buffer: DmaBuf = give_back(done)?;
        Poll::Ready(Ok(buffer.into()))
    }
}

/// A read into a buffer of the caller's. See
/// [`Namespace::read_into`](crate::Namespace::read_into).
#[must_use = "futures do nothing unless polled"]
pub struct ReadInto<'a, B, Q: QueueAccess = Arc<SharedQueue>> {
    transfer: Transfer<'a, Q>,
    buffer: std::marker::PhantomData<fn() -> B>,
}

/// A write. See [`Namespace::write`](crate::Namespace::write).
#[must_use = "futures do nothing unless polled"]
pub struct Write<'a, B, Q: QueueAccess = Arc<SharedQueue>> {
    transfer: Transfer<'a, Q>,
    buffer: std::marker::PhantomData<fn() -> B>,
}

/// A comparison. See [`Namespace::compare`](crate::Namespace::compare).
#[must_use = "futures do nothing unless polled"]
pub struct Compare<'a, B, Q: QueueAccess = Arc<SharedQueue>> {
    transfer: Transfer<'a, Q>,
    buffer: std::marker::PhantomData<fn() -> B>,
}

impl<'a, B: ReadBuffer, Q: QueueAccess> ReadInto<'a, B, Q> {
    pub(crate) fn new(
        namespace: &'a Arc<NamespaceInner>,
        queues: &'a [Q],
        offset: u64,
        buffer: B,
    ) -> Self {
        Self {
            transfer: Transfer::new(
                namespace,
                queues,
                Operation::Read,
                offset,
                buffer.into_payload(),
            ),
            buffer: std::marker::PhantomData,
        }
    }

    /// Sets the time that each command may take, in place of the controller's default. It has no
    /// effect after the first poll.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        set_timeout(&mut self.transfer, Some(timeout));
        self
    }
}

impl<'a, B: WriteBuffer, Q: QueueAccess> Write<'a, B, Q> {
    pub(crate) fn new(
        namespace: &'a Arc<NamespaceInner>,
        queues: &'a [Q],
        offset: u64,
        buffer: B,
    ) -> Self {
        Self {
            transfer: Transfer::new(
                namespace,
                queues,
                Operation::Write,
                offset,
                buffer.into_payload(),
            ),
            buffer: std::marker::PhantomData,
        }
    }

    /// Makes the write durable before it resolves (Force Unit Access). On a controller without a
    /// volatile write cache every write is, and nothing changes. No effect after the first poll.
    pub fn fua(mut self) -> Self {
        if let Some(request) = self.transfer.request() {
            request.fua = request.namespace.has_volatile_cache();
        }
        self
    }

    /// Refuses the write, with [`Error::NotAtomic`], unless the controller promises that after a
    /// power failure either all or nothing of it is on the media. See
    /// [`Namespace::atomic_write_limit`](crate::Namespace::atomic_write_limit). No effect after
    /// the first poll.
    pub fn atomic(mut self) -> Self {
        if let Some(request) = self.transfer.request() {
            request.atomic = true;
        }
        self
    }

    /// Allows the write to be sent again although the device may have executed it: after an error
    /// status that says that it is worth trying, and when it was outstanding during a reset
    /// ([`OpenOptions::retries`](crate::OpenOptions::retries)). The caller sees to it that no other
    /// write of the same blocks is outstanding. No effect after the first poll.
    pub fn repeatable(mut self) -> Self {
        if let Some(request) = self.transfer.request() {
            request.repeatable = true;
        }
        self
    }

    /// Sets the time that each command may take, in place of the controller's default. It has no
    /// effect after the first poll.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        set_timeout(&mut self.transfer, Some(timeout));
        self
    }
}

impl<'a, B: WriteBuffer, Q: QueueAccess> Compare<'a, B, Q> {
    pub(crate) fn new(
        namespace: &'a Arc<NamespaceInner>,
        queues: &'a [Q],
        offset: u64,
        buffer: B,
    ) -> Self {
        Self {
            transfer: Transfer::new(
                namespace,
                queues,
                Operation::Compare,
                offset,
                buffer.into_payload(),
            ),
            buffer: std::marker::PhantomData,
        }
    }

    /// Sets the time that each command may take, in place of the controller's default. It has no
    /// effect after the first poll.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        set_timeout(&mut self.transfer, Some(timeout));
        self
    }
}

impl<B: ReadBuffer, Q: QueueAccess> Future for ReadInto<'_, B, Q> {
    type Output = Result<B, IoError<B>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.get_mut().transfer)
            .poll(cx)
            .map(give_back)
    }
}

impl<B: WriteBuffer, Q: QueueAccess> Future for Write<'_, B, Q> {
    type Output = Result<B, IoError<B>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.get_mut().transfer)
            .poll(cx)
            .map(give_back)
    }
}

impl<B: WriteBuffer, Q: QueueAccess> Future for Compare<'_, B, Q> {
    type Output = Result<B, IoError<B>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.get_mut().transfer)
            .poll(cx)
            .map(give_back)
    }
}

fn set_timeout<Q: QueueAccess>(transfer: &mut Transfer<'_, Q>, timeout: Option<Duration>) {
    if let Some(request) = transfer.request() {
        request.timeout = timeout;
    }
}

fn give_back<B: Convert>((result, payload): (Result<(), Error>, Payload)) -> Result<B, IoError<B>> {
    match (result, B::from_payload(payload)) {
        (Ok(()), Some(buffer)) => Ok(buffer),
        (Err(error), buffer) => Err(IoError { error, buffer }),
        // A success returns the payload that the request was made with.
        (Ok(()), None) => unreachable!("a successful request lost its buffer"),
    }
}
