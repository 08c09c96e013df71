//! Messages with their file descriptors over a Unix stream socket.
//!
//! [`MessageReader`] takes what there is and goes on where it stopped, so that it serves a socket that may
//! not block as well as one that does; so does [`Outgoing`] for what is sent.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::error::DecodeError;
use crate::header::{HEADER_SIZE, Header};
use crate::message::{Limits, Message};

/// Descriptors that the kernel passes at a time (SCM_MAX_FD).
const MAX_FDS: usize = 253;
/// Memory is taken for so many bytes at a time: what a peer announces costs nothing until it comes.
const STEP: usize = 64 << 10;

/// Why a message was not received. There is no telling where the next one begins: the connection is
/// over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The socket failed.
    #[error("the socket: {0}")]
    Io(#[from] io::Error),
    /// The peer closed the socket, or died, inside of a message.
    #[error("the peer closed the socket inside of a message")]
    Truncated,
    /// The header is wrong.
    #[error(transparent)]
    Header(#[from] DecodeError),
    /// More file descriptors than are accepted, or than this process may have open.
    #[error("more file descriptors than can be received")]
    TooManyDescriptors,
}

/// What [`MessageReader::read`] found.
#[derive(Debug)]
pub enum Received {
    /// A message.
    Message(Message),
    /// No whole message yet, on a socket that does not block.
    Pending,
    /// The peer has closed the socket, between two messages.
    Closed,
}

/// Receives messages, bit by bit as they come.
#[derive(Debug)]
pub struct MessageReader {
    limits: Limits,
    header_bytes: [u8; HEADER_SIZE],
    header: Option<Header>,
    payload: Vec<u8>,
    /// Bytes of the header, or else of the payload, that are there.
    filled: usize,
    fds: Vec<OwnedFd>,
}

impl MessageReader {
    /// A reader that accepts so much.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            header_bytes: [0; HEADER_SIZE],
            header: None,
            payload: Vec::new(),
            filled: 0,
            fds: Vec::new(),
        }
    }

    /// Accepts other messages from the next one on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Receives until a message is complete, the socket would block, or the peer has closed it. Always of
    /// the same socket, since what it has of a message is kept.
    ///
    /// # Errors
    ///
    /// [`ReceiveError`]; the socket is of no use any more then.
    pub fn read(&mut self, socket: impl AsFd) -> Result<Received, ReceiveError> {
        loop {
            if let Some(received) = self.step(socket.as_fd(), RecvFlags::empty())? {
                return Ok(received);
            }
        }
    }

    /// As [`MessageReader::read`], for a socket that blocks, with limits: a message that has begun is to be
    /// complete after the time `rest`, and by `until` at the latest if that is given.
    /// [`Received::Pending`] if it is not. However slowly its bytes come, they do not extend that.
    ///
    /// # Errors
    ///
    /// As [`MessageReader::read`].
    pub fn read_in_time(
        &mut self,
        socket: impl AsFd,
        until: Option<Instant>,
        rest: Duration,
    ) -> Result<Received, ReceiveError> {
        let socket = socket.as_fd();
        let mut until = until;
        let mut has_begun = false;
        loop {
            if self.has_begun() && !has_begun {
                has_begun = true;
                // One that cannot be counted to never comes.
                let end = Instant::now().checked_add(rest);
                until = until.into_iter().chain(end).min();
            }
            // Without a limit there is one system call less.
            let flags = match until {
                None => RecvFlags::empty(),
                Some(_) => RecvFlags::DONTWAIT,
            };
            match self.step(socket, flags)? {
                None => {}
                Some(Received::Pending) if wait_readable(socket, until)? => {}
                Some(received) => return Ok(received),
            }
        }
    }

    fn has_begun(&self) -> bool {
        self.header.is_some() || self.filled > 0
    }

    /// Receives once; `None` if there is more to receive.
    fn step(
        &mut self,
        socket: BorrowedFd<'_>,
        flags: RecvFlags,
    ) -> Result<Option<Received>, ReceiveError> {
        let Some(header) = self.header else {
            // Never past the end of a message: the kernel would say only that descriptors came, not
            // with which of two.
            let into = &mut self.header_bytes[self.filled..];
            match receive(socket, into, &mut self.fds, self.limits.max_fds, flags)? {
                None => return Ok(Some(Received::Pending)),
                Some(0) if self.filled == 0 => return Ok(Some(Received::Closed)),
                Some(0) => return Err(ReceiveError::Truncated),
                Some(count) => self.filled += count,
            }
            if self.filled == HEADER_SIZE {
                self.header = Some(Header::decode(&self.header_bytes, &self.limits)?);
                self.filled = 0;
            }
            return Ok(None);
        };
        let size = header.payload_size();
        if self.filled == size {
            self.header = None;
            self.filled = 0;
            return Ok(Some(Received::Message(Message {
                header,
                payload: std::mem::take(&mut self.payload),
                fds: std::mem::take(&mut self.fds),
            })));
        }
        self.payload.resize(size.min(self.filled + STEP), 0);
        let into = &mut self.payload[self.filled..];
        match receive(socket, into, &mut self.fds, self.limits.max_fds, flags)? {
            None => Ok(Some(Received::Pending)),
            Some(0) => Err(ReceiveError::Truncated),
            Some(count) => {
                self.filled += count;
                Ok(None)
            }
        }
    }
}

/// Waits until there is something to receive, or the peer is gone; returns false when it is too late.
fn wait_readable(socket: BorrowedFd<'_>, until: Option<Instant>) -> io::Result<bool> {
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(false);
        }
        // One that is too long for the system is none.
        let limit = left.and_then(|left| Timespec::try_from(left).ok());
        let mut wanted = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
        match poll(&mut wanted, limit.as_ref()) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives some bytes, and the descriptors that come with them; `None` if it would block.
fn receive(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    max_fds: usize,
    flags: RecvFlags,
) -> Result<Option<usize>, ReceiveError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(into)];
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        match recvmsg(socket, &mut parts, &mut control, flags) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            // As a close: whatever the peer had sent before is read already.
            Err(Errno::CONNRESET) => return Ok(Some(0)),
            Err(error) => return Err(io::Error::from(error).into()),
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > max_fds {
        return Err(ReceiveError::TooManyDescriptors);
    }
    Ok(Some(received.bytes))
}

/// A message on its way out, bit by bit as there is room.
#[derive(Debug)]
pub struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl Outgoing {
    /// A message with these file descriptors beside it.
    pub fn new(bytes: Vec<u8>, fds: Vec<OwnedFd>) -> Self {
        Self {
            bytes,
            sent: 0,
            fds,
        }
    }

    /// Sends what there is room for; returns whether that was all. Where the socket blocks it always is.
    /// The descriptors go with the first byte, and are closed then.
    ///
    /// # Errors
    ///
    /// What the socket reports. [`io::ErrorKind::BrokenPipe`] if the peer has closed it.
    pub fn write(&mut self, socket: impl AsFd) -> io::Result<bool> {
        while self.sent < self.bytes.len() {
            let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
            match send_some(socket.as_fd(), &self.bytes[self.sent..], &fds) {
                Ok(count) => self.sent += count,
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
            self.fds.clear();
        }
        Ok(true)
    }
}

/// Sends a message with these file descriptors beside it, and waits for room where the socket would
/// block.
///
/// # Errors
///
/// What the socket reports, [`io::ErrorKind::WouldBlock`] if it has a time limit (SO_SNDTIMEO) that has
/// passed. Half of the message may have been sent then.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let socket = socket.as_fd();
    let blocks = !rustix::fs::fcntl_getfl(socket)?.contains(rustix::fs::OFlags::NONBLOCK);
    let mut sent = 0;
    while sent < bytes.len() {
        let beside = if sent == 0 { fds } else { &[] };
        match send_some(socket, &bytes[sent..], beside) {
            Ok(count) => sent += count,
            Err(Errno::AGAIN) if !blocks => {
                let mut wanted = [PollFd::from_borrowed_fd(socket, PollFlags::OUT)];
                match poll(&mut wanted, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn send_some(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL);
    }
    loop {
        match sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Err(Errno::INTR) => {}
            sent => return sent,
        }
    }
}
