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
    transfer: Transfer<'a, Q>,
}

impl<'a, Q: QueueAccess> Read<'a, Q> {
    pub(crate) fn new(
        namespace: &'a Arc<NamespaceInner>,
        queues: &'a [Q],
        offset: u64,
        len: usize,
    ) -> Self {
        let (operation, payload) = (Operation::Read, Payload::None);
        Self {
            transfer: Transfer::new(namespace, queues, operation, offset, len, payload),
        }
    }

    /// Sets the time that each command may take, in place of the controller's default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.transfer.request.timeout = Some(timeout);
        self
    }
}

impl<Q: QueueAccess> Future for Read<'_, Q> {
    type Output = Result<Bytes, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let transfer = &mut self.get_mut().transfer;
        transfer.allocate().map_err(|error| *error)?;
        let buffer: DmaBuf = ready!(poll(transfer, cx))?;
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
            transfer: transfer(namespace, queues, Operation::Read, offset, buffer),
            buffer: std::marker::PhantomData,
        }
    }

    /// Sets the time that each command may take, in place of the controller's default. It has no
    /// effect after the first poll.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.transfer.request.timeout = Some(timeout);
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
            transfer: transfer(namespace, queues, Operation::Write, offset, buffer),
            buffer: std::marker::PhantomData,
        }
    }

    /// Makes the write durable before it resolves (Force Unit Access). On a controller without a
    /// volatile write cache every write is, and nothing changes. No effect after the first poll.
    pub fn fua(mut self) -> Self {
        let request = &mut self.transfer.request;
        request.fua = request.namespace.has_volatile_cache();
        self
    }

    /// Refuses the write, with [`Error::NotAtomic`], unless the controller promises that after a
    /// power failure either all or nothing of it is on the media. See
    /// [`Namespace::atomic_write_limit`](crate::Namespace::atomic_write_limit). No effect after
    /// the first poll.
    pub fn atomic(mut self) -> Self {
        self.transfer.request.atomic = true;
        self
    }

    /// Allows the write to be sent again although the device may have executed it: after an error
    /// status that says that it is worth trying, and when it was outstanding during a reset
    /// ([`OpenOptions::retries`](crate::OpenOptions::retries)). The caller sees to it that no other
    /// write of the same blocks is outstanding. No effect after the first poll.
    pub fn repeatable(mut self) -> Self {
        self.transfer.request.repeatable = true;
        self
    }

    /// Sets the time that each command may take, in place of the controller's default. It has no
    /// effect after the first poll.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.transfer.request.timeout = Some(timeout);
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
            transfer: transfer(namespace, queues, Operation::Compare, offset, buffer),
            buffer: std::marker::PhantomData,
        }
    }

    /// Sets the time that each command may take, in place of the controller's default. It has no
    /// effect after the first poll.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.transfer.request.timeout = Some(timeout);
        self
    }
}

impl<B: ReadBuffer, Q: QueueAccess> Future for ReadInto<'_, B, Q> {
    type Output = Result<B, IoError<B>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        poll(&mut self.get_mut().transfer, cx)
    }
}

impl<B: WriteBuffer, Q: QueueAccess> Future for Write<'_, B, Q> {
    type Output = Result<B, IoError<B>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        poll(&mut self.get_mut().transfer, cx)
    }
}

impl<B: WriteBuffer, Q: QueueAccess> Future for Compare<'_, B, Q> {
    type Output = Result<B, IoError<B>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        poll(&mut self.get_mut().transfer, cx)
    }
}

fn transfer<'a, B: Convert, Q: QueueAccess>(
    namespace: &'a Arc<NamespaceInner>,
    queues: &'a [Q],
    operation: Operation,
    offset: u64,
    buffer: B,
) -> Transfer<'a, Q> {
    let payload = buffer.into_payload();
    let len = payload.len();
    Transfer::new(namespace, queues, operation, offset, len, payload)
}

/// Goes on with a request, whose buffer comes back.
#[inline]
fn poll<B: Convert, Q: QueueAccess>(
    transfer: &mut Transfer<'_, Q>,
    cx: &mut Context<'_>,
) -> Poll<Result<B, IoError<B>>> {
    if let Err(error) = ready!(transfer.poll(cx)) {
        return failed(*error, transfer.take_payload());
    }
    match B::from_payload(transfer.take_payload()) {
        Some(buffer) => Poll::Ready(Ok(buffer)),
        // A success returns the payload that the request was made with.
        None => unreachable!("a successful request lost its buffer"),
    }
}

#[cold]
#[inline(never)]
fn failed<B: Convert>(error: Error, payload: Payload) -> Poll<Result<B, IoError<B>>> {
    Poll::Ready(Err(IoError {
        error,
        buffer: B::from_payload(payload),
    }))
}
