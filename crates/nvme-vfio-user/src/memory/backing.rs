//! Where the bytes of a region of the client's memory are.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_get_seals, fstatfs};
use rustix::io::Errno;
use vfio_user::DmaMap;

use super::mapping::Mapping;
use crate::link::Link;

/// File systems whose files this server reads and writes: no access to them waits for another process.
const FILE_SYSTEMS: [u64; 6] = [
    0x0102_1994, // tmpfs, memfd
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // Btrfs
    0xf2f5_2010, // F2FS
    0x794c_7630, // overlayfs
];
/// Huge pages: a page that was punched out of the file need not be there again.
const HUGETLBFS: u64 = 0x9584_58f6;

/// A region's bytes.
#[derive(Debug)]
pub(super) enum Backing {
    /// In a file that is mapped and cannot become shorter, or is trusted not to.
    Mapped(Mapping),
    /// In a file, from this offset on.
    File(File, u64),
    /// At the client, who is asked.
    Messages(Arc<Link>),
}

impl Backing {
    /// Memory in a file of the client's.
    ///
    /// # Errors
    ///
    /// The error that the client is to be told of: EINVAL for a file that is none or too short, EOPNOTSUPP for
    /// one that this server does not touch unless the client is trusted.
    pub(super) fn of_file(fd: OwnedFd, map: &DmaMap, trust: bool) -> Result<Self, Errno> {
        let file = File::from(fd);
        let metadata = file.metadata().map_err(|_| Errno::INVAL)?;
        // The message was refused if this overflows.
        let end = map.offset.saturating_add(map.size);
        if !metadata.is_file() || end > metadata.len() {
            return Err(Errno::INVAL);
        }
        let len = usize::try_from(map.size).map_err(|_| Errno::INVAL)?;
        let file_system = fstatfs(&file)?.f_type as u64;
        let cannot_shrink = file_system != HUGETLBFS
            && fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if trust || cannot_shrink {
            // Once more, since it may have become shorter before it was sealed.
            let size = file.metadata().map_err(|_| Errno::INVAL)?.len();
            if end > size {
                return Err(Errno::INVAL);
            }
            let mapping = Mapping::new(file.as_fd(), map.offset, len, map.readable, map.writable);
            let mapping = mapping.map_err(|error| {
                let errno = error.raw_os_error().map(Errno::from_raw_os_error);
                errno.unwrap_or(Errno::INVAL)
            })?;
            return Ok(Self::Mapped(mapping));
        }
        if !FILE_SYSTEMS.contains(&file_system) {
            tracing::warn!(
                file_system = format_args!("{file_system:#x}"),
                "memory in a file that is neither sealed nor on a file system that is read and written"
            );
            return Err(Errno::OPNOTSUPP);
        }
        Ok(Self::File(file, map.offset))
    }

    pub(super) fn is_file(&self) -> bool {
        !matches!(self, Self::Messages(_))
    }

    /// Copies from the region, at `offset`, which is DMA address `address`.
    pub(super) fn read(&self, offset: u64, address: u64, out: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Mapped(mapping) => done(mapping.read(index(offset), out)),
            Self::File(file, start) => file.read_exact_at(out, start + offset),
            Self::Messages(link) => link.dma_read(address, out),
        }
    }

    /// Copies to the region.
    pub(super) fn write(&self, offset: u64, address: u64, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Mapped(mapping) => done(mapping.write(index(offset), data)),
            Self::File(file, start) => file.write_all_at(data, start + offset),
            Self::Messages(link) => link.dma_write(address, data),
        }
    }

    /// Stores an aligned word.
    pub(super) fn store_release(&self, offset: u64, address: u64, value: u32) -> io::Result<()> {
        match self {
            Self::Mapped(mapping) => done(mapping.store_release(index(offset), value)),
            Self::File(file, start) => {
                // A system call need not write four bytes at once, but one. Of a completion queue entry's
                // last word the one to come last is the third, which has the phase tag. Event indices may
                // be seen half written: the host looks again after it was told to, and so do we.
                let bytes = value.to_le_bytes();
                let at = start + offset;
                file.write_all_at(&bytes[3..], at + 3)?;
                file.write_all_at(&bytes[..2], at)?;
                file.write_all_at(&bytes[2..3], at + 2)
            }
            Self::Messages(link) => link.dma_write(address, &value.to_le_bytes()),
        }
    }

    /// Loads an aligned word.
    pub(super) fn load_acquire(&self, offset: u64, address: u64) -> io::Result<u32> {
        let mut bytes = [0; 4];
        match self {
            Self::Mapped(mapping) => mapping
                .load_acquire(index(offset))
                .ok_or_else(out_of_bounds),
            Self::File(file, start) => {
                // Nor are four bytes read at once: until the same is read twice.
                file.read_exact_at(&mut bytes, start + offset)?;
                for _ in 0..LOOKS {
                    let mut again = [0; 4];
                    file.read_exact_at(&mut again, start + offset)?;
                    if again == bytes {
                        break;
                    }
                    bytes = again;
                }
                Ok(u32::from_le_bytes(bytes))
            }
            Self::Messages(link) => {
                link.dma_read(address, &mut bytes)?;
                Ok(u32::from_le_bytes(bytes))
            }
        }
    }
}

/// How often a word is read until the same is read twice. A host that stores faster than that is not
/// one that means well.
const LOOKS: usize = 1000;

/// Regions are as large as an address space at most, and offsets are inside of them.
fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

fn done(is_inside: bool) -> io::Result<()> {
    if is_inside {
        Ok(())
    } else {
        Err(out_of_bounds())
    }
}

fn out_of_bounds() -> io::Error {
    io::Error::other("outside of the mapping")
}
