//! The keys and where their values are, in memory.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use borsh::{BorshDeserialize, BorshSerialize};

use super::format::{BLOCK, Place, record_len};

/// The index is walked piece by piece, so that walks are short: these are the pieces.
pub(super) const SHARDS: usize = 1024;

/// Bytes of what a checkpoint has of an entry.
const ENTRY: usize = 12;

/// Where the record of a key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub(crate) struct Entry {
    pub(super) place: Place,
    pub(crate) value_len: u32,
    /// In milliseconds since 1970; 0 for never. A checkpoint has it in the head of its record.
    #[borsh(skip)]
    pub(crate) expires: u64,
}

impl Entry {
    /// Bytes of its record.
    pub(super) fn record_len(&self, key: &[u8]) -> usize {
        record_len(key.len(), self.value_len as usize)
    }

    pub(super) fn is_expired(&self, now: u64) -> bool {
        self.expires != 0 && self.expires <= now
    }

    pub(super) fn encode(&self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        let written = self.serialize(&mut &mut bytes[..]);
        written.expect("it is three numbers of four bytes");
        bytes
    }

    pub(super) fn decode(bytes: &[u8], expires: u64) -> Option<Self> {
        let entry = Self::try_from_slice(bytes).ok()?;
        Some(Self { expires, ..entry })
    }
}

/// A map from keys to entries.
pub(crate) struct Index {
    hasher: RandomState,
    shards: Vec<HashMap<Box<[u8]>, Entry, RandomState>>,
    /// What a checkpoint takes.
    pub(super) extent: Extent,
}

impl Default for Index {
    fn default() -> Self {
        let hasher = RandomState::new();
        Self {
            shards: vec![HashMap::with_hasher(hasher.clone()); SHARDS],
            hasher,
            extent: Extent::default(),
        }
    }
}

impl Index {
    fn shard(&self, key: &[u8]) -> usize {
        // The maps use the low bits and the highest seven.
        (self.hasher.hash_one(key) >> 32) as usize % SHARDS
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Entry> {
        self.shards[self.shard(key)].get(key)
    }

    /// Lets a key have another entry, or none. Returns what it had.
    pub(super) fn replace(&mut self, key: &[u8], entry: Option<Entry>) -> Option<Entry> {
        let shard = self.shard(key);
        let shard = &mut self.shards[shard];
        let Some(entry) = entry else {
            let old = shard.remove(key)?;
            self.extent.bytes -= Extent::of(key);
            return Some(old);
        };
        if let Some(old) = shard.get_mut(key) {
            return Some(std::mem::replace(old, entry));
        }
        self.extent.add(key);
        shard.insert(key.into(), entry)
    }

    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(HashMap::len).sum()
    }

    pub(super) fn entries(&self, shard: usize) -> impl Iterator<Item = (&[u8], &Entry)> {
        let entries = self.shards[shard].iter();
        entries.map(|(key, entry)| (&**key, entry))
    }
}

/// How large the records of a checkpoint are.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Extent {
    pub(super) bytes: usize,
    /// Of the longest that there was.
    longest: usize,
}

impl Extent {
    fn of(key: &[u8]) -> usize {
        record_len(key.len(), ENTRY)
    }

    /// With one more key.
    pub(super) fn add(&mut self, key: &[u8]) {
        self.bytes += Self::of(key);
        self.longest = self.longest.max(Self::of(key));
    }

    /// Segments that this takes, if so many bytes of each can be used.
    pub(super) fn segments(&self, room: usize) -> usize {
        let least = room.saturating_sub(self.longest);
        self.bytes.div_ceil(least.max(BLOCK)) + 2
    }
}
