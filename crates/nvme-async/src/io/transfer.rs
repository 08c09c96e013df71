//! Reads and writes of any length.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{FuturesUnordered, Stream};
use nvme_spec::nvm;

use super::context::Flow;
use super::part::{End, Order, Part};
use super::payload::{Convert, Payload, ReadBuffer, WriteBuffer};
use super::split::{fits, split};
use crate::Error;
use crate::engine::{QueueAccess, SharedQueue};
use crate::error::{IoError, SplitError};
use crate::memory::DmaBuf;
use crate::namespace::NamespaceInner;

/// Commands of one split request that are under way at the same time.
const MAX_PARTS_IN_FLIGHT: usize = 32;

/// A read or write that has not begun.
struct Request<'a, Q> {
    namespace: &'a Arc<NamespaceInner>,
    queues: &'a [Q],
    flow: Flow,
    offset: u64,
    payload: Payload,
    fua: bool,
    atomic: bool,
    timeout: Option<Duration>,
    repeatable: bool,
}

/// The future of a request, whatever its buffer's type.
struct Transfer<'a, Q: QueueAccess> {
    stage: Stage<'a, Q>,
}

enum Stage<'a, Q: QueueAccess> {
    Start(Request<'a, Q>),
    One {
        namespace: &'a Arc<NamespaceInner>,
        blocks: Range<u64>,
        flow: Flow,
        part: Part<'a, Q>,
    },
    Many(Box<Parts<'a, Q>>),
    Over,
}

impl<'a, Q: QueueAccess> Transfer<'a, Q> {
    fn request(&mut self) -> Option<&mut Request<'a, Q>> {
        match &mut self.stage {
            Stage::Start(request) => Some(request),
            _ => None,
        }
    }

    fn begin(mut request: Request<'a, Q>) -> Result<Stage<'a, Q>, (Error, Payload)> {
        let namespace = request.namespace;
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
                flow: request.flow,
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
        let sqe = match self.flow {
            Flow::Read => nvm::read(nsid, part.start, count, self.fua),
            Flow::Write => nvm::write(nsid, part.start, count, self.fua),
        };
        let first = ((part.start - blocks.start) << shift) as usize;
        let last = ((part.end - blocks.start) << shift) as usize;
        Order {
            sqe,
            flow: self.flow,
            range: first..last,
            timeout: self.timeout,
            repeatable: self.repeatable,
        }
    }
}

impl<Q: QueueAccess> Future for Transfer<'_, Q> {
    type Output = (Result<(), Error>, Option<Payload>);

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
                        Err((error, payload)) => return Poll::Ready((Err(error), Some(payload))),
                    }
                }
                Stage::One {
                    namespace,
                    blocks,
                    flow,
                    part,
                } => {
                    let (end, payload) = ready!(Pin::new(part).poll(cx));
                    let result = namespace.result(end, name(*flow), Some(blocks.clone()));
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
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(Result<(), Error>, Option<Payload>)> {
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
                        namespace, flow, ..
                    } = self.request;
                    self.results[index] = Some(namespace.result(end, name(flow), Some(blocks)));
                }
                None => return Poll::Ready(self.finish()),
            }
        }
    }

    fn finish(&mut self) -> (Result<(), Error>, Option<Payload>) {
        let payload = std::mem::replace(&mut self.payload, Arc::new(Payload::None));
        // Not the only reference if the device may still use the memory for one of the parts.
        let payload = Arc::try_unwrap(payload).ok();
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

fn name(flow: Flow) -> &'static str {
    match flow {
        Flow::Read => "Read",
        Flow::Write => "Write",
    }
}

fn give_back<B: Convert>(
    (result, payload): (Result<(), Error>, Option<Payload>),
) -> Result<B, IoError<B>> {
    let buffer = payload.and_then(B::from_payload);
    match (result, buffer) {
        (Ok(()), Some(buffer)) => Ok(buffer),
        (Err(error), buffer) => Err(IoError { error, buffer }),
        // A success returns the payload that the request was made with.
        (Ok(()), None) => unreachable!("a successful request lost its buffer"),
    }
}

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
        let stage = Stage::Start(Request {
            namespace: self.namespace,
            queues: self.queues,
            flow: Flow::Read,
            offset: self.offset,
            payload: Payload::Dma(buffer),
            fua: false,
            atomic: false,
            timeout: self.timeout,
            repeatable: true,
        });
        Ok(Transfer { stage })
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

impl<'a, B: ReadBuffer, Q: QueueAccess> ReadInto<'a, B, Q> {
    pub(crate) fn new(
        namespace: &'a Arc<NamespaceInner>,
        queues: &'a [Q],
        offset: u64,
        buffer: B,
    ) -> Self {
        Self {
            transfer: whole(namespace, queues, Flow::Read, offset, buffer.into_payload()),
            buffer: std::marker::PhantomData,
        }
    }

    /// Sets the time that each command may take, in place of the controller's default. It has no
    /// effect after the first poll.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        if let Some(request) = self.transfer.request() {
            request.timeout = Some(timeout);
        }
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
            transfer: whole(
                namespace,
                queues,
                Flow::Write,
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
        if let Some(request) = self.transfer.request() {
            request.timeout = Some(timeout);
        }
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

fn whole<'a, Q: QueueAccess>(
    namespace: &'a Arc<NamespaceInner>,
    queues: &'a [Q],
    flow: Flow,
    offset: u64,
    payload: Payload,
) -> Transfer<'a, Q> {
    let timeout = namespace.timeout();
    let request = Request {
        namespace,
        queues,
        flow,
        offset,
        payload,
        fua: false,
        atomic: false,
        timeout,
        repeatable: flow == Flow::Read || namespace.repeats_writes(),
    };
    Transfer {
        stage: Stage::Start(request),
    }
}
