//! Eventfds of the front end's: kicks, and interrupts of the guest.
#![expect(unsafe_code, reason = "an eventfd is registered with the runtime")]

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::thread;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, readlink};
use rustix::io::{Errno, ReadWriteFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Takes a descriptor that is an eventfd and nothing else, and makes it nonblocking.
pub(super) fn check(file: File) -> io::Result<Arc<OwnedFd>> {
    let fd = OwnedFd::from(file);
    let name = readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
    if name.to_bytes() != b"anon_inode:[eventfd]" {
        return Err(io::Error::other("a descriptor that is no eventfd"));
    }
    let flags = fcntl_getfl(&fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    }
    Ok(Arc::new(fd))
}

/// How a guest is told that requests are done, or a front end that a queue is broken. It may be exchanged at any
/// time, and be missing.
#[derive(Debug, Default)]
pub(super) struct Signal(Mutex<Option<Arc<OwnedFd>>>);

impl Signal {
    pub(super) fn set(&self, eventfd: Option<Arc<OwnedFd>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = eventfd;
    }

    pub(super) fn send(&self) {
        let eventfd = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(eventfd) = eventfd
            && let Err(error) = rustix::io::write(&eventfd, &1_u64.to_ne_bytes())
            // One that is full is readable anyway.
            && error != Errno::AGAIN
        {
            tracing::debug!(%error, "an eventfd of the front end's");
        }
    }

    /// Takes the eventfd away, and returns when nobody uses it any more. Whoever is held up, because the front end has
    /// made it block again and filled it, goes on when it is emptied.
    pub(super) fn close(&self) {
        let eventfd = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(eventfd) = eventfd else {
            return;
        };
        while Arc::strong_count(&eventfd) > 1 {
            empty(&eventfd);
            thread::yield_now();
        }
    }
}

/// What becomes readable when there is work.
#[derive(Debug)]
pub(super) struct Kick(AsyncFd<Arc<OwnedFd>>);

impl Kick {
    /// # Errors
    ///
    /// It can't be waited for.
    pub(super) fn new(eventfd: Arc<OwnedFd>) -> io::Result<Self> {
        // SAFETY: the descriptor is open for as long as the `Arc` is held, which the `AsyncFd` does, and nobody
        // gets it out of there.
        let registered = unsafe { AsyncFd::register_with_interest(eventfd, Interest::READABLE) };
        Ok(Self(registered.map_err(|error| error.into_parts().1)?))
    }

    /// Resolves when there was a kick since the last time.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            if empty(guard.get_inner()) {
                return Poll::Ready(Ok(()));
            }
            guard.clear_ready();
        }
    }
}

/// Empties an eventfd; returns whether there was something in it. Whether it blocks is for the front end to say at any
/// time, but not for a read that says so itself; an eventfd has no position.
fn empty(eventfd: &OwnedFd) -> bool {
    let mut count = [0; 8];
    let into = &mut [IoSliceMut::new(&mut count)];
    rustix::io::preadv2(eventfd, into, u64::MAX, ReadWriteFlags::NOWAIT).is_ok()
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn new(flags: EventfdFlags) -> (Arc<OwnedFd>, OwnedFd) {
        let theirs = eventfd(0, flags).expect("an eventfd");
        let ours = theirs.try_clone().expect("cloned");
        (check(File::from(ours)).expect("it is one"), theirs)
    }

    #[test]
    fn only_eventfds_are_taken() {
        let (pipe, _other) = io::pipe().expect("a pipe");
        check(File::from(OwnedFd::from(pipe))).expect_err("no eventfd");
        check(File::open("/dev/null").expect("there")).expect_err("no eventfd");
    }

    #[test]
    fn signals_wait_for_nobody() {
        let signal = Signal::default();
        signal.send();
        let (ours, theirs) = new(EventfdFlags::CLOEXEC);
        signal.set(Some(ours.clone()));
        rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).expect("fills it");
        signal.send();
        // However the front end has it by now.
        fcntl_setfl(&theirs, OFlags::empty()).expect("blocks");
        thread::scope(|scope| {
            let sender = scope.spawn(|| signal.send());
            while Arc::strong_count(&ours) < 3 && !sender.is_finished() {
                thread::yield_now();
            }
            drop(ours);
            signal.close();
            sender.join().expect("does not panic");
        });
        signal.send();
        assert!(
            !empty(&theirs) || !empty(&theirs),
            "nobody signals any more"
        );
    }

    #[tokio::test]
    async fn kicks_are_seen_once() {
        let (ours, theirs) = new(EventfdFlags::CLOEXEC);
        let kick = Kick::new(ours).expect("can be waited for");
        for _ in 0..2 {
            let mut kicked = std::pin::pin!(poll_fn(|cx| kick.poll(cx)));
            assert!(futures::poll!(&mut kicked).is_pending());
            rustix::io::write(&theirs, &3_u64.to_ne_bytes()).expect("signals");
            // However the front end has it by now.
            fcntl_setfl(&theirs, OFlags::empty()).expect("blocks");
            kicked.await.expect("readable");
        }
    }
}
