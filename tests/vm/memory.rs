//! Reads and writes of memory of all kinds, most of it misaligned.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use nvme_async::{DmaBuf, Namespace, Registered};

/// Which memory the device finds the data in, or some copy of it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Of the driver's pool.
    Pool,
    /// Of the heap, at an odd address.
    Odd,
    /// Of the driver's pool, in pieces whose lengths are odd.
    Pieces,
    /// Mapped beforehand, at a multiple of 4 in the middle of a page.
    Registered,
    /// Mapped beforehand, at an odd address.
    OddRegistered,
}

pub(crate) const KINDS: [Kind; 5] = [
    Kind::Pool,
    Kind::Odd,
    Kind::Pieces,
    Kind::Registered,
    Kind::OddRegistered,
];

/// Where registered memory is used.
const IN_A_PAGE: usize = 4096 - 44;
const ODD: usize = 1233;

pub(crate) async fn write(namespace: &Namespace, kind: Kind, offset: u64, data: &[u8]) {
    let written = match kind {
        Kind::Pool => {
            let buffer = pool(namespace, data);
            namespace
                .write(offset, buffer)
                .await
                .map(drop)
                .map_err(|error| error.error)
        }
        Kind::Odd => {
            let mut padded = vec![0xee; data.len() + 2];
            let start = 1 + padded.as_ptr().addr() % 2;
            padded[start..start + data.len()].copy_from_slice(data);
            let bytes = Bytes::from(padded).slice(start..start + data.len());
            namespace
                .write(offset, bytes)
                .await
                .map(drop)
                .map_err(|error| error.error)
        }
        Kind::Pieces => {
            let pieces = lengths(data.len()).scan(0, |start, len| {
                *start += len;
                Some(pool(namespace, &data[*start - len..*start]))
            });
            let pieces: Vec<DmaBuf> = pieces.collect();
            namespace
                .write(offset, pieces)
                .await
                .map(drop)
                .map_err(|error| error.error)
        }
        Kind::Registered | Kind::OddRegistered => {
            let start = start(kind);
            let memory = Arc::new(Foreign::new(start, data));
            let registration = namespace
                .controller()
                .register(memory)
                .await
                .expect("registers");
            let slice = registration
                .slice(start, data.len())
                .expect("it is as long");
            namespace
                .write(offset, slice)
                .await
                .map(drop)
                .map_err(|error| error.error)
        }
    };
    let len = data.len();
    written.unwrap_or_else(|error| panic!("write of {len} bytes at {offset}, {kind:?}: {error}"));
}

pub(crate) async fn read(namespace: &Namespace, kind: Kind, offset: u64, len: usize) -> Vec<u8> {
    let read = match kind {
        Kind::Pool => {
            let buffer = pool(namespace, &vec![0xee; len]);
            let read = namespace.read_into(offset, buffer).await;
            read.map(|buffer| buffer.to_vec())
                .map_err(|error| error.error)
        }
        Kind::Odd => namespace
            .read(offset, len)
            .await
            .map(|bytes| bytes.to_vec()),
        Kind::Pieces => {
            let pieces: Vec<DmaBuf> = lengths(len)
                .map(|len| pool(namespace, &vec![0xee; len]))
                .collect();
            let read = namespace.read_into(offset, pieces).await;
            read.map(|pieces| pieces.iter().flat_map(|piece| piece.to_vec()).collect())
                .map_err(|error| error.error)
        }
        Kind::Registered | Kind::OddRegistered => {
            let start = start(kind);
            let memory = Arc::new(Foreign::new(start, &vec![0xdd; len]));
            let registration = namespace
                .controller()
                .register(memory.clone())
                .await
                .expect("registers");
            let slice = registration.slice(start, len).expect("it is as long");
            let read = namespace.read_into(offset, slice).await;
            read.map(|_| memory.inside_of_margins(start, len))
                .map_err(|error| error.error)
        }
    };
    read.unwrap_or_else(|error| panic!("read of {len} bytes at {offset}, {kind:?}: {error}"))
}

/// Compares, and says where the difference begins.
pub(crate) fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    if found != expected {
        let differs = |at: &usize| found[*at] != expected[*at];
        let (first, count) = (
            (0..found.len()).find(differs),
            (0..found.len()).filter(differs).count(),
        );
        panic!(
            "{what}: {count} of {} bytes differ, the first at {first:?}",
            found.len()
        );
    }
}

fn pool(namespace: &Namespace, data: &[u8]) -> DmaBuf {
    let mut buffer = namespace.allocate(data.len()).expect("the pool has room");
    buffer.copy_from_slice(data);
    buffer
}

/// Cuts `len` bytes in three, at odd places where they are long enough.
fn lengths(len: usize) -> impl Iterator<Item = usize> {
    let first = (len / 3) | 1;
    let second = first | 2;
    [first, second, len - first - second].into_iter()
}

fn start(kind: Kind) -> usize {
    match kind {
        Kind::OddRegistered => ODD,
        _ => IN_A_PAGE,
    }
}

/// Memory that the driver knows nothing of until it is registered.
struct Foreign {
    words: Box<[AtomicU64]>,
}

/// What surrounds the data.
const MARGIN: u8 = 0xee;

impl Foreign {
    /// Memory with `data` at `start`, and a margin on both sides.
    fn new(start: usize, data: &[u8]) -> Self {
        let mut bytes = vec![MARGIN; start];
        bytes.extend_from_slice(data);
        bytes.resize((bytes.len() + 1).next_multiple_of(8), MARGIN);
        let words = bytes
            .chunks_exact(8)
            .map(|word| AtomicU64::new(u64::from_ne_bytes(word.try_into().expect("eight bytes"))));
        Self {
            words: words.collect(),
        }
    }

    /// The `len` bytes at `start`; all others must be as they were.
    fn inside_of_margins(&self, start: usize, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = Vec::with_capacity(8 * self.words.len());
        for word in &self.words {
            bytes.extend_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
        }
        let margins = bytes[..start].iter().chain(&bytes[start + len..]);
        assert!(
            margins.copied().all(|byte| byte == MARGIN),
            "a read of {len} bytes changed memory beside its buffer"
        );
        bytes[start..start + len].to_vec()
    }
}

// SAFETY: the boxed words stay where they are while the value lives; they are only loaded, as
// atomics, so that no reference to plain memory exists.
unsafe impl Registered for Foreign {
    fn addr(&self) -> NonNull<u8> {
        // The interior of an atomic may be written through a shared reference.
        NonNull::from(&*self.words).cast()
    }

    fn len(&self) -> usize {
        8 * self.words.len()
    }
}
