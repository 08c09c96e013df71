//! Eventfds of the front end's: kicks, and interrupts of the guest, which may be sockets too.
#![expect(unsafe_code, reason = "an eventfd is registered with the runtime")]

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::thread;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, readlink};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SendFlags, SocketType, send};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Takes a descriptor that is an eventfd and nothing else, and makes it nonblocking.
pub(super) fn check(file: File) -> io::Result<Arc<OwnedFd>> {
    eventfd(file.into()).map(Arc::new)
}

fn eventfd(fd: OwnedFd) -> io::Result<OwnedFd> {
    let name = readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
    if name.to_bytes() != b"anon_inode:[eventfd]" {
        return Err(io::Error::other("a descriptor that is no eventfd"));
    }
    let flags = fcntl_getfl(&fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    }
    Ok(fd)
}

/// What a signal is written to.
#[derive(Debug)]
pub(super) enum Receiver {
    Eventfd(OwnedFd),
    /// A stream socket. User-mode Linux can't be interrupted by an eventfd.
    Socket(OwnedFd),
}

impl Receiver {
    /// Takes a descriptor that is one of the two.
    pub(super) fn check(file: File) -> io::Result<Arc<Self>> {
        let fd = OwnedFd::from(file);
        let is_socket = socket_domain(&fd) == Ok(AddressFamily::UNIX)
            && socket_type(&fd) == Ok(SocketType::STREAM);
        Ok(Arc::new(if is_socket {
            Self::Socket(fd)
        } else {
            Self::Eventfd(eventfd(fd)?)
        }))
    }

    fn write(&self) -> rustix::io::Result<usize> {
        let one = 1_u64.to_ne_bytes();
        match self {
            Self::Eventfd(eventfd) => rustix::io::write(eventfd, &one),
            // Without waiting, whether or not the front end has made the socket one that blocks.
            Self::Socket(socket) => send(socket, &one, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
        }
    }
}

/// How a guest is told that requests are done, or a front end that a queue is broken. It may be exchanged at any
/// time, and be missing.
#[derive(Debug, Default)]
pub(super) struct Signal(Mutex<Option<Arc<Receiver>>>);

impl Signal {
    pub(super) fn set(&self, receiver: Option<Arc<Receiver>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = receiver;
    }

    pub(super) fn send(&self) {
        let receiver = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(receiver) = receiver
            && let Err(error) = receiver.write()
            // One that is full is readable anyway.
            && error != Errno::AGAIN
        {
            tracing::debug!(%error, "a signal to the front end");
        }
    }

    /// Takes the receiver away, and returns when nobody uses it any more. Whoever is held up, because the front end has
    /// made an eventfd block again and filled it, goes on when it is emptied.
    pub(super) fn close(&self) {
        let receiver = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(receiver) = receiver else {
            return;
        };
        while Arc::strong_count(&receiver) > 1 {
            if let Receiver::Eventfd(eventfd) = &*receiver {
                empty(eventfd);
            }
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

    use std::io::{Read, Write};
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use rustix::event::EventfdFlags;

    use super::*;

    /// An eventfd, once for this side and once for the other one.
    fn new(flags: EventfdFlags) -> (File, OwnedFd) {
        let theirs = rustix::event::eventfd(0, flags).expect("an eventfd");
        let ours = theirs.try_clone().expect("cloned");
        (File::from(ours), theirs)
    }

    #[test]
    fn only_eventfds_and_sockets_are_taken() {
        let (pipe, other) = io::pipe().expect("a pipe");
        let (datagrams, _other) = UnixDatagram::pair().expect("sockets");
        let null = File::open("/dev/null").expect("there");
        for wrong in [pipe.into(), other.into(), datagrams.into(), null.into()] {
            let file = File::from(OwnedFd::try_clone(&wrong).expect("cloned"));
            Receiver::check(file).expect_err("neither");
            check(File::from(wrong)).expect_err("no eventfd");
        }
        let (socket, _other) = UnixStream::pair().expect("sockets");
        check(File::from(OwnedFd::from(socket))).expect_err("no eventfd");
    }

    #[test]
    fn sockets_are_signalled_and_hold_up_nobody() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let mut copy = ours.try_clone().expect("cloned");
        let signal = Signal::default();
        signal.set(Some(
            Receiver::check(File::from(OwnedFd::from(ours))).expect("a socket"),
        ));
        signal.send();
        let mut read = [0; 8];
        theirs.read_exact(&mut read).expect("signalled");
        assert_eq!(u64::from_ne_bytes(read), 1);
        // Filled, and then made blocking again; one whose other end is gone.
        copy.set_nonblocking(true).expect("set");
        while copy.write(&[0; 64]).is_ok() {}
        while copy.write(&[0; 1]).is_ok() {}
        copy.set_nonblocking(false).expect("set");
        signal.send();
        drop(theirs);
        signal.send();
        signal.close();
    }

    #[test]
    fn signals_wait_for_nobody() {
        let signal = Signal::default();
        signal.send();
        let (ours, theirs) = new(EventfdFlags::CLOEXEC);
        let ours = Receiver::check(ours).expect("it is one");
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
        let kick = Kick::new(check(ours).expect("it is one")).expect("can be waited for");
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
