//! Front ends, which connect one after the other.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use vhost::vhost_user::{BackendReqHandler, Error, VhostUserBackendReqHandlerMut};

use super::device::{Device, DeviceInner};
use super::padded::{self, PaddedTable};
use super::session::Session;

/// How long is waited where a connection can't be accepted, such as for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl Device {
    /// Serves the front ends that connect to `listener`, one after the other, until `stop` resolves. What they do wrong
    /// is logged.
    ///
    /// At the end no more requests are taken, those that were are completed, and the guest's memory is given back. The
    /// front end's connection is closed; it may connect to the next server, whose guest notices nothing.
    ///
    /// The tasks of its queues run in the runtime that this is awaited in, and a thread of its blocking pool for the
    /// connection. Each request goes to the queue pair of the worker that its task runs on.
    ///
    /// # Cancel safety
    ///
    /// Dropping it closes the connection; the rest is done without it.
    pub async fn run(&self, listener: UnixListener, stop: impl Future<Output = ()>) {
        // Several ask, and some again.
        let stop = stop.shared();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.clone() => return,
            };
            match accepted.and_then(|(stream, _)| stream.into_std()) {
                Ok(stream) => {
                    tracing::debug!("a front end has connected");
                    match self.serve(stream, stop.clone()).await {
                        Ok(()) => tracing::debug!("the front end has left"),
                        Err(error) => self.inner.report(&error),
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    tokio::select! {
                        () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                        () = stop.clone() => return,
                    }
                }
            }
        }
    }

    /// Serves one front end, which has connected, until it leaves or `stop` resolves; what [`run`](Self::run) does with
    /// each.
    ///
    /// # Errors
    ///
    /// What the front end did wrong, or why the connection has ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping it closes the connection; the rest is done without it.
    pub async fn serve(
        &self,
        stream: UnixStream,
        stop: impl Future<Output = ()>,
    ) -> io::Result<()> {
        let mut connection = Connection::start(stream, self.inner.clone())?;
        tokio::select! {
            ended = &mut connection.thread => return ended?,
            () = stop => {}
        }
        connection.close();
        // That it was closed is no fault of the front end's.
        let _ = (&mut connection.thread).await?;
        Ok(())
    }
}

impl DeviceInner {
    fn report(&self, error: &io::Error) {
        if let Some(left_out) = self.log_limit.pass() {
            tracing::warn!(%error, left_out, "the connection of a front end has ended");
        }
    }
}

/// A front end's connection, and the thread that receives its messages: the crate `vhost` reads a socket by calls that
/// wait. Closed on drop.
struct Connection {
    stream: UnixStream,
    /// Ends when nothing of the guest's is in use any more.
    thread: JoinHandle<io::Result<()>>,
}

impl Connection {
    fn start(stream: UnixStream, device: Arc<DeviceInner>) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        let clone = stream.try_clone()?;
        let runtime = Handle::current();
        let thread = tokio::task::spawn_blocking(move || serve(clone, device, runtime));
        Ok(Self { stream, thread })
    }

    fn close(&self) {
        // What is closed already is as it is wanted.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

/// Does what the front end says until it leaves.
fn serve(stream: UnixStream, device: Arc<DeviceInner>, runtime: Handle) -> io::Result<()> {
    let session = Arc::new(Mutex::new(Session::new(device, runtime)));
    let mut messages = BackendReqHandler::from_stream(stream.try_clone()?, session.clone());
    let ended = loop {
        match handle_message(&stream, &mut messages, &session) {
            Ok(()) => {}
            Err(Error::Disconnected) => break Ok(()),
            Err(error) => break Err(io::Error::other(error)),
        }
    };
    // Closed, so that the front end learns of it, before what may take its time.
    let _ = stream.shutdown(Shutdown::Both);
    locked(&session).close();
    ended
}

/// Waits for a message, and does what it says.
fn handle_message(
    stream: &UnixStream,
    messages: &mut BackendReqHandler<Mutex<Session>>,
    session: &Mutex<Session>,
) -> Result<(), Error> {
    let padded = PaddedTable::receive(stream).map_err(Error::ReqHandlerError)?;
    let Some(table) = padded else {
        return messages.handle_request();
    };
    let mut session = locked(session);
    let done = session.set_mem_table(&table.regions, table.files, None);
    if table.needs_reply && session.acknowledges() {
        padded::acknowledge(stream, done.is_ok()).map_err(Error::ReqHandlerError)?;
    }
    done.map(drop)
}

fn locked(session: &Mutex<Session>) -> MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}
