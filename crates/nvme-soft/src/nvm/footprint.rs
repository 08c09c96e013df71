//! What commands touch, so that those that overlap are told from those that do not.

use std::ops::Range;

use nvme_spec::Sqe;
use nvme_spec::nvm::BlockRange;
use nvme_spec::opcode::NvmOpcode;

/// The blocks of a namespace that a command reads or writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Footprint {
    nsid: u32,
    blocks: Range<u64>,
    writes: bool,
}

impl Footprint {
    /// What an I/O command touches; nothing if it is none that reads or writes blocks. Of ranges that
    /// are lists in host memory it is the whole namespace.
    pub(crate) fn of(command: &Sqe) -> Option<Self> {
        let (writes, all) = match NvmOpcode(command.opcode()) {
            NvmOpcode::READ | NvmOpcode::COMPARE | NvmOpcode::VERIFY => (false, false),
            NvmOpcode::WRITE | NvmOpcode::WRITE_ZEROES => (true, false),
            NvmOpcode::DATASET_MANAGEMENT | NvmOpcode::COPY => (true, true),
            _ => return None,
        };
        let blocks = if all {
            0..u64::MAX
        } else {
            let range = BlockRange::from_command(command);
            range.slba..range.slba.saturating_add(range.blocks.into())
        };
        Some(Self {
            nsid: command.nsid(),
            blocks,
            writes,
        })
    }

    /// As `of`, where it is known by now which blocks are going to be written.
    pub(crate) fn of_write(command: &Sqe, blocks: Range<u64>) -> Self {
        Self {
            nsid: command.nsid(),
            blocks,
            writes: true,
        }
    }

    /// Whether one of the two has to wait for the other.
    pub(crate) fn conflicts(&self, other: &Self) -> bool {
        self.nsid == other.nsid
            && (self.writes || other.writes)
            && self.blocks.start < other.blocks.end
            && other.blocks.start < self.blocks.end
    }
}

#[cfg(test)]
mod tests {
    use nvme_spec::nvm;

    use super::*;

    fn conflict(one: Sqe, other: Sqe) -> bool {
        let footprints = (Footprint::of(&one), Footprint::of(&other));
        let (Some(one), Some(other)) = footprints else {
            return false;
        };
        assert_eq!(one.conflicts(&other), other.conflicts(&one));
        one.conflicts(&other)
    }

    #[test]
    fn what_writes_conflicts_with_what_overlaps_it() {
        let write = nvm::write(1, 8, 8, true);
        for (other, conflicts) in [
            (nvm::read(1, 0, 8, false), false),
            (nvm::read(1, 0, 9, false), true),
            (nvm::read(1, 15, 1, false), true),
            (nvm::read(1, 16, 1, false), false),
            (nvm::read(2, 8, 8, false), false),
            (nvm::write(1, 10, 1, false), true),
            (nvm::compare(1, 10, 1, false), true),
            (nvm::verify(1, 7, 2, false), true),
            (nvm::write_zeroes(1, 0, 65_536, false, false), true),
            (nvm::write_zeroes(1, u64::MAX, 1, false, false), false),
            (nvm::dataset_management(1, 1, true), true),
            (nvm::dataset_management(2, 1, true), false),
            (nvm::flush(1), false),
        ] {
            assert_eq!(conflict(write, other), conflicts, "{other:?}");
        }
        let read = nvm::read(1, 8, 8, true);
        assert!(!conflict(read, nvm::read(1, 8, 8, true)));
        assert!(!conflict(read, nvm::verify(1, 8, 8, true)));
    }
}
