//! Where the bytes of a region of the client's memory are.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nvme_soft::LogLimit;
use rustix::fs::{SealFlags, fcntl_get_seals, fstatfs};
use rustix::io::Errno;
use vfio_user::DmaMap;

use super::mapping::Mapping;
use crate::link::Link;

/// File systems whose files this server reads and writes, besides those of memory: no access to them waits for
/// another process. The kernel's names.
const FILE_SYSTEMS: [&str; 7] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "overlay"];
/// Of all clients.
static UNKNOWN_FILES: LogLimit = LogLimit::new();
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
        // Whatever has seals is memory. Of anything else not even the size is asked for before it is known what
        // it is: that may be for another process to say, such as the client.
        let seals = fcntl_get_seals(&file);
        let is_huge = seals.is_ok() && fstatfs(&file)?.f_type as u64 == HUGETLBFS;
        if !trust && (seals.is_err() || is_huge) {
            let file_system = file_system(&file);
            if !file_system
                .as_ref()
                .is_some_and(|name| FILE_SYSTEMS.contains(&name.as_str()))
            {
                if let Some(left_out) = UNKNOWN_FILES.pass() {
                    tracing::warn!(
                        ?file_system,
                        left_out,
                        "memory in a file that is neither sealed nor one that is read and written"
                    );
                }
                return Err(Errno::OPNOTSUPP);
            }
        }
        // After the look at the seals: it can't have become shorter since.
        let metadata = file.metadata().map_err(|_| Errno::INVAL)?;
        // The message was refused if this overflows.
        let end = map.offset.saturating_add(map.size);
        if !metadata.is_file() || end > metadata.len() {
            return Err(Errno::INVAL);
        }
        let len = usize::try_from(map.size).map_err(|_| Errno::INVAL)?;
        let cannot_shrink = seals.is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if trust || cannot_shrink {
            let mapping = Mapping::new(file.as_fd(), map.offset, len, map.readable, map.writable);
            let mapping = mapping.map_err(|error| {
                let errno = error.raw_os_error().map(Errno::from_raw_os_error);
                errno.unwrap_or(Errno::INVAL)
            })?;
            return Ok(Self::Mapped(mapping));
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

/// The kernel's name of the file system that a file is on, if that is mounted where this process sees it. A user
/// may mount what he likes for himself, such as an overlay of files that he is asked for.
fn file_system(file: &File) -> Option<String> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mount_type(&mounts, mount.trim()).map(str::to_owned)
}

/// The type of a mount in `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn mount_type<'a>(mounts: &'a str, id: &str) -> Option<&'a str> {
    let mut mounts = mounts.lines();
    let mount = mounts.find(|line| line.split(' ').next() == Some(id))?;
    // Spaces in names are escaped.
    let (_, rest) = mount.split_once(" - ")?;
    rest.split(' ').next()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_have_names() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
                      12 1 0:5 / /a\\040-\\040b rw,nosuid shared:7 master:2 - fuse.x y rw\n";
        assert_eq!(mount_type(mounts, "1"), Some("ext4"));
        assert_eq!(mount_type(mounts, "12"), Some("fuse.x"));
        assert_eq!(mount_type(mounts, "2"), None);
        let name = |path| file_system(&File::open(path).expect("it is there"));
        assert_eq!(name("/proc/self/status").as_deref(), Some("proc"));
        // A pipe is nowhere.
        let (pipe, _other) = io::pipe().expect("a pipe");
        assert_eq!(file_system(&File::from(OwnedFd::from(pipe))), None);
    }
}
