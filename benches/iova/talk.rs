//! A model of the allocator of the talk that `iova` set out from: that of QEMU's NVMe driver, made
//! from a description of what it does.
//!
//! Addresses are handed out from both ends and never one by one taken back: fixed mappings from the
//! bottom, recorded by host address; temporary ones from the top, recorded nowhere, so that each
//! request maps its memory anew, segment by segment. When a limit is reached, the request waits
//! until none is in flight, all temporary mappings are removed by one call, and it goes on where it
//! was.
//!
//! The description comes from reading that driver; nobody compared the model with it as it runs.
//! Left out is what the trace doesn't reach: several usable ranges, and fixed mappings that end.

use std::collections::VecDeque;
use std::sync::Arc;

use iova::{AddressSpace, Direction, DmaMapper, HostMemory, MapError};

use crate::mapper::Counting;
use crate::trace::{Allocator, Request, Stall, Submitted};

pub(crate) struct Talk {
    mapper: Arc<Counting>,
    /// By host address.
    fixed: Vec<Fixed>,
    /// Where the next fixed mapping begins.
    low_mark: u64,
    /// Where the last temporary mapping begins.
    high_mark: u64,
}

struct Fixed {
    host: u64,
    len: u64,
    iova: u64,
}

/// Beyond the last address: 39 bits, however many there are.
const END: u64 = AddressSpace::DEFAULT_RANGE.last + 1;

impl Allocator for Talk {
    /// Mappings don't know who uses them; that a request is in flight is all that counts.
    type Held = ();

    fn new(mapper: Arc<Counting>, fixed: &[HostMemory<'static>]) -> Self {
        let mut talk = Self {
            mapper,
            fixed: Vec::new(),
            low_mark: AddressSpace::DEFAULT_RANGE.first,
            high_mark: END,
        };
        for memory in fixed {
            talk.map_fixed(memory).expect("there is room at first");
        }
        talk
    }

    fn submit(&mut self, request: &Request, in_flight: &mut VecDeque<()>) -> Submitted<()> {
        let mut stall = Stall::None;
        let segments = request.segments.iter();
        let iovas = segments.map(|segment| {
            self.map_temporary(segment).unwrap_or_else(|_| {
                if !in_flight.is_empty() {
                    in_flight.clear();
                    stall = Stall::Full;
                }
                self.reset_temporary();
                // The segments before are not mapped again, though they just lost their mappings.
                self.map_temporary(segment).expect("there is room again")
            })
        });
        Submitted {
            iovas: iovas.collect(),
            stall,
            held: (),
        }
    }
}

impl Talk {
    fn map_fixed(&mut self, memory: &HostMemory<'_>) -> Result<u64, MapError> {
        let host = memory.addr().addr().get() as u64;
        let len = memory.len() as u64;
        if let Some(iova) = self.find(host) {
            return Ok(iova);
        }
        self.check_marks(len)?;
        let iova = self.low_mark;
        self.carry_out(iova, memory)?;
        self.low_mark += len;
        let index = self.fixed.partition_point(|fixed| fixed.host < host);
        self.fixed.insert(index, Fixed { host, len, iova });
        Ok(iova)
    }

    fn map_temporary(&mut self, memory: &HostMemory<'_>) -> Result<u64, MapError> {
        let len = memory.len() as u64;
        if let Some(iova) = self.find(memory.addr().addr().get() as u64) {
            return Ok(iova);
        }
        self.check_marks(len)?;
        let iova = self.high_mark - len;
        self.carry_out(iova, memory)?;
        self.high_mark = iova;
        Ok(iova)
    }

    /// The I/O address of a byte of fixed mappings. Where the memory ends is not looked at.
    fn find(&self, host: u64) -> Option<u64> {
        let after = self.fixed.partition_point(|fixed| fixed.host <= host);
        let fixed = &self.fixed[after.checked_sub(1)?];
        let offset = host - fixed.host;
        (offset < fixed.len).then_some(fixed.iova + offset)
    }

    fn check_marks(&self, len: u64) -> Result<(), MapError> {
        if self.high_mark - self.low_mark < len {
            // The same number as the kernel's for its limits, and treated alike.
            return Err(MapError::MemoryLimit);
        }
        Ok(())
    }

    fn carry_out(&self, iova: u64, memory: &HostMemory<'_>) -> Result<(), MapError> {
        // SAFETY: the mapper keeps books and never touches memory.
        unsafe { self.mapper.map(iova, memory, Direction::Bidirectional) }
    }

    fn reset_temporary(&mut self) {
        let all = self.mapper.unmap(self.high_mark, END - self.high_mark);
        all.expect("temporary mappings lie side by side");
        self.high_mark = END;
    }
}
