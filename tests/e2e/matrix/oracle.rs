//! What the blocks may hold.

use nvme_async::Fate;

use super::operations::{Done, Kind, SPACING};
use super::{SOURCES, USED};

pub(super) const BLOCK: usize = 512;
/// Blocks of one operation: more than one, so that some can have old and others new data.
const BLOCKS: usize = 3;

/// Where one operation works, and what is there before and after.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) index: u64,
    pub(super) old: u8,
    pub(super) new: u8,
}

impl Layout {
    pub(super) fn offset(&self) -> u64 {
        self.index * SPACING
    }

    pub(super) fn len(&self) -> usize {
        BLOCKS * BLOCK
    }

    /// Where a copy has its data from.
    pub(super) fn source(&self) -> u64 {
        SOURCES + self.offset()
    }
}

/// What an acknowledgement is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    Everything,
    /// Only what was made durable is there.
    Durable,
    Nothing,
}

/// The blocks of all operations of a round.
#[derive(Debug)]
pub(super) struct Oracle {
    /// What each block may hold, by its number; nothing if that is anything.
    allowed: Vec<Vec<u8>>,
}

impl Oracle {
    /// All is known: what was just written.
    pub(super) fn new(contents: &[u8]) -> Self {
        let allowed = contents.chunks(BLOCK).map(|block| vec![block[0]]).collect();
        Self { allowed }
    }

    /// What is there before everything begins.
    pub(super) fn first_contents() -> Vec<u8> {
        let block = |number: usize| {
            let tag = match (number * BLOCK) as u64 {
                offset if offset < SOURCES => 0x10 + (number % 7) as u8,
                offset => 0x80 + ((offset - SOURCES) / SPACING % 0x40) as u8,
            };
            vec![tag; BLOCK]
        };
        (0..USED as usize / BLOCK).flat_map(block).collect()
    }

    /// Where the operation of this index works in this round, and what it writes.
    pub(super) fn layout(&self, kind: Kind, index: u64, round: u8) -> Layout {
        let first = (index * SPACING) as usize / BLOCK;
        let old = self.allowed[first].first().copied().unwrap_or_default();
        let new = match kind {
            Kind::WriteZeroes | Kind::Discard => 0,
            Kind::Copy => 0x80 + (index % 0x40) as u8,
            _ => 0xc0 + round * 0x10 + (index % 0x10) as u8,
        };
        Layout { index, old, new }
    }

    /// Makes an operation's blocks the same, for compares.
    pub(super) fn even(contents: &mut [u8], index: u64) {
        let first = (index * SPACING) as usize;
        let tag = contents[first];
        contents[first..first + BLOCKS * BLOCK].fill(tag);
    }

    /// Takes note of how an operation ended.
    pub(super) fn note(&mut self, kind: Kind, layout: &Layout, done: &Done, trust: Trust) {
        if !kind.changes_blocks() {
            return;
        }
        let first = layout.offset() as usize / BLOCK;
        for allowed in &mut self.allowed[first..first + BLOCKS] {
            match &done.result {
                // It may have taken its data from memory that was somebody else's by then.
                _ if trust == Trust::Nothing => allowed.clear(),
                Ok(()) if trust == Trust::Durable && !kind.is_durable() => allowed.push(layout.new),
                Ok(()) => *allowed = vec![layout.new],
                Err(error) if error.fate() == Fate::NotExecuted => {}
                Err(_) => allowed.push(layout.new),
            }
        }
    }

    /// The contents are among what they may be; from then on they are known.
    #[track_caller]
    pub(super) fn check(&mut self, contents: &[u8]) {
        for (number, (block, allowed)) in contents.chunks(BLOCK).zip(&mut self.allowed).enumerate()
        {
            let tag = block[0];
            if allowed.is_empty() {
                continue;
            }
            assert!(
                block.iter().all(|&byte| byte == tag),
                "block {number} holds a mixture"
            );
            assert!(
                allowed.contains(&tag),
                "block {number} holds {tag:#x}, and may hold {allowed:x?}"
            );
            *allowed = vec![tag];
        }
    }
}
