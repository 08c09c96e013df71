//! The thread that reads from the socket: it hands out replies, serves the server's own requests, and
//! sends what others had no room for.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use vfio_user::socket::{MessageReader, ReceiveError, Received};
use vfio_user::{DmaAccess, Message, Reply, Request};

use super::connection::{Connection, End, Over, limits};

/// Messages that are read before others have their turn.
const BURST: usize = 64;
/// How long a server may take to notice that a connection was closed.
const FAREWELL: Duration = Duration::from_secs(1);

/// Starts the thread. It ends with the connection.
pub(super) fn start(connection: Arc<Connection>) -> io::Result<()> {
    let thread = thread::Builder::new().name("nvme-vfio-user".to_owned());
    thread.spawn(move || serve(&connection)).map(drop)
}

fn serve(connection: &Connection) {
    let mut reader = MessageReader::new(limits());
    loop {
        let work = connection.work();
        if work.ended {
            break;
        }
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, work.reads);
        wanted.set(PollFlags::OUT, work.writes);
        let ready = wait(connection.socket(), wanted, Some(connection.wake()), None);
        // Where the server has closed it, the attempt says so.
        let failed = ready.intersects(PollFlags::ERR | PollFlags::HUP);
        if ready.contains(PollFlags::OUT) || (failed && work.writes) {
            connection.send_unsent();
        }
        if ready.contains(PollFlags::IN) || (failed && work.reads) {
            read(connection, &mut reader);
        }
        // It is emptied before what it tells of is looked at.
        let _ = rustix::io::read(connection.wake(), &mut [0; 8]);
    }
    connection.set_over(farewell(connection));
}

fn read(connection: &Connection, reader: &mut MessageReader) {
    for _ in 0..BURST {
        match reader.read(connection.socket()) {
            Ok(Received::Message(message)) if message.header.is_reply() => {
                connection.replied(message);
            }
            Ok(Received::Message(message)) => serve_request(connection, &message),
            Ok(Received::Pending) => return,
            Ok(Received::Closed) | Err(ReceiveError::Truncated) => {
                return connection.end(End::ByPeer);
            }
            Err(error) => return connection.end(End::Violation(error.to_string())),
        }
    }
}

/// Reads or writes memory for a server that has not mapped it; that is all that it may ask for.
fn serve_request(connection: &Connection, message: &Message) {
    let header = &message.header;
    let mut data = Vec::new();
    let answer = match message.request(&limits()) {
        Ok(Request::DmaRead(DmaAccess { address, count })) => {
            // No more than the limits allow: it was decoded by them.
            data.resize(count as usize, 0);
            let read = connection.memory.read(address, &mut data);
            read.map(|()| Reply::DmaRead {
                address,
                data: &data,
            })
        }
        Ok(Request::DmaWrite { address, data }) => {
            let count = data.len() as u64;
            let written = connection.memory.write(address, data);
            written.map(|()| Reply::DmaWrite(DmaAccess { address, count }))
        }
        Ok(request) => {
            let device = connection.address();
            tracing::warn!(device, command = %request.command(), "the server asks for what no client has");
            return connection.answer(header, Err(Errno::OPNOTSUPP.raw_os_error() as u32));
        }
        Err(error) => {
            tracing::warn!(device = connection.address(), %error, "a request of the server's");
            return connection.answer(header, Err(error.errno()));
        }
    };
    let answer = answer.map_err(|stray| {
        tracing::error!(device = connection.address(), %stray, "stray access");
        Errno::FAULT.raw_os_error() as u32
    });
    connection.answer(header, answer);
}

/// Says that nothing more will come, and waits for the server to close the connection too: then it has
/// let go of memory.
fn farewell(connection: &Connection) -> Over {
    if connection.why_ended() == Some(End::ByPeer) {
        return Over::PeerClosed;
    }
    // It fails where the server has closed it already.
    let _ = shutdown(connection.socket(), Shutdown::Write);
    let until = Instant::now() + FAREWELL;
    let mut rest = [0; 4096];
    loop {
        match recv(connection.socket(), &mut rest[..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) | Err(Errno::CONNRESET) => return Over::PeerClosed,
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let left = until.saturating_duration_since(Instant::now());
                wait(connection.socket(), PollFlags::IN, None, Some(left));
            }
            Err(_) => return Over::Unknown,
        }
        if Instant::now() >= until {
            return Over::Unknown;
        }
    }
}

/// Waits until the socket can do one of these, `wake` is signalled or the time has passed; returns what
/// the socket can do.
fn wait(
    socket: BorrowedFd<'_>,
    wanted: PollFlags,
    wake: Option<BorrowedFd<'_>>,
    timeout: Option<Duration>,
) -> PollFlags {
    // Within an i64 for any time that is waited here.
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    let mut watched = vec![PollFd::from_borrowed_fd(socket, wanted)];
    watched.extend(wake.map(|wake| PollFd::from_borrowed_fd(wake, PollFlags::IN)));
    match poll(&mut watched, timeout.as_ref()) {
        Ok(_) => watched[0].revents(),
        Err(Errno::INTR | Errno::AGAIN | Errno::NOMEM) => PollFlags::empty(),
        Err(error) => unreachable!("poll of open descriptors: {error}"),
    }
}
