//! The server: one client after the other.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nvme_soft::LogLimit;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::device::Device;
use crate::socket::{BindError, Socket};

/// How long is waited where a connection can't be accepted, such as for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket for clients to connect to; removed on drop.
#[derive(Debug)]
pub struct Server {
    socket: Socket,
    stop: Arc<Stop>,
    log_limit: LogLimit,
}

#[derive(Debug)]
struct Stop {
    stopped: AtomicBool,
    wake: OwnedFd,
    client: Mutex<Option<UnixStream>>,
}

/// Ends [`Server::run`].
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Stop>);

impl Stopper {
    /// Ends the connection that there is, and the server. May be called from any thread.
    pub fn stop(&self) {
        self.0.stopped.store(true, Ordering::SeqCst);
        if let Err(error) = rustix::io::write(&self.0.wake, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "the server is not woken");
        }
        if let Some(client) = &*self.0.client() {
            // If it is closed already that is what is wanted.
            let _ = client.shutdown(Shutdown::Both);
        }
    }
}

impl Stop {
    fn client(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

impl Server {
    /// Makes a socket at `path`, as [`Socket::bind`] does.
    ///
    /// # Errors
    ///
    /// [`BindError`].
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, BindError> {
        let socket = Socket::bind(path)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(|error| BindError::Io {
            path: socket.path().to_owned(),
            source: error.into(),
        })?;
        Ok(Self {
            socket,
            stop: Arc::new(Stop {
                stopped: AtomicBool::new(false),
                wake,
                client: Mutex::default(),
            }),
            log_limit: LogLimit::new(),
        })
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// What ends [`Server::run`].
    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// Serves one client after the other until it is stopped. What clients do wrong is logged.
    ///
    /// # Errors
    ///
    /// If the socket can't be waited at.
    pub fn run(&self, device: &Device) -> io::Result<()> {
        while self.wait(None)? {
            let (stream, _) = match self.socket.listener().accept() {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    self.wait(Some(ACCEPT_PAUSE))?;
                    continue;
                }
            };
            match stream.try_clone() {
                Ok(clone) => *self.stop.client() = Some(clone),
                Err(error) => {
                    tracing::warn!(%error, "a connection");
                    continue;
                }
            }
            // Whoever stopped it before did not find the client.
            if self.stop.is_stopped() {
                break;
            }
            tracing::debug!("a client has connected");
            match device.serve(stream) {
                Ok(()) => tracing::debug!("the client has left"),
                Err(error) if self.stop.is_stopped() => tracing::debug!(%error, "stopped"),
                Err(error) => {
                    if let Some(left_out) = self.log_limit.pass() {
                        tracing::warn!(%error, left_out, "the connection has ended");
                    }
                }
            }
            *self.stop.client() = None;
        }
        Ok(())
    }

    /// Waits for a connection, or with a limit for that time only. Returns false once stopped.
    fn wait(&self, pause: Option<Duration>) -> io::Result<bool> {
        let stop = PollFd::new(&self.stop.wake, PollFlags::IN);
        let both = [
            PollFd::new(self.socket.listener(), PollFlags::IN),
            stop.clone(),
        ];
        let only = [stop];
        let mut fds: Vec<_> = if pause.is_some() {
            only.into()
        } else {
            both.into()
        };
        let limit = pause.map(|pause| rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: pause.subsec_nanos().into(),
        });
        loop {
            match poll(&mut fds, limit.as_ref()) {
                Ok(_) => return Ok(!self.stop.is_stopped()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
