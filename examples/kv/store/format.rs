//! What is on the device, as bytes: numbers are little-endian and of fixed size, and lists start with their length,
//! as Borsh has them.

use borsh::{BorshDeserialize, BorshSerialize};

/// Batches, headers and roots start at multiples of this.
pub(crate) const BLOCK: usize = 4096;
/// Where the segments start; the two roots lie before.
pub(super) const DATA_START: u64 = 64 << 10;
/// Bytes before the records of a batch.
pub(super) const BATCH_HEADER: usize = 32;
/// Bytes before the key of a record.
pub(super) const RECORD_HEADER: usize = 24;
/// Bytes before the batches of a segment that count; they lie in one logical block.
const SEGMENT_HEADER: usize = 24;

const ROOT_MAGIC: u64 = u64::from_le_bytes(*b"nvme-kv2");
const SEGMENT_MAGIC: u32 = u32::from_le_bytes(*b"kvSG");
const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"kvBA");
/// Most segments of a checkpoint: those whose numbers fit into a root.
pub(super) const MAX_CHECKPOINT_SEGMENTS: usize = (BLOCK - 128) / 12;

/// Set in the numbers of a checkpoint's batches. So none is the next one of the log, when a replay comes
/// to a segment of a checkpoint that was not finished, or is none any more.
pub(super) const OF_CHECKPOINT: u64 = 1 << 63;

/// What checksums of one life of one segment of one store start from: bytes of another one never pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seed(u32);

impl Seed {
    pub(super) fn new(store: u64, epoch: u64) -> Self {
        let store = crc32c::crc32c(&store.to_le_bytes());
        Self(crc32c::crc32c_append(store, &epoch.to_le_bytes()))
    }

    fn of(self, bytes: &[u8]) -> u32 {
        crc32c::crc32c_append(self.0, bytes)
    }

    /// Fills in the checksum, which is the first four bytes.
    fn sign(self, bytes: &mut [u8]) {
        let checksum = self.of(&bytes[4..]);
        bytes[..4].copy_from_slice(&checksum.to_le_bytes());
    }

    /// Whether the bytes are those that were signed.
    pub(super) fn verifies(self, bytes: &[u8]) -> bool {
        bytes[..4] == self.of(&bytes[4..]).to_le_bytes()
    }
}

const GROWS: &str = "a vector takes everything";

fn encode(what: &impl BorshSerialize) -> Vec<u8> {
    borsh::to_vec(what).expect(GROWS)
}

/// What is at the start of `bytes`.
fn decode<T: BorshDeserialize>(mut bytes: &[u8]) -> Option<T> {
    T::deserialize(&mut bytes).ok()
}

/// Where something is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub(super) struct Place {
    pub(super) segment: u32,
    /// In the segment.
    pub(super) offset: u32,
}

impl Place {
    /// Where the first batch of a segment is.
    pub(super) fn first(segment: u32) -> Self {
        let offset = BLOCK as u32;
        Self { segment, offset }
    }

    /// Where in the namespace, with segments of this size.
    pub(super) fn in_namespace(self, segment_size: u32) -> u64 {
        let segment = u64::from(self.segment) * u64::from(segment_size);
        DATA_START + segment + u64::from(self.offset)
    }

    /// So many bytes later.
    pub(super) fn after(self, len: usize) -> Self {
        Self {
            offset: self.offset + len as u32,
            ..self
        }
    }
}

/// Where in the log something comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub(super) struct Position {
    /// Of the segment.
    pub(super) epoch: u64,
    /// In the segment.
    pub(super) offset: u32,
    /// Of the batch.
    pub(super) sequence: u64,
}

/// What recovery starts from.
#[derive(Clone, Debug, Default, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub(crate) struct Root {
    pub(super) store: u64,
    pub(crate) generation: u64,
    pub(crate) segment_size: u32,
    pub(super) segments: u32,
    pub(super) next_epoch: u64,
    /// From where the log is replayed.
    pub(super) position: Position,
    /// How many batches the checkpoint has.
    pub(super) chunks: u64,
    /// The segments of the checkpoint, in order, with their epochs.
    pub(super) checkpoint: Vec<(u32, u64)>,
}

impl Root {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut block = encode(&(0u32, ROOT_MAGIC, self));
        block.resize(BLOCK, 0);
        Seed::default().sign(&mut block);
        block
    }

    /// Reads a block; nothing if it holds no root, or a torn one.
    pub(super) fn decode(block: &[u8]) -> Option<Self> {
        let (magic, root): (u64, Self) = decode(&block[4..])?;
        (magic == ROOT_MAGIC && Seed::default().verifies(block)).then_some(root)
    }
}

/// The first block of a segment.
pub(super) fn segment_header(store: u64, epoch: u64) -> Vec<u8> {
    let mut bytes = encode(&(0u32, SEGMENT_MAGIC, store, epoch));
    Seed::default().sign(&mut bytes);
    bytes.resize(BLOCK, 0);
    bytes
}

/// The epoch in a segment's first block; nothing if this store never used the segment.
pub(super) fn segment_epoch(store: u64, block: &[u8]) -> Option<u64> {
    let header = &block[..SEGMENT_HEADER];
    let (magic, of, epoch): (u32, u64, u64) = decode(&header[4..])?;
    let is_ours = (magic, of) == (SEGMENT_MAGIC, store) && Seed::default().verifies(header);
    is_ours.then_some(epoch)
}

/// Fills in the header of a batch, whose records are there, and pads it to whole blocks.
pub(super) fn seal_batch(batch: &mut Vec<u8>, seed: Seed, sequence: u64) {
    let len = batch.len();
    let header = (BATCH_MAGIC, sequence, len as u32);
    let written = header.serialize(&mut &mut batch[4..BATCH_HEADER]);
    written.expect("it takes less than a header");
    seed.sign(batch);
    batch.resize(len.next_multiple_of(BLOCK), 0);
}

/// The sequence number and the length of the batch that starts with `block`, which may be anything.
pub(super) fn batch_header(block: &[u8]) -> Option<(u64, usize)> {
    let (magic, sequence, len): (u32, u64, u32) = decode(&block[4..])?;
    (magic == BATCH_MAGIC && len as usize >= BATCH_HEADER).then_some((sequence, len as usize))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
#[borsh(use_discriminant = true)]
pub(crate) enum Kind {
    /// The key has this value.
    Set = 1,
    /// The key is gone.
    Delete = 2,
    /// The key expires at another time.
    Expire = 3,
    /// All keys are gone.
    Clear = 4,
    /// In checkpoints: the key's value is where this record's value says.
    Entry = 5,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record<B> {
    pub(crate) kind: Kind,
    /// In milliseconds since 1970; 0 for never.
    pub(crate) expires: u64,
    pub(crate) key: B,
    pub(crate) value: B,
}

/// Bytes of a record with such a key and value.
pub(super) fn record_len(key: usize, value: usize) -> usize {
    RECORD_HEADER + key + value
}

impl<B: AsRef<[u8]>> Record<B> {
    pub(super) fn len(&self) -> usize {
        record_len(self.key.as_ref().len(), self.value.as_ref().len())
    }

    pub(super) fn encode(&self, seed: Seed, out: &mut Vec<u8>) {
        let (key, value) = (self.key.as_ref(), self.value.as_ref());
        let lens = (key.len() as u32, value.len() as u32);
        // The kind takes four bytes.
        let header = (0u32, self.kind, [0u8; 3], lens, self.expires);
        let start = out.len();
        header.serialize(out).expect(GROWS);
        out.extend_from_slice(key);
        out.extend_from_slice(value);
        seed.sign(&mut out[start..]);
    }
}

impl<'a> Record<&'a [u8]> {
    /// Reads the record at the start of `bytes`, without its checksum.
    pub(super) fn decode(bytes: &'a [u8]) -> Option<Self> {
        let header: (Kind, [u8; 3], (u32, u32), u64) = decode(bytes.get(4..)?)?;
        let (kind, _, (key, value), expires) = header;
        let body = bytes.get(RECORD_HEADER..record_len(key as usize, value as usize))?;
        let (key, value) = body.split_at(key as usize);
        Some(Self {
            kind,
            expires,
            key,
            value,
        })
    }

    /// Reads the record that is all of `bytes`, if it is the one that was written.
    pub(super) fn verify(bytes: &'a [u8], seed: Seed) -> Option<Self> {
        Self::decode(bytes).filter(|record| record.len() == bytes.len() && seed.verifies(bytes))
    }
}

/// The records of a batch, with where each starts in it.
pub(super) fn records(batch: &[u8]) -> impl Iterator<Item = (usize, Record<&[u8]>)> {
    let mut offset = BATCH_HEADER;
    std::iter::from_fn(move || {
        let record = Record::decode(batch.get(offset..)?)?;
        let start = offset;
        offset += record.len();
        Some((start, record))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_damaged_or_from_another_life_does_not_pass() {
        let seed = Seed::new(7, 1);
        let record = Record {
            kind: Kind::Set,
            expires: 9,
            key: &b"key"[..],
            value: &b"value"[..],
        };
        let mut batch = vec![0; BATCH_HEADER];
        record.encode(seed, &mut batch);
        let len = batch.len();
        seal_batch(&mut batch, seed, 5);
        assert_eq!(batch_header(&batch), Some((5, len)));
        assert_eq!(batch.len(), BLOCK);
        assert!(seed.verifies(&batch[..len]));
        assert_eq!(
            records(&batch[..len]).collect::<Vec<_>>(),
            [(BATCH_HEADER, record)]
        );
        let bytes = &batch[BATCH_HEADER..len];
        assert_eq!(Record::verify(bytes, seed), Some(record));
        for other in [Seed::new(7, 2), Seed::new(8, 1)] {
            assert!(!other.verifies(&batch[..len]));
            assert_eq!(Record::verify(bytes, other), None);
        }
        for byte in 0..len {
            let mut damaged = batch[..len].to_vec();
            damaged[byte] ^= 1;
            assert!(!seed.verifies(&damaged), "byte {byte}");
        }
    }

    #[test]
    fn bytes_are_what_they_were() {
        let record = Record {
            kind: Kind::Expire,
            expires: 0x0102,
            key: "k",
            value: "v",
        };
        let mut batch = vec![0; BATCH_HEADER];
        record.encode(Seed::default(), &mut batch);
        seal_batch(&mut batch, Seed::default(), 5);
        let numbers = |numbers: &[u8]| {
            let bytes = numbers.iter().map(|number| [*number, 0, 0, 0]);
            bytes.flatten().collect::<Vec<_>>()
        };
        let header = [b"kvBA", &numbers(&[5, 0, 58, 0, 0, 0])[..]].concat();
        assert_eq!(batch[4..BATCH_HEADER], header);
        let header = [&numbers(&[3, 1, 1])[..], &[2, 1, 0, 0, 0, 0, 0, 0]].concat();
        assert_eq!(batch[36..56], header);
        assert_eq!(batch[56..58], *b"kv");
        let root = Root {
            store: 1,
            segment_size: 3,
            position: Position {
                epoch: 6,
                offset: 7,
                sequence: 8,
            },
            chunks: 9,
            checkpoint: vec![(10, 11)],
            ..Root::default()
        };
        let expected = numbers(&[1, 0, 0, 0, 3, 0, 0, 0, 6, 0, 7, 8, 0, 9, 0, 1, 10, 11, 0]);
        let block = root.encode();
        assert_eq!(block[4..12], *b"nvme-kv2");
        assert_eq!(block[12..][..expected.len()], expected);
        let header = [b"kvSG", &numbers(&[3, 0, 8, 0])[..]].concat();
        assert_eq!(segment_header(3, 8)[4..24], header);
        assert_eq!(crc32c::crc32c(&block[4..]).to_le_bytes(), block[..4]);
    }

    #[test]
    fn roots_and_headers_come_back() {
        let root = Root {
            store: 1,
            generation: 2,
            segment_size: 3,
            segments: 4,
            next_epoch: 5,
            position: Position {
                epoch: 6,
                offset: 7,
                sequence: 8,
            },
            chunks: 9,
            checkpoint: vec![(10, 11); MAX_CHECKPOINT_SEGMENTS],
        };
        let mut block = root.encode();
        assert_eq!(Root::decode(&block), Some(root));
        block[BLOCK - 1] ^= 1;
        assert_eq!(Root::decode(&block), None);
        assert_eq!(Root::decode(&[0; BLOCK]), None);
        assert_eq!(segment_epoch(3, &segment_header(3, 8)), Some(8));
        assert_eq!(segment_epoch(4, &segment_header(3, 8)), None);
        assert_eq!(segment_epoch(0, &[0; BLOCK]), None);
    }
}
