//! Checkpoints: the index, as it is written.

use super::format::{
    BATCH_HEADER, BLOCK, Kind, MAX_CHECKPOINT_SEGMENTS, OF_CHECKPOINT, Place, Record, Seed,
    records, seal_batch,
};
use super::index::SHARDS;
use super::log::{State, Use};
use super::maintenance::PIECE;
use super::{Error, Inner};

/// Writes the index, then a root that makes it count.
pub(super) async fn write(inner: &Inner) -> Result<(), Error> {
    let (position, written) = {
        let state = inner.lock();
        state.check_failed()?;
        (state.position(), state.written)
    };
    let mut writer = Writer {
        inner,
        segments: Vec::new(),
        offset: inner.segment_size,
        open: vec![0; BATCH_HEADER],
        count: 0,
    };
    for shard in 0..SHARDS {
        let entries = inner.lock().entries(shard);
        for (start, record) in records(&entries) {
            writer.add(&entries[start..start + record.len()]).await?;
        }
    }
    writer.end().await?;
    let commit = inner.lock().commit();
    commit.durable().await?;

    let mut root = inner.lock().root.clone();
    root.generation += 1;
    root.position = position;
    root.chunks = writer.count;
    let old = std::mem::replace(&mut root.checkpoint, writer.segments);
    let block = root.generation % 2 * BLOCK as u64;
    inner.write_durably(block, root.encode().into()).await?;

    let mut state = inner.lock();
    // Epochs were given out meanwhile.
    root.next_epoch = state.root.next_epoch;
    state.root = root;
    state.checkpointed = written;
    for (segment, _) in old {
        state.segment(segment).used_for = Use::Draining;
    }
    state.statistics.checkpoints += 1;
    Ok(())
}

impl State {
    /// Records of a shard's entries, after a batch's header.
    fn entries(&self, shard: usize) -> Vec<u8> {
        let mut entries = vec![0; BATCH_HEADER];
        for (key, entry) in self.index.entries(shard) {
            let record = Record {
                kind: Kind::Entry,
                expires: entry.expires,
                key,
                value: &entry.encode(),
            };
            // The checksum of the batch is enough.
            record.encode(Seed::default(), &mut entries);
        }
        entries
    }

    /// A segment for a checkpoint, a ready one if it has to be.
    fn take_for_checkpoint(&mut self) -> Option<(u32, u64)> {
        let free = self.take_free(Use::Checkpoint);
        let segment = free.map(|(segment, _)| segment);
        let segment = segment.or_else(|| self.ready.pop_back())?;
        self.segment(segment).used_for = Use::Checkpoint;
        Some((segment, self.segment(segment).epoch))
    }
}

/// Writes the batches of a checkpoint.
struct Writer<'a> {
    inner: &'a Inner,
    segments: Vec<(u32, u64)>,
    /// In the last segment.
    offset: u32,
    open: Vec<u8>,
    count: u64,
}

impl Writer<'_> {
    async fn add(&mut self, record: &[u8]) -> Result<(), Error> {
        if !self.fits(record) || self.open.len() + record.len() > PIECE {
            self.end().await?;
        }
        if !self.fits(record) {
            let segment = self.inner.lock().take_for_checkpoint();
            let segment = segment.filter(|_| self.segments.len() < MAX_CHECKPOINT_SEGMENTS);
            let no_room = || Error::Damaged("there is no segment for a checkpoint".to_owned());
            let (number, epoch) = segment.ok_or_else(no_room)?;
            self.segments.push((number, epoch));
            self.offset = BLOCK as u32;
            self.inner.write_header(number).await?;
        }
        self.open.extend_from_slice(record);
        Ok(())
    }

    /// Whether the segment has room for it beside what there is.
    fn fits(&self, record: &[u8]) -> bool {
        self.open.len() + record.len() <= (self.inner.segment_size - self.offset) as usize
    }

    /// Writes the records that there are.
    async fn end(&mut self) -> Result<(), Error> {
        let Some(&(segment, _)) = self.segments.last() else {
            return Ok(());
        };
        if self.open.len() == BATCH_HEADER {
            return Ok(());
        }
        let mut batch = std::mem::replace(&mut self.open, vec![0; BATCH_HEADER]);
        let seed = self.inner.lock().seed(segment);
        seal_batch(&mut batch, seed, OF_CHECKPOINT | self.count);
        let offset = self.offset;
        self.offset += batch.len() as u32;
        self.count += 1;
        let at = self.inner.offset(Place { segment, offset });
        self.inner.write_durably(at, batch.into()).await
    }
}
