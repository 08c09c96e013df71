//! The connection to a client: messages to it, and what the server asks of it.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nvme_soft::LogLimit;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vfio_user::socket::{MessageReader, Received, send};
use vfio_user::{DmaAccess, Limits, Message, Reply, Request};

/// How long a client has to answer DMA_READ and DMA_WRITE. The connection ends if it does not.
pub const DMA_TIMEOUT: Duration = Duration::from_secs(10);
/// What a client has to take by one message at least if it has memory that is asked for: a submission queue
/// entry.
const LEAST_TRANSFER: u32 = 64;

/// Of all clients, each of which is asked once more than it answers at most.
static UNANSWERED: LogLimit = LogLimit::new();

/// One client's connection.
///
/// Its thread receives everything on the client's socket and [delivers](Link::deliver) replies; the
/// controller's thread asks, and waits for them. Where client and server have agreed on a second socket, that
/// is for what the controller's thread asks, and it receives there itself.
#[derive(Debug)]
pub(crate) struct Link {
    stream: UnixStream,
    /// Held while a message is sent.
    sending: Mutex<()>,
    asked: Mutex<Asked>,
    answered: Condvar,
}

#[derive(Debug, Default)]
struct Asked {
    /// What the next message from here is called.
    id: u16,
    /// Bytes that the client takes by one message.
    max_transfer: u32,
    state: State,
    /// The connection is over.
    is_closed: bool,
    twin: Option<Twin>,
    /// The second socket once more, to end it while someone waits there.
    twin_stream: Option<UnixStream>,
}

#[derive(Debug, Default)]
enum State {
    /// Nothing is asked.
    #[default]
    Idle,
    /// A reply is waited for.
    Waiting,
    Answered(Message),
}

#[derive(Debug)]
struct Twin {
    stream: UnixStream,
    reader: MessageReader,
}

impl Link {
    /// A connection to a client that is waited for with so much patience while it does not read.
    pub(crate) fn new(stream: UnixStream, patience: Duration) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        // Zero would be refused.
        stream.set_write_timeout(Some(patience.max(Duration::from_millis(1))))?;
        Ok(Self {
            stream,
            sending: Mutex::default(),
            asked: Mutex::default(),
            answered: Condvar::new(),
        })
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Waits for a while; returns early, and true, when the client has closed its socket or this side did.
    pub(crate) fn is_over(&self, pause: Duration) -> bool {
        // What is always reported is enough.
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        let limit = Timespec::try_from(pause).ok();
        match poll(&mut fds, limit.as_ref()) {
            Ok(count) => count > 0,
            Err(error) => error != Errno::INTR,
        }
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        // Each change is complete in itself.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of how much the client takes at a time, and opens the second socket if it wants one; returns
    /// the client's end of that.
    pub(crate) fn agree(
        &self,
        max_transfer: u32,
        wants_twin: bool,
    ) -> io::Result<Option<UnixStream>> {
        let mut asked = self.asked();
        asked.max_transfer = max_transfer;
        if !wants_twin {
            return Ok(None);
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_write_timeout(Some(DMA_TIMEOUT))?;
        asked.twin_stream = Some(ours.try_clone()?);
        asked.twin = Some(Twin {
            stream: ours,
            reader: MessageReader::new(Limits {
                max_fds: 0,
                max_transfer,
            }),
        });
        Ok(Some(theirs))
    }

    /// Sends a message. The connection ends if that fails.
    pub(crate) fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = send(&self.stream, bytes, fds);
        drop(sending);
        if sent.is_err() {
            self.close();
        }
        sent
    }

    /// Ends the connection: whoever waits for the client goes on.
    pub(crate) fn close(&self) {
        let mut asked = self.asked();
        // What was answered before that is an answer.
        asked.is_closed = true;
        // What is closed already is as it is wanted.
        if let Some(twin) = &asked.twin_stream {
            let _ = twin.shutdown(Shutdown::Both);
        }
        drop(asked);
        self.answered.notify_all();
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Takes a reply; returns false if nothing was asked.
    pub(crate) fn deliver(&self, reply: Message) -> bool {
        let mut asked = self.asked();
        if !matches!(asked.state, State::Waiting) || asked.id != reply.header.id() {
            return false;
        }
        asked.state = State::Answered(reply);
        drop(asked);
        self.answered.notify_all();
        true
    }

    /// Whether memory may be asked for, or a message would carry next to nothing of it.
    pub(crate) fn may_ask(&self) -> bool {
        self.asked().max_transfer >= LEAST_TRANSFER
    }

    /// Reads memory of the client's.
    pub(crate) fn dma_read(&self, address: u64, out: &mut [u8]) -> io::Result<()> {
        let chunk = self.chunk();
        // The end may be that of the address space, so nothing is added up that far.
        for (index, part) in out.chunks_mut(chunk).enumerate() {
            let at = address + (index * chunk) as u64;
            let request = Request::DmaRead(DmaAccess {
                address: at,
                count: part.len() as u64,
            });
            self.ask(&request, |reply| {
                if let Reply::DmaRead { data, .. } = reply {
                    part.copy_from_slice(data);
                }
            })?;
        }
        Ok(())
    }

    /// Writes memory of the client's.
    pub(crate) fn dma_write(&self, address: u64, data: &[u8]) -> io::Result<()> {
        let chunk = self.chunk();
        for (index, part) in data.chunks(chunk).enumerate() {
            let at = address + (index * chunk) as u64;
            let request = Request::DmaWrite {
                address: at,
                data: part,
            };
            self.ask(&request, |_| {})?;
        }
        Ok(())
    }

    fn chunk(&self) -> usize {
        self.asked().max_transfer.max(1) as usize
    }

    /// Asks the client; `take` gets the answer, which is one to that. An answer that is none ends the
    /// connection, and so does none.
    fn ask(&self, request: &Request<'_>, take: impl FnOnce(Reply<'_>)) -> io::Result<()> {
        let mut asked = self.asked();
        if asked.is_closed {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let limits = Limits {
            max_fds: 0,
            max_transfer: asked.max_transfer,
        };
        asked.id = asked.id.wrapping_add(1);
        let bytes = request.encode(asked.id, false);
        let answer = if asked.twin.is_some() {
            self.ask_twin(asked, &bytes)
        } else {
            self.ask_here(asked, &bytes)
        };
        let message = answer.inspect_err(|error| {
            if let Some(left_out) = UNANSWERED.pass() {
                let command = request.command();
                tracing::warn!(%error, %command, left_out, "the client does not answer");
            }
            self.close();
        })?;
        let reply = match message.reply(&limits) {
            Ok(reply) if reply.answers(request) => reply,
            Ok(_) => {
                self.close();
                return Err(io::Error::other("an answer to something else"));
            }
            Err(error @ vfio_user::ReplyError::Peer { .. }) => return Err(io::Error::other(error)),
            Err(error) => {
                self.close();
                return Err(io::Error::other(error));
            }
        };
        take(reply);
        Ok(())
    }

    /// Asks on the client's socket, where another thread receives.
    fn ask_here(&self, mut asked: MutexGuard<'_, Asked>, bytes: &[u8]) -> io::Result<Message> {
        asked.state = State::Waiting;
        // The answer may come before the message is sent altogether.
        drop(asked);
        self.send(bytes, &[])?;
        let until = Instant::now() + DMA_TIMEOUT;
        let mut asked = self.asked();
        loop {
            match std::mem::take(&mut asked.state) {
                State::Answered(message) => return Ok(message),
                _ if asked.is_closed => return Err(io::ErrorKind::ConnectionAborted.into()),
                state => asked.state = state,
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            asked = self
                .answered
                .wait_timeout(asked, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Asks on the second socket. The state stays idle, so that a reply on the other one is one too many.
    fn ask_twin(&self, mut asked: MutexGuard<'_, Asked>, bytes: &[u8]) -> io::Result<Message> {
        let id = asked.id;
        // Out of the lock, which whoever closes the connection takes.
        let Some(mut twin) = asked.twin.take() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        drop(asked);
        let answer = twin.ask(bytes, id);
        self.asked().twin = Some(twin);
        answer
    }
}

impl Twin {
    fn ask(&mut self, bytes: &[u8], id: u16) -> io::Result<Message> {
        send(self.stream.as_fd(), bytes, &[])?;
        let until = Instant::now() + DMA_TIMEOUT;
        let received = self
            .reader
            .read_in_time(&self.stream, Some(until), DMA_TIMEOUT);
        match received.map_err(io::Error::other)? {
            Received::Message(message) if message.header.id() == id => Ok(message),
            Received::Message(_) => Err(io::Error::other("an answer to something else")),
            Received::Pending => Err(io::ErrorKind::TimedOut.into()),
            Received::Closed => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Ends the connection when the session is over, however.
pub(crate) struct CloseOnDrop(pub(crate) Arc<Link>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_answered_before_it_left_counts() {
        for _ in 0..50 {
            let (ours, theirs) = UnixStream::pair().expect("sockets");
            let link = Link::new(ours, DMA_TIMEOUT).expect("a connection");
            link.agree(4096, false).expect("agreed");
            std::thread::scope(|scope| {
                let asking = scope.spawn(|| {
                    let mut data = [0; 8];
                    link.dma_read(0x1000, &mut data).map(|()| data)
                });
                let mut reader = MessageReader::new(Limits::default());
                let Ok(Received::Message(asked)) = reader.read(&theirs) else {
                    panic!("not asked");
                };
                let answer = Reply::DmaRead {
                    address: 0x1000,
                    data: &[7; 8],
                };
                let bytes = answer.encode(&asked.header);
                let answer = vfio_user::message(&bytes, &Limits::default()).expect("a message");
                assert!(link.deliver(answer));
                link.close();
                let data = asking.join().expect("no panic").expect("it was answered");
                assert_eq!(data, [7; 8]);
            });
            assert!(link.dma_read(0x1000, &mut [0]).is_err());
        }
    }
}
