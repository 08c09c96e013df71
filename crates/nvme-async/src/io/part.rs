//! One read or write command of a request.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;
use nvme_spec::{Cqe, DataPointer, Sqe, Status};

use super::context::{DmaContext, Flow};
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
    flow: Flow,
    /// Where its data is in the payload.
    range: Range<usize>,
    step: Step<'a>,
    /// Has the payload, which stays where it is while the device does not have it.
    submission: Submission<'a, Q>,
}

enum Step<'a> {
    Prepare,
    /// What could not be done without waiting.
    Later(BoxFuture<'a, (Result<DataPointer, Error>, Holdings)>),
    Submit,
    Over,
}

impl<'a, Q: QueueAccess> Part<'a, Q> {
    pub(crate) fn new(dma: &'a DmaContext, queue: &'a Q, order: Order, payload: Payload) -> Self {
        let holdings = Holdings {
            payload,
            ..Holdings::default()
        };
        let command = Command {
            sqe: order.sqe,
            holdings,
            timeout: order.timeout,
            repeatable: order.repeatable,
        };
        Self {
            dma,
            flow: order.flow,
            range: order.range,
            step: Step::Prepare,
            submission: Submission::new(queue, command),
        }
    }

    /// The command with its data in reach.
    fn ready(&mut self, pointer: DataPointer) {
        let sqe = &mut self.submission.command.sqe;
        *sqe = sqe.with_data(pointer);
        self.step = Step::Submit;
    }

    fn finish(&mut self, result: Result<Cqe, Failed>) -> (End, Payload) {
        self.step = Step::Over;
        let end = match result {
            Ok(cqe) if cqe.status().is_success() => End::Success,
            Ok(cqe) => End::Status(cqe.status()),
            Err(failed) => End::Failed(failed),
        };
        let holdings = &mut self.submission.command.holdings;
        if self.flow == Flow::Read && matches!(end, End::Success) {
            self.dma.collect(holdings, self.range.clone());
        }
        // Mappings of the payload go before the payload goes to the caller.
        (end, holdings.take_payload())
    }
}

impl<Q: QueueAccess> Future for Part<'_, Q> {
    type Output = (End, Payload);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            match &mut this.step {
                Step::Prepare => {
                    let range = this.range.clone();
                    let holdings = &mut this.submission.command.holdings;
                    match this.dma.prepare(this.flow, holdings, range.clone()) {
                        Ok(pointer) => this.ready(pointer),
                        Err(unready) => {
                            let payload = holdings.take_payload();
                            let later = this.dma.prepare_later(this.flow, unready, payload, range);
                            this.step = Step::Later(Box::pin(later));
                        }
                    }
                }
                Step::Later(prepared) => {
                    let (prepared, holdings) = ready!(prepared.as_mut().poll(cx));
                    this.submission.command.holdings = holdings;
                    match prepared {
                        Ok(pointer) => this.ready(pointer),
                        Err(error) => {
                            this.step = Step::Over;
                            let payload = this.submission.command.holdings.take_payload();
                            return Poll::Ready((End::Unsubmitted(error), payload));
                        }
                    }
                }
                Step::Submit => {
                    let result = ready!(Pin::new(&mut this.submission).poll(cx));
                    return Poll::Ready(this.finish(result));
                }
                // As with most futures, polling it again after it resolved never resolves.
                Step::Over => return Poll::Pending,
            }
        }
    }
}
