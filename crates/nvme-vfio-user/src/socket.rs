//! Sockets that clients connect to.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Clients that wait for their turn.
const BACKLOG: i32 = 16;
/// For how long another server may hold the lock of the directory, which it needs for an instant. Anybody who
/// can read the directory can take it.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long is waited before that lock is tried again.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// There is something else at that path. It is left alone.
    #[error("{}: there is something that is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Another server is there.
    #[error("{}: another process serves this socket", .0.display())]
    InUse(PathBuf),
    /// Anything else.
    #[error("{}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// A socket at a path; removed on drop.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket, so that nobody else's is removed.
    identity: (u64, u64),
}

impl Socket {
    /// Makes a socket at `path` that only its owner can connect to. A socket that a server has left behind
    /// there, and that nobody serves, is replaced; anything else is not. The directory is locked (flock)
    /// meanwhile, so that of several servers that start at once one gets the socket.
    ///
    /// # Errors
    ///
    /// [`BindError`].
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, BindError> {
        let path = path.as_ref();
        let failed = |source| BindError::Io {
            path: path.to_owned(),
            source,
        };
        let lock = lock_directory(path).map_err(failed)?;
        remove_stale(path)?;
        let socket = listen(path).map_err(|error| match error {
            Errno::ADDRINUSE => BindError::InUse(path.to_owned()),
            error => failed(error.into()),
        })?;
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        drop(lock);
        Ok(Self {
            listener: UnixListener::from(socket),
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What accepts connections.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if is_ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "the socket stays");
        }
    }
}

/// Locks the directory of a socket, which leaves no file behind. Between the look at a socket that nobody serves
/// and its removal another server could put its own there.
fn lock_directory(path: &Path) -> io::Result<File> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(directory)?;
    let until = Instant::now() + LOCK_TIMEOUT;
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(directory),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes a socket that nobody serves.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Io {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match probe(path) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed),
        Err(Errno::NOENT) => Ok(()),
        // Served, or its backlog is full.
        Ok(()) | Err(Errno::AGAIN) => Err(BindError::InUse(path.to_owned())),
        Err(error) => Err(failed(error.into())),
    }
}

/// Connects to a socket, without waiting where others wait already.
fn probe(path: &Path) -> Result<(), Errno> {
    let socket = new_socket(SocketFlags::NONBLOCK)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

fn new_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn listen(path: &Path) -> Result<OwnedFd, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let socket = new_socket(SocketFlags::empty())?;
    // Before it is there for others to find.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}
