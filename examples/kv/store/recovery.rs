//! Makes a store, or finds what one holds. The module `store` says why that is right.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use nvme_async::Namespace;

use super::format::{
    BLOCK, DATA_START, OF_CHECKPOINT, Place, Position, Record, Root, Seed, batch_header, records,
    segment_epoch,
};
use super::index::{Entry, SHARDS};
use super::log::{Segment, State, Use};
use super::{Error, MAX_KEY, MAX_VALUE, Options};

/// Bytes that are read at a time.
const WINDOW: usize = 1 << 20;
/// Headers that are read at a time.
const READS: usize = 32;
/// Fewer segments leave too little beside what is kept free.
const LEAST_SEGMENTS: u64 = 24;
/// No log has as many batches on their way: a gap that is followed by more is damage.
const MOST_IN_FLIGHT: u64 = 1024;

/// The size of the segments of a store on a device with `capacity` bytes: at least 24 of them, if
/// possible large enough for the longest record.
fn segment_size(capacity: u64) -> u64 {
    let longest = (MAX_VALUE + MAX_KEY + 2 * BLOCK) as u64;
    let size = (capacity / 64).max(longest).min(capacity / 32);
    (size / DATA_START * DATA_START).clamp(2 * DATA_START, 64 << 20)
}

/// Opens or makes a store.
pub(super) async fn open(namespace: &Namespace, options: &Options) -> Result<State, Error> {
    let capacity = namespace.capacity();
    let least = DATA_START + LEAST_SEGMENTS * segment_size(0);
    if capacity < least {
        return Err(Error::TooSmall(capacity, least));
    }
    if namespace.block_size() as usize > BLOCK {
        return Err(Error::Blocks(namespace.block_size()));
    }
    let roots = namespace.read(0, 2 * BLOCK).await?;
    let found = roots.chunks(BLOCK).filter_map(Root::decode);
    let root = match found.max_by_key(|root| root.generation) {
        Some(root) if !options.format => root,
        None if !options.format && !is_blank(namespace, capacity).await? => {
            return Err(Error::Foreign);
        }
        _ => format(namespace, capacity).await?,
    };
    let end = Place {
        segment: root.segments,
        offset: 0,
    };
    let end = end.in_namespace(root.segment_size);
    if end > capacity || u64::from(root.segment_size) < segment_size(0) {
        return Err(Error::Damaged(format!(
            "the store has {end} bytes and the device {capacity}"
        )));
    }
    recover(namespace, root, (options.clock)()).await
}

/// Whether nothing is there: file systems, partition tables and their like lie at the beginning or
/// the end.
async fn is_blank(namespace: &Namespace, capacity: u64) -> Result<bool, Error> {
    let len = WINDOW.min(capacity as usize);
    for offset in [0, capacity - len as u64] {
        let bytes = namespace.read(offset, len).await?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn format(namespace: &Namespace, capacity: u64) -> Result<Root, Error> {
    let size = segment_size(capacity);
    let root = Root {
        store: fastrand::u64(1..),
        generation: 0,
        segment_size: size as u32,
        segments: ((capacity - DATA_START) / size) as u32,
        next_epoch: 1,
        position: Position {
            epoch: 1,
            offset: BLOCK as u32,
            sequence: 1,
        },
        ..Root::default()
    };
    // The other root first, so that no older one is left when this one is there.
    for (block, bytes) in [(1, vec![0; BLOCK]), (0, root.encode())] {
        let write = namespace.write(block * BLOCK as u64, bytes);
        write.await.map_err(nvme_async::Error::from)?;
        namespace.flush().await?;
    }
    tracing::info!(segments = root.segments, segment_size = size, "formatted");
    Ok(root)
}

async fn recover(namespace: &Namespace, root: Root, now: u64) -> Result<State, Error> {
    let start = Instant::now();
    let headers = stream::iter(0..root.segments).map(|segment| {
        let start = Place { segment, offset: 0 }.in_namespace(root.segment_size);
        async move { namespace.read(start, BLOCK).await }
    });
    let headers: Vec<Bytes> = headers.buffered(READS).try_collect().await?;
    let segments = headers.iter().map(|header| {
        let epoch = segment_epoch(root.store, header);
        Segment {
            used_for: epoch.map_or(Use::Cold, |_| Use::Warm),
            epoch: epoch.unwrap_or_default(),
            ..Segment::default()
        }
    });
    let mut state = State::new(root.clone(), segments.collect());
    let epochs = state.segments.iter().map(|segment| segment.epoch + 1);
    state.root.next_epoch = epochs.fold(root.next_epoch, u64::max);

    let mut recovery = Recovery {
        namespace,
        state,
        bytes: 0,
        said: start,
    };
    recovery.load_checkpoint().await?;
    recovery.replay().await?;
    let state = &mut recovery.state;
    for shard in 0..SHARDS {
        state.forget_expired(shard, now);
    }
    // What was found is to stay, also where only a cache has it.
    namespace.flush().await?;

    for segment in &mut state.segments {
        if segment.live > 0 && matches!(segment.used_for, Use::Cold | Use::Warm) {
            segment.used_for = Use::Log;
        }
    }
    tracing::info!(keys = state.index.len(), bytes = recovery.bytes, time = ?start.elapsed(), "recovered");
    Ok(recovery.state)
}

struct Recovery<'a> {
    namespace: &'a Namespace,
    state: State,
    /// That were read.
    bytes: usize,
    /// When it was said how far it is.
    said: Instant,
}

impl Recovery<'_> {
    async fn load_checkpoint(&mut self) -> Result<(), Error> {
        let mut next = OF_CHECKPOINT;
        for (segment, epoch) in self.state.root.checkpoint.clone() {
            let known = self.state.segments.get_mut(segment as usize);
            let Some(known) = known.filter(|known| known.epoch == epoch) else {
                break;
            };
            known.used_for = Use::Checkpoint;
            let load = State::load;
            self.read(Place::first(segment), &mut next, load).await?;
        }
        let (chunks, expected) = (next & !OF_CHECKPOINT, self.state.root.chunks);
        if chunks != expected {
            return Err(Error::Damaged(format!(
                "of the checkpoint's {expected} batches only {chunks} can be read"
            )));
        }
        Ok(())
    }

    async fn replay(&mut self) -> Result<(), Error> {
        let Position { epoch, offset, .. } = self.state.root.position;
        let numbered = (0..).zip(&self.state.segments);
        let mut log: Vec<(u64, u32)> = numbered
            .filter(|(_, segment)| segment.used_for == Use::Warm && segment.epoch >= epoch)
            .map(|(number, segment)| (segment.epoch, number))
            .collect();
        log.sort_unstable();
        for (of, segment) in log {
            let mut start = Place::first(segment);
            if of == epoch {
                start.offset = offset;
            }
            let expected = self.state.next_sequence;
            let apply =
                |state: &mut State, record: &Record<&[u8]>, place| state.apply(record, place);
            let mut next = expected;
            let other = self.read(start, &mut next, apply).await?;
            self.state.next_sequence = next;
            if next > expected {
                self.state.segment(segment).used_for = Use::Log;
            } else if let Some(found) = other
                && found & OF_CHECKPOINT == 0
                && found > expected + MOST_IN_FLIGHT
            {
                return Err(Error::Damaged(format!(
                    "the log has batch {found} and lacks {expected}"
                )));
            }
        }
        Ok(())
    }

    /// Reads the batches of a segment from there on whose numbers follow each other, and does something with
    /// their records. Returns the number of the first other one.
    async fn read(
        &mut self,
        start: Place,
        next: &mut u64,
        apply: fn(&mut State, &Record<&[u8]>, Place),
    ) -> Result<Option<u64>, Error> {
        let mut scanner = Scanner::new(self.namespace, &self.state, start);
        while let Some(batch) = scanner.next().await? {
            if batch.sequence != *next {
                return Ok(Some(batch.sequence));
            }
            *next += 1;
            for (place, record) in batch.records() {
                apply(&mut self.state, &record, place);
            }
            self.bytes += batch.bytes.len();
            if self.said.elapsed() > Duration::from_secs(2) {
                self.said = Instant::now();
                let keys = self.state.index.len();
                tracing::info!(mib = self.bytes >> 20, keys, "recovering");
            }
        }
        Ok(None)
    }
}

impl State {
    /// What a record of a checkpoint says.
    fn load(&mut self, record: &Record<&[u8]>, _place: Place) {
        if let Some(entry) = Entry::decode(record.value, record.expires)
            && self.is_before_position(entry.place.segment)
        {
            self.place(record.key, Some(entry));
        }
    }

    /// Whether the checkpoint's position is in a segment, or after it. What the checkpoint has in another
    /// one has a record in the log as well, or had expired and was forgotten.
    fn is_before_position(&self, segment: u32) -> bool {
        let segment = self.segments.get(segment as usize);
        segment.is_some_and(|segment| (1..=self.root.position.epoch).contains(&segment.epoch))
    }
}

/// Reads the batches of a segment, one after the other.
pub(super) struct Scanner<'a> {
    namespace: &'a Namespace,
    segment_size: u32,
    seed: Seed,
    /// Of the next batch.
    place: Place,
    window: Bytes,
    /// Where in the segment it was read.
    window_offset: usize,
}

/// A whole batch.
pub(super) struct Batch {
    sequence: u64,
    place: Place,
    /// Without padding.
    pub(super) bytes: Bytes,
}

impl Batch {
    /// With where they are.
    pub(super) fn records(&self) -> impl Iterator<Item = (Place, Record<&[u8]>)> {
        records(&self.bytes).map(|(offset, record)| (self.place.after(offset), record))
    }
}

impl<'a> Scanner<'a> {
    pub(super) fn new(namespace: &'a Namespace, state: &State, place: Place) -> Self {
        Self {
            namespace,
            segment_size: state.root.segment_size,
            seed: state.seed(place.segment),
            place,
            window: Bytes::new(),
            window_offset: 0,
        }
    }

    /// The next batch; nothing if there is no whole one.
    pub(super) async fn next(&mut self) -> Result<Option<Batch>, Error> {
        let place = self.place;
        let left = self.segment_size.saturating_sub(place.offset) as usize;
        if left < BLOCK {
            return Ok(None);
        }
        let block = self.read(BLOCK).await?;
        let header = batch_header(&block).filter(|(_, len)| *len <= left);
        let Some((sequence, len)) = header else {
            return Ok(None);
        };
        let bytes = self.read(len).await?;
        if !self.seed.verifies(&bytes) {
            return Ok(None);
        }
        self.place = place.after(len.next_multiple_of(BLOCK));
        Ok(Some(Batch {
            sequence,
            place,
            bytes,
        }))
    }

    /// So many bytes at the place of the next batch.
    async fn read(&mut self, len: usize) -> Result<Bytes, Error> {
        let at = self.place.offset as usize;
        let window = self.window_offset..self.window_offset + self.window.len();
        if at < window.start || at + len > window.end {
            let left = self.segment_size as usize - at;
            let read = len.next_multiple_of(BLOCK).max(WINDOW).min(left);
            let start = self.place.in_namespace(self.segment_size);
            self.window = self.namespace.read(start, read).await?;
            self.window_offset = at;
        }
        let start = at - self.window_offset;
        Ok(self.window.slice(start..start + len))
    }
}
