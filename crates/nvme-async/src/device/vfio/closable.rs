//! What is closed while others still refer to it.

use std::io;
use std::sync::{PoisonError, RwLock, RwLockWriteGuard, TryLockError};

/// Something open, for many users, until one of them closes it.
#[derive(Debug)]
pub(super) struct Closable<T>(RwLock<Option<T>>);

impl<T> Closable<T> {
    pub(super) fn new(open: T) -> Self {
        Self(RwLock::new(Some(open)))
    }

    /// Uses it, and never waits. `ENODEV` when it is closed, or about to be.
    pub(super) fn with<R>(&self, usage: impl FnOnce(&T) -> io::Result<R>) -> io::Result<R> {
        let open = match self.0.try_read() {
            Ok(open) => open,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Nobody but `close` keeps others out.
            Err(TryLockError::WouldBlock) => return Err(gone()),
        };
        open.as_ref().map_or_else(|| Err(gone()), usage)
    }

    /// Closes it when the uses that have begun are over. Those to come fail already while the value
    /// is dropped, which may take long.
    pub(super) fn close(&self) {
        let open = self
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(open);
    }
}

/// Something open for as long as anybody is in it.
#[derive(Debug)]
pub(super) struct Shared<T>(RwLock<Members<T>>);

#[derive(Debug)]
struct Members<T> {
    count: usize,
    open: Option<T>,
}

impl<T> Shared<T> {
    /// Without anybody in it yet.
    pub(super) fn new(open: T) -> Self {
        Self(RwLock::new(Members {
            count: 0,
            open: Some(open),
        }))
    }

    /// Enters; not when it is closed, which is for good.
    pub(super) fn enter(&self) -> bool {
        let mut members = self.lock();
        members.count += usize::from(members.open.is_some());
        members.open.is_some()
    }

    /// Takes back one [`enter`](Self::enter). The last to leave closes it, and keeps others waiting
    /// meanwhile.
    pub(super) fn leave(&self) {
        let mut members = self.lock();
        members.count = members.count.saturating_sub(1);
        if members.count == 0 {
            members.open = None;
        }
    }

    /// Does something during which it is not closed, if it is open: what is there then is passed.
    pub(super) fn with<R>(&self, usage: impl FnOnce(Option<&T>) -> R) -> R {
        let members = self.0.read().unwrap_or_else(PoisonError::into_inner);
        usage(members.open.as_ref())
    }

    fn lock(&self) -> RwLockWriteGuard<'_, Members<T>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What every access to a device gets that was given back.
pub(super) fn gone() -> io::Error {
    io::Error::from_raw_os_error(libc::ENODEV)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex, mpsc};
    use std::thread;

    use super::*;

    fn code<T>(result: io::Result<T>) -> Option<i32> {
        result.err()?.raw_os_error()
    }

    #[test]
    fn closed_once_and_for_good() {
        let value = Arc::new(());
        let closable = Closable::new(value.clone());
        closable.with(|_| Ok(())).unwrap();
        closable.close();
        assert_eq!(Arc::strong_count(&value), 1);
        assert_eq!(code(closable.with(|_| Ok(()))), Some(libc::ENODEV));
        closable.close();
    }

    /// Tells when it is being dropped, and then takes as long as it is made to.
    struct Slow(mpsc::Sender<()>, mpsc::Receiver<()>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.0.send(());
            let _ = self.1.recv();
        }
    }

    #[test]
    fn who_comes_during_a_long_close_gets_an_error_at_once() {
        let (dropping, is_dropping) = mpsc::channel();
        let (finish, finished) = mpsc::channel();
        // In a mutex because threads can't share a channel's receiver.
        let closable = Closable::new(Mutex::new(Slow(dropping, finished)));
        thread::scope(|scope| {
            scope.spawn(|| closable.close());
            is_dropping.recv().unwrap();
            assert_eq!(code(closable.with(|_| Ok(()))), Some(libc::ENODEV));
            finish.send(()).unwrap();
        });
    }

    #[test]
    fn a_close_waits_for_uses_and_new_ones_do_not_wait_for_it() {
        let closable = Closable::new(());
        let in_use = AtomicBool::new(true);
        let (used, is_used) = mpsc::channel();
        let (finish, finished) = mpsc::channel::<()>();
        let (closable, in_use) = (&closable, &in_use);
        thread::scope(|scope| {
            scope.spawn(move || {
                closable.with(|()| {
                    used.send(()).unwrap();
                    finished.recv().unwrap();
                    in_use.store(false, Ordering::SeqCst);
                    Ok(())
                })
            });
            is_used.recv().unwrap();
            scope.spawn(move || {
                closable.close();
                assert!(!in_use.load(Ordering::SeqCst), "closed under a user");
            });
            // Sooner or later the other thread waits; from then on nobody gets in.
            while closable.with(|()| Ok(())).is_ok() {
                thread::yield_now();
            }
            assert!(in_use.load(Ordering::SeqCst));
            finish.send(()).unwrap();
        });
    }

    #[test]
    fn the_last_to_leave_closes() {
        let value = Arc::new(());
        let shared = Shared::new(value.clone());
        assert!(shared.enter() && shared.enter());
        shared.leave();
        assert!(shared.with(|open| open.is_some()));
        shared.leave();
        assert_eq!(Arc::strong_count(&value), 1);
        assert!(shared.with(|open| open.is_none()));
        assert!(!shared.enter(), "it stays closed");
        assert!(!shared.enter());
    }
}
