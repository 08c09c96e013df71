//! Foreign memory that is mapped for as long as its owner wants.
#![expect(unsafe_code, reason = "registering memory for DMA is unsafe")]

use std::fmt;
use std::sync::Arc;
use std::thread;

use iova::{AddressSpace, Direction, FixedMapping, HostMemory};

use crate::Error;
use crate::memory::Registered;

/// [`Registered`] memory that is mapped for one controller, so that reads and writes of its parts
/// need no copy and no system call.
///
/// Dropping it unregisters the memory once no [`RegisteredSlice`] of it is left, those that
/// commands still use included. Where the controller is in another process, that is asked to let go of
/// it in a thread of its own, and the memory's owner is dropped there.
pub struct Registration {
    region: Arc<Region>,
}

struct Region {
    /// Until it is dropped.
    mapping: Option<FixedMapping>,
    len: usize,
    memory: Arc<dyn Registered>,
    waits_for_peer: bool,
}

impl Drop for Region {
    fn drop(&mut self) {
        let mapping = self.mapping.take();
        if self.waits_for_peer {
            // Where there can be no thread, the closure is dropped here.
            let unmap = thread::Builder::new().name("nvme-async-unmap".to_owned());
            let _ = unmap.spawn(move || drop(mapping));
        }
    }
}

impl Registration {
    /// Where the device `waits_for_peer`, it is unmapped in a thread of its own.
    pub(crate) async fn new(
        space: &AddressSpace,
        memory: Arc<dyn Registered>,
        waits_for_peer: bool,
    ) -> Result<Self, Error> {
        let mut host = HostMemory::new(memory.addr(), memory.len());
        if let Some((fd, offset)) = memory.file() {
            host = host.with_file(fd, offset);
        }
        // SAFETY: the contract of `Registered` keeps the memory in place for as long as the owner
        // lives, makes `file` true, and leaves parts that a command uses to the driver.
        let mapping =
            unsafe { space.register(host, Direction::Bidirectional, Arc::new(memory.clone())) };
        let mapping = mapping.await?;
        Ok(Self {
            region: Arc::new(Region {
                len: mapping.len(),
                mapping: Some(mapping),
                memory,
                waits_for_peer,
            }),
        })
    }

    /// How many bytes are registered; never 0.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty registration is refused"
    )]
    pub fn len(&self) -> usize {
        self.region.len
    }

    /// `len` bytes at `offset`, to be read into or written from; nothing if the range is empty or
    /// reaches past the end.
    pub fn slice(&self, offset: usize, len: usize) -> Option<RegisteredSlice> {
        let end = offset.checked_add(len)?;
        (len > 0 && end <= self.len()).then(|| RegisteredSlice {
            region: self.region.clone(),
            offset,
            len,
        })
    }

    /// Unregisters the memory, or gives the registration back if slices of it are in use.
    pub fn unregister(self) -> Result<(), Self> {
        match Arc::try_unwrap(self.region) {
            Ok(region) => {
                drop(region);
                Ok(())
            }
            Err(region) => Err(Self { region }),
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Registration")
            .field(&self.region.mapping)
            .finish()
    }
}

/// A part of registered memory, as the buffer of a read or write.
pub struct RegisteredSlice {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

impl RegisteredSlice {
    /// How many bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "an empty slice can't be made")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where it starts in the registration, in bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    pub(crate) fn memory(&self) -> &dyn Registered {
        &*self.region.memory
    }

    pub(crate) fn addr(&self) -> *const u8 {
        self.region.memory.addr().as_ptr().wrapping_add(self.offset)
    }
}

impl fmt::Debug for RegisteredSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegisteredSlice")
            .field("offset", &self.offset)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}
