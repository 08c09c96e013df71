//! The future of one command, and the future that waits for all commands so far.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::task::coop::poll_proceed;

use super::access::Access;
use super::state::{Aftermath, Command, Failed, Failure, Here, Outcome, Progress, Refusal};
use crate::io::{Holdings, HoldingsMut};

/// Submits a command when first polled, and resolves when it is done. What the command needs is with
/// the queue meanwhile, and [comes back](Self::take_holdings).
///
/// # Cancel safety
///
/// Dropping it before the first poll does nothing. Dropping it later gives up the result only:
/// the command goes on, and its memory stays with the queue until the device is done with it.
#[must_use = "futures do nothing unless polled"]
pub(crate) struct Submission<'a, Q: Access> {
    queue: &'a Q,
    command: Command,
    /// The queue has it from the first poll on until the command is done.
    holdings: Holdings,
    was_polled: bool,
    in_flight: InFlight<'a, Q>,
}

impl<'a, Q: Access> Submission<'a, Q> {
    pub(crate) fn new(queue: &'a Q, command: Command, holdings: Holdings) -> Self {
        Self {
            queue,
            command,
            holdings,
            was_polled: false,
            in_flight: InFlight::default(),
        }
    }

    /// What the command needed, when it is done; nothing if the device may still use it.
    pub(crate) fn take_holdings(&mut self) -> Holdings {
        std::mem::take(&mut self.holdings)
    }
}

impl<Q: Access> Future for Submission<'_, Q> {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let budget = ready!(poll_proceed(cx));
        let this = self.get_mut();
        let (in_flight, holdings) = (&mut this.in_flight, this.holdings.as_mut());
        // Set first: a waker that panics must not have it submitted again, without its memory.
        let polled = match std::mem::replace(&mut this.was_polled, true) {
            false => in_flight.submit(this.queue, &this.command, holdings, cx),
            true => in_flight.poll(holdings, cx),
        };
        if polled.is_ready() {
            budget.made_progress();
        }
        polled
    }
}

/// A command that a queue has, if there is one. Dropping it gives up the outcome.
pub(crate) struct InFlight<'a, Q: Access> {
    /// The queue, and the key of the operation.
    operation: Option<(&'a Q, usize)>,
}

impl<Q: Access> Default for InFlight<'_, Q> {
    fn default() -> Self {
        Self { operation: None }
    }
}

/// What a look at an operation without an outcome found.
enum Polled {
    Done(Outcome),
    Waiting,
    WakesAnother,
}

impl<'a, Q: Access> InFlight<'a, Q> {
    /// Submits a command. If it is done at once, or refused, that is its outcome, and `holdings` are
    /// left or given back. Otherwise the queue has them, and the task is woken when it is done.
    pub(crate) fn submit<T: From<Outcome>>(
        &mut self,
        mut queue: &'a Q,
        command: &Command,
        mut holdings: HoldingsMut<'_>,
        cx: &Context<'_>,
    ) -> Poll<T> {
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
            let mut waker = Some(cx.waker().clone());
            let now = Instant::now();
            let holdings = holdings.reborrow();
            let started = queue.with(|state| {
                state.start(command, holdings, &mut waker, here, now, &mut aftermath)
            });
            aftermath.run();
            let failure = match started {
                Some(Ok(Progress::Done(outcome))) => return Poll::Ready(outcome.into()),
                Some(Ok(Progress::Waiting { key })) => {
                    self.operation = Some((queue, key));
                    return Poll::Pending;
                }
                Some(Err(Refusal::Failed(failure))) => failure,
                Some(Err(Refusal::NoReaper)) => match queue.spawn_reaper() {
                    Ok(()) => continue,
                    Err(failure) => failure,
                },
                None => Failure::Closed,
            };
            return Poll::Ready(Outcome::Err(failure.into()).into());
        }
    }

    /// Resolves when the command is done, once. What it held is in `holdings` then, which are empty
    /// before, unless the device may still use it.
    #[inline(always)]
    pub(crate) fn poll<T: From<Outcome>>(
        &mut self,
        mut holdings: HoldingsMut<'_>,
        cx: &Context<'_>,
    ) -> Poll<T> {
        // As with most futures, polling it again after it resolved never resolves.
        let Some((queue, key)) = self.operation else {
            return Poll::Pending;
        };
        let outcome = match queue.with(|state| state.take_outcome(key, holdings.reborrow())) {
            Some(Some(outcome)) => outcome,
            Some(None) => ready!(wait(queue, key, holdings, cx)).into(),
            None => late_outcome(queue, key, holdings).into(),
        };
        self.operation = None;
        Poll::Ready(outcome)
    }
}

impl<Q: Access> Drop for InFlight<'_, Q> {
    fn drop(&mut self) {
        if let Some((queue, key)) = self.operation {
            abandon(queue, key);
        }
    }
}

/// Sees to it that the task is woken when an operation is done, and that somebody drives the queue.
#[cold]
fn wait<Q: Access>(
    queue: &Q,
    key: usize,
    mut holdings: HoldingsMut<'_>,
    cx: &Context<'_>,
) -> Poll<Outcome> {
    let here = Here::now();
    let mut fresh = None;
    let driven = loop {
        let polled = queue.with(|state| {
            let polled = match state.take_outcome(key, holdings.reborrow()) {
                Some(outcome) => Polled::Done(outcome),
                None if state.will_wake(key, cx.waker(), &mut fresh) => Polled::Waiting,
                None => Polled::WakesAnother,
            };
            (polled, state.has_reaper(here))
        });
        match polled {
            None => return Poll::Ready(late_outcome(queue, key, holdings)),
            Some((Polled::Done(outcome), _)) => return Poll::Ready(outcome),
            Some((Polled::Waiting, driven)) => break driven,
            Some((Polled::WakesAnother, _)) => fresh = Some(cx.waker().clone()),
        }
    };
    if !driven && let Err(failure) = queue.spawn_reaper() {
        abandon(queue, key);
        return Poll::Ready(Err(failure.told(true)));
    }
    Poll::Pending
}

/// The outcome of an operation whose queue has ended.
#[cold]
fn late_outcome<Q: Access>(queue: &Q, key: usize, holdings: HoldingsMut<'_>) -> Outcome {
    let late = queue.late_outcome(key, holdings);
    late.unwrap_or_else(|| Err(Failure::Closed.told(true)))
}

#[cold]
fn abandon<Q: Access>(queue: &Q, key: usize) {
    let mut aftermath = Aftermath::default();
    let lives = queue.with(|state| state.abandon(key, &mut aftermath));
    aftermath.run();
    if lives.is_none() {
        let _ = queue.late_outcome(key, Holdings::default().as_mut());
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
