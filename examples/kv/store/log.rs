//! The log: where records go, what of them is durable, and how much room there is.

use std::collections::VecDeque;
use std::mem::take;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesOrdered;
use tokio::sync::{oneshot, watch};

use super::format::{BATCH_HEADER, BLOCK, Kind, Place, Position, Record, Root, Seed, seal_batch};
use super::index::{Entry, Extent, Index};
use super::{Durability, Error, Inner, Statistics};

/// Most bytes that wait to become durable.
const MAX_PENDING: usize = 64 << 20;
/// Records are added to a batch up to this size.
const MAX_BATCH: usize = 1 << 20;
/// Most batches on their way.
const MAX_FLYING: usize = 8;

/// What a segment is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Use {
    /// Nothing; it may have been discarded.
    #[default]
    Cold,
    /// Nothing; it was written once, so that overwriting it is one write.
    Warm,
    /// Its header is written, and the log goes on in it soon.
    Ready,
    Log,
    Checkpoint,
    /// It holds nothing, and is free once nobody reads it.
    Draining,
    /// It can't be read; nothing happens to it any more.
    Damaged,
}

#[derive(Default)]
pub(crate) struct Segment {
    pub(super) used_for: Use,
    pub(super) epoch: u64,
    /// Bytes of records that the index refers to.
    pub(super) live: u64,
    /// Readers have clones.
    pub(super) pin: Arc<()>,
}

/// Consecutive records that go to the device in one write.
struct Batch {
    place: Place,
    bytes: Bytes,
    records: u64,
    is_durable: watch::Sender<bool>,
}

/// Resolves when something, and all before it, is durable.
#[derive(Clone, Default)]
#[must_use = "nothing is durable before it has resolved"]
pub(crate) struct Commit(Option<watch::Receiver<bool>>);

impl Commit {
    /// # Errors
    ///
    /// [`Error::Failed`] if it may not be.
    pub(crate) async fn durable(self) -> Result<(), Error> {
        let Some(mut progress) = self.0 else {
            return Ok(());
        };
        let reached = progress.wait_for(|is_durable| *is_durable).await;
        let failed = |_| Error::Failed("the write of a batch failed".to_owned());
        reached.map(|_| ()).map_err(failed)
    }

    /// The same as long as it is outstanding.
    pub(super) fn outstanding(&mut self) -> Self {
        self.0.take_if(|progress| *progress.borrow());
        self.clone()
    }
}

/// Everything that changes, behind one lock that is never held during I/O.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) index: Index,
    pub(crate) segments: Vec<Segment>,
    /// What the records cost that the index refers to.
    pub(crate) used: u64,
    /// In the order of their epochs.
    pub(super) ready: VecDeque<u32>,
    /// The valid root. The log before its position is not replayed.
    pub(crate) root: Root,
    pub(crate) statistics: Statistics,
    pub(super) failed: Option<String>,
    pub(super) is_closing: bool,
    /// Who waits for the last checkpoint.
    pub(super) closer: Option<oneshot::Sender<Result<(), Error>>>,
    /// Bytes of batches since the log was opened.
    pub(crate) written: u64,
    /// What `written` was at the last checkpoint.
    pub(super) checkpointed: u64,
    /// The shard of the index that is searched next for what has expired.
    pub(super) swept: usize,
    pub(super) next_sequence: u64,
    /// Where the open batch starts; nothing before there is a segment for it.
    head: Option<Place>,
    /// The batch that takes records; empty if it has none.
    open: Vec<u8>,
    open_records: u64,
    open_is_durable: watch::Sender<bool>,
    /// Complete, and not durable yet.
    batches: VecDeque<Batch>,
    /// The first so many of them are on their way.
    flying: usize,
    /// When all is durable that was appended so far.
    all: Commit,
    /// When that is durable because of which keys may be absent.
    pub(super) absences: Commit,
    /// When that is durable because of which keys, whose records are, may not have expired.
    pub(super) presences: Commit,
}

impl State {
    pub(super) fn new(root: Root, segments: Vec<Segment>) -> Self {
        Self {
            next_sequence: root.position.sequence,
            root,
            segments,
            ..Self::default()
        }
    }

    pub(super) fn segment(&mut self, number: u32) -> &mut Segment {
        &mut self.segments[number as usize]
    }

    pub(super) fn seed(&self, segment: u32) -> Seed {
        Seed::new(self.root.store, self.segments[segment as usize].epoch)
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        match self.is_closing {
            true => Err(Error::Closed),
            false => self.check_failed(),
        }
    }

    pub(super) fn check_failed(&self) -> Result<(), Error> {
        let failed = self.failed.clone().map(Error::Failed);
        failed.map_or(Ok(()), Err)
    }

    /// Where the next record that is appended comes, or one before it.
    pub(super) fn position(&self) -> Position {
        let current = self.head.map(|head| &self.segments[head.segment as usize]);
        // The first that will be ready; it may be written just now.
        let is_ready = |segment: &&Segment| segment.used_for == Use::Ready;
        let ready = self.segments.iter().filter(is_ready);
        let segment = current.or_else(|| ready.min_by_key(|segment| segment.epoch));
        Position {
            epoch: segment.map_or(self.root.next_epoch, |segment| segment.epoch),
            offset: self.head.map_or(BLOCK as u32, |head| head.offset),
            sequence: self.next_sequence,
        }
    }

    /// Segments that a checkpoint needs.
    pub(crate) fn checkpoint_need(&self) -> usize {
        self.need(&self.index.extent)
    }

    pub(super) fn need(&self, checkpoint: &Extent) -> usize {
        checkpoint.segments(self.root.segment_size as usize - BLOCK - BATCH_HEADER)
    }

    /// Segments that nothing is in. A checkpoint takes ready ones if it has to.
    pub(super) fn unused(&self) -> usize {
        self.ready.len() + self.free()
    }

    /// Those that the log may still take.
    pub(crate) fn available(&self) -> usize {
        self.unused().saturating_sub(self.checkpoint_need())
    }

    pub(super) fn free(&self) -> usize {
        self.count(&[Use::Cold, Use::Warm])
    }

    pub(super) fn count(&self, uses: &[Use]) -> usize {
        let is_used = |segment: &&Segment| uses.contains(&segment.used_for);
        self.segments.iter().filter(is_used).count()
    }

    /// What a record costs of the space: a large one twice its bytes, since as many may stay unused
    /// before it, at the end of a segment into which it does not go.
    pub(super) fn cost(&self, len: usize) -> u64 {
        let is_large = len > self.root.segment_size as usize / 8;
        len as u64 * if is_large { 2 } else { 1 }
    }

    /// What the records may cost that the index refers to: the rest is what compaction, which copies
    /// before it frees, needs to get on, and two checkpoints.
    pub(crate) fn limit(&self, need: usize) -> u64 {
        let kept = 2 * need + 6;
        let segments = self.segments.len().saturating_sub(kept) as u64;
        segments * u64::from(self.root.segment_size) / 10 * 8
    }

    /// Makes room for `len` bytes of records in one batch, and leaves so many segments unused. Nothing, if there
    /// is none at present; there will be.
    pub(super) fn reserve(&mut self, len: usize, kept: usize) -> Option<()> {
        let spare = self.unused().checked_sub(kept)?;
        if self.pending_bytes() > MAX_PENDING {
            return None;
        }
        let is_too_long = self.open.len() + len > MAX_BATCH.max(BATCH_HEADER + len);
        if is_too_long || !self.fits(len) {
            self.seal();
        }
        if !self.fits(len) {
            let segment = (spare > 0).then(|| self.ready.pop_front())??;
            self.segment(segment).used_for = Use::Log;
            self.head = Some(Place::first(segment));
        }
        Some(())
    }

    /// Whether so much more goes into the open batch where it is.
    fn fits(&self, len: usize) -> bool {
        let batch = (self.open.len().max(BATCH_HEADER) + len).next_multiple_of(BLOCK);
        let end = self.head.map(|head| head.offset as usize + batch);
        end.is_some_and(|end| end <= self.root.segment_size as usize)
    }

    /// Appends a record, for which room was made, and lets the index follow.
    pub(super) fn append(&mut self, record: &Record<impl AsRef<[u8]>>) {
        let head = self.head.expect("room was made");
        if self.open.is_empty() {
            self.open.resize(BATCH_HEADER, 0);
            self.all = Commit(Some(self.open_is_durable.subscribe()));
        }
        if record.kind != Kind::Set || record.expires != 0 {
            self.absences = self.all.clone();
        }
        if record.kind == Kind::Expire {
            self.presences = self.all.clone();
        }
        let place = head.after(self.open.len());
        self.open_records += 1;
        record.encode(self.seed(head.segment), &mut self.open);
        self.apply(record, place);
    }

    /// What a record of the log does to the index.
    pub(super) fn apply(&mut self, record: &Record<impl AsRef<[u8]>>, place: Place) {
        let (key, value) = (record.key.as_ref(), record.value.as_ref());
        match record.kind {
            Kind::Set => {
                let entry = Entry {
                    place,
                    value_len: value.len() as u32,
                    expires: record.expires,
                };
                self.place(key, Some(entry));
            }
            Kind::Delete => self.place(key, None),
            Kind::Expire => {
                if let Some(entry) = self.index.get(key).copied() {
                    let expires = record.expires;
                    self.index.replace(key, Some(Entry { expires, ..entry }));
                }
            }
            Kind::Clear => {
                self.index = Index::default();
                self.used = 0;
                for segment in &mut self.segments {
                    segment.live = 0;
                }
            }
            // The log has none.
            Kind::Entry => {}
        }
    }

    /// Lets a key have another entry in the index, or none.
    pub(super) fn place(&mut self, key: &[u8], entry: Option<Entry>) {
        if let Some(entry) = entry {
            let len = entry.record_len(key);
            self.used += self.cost(len);
            self.segment(entry.place.segment).live += len as u64;
        }
        if let Some(old) = self.index.replace(key, entry) {
            let len = old.record_len(key);
            self.used -= self.cost(len);
            self.segment(old.place.segment).live -= len as u64;
        }
    }

    /// Ends the open batch.
    fn seal(&mut self) {
        let Some(place) = self.head.filter(|_| !self.open.is_empty()) else {
            return;
        };
        let mut bytes = take(&mut self.open);
        seal_batch(&mut bytes, self.seed(place.segment), self.next_sequence);
        self.next_sequence += 1;
        self.written += bytes.len() as u64;
        self.head = Some(place.after(bytes.len()));
        self.batches.push_back(Batch {
            place,
            bytes: bytes.into(),
            records: take(&mut self.open_records),
            is_durable: take(&mut self.open_is_durable),
        });
    }

    /// The next batch to write. While one is on its way, others follow it only when they are large.
    fn next_to_write(&mut self, least: usize) -> Option<(Place, Bytes)> {
        if self.flying >= MAX_FLYING {
            return None;
        }
        let is_due = self.flying == 0 || self.open.len() >= least;
        if self.flying == self.batches.len() && is_due {
            self.seal();
        }
        let batch = self.batches.get(self.flying)?;
        self.flying += 1;
        Some((batch.place, batch.bytes.clone()))
    }

    /// The first batch on its way was written, or was not.
    fn landed(&mut self, written: Result<Duration, Error>) {
        self.flying -= 1;
        match written {
            Err(error) => {
                self.fail(&error);
                // None of those after it counts.
                self.batches.clear();
            }
            Ok(time) => self.statistics.writes.record(time.as_micros() as u64, 1),
        }
        // There is none any more if one before it failed.
        if let Some(batch) = self.batches.pop_front() {
            self.statistics.batches.record(batch.records, 1);
            batch.is_durable.send_replace(true);
        }
    }

    /// Bytes that are not durable.
    pub(crate) fn pending_bytes(&self) -> usize {
        let batches = self.batches.iter().map(|batch| batch.bytes.len());
        self.open.len() + batches.sum::<usize>()
    }

    /// When everything is durable that was appended so far.
    pub(super) fn commit(&mut self) -> Commit {
        self.all.outstanding()
    }

    /// The record of an entry while it is not durable, and when it is.
    pub(super) fn pending(&self, entry: &Entry, len: usize) -> Option<(Bytes, Commit)> {
        let at = |start: Place, bytes: usize| {
            let offset = entry.place.offset.checked_sub(start.offset)? as usize;
            (start.segment == entry.place.segment && offset < bytes).then_some(offset..offset + len)
        };
        if let Some(range) = self.head.and_then(|head| at(head, self.open.len())) {
            let bytes = Bytes::copy_from_slice(&self.open[range]);
            return Some((bytes, self.all.clone()));
        }
        self.batches.iter().find_map(|batch| {
            let range = at(batch.place, batch.bytes.len())?;
            let commit = Commit(Some(batch.is_durable.subscribe()));
            Some((batch.bytes.slice(range), commit))
        })
    }

    /// Nothing is written any more, since the log has a gap or may have one.
    pub(super) fn fail(&mut self, error: &Error) {
        tracing::error!(reason = %error, "the store has failed");
        self.failed.get_or_insert_with(|| error.to_string());
        // Who waits for what is not on its way, or for the last checkpoint, waits no longer.
        self.batches.truncate(self.flying);
        self.open.clear();
        self.open_is_durable = watch::Sender::default();
        self.closer = None;
    }
}

/// Writes batches, several at a time, and says in their order that they are durable.
pub(super) async fn write(inner: Arc<Inner>) {
    let mut flying = FuturesOrdered::new();
    loop {
        while let Some(batch) = inner.lock().next_to_write(inner.options.batch_bytes) {
            flying.push_back(write_batch(&inner, batch));
        }
        tokio::select! {
            () = inner.appended.notified() => {}
            Some(written) = flying.next() => {
                inner.lock().landed(written);
                inner.room.notify_waiters();
            }
        }
    }
}

async fn write_batch(inner: &Inner, (place, bytes): (Place, Bytes)) -> Result<Duration, Error> {
    let start = Instant::now();
    inner.write_durably(inner.offset(place), bytes).await?;
    Ok(start.elapsed())
}

impl Inner {
    /// Writes so that a loss of power does not matter any more.
    pub(super) async fn write_durably(&self, offset: u64, bytes: Bytes) -> Result<(), Error> {
        let flushes = self.options.durability == Durability::Flush;
        let write = self.namespace.write(offset, bytes);
        // With FUA it is a plain write where there is no volatile cache.
        let written = if flushes {
            write.await
        } else {
            write.fua().await
        };
        written.map_err(nvme_async::Error::from)?;
        if flushes {
            self.namespace.flush().await?;
        }
        Ok(())
    }
}
