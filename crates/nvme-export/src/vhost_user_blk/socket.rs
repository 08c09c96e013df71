//! Makes and removes a Unix domain socket that only its owner can connect to.

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

/// A socket that listens, removed on drop.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket, so that nobody else's is removed.
    identity: (u64, u64),
}

/// Makes a socket at `path`, in the place of one that nobody serves.
pub(super) fn bind(path: PathBuf) -> Result<Socket, BindError> {
    let failed = |source| BindError::Io {
        path: path.clone(),
        source,
    };
    let lock = lock_directory(&path).map_err(failed)?;
    remove_stale(&path)?;
    let socket = listen(&path).map_err(|error| match error {
        Errno::ADDRINUSE => BindError::InUse(path.clone()),
        error => failed(error.into()),
    })?;
    let metadata = fs::symlink_metadata(&path).map_err(failed)?;
    drop(lock);
    Ok(Socket {
        listener: UnixListener::from(socket),
        identity: (metadata.dev(), metadata.ino()),
        path,
    })
}

impl Socket {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The same socket once more, nonblocking.
    pub(super) fn listener(&self) -> io::Result<UnixListener> {
        let listener = self.listener.try_clone()?;
        listener.set_nonblocking(true)?;
        Ok(listener)
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_socket_is_its_owners_and_replaces_stale_ones_only() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.sock");
        // As a server that was killed leaves it.
        drop(UnixListener::bind(&path).expect("made"));
        let socket = bind(path.clone()).expect("it replaces the stale one");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(bind(path.clone()), Err(BindError::InUse(_))));
        drop(socket);
        assert!(!path.exists());
        fs::write(&path, "kept").expect("written");
        assert!(matches!(bind(path.clone()), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read(&path).expect("there"), b"kept");
    }
}
