//! One read or write command of a request.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;
use nvme_spec::{Sqe, Status};

use super::context::{DmaContext, Flow, Ready};
use super::{Holdings, Payload};
use crate::Error;
use crate::engine::state::Command;
use crate::engine::{Failed, QueueAccess, Submission};

/// What a command is to do.
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

/// Makes the data of one command reachable, submits it, and takes the data from the bounce buffer
/// if there was one. It resolves to how the command ended, and the payload, which is none if the
/// device may still use it.
///
/// # Cancel safety
///
/// As for [`Submission`]: the payload stays with the queue until the command is done.
pub(crate) struct Part<'a, Q: QueueAccess> {
    dma: &'a DmaContext,
    queue: &'a Q,
    order: Order,
    step: Step<'a, Q>,
}

enum Step<'a, Q: QueueAccess> {
    Prepare(Payload),
    /// What could not be done without waiting.
    Later(BoxFuture<'a, Result<Ready, (Error, Payload)>>),
    Submit(Submission<'a, Q>),
    Over,
}

impl<'a, Q: QueueAccess> Part<'a, Q> {
    pub(crate) fn new(dma: &'a DmaContext, queue: &'a Q, order: Order, payload: Payload) -> Self {
        Self {
            dma,
            queue,
            order,
            step: Step::Prepare(payload),
        }
    }

    fn submit(&self, (pointer, holdings): Ready) -> Step<'a, Q> {
        let sqe = self.order.sqe.with_data(pointer);
        let command = Command {
            sqe,
            holdings,
            timeout: self.order.timeout,
            repeatable: self.order.repeatable,
        };
        Step::Submit(Submission::new(self.queue, command))
    }

    fn finish(
        &self,
        result: Result<nvme_spec::Cqe, Failed>,
        mut holdings: Holdings,
    ) -> (End, Payload) {
        let end = match result {
            Ok(cqe) if cqe.status().is_success() => End::Success,
            Ok(cqe) => End::Status(cqe.status()),
            Err(failed) => End::Failed(failed),
        };
        if self.order.flow == Flow::Read && matches!(end, End::Success) {
            self.dma.collect(&mut holdings, self.order.range.clone());
        }
        let Holdings {
            mapped,
            list,
            bounce,
            payload,
        } = holdings;
        // Mappings of the payload go before the payload goes to the caller.
        drop((mapped, list, bounce));
        (end, payload)
    }
}

impl<Q: QueueAccess> Future for Part<'_, Q> {
    type Output = (End, Payload);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            this.step = match &mut this.step {
                Step::Prepare(payload) => {
                    let payload = std::mem::take(payload);
                    let range = this.order.range.clone();
                    match this.dma.prepare(this.order.flow, payload, range) {
                        Ok(ready) => this.submit(ready),
                        Err(unready) => {
                            let range = this.order.range.clone();
                            let flow = this.order.flow;
                            Step::Later(Box::pin(this.dma.prepare_later(flow, unready, range)))
                        }
                    }
                }
                Step::Later(prepared) => match ready!(prepared.as_mut().poll(cx)) {
                    Ok(ready) => this.submit(ready),
                    Err((error, payload)) => {
                        this.step = Step::Over;
                        return Poll::Ready((End::Unsubmitted(error), payload));
                    }
                },
                Step::Submit(submission) => {
                    let result = ready!(Pin::new(&mut *submission).poll(cx));
                    let holdings = submission.take_holdings();
                    this.step = Step::Over;
                    return Poll::Ready(this.finish(result, holdings));
                }
                // As with most futures, polling it again after it resolved never resolves.
                Step::Over => return Poll::Pending,
            };
        }
    }
}
