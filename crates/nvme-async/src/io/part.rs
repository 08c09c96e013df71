//! One read or write command of a request.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;
use nvme_spec::{DataPointer, Sqe, Status};
use tokio::task::coop::poll_proceed;

use super::context::{DmaContext, Flow};
use super::{Holdings, Payload};
use crate::Error;
use crate::engine::state::{Command, Outcome};
use crate::engine::{Accepted, Failed, QueueAccess, Submitted, submit};

/// What a command is to do.
#[derive(Clone)]
pub(crate) struct Order {
    /// The command without identifier and data pointer.
    pub(crate) sqe: Sqe,
    pub(crate) flow: Flow,
    /// Where its data is in the payload, in bytes.
    pub(crate) range: Range<usize>,
    pub(crate) timeout: Option<Duration>,
    /// Whether it may be sent again although the device may have executed it.
    pub(crate) repeatable: bool,
}

/// How a command ended.
pub(crate) enum End {
    Success,
    Status(Status),
    Failed(Failed),
    /// It was not submitted.
    Unsubmitted(Error),
}

impl From<Outcome> for End {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Ok(cqe) if cqe.status().is_success() => Self::Success,
            Ok(cqe) => Self::Status(cqe.status()),
            Err(failed) => Self::Failed(failed),
        }
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
    course: Course<'a, Q>,
}

impl<'a, Q: QueueAccess> Part<'a, Q> {
    pub(crate) fn new(dma: &'a DmaContext, queue: &'a Q, order: Order, payload: Payload) -> Self {
        Self {
            dma,
            queue,
            order,
            payload,
            course: Course::Start,
        }
    }
}

impl<Q: QueueAccess> Future for Part<'_, Q> {
    type Output = (End, Payload);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let order = || (this.queue, this.order.clone());
        let end = ready!(this.course.poll(this.dma, order, &mut this.payload, cx));
        Poll::Ready((end, std::mem::take(&mut this.payload)))
    }
}

/// How far a command is.
///
/// # Cancel safety
///
/// Once it is submitted, the payload stays with the queue until the command is done, whether or not
/// somebody waits for that.
pub(super) enum Course<'a, Q: QueueAccess> {
    /// It was not polled.
    Start,
    /// Its data is being made reachable, which could not be done without waiting.
    Later(BoxFuture<'a, (Result<DataPointer, Error>, Holdings)>),
    /// The queue has it.
    Accepted(Accepted<'a, Q>),
    Over,
}

impl<'a, Q: QueueAccess> Course<'a, Q> {
    /// Goes on with the command, until it is done. `order` says what it is and which queue gets it,
    /// the same at each call but for the queue. The payload is the caller's at the beginning and, if
    /// the device does not use it any more, at the end.
    #[inline]
    pub(super) fn poll(
        &mut self,
        dma: &'a DmaContext,
        order: impl FnOnce() -> (&'a Q, Order),
        payload: &mut Payload,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        let budget = ready!(poll_proceed(cx));
        let end = match self {
            Self::Start => {
                let (queue, order) = order();
                ready!(self.start(dma, queue, order, payload, cx))
            }
            Self::Later(_) => {
                let (queue, order) = order();
                ready!(self.go_on(dma, queue, order, payload, cx))
            }
            Self::Accepted(accepted) => {
                let mut holdings = Holdings::default();
                let end = ready!(accepted.poll(&mut holdings, cx)).into();
                if holdings.reach.is_some() {
                    let (_, order) = order();
                    collect(dma, &order, &end, &mut holdings);
                }
                // Mappings of the payload go before the payload goes to the caller.
                *payload = holdings.take_payload();
                end
            }
            // As with most futures, polling it again after it resolved never resolves.
            Self::Over => return Poll::Pending,
        };
        *self = Self::Over;
        budget.made_progress();
        Poll::Ready(end)
    }

    #[inline]
    fn start(
        &mut self,
        dma: &'a DmaContext,
        queue: &'a Q,
        order: Order,
        payload: &mut Payload,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        // Whatever panics, it is not submitted twice.
        *self = Self::Over;
        let mut command = Command {
            sqe: order.sqe,
            holdings: Holdings::new(std::mem::take(payload)),
            timeout: order.timeout,
            repeatable: order.repeatable,
        };
        let holdings = &mut command.holdings;
        match dma.prepare(order.flow, holdings, order.range.clone()) {
            Ok(pointer) => {
                command.sqe = command.sqe.with_data(pointer);
                self.submit(dma, queue, &order, &mut command, payload, cx)
            }
            Err(unready) => {
                let range = order.range.clone();
                let later = dma.prepare_later(order.flow, unready, holdings.take_payload(), range);
                *self = Self::Later(Box::pin(later));
                self.go_on(dma, queue, order, payload, cx)
            }
        }
    }

    #[cold]
    fn go_on(
        &mut self,
        dma: &'a DmaContext,
        queue: &'a Q,
        order: Order,
        payload: &mut Payload,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        let Self::Later(prepared) = self else {
            return Poll::Pending;
        };
        let (prepared, mut holdings) = ready!(prepared.as_mut().poll(cx));
        *self = Self::Over;
        match prepared {
            Ok(pointer) => {
                let mut command = Command {
                    sqe: order.sqe.with_data(pointer),
                    holdings,
                    timeout: order.timeout,
                    repeatable: order.repeatable,
                };
                self.submit(dma, queue, &order, &mut command, payload, cx)
            }
            Err(error) => {
                *payload = holdings.take_payload();
                Poll::Ready(End::Unsubmitted(error))
            }
        }
    }

    #[inline]
    fn submit(
        &mut self,
        dma: &'a DmaContext,
        queue: &'a Q,
        order: &Order,
        command: &mut Command,
        payload: &mut Payload,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        match submit(queue, command, cx) {
            Submitted::Accepted(accepted) => {
                *self = Self::Accepted(accepted);
                Poll::Pending
            }
            Submitted::Done(outcome) => {
                let end = outcome.into();
                collect(dma, order, &end, &mut command.holdings);
                *payload = command.holdings.take_payload();
                Poll::Ready(end)
            }
        }
    }
}

/// Copies what a read left in a bounce buffer, if there is one, to where it belongs.
fn collect(dma: &DmaContext, order: &Order, end: &End, holdings: &mut Holdings) {
    if order.flow == Flow::Read && matches!(end, End::Success) {
        dma.collect(holdings, order.range.clone());
    }
}
