//! What runs beside a reaper that polls.

use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use super::rig::{Rig, Wakes, state, submission, vector};
use crate::engine::access::Access;
use crate::engine::park::Hook;
use crate::engine::reaper::{BURST, Reaper};
use crate::engine::state::{Failure, Here, Outcome, Place, Term};
use crate::engine::{Notification, PollMode, SharedQueue, State};
use crate::io::HoldingsMut;

/// Counts how often the queue is looked at.
#[derive(Clone)]
struct Counted {
    queue: Arc<SharedQueue>,
    looks: Arc<AtomicUsize>,
}

impl Access for Counted {
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> Option<R> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        self.queue.with(f)
    }

    fn polled(&self) -> Option<&Self> {
        None
    }

    fn park(&self, hook: &Hook, term: Term) {
        self.queue.park(hook, term);
    }

    fn spawn_reaper(&self) -> Result<(), Failure> {
        unreachable!("it has one")
    }

    fn late_outcome(&self, key: usize, holdings: HoldingsMut<'_>) -> Option<Outcome> {
        self.queue.late_outcome(key, holdings)
    }

    fn report(&self, _: Notification) {}
}

/// The largest number of looks between two turns of a task that can always run, beside a command that
/// never completes.
async fn looks_between_turns() -> usize {
    let (mut state, _device) = state(8, PollMode::Busy);
    let mut aftermath = Default::default();
    state.dismiss_reapers(&mut aftermath);
    let term = state.claim_reaper(Here::now()).expect("the seat is free");
    let (vector, _writer) = vector();
    let queue = Counted {
        queue: SharedQueue::new(state, vector.clone()),
        looks: Arc::default(),
    };
    let reaper = Reaper::new(queue.clone(), term, &vector).expect("there are drivers");
    let mut read = std::pin::pin!(submission(&queue.queue, 0).0);
    let started = poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx))).await;
    assert!(started.is_pending());
    let reaper = tokio::spawn(reaper);

    let (mut turns, mut last, mut most) = (0, 0, 0);
    poll_fn(|cx| {
        let looks = queue.looks.load(Ordering::Relaxed);
        most = most.max(looks - std::mem::replace(&mut last, looks));
        turns += 1;
        if turns == 1000 {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
    reaper.abort();
    most
}

/// One look to take what is there, then a burst.
#[test]
fn one_burst_lies_between_two_turns() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let neighbour = runtime.spawn(looks_between_turns());
    let most = runtime.block_on(neighbour).expect("does not panic");
    assert_eq!(most, BURST as usize + 1);
}

/// It is not polled by the hook, which is never called, but looked at once in each round.
#[test]
fn one_look_lies_between_two_turns_beside_a_hook() {
    let runtime = crate::runtime::Builder::new().build().expect("a runtime");
    let neighbour = runtime.spawn(looks_between_turns());
    let most = runtime.block_on(neighbour).expect("does not panic");
    assert!((1..=2).contains(&most), "{most}");
}

/// A submission leaves the looking to the hook only if that was called since the last one.
#[test]
fn a_hook_that_is_not_called_is_noticed() {
    let runtime = crate::runtime::Builder::new().build().expect("a runtime");
    runtime.block_on(async {
        let mut rig = Rig::new(8, PollMode::Busy);
        let mut woken = Vec::new();
        for hook_is_called in [true, false, false, true, true] {
            if hook_is_called {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            rig.sleep(Some(Instant::now()));
            let before = rig.reaper.count();
            rig.start();
            woken.push(rig.reaper.count() - before);
            rig.work();
        }
        assert_eq!(woken, [0, 1, 1, 0, 0]);
    });
}

/// The runtime does not sleep while the queue is to be polled: after a while the hook lets it go round.
#[tokio::test]
async fn a_hook_that_polls_lets_the_runtime_go_round() {
    let (mut state, _device) = state(8, PollMode::Busy);
    state.dismiss_reapers(&mut Default::default());
    let term = state.claim_reaper(Here::now()).expect("the seat is free");
    let queue = SharedQueue::new(state, vector().0);
    let hook = Hook::default();
    queue.park(&hook, term);
    let mut read = std::pin::pin!(submission(&queue, 0).0);
    let started = poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx))).await;
    assert!(started.is_pending());
    let (wakes, waker) = Wakes::new();
    queue.with(|state| {
        state.seat(term).expect("it has one").place = Place::Asleep {
            waker,
            next_look: None,
            pause: None,
        };
    });
    hook.park();
    assert_eq!(wakes.count(), 1);
}
