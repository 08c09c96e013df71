//! Runtimes for tests, and an end for tests that hang.

use std::panic::resume_unwind;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};

use super::slowness;

/// No test takes nearly as long.
fn limit() -> Duration {
    Duration::from_secs(120) * slowness()
}

/// Runs `test` in a thread of its own, so that even a future that spins is noticed.
///
/// # Panics
///
/// When `test` does, and when it has no end.
#[track_caller]
pub(crate) fn bounded<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel::<()>();
    let thread = thread::spawn(move || {
        let _until_the_end = sender;
        test()
    });
    match receiver.recv_timeout(limit()) {
        Err(RecvTimeoutError::Timeout) => panic!("the test hangs: no end after {:?}", limit()),
        Ok(()) | Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Ok(value) => value,
            Err(panic) => resume_unwind(panic),
        },
    }
}

/// Runs `test` in a `current_thread` runtime.
#[track_caller]
pub(crate) fn on_current_thread(test: impl AsyncFnOnce() + Send + 'static) {
    bounded(move || current_thread().block_on(test()));
}

/// Runs `test` in a `multi_thread` runtime, in the thread that is no worker.
#[track_caller]
pub(crate) fn on_multi_thread(test: impl AsyncFnOnce() + Send + 'static) {
    bounded(move || multi_thread().block_on(test()));
}

/// Runs `test` in a runtime of each flavour.
#[track_caller]
pub(crate) fn on_both_flavours(test: impl AsyncFn() + Send + 'static) {
    bounded(move || {
        current_thread().block_on(test());
        multi_thread().block_on(test());
    });
}

pub(crate) fn current_thread() -> Runtime {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime")
}

pub(crate) fn multi_thread() -> Runtime {
    let runtime = Builder::new_multi_thread()
        .worker_threads(3)
        .enable_all()
        .build();
    runtime.expect("a runtime")
}

/// Waits for what happens in another thread, and for which there is no future.
#[track_caller]
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit() / 2, "never happened: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// As [`eventually`], with the runtime at work meanwhile.
pub(crate) async fn comes_true(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit() / 2, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
