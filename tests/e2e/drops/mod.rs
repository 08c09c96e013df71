//! Every future of the public interface, dropped (or forgotten) at each of its await points: on a
//! slow controller after every number of polls, and on one in trouble at all stages of its recovery.

mod bed;
mod lifecycle;
mod operations;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures::StreamExt;
use nvme_async::{LocalNamespace, Namespace};
use tokio::sync::Notify;
use tokio::task::LocalSet;

use self::bed::{Case, End, Handle, Trouble};
use self::operations::{Operation, of_a_controller, of_a_namespace};
use crate::support::bounded::{bounded, current_thread, multi_thread};
use crate::support::{full, slowness};

/// Controllers that are in trouble at the same time, on a machine of usual speed.
const AT_A_TIME: usize = 48;
/// Nothing takes as long.
const LIMIT: Duration = Duration::from_secs(80);

/// Polls `future` so many times: at once, whenever it wakes, and after each `pace` without that.
async fn polled<F: Future + ?Sized>(
    mut future: Pin<&mut F>,
    polls: usize,
    pace: Duration,
) -> Option<F::Output> {
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(woken.clone());
    for _ in 0..polls {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(output);
        }
        // To be late is as good as to be woken.
        let _ = tokio::time::timeout(pace, woken.0.notified()).await;
    }
    None
}

#[derive(Default)]
struct Woken(Notify);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

/// One operation that ends after so many polls; returns whether it was over by then.
async fn run<T: Handle>(
    operation: &Operation<T>,
    trouble: Trouble,
    polls: usize,
    is_forgotten: bool,
) -> bool {
    let label = format!("{}, {trouble:?}, {polls} polls", operation.name);
    let case = Case::open(trouble, label.clone()).await;
    case.begin(operation.queue);
    let mut future = (operation.start)(&case);
    let polled = polled(future.as_mut(), polls, trouble.pace());
    let result = tokio::time::timeout(LIMIT * slowness(), polled).await;
    let result = result.unwrap_or_else(|_| panic!("{label}: it does not resolve"));
    let end = if is_forgotten {
        std::mem::forget(future);
        End::Forgotten {
            owners: case.ledger.alive(),
        }
    } else {
        drop(future);
        End::Dropped
    };
    if let (Trouble::Slow, Some(Err(error))) = (trouble, &result) {
        panic!("{label}: {error}");
    }
    let mut check = Box::pin(case.check(operation.queue, operation.new, end));
    let checked = tokio::time::timeout(LIMIT * slowness(), &mut check).await;
    checked.unwrap_or_else(|_| panic!("{label}: no end"));
    result.is_some()
}

/// On a slow controller, after each number of polls until it ends by itself.
async fn slow<T: Handle>(operations: Vec<Operation<T>>, is_forgotten: bool) {
    let sweeps = operations.iter().map(async |operation| {
        let mut polls = 0;
        while !run(operation, Trouble::Slow, polls, is_forgotten).await {
            polls += 1;
        }
    });
    futures::future::join_all(sweeps).await;
}

/// On a controller in trouble, at points in time from before it until after it.
async fn late<T: Handle>(
    operations: Vec<Operation<T>>,
    trouble: Trouble,
    is_forgotten: bool,
    seed: usize,
) {
    // In units of a fifth of a deadline, of which a recovery takes up to five.
    let points: Vec<usize> = match full() {
        true => (0..30).collect(),
        false => vec![1, 2 + seed, 5 + 2 * seed, 9 + 3 * seed, 15 + 4 * seed],
    };
    let cases = operations
        .iter()
        .flat_map(|operation| points.iter().map(move |&polls| (operation, polls)));
    futures::stream::iter(cases)
        .map(|(operation, polls)| run(operation, trouble, polls, is_forgotten))
        .buffer_unordered(AT_A_TIME.div_ceil(slowness() as usize))
        .for_each(async |_| ())
        .await;
    let to_the_end = operations.iter();
    let to_the_end = to_the_end.map(|operation| run(operation, trouble, usize::MAX, false));
    assert!(
        futures::future::join_all(to_the_end)
            .await
            .iter()
            .all(|&over| over)
    );
}

/// The same in a runtime of each flavour; the second one's points lie between those of the first.
fn on_both_flavours(sweep: impl AsyncFn(usize) + Send + Clone + 'static) {
    let again = sweep.clone();
    bounded(move || LocalSet::new().block_on(&current_thread(), sweep(0)));
    bounded(move || LocalSet::new().block_on(&multi_thread(), again(1)));
}

macro_rules! sweeps {
    ($($name:ident: $trouble:expr;)*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn namespace() {
                on_both_flavours(async |seed| {
                    late(of_a_namespace::<Namespace>(), $trouble, false, seed).await;
                });
            }

            #[test]
            fn local_namespace() {
                on_both_flavours(async |seed| {
                    late(of_a_namespace::<LocalNamespace>(), $trouble, false, seed).await;
                });
            }

            #[test]
            fn controller() {
                on_both_flavours(async |seed| {
                    late(of_a_controller(), $trouble, false, seed).await;
                });
            }
        }
    )*};
}

sweeps! {
    aborted: Trouble::Aborted;
    stuck: Trouble::Stuck { executed: false };
    executed_and_stuck: Trouble::Stuck { executed: true };
    reset: Trouble::Reset;
    power_loss: Trouble::PowerLoss;
    vanish: Trouble::Vanish;
    death: Trouble::Death;
}

#[test]
fn slow_namespace() {
    on_both_flavours(async |_| slow(of_a_namespace::<Namespace>(), false).await);
}

#[test]
fn slow_local_namespace() {
    on_both_flavours(async |_| slow(of_a_namespace::<LocalNamespace>(), false).await);
}

#[test]
fn slow_controller() {
    on_both_flavours(async |_| slow(of_a_controller(), false).await);
}

/// Of a forgotten future nobody else notices anything, and no more is lost than what it has itself.
mod forgotten {
    use super::*;

    #[test]
    fn slow_namespace() {
        on_both_flavours(async |_| slow(of_a_namespace::<Namespace>(), true).await);
    }

    #[test]
    fn slow_local_namespace() {
        on_both_flavours(async |_| slow(of_a_namespace::<LocalNamespace>(), true).await);
    }

    #[test]
    fn slow_controller() {
        on_both_flavours(async |_| slow(of_a_controller(), true).await);
    }

    #[test]
    fn namespace_in_trouble() {
        on_both_flavours(async |seed| {
            for trouble in Trouble::LATE {
                late(of_a_namespace::<Namespace>(), trouble, true, seed).await;
            }
        });
    }
}
