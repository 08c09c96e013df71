//! One read or write command of a request.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::future::BoxFuture;
use nvme_spec::{DataPointer, Status};
use tokio::task::coop::poll_proceed;

use super::context::{DmaContext, Flow};
use super::{Holdings, Payload};
use crate::Error;
use crate::engine::state::{Command, Outcome};
use crate::engine::{Failed, InFlight, QueueAccess};

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
    Status(Status),
    Failed(Failed),
    /// It was not submitted.
    Unsubmitted(Box<Error>),
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
    holdings: Holdings,
    course: Course<'a, Q>,
}

impl<'a, Q: QueueAccess> Part<'a, Q> {
    pub(crate) fn new(dma: &'a DmaContext, queue: &'a Q, order: Order, payload: Payload) -> Self {
        Self {
            dma,
            queue,
            order,
            holdings: Holdings::new(payload),
            course: Course::default(),
        }
    }
}

impl<Q: QueueAccess> Future for Part<'_, Q> {
    type Output = (End, Payload);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let order = || (this.queue, this.order.clone());
        let end = ready!(this.course.poll(this.dma, order, &mut this.holdings, cx));
        Poll::Ready((end, this.holdings.take_payload()))
    }
}

/// How far a command is.
///
/// # Cancel safety
///
/// Once it is submitted, its memory stays with the queue until the command is done, whether or not
/// somebody waits for that.
pub(super) struct Course<'a, Q: QueueAccess> {
    stage: Stage,
    /// Makes data reachable, where that could not be done without waiting.
    later: Option<BoxFuture<'a, (Result<DataPointer, Error>, Holdings)>>,
    in_flight: InFlight<'a, Q>,
}

#[derive(Clone, Copy)]
enum Stage {
    /// It was not polled.
    Start,
    /// Its data is being made reachable.
    Later,
    /// The queue has it, or it is over.
    Submitted,
}

impl<Q: QueueAccess> Default for Course<'_, Q> {
    fn default() -> Self {
        Self {
            stage: Stage::Start,
            later: None,
            in_flight: InFlight::default(),
        }
    }
}

impl<'a, Q: QueueAccess> Course<'a, Q> {
    /// Goes on with the command, until it is done. `order` says which queue gets it and what it is, the
    /// same at each call but for the queue. `holdings` have the payload before the first call, and, if
    /// the device does not use it any more, after the last one.
    #[inline]
    pub(super) fn poll(
        &mut self,
        dma: &'a DmaContext,
        order: impl FnOnce() -> (&'a Q, Order),
        holdings: &mut Holdings,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        let budget = ready!(poll_proceed(cx));
        let end = match self.stage {
            Stage::Start => {
                // Set first: whatever panics, it is not submitted twice.
                self.stage = Stage::Submitted;
                let (queue, mut order) = order();
                match dma.address(&holdings.payload, &order.range) {
                    Some(pointer) => {
                        let sqe = &mut order.command.sqe;
                        *sqe = sqe.with_data(pointer);
                        ready!(self.submit(dma, queue, &order, holdings, cx))
                    }
                    None => ready!(self.prepare(dma, queue, order, holdings, cx)),
                }
            }
            Stage::Later => {
                let (queue, order) = order();
                ready!(self.go_on(dma, queue, order, holdings, cx))
            }
            Stage::Submitted => {
                let end = ready!(self.in_flight.poll(holdings, cx)).into();
                if holdings.reach.is_some() {
                    let (_, order) = order();
                    collect(dma, &order, &end, holdings);
                }
                end
            }
        };
        budget.made_progress();
        Poll::Ready(end)
    }

    /// Makes data reachable, and submits the command if that can be done at once.
    #[inline(never)]
    fn prepare(
        &mut self,
        dma: &'a DmaContext,
        queue: &'a Q,
        mut order: Order,
        holdings: &mut Holdings,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        let range = order.range.clone();
        match dma.prepare(order.flow, holdings, range.clone()) {
            Ok(pointer) => {
                order.command.sqe = order.command.sqe.with_data(pointer);
                self.submit(dma, queue, &order, holdings, cx)
            }
            Err(unready) => {
                let payload = holdings.take_payload();
                let later = dma.prepare_later(order.flow, unready, payload, range);
                self.later = Some(Box::pin(later));
                self.stage = Stage::Later;
                self.go_on(dma, queue, order, holdings, cx)
            }
        }
    }

    #[cold]
    fn go_on(
        &mut self,
        dma: &'a DmaContext,
        queue: &'a Q,
        mut order: Order,
        holdings: &mut Holdings,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        let Some(later) = &mut self.later else {
            return Poll::Pending;
        };
        let (prepared, prepared_holdings) = ready!(later.as_mut().poll(cx));
        *holdings = prepared_holdings;
        self.later = None;
        self.stage = Stage::Submitted;
        match prepared {
            Ok(pointer) => {
                order.command.sqe = order.command.sqe.with_data(pointer);
                self.submit(dma, queue, &order, holdings, cx)
            }
            Err(error) => {
                holdings.reach = None;
                Poll::Ready(End::Unsubmitted(Box::new(error)))
            }
        }
    }

    fn submit(
        &mut self,
        dma: &'a DmaContext,
        queue: &'a Q,
        order: &Order,
        holdings: &mut Holdings,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        let outcome = ready!(self.in_flight.submit(queue, &order.command, holdings, cx));
        let end = outcome.into();
        if holdings.reach.is_some() {
            collect(dma, order, &end, holdings);
        }
        Poll::Ready(end)
    }
}

/// Ends what made a payload reachable, after copying what a read left in a bounce buffer to where it
/// belongs.
#[inline(never)]
fn collect(dma: &DmaContext, order: &Order, end: &End, holdings: &mut Holdings) {
    if order.flow == Flow::Read && matches!(end, End::Success) {
        dma.collect(holdings, order.range.clone());
    }
    // Mappings of the payload go before the payload goes to the caller.
    holdings.reach = None;
}
