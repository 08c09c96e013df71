//! One side of a copy: a namespace or a file.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use nvme_async::{Controller, DmaBuf};

use crate::failure::Failure;
use crate::target::{Target, backing_file, is_same_controller, is_url};

/// Where data comes from or goes to.
#[derive(Debug)]
pub(super) enum Side {
    Namespace { target: Target, url: String },
    File(Arc<OpenFile>),
}

#[derive(Debug)]
pub(super) struct OpenFile {
    name: String,
    file: File,
    len: u64,
    /// The most bytes that it can hold: block devices have a limit.
    capacity: Option<u64>,
    is_regular: bool,
    is_new: bool,
}

impl Side {
    /// Opens what is to be copied.
    pub(super) async fn source(name: &str) -> Result<Self, Failure> {
        if is_url(name) {
            return Self::namespace(name).await;
        }
        let open = || OpenFile::new(name, File::open(name)?, false);
        let file = open().map_err(|error| Failure::from(error).context(name.to_owned()))?;
        Ok(Self::File(Arc::new(file)))
    }

    /// Opens where it is to go. A file that does not exist is created, and none is changed yet.
    pub(super) async fn destination(name: &str) -> Result<Self, Failure> {
        if is_url(name) {
            return Self::namespace(name).await;
        }
        let open = || {
            let is_new = !Path::new(name).try_exists()?;
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            OpenFile::new(name, options.open(name)?, is_new)
        };
        let file = open().map_err(|error| Failure::from(error).context(name.to_owned()))?;
        Ok(Self::File(Arc::new(file)))
    }

    async fn namespace(url: &str) -> Result<Self, Failure> {
        let options = nvme_async::OpenOptions::new().local_queues(0);
        let target = Target::open(url, options).await?;
        Ok(Self::Namespace {
            target,
            url: url.to_owned(),
        })
    }

    fn controller(&self) -> Option<&Controller> {
        match self {
            Self::Namespace { target, .. } => Some(target.namespace.controller()),
            Self::File(_) => None,
        }
    }

    /// How many bytes there are to copy.
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Namespace { target, .. } => target.namespace.capacity(),
            Self::File(file) => file.len,
        }
    }

    /// How many bytes there is room for, if there is a limit.
    pub(super) fn capacity(&self) -> Option<u64> {
        match self {
            Self::Namespace { target, .. } => Some(target.namespace.capacity()),
            Self::File(file) => file.capacity,
        }
    }

    /// Whether both are one namespace or one file, or one is the file behind the other.
    pub(super) fn is_same_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Namespace { target: a, .. }, Self::Namespace { target: b, .. }) => {
                is_same_controller(a.namespace.controller(), b.namespace.controller())
                    && a.namespace.nsid() == b.namespace.nsid()
            }
            (Self::File(a), Self::File(b)) => is_same_file(a.file.metadata(), b.file.metadata()),
            (Self::File(file), Self::Namespace { url, .. })
            | (Self::Namespace { url, .. }, Self::File(file)) => backing_file(url)
                .is_some_and(|path| is_same_file(path.metadata(), file.file.metadata())),
        }
    }

    /// Rounds a length up to what can be written.
    pub(super) fn round_up(&self, len: u64) -> u64 {
        match self {
            Self::Namespace { target, .. } => {
                len.next_multiple_of(target.namespace.block_size().into())
            }
            Self::File(_) => len,
        }
    }

    /// Makes memory from which this side writes without a copy.
    pub(super) fn allocate(&self, len: usize) -> Result<DmaBuf, Failure> {
        match self {
            Self::Namespace { target, .. } => Ok(target.namespace.allocate(len)?),
            Self::File(_) => Ok(DmaBuf::heap(len)),
        }
    }

    /// Reads bytes, if possible into memory from which `destination` writes without a copy.
    pub(super) async fn read(
        &self,
        range: Range<u64>,
        destination: &Self,
    ) -> Result<Bytes, Failure> {
        let len = (range.end - range.start) as usize;
        match self {
            Self::Namespace { target, .. } => {
                let whole = self.round_up(len as u64) as usize;
                let data = target.namespace.read(range.start, whole).await?;
                Ok(data.slice(..len))
            }
            Self::File(file) => {
                let mut buffer = destination.allocate(len)?;
                file.blocking("reading", move |file| {
                    file.read_exact_at(&mut buffer, range.start)?;
                    Ok(buffer.into())
                })
                .await
            }
        }
    }

    /// Writes at `offset`; `data` was padded as [`round_up`](Self::round_up) says.
    pub(super) async fn write(&self, offset: u64, data: Bytes) -> Result<(), Failure> {
        match self {
            Self::Namespace { target, .. } => {
                target
                    .namespace
                    .write(offset, data)
                    .await
                    .map_err(|error| error.error)?;
                Ok(())
            }
            Self::File(file) => {
                file.blocking("writing", move |file| file.write_all_at(&data, offset))
                    .await
            }
        }
    }

    /// Prepares for `len` bytes: from here on the destination changes.
    pub(super) async fn begin(&self, len: u64) -> Result<(), Failure> {
        match self {
            Self::File(file) if file.is_regular => {
                file.blocking("resizing", move |file| file.set_len(len))
                    .await
            }
            _ => Ok(()),
        }
    }

    /// Makes what was written durable.
    pub(super) async fn flush(&self) -> Result<(), Failure> {
        match self {
            Self::Namespace { target, .. } => Ok(target.namespace.flush().await?),
            // Pipes and character devices have nothing to sync.
            Self::File(file) if file.is_regular || file.capacity.is_some() => {
                file.blocking("syncing", File::sync_all).await
            }
            Self::File(_) => Ok(()),
        }
    }

    /// Closes a side from which nothing was read and to which nothing was written, and removes
    /// what opening it created.
    pub(super) async fn discard(self) {
        match self {
            Self::Namespace { target, .. } => target.discard().await,
            Self::File(file) => {
                if file.is_new
                    && let Err(error) = std::fs::remove_file(&file.name)
                {
                    tracing::warn!(%error, file.name, "removing a file that was just created");
                }
            }
        }
    }
}

/// Closes the controllers of both sides, or the one that both have.
pub(super) async fn close(source: &Side, destination: &Side) -> Result<(), Failure> {
    let first = destination.controller();
    let second = source
        .controller()
        .filter(|second| !first.is_some_and(|first| is_same_controller(first, second)));
    let mut result = Ok(());
    for controller in first.into_iter().chain(second) {
        let closed = controller.shutdown().await;
        let closed = closed.map_err(|error| Failure::from(error).context("closing the controller"));
        result = result.and(closed);
    }
    result
}

impl OpenFile {
    fn new(name: &str, mut file: File, is_new: bool) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let (len, capacity) = if kind.is_block_device() {
            let len = file.seek(SeekFrom::End(0))?;
            (len, Some(len))
        } else {
            (metadata.len(), None)
        };
        Ok(Self {
            name: name.to_owned(),
            file,
            len,
            capacity,
            is_regular: kind.is_file(),
            is_new,
        })
    }

    /// Runs a blocking operation where it does no harm.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        attempt: &'static str,
        operation: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let this = self.clone();
        let done = tokio::task::spawn_blocking(move || operation(&this.file)).await;
        done.map_err(Failure::operation)?
            .map_err(|error| Failure::from(error).context(format!("{attempt} {}", self.name)))
    }
}

fn is_same_file(a: io::Result<Metadata>, b: io::Result<Metadata>) -> bool {
    matches!((a, b), (Ok(a), Ok(b)) if (a.dev(), a.ino()) == (b.dev(), b.ino()))
}
