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
            course: Course::default(),
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
    /// same at each call but for the queue. `payload` is its memory before the first call, and, if the
    /// device does not use that any more, after the last one.
    #[inline]
    pub(super) fn poll(
        &mut self,
        dma: &'a DmaContext,
        order: impl FnOnce() -> (&'a Q, Order),
        payload: &mut Payload,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        let budget = ready!(poll_proceed(cx));
        let end = match self.stage {
            Stage::Start => {
                // Set first: whatever panics, it is not submitted twice.
                self.stage = Stage::Submitted;
                let (queue, mut order) = order();
                match dma.address(payload, &order.range) {
                    Some(pointer) => {
                        let sqe = &mut order.command.sqe;
                        *sqe = sqe.with_data(pointer);
                        ready!(self.submit(queue, &order, payload, None, cx))
                    }
                    None => ready!(self.prepare(dma, queue, order, payload, cx)),
                }
            }
            Stage::Later => {
                let (queue, order) = order();
                ready!(self.go_on(queue, order, payload, cx))
            }
            Stage::Submitted => {
                let mut reach = None;
                let holdings = HoldingsMut {
                    reach: &mut reach,
                    payload,
                };
                let end = ready!(self.in_flight.poll(holdings, cx)).into();
                if let Some(reach) = reach {
                    let (_, order) = order();
                    collect(reach, payload, &order, &end);
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
                self.later = Some(Box::pin(later));
                self.stage = Stage::Later;
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
        let Some(later) = &mut self.later else {
            return Poll::Pending;
        };
        let (prepared, mut holdings) = ready!(later.as_mut().poll(cx));
        self.later = None;
        self.stage = Stage::Submitted;
        match prepared {
            Ok(pointer) => self.submit_prepared(queue, order, pointer, payload, holdings, cx),
            Err(error) => {
                *payload = holdings.take_payload();
                Poll::Ready(End::Unsubmitted(Box::new(error)))
            }
        }
    }

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

    #[inline]
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
        let outcome = ready!(self.in_flight.submit(queue, &order.command, holdings, cx));
        let end = outcome.into();
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
