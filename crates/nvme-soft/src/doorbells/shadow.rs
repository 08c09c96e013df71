//! Shadow doorbells (base specification 2.0, section 5.8 and annex B.5): the host writes most values
//! of its doorbells to its own memory only.

use std::cell::Cell;
use std::sync::Arc;

use nvme_spec::Status;
use nvme_spec::registers::{DoorbellKind, doorbell_buffer_offset};

use super::Doorbells;
use crate::dma::Dma;

/// The doorbells as the controller's thread reads them: the registers, or what the host has in its
/// shadow doorbell buffer.
///
/// An entry of that buffer counts once the host has changed it; until then the register does. So a
/// host may leave the admin queue, or queues that were in use before, to the registers, as Linux does
/// with the admin queue. From then on a write of the register is only a reason to look at the entry,
/// which may have moved on by the time that the controller gets to it.
///
/// EventIdx is written before the controller goes to sleep, and says then that the next change is to
/// be written to the register too, which wakes. It is left as it is while the controller is awake and
/// looks at the entries anyway. So the host writes a register once after each sleep, and else only
/// when its value passes the old EventIdx again, once in a lap around the queue.
pub(crate) struct HostDoorbells {
    pub(crate) registers: Arc<Doorbells>,
    /// There are none until the host sets them up.
    buffers: Option<Box<Buffers>>,
}

/// Both buffers. Each is one memory page, in which there is an entry for each queue that the
/// controller can have: `Config::check` sees to that.
struct Buffers {
    dma: Dma,
    shadow: u64,
    event_index: u64,
    stride: u8,
    /// By queue identifier: the submission queue's tail and the completion queue's head.
    entries: Vec<[Entry; 2]>,
}

/// What the controller knows of a doorbell's entries in the buffers.
#[derive(Clone, Default)]
struct Entry {
    /// What the shadow entry has held since there is such a queue and such a buffer; nothing once it
    /// has held anything else, so that it counts.
    untouched: Cell<Option<u32>>,
    /// What was written to EventIdx.
    event_index: Option<u32>,
}

impl HostDoorbells {
    pub(crate) fn new(registers: Arc<Doorbells>) -> Self {
        Self {
            registers,
            buffers: None,
        }
    }

    /// The tail of a submission queue. Unlike a register, an entry of the shadow doorbell buffer may
    /// hold any value.
    pub(crate) fn submission_tail(&self, id: u16) -> Result<u32, Status> {
        let register = || self.registers.submission_tail(id);
        match &self.buffers {
            None => Ok(register()),
            Some(buffers) => buffers.value(id, DoorbellKind::SubmissionTail, register),
        }
    }

    /// The head of a completion queue, any value as [`HostDoorbells::submission_tail`].
    pub(crate) fn completion_head(&self, id: u16) -> Result<u32, Status> {
        let register = || self.registers.completion_head(id);
        match &self.buffers {
            None => Ok(register()),
            Some(buffers) => buffers.value(id, DoorbellKind::CompletionHead, register),
        }
    }

    /// Makes the doorbell of a new submission queue live, at 0.
    pub(crate) fn open_submission(&mut self, id: u16, entries: u32) {
        self.registers.open_submission(id, entries);
        self.open(id, DoorbellKind::SubmissionTail);
    }

    /// Makes the doorbell of a new completion queue live, at 0.
    pub(crate) fn open_completion(&mut self, id: u16, entries: u32) {
        self.registers.open_completion(id, entries);
        self.open(id, DoorbellKind::CompletionHead);
    }

    fn open(&mut self, id: u16, kind: DoorbellKind) {
        if let Some(buffers) = &mut self.buffers {
            // If the host's IOMMU refuses this, it refuses the next look at the doorbell too.
            let held = buffers.load(id, kind).unwrap_or(0);
            *buffers.entry(id, kind) = Entry {
                untouched: Cell::new(Some(held)),
                event_index: None,
            };
        }
    }

    /// Sets up the buffers at these addresses, in place of others if there are. `seen` has the
    /// doorbells that are live, with the values that the controller has seen last.
    ///
    /// # Errors
    ///
    /// The status of an access to the buffers that was refused; nothing has changed then.
    pub(crate) fn set_up(
        &mut self,
        dma: Dma,
        shadow: u64,
        event_index: u64,
        seen: &[(u16, DoorbellKind, u32)],
    ) -> Result<(), Status> {
        let mut buffers = Box::new(Buffers {
            dma,
            shadow,
            event_index,
            stride: self.registers.stride(),
            entries: vec![Default::default(); self.registers.queues.len()],
        });
        for &(id, kind, value) in seen {
            let held = buffers.load(id, kind)?;
            buffers.entry(id, kind).untouched = Cell::new(Some(held));
            buffers.listen(id, kind, value)?;
        }
        if let Some(mut old) = self.buffers.replace(buffers) {
            for &(id, kind, seen) in seen {
                let value = old.load(id, kind).unwrap_or(seen);
                if old.entry(id, kind).untouched.get() != Some(value) {
                    // The register, which has fallen behind, counts again.
                    self.registers.set(id, kind, value);
                }
            }
        }
        self.registers.set_has_shadow(true);
        Ok(())
    }

    /// Only the registers count from now on. All queues are to be closed.
    pub(crate) fn forget_buffers(&mut self) {
        self.buffers = None;
        self.registers.set_has_shadow(false);
    }

    pub(crate) fn has_buffers(&self) -> bool {
        self.buffers.is_some()
    }

    /// Asks the host to write the register too when it next changes a doorbell, which was `seen` when
    /// it was looked at last. After a SeqCst fence the caller looks at it once more: the host has
    /// changed it before, or will see what it is asked.
    pub(crate) fn listen(&mut self, id: u16, kind: DoorbellKind, seen: u32) -> Result<(), Status> {
        match &mut self.buffers {
            None => Ok(()),
            Some(buffers) => buffers.listen(id, kind, seen),
        }
    }
}

impl Buffers {
    fn value(
        &self,
        id: u16,
        kind: DoorbellKind,
        register: impl FnOnce() -> u32,
    ) -> Result<u32, Status> {
        let value = self.load(id, kind)?;
        let untouched = &self.entries[usize::from(id)][kind as usize].untouched;
        if untouched.get() == Some(value) {
            return Ok(register());
        }
        untouched.set(None);
        Ok(value)
    }

    fn load(&self, id: u16, kind: DoorbellKind) -> Result<u32, Status> {
        let offset = doorbell_buffer_offset(id, kind, self.stride);
        self.dma.load_acquire(self.shadow + offset)
    }

    fn listen(&mut self, id: u16, kind: DoorbellKind, seen: u32) -> Result<(), Status> {
        if self.entry(id, kind).event_index == Some(seen) {
            return Ok(());
        }
        let offset = doorbell_buffer_offset(id, kind, self.stride);
        self.dma.store_release(self.event_index + offset, seen)?;
        self.entry(id, kind).event_index = Some(seen);
        Ok(())
    }

    fn entry(&mut self, id: u16, kind: DoorbellKind) -> &mut Entry {
        &mut self.entries[usize::from(id)][kind as usize]
    }
}
