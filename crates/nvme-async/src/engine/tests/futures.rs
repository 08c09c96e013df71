//! Submissions and drains on a shared and on a local queue pair.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::yield_now;
use std::time::Instant;

use super::rig::{Device, Wakes, returned, state, submission, vector};
use crate::engine::access::Access;
use crate::engine::reaper::vacate;
use crate::engine::state::{Aftermath, Failure, Here, Look, Outcome};
use crate::engine::submission::Drain;
use crate::engine::{LocalQueue, PollMode, SharedQueue, State};
use crate::io::HoldingsMut;

fn shared(entries: u16) -> (Arc<SharedQueue>, Device) {
    let (state, device) = state(entries, PollMode::Interrupt);
    (SharedQueue::new(state, vector().0), device)
}

fn poll<F: Future>(future: Pin<&mut F>, waker: &Waker) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(waker))
}

fn reap(queue: &impl Access) {
    let mut aftermath = Aftermath::default();
    queue.with(|state| state.reap(Look::Polled, Instant::now(), &mut aftermath));
    aftermath.run();
}

fn failure(polled: Poll<Outcome>) -> Failure {
    match polled {
        Poll::Ready(Err(failed)) => failed.failure,
        Poll::Ready(Ok(_)) => panic!("it succeeded"),
        Poll::Pending => panic!("it waits"),
    }
}

struct Panics;

impl Wake for Panics {
    fn wake(self: Arc<Self>) {
        panic!("on purpose");
    }
}

#[test]
fn wakers_that_panic_do_not_keep_others_from_being_woken() {
    let (queue, mut device) = shared(8);
    let panics = Waker::from(Arc::new(Panics));
    let (wakes, waker) = Wakes::new();
    let mut first = pin!(submission(&queue, 0).0);
    let mut second = pin!(submission(&queue, 1).0);
    let mut third = pin!(submission(&queue, 2).0);
    assert!(poll(first.as_mut(), &panics).is_pending());
    assert!(poll(second.as_mut(), &panics).is_pending());
    assert!(poll(third.as_mut(), &waker).is_pending());
    queue.with(State::ring_deferred);
    device.work();
    assert!(catch_unwind(AssertUnwindSafe(|| reap(&queue))).is_err());
    assert_eq!(wakes.count(), 1);
}

#[test]
fn the_last_waker_is_woken() {
    let (queue, mut device) = shared(8);
    let mut submission = pin!(submission(&queue, 0).0);
    let ((first, first_waker), (second, second_waker)) = (Wakes::new(), Wakes::new());
    assert!(poll(submission.as_mut(), &first_waker).is_pending());
    assert!(poll(submission.as_mut(), &second_waker).is_pending());
    device.work();
    reap(&queue);
    assert_eq!((first.count(), second.count()), (0, 1));
    assert!(matches!(
        poll(submission.as_mut(), &second_waker),
        Poll::Ready(Ok(_))
    ));
    assert!(returned(submission.take_holdings()).is_some());
    assert!(
        poll(submission, &second_waker).is_pending(),
        "it resolves once"
    );
}

#[test]
fn nothing_happens_before_the_first_poll() {
    let (queue, mut device) = shared(8);
    let (submission, memory) = submission(&queue, 0);
    assert_eq!(device.fetch(usize::MAX), 0);
    drop(submission);
    assert!(!memory.is_alive());
    assert_eq!(device.fetch(usize::MAX), 0);
}

#[test]
fn a_queue_that_was_taken_away_is_closed() {
    let (queue, _device) = shared(8);
    let mut waiting = pin!(submission(&queue, 0).0);
    let (_, waker) = Wakes::new();
    assert!(poll(waiting.as_mut(), &waker).is_pending());
    let state = queue.take();
    assert_eq!(failure(poll(waiting, &waker)), Failure::Closed);
    let (mut late, memory) = submission(&queue, 1);
    let Poll::Ready(Err(failed)) = poll(Pin::new(&mut late), &waker) else {
        panic!("not closed");
    };
    assert_eq!(failed, Failure::Closed.told(false));
    assert!(returned(late.take_holdings()).is_some() && !memory.is_alive());
    assert_eq!(poll(pin!(Drain::new(&queue)), &waker), Poll::Ready(Ok(())));
    drop(state);
}

#[test]
fn a_queue_that_is_about_to_end_is_not_lent() {
    let (queue, _device) = shared(8);
    queue.with(|state| state.set_refusing(true));
    assert!(LocalQueue::take(&queue).is_none());
    queue.with(|state| state.set_refusing(false));
    let local = LocalQueue::take(&queue).unwrap();
    assert!(LocalQueue::take(&queue).is_none() && queue.with(|_| ()).is_some());
    local.give_back();
    assert!(queue.with(|_| ()).is_some());
    assert!(
        local.with(|_| ()).is_none(),
        "what was given back is not used"
    );
}

#[test]
fn a_drain_leaves_nothing_behind() {
    let (queue, mut device) = shared(8);
    let mut submission = pin!(submission(&queue, 0).0);
    let (wakes, waker) = Wakes::new();
    assert!(poll(submission.as_mut(), Waker::noop()).is_pending());
    let mut drain = Box::pin(Drain::new(&queue));
    assert!(poll(drain.as_mut(), &waker).is_pending());
    drop(drain);
    assert_eq!(Arc::strong_count(&wakes), 2, "its waker is gone");
    let mut drain = pin!(Drain::new(&queue));
    assert!(poll(drain.as_mut(), &waker).is_pending());
    device.work();
    reap(&queue);
    assert_eq!(wakes.count(), 1);
    assert_eq!(poll(drain, &waker), Poll::Ready(Ok(())));
}

#[test]
fn without_a_runtime_nothing_drives_it() {
    let (queue, mut device) = shared(8);
    let mut waiting = pin!(submission(&queue, 0).0);
    let mut drain = pin!(Drain::new(&queue));
    let (wakes, waker) = Wakes::new();
    assert!(poll(waiting.as_mut(), &waker).is_pending());
    assert!(poll(drain.as_mut(), &waker).is_pending());
    let term = claim_again(&queue);
    vacate(&queue, term);
    assert_eq!(wakes.count(), 2, "both are woken to find another reaper");

    let gone = Failure::RuntimeGone.told(true);
    assert_eq!(poll(drain, &waker), Poll::Ready(Err(gone)));
    assert_eq!(failure(poll(waiting, &waker)), Failure::RuntimeGone);
    assert_eq!(
        failure(poll(pin!(submission(&queue, 1).0), &waker)),
        Failure::RuntimeGone
    );
    assert_eq!(
        device.fetch(usize::MAX),
        1,
        "the second one was not submitted"
    );
}

/// Dismisses whoever has the seat and takes it.
fn claim_again(queue: &impl Access) -> crate::engine::state::Term {
    let mut aftermath = Aftermath::default();
    let term = queue.with(|state| {
        state.dismiss_reapers(&mut aftermath);
        state.claim_reaper(Here::now())
    });
    aftermath.run();
    term.flatten().unwrap()
}

#[test]
fn a_runtime_without_drivers_is_refused_and_others_hear_of_it() {
    let (queue, _device) = shared(8);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    vacate(&queue, claim_again(&queue));
    let _guard = runtime.enter();
    assert_eq!(
        failure(poll(pin!(submission(&queue, 0).0), Waker::noop())),
        Failure::NoDriver
    );
    assert_eq!(
        queue.with(|state| state.has_reaper(Here::now())),
        Some(false)
    );
}

/// A runtime that is shutting down drops what is spawned. That must not be tried for ever.
#[test]
fn a_runtime_that_is_shutting_down_ends_the_wait() {
    let (queue, _device) = shared(8);
    vacate(&queue, claim_again(&queue));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let (begun, has_begun) = channel();
    let (result, results) = channel();
    let task = poll_fn(move |cx: &mut Context<'_>| {
        begun.send(()).unwrap();
        // The other worker ends all tasks, those that are spawned from then on included.
        while !tokio::spawn(std::future::pending::<()>()).is_finished() {
            yield_now();
        }
        let polled = pin!(submission(&queue, 0).0).poll(cx);
        result.send(failure(polled)).unwrap();
        Poll::Ready(())
    });
    runtime.spawn(task);
    has_begun.recv().unwrap();
    runtime.shutdown_background();
    assert_eq!(results.recv().unwrap(), Failure::RuntimeGone);
}

/// Locks the queue whenever something is done to it.
struct Nosy<Q: Access + Send + Sync> {
    queue: Q,
    uses: Arc<Mutex<usize>>,
}

impl<Q: Access + Send + Sync> Nosy<Q> {
    fn look(&self) {
        self.queue.with(|_| ());
        *self.uses.lock().unwrap() += 1;
    }
}

impl<Q: Access + Send + Sync> Wake for Nosy<Q> {
    fn wake(self: Arc<Self>) {
        self.look();
    }
}

impl<Q: Access + Send + Sync> Drop for Nosy<Q> {
    fn drop(&mut self) {
        self.look();
    }
}

/// Access that panics when it is entered twice, as a local queue's does and a lock does worse.
#[derive(Clone)]
struct Strict {
    queue: Arc<SharedQueue>,
    entered: Arc<AtomicBool>,
}

impl Access for Strict {
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> Option<R> {
        assert!(!self.entered.swap(true, Ordering::Relaxed), "entered twice");
        let result = self.queue.with(f);
        self.entered.store(false, Ordering::Relaxed);
        result
    }

    fn spawn_reaper(&self) -> Result<(), Failure> {
        self.with(|state| state.claim_reaper(Here::now()));
        Ok(())
    }

    fn polled(&self) -> Option<&Self> {
        None
    }

    fn park(&self, _: &crate::engine::park::Hook, _: crate::engine::state::Term) {}

    fn late_outcome(&self, key: usize, holdings: HoldingsMut<'_>) -> Option<Outcome> {
        self.queue.late_outcome(key, holdings)
    }

    fn report(&self, _: crate::engine::Notification) {}
}

#[test]
fn nothing_of_others_runs_while_the_queue_is_borrowed() {
    let (queue, mut device) = shared(4);
    let queue = Strict {
        queue,
        entered: Arc::default(),
    };
    let uses = Arc::new(Mutex::new(0));
    let nosy = || -> Waker {
        Arc::new(Nosy {
            queue: queue.clone(),
            uses: uses.clone(),
        })
        .into()
    };
    // All their wakers are the last of their kind when the queue gets them.
    let mut submissions: Vec<_> = (0..6)
        .map(|number| Box::pin(submission(&queue, number).0))
        .collect();
    let mut drain = Box::pin(Drain::new(&queue));
    for round in 0..3 {
        for submission in &mut submissions {
            assert!(poll(submission.as_mut(), &nosy()).is_pending());
        }
        assert!(poll(drain.as_mut(), &nosy()).is_pending());
        assert_eq!(
            *uses.lock().unwrap(),
            round * 7,
            "each replaces the one before"
        );
    }
    // Dropped while queued and while submitted.
    submissions.pop();
    drop(submissions.remove(0));
    queue.with(|state| state.ring_deferred());
    device.work();
    reap(&queue);
    vacate(&queue, claim_again(&queue));
    let mut aftermath = Aftermath::default();
    queue.with(|state| state.fail(Failure::Closed, false, &mut aftermath));
    aftermath.run();
    drop(drain);
    assert!(poll(pin!(submission(&queue, 9).0), &nosy()).is_ready());
    drop(submissions);
    assert_eq!(Arc::strong_count(&uses), 1, "all wakers are gone");
}

#[test]
fn a_local_queue_drives_itself() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (home, mut device) = shared(8);
    let queue = LocalQueue::take(&home).unwrap();
    let done = Cell::new(false);
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let mut submission = pin!(submission(&queue, 0).0);
        let result = poll_fn(|cx| {
            let polled = submission.as_mut().poll(cx);
            device.work();
            polled
        })
        .await;
        assert!(result.is_ok() && returned(submission.take_holdings()).is_some());
        done.set(true);
    });
    assert!(done.get());
    queue.give_back();
    assert_eq!(
        home.with(|state| state.has_reaper(Here::now())),
        Some(false)
    );
}

#[test]
fn a_local_queue_needs_a_local_set() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (home, _device) = shared(8);
    let queue = LocalQueue::take(&home).unwrap();
    let _guard = runtime.enter();
    for _ in 0..2 {
        let polled = poll(pin!(submission(&queue, 0).0), Waker::noop());
        assert_eq!(failure(polled), Failure::NotLocal);
    }
}
