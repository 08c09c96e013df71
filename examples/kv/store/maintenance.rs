//! What goes on in the background: segments are made ready, space is reclaimed.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::format::{BLOCK, Place, Record, segment_header};
use super::index::SHARDS;
use super::log::{Segment, State, Use};
use super::recovery::{Batch, Scanner};
use super::{Error, Inner, checkpoint};

/// Segments that are ready for the log, if possible.
pub(super) const READY: usize = 3;
/// Free segments beyond these are discarded.
const WARM: usize = 4;
/// Keys of which those are searched that have expired, each time; more only where one shard has more.
const SWEEP: usize = 16 << 10;
/// Bytes that are overwritten, read or written at a time.
pub(super) const PIECE: usize = 256 << 10;

/// Does all of it, until something fails.
pub(super) async fn run(inner: Arc<Inner>) {
    if let Err(error) = futures::try_join!(prepare(&inner), tidy(&inner)) {
        inner.fail(&error);
    }
}

/// Makes segments ready, one after the other, in the order of their epochs.
async fn prepare(inner: &Inner) -> Result<(), Error> {
    // In pieces, each durable by itself: one flush of all would keep the log waiting.
    let zeroes = Bytes::from(vec![0; PIECE]);
    loop {
        let taken = inner.lock().take_wanted();
        let Some((segment, is_cold)) = taken else {
            inner.wanted.notified().await;
            continue;
        };
        let size = if is_cold { inner.segment_size } else { 0 };
        for offset in (0..size).step_by(PIECE) {
            let piece = zeroes.slice(..PIECE.min((size - offset) as usize));
            let at = inner.offset(Place { segment, offset });
            inner.write_durably(at, piece).await?;
        }
        inner.write_header(segment).await?;
        inner.lock().ready.push_back(segment);
        inner.room.notify_waiters();
    }
}

impl Inner {
    /// Makes the epoch of a segment count.
    pub(super) async fn write_header(&self, segment: u32) -> Result<(), Error> {
        let header = {
            let mut state = self.lock();
            segment_header(state.root.store, state.segment(segment).epoch)
        };
        let start = self.offset(Place { segment, offset: 0 });
        self.write_durably(start, header.into()).await
    }
}

/// Does everything else, a step at a time, until the store is closed.
async fn tidy(inner: &Inner) -> Result<(), Error> {
    loop {
        sweep(inner);
        let has_freed = free(inner).await;
        let task = inner.lock().next_task(inner.options.checkpoint_bytes);
        match task {
            Task::Compact(victim) => compact(inner, victim).await?,
            Task::Checkpoint(None) => checkpoint::write(inner).await?,
            Task::Checkpoint(Some(closer)) => {
                // Who closes may be gone.
                let _ = closer.send(checkpoint::write(inner).await);
                return Ok(());
            }
            Task::Wait if has_freed => {}
            Task::Wait => {
                let _ = timeout(Duration::from_millis(200), inner.tidy.notified()).await;
            }
        }
    }
}

enum Task {
    Compact(u32),
    /// The last one, if there is someone who waits for that.
    Checkpoint(Option<oneshot::Sender<Result<(), Error>>>),
    Wait,
}

impl State {
    fn next_task(&mut self, checkpoint_bytes: u64) -> Task {
        let need = self.checkpoint_need();
        let is_low = self.available() < (self.segments.len() / 8).max(READY + 3);
        let victim = self.victim(is_low);
        let is_draining = self.count(&[Use::Draining]) > 0;
        if self.failed.is_some() || self.unused() == 0 && is_draining {
            // What is freed next is for the copies, or the checkpoint.
            return Task::Wait;
        }
        let least = checkpoint_bytes.max(4 * self.index.extent.bytes as u64);
        let is_due = self.is_closing || self.written - self.checkpointed > least;
        // Then there is a segment that compaction may not touch for want of a checkpoint.
        let has_gone_on = self.position().epoch > self.root.position.epoch;
        match victim {
            Some(victim) if !is_due || self.unused() < need => Task::Compact(victim),
            None if is_low && has_gone_on => Task::Checkpoint(self.closer.take()),
            _ if is_due => Task::Checkpoint(self.closer.take()),
            _ => Task::Wait,
        }
    }

    /// Takes a free segment to be made ready, if that is wanted.
    fn take_wanted(&mut self) -> Option<(u32, bool)> {
        // Compaction has one of those that are kept for a checkpoint, and gives it back.
        let is_kept = !self.ready.is_empty() && self.free() <= self.checkpoint_need();
        let is_wanted = self.ready.len() < READY && !is_kept;
        is_wanted.then(|| self.take_free(Use::Ready)).flatten()
    }

    /// Forgets those keys of a shard that have expired; returns how many.
    pub(super) fn forget_expired(&mut self, shard: usize, now: u64) -> usize {
        let entries = self.index.entries(shard);
        let expired = entries.filter(|(_, entry)| entry.is_expired(now));
        let expired: Vec<_> = expired.map(|(key, _)| key.to_vec()).collect();
        expired.iter().for_each(|key| self.place(key, None));
        expired.len()
    }

    /// Takes a free segment into use under a new epoch, a warm one if there is any, and says whether it is cold.
    pub(super) fn take_free(&mut self, used_for: Use) -> Option<(u32, bool)> {
        let find = |wanted| self.segments.iter().position(|s| s.used_for == wanted);
        let number = find(Use::Warm).or_else(|| find(Use::Cold))?;
        let segment = &mut self.segments[number];
        let is_cold = segment.used_for == Use::Cold;
        (segment.used_for, segment.epoch) = (used_for, self.root.next_epoch);
        self.root.next_epoch += 1;
        Some((number as u32, is_cold))
    }

    /// Appends a record, if the index refers to it where it is; nothing if there is no room.
    fn move_record(&mut self, place: Place, mut record: Record<&[u8]>) -> Option<()> {
        let entry = self.index.get(record.key);
        if let Some(entry) = entry.filter(|entry| entry.place == place) {
            // What was said of it later.
            record.expires = entry.expires;
            self.reserve(record.len(), 0)?;
            self.append(&record);
            self.statistics.moved_bytes += record.len() as u64;
        }
        Some(())
    }

    /// A segment that nobody reads any more, and how it is to be free.
    fn drained(&self) -> Option<(u32, Use)> {
        let is_drained = |segment: &Segment| {
            segment.used_for == Use::Draining && Arc::strong_count(&segment.pin) == 1
        };
        let number = self.segments.iter().position(is_drained)?;
        let is_enough = self.count(&[Use::Warm]) >= WARM;
        Some((number as u32, if is_enough { Use::Cold } else { Use::Warm }))
    }

    /// The segment whose compaction pays most, if one's does: of those that need no replay.
    fn victim(&self, is_low: bool) -> Option<u32> {
        let most = u64::from(self.root.segment_size) * if is_low { 90 } else { 25 } / 100;
        let epoch = self.root.position.epoch;
        (0..)
            .zip(&self.segments)
            .filter(|(_, segment)| segment.used_for == Use::Log && segment.epoch < epoch)
            .filter(|(_, segment)| segment.live < most)
            .min_by_key(|(_, segment)| segment.live)
            .map(|(number, _)| number)
    }
}

/// Forgets some of what has expired.
fn sweep(inner: &Inner) {
    let mut state = inner.lock();
    let (mut seen, mut expired) = (0, 0);
    for _ in 0..SHARDS {
        let shard = state.swept;
        state.swept = (shard + 1) % SHARDS;
        seen += state.index.entries(shard).count();
        expired += state.forget_expired(shard, inner.now());
        if seen > SWEEP {
            break;
        }
    }
    state.statistics.expired += expired as u64;
    drop(state);
    if expired > 0 {
        // Who waits for room, and holds the place of one of them, looks again.
        inner.room.notify_waiters();
    }
}

/// Frees segments that nobody reads any more, and discards what is not needed soon. Returns whether there were any.
async fn free(inner: &Inner) -> bool {
    let mut has_freed = false;
    loop {
        let drained = inner.lock().drained();
        let Some((segment, free)) = drained else {
            return has_freed;
        };
        if free == Use::Cold {
            let start = inner.offset(Place { segment, offset: 0 });
            let range = start..start + u64::from(inner.segment_size);
            match inner.namespace.discard(std::slice::from_ref(&range)).await {
                Ok(()) | Err(nvme_async::Error::Unsupported { .. }) => {}
                // It was advice.
                Err(error) => tracing::warn!(segment, %error, "a segment can't be discarded"),
            }
        }
        inner.lock().segment(segment).used_for = free;
        has_freed = true;
        inner.wanted.notify_one();
        inner.room.notify_waiters();
    }
}

/// Copies what lives in a segment to the log's end, and frees the segment.
async fn compact(inner: &Inner, victim: u32) -> Result<(), Error> {
    let mut scanner = Scanner::new(&inner.namespace, &inner.lock(), Place::first(victim));
    loop {
        // Many at once, so that what was spread over many batches comes to lie in few.
        let (mut bytes, mut batches) = (0, Vec::new());
        while bytes < PIECE
            && let Some(batch) = next_batch(inner, &mut scanner, victim).await
        {
            bytes += batch.bytes.len().next_multiple_of(BLOCK);
            batches.push(batch);
        }
        if batches.is_empty() {
            break;
        }
        let records: Vec<_> = batches.iter().flat_map(Batch::records).collect();
        let mut left = &records[..];
        let attempt = |state: &mut State| {
            state.check_failed()?;
            while let [(place, record), rest @ ..] = left
                && state.move_record(*place, *record).is_some()
            {
                left = rest;
            }
            inner.appended.notify_one();
            Ok(left.is_empty().then_some(()))
        };
        inner.with_room(attempt).await?;
        throttle(inner, bytes).await;
    }
    let commit = inner.lock().commit();
    commit.durable().await?;
    let mut state = inner.lock();
    let segment = state.segment(victim);
    segment.used_for = Use::Draining;
    if segment.live > 0 {
        tracing::error!(
            segment = victim,
            live = segment.live,
            "a part of a segment can't be read"
        );
        segment.used_for = Use::Damaged;
    }
    state.statistics.compacted += 1;
    Ok(())
}

/// The next batch of a segment in which there is something that the index refers to.
async fn next_batch(inner: &Inner, scanner: &mut Scanner<'_>, victim: u32) -> Option<Batch> {
    if inner.lock().segment(victim).live == 0 {
        return None;
    }
    // A segment that can't be read stays as it is: each key in it may be readable nonetheless.
    scanner.next().await.unwrap_or_else(|error| {
        tracing::error!(segment = victim, %error, "a segment can't be read");
        None
    })
}

/// Keeps to the rate of compaction, unless writers wait for room.
async fn throttle(inner: &Inner, bytes: usize) {
    let has_room = inner.lock().available() > READY + 1;
    if has_room {
        let rate = inner.options.compaction_rate.max(1) as f64;
        sleep(Duration::from_secs_f64(bytes as f64 / rate)).await;
    }
}
