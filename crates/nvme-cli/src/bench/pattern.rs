//! What `--verify` writes, and what it makes of what it reads.
//!
//! Each logical block begins with a header (five little-endian words: a magic number, the run, the
//! byte offset of the block, the sequence number of the write, and the rest of the header mixed
//! into a seed), followed by words that the header determines. So a block says by itself whether
//! it is whole, whether it is where it belongs, and which write it comes from.

use std::fmt;

/// "nvmbench", as bytes.
const MAGIC: u64 = u64::from_le_bytes(*b"nvmbench");
const HEADER_WORDS: usize = 5;
const WORD: usize = size_of::<u64>();

/// Which write a block comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    /// Differs from run to run of the benchmark.
    pub(super) run: u64,
    /// Counts the writes of this place within the run, from 1.
    pub(super) sequence: u32,
}

/// What is wrong with data that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    /// Of the first block that is wrong, in bytes from the start of the namespace.
    pub(super) offset: u64,
    pub(super) kind: MismatchKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MismatchKind {
    /// There is no header.
    Unwritten,
    /// The header and what follows don't match.
    Corrupt { byte: usize },
    /// The block belongs elsewhere.
    Misplaced { belongs: u64 },
    /// The block comes from another write than the last one.
    Stale { found: Origin, expected: Origin },
    /// The block comes from another write than the first block of the same write.
    Torn { found: Origin, first: Origin },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at offset {}: ", self.offset)?;
        match self.kind {
            MismatchKind::Unwritten => {
                write!(f, "the block holds nothing that `bench --verify` wrote")
            }
            MismatchKind::Corrupt { byte } => {
                write!(f, "the block is corrupt from byte {byte} on")
            }
            MismatchKind::Misplaced { belongs } => {
                write!(f, "misplaced: the block belongs to offset {belongs}")
            }
            MismatchKind::Stale { found, expected } if found.run != expected.run => {
                write!(f, "stale: the block is of an earlier run")
            }
            MismatchKind::Stale { found, expected } => write!(
                f,
                "stale: the block is of write {} of this place, not of write {}",
                found.sequence, expected.sequence
            ),
            MismatchKind::Torn { found, first } => write!(
                f,
                "torn: the block is of write {}, an earlier one of the same request of write {}",
                found.sequence, first.sequence
            ),
        }
    }
}

/// Fills `data`, which is to be written at `offset`, with blocks of `block_size` bytes.
pub(super) fn stamp(data: &mut [u8], block_size: usize, offset: u64, origin: Origin) {
    for (block, offset) in data
        .chunks_exact_mut(block_size)
        .zip(offsets(offset, block_size))
    {
        let header = header(offset, origin);
        let words = header.into_iter().chain(body(&header));
        for (to, word) in block.chunks_exact_mut(WORD).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Checks `data`, which was read at `offset` and written by one request.
///
/// Without `expected` it may come from any write.
pub(super) fn check(
    data: &[u8],
    block_size: usize,
    offset: u64,
    expected: Option<Origin>,
) -> Result<(), Mismatch> {
    let mut first = None;
    for (block, offset) in data
        .chunks_exact(block_size)
        .zip(offsets(offset, block_size))
    {
        let origin = check_block(block, offset).map_err(|kind| Mismatch { offset, kind })?;
        let first = *first.get_or_insert(origin);
        // Torn before stale: a request of which some blocks are new and some old is both.
        if origin != first {
            return Err(Mismatch {
                offset,
                kind: MismatchKind::Torn {
                    found: origin,
                    first,
                },
            });
        }
    }
    match (first, expected) {
        (Some(found), Some(expected)) if found != expected => Err(Mismatch {
            offset,
            kind: MismatchKind::Stale { found, expected },
        }),
        _ => Ok(()),
    }
}

fn check_block(block: &[u8], offset: u64) -> Result<Origin, MismatchKind> {
    let mut words = block.chunks_exact(WORD).map(le_word);
    let mut found = [0; HEADER_WORDS];
    for (word, read) in found.iter_mut().zip(&mut words) {
        *word = read;
    }
    let [magic, run, belongs, sequence, _] = found;
    if magic != MAGIC {
        return Err(MismatchKind::Unwritten);
    }
    let origin = Origin {
        run,
        sequence: sequence as u32,
    };
    let header = header(belongs, origin);
    let expected = header.into_iter().chain(body(&header));
    let mut all = found.into_iter().chain(words).zip(expected);
    if let Some(word) = all.position(|(read, expected)| read != expected) {
        return Err(MismatchKind::Corrupt { byte: word * WORD });
    }
    if belongs != offset {
        return Err(MismatchKind::Misplaced { belongs });
    }
    Ok(origin)
}

fn header(offset: u64, origin: Origin) -> [u64; HEADER_WORDS] {
    let sequence = u64::from(origin.sequence);
    let seed = mix(mix(mix(origin.run) ^ offset) ^ sequence);
    [MAGIC, origin.run, offset, sequence, seed]
}

/// What follows a header, without an end.
fn body(header: &[u64; HEADER_WORDS]) -> impl Iterator<Item = u64> + use<> {
    let seed = header[HEADER_WORDS - 1];
    (1..).map(move |index: u64| mix(seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15))))
}

/// The finalizer of SplitMix64: a permutation whose output looks random.
fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn le_word(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

fn offsets(first: u64, block_size: usize) -> impl Iterator<Item = u64> {
    (0..).map(move |index| first + index * block_size as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LBA: usize = 512;
    const AT: u64 = 1 << 20;

    fn origin(sequence: u32) -> Origin {
        Origin {
            run: 0x1234,
            sequence,
        }
    }

    fn written(offset: u64, origin: Origin) -> Vec<u8> {
        let mut data = vec![0xee; 8 * LBA];
        stamp(&mut data, LBA, offset, origin);
        data
    }

    fn kind(data: &[u8]) -> Option<(u64, MismatchKind)> {
        let error = check(data, LBA, AT, Some(origin(5))).err()?;
        Some((error.offset, error.kind))
    }

    #[test]
    fn what_was_written_is_accepted() {
        let data = written(AT, origin(5));
        assert_eq!(check(&data, LBA, AT, Some(origin(5))), Ok(()));
        assert_eq!(check(&data, LBA, AT, None), Ok(()));
        let mut large = vec![0; 8192];
        stamp(&mut large, 4096, AT, origin(1));
        assert_eq!(check(&large, 4096, AT, Some(origin(1))), Ok(()));
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let good = written(AT, origin(5));
        for byte in 0..good.len() {
            for flip in [0x01, 0x80] {
                let mut data = good.clone();
                data[byte] ^= flip;
                let error = check(&data, LBA, AT, None).expect_err("a flipped bit");
                let in_magic = byte % LBA < WORD;
                assert_eq!(
                    in_magic,
                    error.kind == MismatchKind::Unwritten,
                    "byte {byte}"
                );
                assert_eq!(error.offset, AT + (byte / LBA * LBA) as u64, "byte {byte}");
            }
        }
    }

    #[test]
    fn misplaced_data_is_noticed() {
        let data = written(AT + 8 * LBA as u64, origin(5));
        let belongs = AT + 8 * LBA as u64;
        assert_eq!(kind(&data), Some((AT, MismatchKind::Misplaced { belongs })));

        let mut swapped = written(AT, origin(5));
        let (left, right) = swapped.split_at_mut(3 * LBA);
        left[..LBA].swap_with_slice(&mut right[..LBA]);
        let belongs = AT + 3 * LBA as u64;
        assert_eq!(
            kind(&swapped),
            Some((AT, MismatchKind::Misplaced { belongs }))
        );
    }

    #[test]
    fn stale_data_is_noticed() {
        let expected = origin(5);
        let found = origin(4);
        let stale = Some((AT, MismatchKind::Stale { found, expected }));
        assert_eq!(kind(&written(AT, found)), stale);

        let found = Origin {
            run: 0x1235,
            sequence: 5,
        };
        let stale = Some((AT, MismatchKind::Stale { found, expected }));
        assert_eq!(kind(&written(AT, found)), stale);
    }

    #[test]
    fn torn_data_is_noticed() {
        let mut data = written(AT, origin(5));
        let old = written(AT, origin(4));
        data[6 * LBA..].copy_from_slice(&old[6 * LBA..]);
        let torn = MismatchKind::Torn {
            found: origin(4),
            first: origin(5),
        };
        assert_eq!(kind(&data), Some((AT + 6 * LBA as u64, torn)));
        // Also when nobody knows which write it should be.
        assert!(check(&data, LBA, AT, None).is_err());
    }

    #[test]
    fn foreign_data_is_noticed() {
        assert_eq!(kind(&[0; 8 * LBA]), Some((AT, MismatchKind::Unwritten)));
        // A block of which the second half never arrived.
        let mut data = written(AT, origin(5));
        data[LBA / 2..LBA].fill(0);
        assert_eq!(
            kind(&data),
            Some((AT, MismatchKind::Corrupt { byte: LBA / 2 }))
        );
    }
}
