//! A lock that one thread need not take.
//!
//! [`Biased`] is a mutex. One thread at a time can become its [`Owner`] and then enters without
//! taking the lock: it says that it is inside, by a plain store, and looks whether somebody else
//! wants in. Whoever else locks it says so first, makes every thread of the process see that (a
//! system call, `membarrier`), and waits until the owner is out. That makes the owner's way in
//! nearly free and everybody else's expensive, which is right for a queue pair that belongs to one
//! thread, and of which others want something only when it is in trouble.
#![expect(
    unsafe_code,
    reason = "two ways to one value, of which one takes no lock"
)]

use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::sync::Arc;

use super::sync::{AtomicBool, Mutex, MutexGuard, Ordering, yield_now};
use crate::barrier;

/// A value behind a lock that one thread need not take.
pub(crate) struct Biased<T> {
    value: UnsafeCell<T>,
    lock: Mutex<()>,
    /// Whether there is an owner. Changed with the lock held.
    owned: AtomicBool,
    /// Whether the owner is inside without the lock. Written by the owner only.
    inside: AtomicBool,
    /// Whether the owner has to take the lock. Changed with the lock held.
    revoked: AtomicBool,
}

// SAFETY: `value` is only reached through `with`, by one thread at a time: with the lock held, and
// then the owner is not inside without it (`Revoked`), or by the owner, of which there is one. So it
// is sent between threads but never shared, for which `T: Send` is enough.
unsafe impl<T: Send> Sync for Biased<T> {}

impl<T> Biased<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            value: UnsafeCell::new(value),
            lock: Mutex::new(()),
            owned: AtomicBool::new(false),
            inside: AtomicBool::new(false),
            revoked: AtomicBool::new(false),
        }
    }

    /// Runs `f` on the value. `f` must not lock it again.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        let _locked = self.locked();
        let _revoked = self
            .owned
            .load(Ordering::Relaxed)
            .then(|| Revoked::new(self));
        // SAFETY: the lock is held, and the owner, if there is one, is out and has to take the lock
        // to come in; see the comment on `Sync`.
        f(unsafe { &mut *self.value.get() })
    }

    /// Whether there is an owner.
    pub(crate) fn is_owned(&self) -> bool {
        self.owned.load(Ordering::Relaxed)
    }

    /// Makes the calling thread the owner if there is none and `condition` holds of the value.
    pub(crate) fn own(
        self: &Arc<Self>,
        condition: impl FnOnce(&mut T) -> bool,
    ) -> Option<Owner<T>> {
        self.with(|value| {
            let free = !self.owned.load(Ordering::Relaxed) && condition(value);
            free.then(|| {
                self.owned.store(true, Ordering::Relaxed);
                Owner {
                    biased: self.clone(),
                    resigned: Cell::new(false),
                    not_send: PhantomData,
                }
            })
        })
    }

    fn locked(&self) -> MutexGuard<'_, ()> {
        super::sync::lock(&self.lock)
    }
}

/// Keeps the owner out until it is dropped. The lock is held meanwhile.
struct Revoked<'a, T>(&'a Biased<T>);

impl<'a, T> Revoked<'a, T> {
    fn new(biased: &'a Biased<T>) -> Self {
        biased.revoked.store(true, Ordering::Relaxed);
        // Orders the store above before the load below, and against the owner's store and load: one
        // of the two sees the other.
        barrier::asymmetric_heavy();
        while biased.inside.load(Ordering::Acquire) {
            yield_now();
        }
        Self(biased)
    }
}

impl<T> Drop for Revoked<'_, T> {
    fn drop(&mut self) {
        self.0.revoked.store(false, Ordering::Release);
    }
}

/// The thread that need not take the lock.
pub(crate) struct Owner<T> {
    biased: Arc<Biased<T>>,
    /// Whether it has [resigned](Self::resign).
    resigned: Cell<bool>,
    /// It is a thread, so it stays there.
    not_send: PhantomData<*const ()>,
}

impl<T> Owner<T> {
    /// Runs `f` on the value, unless it has [resigned](Self::resign).
    ///
    /// # Panics
    ///
    /// If `f` calls it.
    #[inline(always)]
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> Option<R> {
        if self.resigned.get() {
            return None;
        }
        let biased = &*self.biased;
        // Only this thread writes it, so this is exact.
        assert!(
            !biased.inside.load(Ordering::Relaxed),
            "the owner of a queue pair is inside already"
        );
        biased.inside.store(true, Ordering::Relaxed);
        let inside = Inside(&biased.inside);
        barrier::asymmetric_light();
        let _way = match biased.revoked.load(Ordering::Acquire) {
            false => Way::Inside(inside),
            true => {
                drop(inside);
                Way::Locked(biased.locked())
            }
        };
        // SAFETY: this thread is the only owner: it has not resigned, and cannot while `f` runs
        // (`resign`). It does not come in twice: either that was checked above, or it would wait for
        // the lock for ever. With the lock held, nobody comes in without it but the owner. Without, it
        // is inside, and whoever has the lock waits until it is out: that thread's `revoked` was not
        // seen here, so by the two barriers it sees `inside`.
        Some(f(unsafe { &mut *biased.value.get() }))
    }

    /// Stops being the owner, so that somebody else can be; returns whether it was until now.
    ///
    /// # Panics
    ///
    /// If what [`with`](Self::with) runs calls it.
    pub(crate) fn resign(&self) -> bool {
        // First: from then on another thread may be the owner, and inside.
        if self.resigned.get() {
            return false;
        }
        let biased = &*self.biased;
        assert!(
            !biased.inside.load(Ordering::Relaxed),
            "the owner of a queue pair resigns while it is inside"
        );
        self.resigned.set(true);
        // If what `with` runs with the lock held calls it, it waits here for ever.
        let _locked = biased.locked();
        biased.owned.store(false, Ordering::Relaxed);
        true
    }
}

/// How the owner came in; dropped when it is out again.
enum Way<'a> {
    Inside(#[expect(dead_code, reason = "to be dropped")] Inside<'a>),
    Locked(#[expect(dead_code, reason = "to be dropped")] MutexGuard<'a, ()>),
}

impl<T> Drop for Owner<T> {
    fn drop(&mut self) {
        self.resign();
    }
}

/// Says that the owner is inside, until it is dropped, also by a panic.
struct Inside<'a>(&'a AtomicBool);

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn owner_and_others_exclude_each_other() {
        const TURNS: u64 = 20_000;
        // Not atomic on purpose: two at a time would lose some.
        let biased = Arc::new(Biased::new((0_u64, 0_u64)));
        let count = |value: &mut (u64, u64)| {
            value.0 += 1;
            std::hint::black_box(&mut *value);
            value.1 += 1;
            assert_eq!(value.0, value.1);
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                let owner = biased.own(|_| true).unwrap();
                for _ in 0..TURNS {
                    owner.with(count);
                }
            });
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..TURNS / 20 {
                        biased.with(count);
                    }
                });
            }
        });
        assert_eq!(biased.with(|value| value.0), TURNS + 2 * (TURNS / 20));
    }

    #[test]
    fn there_is_one_owner_at_a_time() {
        let biased = Arc::new(Biased::new(7));
        assert!(biased.own(|value| *value == 8).is_none());
        let owner = biased.own(|value| *value == 7).unwrap();
        assert!(biased.is_owned() && biased.own(|_| true).is_none());
        owner.with(|value| *value = 8);
        assert_eq!(biased.with(|value| *value), 8);
        drop(owner);
        assert!(!biased.is_owned() && biased.own(|_| true).is_some());
    }

    #[test]
    #[should_panic(expected = "inside already")]
    fn the_owner_does_not_come_in_twice() {
        let biased = Arc::new(Biased::new(()));
        let owner = biased.own(|()| true).unwrap();
        owner.with(|()| owner.with(|()| ()));
    }

    #[test]
    fn who_has_resigned_comes_in_no_more() {
        let biased = Arc::new(Biased::new(7));
        let owner = biased.own(|_| true).unwrap();
        assert!(owner.resign());
        assert_eq!(owner.with(|value| *value), None);
        let next = biased.own(|_| true).unwrap();
        // Also while the next one is inside.
        next.with(|_| {
            assert!(!owner.resign());
            drop(owner);
        });
        assert!(biased.is_owned(), "the next one has not resigned");
        assert_eq!(next.with(|value| *value), Some(7));
    }

    #[test]
    #[should_panic(expected = "while it is inside")]
    fn the_owner_does_not_resign_inside() {
        let biased = Arc::new(Biased::new(()));
        let owner = biased.own(|()| true).unwrap();
        owner.with(|()| owner.resign());
    }

    #[test]
    fn a_panic_inside_leaves_it_usable() {
        let biased = Arc::new(Biased::new(0));
        let owner = biased.own(|_| true).unwrap();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            owner.with(|_| panic!("on purpose"));
        }));
        assert!(panicked.is_err());
        owner.with(|value| *value += 1);
        assert_eq!(biased.with(|value| *value), 1);
    }
}
