//! How one thread sleeps and others wake it without a lost wake-up and without a lock.
//!
//! A waker first publishes its work with an ordinary store and then calls [`Wake::notify`]; the
//! sleeper first announces that it sleeps and then looks for work once more. Each side has a
//! SeqCst fence between its store and its load, so that at least one of them sees the other:
//! either the sleeper finds the work, or the waker finds the announcement.
//!
//! A host with shadow doorbells (base specification 2.0, annex B.5) publishes its work with a store to
//! its own memory, and calls [`Wake::notify`], by writing the register, only if the sleeper's EventIdx
//! says so. The sleeper therefore writes EventIdx before it announces that it sleeps. The host, too, has
//! a fence between its store and its look at EventIdx, so the one in [`Wake::sleep`] does for both.
//!
//! The threads that wait for media are wakers like any: they set a flag (`pool.rs`) and notify.
//!
//! Not every kind of work is worth a wake-up every time, so the sleeper says what it listens for.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, Ordering, fence};
#[cfg(loom)]
use loom::thread::{self, Thread};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU32, Ordering, fence};
#[cfg(not(loom))]
use std::thread::{self, Thread};

use std::sync::OnceLock;
use std::time::Duration;

const AWAKE: u32 = 0;

/// What a sleeper listens for, and what a waker brings. A sleeper that listens for the less
/// urgent is woken by the more urgent too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Urgency {
    /// Matters only to a sleeper that waits for precisely this kind of work.
    Low = 2,
    /// Always wakes.
    High = 1,
}

/// One thread's sleep.
pub(crate) struct Wake {
    /// [`AWAKE`], or the [`Urgency`] that the sleeper listens for.
    sleeping: AtomicU32,
    sleeper: OnceLock<Thread>,
}

impl Wake {
    pub(crate) fn new() -> Self {
        Self {
            sleeping: AtomicU32::new(AWAKE),
            sleeper: OnceLock::new(),
        }
    }

    /// Makes the calling thread the one that sleeps. Notifications before are lost, so this comes
    /// before anyone else can bring work.
    pub(crate) fn attach(&self) {
        // There is one sleeper; a second call can only name the same one.
        let _ = self.sleeper.set(thread::current());
    }

    /// Wakes the sleeper if it sleeps and listens for this. To be called after the work was
    /// published.
    pub(crate) fn notify(&self, urgency: Urgency) {
        fence(Ordering::SeqCst);
        let listening = self.sleeping.load(Ordering::Relaxed);
        if listening >= urgency as u32 {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        // Of several wakers only one pays for the system call.
        if self.sleeping.swap(AWAKE, Ordering::Relaxed) != AWAKE
            && let Some(sleeper) = self.sleeper.get()
        {
            sleeper.unpark();
        }
    }

    /// Sleeps until notified, but not if `idle` finds work, and at most for `limit`. To be called
    /// by the attached thread only. May return early; the caller looks for work again.
    ///
    /// Returns whether it slept at all.
    pub(crate) fn sleep(
        &self,
        listen: Urgency,
        limit: Option<Duration>,
        idle: impl FnOnce() -> bool,
    ) -> bool {
        // Swaps, whose order loom knows among those of wakers, where a store would do.
        self.sleeping.swap(listen as u32, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let idle = idle();
        if idle {
            park(limit);
        }
        self.sleeping.swap(AWAKE, Ordering::Relaxed);
        idle
    }
}

#[cfg(not(loom))]
fn park(limit: Option<Duration>) {
    match limit {
        Some(limit) => thread::park_timeout(limit),
        None => thread::park(),
    }
}

/// loom has no clock: a sleep that a timer would end is none at all.
#[cfg(loom)]
fn park(limit: Option<Duration>) {
    if limit.is_none() {
        thread::park();
    }
}

#[cfg(all(test, loom))]
mod tests {
    use loom::sync::Arc;

    use super::*;

    /// Runs a sleeper that waits for `work` to become `rounds`, and wakers that each add one.
    fn sleeper_sees_all_work(listen: Urgency, bring: Urgency, wakers: u32) {
        let mut model = loom::model::Builder::new();
        // All interleavings with that many forced switches of threads; without a bound two wakers
        // take hours.
        model.preemption_bound = Some(3);
        model.check(move || {
            let wake = Arc::new(Wake::new());
            let work = Arc::new(AtomicU32::new(0));
            wake.attach();
            let threads: Vec<_> = (0..wakers)
                .map(|_| {
                    let (wake, work) = (wake.clone(), work.clone());
                    thread::spawn(move || {
                        work.fetch_add(1, Ordering::Release);
                        wake.notify(bring);
                    })
                })
                .collect();
            // A lost wake-up parks this thread for good, which loom reports as a deadlock.
            while work.load(Ordering::Acquire) < wakers {
                wake.sleep(listen, None, || work.load(Ordering::Acquire) < wakers);
            }
            for thread in threads {
                thread.join().expect("wakers do not panic");
            }
        });
    }

    /// Runs a host that publishes the tails up to `tails` in a shadow doorbell and wakes the sleeper as
    /// EventIdx says, which the sleeper sets before its last look or, wrongly, after it.
    fn sleeper_sees_all_shadow_tails(tails: u32, listens_in_time: bool) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let wake = Arc::new(Wake::new());
            let shadow = Arc::new(AtomicU32::new(0));
            // As it was left by the last sleep, a lap ago.
            let event_index = Arc::new(AtomicU32::new(u32::from(u16::MAX) - 100));
            wake.attach();
            let host = {
                let (wake, shadow, event_index) =
                    (wake.clone(), shadow.clone(), event_index.clone());
                thread::spawn(move || {
                    for (old, new) in (0..tails).zip(1..) {
                        shadow.store(new, Ordering::Release);
                        fence(Ordering::SeqCst);
                        let event_index = event_index.load(Ordering::Acquire);
                        let passed = new.wrapping_sub(event_index).wrapping_sub(1) as u16;
                        if passed < (new - old) as u16 {
                            wake.notify(Urgency::High);
                        }
                    }
                })
            };
            let mut seen = 0;
            while seen < tails {
                if listens_in_time {
                    event_index.store(seen, Ordering::Release);
                }
                wake.sleep(Urgency::High, None, || {
                    let idle = shadow.load(Ordering::Acquire) == seen;
                    if !listens_in_time {
                        event_index.store(seen, Ordering::Release);
                    }
                    idle
                });
                seen = shadow.load(Ordering::Acquire);
            }
            host.join().expect("the host does not panic");
        });
    }

    /// Threads that put work into a list and set a flag, under the lock that the sleeper takes to empty
    /// the list and clear the flag.
    #[test]
    fn flagged_lists() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let wake = Arc::new(Wake::new());
            let list = Arc::new(loom::sync::Mutex::new(0));
            let flag = Arc::new(AtomicU32::new(0));
            wake.attach();
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let (wake, list, flag) = (wake.clone(), list.clone(), flag.clone());
                    thread::spawn(move || {
                        let mut list = list.lock().expect("nobody panics");
                        *list += 1;
                        flag.store(1, Ordering::Relaxed);
                        drop(list);
                        wake.notify(Urgency::High);
                    })
                })
                .collect();
            let mut taken = 0;
            while taken < 2 {
                wake.sleep(Urgency::High, None, || flag.load(Ordering::Relaxed) == 0);
                if flag.load(Ordering::Relaxed) != 0 {
                    let mut list = list.lock().expect("nobody panics");
                    flag.store(0, Ordering::Relaxed);
                    taken += std::mem::take(&mut *list);
                }
            }
            for thread in threads {
                thread.join().expect("wakers do not panic");
            }
        });
    }

    #[test]
    fn shadow_tails() {
        sleeper_sees_all_shadow_tails(3, true);
    }

    /// Shows that the order matters.
    #[test]
    #[should_panic(expected = "deadlock")]
    fn shadow_tails_with_an_event_index_that_comes_late() {
        sleeper_sees_all_shadow_tails(1, false);
    }

    #[test]
    fn one_waker() {
        sleeper_sees_all_work(Urgency::High, Urgency::High, 1);
    }

    #[test]
    fn two_wakers() {
        sleeper_sees_all_work(Urgency::High, Urgency::High, 2);
    }

    #[test]
    fn low_wakes_who_listens_for_low() {
        sleeper_sees_all_work(Urgency::Low, Urgency::Low, 1);
    }

    #[test]
    fn high_wakes_who_listens_for_low() {
        sleeper_sees_all_work(Urgency::Low, Urgency::High, 1);
    }

    /// Also shows that a wake-up that does not come is noticed.
    #[test]
    #[should_panic(expected = "deadlock")]
    fn a_sleeper_that_does_not_listen_is_not_woken() {
        sleeper_sees_all_work(Urgency::High, Urgency::Low, 1);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn work_found_on_the_second_look_prevents_sleep() {
        let wake = Wake::new();
        wake.attach();
        assert!(!wake.sleep(Urgency::High, None, || false));
    }

    #[test]
    fn every_round_of_a_ping_pong_arrives() {
        const ROUNDS: u32 = 2_000;
        let wake = Arc::new(Wake::new());
        let work = Arc::new(AtomicU32::new(0));
        let done = Arc::new(AtomicU32::new(0));
        let sleeper = {
            let (wake, work, done) = (wake.clone(), work.clone(), done.clone());
            thread::spawn(move || {
                wake.attach();
                for round in 1..=ROUNDS {
                    done.store(round, Ordering::Release);
                    while work.load(Ordering::Acquire) < round {
                        wake.sleep(Urgency::High, None, || work.load(Ordering::Acquire) < round);
                    }
                }
            })
        };
        for round in 1..=ROUNDS {
            while done.load(Ordering::Acquire) < round {
                thread::yield_now();
            }
            work.store(round, Ordering::Release);
            wake.notify(Urgency::High);
        }
        sleeper.join().expect("the sleeper does not panic");
    }
}
