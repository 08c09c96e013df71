//! The future of one command, and the future that waits for all commands so far.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::task::coop::poll_proceed;

use super::access::Access;
use super::state::{Aftermath, Command, Failed, Failure, Here, Outcome, Progress, Refusal};
use crate::io::Holdings;

/// Submits a command when first polled, and resolves when it is done. What the command holds is with
/// the queue meanwhile, and [comes back](Self::take_holdings).
///
/// # Cancel safety
///
/// Dropping it before the first poll does nothing. Dropping it later gives up the result only:
/// the command goes on, and its memory stays with the queue until the device is done with it.
#[must_use = "futures do nothing unless polled"]
pub(crate) struct Submission<'a, Q: Access> {
    queue: &'a Q,
    /// May be changed before the first poll. The queue has what it holds from then on until it is
    /// done.
    pub(crate) command: Command,
    step: Step,
}

#[derive(Clone, Copy)]
enum Step {
    Start,
    Waiting { key: usize },
    Over,
}

/// What a look at an operation found.
enum Polled {
    Done(Outcome),
    Waiting { driven: bool },
    WakesAnother,
}

impl<'a, Q: Access> Submission<'a, Q> {
    pub(crate) fn new(queue: &'a Q, command: Command) -> Self {
        Self {
            queue,
            command,
            step: Step::Start,
        }
    }

    /// What the command holds, when it is done; nothing if the device may still use it.
    pub(crate) fn take_holdings(&mut self) -> Holdings {
        std::mem::take(&mut self.command.holdings)
    }

    fn start(&mut self, cx: &Context<'_>) -> Poll<Outcome> {
        let here = Here::now();
        if let Some(polled) = self.queue.polled() {
            let kind = self.command.kind();
            if polled.with(|state| state.expects(kind)) == Some(true) {
                self.queue = polled;
            }
        }
        loop {
            let mut aftermath = Aftermath::default();
            // Cloned here, since that too may run arbitrary code.
            let mut waker = cx.waker().clone();
            let command = &mut self.command;
            let now = Instant::now();
            let started = self.queue.with(|state| match state.refusal(here) {
                Some(refusal) => Err(refusal),
                None => Ok(state.start(command, &mut waker, here, now, &mut aftermath)),
            });
            aftermath.run();
            match started {
                Some(Ok(Progress::Done(outcome))) => return Poll::Ready(outcome),
                Some(Ok(Progress::Waiting { key })) => {
                    self.step = Step::Waiting { key };
                    return Poll::Pending;
                }
                Some(Err(Refusal::Failed(failure))) => return Poll::Ready(Err(failure.into())),
                Some(Err(Refusal::NoReaper)) => {
                    if let Err(failure) = self.queue.spawn_reaper() {
                        return Poll::Ready(Err(failure.into()));
                    }
                }
                None => return Poll::Ready(Err(Failure::Closed.into())),
            }
        }
    }

    fn wait(&mut self, key: usize, cx: &Context<'_>) -> Poll<Outcome> {
        let mut fresh = None;
        let here = Here::now();
        let driven = loop {
            let holdings = &mut self.command.holdings;
            let polled = self
                .queue
                .with(|state| match state.take_outcome(key, holdings) {
                    Some(outcome) => Polled::Done(outcome),
                    None if state.will_wake(key, cx.waker(), &mut fresh) => Polled::Waiting {
                        driven: state.has_reaper(here),
                    },
                    None => Polled::WakesAnother,
                });
            match polled {
                None => {
                    let late = self.queue.late_outcome(key, &mut self.command.holdings);
                    let closed = || Err(Failure::Closed.told(true));
                    return Poll::Ready(late.unwrap_or_else(closed));
                }
                Some(Polled::Done(outcome)) => return Poll::Ready(outcome),
                Some(Polled::Waiting { driven }) => break driven,
                Some(Polled::WakesAnother) => fresh = Some(cx.waker().clone()),
            }
        };
        if !driven && let Err(failure) = self.queue.spawn_reaper() {
            abandon(self.queue, key);
            return Poll::Ready(Err(failure.told(true)));
        }
        self.step = Step::Waiting { key };
        Poll::Pending
    }
}

impl<Q: Access> Future for Submission<'_, Q> {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let budget = ready!(poll_proceed(cx));
        let this = self.get_mut();
        let polled = match std::mem::replace(&mut this.step, Step::Over) {
            Step::Start => this.start(cx),
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
    let lives = queue.with(|state| state.abandon(key, &mut aftermath));
    aftermath.run();
    if lives.is_none() {
        let _ = queue.late_outcome(key, &mut Holdings::default());
    }
}

/// Resolves when all commands that were started on one queue pair before the first poll are done,
/// those whose futures were dropped included.
///
/// # Cancel safety
///
/// Dropping it has no effect on the commands.
#[must_use = "futures do nothing unless polled"]
pub(crate) struct Drain<'a, Q: Access> {
    queue: &'a Q,
    key: Option<usize>,
}

impl<'a, Q: Access> Drain<'a, Q> {
    pub(crate) fn new(queue: &'a Q) -> Self {
        Self { queue, key: None }
    }
}

impl<Q: Access> Future for Drain<'_, Q> {
    type Output = Result<(), Failed>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let mut waker = Some(cx.waker().clone());
        let here = Here::now();
        let polled = this.queue.with(|state| {
            let key = *this.key.get_or_insert_with(|| state.begin_drain());
            (state.poll_drain(key, &mut waker), state.has_reaper(here))
        });
        match polled {
            None => Poll::Ready(Ok(())),
            Some((Some(done), _)) => Poll::Ready(done),
            Some((None, true)) => Poll::Pending,
            Some((None, false)) => match this.queue.spawn_reaper() {
                Ok(()) => Poll::Pending,
                Err(failure) => Poll::Ready(Err(failure.told(true))),
            },
        }
    }
}

impl<Q: Access> Drop for Drain<'_, Q> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            // Its waker is dropped when the queue is not borrowed any more.
            self.queue.with(|state| state.end_drain(key));
        }
    }
}
