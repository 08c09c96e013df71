//! The threads of one connection.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vfio_user::Message;
use vfio_user::socket::{MessageReader, ReceiveError, Received};

use crate::device::Device;
use crate::link::{CloseOnDrop, Link};
use crate::session::{LIMITS, Session, Violation};

/// Messages that wait for their turn. A client that sends more is not read until one was served, or an access
/// to its memory has timed out: it can't have the server keep more than that.
const QUEUE: usize = 1024;
/// How long is waited before one more message is tried, where so many wait.
const FULL_PAUSE: Duration = Duration::from_millis(2);

/// How a connection ended, if not by the client closing it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// What the client sent is no message, or the socket failed.
    #[error("receiving: {0}")]
    Receive(#[from] ReceiveError),
    /// The client does not speak the protocol.
    #[error("the client does not keep to the protocol: {0}")]
    Protocol(String),
    /// The client has begun something and not gone on in time ([`Options::patience`](crate::Options::patience)).
    #[error("the client has sent {0} in time")]
    Late(&'static str),
    /// The socket could not be used.
    #[error("the connection: {0}")]
    Io(#[from] io::Error),
}

impl Device {
    /// Serves one client until it leaves, or its connection is shut down. Another client is waited for.
    ///
    /// # Errors
    ///
    /// [`ServeError`] if the connection did not end between two messages. The device is as good as new in
    /// any case.
    pub fn serve(&self, stream: UnixStream) -> Result<(), ServeError> {
        let client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        self.welcome_client()?;
        let link = Arc::new(Link::new(stream, self.patience)?);
        let forget = ForgetOnDrop(self);
        let closed = CloseOnDrop(link.clone());
        let session = Mutex::new(Session::new(self, link.clone()));
        let waiting = AtomicUsize::new(0);
        let outcome = thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel(QUEUE);
            let worker = thread::Builder::new()
                .name("nvme-vfio-user".into())
                .spawn_scoped(scope, || work(receiver, &session, &waiting, &link))?;
            let outcome = receive(&link, self.patience, |message| {
                if waiting.load(Ordering::Acquire) == 0 && !Session::may_wait(&message) {
                    return lock(&session).handle(message);
                }
                waiting.fetch_add(1, Ordering::Relaxed);
                hand_over(&link, &sender, message)
            });
            // What the worker waits for does not come any more.
            drop(closed);
            drop(sender);
            self.vectors.close();
            let violation = worker.join().unwrap_or(Some(Violation::Lost));
            match (outcome, violation) {
                (Err(error), _) => Err(error),
                (Ok(()), Some(violation)) => Err(ServeError::Protocol(violation.to_string())),
                (Ok(()), None) => Ok(()),
            }
        });
        drop(forget);
        drop(client);
        outcome
    }
}

/// Forgets the client whatever happens.
struct ForgetOnDrop<'a>(&'a Device);

impl Drop for ForgetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.forget_client();
    }
}

fn lock<'a, 'b>(session: &'a Mutex<Session<'b>>) -> MutexGuard<'a, Session<'b>> {
    // All of it is valid whenever a message has been handled halfway.
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Receives until the connection ends: commands are for `serve`, replies for whoever waits for them.
fn receive(
    link: &Link,
    patience: Duration,
    mut serve: impl FnMut(Message) -> Result<(), Violation>,
) -> Result<(), ServeError> {
    let mut reader = MessageReader::new(LIMITS);
    // For the first message, which is VERSION or the end.
    let mut until = Instant::now().checked_add(patience);
    loop {
        let message = match reader.read_in_time(link.stream(), until, patience)? {
            Received::Message(message) => message,
            Received::Pending if until.is_some() => return Err(ServeError::Late("no VERSION")),
            Received::Pending => return Err(ServeError::Late("no whole message")),
            Received::Closed => return Ok(()),
        };
        until = None;
        if message.header.is_reply() {
            if !link.deliver(message) {
                return Err(ServeError::Protocol("a reply to nothing".to_owned()));
            }
        } else if let Err(violation) = serve(message) {
            return Err(ServeError::Protocol(violation.to_string()));
        }
    }
}

/// Leaves a message to the worker, who may be waiting for the client. When that one leaves it is known here.
fn hand_over(link: &Link, worker: &SyncSender<Message>, message: Message) -> Result<(), Violation> {
    let mut message = message;
    loop {
        message = match worker.try_send(message) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Full(message)) => message,
            Err(TrySendError::Disconnected(_)) => return Err(Violation::Lost),
        };
        if link.is_over(FULL_PAUSE) {
            return Err(Violation::Lost);
        }
    }
}

/// Serves what may have to wait, and all that comes after it until then.
fn work(
    messages: Receiver<Message>,
    session: &Mutex<Session<'_>>,
    waiting: &AtomicUsize,
    link: &Link,
) -> Option<Violation> {
    for message in messages {
        if let Err(violation) = lock(session).handle(message) {
            link.close();
            return Some(violation);
        }
        waiting.fetch_sub(1, Ordering::Release);
    }
    None
}
