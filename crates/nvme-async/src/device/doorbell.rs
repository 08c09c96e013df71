//! Doorbell registers, the only device registers on the I/O path.

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

/// One doorbell register.
#[derive(Clone)]
#[non_exhaustive]
pub enum Doorbell {
    /// A word of the device's BAR in our address space: ringing is one store.
    Mapped(MappedDoorbell),
    /// Ringing is a call, for controllers that are software.
    Call {
        /// Who takes the call.
        target: Arc<dyn DoorbellCall>,
        /// The register's offset in BAR 0.
        offset: u32,
    },
}

/// The Vector Control word of an interrupt vector (PCI local bus specification 3.0, section 6.8.2.9).
///
/// While a vector is masked its interrupts are held back; when it is unmasked there is one if any was.
#[derive(Clone, Debug)]
pub struct VectorMask {
    word: Doorbell,
    is_exclusive: bool,
}

impl VectorMask {
    const MASKED: u32 = 1;

    /// A word that is written as a doorbell is, and that others may write too, such as the kernel when it
    /// moves the interrupt to another processor.
    pub fn new(word: Doorbell) -> Self {
        Self {
            word,
            is_exclusive: false,
        }
    }

    /// A word that nobody else writes, so that it costs nothing to rely on it.
    pub fn exclusive(word: Doorbell) -> Self {
        Self {
            word,
            is_exclusive: true,
        }
    }

    /// Whether nobody else writes it.
    pub fn is_exclusive(&self) -> bool {
        self.is_exclusive
    }

    /// Holds interrupts back from now on.
    pub fn mask(&self) {
        self.word.ring(Self::MASKED);
    }

    /// Lets interrupts through, and what was held back.
    pub fn unmask(&self) {
        self.word.ring(0);
    }
}

/// Receives doorbell writes that are not plain stores.
pub trait DoorbellCall: Send + Sync {
    /// Takes a write of `value` to the doorbell at `offset` of BAR 0.
    fn ring(&self, offset: u32, value: u32);
}

impl Doorbell {
    /// Writes `value` to the register.
    ///
    /// What was written to memory before is visible to the device when it sees the new value.
    pub fn ring(&self, value: u32) {
        match self {
            Self::Mapped(doorbell) => doorbell.store(value),
            Self::Call { target, offset } => target.ring(*offset, value),
        }
    }
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mapped(doorbell) => f.debug_tuple("Mapped").field(&doorbell.word).finish(),
            Self::Call { offset, .. } => f.debug_struct("Call").field("offset", offset).finish(),
        }
    }
}

/// A part of the device's registers that is mapped into our address space.
#[derive(Clone)]
pub struct MappedRegisters {
    base: NonNull<u8>,
    first_offset: u32,
    len: usize,
    owner: Arc<dyn Any + Send + Sync>,
}

impl MappedRegisters {
    /// Describes a mapping at `base` of `len` bytes that shows BAR 0 from `first_offset` on.
    ///
    /// # Safety
    ///
    /// The mapping is readable and writable memory of the device, or what was put in its place
    /// when the device was given up, for as long as `owner` lives. Nothing else is ever there.
    /// `base` is aligned to 4 bytes.
    pub unsafe fn new(
        base: NonNull<u8>,
        first_offset: u32,
        len: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            base,
            first_offset,
            len,
            owner,
        }
    }

    /// The doorbell at `offset` of BAR 0, or nothing if the mapping does not hold that register.
    pub fn doorbell(&self, offset: u32) -> Option<Doorbell> {
        let start = usize::try_from(offset.checked_sub(self.first_offset)?).ok()?;
        if !start.is_multiple_of(4) || start.checked_add(4)? > self.len {
            return None;
        }
        // SAFETY: start + 4 <= len, checked above, so the word lies inside of the mapping that
        // `new`'s caller vouched for.
        let word = unsafe { self.base.add(start) }.cast::<u32>();
        Some(Doorbell::Mapped(MappedDoorbell {
            word,
            _owner: self.owner.clone(),
        }))
    }
}

impl fmt::Debug for MappedRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedRegisters")
            .field("base", &self.base)
            .field("first_offset", &self.first_offset)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

// SAFETY: the mapping is shared device memory, only ever accessed by whole-word volatile stores,
// and `owner` is Send + Sync.
unsafe impl Send for MappedRegisters {}
// SAFETY: as for Send.
unsafe impl Sync for MappedRegisters {}

/// One doorbell word of a [`MappedRegisters`].
#[derive(Clone)]
pub struct MappedDoorbell {
    word: NonNull<u32>,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl MappedDoorbell {
    fn store(&self, value: u32) {
        crate::barrier::before_doorbell();
        // SAFETY: `word` is an aligned word inside of a live mapping: `MappedRegisters::doorbell`
        // checked the bounds and `_owner` keeps the mapping.
        unsafe { self.word.write_volatile(value.to_le()) }
    }
}

// SAFETY: a doorbell is only ever written, by one volatile store of a whole word, which the
// device orders itself; the owner is Send + Sync.
unsafe impl Send for MappedDoorbell {}
// SAFETY: as for Send.
unsafe impl Sync for MappedDoorbell {}
