//! What `--verify` knows of each block of the region.

use std::sync::atomic::{AtomicU32, Ordering};

/// The sequence numbers of the last writes, and who uses which block at present.
///
/// NVMe orders nothing between commands that are outstanding together, so a block that is both
/// read and written at a time has no contents that could be checked. Each request claims its
/// block.
#[derive(Debug)]
pub(super) struct Ledger {
    blocks: Box<[AtomicU32]>,
}

/// The most blocks of a ledger, which takes four bytes for each.
pub(super) const MAX_BLOCKS: u64 = 1 << 28;

const CLAIMED: u32 = 1 << 31;

/// What is known of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contents {
    /// This run has not written it, or does not know how a write of it ended.
    Unknown,
    /// The write with this number has succeeded, and no later one was tried.
    Written { sequence: u32 },
}

impl Ledger {
    /// A ledger of blocks of which nothing is known.
    pub(super) fn new(blocks: u64) -> Self {
        debug_assert!(blocks <= MAX_BLOCKS);
        Self {
            blocks: (0..blocks).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// Claims a block, unless somebody else has it.
    pub(super) fn claim(&self, block: u64) -> Option<Claim<'_>> {
        let entry = &self.blocks[block as usize];
        // Acquire: what the last holder did to the block happened before.
        let state = entry.fetch_or(CLAIMED, Ordering::Acquire);
        (state & CLAIMED == 0).then_some(Claim { entry, state })
    }
}

/// The right to read and write a block. A claim that is dropped is never given back: for a
/// request that may still be under way.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    entry: &'a AtomicU32,
    state: u32,
}

impl Claim<'_> {
    pub(super) fn contents(&self) -> Contents {
        match self.state {
            0 => Contents::Unknown,
            sequence => Contents::Written { sequence },
        }
    }

    /// The number for the next write.
    pub(super) fn next_sequence(&self) -> u32 {
        self.state % (CLAIMED - 1) + 1
    }

    pub(super) fn release(self, contents: Contents) {
        let state = match contents {
            Contents::Unknown => 0,
            Contents::Written { sequence } => sequence,
        };
        self.entry.store(state, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_one_user_at_a_time() {
        let ledger = Ledger::new(2);
        let claim = ledger.claim(1).expect("free");
        assert!(ledger.claim(1).is_none());
        assert!(ledger.claim(0).is_some());
        assert_eq!(claim.contents(), Contents::Unknown);
        assert_eq!(claim.next_sequence(), 1);
        claim.release(Contents::Written { sequence: 1 });
        let claim = ledger.claim(1).expect("free again");
        assert_eq!(claim.contents(), Contents::Written { sequence: 1 });
        assert_eq!(claim.next_sequence(), 2);
        claim.release(Contents::Unknown);
        assert_eq!(
            ledger.claim(1).map(|claim| claim.contents()),
            Some(Contents::Unknown)
        );
        // That claim was dropped.
        assert!(ledger.claim(1).is_none());
    }

    #[test]
    fn sequence_numbers_never_look_like_a_claim_or_like_nothing() {
        let ledger = Ledger::new(1);
        let claim = ledger.claim(0).expect("free");
        claim.release(Contents::Written {
            sequence: CLAIMED - 1,
        });
        let claim = ledger.claim(0).expect("free");
        assert_eq!(
            claim.contents(),
            Contents::Written {
                sequence: CLAIMED - 1
            }
        );
        assert_eq!(claim.next_sequence(), 1);
    }
}
