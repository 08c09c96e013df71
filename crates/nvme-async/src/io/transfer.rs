//! Requests of any length: from one to as many commands as it takes.

use std::future::Future;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::stream::{FuturesUnordered, Stream};
use nvme_spec::nvm;
use tokio::task::coop::poll_proceed;

use super::context::Flow;
use super::part::{Course, End, Order, Part};
use super::payload::Payload;
use super::split::{fits, split};
use crate::Error;
use crate::controller::choose_queue;
use crate::engine::QueueAccess;
use crate::engine::state::Command;
use crate::error::SplitError;
use crate::namespace::NamespaceInner;
use crate::rare::Rare;

/// Commands of one split request that are under way at the same time.
const MAX_PARTS_IN_FLIGHT: usize = 32;

/// What a request does with its blocks and its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Compare,
}

impl Operation {
    /// Which way the data goes.
    fn flow(self) -> Flow {
        match self {
            Self::Read => Flow::Read,
            Self::Write | Self::Compare => Flow::Write,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Read => "Read",
            Self::Write => "Write",
            Self::Compare => "Compare",
        }
    }
}

/// What is asked for, but for the buffer.
pub(super) struct Request<'a, Q> {
    pub(super) namespace: &'a Arc<NamespaceInner>,
    queues: &'a [Q],
    operation: Operation,
    pub(super) fua: bool,
    pub(super) atomic: bool,
    pub(super) repeatable: bool,
    offset: u64,
    len: usize,
    pub(super) timeout: Option<Duration>,
}

/// A request of any kind, whatever its buffer's type.
///
/// It is made where the caller keeps it, and nothing of it is moved but the buffer, to the queue and
/// back.
pub(super) struct Transfer<'a, Q: QueueAccess> {
    /// Without effect after the first poll.
    pub(super) request: Request<'a, Q>,
    /// Dropped by hand: it is seldom there then, as with [`Rare`].
    payload: ManuallyDrop<Payload>,
    stage: Stage,
    course: Course<'a, Q>,
    parts: Rare<Box<Parts<'a, Q>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Start,
    /// One command is enough.
    One,
    /// It takes several, or has failed before there was one.
    Many,
}

impl<'a, Q: QueueAccess> Transfer<'a, Q> {
    /// A request of `len` bytes. The payload has as many, unless it is [allocated](Self::allocate) later.
    #[inline]
    pub(super) fn new(
        namespace: &'a Arc<NamespaceInner>,
        queues: &'a [Q],
        operation: Operation,
        offset: u64,
        len: usize,
        payload: Payload,
    ) -> Self {
        Self {
            request: Request {
                namespace,
                queues,
                operation,
                fua: false,
                atomic: false,
                repeatable: operation != Operation::Write || namespace.repeats_writes(),
                offset,
                len,
                timeout: namespace.timeout(),
            },
            payload: ManuallyDrop::new(payload),
            stage: Stage::Start,
            course: Course::default(),
            parts: Rare::default(),
        }
    }

    /// Allocates the payload of a read, before the first poll.
    pub(super) fn allocate(&mut self) -> Result<(), Box<Error>> {
        if self.stage == Stage::Start {
            let Request { namespace, len, .. } = self.request;
            // Before memory is allocated for a length that may be absurd.
            self.request.check()?;
            *self.payload = Payload::Dma(namespace.dma().read_buffer(len)?);
        }
        Ok(())
    }

    /// The payload, when the request is done; none if the device may still use it.
    #[inline]
    pub(super) fn take_payload(&mut self) -> Payload {
        std::mem::take(&mut self.payload)
    }

    /// Resolves when all of it is done.
    #[inline]
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Box<Error>>> {
        if self.stage == Stage::Many {
            return self.poll_parts(cx);
        }
        let budget = ready!(poll_proceed(cx));
        let end = if self.stage == Stage::One {
            let request = &self.request;
            let order = || {
                (
                    choose_queue(request.queues),
                    request.order(&request.blocks()),
                )
            };
            self.course.poll(order, &mut self.payload, cx)
        } else if let Some(blocks) = self.begin()? {
            let request = &self.request;
            let (queue, order) = (choose_queue(request.queues), request.order(&blocks));
            let dma = request.namespace.dma();
            self.course.begin(dma, queue, order, &mut self.payload, cx)
        } else {
            drop(budget);
            return self.poll_parts(cx);
        };
        let end = ready!(end);
        budget.made_progress();
        match end {
            End::Success => Poll::Ready(Ok(())),
            end => Poll::Ready(Ok(self.request.result(end, self.request.blocks())?)),
        }
    }

    /// Checks the request; returns its blocks if one command is enough for them.
    #[inline]
    fn begin(&mut self) -> Result<Option<Range<u64>>, Box<Error>> {
        // Set first: whatever panics, nothing is submitted twice.
        self.stage = Stage::Many;
        let blocks = self.request.check()?;
        let limits = self.request.namespace.transfer_limits();
        if fits(&blocks, limits) {
            self.stage = Stage::One;
            return Ok(Some(blocks));
        }
        let queue = choose_queue(self.request.queues);
        let ranges = split(blocks, limits).collect();
        *self.parts = Some(Box::new(Parts::new(queue, ranges, self.take_payload())));
        Ok(None)
    }

    #[cold]
    fn poll_parts(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Box<Error>>> {
        // As with most futures, polling it again after it resolved never resolves.
        let Some(parts) = &mut *self.parts else {
            return Poll::Pending;
        };
        let (result, payload) = ready!(parts.poll(&self.request, cx));
        *self.payload = payload;
        self.parts.clear();
        Poll::Ready(Ok(result?))
    }
}

impl<Q: QueueAccess> Drop for Transfer<'_, Q> {
    #[inline]
    fn drop(&mut self) {
        if !matches!(*self.payload, Payload::None) {
            drop(self.take_payload());
        }
    }
}

impl<Q> Request<'_, Q> {
    /// The blocks, if the namespace has them and does what is asked for.
    #[inline]
    fn check(&self) -> Result<Range<u64>, Box<Error>> {
        let namespace = self.namespace;
        if self.operation == Operation::Compare {
            namespace.require("Compare", |commands| commands.compare())?;
        }
        let blocks = namespace.blocks(self.offset, self.len as u64)?;
        if self.atomic {
            namespace.check_atomic(&blocks)?;
        }
        Ok(blocks)
    }

    /// The blocks of a request that was checked.
    #[inline]
    fn blocks(&self) -> Range<u64> {
        let shift = self.namespace.block_shift();
        self.offset >> shift..(self.offset + self.len as u64) >> shift
    }

    /// The command for `part`, all blocks or some of them.
    #[inline]
    fn order(&self, part: &Range<u64>) -> Order {
        let shift = self.namespace.block_shift();
        let count = (part.end - part.start) as u32;
        let nsid = self.namespace.nsid();
        let sqe = match self.operation {
            Operation::Read => nvm::read(nsid, part.start, count, self.fua),
            Operation::Write => nvm::write(nsid, part.start, count, self.fua),
            Operation::Compare => nvm::compare(nsid, part.start, count, self.fua),
        };
        let first = ((part.start << shift) - self.offset) as usize;
        let len = (count as usize) << shift;
        let command = Command {
            sqe,
            timeout: self.timeout,
            repeatable: self.repeatable,
        };
        Order {
            command,
            flow: self.operation.flow(),
            range: first..first + len,
        }
    }

    #[cold]
    fn result(&self, end: End, blocks: Range<u64>) -> Result<(), Error> {
        self.namespace
            .result(end, self.operation.name(), Some(blocks))
    }
}

/// A request that takes several commands.
struct Parts<'a, Q: QueueAccess> {
    queue: &'a Q,
    ranges: Vec<Range<u64>>,
    results: Vec<Option<Result<(), Error>>>,
    /// The first range without a command.
    next: usize,
    running: FuturesUnordered<Numbered<'a, Q>>,
    payload: Arc<Payload>,
}

struct Numbered<'a, Q: QueueAccess> {
    index: usize,
    part: Part<'a, Q>,
}

impl<Q: QueueAccess> Future for Numbered<'_, Q> {
    type Output = (usize, End);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        // The part's share of the payload is dropped here, once the device is done with it.
        let (end, _) = ready!(Pin::new(&mut this.part).poll(cx));
        Poll::Ready((this.index, end))
    }
}

impl<'a, Q: QueueAccess> Parts<'a, Q> {
    fn new(queue: &'a Q, ranges: Vec<Range<u64>>, payload: Payload) -> Self {
        Self {
            queue,
            results: ranges.iter().map(|_| None).collect(),
            ranges,
            next: 0,
            running: FuturesUnordered::new(),
            payload: Arc::new(payload),
        }
    }

    fn poll(
        &mut self,
        request: &Request<'a, Q>,
        cx: &mut Context<'_>,
    ) -> Poll<(Result<(), Error>, Payload)> {
        loop {
            while self.running.len() < MAX_PARTS_IN_FLIGHT
                && let Some(range) = self.ranges.get(self.next)
            {
                let order = request.order(range);
                let payload = Payload::Shared(self.payload.clone());
                let part = Part::new(request.namespace.dma(), self.queue, order, payload);
                self.running.push(Numbered {
                    index: self.next,
                    part,
                });
                self.next += 1;
            }
            match ready!(Pin::new(&mut self.running).poll_next(cx)) {
                Some((index, end)) => {
                    let blocks = self.ranges[index].clone();
                    self.results[index] = Some(request.result(end, blocks));
                }
                None => return Poll::Ready(self.finish()),
            }
        }
    }

    fn finish(&mut self) -> (Result<(), Error>, Payload) {
        let payload = std::mem::replace(&mut self.payload, Arc::new(Payload::None));
        // Not the only reference if the device may still use the memory for one of the parts.
        let payload = Arc::try_unwrap(payload).unwrap_or_default();
        let parts: Vec<_> = std::mem::take(&mut self.ranges)
            .into_iter()
            .zip(std::mem::take(&mut self.results))
            .filter_map(|(blocks, result)| Some((blocks, result?)))
            .collect();
        if parts.iter().all(|(_, result)| result.is_ok()) {
            (Ok(()), payload)
        } else {
            (Err(Box::new(SplitError { parts }).into()), payload)
        }
    }
}
