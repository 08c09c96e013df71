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
    /// The queue has what it holds from the first poll on until it is done.
    command: Command,
    step: Step<'a, Q>,
}

enum Step<'a, Q: Access> {
    Start,
    Waiting(Accepted<'a, Q>),
    Over,
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
}

impl<Q: Access> Future for Submission<'_, Q> {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let budget = ready!(poll_proceed(cx));
        let this = self.get_mut();
        let polled = match &mut this.step {
            Step::Start => {
                // A waker that panics must not have it submitted again, without its memory.
                this.step = Step::Over;
                match submit(this.queue, &mut this.command, cx) {
                    Submitted::Done(outcome) => Poll::Ready(outcome),
                    Submitted::Accepted(accepted) => {
                        this.step = Step::Waiting(accepted);
                        Poll::Pending
                    }
                }
            }
            Step::Waiting(accepted) => accepted.poll(&mut this.command.holdings, cx),
            // As with most futures, polling it again after it resolved never resolves.
            Step::Over => Poll::Pending,
        };
        if polled.is_ready() {
            this.step = Step::Over;
            budget.made_progress();
        }
        polled
    }
}

/// What a queue did with a command.
pub(crate) enum Submitted<'a, Q: Access> {
    /// It is done, or was refused; what it held is back in it.
    Done(Outcome),
    /// The queue has it, and what it held.
    Accepted(Accepted<'a, Q>),
}

/// A command that a queue has accepted, until its outcome is taken. Dropping it gives that up.
pub(crate) struct Accepted<'a, Q: Access> {
    queue: &'a Q,
    /// Nothing when it is over.
    key: Option<usize>,
}

/// What a look at an operation without an outcome found.
enum Polled {
    Done(Outcome),
    Waiting,
    WakesAnother,
}

/// Submits a command, whose task is woken when it is done.
pub(crate) fn submit<'a, Q: Access>(
    mut queue: &'a Q,
    command: &mut Command,
    cx: &Context<'_>,
) -> Submitted<'a, Q> {
    let here = Here::now();
    if let Some(polled) = queue.polled() {
        let kind = command.kind();
        if polled.with(|state| state.expects(kind)) == Some(true) {
            queue = polled;
        }
    }
    loop {
        let mut aftermath = Aftermath::default();
        // Cloned here, since that too may run arbitrary code.
        let mut waker = cx.waker().clone();
        let now = Instant::now();
        let started = queue.with(|state| match state.refusal(here) {
            Some(refusal) => Err(refusal),
            None => Ok(state.start(command, &mut waker, here, now, &mut aftermath)),
        });
        aftermath.run();
        let failure = match started {
            Some(Ok(Progress::Done(outcome))) => return Submitted::Done(outcome),
            Some(Ok(Progress::Waiting { key })) => {
                let key = Some(key);
                return Submitted::Accepted(Accepted { queue, key });
            }
            Some(Err(Refusal::Failed(failure))) => failure,
            Some(Err(Refusal::NoReaper)) => match queue.spawn_reaper() {
                Ok(()) => continue,
                Err(failure) => failure,
            },
            None => Failure::Closed,
        };
        return Submitted::Done(Err(failure.into()));
    }
}

impl<Q: Access> Accepted<'_, Q> {
    /// Resolves when the command is done, once. What it held is in `holdings` then, which are empty
    /// before, unless the device may still use it.
    #[inline]
    pub(crate) fn poll(&mut self, holdings: &mut Holdings, cx: &Context<'_>) -> Poll<Outcome> {
        let Some(key) = self.key else {
            return Poll::Pending;
        };
        let outcome = self.queue.with(|state| state.take_outcome(key, holdings));
        let outcome = match outcome {
            Some(Some(outcome)) => outcome,
            Some(None) => ready!(self.wait(key, holdings, cx)),
            None => self.late_outcome(key, holdings),
        };
        self.key = None;
        Poll::Ready(outcome)
    }

    /// Sees to it that the task is woken, and that somebody drives the queue.
    #[cold]
    fn wait(&mut self, key: usize, holdings: &mut Holdings, cx: &Context<'_>) -> Poll<Outcome> {
        let here = Here::now();
        let mut fresh = None;
        let driven = loop {
            let polled = self.queue.with(|state| {
                let polled = match state.take_outcome(key, holdings) {
                    Some(outcome) => Polled::Done(outcome),
                    None if state.will_wake(key, cx.waker(), &mut fresh) => Polled::Waiting,
                    None => Polled::WakesAnother,
                };
                (polled, state.has_reaper(here))
            });
            match polled {
                None => return Poll::Ready(self.late_outcome(key, holdings)),
                Some((Polled::Done(outcome), _)) => return Poll::Ready(outcome),
                Some((Polled::Waiting, driven)) => break driven,
                Some((Polled::WakesAnother, _)) => fresh = Some(cx.waker().clone()),
            }
        };
        if !driven && let Err(failure) = self.queue.spawn_reaper() {
            abandon(self.queue, key);
            return Poll::Ready(Err(failure.told(true)));
        }
        Poll::Pending
    }

    /// The outcome when the queue has ended.
    #[cold]
    fn late_outcome(&self, key: usize, holdings: &mut Holdings) -> Outcome {
        let late = self.queue.late_outcome(key, holdings);
        late.unwrap_or_else(|| Err(Failure::Closed.told(true)))
    }
}

impl<Q: Access> Drop for Accepted<'_, Q> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
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
