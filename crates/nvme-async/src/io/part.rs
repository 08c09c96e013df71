//! One read or write command of a request.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::future::BoxFuture;
use nvme_spec::{DataPointer, Status};
use tokio::task::coop::poll_proceed;

use super::context::{DmaContext, Flow};
use super::{Holdings, HoldingsMut, Payload, Reach};
use crate::Error;
use crate::engine::state::{Command, Outcome};
use crate::engine::{Failed, InFlight, QueueAccess};
use crate::rare::Rare;

/// What a command is to do.
#[derive(Clone)]
pub(crate) struct Order {
    /// The command without identifier and data pointer.
    pub(crate) command: Command,
    pub(crate) flow: Flow,
    /// Where its data is in the payload, in bytes.
    pub(crate) range: Range<usize>,
}

/// How a command ended.
pub(crate) enum End {
    Success,
    /// Boxed, since an end goes through many hands.
    Failure(Box<Reason>),
}

/// Why a command did not succeed.
pub(crate) enum Reason {
    Status(Status),
    Failed(Failed),
    /// It was not submitted.
    Unsubmitted(Error),
}

impl From<Outcome> for End {
    #[inline]
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Ok(cqe) if cqe.status().is_success() => Self::Success,
            Ok(cqe) => Reason::Status(cqe.status()).into(),
            Err(failed) => Reason::Failed(failed).into(),
        }
    }
}

impl From<Reason> for End {
    #[cold]
    fn from(reason: Reason) -> Self {
        Self::Failure(Box::new(reason))
    }
}

/// Makes the data of one command reachable, submits it, and takes the data from the bounce buffer
/// if there was one. It resolves to how the command ended, and the payload, which is none if the
/// device may still use it.
///
/// # Cancel safety
///
/// As for [`Course`].
pub(crate) struct Part<'a, Q: QueueAccess> {
    dma: &'a DmaContext,
    queue: &'a Q,
    order: Order,
    payload: Payload,
    was_polled: bool,
    course: Course<'a, Q>,
}

impl<'a, Q: QueueAccess> Part<'a, Q> {
    pub(crate) fn new(dma: &'a DmaContext, queue: &'a Q, order: Order, payload: Payload) -> Self {
        Self {
            dma,
            queue,
            order,
            payload,
            was_polled: false,
            course: Course::default(),
        }
    }
}

impl<Q: QueueAccess> Future for Part<'_, Q> {
    type Output = (End, Payload);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let budget = ready!(poll_proceed(cx));
        let (course, payload) = (&mut this.course, &mut this.payload);
        // Set first: whatever panics, it is not submitted twice.
        let end = match std::mem::replace(&mut this.was_polled, true) {
            false => course.begin(this.dma, this.queue, this.order.clone(), payload, cx),
            true => course.poll(|| (this.queue, this.order.clone()), payload, cx),
        };
        let end = ready!(end);
        budget.made_progress();
        Poll::Ready((end, std::mem::take(&mut this.payload)))
    }
}

/// How far a command is.
///
/// # Cancel safety
///
/// Once it is submitted, its memory stays with the queue until the command is done, whether or not
/// somebody waits for that.
pub(super) struct Course<'a, Q: QueueAccess> {
    /// Makes data reachable, where that could not be done without waiting.
    later: Rare<BoxFuture<'a, (Result<DataPointer, Error>, Holdings)>>,
    in_flight: InFlight<'a, Q>,
}

impl<Q: QueueAccess> Default for Course<'_, Q> {
    fn default() -> Self {
        Self {
            later: Rare::default(),
            in_flight: InFlight::default(),
        }
    }
}

// Here and in what a command passes through afterwards, some functions are always inlined: with its
// arguments and results, a call takes as long as what it does.
impl<'a, Q: QueueAccess> Course<'a, Q> {
    /// Submits the command, once its data can be reached. `payload` is its memory, which the queue has
    /// until the command is done.
    #[inline(always)]
    pub(super) fn begin(
        &mut self,
        dma: &'a DmaContext,
        queue: &'a Q,
        mut order: Order,
        payload: &mut Payload,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        match dma.address(payload, &order.range) {
            Some(pointer) => {
                let sqe = &mut order.command.sqe;
                *sqe = sqe.with_data(pointer);
                self.submit(queue, &order, payload, None, cx)
            }
            None => self.prepare(dma, queue, order, payload, cx),
        }
    }

    /// Goes on with a command that was [begun](Self::begin), until it is done. `order` says again which
    /// queue gets it, which may be another one, and what it is. `payload` is its memory afterwards, if
    /// the device does not use that any more.
    #[inline(always)]
    pub(super) fn poll(
        &mut self,
        order: impl FnOnce() -> (&'a Q, Order),
        payload: &mut Payload,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        if self.later.is_some() {
            let (queue, order) = order();
            return self.go_on(queue, order, payload, cx);
        }
        let mut reach = None;
        let holdings = HoldingsMut {
            reach: &mut reach,
            payload,
        };
        let end = ready!(self.in_flight.poll(holdings, cx));
        if let Some(reach) = reach {
            let (_, order) = order();
            collect(reach, payload, &order, &end);
        }
        Poll::Ready(end)
    }

    /// Makes data reachable, and submits the command if that can be done at once.
    #[inline(never)]
    fn prepare(
        &mut self,
        dma: &'a DmaContext,
        queue: &'a Q,
        order: Order,
        payload: &mut Payload,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        let mut holdings = Holdings::new(std::mem::take(payload));
        match dma.prepare(order.flow, &mut holdings, order.range.clone()) {
            Ok(pointer) => self.submit_prepared(queue, order, pointer, payload, holdings, cx),
            Err(unready) => {
                let (flow, range) = (order.flow, order.range.clone());
                let later = dma.prepare_later(flow, unready, holdings.take_payload(), range);
                *self.later = Some(Box::pin(later));
                self.go_on(queue, order, payload, cx)
            }
        }
    }

    #[cold]
    fn go_on(
        &mut self,
        queue: &'a Q,
        order: Order,
        payload: &mut Payload,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        let Some(later) = &mut *self.later else {
            return Poll::Pending;
        };
        let (prepared, mut holdings) = ready!(later.as_mut().poll(cx));
        self.later.clear();
        match prepared {
            Ok(pointer) => self.submit_prepared(queue, order, pointer, payload, holdings, cx),
            Err(error) => {
                *payload = holdings.take_payload();
                Poll::Ready(Reason::Unsubmitted(error).into())
            }
        }
    }

    #[inline(never)]
    fn submit_prepared(
        &mut self,
        queue: &'a Q,
        mut order: Order,
        pointer: DataPointer,
        payload: &mut Payload,
        holdings: Holdings,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        order.command.sqe = order.command.sqe.with_data(pointer);
        *payload = holdings.payload;
        self.submit(queue, &order, payload, holdings.reach, cx)
    }

    #[inline(always)]
    fn submit(
        &mut self,
        queue: &'a Q,
        order: &Order,
        payload: &mut Payload,
        mut reach: Option<Reach>,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        let holdings = HoldingsMut {
            reach: &mut reach,
            payload,
        };
        let end = ready!(self.in_flight.submit(queue, &order.command, holdings, cx));
        if let Some(reach) = reach {
            collect(reach, payload, order, &end);
        }
        Poll::Ready(end)
    }
}

/// Ends what made a payload reachable, before that goes to the caller, and after copying what a read
/// left in a bounce buffer to where it belongs.
#[inline(never)]
fn collect(reach: Reach, payload: &Payload, order: &Order, end: &End) {
    if order.flow == Flow::Read && matches!(end, End::Success) {
        reach.collect(payload, order.range.clone());
    }
}
