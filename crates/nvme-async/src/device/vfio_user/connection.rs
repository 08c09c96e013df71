//! The socket: calls that wait for their reply, doorbells that don't wait, and the end of it all.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vfio_user::socket::Outgoing;
use vfio_user::{
    Command, Header, Limits, Message, RegionWrite, Reply, ReplyError, Request, error_reply, region,
};

use super::memory::Memory;
use crate::device::{DoorbellCall, host};

/// Doorbells are messages that want no reply. Some servers reply nevertheless, which is no offence:
/// their identifiers are apart from those of calls.
const FIRST_POSTED_ID: u16 = 0x8000;

/// While so many bytes wait to be sent, nothing more is read that might have to be answered.
const MAX_UNSENT: usize = 4 << 20;

/// One connection to a server.
///
/// [`service`](super::service) is the thread that reads from it.
pub(super) struct Connection {
    address: Arc<str>,
    socket: OwnedFd,
    /// Wakes the thread that reads.
    wake: OwnedFd,
    reply_timeout: Duration,
    state: Mutex<State>,
    over: Condvar,
    /// Readable once the connection has ended without having been closed here.
    gone: Arc<OwnedFd>,
    /// What the server may read and write by messages.
    pub(super) memory: Memory,
}

#[derive(Default)]
struct State {
    /// What is being sent.
    sending: Option<Outgoing>,
    /// What is to be sent then.
    unsent: VecDeque<Unsent>,
    unsent_bytes: usize,
    /// Who waits for which reply.
    calls: HashMap<u16, SyncSender<Message>>,
    last_call: u16,
    last_posted: u16,
    /// Why nothing is sent any more.
    end: Option<End>,
    /// How it turned out, once the thread that reads has ended.
    over: Option<Over>,
    doorbell_refused: bool,
}

enum Unsent {
    Message {
        bytes: Vec<u8>,
        fds: Vec<OwnedFd>,
    },
    /// Only the last value of a doorbell matters.
    Doorbell {
        offset: u32,
        value: u32,
    },
}

/// Why a connection has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It was closed here.
    Closed,
    /// The server closed it, or died.
    ByPeer,
    /// The server did not answer in time.
    NoAnswer(Command),
    /// The server broke the protocol.
    Violation(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the device was closed"),
            Self::ByPeer => f.write_str("the server has closed the connection"),
            Self::NoAnswer(command) => write!(f, "the server did not answer {command} in time"),
            Self::Violation(what) => write!(f, "the server broke the protocol: {what}"),
        }
    }
}

/// What is known of the server at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// It has closed the connection too, and with that accesses no memory any more.
    PeerClosed,
    /// It may still think that it is connected.
    Unknown,
}

/// What there is to do for the thread that reads.
pub(super) struct Work {
    pub(super) ended: bool,
    pub(super) reads: bool,
    pub(super) writes: bool,
}

impl Connection {
    /// Over a connected socket that does not block.
    pub(super) fn new(
        address: Arc<str>,
        socket: OwnedFd,
        reply_timeout: Duration,
    ) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            address,
            socket,
            wake: host::eventfd()?,
            reply_timeout,
            state: Mutex::default(),
            over: Condvar::new(),
            gone: Arc::new(host::eventfd()?),
            memory: Memory::default(),
        }))
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(super) fn gone(&self) -> &Arc<OwnedFd> {
        &self.gone
    }

    /// Asks the server, and waits for its answer, but no longer than `reply_timeout`; `take` gets what
    /// is in it, with the descriptors beside it.
    ///
    /// # Errors
    ///
    /// What the server reports. An answer that is none, or that does not come, ends the connection.
    pub(super) fn call<R>(
        &self,
        request: &Request<'_>,
        fds: Vec<OwnedFd>,
        take: impl FnOnce(Reply<'_>, Vec<OwnedFd>) -> Option<R>,
    ) -> io::Result<R> {
        self.call_within(self.reply_timeout, request, fds, take)
    }

    /// As [`call`](Self::call), with another time to wait.
    pub(super) fn call_within<R>(
        &self,
        timeout: Duration,
        request: &Request<'_>,
        fds: Vec<OwnedFd>,
        take: impl FnOnce(Reply<'_>, Vec<OwnedFd>) -> Option<R>,
    ) -> io::Result<R> {
        let (id, replied) = self.send(request, fds)?;
        let command = request.command();
        let message = match replied.recv_timeout(timeout) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => {
                self.lock().calls.remove(&id);
                self.end(End::NoAnswer(command));
                return Err(self.ended());
            }
            Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
        };
        let Message {
            header,
            payload,
            fds,
        } = message;
        let violation = |what: String| {
            self.end(End::Violation(what));
            self.ended()
        };
        if header.command() != command {
            return Err(violation(format!(
                "{} in answer to {command}",
                header.command()
            )));
        }
        match Reply::decode(&header, &payload, fds.len(), &limits()) {
            Ok(reply) if reply.answers(request) => {
                let taken = take(reply, fds);
                taken.ok_or_else(|| violation(format!("another answer than that to {command}")))
            }
            Ok(_) => Err(violation(format!("the answer to another {command}"))),
            Err(ReplyError::Peer { errno, .. }) => Err(refusal(command, errno)),
            Err(error) => Err(violation(error.to_string())),
        }
    }

    fn send(
        &self,
        request: &Request<'_>,
        fds: Vec<OwnedFd>,
    ) -> io::Result<(u16, Receiver<Message>)> {
        let (sender, receiver) = sync_channel(1);
        let mut state = self.lock();
        if state.end.is_some() {
            drop(state);
            return Err(self.ended());
        }
        let id = state.new_call(sender)?;
        let bytes = request.encode(id, false);
        state.push(Unsent::Message { bytes, fds });
        self.flush(&mut state);
        Ok((id, receiver))
    }

    /// Answers a request of the server's, if it wants that.
    pub(super) fn answer(&self, header: &Header, answer: Result<Reply<'_>, u32>) {
        if !header.wants_reply() {
            return;
        }
        let bytes = match answer {
            Ok(reply) => reply.encode(header),
            Err(errno) => error_reply(header, errno),
        };
        let mut state = self.lock();
        if state.end.is_none() {
            let fds = Vec::new();
            state.push(Unsent::Message { bytes, fds });
            self.flush(&mut state);
        }
    }

    /// Takes a reply.
    pub(super) fn replied(&self, message: Message) {
        let header = message.header;
        let mut state = self.lock();
        if header.id() >= FIRST_POSTED_ID && header.command() == Command::REGION_WRITE {
            let is_first = header.is_error() && !state.doorbell_refused;
            state.doorbell_refused |= is_first;
            drop(state);
            if is_first {
                // There is nobody to tell: a command whose doorbell is not heard runs into its deadline.
                let (device, error) = (self.address(), header.errno());
                tracing::error!(device, error, "the server refused a doorbell");
            }
            return;
        }
        let call = state.calls.remove(&header.id());
        drop(state);
        match call {
            // It may have lost patience.
            Some(call) => drop(call.send(message)),
            None => self.end(End::Violation(format!(
                "an answer to a message that was not sent ({} {})",
                header.command(),
                header.id()
            ))),
        }
    }

    /// What the thread that reads is to wait for.
    pub(super) fn work(&self) -> Work {
        let state = self.lock();
        Work {
            ended: state.end.is_some(),
            reads: state.unsent_bytes < MAX_UNSENT,
            writes: state.has_unsent(),
        }
    }

    /// Sends what there is room for, and leaves the rest to the thread that reads.
    pub(super) fn send_unsent(&self) {
        let mut state = self.lock();
        if state.end.is_none() {
            self.flush(&mut state);
        }
    }

    fn flush(&self, state: &mut State) {
        match state.flush(self.socket()) {
            Ok(true) => {}
            Ok(false) => host::signal(&self.wake),
            // What the server had sent before it went is still read.
            Err(error) => {
                let end = match error.kind() {
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => End::ByPeer,
                    _ => End::Violation(format!("the socket: {error}")),
                };
                self.end_locked(state, end);
            }
        }
    }

    /// Ends the connection; only the first reason counts. Whoever waits for a reply gets an error.
    pub(super) fn end(&self, end: End) {
        self.end_locked(&mut self.lock(), end);
    }

    fn end_locked(&self, state: &mut State, end: End) {
        if state.end.is_some() {
            return;
        }
        match &end {
            End::Closed => {}
            End::ByPeer => tracing::warn!(device = self.address(), "{end}"),
            _ => tracing::error!(device = self.address(), "{end}"),
        }
        *state = State {
            end: Some(end),
            ..State::default()
        };
        host::signal(&self.wake);
    }

    /// Why the connection has ended, if it has.
    pub(super) fn why_ended(&self) -> Option<End> {
        self.lock().end.clone()
    }

    /// What every call gets once the connection has ended.
    pub(super) fn ended(&self) -> io::Error {
        let end = self.why_ended().unwrap_or(End::ByPeer);
        let kind = match end {
            End::NoAnswer(_) => io::ErrorKind::TimedOut,
            _ => io::ErrorKind::NotConnected,
        };
        io::Error::new(kind, end.to_string())
    }

    /// The thread that reads has nothing more to do.
    pub(super) fn set_over(&self, over: Over) {
        let mut state = self.lock();
        state.over = Some(over);
        let tell = state.end != Some(End::Closed);
        drop(state);
        self.over.notify_all();
        if tell {
            host::signal(&self.gone);
        }
    }

    /// How it turned out, if it is over.
    pub(super) fn how_over(&self) -> Option<Over> {
        self.lock().over
    }

    /// Waits until the thread that reads has ended, which takes a second at most after
    /// [`end`](Self::end).
    pub(super) fn wait_over(&self) -> Over {
        let mut state = self.lock();
        loop {
            if let Some(over) = state.over {
                return over;
            }
            let waited = self.over.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn new_call(&mut self, sender: SyncSender<Message>) -> io::Result<u16> {
        for _ in 0..FIRST_POSTED_ID {
            self.last_call = (self.last_call + 1) % FIRST_POSTED_ID;
            if !self.calls.contains_key(&self.last_call) {
                self.calls.insert(self.last_call, sender);
                return Ok(self.last_call);
            }
        }
        Err(io::Error::other("too many calls at a time"))
    }

    fn has_unsent(&self) -> bool {
        self.sending.is_some() || !self.unsent.is_empty()
    }

    fn push(&mut self, unsent: Unsent) {
        if let Unsent::Message { bytes, .. } = &unsent {
            self.unsent_bytes += bytes.len();
        }
        self.unsent.push_back(unsent);
    }

    /// Leaves a doorbell to be sent, in the place of an older value of it.
    fn push_doorbell(&mut self, offset: u32, value: u32) {
        for unsent in &mut self.unsent {
            if let Unsent::Doorbell {
                offset: other,
                value: older,
            } = unsent
                && *other == offset
            {
                *older = value;
                return;
            }
        }
        self.push(Unsent::Doorbell { offset, value });
    }

    /// Sends what there is room for; returns whether that was all.
    fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        loop {
            if let Some(sending) = &mut self.sending {
                if !sending.write(socket)? {
                    return Ok(false);
                }
                self.sending = None;
            }
            self.sending = match self.unsent.pop_front() {
                None => return Ok(true),
                Some(Unsent::Message { bytes, fds }) => {
                    self.unsent_bytes -= bytes.len();
                    Some(Outgoing::new(bytes, fds))
                }
                Some(Unsent::Doorbell { offset, value }) => {
                    self.last_posted = self.last_posted.wrapping_add(1) | FIRST_POSTED_ID;
                    let write = RegionWrite {
                        region: region::BAR0,
                        offset: offset.into(),
                        data: &value.to_le_bytes(),
                    };
                    let bytes = Request::RegionWrite(write).encode(self.last_posted, true);
                    Some(Outgoing::new(bytes, Vec::new()))
                }
            };
        }
    }
}

/// Never waits for the server: what the socket has no room for is sent by the thread that reads, and
/// until then replaced by newer values, so that it is at most one message for each doorbell.
impl DoorbellCall for Connection {
    fn ring(&self, offset: u32, value: u32) {
        crate::barrier::before_doorbell();
        let mut state = self.lock();
        if state.end.is_none() {
            state.push_doorbell(offset, value);
            self.flush(&mut state);
        }
    }
}

/// What is accepted of the server, as it is told.
pub(super) fn limits() -> Limits {
    Limits {
        max_fds: 8,
        max_transfer: 1 << 20,
    }
}

/// What the server reports, by its number where that is one.
fn refusal(command: Command, errno: u32) -> io::Error {
    match i32::try_from(errno) {
        Ok(errno @ 1..4096) => io::Error::from_raw_os_error(errno),
        _ => io::Error::other(format!("the server refused {command} with error {errno}")),
    }
}
