//! The log: where records go, what of them is durable, and how much room there is.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesOrdered;
use tokio::sync::watch;

use super::format::{BATCH_HEADER, BLOCK, Kind, Position, Record, Root, Seed, seal_batch};
use super::index::{Entry, Extent, Index};
use super::{Durability, Error, Inner};

/// Most bytes that wait to become durable.
const MAX_PENDING: usize = 64 << 20;
/// Records are added to a batch up to this size.
const MAX_BATCH: usize = 1 << 20;

/// What a segment is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Nothing; it may have been discarded.
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

#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) used_for: Use,
    pub(super) epoch: u64,
    /// Bytes of records that the index refers to.
    pub(super) live: u64,
    /// Readers have clones.
    pub(super) pin: Arc<()>,
}

/// Consecutive records that go to the device in one write.
pub(super) struct Batch {
    pub(super) segment: u32,
    /// In the segment.
    pub(super) offset: u32,
    pub(super) bytes: Bytes,
    records: u32,
    /// Whether keys may be absent because of it.
    hides: bool,
    /// Whether keys may be there still because of it.
    keeps: bool,
    progress: watch::Sender<Progress>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Pending,
    Durable,
    Failed,
}

/// Resolves when something, and all before it, is durable.
#[derive(Clone)]
#[must_use = "nothing is durable before it has resolved"]
pub(crate) struct Commit(Option<watch::Receiver<Progress>>);

impl Commit {
    /// # Errors
    ///
    /// [`Error::Failed`] if it may not be.
    pub(crate) async fn durable(self) -> Result<(), Error> {
        let Some(mut progress) = self.0 else {
            return Ok(());
        };
        let reached = progress.wait_for(|progress| *progress != Progress::Pending);
        match reached.await.as_deref() {
            Ok(Progress::Durable) => Ok(()),
            _ => Err(Error::Failed("the write of a batch failed".to_owned())),
        }
    }
}

/// Who wants to append. Later ones may use room that is kept from the ones before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    Set,
    Delete,
    Move,
}

/// There is no room at present. There will be.
pub(super) struct NoRoom;

/// Everything that changes, behind one lock that is never held during I/O.
pub(super) struct State {
    pub(super) index: Index,
    pub(super) segments: Vec<Segment>,
    /// What the records cost that the index refers to.
    pub(super) used: u64,
    /// In the order of their epochs.
    pub(super) ready: VecDeque<u32>,
    /// The valid root. The log before its position is not replayed.
    pub(super) root: Root,
    pub(super) failed: Option<String>,
    pub(super) closing: bool,
    /// Bytes of batches since the log was opened.
    pub(super) written: u64,
    /// What `written` was at the last checkpoint.
    pub(super) checkpointed: u64,
    /// The shard of the index that is searched next for what has expired.
    pub(super) swept: usize,
    pub(super) current: Option<u32>,
    /// Where the open batch starts in the current segment.
    head: u32,
    /// The batch that takes records; empty if it has none.
    open: Vec<u8>,
    open_records: u32,
    open_hides: bool,
    open_keeps: bool,
    open_progress: watch::Sender<Progress>,
    pub(super) next_sequence: u64,
    /// Complete, and not yet on their way.
    sealed: VecDeque<Arc<Batch>>,
    /// On their way.
    flying: VecDeque<Arc<Batch>>,
}

impl State {
    pub(super) fn new(root: Root, index: Index, segments: Vec<Segment>, sequence: u64) -> Self {
        Self {
            used: 0,
            index,
            segments,
            ready: VecDeque::new(),
            root,
            failed: None,
            closing: false,
            written: 0,
            checkpointed: 0,
            swept: 0,
            current: None,
            head: 0,
            open: Vec::new(),
            open_records: 0,
            open_hides: false,
            open_keeps: false,
            open_progress: watch::Sender::new(Progress::Pending),
            next_sequence: sequence,
            sealed: VecDeque::new(),
            flying: VecDeque::new(),
        }
    }

    pub(super) fn seed(&self, segment: u32) -> Seed {
        Seed::new(self.root.store, self.segments[segment as usize].epoch)
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        match self.closing {
            true => Err(Error::Closed),
            false => self.check_failed(),
        }
    }

    pub(super) fn check_failed(&self) -> Result<(), Error> {
        match &self.failed {
            Some(reason) => Err(Error::Failed(reason.clone())),
            None => Ok(()),
        }
    }

    /// Where the next record that is appended comes, or one before it.
    pub(super) fn position(&self) -> Position {
        let (epoch, offset) = match self.current {
            Some(segment) => (self.segments[segment as usize].epoch, self.head),
            None => {
                // The first that will be ready; it may be written just now.
                let is_ready = |segment: &&Segment| segment.used_for == Use::Ready;
                let ready = self.segments.iter().filter(is_ready);
                let first = ready.map(|segment| segment.epoch).min();
                (first.unwrap_or(self.root.next_epoch), BLOCK as u32)
            }
        };
        Position {
            epoch,
            offset,
            sequence: self.next_sequence,
        }
    }

    /// Segments that a checkpoint needs.
    pub(super) fn checkpoint_need(&self) -> usize {
        self.need(&self.index.extent())
    }

    pub(super) fn need(&self, checkpoint: &Extent) -> usize {
        checkpoint.segments(self.root.segment_size as usize - BLOCK - BATCH_HEADER)
    }

    pub(super) fn free(&self) -> usize {
        let is_free = |segment: &&Segment| matches!(segment.used_for, Use::Cold | Use::Warm);
        self.segments.iter().filter(is_free).count()
    }

    /// Segments that the log may still take. A checkpoint takes ready ones if it has to.
    pub(super) fn available(&self, need: usize) -> usize {
        (self.ready.len() + self.free()).saturating_sub(need)
    }

    /// What a record costs of the space: a large one twice its bytes, since as many may stay unused
    /// before it, at the end of a segment into which it does not go.
    pub(super) fn cost(&self, len: usize) -> u64 {
        match len > self.root.segment_size as usize / 8 {
            true => 2 * len as u64,
            false => len as u64,
        }
    }

    /// What the records may cost that the index refers to: the rest is what compaction, which copies
    /// before it frees, needs to get on, and two checkpoints.
    pub(super) fn limit(&self, need: usize) -> u64 {
        let kept = 2 * need + 6;
        let segments = self.segments.len().saturating_sub(kept) as u64;
        segments * u64::from(self.root.segment_size) / 10 * 8
    }

    /// Makes room for `len` bytes of records in one batch, after which a checkpoint needs so many segments.
    pub(super) fn reserve(&mut self, len: usize, class: Class, need: usize) -> Result<(), NoRoom> {
        // Compaction gets along with one segment for each that it frees, as long as nobody else uses that.
        let spare = match class {
            Class::Set => self.available(need).checked_sub(3),
            Class::Delete => self.available(need).checked_sub(2),
            Class::Move => Some(1),
        };
        let spare = spare.ok_or(NoRoom)?;
        if self.pending_bytes() > MAX_PENDING {
            return Err(NoRoom);
        }
        let size = self.root.segment_size as usize;
        if self.open.len() + len > MAX_BATCH.max(BATCH_HEADER + len) {
            self.seal();
        }
        let fits = |state: &Self| {
            let open = state.open.len().max(BATCH_HEADER) + len;
            let end = state.head as usize + open.next_multiple_of(BLOCK);
            state.current.is_some() && end <= size
        };
        if fits(self) {
            return Ok(());
        }
        self.seal();
        if fits(self) {
            return Ok(());
        }
        if spare == 0 {
            return Err(NoRoom);
        }
        let segment = self.ready.pop_front().ok_or(NoRoom)?;
        self.segments[segment as usize].used_for = Use::Log;
        self.current = Some(segment);
        self.head = BLOCK as u32;
        Ok(())
    }

    /// Appends a record, for which room was made, and lets the index follow.
    pub(super) fn append(&mut self, record: Record<'_>) {
        let segment = self.current.unwrap_or_default();
        let seed = self.seed(segment);
        if self.open.is_empty() {
            self.open.resize(BATCH_HEADER, 0);
        }
        let offset = self.head + self.open.len() as u32;
        self.open_records += 1;
        self.open_hides |= record.kind != Kind::Set || record.expires != 0;
        self.open_keeps |= record.kind == Kind::Expire;

        record.encode(seed, &mut self.open);
        self.apply(&record, segment, offset);
    }

    /// What a record of the log does to the index.
    pub(super) fn apply(&mut self, record: &Record<'_>, segment: u32, offset: u32) {
        match record.kind {
            Kind::Set => {
                let entry = Entry {
                    segment,
                    offset,
                    value_len: record.value.len() as u32,
                    expires: record.expires,
                };
                self.place(record.key, entry);
            }
            Kind::Delete => self.forget(record.key),
            Kind::Expire => {
                if let Some(entry) = self.index.get_mut(record.key) {
                    entry.expires = record.expires;
                }
            }
            Kind::Clear => {
                self.index.clear();
                self.used = 0;
                self.segments
                    .iter_mut()
                    .for_each(|segment| segment.live = 0);
            }
            // The log has none.
            Kind::Entry => {}
        }
    }

    /// Puts a key into the index.
    pub(super) fn place(&mut self, key: &[u8], entry: Entry) {
        let len = entry.record_len(key);
        self.used += self.cost(len);
        self.segments[entry.segment as usize].live += len as u64;
        if let Some(old) = self.index.insert(key, entry) {
            self.uncount(key, &old);
        }
    }

    /// Takes a key out of the index.
    pub(super) fn forget(&mut self, key: &[u8]) {
        if let Some(old) = self.index.remove(key) {
            self.uncount(key, &old);
        }
    }

    fn uncount(&mut self, key: &[u8], entry: &Entry) {
        let len = entry.record_len(key);
        self.used -= self.cost(len);
        self.segments[entry.segment as usize].live -= len as u64;
    }

    /// Ends the open batch.
    fn seal(&mut self) {
        let Some(segment) = self.current.filter(|_| !self.open.is_empty()) else {
            return;
        };
        let seed = self.seed(segment);
        let mut bytes = std::mem::take(&mut self.open);
        seal_batch(&mut bytes, seed, self.next_sequence);
        self.next_sequence += 1;
        self.written += bytes.len() as u64;
        let offset = self.head;
        self.head += bytes.len() as u32;
        self.sealed.push_back(Arc::new(Batch {
            segment,
            offset,
            bytes: bytes.into(),
            records: std::mem::take(&mut self.open_records),
            hides: std::mem::take(&mut self.open_hides),
            keeps: std::mem::take(&mut self.open_keeps),
            progress: std::mem::replace(
                &mut self.open_progress,
                watch::Sender::new(Progress::Pending),
            ),
        }));
    }

    /// The next batch to write. While one is on its way, others follow it only when they are large.
    fn take(&mut self, least: usize, most_flying: usize) -> Option<Arc<Batch>> {
        if self.flying.len() >= most_flying || self.failed.is_some() {
            return None;
        }
        let is_due = self.flying.is_empty() || self.open.len() >= least;
        if self.sealed.is_empty() && is_due {
            self.seal();
        }
        let batch = self.sealed.pop_front()?;
        self.flying.push_back(batch.clone());
        Some(batch)
    }

    fn batches(&self) -> impl DoubleEndedIterator<Item = &Arc<Batch>> {
        self.flying.iter().chain(&self.sealed)
    }

    /// Bytes that are not durable.
    pub(super) fn pending_bytes(&self) -> usize {
        let batches = self.batches().map(|batch| batch.bytes.len());
        self.open.len() + batches.sum::<usize>()
    }

    /// When everything is durable that was appended so far.
    pub(super) fn commit(&self) -> Commit {
        if !self.open.is_empty() {
            return Commit(Some(self.open_progress.subscribe()));
        }
        let last = self.batches().next_back();
        Commit(last.map(|batch| batch.progress.subscribe()))
    }

    /// When that is durable because of which a key is absent.
    pub(super) fn commit_of_absence(&self) -> Commit {
        self.commit_of(self.open_hides, |batch| batch.hides)
    }

    /// When that is durable because of which a key, whose record is, has not expired.
    pub(super) fn commit_of_presence(&self) -> Commit {
        self.commit_of(self.open_keeps, |batch| batch.keeps)
    }

    fn commit_of(&self, is_open: bool, is_wanted: impl Fn(&Batch) -> bool) -> Commit {
        if is_open {
            return Commit(Some(self.open_progress.subscribe()));
        }
        let last = self.batches().rev().find(|batch| is_wanted(batch));
        Commit(last.map(|batch| batch.progress.subscribe()))
    }

    /// The record of an entry while it is not durable, and when it is.
    pub(super) fn pending(&self, entry: &Entry, len: usize) -> Option<(Bytes, Commit)> {
        let within = |start: u32, bytes: usize| {
            (start as usize..start as usize + bytes).contains(&(entry.offset as usize))
        };
        if self.current == Some(entry.segment) && within(self.head, self.open.len()) {
            let start = (entry.offset - self.head) as usize;
            let bytes = Bytes::copy_from_slice(&self.open[start..start + len]);
            return Some((bytes, Commit(Some(self.open_progress.subscribe()))));
        }
        let batch = self.batches().find(|batch| {
            batch.segment == entry.segment && within(batch.offset, batch.bytes.len())
        })?;
        let start = (entry.offset - batch.offset) as usize;
        let bytes = batch.bytes.slice(start..start + len);
        Some((bytes, Commit(Some(batch.progress.subscribe()))))
    }

    /// Nothing is written any more, since the log has a gap or may have one.
    pub(super) fn fail(&mut self, reason: String) {
        tracing::error!(%reason, "the store has failed");
        self.failed.get_or_insert(reason);
        for batch in self.batches() {
            batch.progress.send_replace(Progress::Failed);
        }
        self.open_progress.send_replace(Progress::Failed);
    }
}

/// Writes batches, several at a time, and says in their order that they are durable.
pub(super) async fn write(inner: Arc<Inner>) {
    let options = &inner.options;
    let mut flying = FuturesOrdered::new();
    loop {
        while let Some(batch) = inner.lock().take(options.batch_bytes, options.in_flight) {
            flying.push_back(write_batch(&inner, batch));
        }
        tokio::select! {
            () = inner.appended.notified() => {}
            Some((batch, result)) = flying.next() => {
                let mut state = inner.lock();
                if let Err(error) = result {
                    state.fail(error.to_string());
                }
                if state.failed.is_none() {
                    state.flying.pop_front();
                    batch.progress.send_replace(Progress::Durable);
                }
                drop(state);
                inner.room.notify_waiters();
            }
        }
    }
}

async fn write_batch(inner: &Inner, batch: Arc<Batch>) -> (Arc<Batch>, Result<(), Error>) {
    let start = std::time::Instant::now();
    let offset = inner.offset(batch.segment, batch.offset);
    let result = inner.write_durably(offset, batch.bytes.clone()).await;
    let mut statistics = inner.statistics();
    statistics.batches.saturating_record(batch.records.into());
    statistics
        .writes
        .saturating_record(start.elapsed().as_micros() as u64);
    (batch, result)
}

impl Inner {
    /// Writes so that a loss of power does not matter any more.
    pub(super) async fn write_durably(&self, offset: u64, bytes: Bytes) -> Result<(), Error> {
        let write = self.namespace.write(offset, bytes);
        match self.options.durability {
            // A plain write where there is no volatile cache.
            Durability::Fua => write.fua().await.map_err(nvme_async::Error::from)?,
            Durability::Flush => {
                let bytes = write.await.map_err(nvme_async::Error::from)?;
                self.namespace.flush().await?;
                bytes
            }
        };
        Ok(())
    }
}
