use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, FlockOperation, flock};
use rustix::io::{Errno, ReadWriteFlags};

use super::{ConcurrentStore, Store};

/// A namespace in a regular file, which is sparse: blocks never written, and deallocated ones,
/// take no space where the file system can do that.
///
/// The page cache is the volatile write cache. A durable write syncs only its own range and, once
/// the blocks exist, costs no commit of the file system's journal.
#[derive(Debug)]
pub struct FileStore {
    disk: Arc<Disk>,
    size: u64,
}

/// The file, as all threads use it.
#[derive(Debug)]
struct Disk {
    file: File,
}

impl FileStore {
    /// Opens the existing file at `path` for reading and writing; its length is the store's size.
    ///
    /// # Errors
    ///
    /// What opening the file returns, and the errors of [`FileStore::from_file`].
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::from_file(OpenOptions::new().read(true).write(true).open(path)?)
    }

    /// Opens the file at `path`, creating it when it does not exist, and makes it at least `size`
    /// bytes long. This never shortens it, and its contents stay.
    ///
    /// # Errors
    ///
    /// As [`FileStore::open`], and what extending the file returns.
    pub fn create(path: impl AsRef<Path>, size: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let mut store = Self::from_file(file)?;
        if store.size < size {
            store.disk.file.set_len(size)?;
            store.size = size;
        }
        Ok(store)
    }

    /// Takes a regular file that is open for reading and writing.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] when it is not a regular file, and
    /// [`io::ErrorKind::ResourceBusy`] when another store has it open: two controllers on one file
    /// would destroy each other's data, so the file is locked (flock(2)) for as long as it is open.
    pub fn from_file(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    "another controller, here or in another process, uses the file",
                ));
            }
            locked => locked?,
        }
        Ok(Self {
            disk: Arc::new(Disk { file }),
            size: metadata.len(),
        })
    }
}

impl Disk {
    fn write_zeros(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let zeros = [0; 64 * 1024];
        while len > 0 {
            let part = len.min(zeros.len() as u64);
            self.file.write_all_at(&zeros[..part as usize], offset)?;
            offset += part;
            len -= part;
        }
        Ok(())
    }
}

impl ConcurrentStore for Disk {
    fn write_durably(&self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let part = IoSlice::new(data);
            match rustix::io::pwritev2(&self.file, &[part], offset, ReadWriteFlags::DSYNC) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    data = &data[written..];
                    offset += written as u64;
                }
                Err(Errno::INTR) => {}
                // File systems without per-write durability.
                Err(Errno::OPNOTSUPP) => {
                    self.file.write_all_at(data, offset)?;
                    return self.flush();
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn zero(&self, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
        let how = if deallocate {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        };
        loop {
            match rustix::fs::fallocate(&self.file, how, offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                // tmpfs punches holes but zeroes no ranges; some file systems do neither.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return self.write_zeros(offset, len),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Store for FileStore {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.disk.file.read_exact_at(out, offset)
    }

    fn write(&mut self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        if durable {
            self.disk.write_durably(offset, data)
        } else {
            self.disk.file.write_all_at(data, offset)
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()
    }

    fn zero(&mut self, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
        self.disk.zero(offset, len, deallocate)
    }

    fn resize(&mut self, size: u64) -> io::Result<()> {
        self.disk.file.set_len(size)?;
        self.size = size;
        Ok(())
    }

    fn allocated(&self) -> u64 {
        // st_blocks counts units of 512 bytes whatever the file system's block size is.
        self.disk.file.metadata().map_or(self.size, |metadata| {
            (metadata.blocks() * 512).min(self.size)
        })
    }

    fn concurrent(&self) -> Option<Arc<dyn ConcurrentStore>> {
        Some(self.disk.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().expect("temporary directory")
    }

    #[test]
    fn create_extends_and_never_shortens() {
        let directory = directory();
        let path = directory.path().join("disk.img");
        let mut store = FileStore::create(&path, 8192).expect("creates");
        store.write(4096, &[7; 16], true).expect("writes");
        drop(store);
        let mut store = FileStore::create(&path, 4096).expect("opens");
        assert_eq!(store.size(), 8192);
        let mut out = [0; 16];
        store.read(4096, &mut out).expect("reads");
        assert_eq!(out, [7; 16]);
        drop(store);
        assert_eq!(FileStore::open(&path).expect("opens").size(), 8192);
    }

    #[test]
    fn a_file_has_one_store_at_a_time() {
        let directory = directory();
        let path = directory.path().join("disk.img");
        let store = FileStore::create(&path, 4096).expect("creates");
        let second = FileStore::open(&path).expect_err("the file is in use");
        assert_eq!(second.kind(), io::ErrorKind::ResourceBusy);
        drop(store);
        FileStore::open(&path).expect("the file is free again");
    }

    #[test]
    fn a_new_file_is_sparse_and_deallocation_gives_space_back() {
        let directory = directory();
        let mut store =
            FileStore::create(directory.path().join("disk.img"), 1 << 30).expect("creates");
        assert_eq!(store.allocated(), 0);
        store
            .write(1 << 20, &vec![1; 1 << 20], true)
            .expect("writes");
        let written = store.allocated();
        assert!(written >= 1 << 20, "{written}");
        store.zero(1 << 20, 1 << 20, true).expect("deallocates");
        store.flush().expect("flushes");
        assert!(store.allocated() < written);
    }

    #[test]
    fn what_is_no_regular_file_is_refused() {
        let error = FileStore::open("/dev/null").expect_err("a device");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let missing = FileStore::open("/nonexistent/disk.img").expect_err("missing");
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
