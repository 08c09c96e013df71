//! Models of what threads do to a queue pair together, tried by loom in all interleavings (up to a
//! number of preemptions):
//! `RUSTFLAGS="--cfg nvme_async_loom" cargo test -p nvme-async --release --lib engine::models::`.
//!
//! Not `--cfg loom`, which Tokio would take for its own.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Instant;

use loom::cell::UnsafeCell;
use loom::thread;

use super::access::Access;
use super::biased::Biased;
use super::state::{Aftermath, Failure, Here, Look, Outcome};
use super::tests::rig::{Device, Memory, Wakes, command, returned, state, vector};
use super::{LocalQueue, PollMode, SharedQueue, Submission};
use crate::io::Holdings;
use crate::recovery::ResetCause;

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// A value that must not be accessed by two at a time, which loom notices.
#[derive(Default)]
struct Exclusive(UnsafeCell<u32>);

impl Exclusive {
    #[expect(unsafe_code, reason = "loom's cell checks what the model is about")]
    fn increment(&mut self) {
        self.0.with_mut(|value| {
            // SAFETY: `self` is borrowed mutably; and loom fails the model if that is not so.
            unsafe { *value += 1 };
        });
        thread::yield_now();
    }
}

// SAFETY: it is only a number; loom's cell is not Send because it checks.
#[expect(unsafe_code, reason = "as above")]
unsafe impl Send for Exclusive {}

#[test]
fn the_owner_of_a_biased_lock_and_others() {
    check(3, || {
        let biased = Arc::new(Biased::new(Exclusive::default()));
        let shared = biased.clone();
        let other = thread::spawn(move || {
            shared.with(Exclusive::increment);
            shared.with(Exclusive::increment);
        });
        let owner = biased.own(|_| true).expect("there is none");
        owner.with(Exclusive::increment);
        owner.with(Exclusive::increment);
        drop(owner);
        biased.with(Exclusive::increment);
        other.join().expect("no panics");
    });
}

/// A thread that owns it for a moment, if nobody does.
fn another_owner(biased: &Arc<Biased<Exclusive>>) -> thread::JoinHandle<()> {
    let biased = biased.clone();
    thread::spawn(move || {
        if let Some(owner) = biased.own(|_| true) {
            owner.with(Exclusive::increment);
        }
    })
}

#[test]
fn an_owner_that_has_resigned_and_the_next_one() {
    check(3, || {
        let biased = Arc::new(Biased::new(Exclusive::default()));
        let other = another_owner(&biased);
        if let Some(owner) = biased.own(|_| true) {
            owner.with(Exclusive::increment);
            assert!(owner.resign());
            // From here on the other one may be inside.
            assert!(owner.with(Exclusive::increment).is_none());
            drop(owner);
        }
        other.join().expect("no panics");
    });
}

#[test]
fn owners_after_each_other() {
    check(3, || {
        let biased = Arc::new(Biased::new(Exclusive::default()));
        let other = another_owner(&biased);
        if let Some(owner) = biased.own(|_| true) {
            owner.with(Exclusive::increment);
        }
        other.join().expect("no panics");
        assert!(biased.own(|_| true).is_some());
    });
}

/// A queue pair and its device.
struct Bench {
    queue: Arc<SharedQueue>,
    /// Never locked across anything that loom schedules.
    device: Arc<Mutex<Device>>,
}

impl Bench {
    fn new() -> Self {
        let (state, device) = state(4, PollMode::Interrupt);
        Self {
            queue: SharedQueue::new(state, vector().0),
            device: Arc::new(Mutex::new(device)),
        }
    }

    /// The device completes what it was told of, and the completions are taken, as a reaper does.
    fn reap(queue: &Arc<SharedQueue>, device: &Mutex<Device>) {
        queue.with(|state| state.ring_deferred());
        device.lock().expect("no panics").work();
        let now = Instant::now();
        queue.attend(|state, aftermath| state.reap(Look::Polled, now, aftermath));
    }

    /// The device is stopped, reset and set up again.
    fn recover(queue: &Arc<SharedQueue>, device: &Mutex<Device>) {
        let rung = |device: &Mutex<Device>| {
            let device = device.lock().expect("no panics");
            device.submission_tail.writes().len() + device.completion_head.writes().len()
        };
        queue.with(|state| state.fence());
        let before = rung(device);
        thread::yield_now();
        device.lock().expect("no panics").forget();
        let now = Instant::now();
        queue.attend(|state, aftermath| state.release(ResetCause::StateLost, now, aftermath));
        assert_eq!(rung(device), before, "a doorbell was rung behind the fence");
        queue.attend(|state, aftermath| state.resume(now, aftermath));
    }

    /// Whatever happened, nothing is left.
    fn finish(self, memory: &Memory) {
        Self::reap(&self.queue, &self.device);
        assert!(!memory.is_alive(), "memory was kept");
        self.queue.with(|state| {
            assert_eq!(state.in_flight(), 0);
            let drain = state.begin_drain();
            assert_eq!(state.poll_drain(drain, &mut None), Some(Ok(())));
            state.end_drain(drain);
        });
    }
}

fn poll<F: Future>(future: Pin<&mut F>, wakes: &Arc<Wakes>) -> Poll<F::Output> {
    let waker = wakes.clone().into();
    future.poll(&mut Context::from_waker(&waker))
}

/// Polls as a task does: again only when it was woken since the last time. `more` makes the rest of
/// the world go on.
fn run<Q: Access>(
    mut submission: Submission<'_, Q>,
    mut more: impl FnMut(),
) -> (Outcome, Option<Holdings>) {
    let wakes = Arc::new(Wakes::default());
    let mut seen = 0;
    loop {
        if let Poll::Ready(outcome) = poll(Pin::new(&mut submission), &wakes) {
            return (outcome, returned(submission.take_holdings()));
        }
        let mut patience = 3;
        while wakes.count() == seen {
            assert!(patience > 0, "a wake-up was lost");
            patience -= 1;
            more();
        }
        seen = wakes.count();
    }
}

#[test]
fn a_completion_and_the_task_that_waits_for_it() {
    check(3, || {
        let bench = Bench::new();
        let (queue, device) = (bench.queue.clone(), bench.device.clone());
        let reaper = thread::spawn(move || Bench::reap(&queue, &device));
        let (command, holdings, memory) = command(0);
        let outcome = {
            let submission = Submission::new(&bench.queue, command, holdings);
            run(submission, || {
                thread::yield_now();
                Bench::reap(&bench.queue, &bench.device);
            })
        };
        assert!(outcome.0.is_ok() && memory.is_alive());
        drop(outcome);
        reaper.join().expect("no panics");
        bench.finish(&memory);
    });
}

#[test]
fn a_completion_and_a_future_that_is_dropped() {
    check(3, || {
        let bench = Bench::new();
        let (queue, device) = (bench.queue.clone(), bench.device.clone());
        let reaper = thread::spawn(move || {
            Bench::reap(&queue, &device);
            Bench::reap(&queue, &device);
        });
        let (command, holdings, memory) = command(0);
        {
            let mut submission = pin!(Submission::new(&bench.queue, command, holdings));
            let wakes = Arc::new(Wakes::default());
            let first = poll(submission.as_mut(), &wakes).is_pending();
            if first {
                let _ = poll(submission.as_mut(), &wakes);
            }
        }
        reaper.join().expect("no panics");
        bench.finish(&memory);
    });
}

#[test]
fn recovery_and_the_task_that_waits() {
    check(3, || {
        let bench = Bench::new();
        let (queue, device) = (bench.queue.clone(), bench.device.clone());
        let recovery = thread::spawn(move || Bench::recover(&queue, &device));
        let (queue, device) = (bench.queue.clone(), bench.device.clone());
        let reaper = thread::spawn(move || Bench::reap(&queue, &device));
        let (command, holdings, memory) = command(0);
        let mut recovery = Some(recovery);
        let outcome = {
            let submission = Submission::new(&bench.queue, command, holdings);
            run(submission, || {
                // What is sent again after the end of recovery takes another look.
                if let Some(recovery) = recovery.take() {
                    recovery.join().expect("no panics");
                }
                Bench::reap(&bench.queue, &bench.device);
            })
        };
        match &outcome {
            (Ok(cqe), Some(_)) => assert!(cqe.status().is_success()),
            (Err(failed), Some(_)) => {
                assert_eq!(failed.failure, Failure::Reset(ResetCause::StateLost));
            }
            (result, None) => panic!("its memory is gone: {result:?}"),
        }
        drop(outcome);
        if let Some(recovery) = recovery {
            recovery.join().expect("no panics");
        }
        reaper.join().expect("no panics");
        bench.finish(&memory);
    });
}

#[test]
fn recovery_and_a_future_that_is_dropped() {
    check(3, || {
        let bench = Bench::new();
        let (queue, device) = (bench.queue.clone(), bench.device.clone());
        let recovery = thread::spawn(move || Bench::recover(&queue, &device));
        let (queue, device) = (bench.queue.clone(), bench.device.clone());
        let reaper = thread::spawn(move || Bench::reap(&queue, &device));
        let (command, holdings, memory) = command(0);
        {
            let submission = pin!(Submission::new(&bench.queue, command, holdings));
            let _ = poll(submission, &Arc::new(Wakes::default()));
        }
        recovery.join().expect("no panics");
        reaper.join().expect("no panics");
        bench.finish(&memory);
    });
}

#[test]
fn the_end_of_a_queue_pair_and_the_task_that_waits() {
    check(3, || {
        let bench = Bench::new();
        let (queue, device) = (bench.queue.clone(), bench.device.clone());
        let end = thread::spawn(move || {
            queue.with(|state| state.fence());
            device.lock().expect("no panics").forget();
            queue.attend(|state, aftermath| state.fail(Failure::Removed, true, aftermath));
        });
        let (queue, device) = (bench.queue.clone(), bench.device.clone());
        let reaper = thread::spawn(move || Bench::reap(&queue, &device));
        let (command, holdings, memory) = command(0);
        let mut end = Some(end);
        let outcome = {
            let submission = Submission::new(&bench.queue, command, holdings);
            run(submission, || {
                if let Some(end) = end.take() {
                    end.join().expect("no panics");
                }
            })
        };
        assert!(outcome.1.is_some() && memory.is_alive());
        drop(outcome);
        if let Some(end) = end {
            end.join().expect("no panics");
        }
        reaper.join().expect("no panics");
        assert!(!memory.is_alive());
    });
}

#[test]
fn recovery_of_a_queue_pair_that_a_thread_owns() {
    check(3, || {
        let bench = Bench::new();
        let local = LocalQueue::take(&bench.queue).expect("nobody has it");
        local.with(|state| state.claim_reaper(Here::now()));
        let (queue, device) = (bench.queue.clone(), bench.device.clone());
        let recovery = thread::spawn(move || Bench::recover(&queue, &device));
        let (command, holdings, memory) = command(0);
        {
            let mut submission = pin!(Submission::new(&local, command, holdings));
            let wakes = Arc::new(Wakes::default());
            let _ = poll(submission.as_mut(), &wakes);
            let mut aftermath = Aftermath::default();
            bench.device.lock().expect("no panics").work();
            let now = Instant::now();
            local.with(|state| {
                state.ring_deferred();
                state.reap(Look::Polled, now, &mut aftermath)
            });
            aftermath.run();
        }
        recovery.join().expect("no panics");
        local.give_back();
        bench.queue.with(|state| state.claim_reaper(Here::now()));
        bench.finish(&memory);
    });
}
