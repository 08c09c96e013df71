//! The future of one command, and the future that waits for all commands so far.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::task::coop::poll_proceed;

use super::access::Access;
use super::state::{Aftermath, Command, Failure, Outcome, Progress, Refusal};

/// Submits a command when first polled, and resolves when it is done.
///
/// # Cancel safety
///
/// Dropping it before the first poll does nothing. Dropping it later gives up the result only:
/// the command goes on, and its memory stays with the queue until the device is done with it.
#[must_use = "futures do nothing unless polled"]
pub(crate) struct Submission<'a, Q: Access> {
    queue: &'a Q,
    step: Step,
}

enum Step {
    Start(Command),
    Waiting { key: usize },
    Over,
}

impl<'a, Q: Access> Submission<'a, Q> {
    pub(crate) fn new(queue: &'a Q, command: Command) -> Self {
        Self {
            queue,
            step: Step::Start(command),
        }
    }

    fn start(&mut self, mut command: Command, cx: &Context<'_>) -> Poll<Outcome> {
        loop {
            let mut aftermath = Aftermath::default();
            let mut unsubmitted = Some(command);
            let started = self.queue.with(|state| {
                let command = unsubmitted.take()?;
                Some(state.start(command, cx.waker(), &mut aftermath))
            });
            aftermath.run();
            match started.flatten() {
                Some(Ok(Progress::Done(outcome))) => return Poll::Ready(outcome),
                Some(Ok(Progress::Waiting { key })) => {
                    self.step = Step::Waiting { key };
                    return Poll::Pending;
                }
                Some(Err(Refusal::Failed(failure, command))) => {
                    return Poll::Ready((Err(failure), Some(command.holdings)));
                }
                Some(Err(Refusal::NoReaper(refused))) => {
                    if let Err(failure) = self.queue.spawn_reaper() {
                        return Poll::Ready((Err(failure), Some(refused.holdings)));
                    }
                    command = refused;
                }
                None => {
                    let holdings = unsubmitted.map(|command| command.holdings);
                    return Poll::Ready((Err(Failure::Closed), holdings));
                }
            }
        }
    }

    fn wait(&mut self, key: usize, cx: &Context<'_>) -> Poll<Outcome> {
        let polled = self.queue.with(|state| {
            let outcome = state.poll_operation(key, cx.waker());
            (outcome, state.has_reaper())
        });
        match polled {
            None => Poll::Ready((Err(Failure::Closed), None)),
            Some((Some(outcome), _)) => Poll::Ready(outcome),
            Some((None, true)) => {
                self.step = Step::Waiting { key };
                Poll::Pending
            }
            Some((None, false)) => match self.queue.spawn_reaper() {
                Ok(()) => {
                    self.step = Step::Waiting { key };
                    Poll::Pending
                }
                Err(failure) => {
                    abandon(self.queue, key);
                    Poll::Ready((Err(failure), None))
                }
            },
        }
    }
}

impl<Q: Access> Future for Submission<'_, Q> {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let budget = ready!(poll_proceed(cx));
        let this = self.get_mut();
        let polled = match std::mem::replace(&mut this.step, Step::Over) {
            Step::Start(command) => this.start(command, cx),
            Step::Waiting { key } => this.wait(key, cx),
            // As with most futures, polling it again after it resolved never resolves.
            Step::Over => Poll::Pending,
        };
        if polled.is_ready() {
            budget.made_progress();
        }
        polled
    }
}

impl<Q: Access> Drop for Submission<'_, Q> {
    fn drop(&mut self) {
        if let Step::Waiting { key } = self.step {
            abandon(self.queue, key);
        }
    }
}

fn abandon<Q: Access>(queue: &Q, key: usize) {
    let mut aftermath = Aftermath::default();
    queue.with(|state| state.abandon(key, &mut aftermath));
    aftermath.run();
}

/// Resolves when all commands that one queue pair held at the first poll are done, those whose
/// futures were dropped included.
///
/// # Cancel safety
///
/// Dropping it has no effect on the commands.
#[must_use = "futures do nothing unless polled"]
pub(crate) struct Drain<'a, Q: Access> {
    queue: &'a Q,
    mark: Option<u64>,
}

impl<'a, Q: Access> Drain<'a, Q> {
    pub(crate) fn new(queue: &'a Q) -> Self {
        Self { queue, mark: None }
    }
}

impl<Q: Access> Future for Drain<'_, Q> {
    type Output = Result<(), Failure>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let mut mark = this.mark;
        let polled = this.queue.with(|state| {
            let mark = *mark.get_or_insert_with(|| state.drain_mark());
            (state.is_drained(mark, cx.waker()), state.has_reaper())
        });
        this.mark = mark;
        match polled {
            None | Some((true, _)) => Poll::Ready(Ok(())),
            Some((false, true)) => Poll::Pending,
            Some((false, false)) => match this.queue.spawn_reaper() {
                Ok(()) => Poll::Pending,
                Err(failure) => Poll::Ready(Err(failure)),
            },
        }
    }
}
