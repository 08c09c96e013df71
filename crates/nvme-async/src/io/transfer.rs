//! Requests of any length: from one to as many commands as it takes.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::stream::{FuturesUnordered, Stream};
use nvme_spec::nvm;

use super::context::Flow;
use super::part::{End, Order, Part};
use super::payload::Payload;
use super::split::{fits, split};
use crate::Error;
use crate::engine::QueueAccess;
use crate::error::SplitError;
use crate::namespace::NamespaceInner;

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

/// A request that has not begun.
pub(super) struct Request<'a, Q> {
    pub(super) namespace: &'a Arc<NamespaceInner>,
    queues: &'a [Q],
    operation: Operation,
    offset: u64,
    payload: Payload,
    pub(super) fua: bool,
    pub(super) atomic: bool,
    pub(super) timeout: Option<Duration>,
    pub(super) repeatable: bool,
}

/// The future of a request, whatever its buffer's type.
pub(super) struct Transfer<'a, Q: QueueAccess> {
    stage: Stage<'a, Q>,
}

enum Stage<'a, Q: QueueAccess> {
    Start(Request<'a, Q>),
    One {
        namespace: &'a Arc<NamespaceInner>,
        blocks: Range<u64>,
        operation: Operation,
        part: Part<'a, Q>,
    },
    Many(Box<Parts<'a, Q>>),
    Over,
}

impl<'a, Q: QueueAccess> Transfer<'a, Q> {
    pub(super) fn new(
        namespace: &'a Arc<NamespaceInner>,
        queues: &'a [Q],
        operation: Operation,
        offset: u64,
        payload: Payload,
    ) -> Self {
        let request = Request {
            namespace,
            queues,
            operation,
            offset,
            payload,
            fua: false,
            atomic: false,
            timeout: namespace.timeout(),
            repeatable: operation != Operation::Write || namespace.repeats_writes(),
        };
        Self {
            stage: Stage::Start(request),
        }
    }

    /// The request, to be changed before it begins.
    pub(super) fn request(&mut self) -> Option<&mut Request<'a, Q>> {
        match &mut self.stage {
            Stage::Start(request) => Some(request),
            _ => None,
        }
    }

    fn begin(mut request: Request<'a, Q>) -> Result<Stage<'a, Q>, (Error, Payload)> {
        let namespace = request.namespace;
        if request.operation == Operation::Compare
            && let Err(error) = namespace.require("Compare", |commands| commands.compare())
        {
            return Err((error, request.payload));
        }
        let len = request.payload.len() as u64;
        let blocks = match namespace.blocks(request.offset, len) {
            Ok(blocks) => blocks,
            Err(error) => return Err((error, request.payload)),
        };
        if request.atomic
            && let Err(error) = namespace.check_atomic(&blocks)
        {
            return Err((error, request.payload));
        }
        let queue = crate::controller::choose_queue(request.queues);
        let limits = namespace.transfer_limits();
        if fits(&blocks, limits) {
            let order = request.order(&blocks, &blocks);
            let part = Part::new(namespace.dma(), queue, order, request.payload);
            return Ok(Stage::One {
                namespace,
                blocks,
                operation: request.operation,
                part,
            });
        }
        let ranges: Vec<_> = split(blocks.clone(), limits).collect();
        let payload = Arc::new(std::mem::take(&mut request.payload));
        Ok(Stage::Many(Box::new(Parts {
            request,
            queue,
            blocks,
            results: ranges.iter().map(|_| None).collect(),
            ranges,
            next: 0,
            running: FuturesUnordered::new(),
            payload,
        })))
    }
}

impl<Q> Request<'_, Q> {
    /// The command for `part` of `blocks`.
    fn order(&self, blocks: &Range<u64>, part: &Range<u64>) -> Order {
        let shift = self.namespace.block_shift();
        let count = (part.end - part.start) as u32;
        let nsid = self.namespace.nsid();
        let sqe = match self.operation {
            Operation::Read => nvm::read(nsid, part.start, count, self.fua),
            Operation::Write => nvm::write(nsid, part.start, count, self.fua),
            Operation::Compare => nvm::compare(nsid, part.start, count, self.fua),
        };
        let first = ((part.start - blocks.start) << shift) as usize;
        let last = ((part.end - blocks.start) << shift) as usize;
        Order {
            sqe,
            flow: self.operation.flow(),
            range: first..last,
            timeout: self.timeout,
            repeatable: self.repeatable,
        }
    }
}

impl<Q: QueueAccess> Future for Transfer<'_, Q> {
    type Output = (Result<(), Error>, Payload);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            match &mut this.stage {
                Stage::Start(_) => {
                    let Stage::Start(request) = std::mem::replace(&mut this.stage, Stage::Over)
                    else {
                        return Poll::Pending;
                    };
                    match Self::begin(request) {
                        Ok(stage) => this.stage = stage,
                        Err((error, payload)) => return Poll::Ready((Err(error), payload)),
                    }
                }
                Stage::One {
                    namespace,
                    blocks,
                    operation,
                    part,
                } => {
                    let (end, payload) = ready!(Pin::new(part).poll(cx));
                    let result = namespace.result(end, operation.name(), Some(blocks.clone()));
                    this.stage = Stage::Over;
                    return Poll::Ready((result, payload));
                }
                Stage::Many(parts) => {
                    let done = ready!(parts.poll(cx));
                    this.stage = Stage::Over;
                    return Poll::Ready(done);
                }
                // As with most futures, polling it again after it resolved never resolves.
                Stage::Over => return Poll::Pending,
            }
        }
    }
}

/// A request that takes several commands.
struct Parts<'a, Q: QueueAccess> {
    /// Without its payload.
    request: Request<'a, Q>,
    queue: &'a Q,
    blocks: Range<u64>,
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

impl<Q: QueueAccess> Parts<'_, Q> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(Result<(), Error>, Payload)> {
        loop {
            while self.running.len() < MAX_PARTS_IN_FLIGHT
                && let Some(range) = self.ranges.get(self.next)
            {
                let order = self.request.order(&self.blocks, range);
                let payload = Payload::Shared(self.payload.clone());
                let part = Part::new(self.request.namespace.dma(), self.queue, order, payload);
                self.running.push(Numbered {
                    index: self.next,
                    part,
                });
                self.next += 1;
            }
            match ready!(Pin::new(&mut self.running).poll_next(cx)) {
                Some((index, end)) => {
                    let blocks = self.ranges[index].clone();
                    let Request {
                        namespace,
                        operation,
                        ..
                    } = self.request;
                    self.results[index] =
                        Some(namespace.result(end, operation.name(), Some(blocks)));
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
