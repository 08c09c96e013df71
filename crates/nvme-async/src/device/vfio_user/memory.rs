//! Memory of this process that the server may read and write by messages: what is mapped for it, and
//! nothing else.

use std::collections::BTreeMap;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use iova::{Direction, HostMemory};

use crate::memory::volatile::{copy_from_volatile, copy_to_volatile};

/// What is mapped, by I/O virtual address, without overlaps.
///
/// # Invariant
///
/// Each entry is memory that is valid for reads if it is readable and for writes if it is writable:
/// whoever [`insert`](Memory::insert)s it keeps it so until [`remove`](Memory::remove) has returned.
/// Accesses happen under the lock, so none is in progress then.
#[derive(Default)]
pub(super) struct Memory(Mutex<BTreeMap<u64, Mapped>>);

struct Mapped {
    base: NonNull<u8>,
    len: u64,
    readable: bool,
    writable: bool,
}

// SAFETY: `base` is a plain address whose validity does not depend on the thread (see the invariant of
// `Memory`); accesses are as unsynchronized as a device's by nature.
unsafe impl Send for Mapped {}

/// An access that was refused: outside of what is mapped, or against its direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stray {
    address: u64,
    len: usize,
    writes: bool,
}

impl fmt::Display for Stray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.writes { "write" } else { "read" };
        write!(f, "{verb} of {} bytes at {:#x}", self.len, self.address)
    }
}

impl Memory {
    /// Makes memory accessible at `iova`, where nothing is.
    ///
    /// # Safety
    ///
    /// The memory is valid for reads, and unless `direction` is [`Direction::ToDevice`] for writes, by a
    /// device, which may access it at any time, until [`remove`](Self::remove) has returned.
    pub(super) unsafe fn insert(&self, iova: u64, memory: &HostMemory<'_>, direction: Direction) {
        let mapped = Mapped {
            base: memory.addr(),
            len: memory.len() as u64,
            readable: direction.allows(Direction::ToDevice),
            writable: direction.allows(Direction::FromDevice),
        };
        self.lock().insert(iova, mapped);
    }

    /// Makes what was inserted at `iova` inaccessible.
    pub(super) fn remove(&self, iova: u64) {
        self.lock().remove(&iova);
    }

    /// Copies from memory.
    pub(super) fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Stray> {
        let stray = Stray {
            address,
            len: into.len(),
            writes: false,
        };
        let mapped = self.lock();
        let parts = parts(&mapped, address, into.len(), |mapped| mapped.readable);
        let mut rest = into;
        for (at, len) in parts.ok_or(stray)? {
            let (part, following) = rest.split_at_mut(len);
            // SAFETY: by the invariant, `len` bytes at `at` are readable while the lock is held; `part`
            // is a buffer of this function's caller, and no memory that is mapped. Others access that
            // as one accesses what a device may touch.
            unsafe { copy_from_volatile(at, part) };
            rest = following;
        }
        Ok(())
    }

    /// Copies to memory, in ascending order: the last word of a completion queue entry, which says that it
    /// is there, comes last.
    pub(super) fn write(&self, address: u64, data: &[u8]) -> Result<(), Stray> {
        let stray = Stray {
            address,
            len: data.len(),
            writes: true,
        };
        let mapped = self.lock();
        let parts = parts(&mapped, address, data.len(), |mapped| mapped.writable);
        let mut rest = data;
        for (at, len) in parts.ok_or(stray)? {
            let (part, following) = rest.split_at(len);
            // SAFETY: as in `read`, and by the invariant they are writable.
            unsafe { copy_to_volatile(at, part) };
            rest = following;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Mapped>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The stretches of memory that `len` bytes from `address` are, if all of it may be accessed.
fn parts(
    mapped: &BTreeMap<u64, Mapped>,
    address: u64,
    len: usize,
    allowed: fn(&Mapped) -> bool,
) -> Option<Vec<(NonNull<u8>, usize)>> {
    let mut parts = Vec::new();
    let mut done = 0;
    while done < len {
        let at = address.checked_add(done as u64)?;
        let (&first, mapping) = mapped.range(..=at).next_back()?;
        let offset = at - first;
        let room = mapping.len.checked_sub(offset).filter(|&room| room > 0)?;
        if !allowed(mapping) {
            return None;
        }
        let part = room.min((len - done) as u64) as usize;
        // SAFETY: offset < mapping.len, as was just checked, so this is inside of the memory.
        let base = unsafe { mapping.base.add(offset as usize) };
        parts.push((base, part));
        done += part;
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SharedMemory;

    /// Two mappings side by side, and one that may not be written.
    fn memory(shared: &SharedMemory) -> Memory {
        let memory = Memory::default();
        for (page, iova, direction) in [
            (0, 0x10000, Direction::Bidirectional),
            (2, 0x11000, Direction::FromDevice),
            (1, 0x20000, Direction::ToDevice),
        ] {
            // SAFETY: there are four pages.
            let base = unsafe { shared.addr().add(page * 4096) };
            // SAFETY: `shared` outlives the memory in all tests.
            unsafe { memory.insert(iova, &HostMemory::new(base, 4096), direction) };
        }
        memory
    }

    #[test]
    fn what_is_mapped_is_read_and_written() {
        let shared = SharedMemory::new(4 * 4096).unwrap();
        let memory = memory(&shared);
        memory.write(0x10ff8, &[7; 16]).unwrap();
        let mut read = [0; 8];
        memory.read(0x10ff8, &mut read).unwrap();
        assert_eq!(read, [7; 8]);
        // The other half is in the page that the mapping behind begins with.
        let mut other = [0; 8];
        memory.read(0x11000, &mut other).unwrap_err();
        // SAFETY: inside of the live mapping.
        let behind = unsafe { shared.addr().add(2 * 4096) };
        // SAFETY: as above; nobody writes there meanwhile.
        unsafe { copy_from_volatile(behind, &mut other) };
        assert_eq!(other, [7; 8]);
        memory.read(0x20000, &mut [0; 4096]).unwrap();
    }

    #[test]
    fn nothing_else_is() {
        let shared = SharedMemory::new(4 * 4096).unwrap();
        let memory = memory(&shared);
        for (address, len) in [
            (0, 1),
            (0xffff, 1),
            (0xffff, 2),
            (0x12000, 1),
            (0x11fff, 2),
            (0x20fff, 2),
            (u64::MAX, 2),
            (0x10000, 3 * 4096),
        ] {
            assert!(memory.read(address, &mut vec![0; len]).is_err());
            assert!(memory.write(address, &vec![1; len]).is_err());
        }
        // Against the direction.
        memory.read(0x11000, &mut [0; 4]).unwrap_err();
        memory.read(0x10ffc, &mut [0; 8]).unwrap_err();
        let stray = memory.write(0x20000, &[1; 4]).unwrap_err();
        assert_eq!(stray.to_string(), "write of 4 bytes at 0x20000");
        // Refused as a whole.
        let mut before = [1; 4096];
        memory.read(0x10000, &mut before).unwrap();
        assert_eq!(before, [0; 4096]);

        memory.remove(0x10000);
        memory.read(0x10000, &mut [0; 1]).unwrap_err();
    }
}
