//! The server: exports, limits, and who may connect.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use super::connection::{self, Stream};
use super::log::Log;
use super::protocol::{Description, MAX_STRING};
use super::tls::Tls;
use crate::Export;

/// How long is waited where a connection can't be accepted, such as for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// After what time of silence it is asked whether the client is still there.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// The unit of requests, which any block size divides.
const LARGEST_BLOCK: u32 = 64 << 10;

/// What a server allows its clients.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Certificate and key. With them every client has to use TLS; by default there is none.
    pub tls: Option<Tls>,
    /// Serve without TLS where others can listen: on a TCP address that is not the machine's own. By default
    /// that is refused.
    pub allow_plaintext: bool,
    /// How many clients may be connected; further ones are turned away. By default 16.
    pub max_connections: usize,
    /// How many requests a connection may have under way, after which no more are received. By default 128.
    /// Where connections share a queue pair of the device, it is no more than a fair share of its depth.
    pub max_requests: usize,
    /// The longest read or write in bytes, rounded down to 64 KiB. By default 32 MiB, which clients that
    /// don't ask suppose.
    pub max_request: u32,
    /// How many bytes the requests of a connection may have together, from 64 KiB; one request is never too
    /// much. By default 32 MiB. All connections together may so take this `max_connections` times.
    pub max_bytes: u32,
    /// How long a client may take from its connection to its first request. By default 10 s.
    pub handshake_timeout: Duration,
    /// How long a client that is leaving, or is sent away, may take to receive the replies that are left. By
    /// default 5 s.
    pub drain_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tls: None,
            allow_plaintext: false,
            max_connections: 16,
            max_requests: 128,
            max_request: 32 << 20,
            max_bytes: 32 << 20,
            handshake_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(5),
        }
    }
}

/// Why there can't be such a server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// It would have nothing to serve.
    #[error("there is nothing to serve")]
    NoExports,
    /// Clients could not tell which one they get.
    #[error("two exports have the name {0:?}")]
    SameName(String),
    /// No client could ask for it.
    #[error("the name of an export has {0} bytes; it can have {MAX_STRING}, and one at least")]
    NameLength(usize),
    /// A limit under which nothing could be done.
    #[error("{0} is too small")]
    Limit(&'static str),
}

/// An NBD server.
///
/// A clone is a handle of the same server: all of them share the limit of connections.
#[derive(Clone, Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) exports: Vec<Export>,
    pub(super) descriptions: Vec<Description>,
    pub(super) options: Options,
    pub(super) connections: Arc<Semaphore>,
    pub(super) log: Arc<Log>,
}

/// What clients connect to.
#[derive(Debug)]
pub struct Listener(Socket);

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self(Socket::Tcp(listener))
    }
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self(Socket::Unix(listener))
    }
}

impl Listener {
    /// Whether only processes of this machine can connect, so that nobody listens on the way.
    ///
    /// # Errors
    ///
    /// If the system does not say where it listens.
    pub fn is_local(&self) -> io::Result<bool> {
        Ok(match &self.0 {
            Socket::Tcp(listener) => listener.local_addr()?.ip().to_canonical().is_loopback(),
            Socket::Unix(_) => true,
        })
    }

    /// Where a TCP socket listens.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.0 {
            Socket::Tcp(listener) => listener.local_addr().ok(),
            Socket::Unix(_) => None,
        }
    }
}

impl Server {
    /// A server of `exports`, each with its name. The first one is also what clients get that give no name.
    ///
    /// # Errors
    ///
    /// [`ServerError`].
    pub fn new(exports: Vec<(String, Export)>, mut options: Options) -> Result<Self, ServerError> {
        options.max_request -= options.max_request % LARGEST_BLOCK;
        options.max_bytes = options.max_bytes.max(options.max_request);
        for (limit, name) in [
            (options.max_request as usize, "the longest request"),
            (options.max_connections, "the number of connections"),
            (options.max_requests, "the number of requests"),
        ] {
            if limit == 0 {
                return Err(ServerError::Limit(name));
            }
        }
        // What semaphores can count, and take at once.
        let most = Semaphore::MAX_PERMITS.min(u32::MAX as usize);
        options.max_requests = options.max_requests.min(most);
        options.max_connections = options.max_connections.min(Semaphore::MAX_PERMITS);
        if exports.is_empty() {
            return Err(ServerError::NoExports);
        }
        let mut descriptions: Vec<Description> = Vec::with_capacity(exports.len());
        for (name, export) in &exports {
            if name.is_empty() || name.len() > MAX_STRING {
                return Err(ServerError::NameLength(name.len()));
            }
            if descriptions.iter().any(|other| other.name == *name) {
                return Err(ServerError::SameName(name.clone()));
            }
            let identify = export.namespace().controller().identify();
            descriptions.push(Description {
                name: name.clone(),
                size: export.size(),
                block_size: export.block_size(),
                max_request: options.max_request,
                is_read_only: export.is_read_only(),
                can_trim: identify.optional_nvm_commands().dataset_management(),
            });
        }
        let connections = Arc::new(Semaphore::new(options.max_connections));
        let shared = Arc::new(Shared {
            exports: exports.into_iter().map(|(_, export)| export).collect(),
            descriptions,
            options,
            connections,
            log: Arc::new(Log::default()),
        });
        Ok(Self { shared })
    }

    /// Serves who connects, until `stop` resolves: then it accepts nobody any more, finishes and answers what
    /// is under way, ends all connections and returns.
    ///
    /// # Errors
    ///
    /// [`PermissionDenied`](io::ErrorKind::PermissionDenied) without TLS where
    /// [others can listen](Listener::is_local), unless [`Options::allow_plaintext`] is set.
    ///
    /// # Cancel safety
    ///
    /// When it is dropped, connections end at once, and what was under way may or may not be executed.
    pub async fn run(&self, listener: Listener, stop: impl Future<Output = ()>) -> io::Result<()> {
        let options = &self.shared.options;
        if options.tls.is_none() && !options.allow_plaintext && !listener.is_local()? {
            let reason = "others can listen there: it needs TLS";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
        }
        let (stopper, stopped) = watch::channel(false);
        let mut connections = JoinSet::new();
        {
            let accept = self.accept(listener, &mut connections, &stopped);
            tokio::select! {
                biased;
                () = stop => {}
                () = accept => {}
            }
        }
        stopper.send_replace(true);
        while connections.join_next().await.is_some() {}
        Ok(())
    }

    /// Serves one client over a stream that is connected to it, until it leaves or `stop` resolves. What it
    /// does wrong ends the connection, and is no error. Where all places are taken it is turned away.
    ///
    /// # Cancel safety
    ///
    /// As [`run`](Self::run).
    pub async fn serve<S>(&self, stream: S, stop: impl Future<Output = ()>)
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let Some(place) = self.place() else {
            return self.shared.log.turned_away();
        };
        let (stopper, stopped) = watch::channel(false);
        let serving = serve(self.shared.clone(), stream, place, stopped);
        let mut serving = std::pin::pin!(serving);
        tokio::select! {
            biased;
            () = &mut serving => return,
            () = stop => {}
        }
        stopper.send_replace(true);
        serving.await;
    }

    async fn accept(
        &self,
        listener: Listener,
        connections: &mut JoinSet<()>,
        stop: &watch::Receiver<bool>,
    ) {
        loop {
            while connections.try_join_next().is_some() {}
            let accepted = match &listener.0 {
                Socket::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                    set_up(&stream);
                    self.place().map(|place| {
                        connections.spawn(serve(self.shared.clone(), stream, place, stop.clone()))
                    })
                }),
                Socket::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                    self.place().map(|place| {
                        connections.spawn(serve(self.shared.clone(), stream, place, stop.clone()))
                    })
                }),
            };
            match accepted {
                Ok(Some(_)) => {}
                Ok(None) => self.shared.log.turned_away(),
                Err(error) => {
                    self.shared.log.not_accepted(&error);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// A place among the connections, if there is one.
    fn place(&self) -> Option<OwnedSemaphorePermit> {
        self.shared.connections.clone().try_acquire_owned().ok()
    }
}

async fn serve(
    shared: Arc<Shared>,
    stream: impl Stream,
    _place: OwnedSemaphorePermit,
    stop: watch::Receiver<bool>,
) {
    match connection::serve(&shared, stream, stop).await {
        Ok(()) => tracing::debug!("a client has left"),
        Err(ended) => shared.log.ended(&ended),
    }
}

/// Replies don't wait for one another, and clients that are gone are noticed.
fn set_up(stream: &TcpStream) {
    let result = stream
        .set_nodelay(true)
        .and_then(|()| Ok(sockopt::set_socket_keepalive(stream, true)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepidle(stream, KEEPALIVE)?));
    if let Err(error) = result {
        tracing::debug!(%error, "the options of a connection");
    }
}
