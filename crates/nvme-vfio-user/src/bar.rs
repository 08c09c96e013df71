//! BAR 0: registers, doorbells, and the tables of MSI-X.

use nvme_soft::SoftController;
use rustix::io::Errno;

use crate::vectors::Vectors;

/// The size of each part.
pub(crate) const PAGE: u32 = 0x1000;
/// Where the doorbells are.
pub(crate) const DOORBELLS: u32 = 0x1000;
/// Where the MSI-X table is.
pub(crate) const MSIX_TABLE: u32 = 0x2000;
/// Where the MSI-X pending bits are.
pub(crate) const MSIX_PENDING: u32 = 0x3000;
/// The size of all of it.
pub(crate) const SIZE: u32 = 0x4000;

/// The part that an address is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Registers,
    Doorbells,
    Table,
    Pending,
}

fn part(offset: u32) -> Part {
    match offset {
        0..DOORBELLS => Part::Registers,
        DOORBELLS..MSIX_TABLE => Part::Doorbells,
        MSIX_TABLE..MSIX_PENDING => Part::Table,
        _ => Part::Pending,
    }
}

/// Reads from `offset` on; the range is inside of the BAR.
pub(crate) fn read(controller: &SoftController, vectors: &Vectors, offset: u32, out: &mut [u8]) {
    let mut at = offset;
    let mut rest = out;
    while !rest.is_empty() {
        let aligned = at & !3;
        // Two halves of a 64-bit register are read at once where they are asked for at once.
        let mut word = [0; 8];
        let (skip, available) = if at.is_multiple_of(8) && rest.len() >= 8 {
            let value = match part(at) {
                Part::Registers => controller.read64(at),
                _ => {
                    u64::from(read32(controller, vectors, at + 4)) << 32
                        | u64::from(read32(controller, vectors, at))
                }
            };
            word = value.to_le_bytes();
            (0, 8)
        } else {
            let value = read32(controller, vectors, aligned);
            word[..4].copy_from_slice(&value.to_le_bytes());
            ((at - aligned) as usize, 4)
        };
        let count = (available - skip).min(rest.len());
        let (now, later) = rest.split_at_mut(count);
        now.copy_from_slice(&word[skip..skip + count]);
        rest = later;
        at += count as u32;
    }
}

fn read32(controller: &SoftController, vectors: &Vectors, offset: u32) -> u32 {
    match part(offset) {
        Part::Registers => controller.read32(offset),
        // They read as anything (NVMe over PCIe transport specification 1.0, section 3.1.2).
        Part::Doorbells => 0,
        Part::Table => vectors.read_table(offset - MSIX_TABLE),
        Part::Pending => vectors.read_pending(offset - MSIX_PENDING),
    }
}

/// Whether a write of so many bytes can lead to an interrupt at once: it unmasks vectors.
pub(crate) fn may_interrupt(offset: u64, len: usize) -> bool {
    offset.saturating_add(len as u64) > MSIX_TABLE.into()
}

/// Writes at `offset`; the range is inside of the BAR.
///
/// # Errors
///
/// EINVAL if it is not made of whole words.
pub(crate) fn write(
    controller: &SoftController,
    vectors: &Vectors,
    offset: u32,
    data: &[u8],
) -> Result<(), Errno> {
    let (words, rest) = data.as_chunks::<4>();
    if !offset.is_multiple_of(4) || !rest.is_empty() {
        return Err(Errno::INVAL);
    }
    for (at, word) in (offset..).step_by(4).zip(words) {
        let value = u32::from_le_bytes(*word);
        match part(at) {
            Part::Registers | Part::Doorbells => controller.write32(at, value),
            Part::Table => vectors.write_table(at - MSIX_TABLE, value),
            // Read only.
            Part::Pending => {}
        }
    }
    Ok(())
}
