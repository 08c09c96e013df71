//! The driver's side of a split virtqueue (virtio 1.2, section 2.7).

use std::sync::atomic::{Ordering, fence};

use anyhow::{Result, ensure};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{AtomicAccess, Bytes, VolatileSlice};

use crate::layout::{self, BLOCK, CHAIN};

/// Bytes of a request's header.
const HEADER: u32 = 16;
/// The unit of a request's place, in bytes.
const SECTOR: u64 = 512;
/// Before the device has written a status.
const NO_STATUS: u8 = 0xff;

/// A queue with requests of one size, in memory that the device changes meanwhile. Each slot is a request with
/// descriptors, header, data and status of its own.
#[derive(Debug)]
pub(crate) struct Ring<'a> {
    memory: VolatileSlice<'a>,
    /// Where the next head goes in the available ring, and what of the used ring was seen.
    available: u16,
    seen: u16,
}

impl<'a> Ring<'a> {
    /// A queue in memory that is all zeroes, of [`layout::MEMORY`] bytes.
    pub(crate) fn new(memory: VolatileSlice<'a>) -> Result<Self> {
        let ring = Self {
            memory,
            available: 0,
            seen: 0,
        };
        for slot in 0..layout::MAX_SLOTS {
            let parts = [
                (layout::header(slot), HEADER),
                (layout::data(slot), BLOCK as u32),
                (layout::status(slot), 1),
            ];
            for (index, (address, len)) in (slot * CHAIN..).zip(parts) {
                let descriptor = layout::descriptor(index);
                ring.store(descriptor, address.to_le())?;
                ring.store(descriptor + 8, len.to_le())?;
                ring.store(descriptor + 14, (index + 1).to_le())?;
            }
            ring.store(
                layout::descriptor(slot * CHAIN) + 12,
                flags(VRING_DESC_F_NEXT),
            )?;
            let last = layout::descriptor(slot * CHAIN + CHAIN - 1);
            ring.store(last + 12, flags(VRING_DESC_F_WRITE))?;
        }
        Ok(ring)
    }

    fn store<T: AtomicAccess>(&self, at: u64, value: T) -> Result<()> {
        Ok(self.memory.store(value, at as usize, Ordering::Relaxed)?)
    }

    fn load<T: AtomicAccess>(&self, at: u64, order: Ordering) -> Result<T> {
        Ok(self.memory.load(at as usize, order)?)
    }

    /// Makes the request of a slot available: to write its data at an offset in bytes, or to read it from there.
    /// Returns whether the device is to be kicked.
    pub(crate) fn submit(&mut self, slot: u16, is_write: bool, offset: u64) -> Result<bool> {
        let (kind, direction) = match is_write {
            true => (VIRTIO_BLK_T_OUT, 0),
            false => (VIRTIO_BLK_T_IN, VRING_DESC_F_WRITE),
        };
        let header = layout::header(slot);
        self.store(header, kind.to_le())?;
        self.store(header + 8, (offset / SECTOR).to_le())?;
        self.store(layout::status(slot), NO_STATUS)?;
        let head = slot * CHAIN;
        let data = layout::descriptor(head + 1);
        self.store(data + 12, flags(VRING_DESC_F_NEXT | direction))?;
        self.store(layout::available_entry(self.available), head.to_le())?;
        let (old, new) = (self.available, self.available.wrapping_add(1));
        self.available = new;
        let index = layout::available_index() as usize;
        // Release: who sees the index sees the request.
        self.memory.store(new.to_le(), index, Ordering::Release)?;
        // The device sets the event and then looks at the index, and this is the other way round: one of the two sees
        // what the other did.
        fence(Ordering::SeqCst);
        let event = u16::from_le(self.load(layout::available_event(), Ordering::Relaxed)?);
        Ok(is_passed(event, new, old))
    }

    /// The slot of a request that is done and was not seen before.
    ///
    /// # Errors
    ///
    /// The request has failed, or there was none.
    pub(crate) fn take(&mut self) -> Result<Option<u16>> {
        if self.used_index()? == self.seen {
            return Ok(None);
        }
        let head: u32 = self.load(layout::used_entry(self.seen), Ordering::Relaxed)?;
        self.seen = self.seen.wrapping_add(1);
        let head = u32::from_le(head);
        let slot = head / u32::from(CHAIN);
        ensure!(
            head.is_multiple_of(CHAIN.into()) && slot < layout::MAX_SLOTS.into(),
            "the device gives back descriptor {head}, which is no head"
        );
        let slot = slot as u16;
        let status: u8 = self.load(layout::status(slot), Ordering::Relaxed)?;
        ensure!(status == 0, "a request has failed with status {status}");
        Ok(Some(slot))
    }

    /// Asks for an interrupt for what is done next. Returns whether something is already.
    pub(crate) fn ask(&self) -> Result<bool> {
        self.store(layout::used_event(), self.seen.to_le())?;
        // As in `submit`, with the other ring.
        fence(Ordering::SeqCst);
        Ok(self.used_index()? != self.seen)
    }

    fn used_index(&self) -> Result<u16> {
        // Acquire: what is given back, data and status, was written before.
        Ok(u16::from_le(
            self.load(layout::used_index(), Ordering::Acquire)?,
        ))
    }
}

fn flags(flags: u32) -> u16 {
    // There are three.
    (flags as u16).to_le()
}

/// Whether an index that went from `old` to `new` has passed the event, at which the other side wants to be told
/// (virtio 1.2, section 2.7.7.2).
fn is_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use vm_memory::VolatileMemory;

    use super::*;

    #[test]
    fn events_are_passed_once() {
        for base in [0, 5, u16::MAX] {
            let at = |index: u16| base.wrapping_add(index);
            assert!(is_passed(at(0), at(1), at(0)));
            assert!(is_passed(at(2), at(5), at(1)));
            assert!(!is_passed(at(1), at(1), at(0)), "not there yet");
            assert!(!is_passed(at(0), at(2), at(1)), "before");
        }
    }

    /// Plays the device, with the bytes as the specification has them.
    #[test]
    fn a_request_is_what_the_specification_says() {
        let mut bytes = vec![0; layout::MEMORY as usize];
        let memory = VolatileSlice::from(bytes.as_mut_slice());
        let mut ring = Ring::new(memory.get_slice(0, memory.len()).unwrap()).unwrap();
        let read = |at: u64, len: usize| {
            let mut out = vec![0; len];
            memory.read_slice(&mut out, at as usize).unwrap();
            out
        };
        // The event of the zeroed memory is the first one.
        assert!(ring.submit(2, false, 8 * 512).unwrap());
        assert!(!ring.submit(1, true, 0).unwrap());
        assert_eq!(read(layout::available(), 8), [0, 0, 2, 0, 6, 0, 3, 0]);
        let mut header = [0; 16];
        header[8] = 8;
        assert_eq!(read(layout::header(2), 16), header);
        assert_eq!(read(layout::header(1), 1), [1]);
        let descriptors = |head: u16| {
            (head..head + 3).map(move |index| {
                let bytes = read(layout::descriptor(index), 16);
                let address = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                (address, bytes[9], bytes[12], bytes[14])
            })
        };
        // Address, length / 256, flags, next.
        let (header, data, status) = (layout::header(2), layout::data(2), layout::status(2));
        let expected = [(header, 0, 1, 7), (data, 16, 3, 8), (status, 0, 2, 9)];
        assert!(descriptors(6).eq(expected));
        let flags: Vec<u8> = descriptors(3).map(|(_, _, flags, _)| flags).collect();
        assert_eq!(flags, [1, 1, 2]);

        assert_eq!(ring.take().unwrap(), None);
        assert!(!ring.ask().unwrap());
        let give_back = |index: u16, head: u32, status: u8| {
            let slot = head as u16 / CHAIN;
            memory
                .write_obj(status, layout::status(slot) as usize)
                .unwrap();
            let entry = layout::used_entry(index) as usize;
            memory.write_slice(&head.to_le_bytes(), entry).unwrap();
            let next = (index + 1).to_le_bytes();
            memory
                .write_slice(&next, layout::used_index() as usize)
                .unwrap();
        };
        give_back(0, 3, 0);
        assert!(ring.ask().unwrap());
        assert_eq!(ring.take().unwrap(), Some(1));
        assert!(!ring.ask().unwrap());
        assert_eq!(read(layout::used_event(), 2), [1, 0]);
        give_back(1, 6, 1);
        ring.take().expect_err("it has failed");
        give_back(2, 7, 0);
        ring.take().expect_err("it is no head");
    }
}
