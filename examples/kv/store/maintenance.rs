//! What goes on in the background: segments are made ready, checkpoints taken, space reclaimed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;

use super::format::{
    BATCH_HEADER, BLOCK, Kind, MAX_CHECKPOINT_SEGMENTS, OF_CHECKPOINT, Record, records, seal_batch,
    segment_header,
};
use super::index::SHARDS;
use super::log::{Class, Segment, State, Use};
use super::recovery::Scanner;
use super::{Error, Inner};

/// Segments that are ready for the log, if possible.
pub(super) const READY: usize = 3;
/// Free segments beyond these are discarded.
const WARM: usize = 4;
/// Keys of which those are searched that have expired, each time; more only where one shard has more.
const SWEEP: usize = 16 << 10;
/// Bytes that are overwritten, read or written at a time.
const PIECE: usize = 256 << 10;

/// Makes segments ready, one after the other, in the order of their epochs.
pub(super) async fn prepare(inner: Arc<Inner>) {
    loop {
        match prepare_one(&inner).await {
            Ok(true) => inner.room.notify_waiters(),
            Ok(false) => inner.wanted.notified().await,
            Err(error) => return inner.fail(&error),
        }
    }
}

async fn prepare_one(inner: &Inner) -> Result<bool, Error> {
    let Some((segment, epoch, is_cold, store)) = ({
        let mut state = inner.lock();
        // Compaction has one of those that are kept for a checkpoint, and gives it back.
        let is_kept = !state.ready.is_empty() && state.free() <= state.checkpoint_need();
        let is_wanted = state.ready.len() < READY && !is_kept;
        let taken = is_wanted.then(|| state.take_free(Use::Ready)).flatten();
        taken.map(|(segment, epoch, is_cold)| (segment, epoch, is_cold, state.root.store))
    }) else {
        return Ok(false);
    };
    if is_cold {
        // In pieces, each durable by itself: one flush of all would keep the log waiting.
        let zeroes = Bytes::from(vec![0; PIECE]);
        let size = inner.segment_size as usize;
        for offset in (0..size).step_by(PIECE) {
            let piece = zeroes.slice(..PIECE.min(size - offset));
            let at = inner.offset(segment, offset as u32);
            inner.write_durably(at, piece).await?;
        }
    }
    let header = segment_header(store, epoch).into();
    inner
        .write_durably(inner.offset(segment, 0), header)
        .await?;
    inner.lock().ready.push_back(segment);
    Ok(true)
}

/// Does everything else, a step at a time.
pub(super) async fn tidy(inner: Arc<Inner>) {
    loop {
        match step(&inner).await {
            Ok(Step::More) => {}
            Ok(Step::Wait) => {
                tokio::select! {
                    () = inner.tidy.notified() => {}
                    () = sleep(Duration::from_millis(200)) => {}
                }
            }
            Ok(Step::End) => return,
            Err(error) => return inner.fail(&error),
        }
    }
}

enum Step {
    More,
    Wait,
    End,
}

async fn step(inner: &Inner) -> Result<Step, Error> {
    sweep(inner);
    let has_freed = free(inner).await?;
    let is_closing = inner.closing().is_some();
    let (is_due, is_low, is_short, victim) = {
        let state = inner.lock();
        if state.closing && !is_closing || state.failed.is_some() {
            return Ok(Step::Wait);
        }
        let since = state.written - state.checkpointed;
        let least = inner.options.checkpoint_bytes;
        let need = state.checkpoint_need();
        let is_low = state.available(need) < (state.segments.len() / 8).max(READY + 3);
        let is_short = state.ready.len() + state.free() < need;
        let is_due = since > least.max(4 * state.index.extent().bytes as u64);
        // Then there is a segment that compaction may not touch for want of a checkpoint.
        let has_gone_on = state.position().epoch > state.root.position.epoch;
        let victim = state.victim(is_low);
        let is_draining = |segment: &Segment| segment.used_for == Use::Draining;
        if state.ready.len() + state.free() == 0 && state.segments.iter().any(is_draining) {
            // What is freed next is for the copies, or the checkpoint.
            return Ok(Step::Wait);
        }
        (is_due, is_low && has_gone_on, is_short, victim)
    };
    let is_possible = !is_short || victim.is_none();
    if is_closing && is_possible {
        let end = checkpoint(inner).await;
        if let Some(closing) = inner.closing().take() {
            let _ = closing.send(end);
        }
        return Ok(Step::End);
    }
    if is_due && is_possible || is_low && victim.is_none() {
        checkpoint(inner).await?;
        return Ok(Step::More);
    }
    if let Some(victim) = victim {
        compact(inner, victim).await?;
        return Ok(Step::More);
    }
    Ok(match has_freed {
        true => Step::More,
        false => Step::Wait,
    })
}

impl State {
    /// Forgets those keys of a shard that have expired; returns how many.
    pub(super) fn forget_expired(&mut self, shard: usize, now: u64) -> usize {
        let entries = self.index.entries(shard);
        let expired = entries.filter(|(_, entry)| entry.is_expired(now));
        let expired: Vec<_> = expired.map(|(key, _)| key.to_vec()).collect();
        expired.iter().for_each(|key| self.forget(key));
        expired.len()
    }

    /// Takes a free segment into use under a new epoch, a warm one if there is any.
    fn take_free(&mut self, used_for: Use) -> Option<(u32, u64, bool)> {
        let find = |wanted| self.segments.iter().position(|s| s.used_for == wanted);
        let number = find(Use::Warm).or_else(|| find(Use::Cold))?;
        let epoch = self.root.next_epoch;
        self.root.next_epoch += 1;
        let segment = &mut self.segments[number];
        let is_cold = segment.used_for == Use::Cold;
        (segment.used_for, segment.epoch) = (used_for, epoch);
        Some((number as u32, epoch, is_cold))
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
    drop(state);
    if expired > 0 {
        inner.statistics().expired += expired as u64;
        // Who waits for room, and holds the place of one of them, looks again.
        inner.room.notify_waiters();
    }
}

/// Frees segments that nobody reads any more, and discards what is not needed soon.
async fn free(inner: &Inner) -> Result<bool, Error> {
    let (mut has_freed, mut discard) = (false, Vec::new());
    {
        let mut state = inner.lock();
        let is_warm = |segment: &&Segment| segment.used_for == Use::Warm;
        let mut warm = state.segments.iter().filter(is_warm).count();
        for (number, segment) in (0..).zip(&mut state.segments) {
            if segment.used_for != Use::Draining || Arc::strong_count(&segment.pin) > 1 {
                continue;
            }
            has_freed = true;
            if warm < WARM {
                warm += 1;
                segment.used_for = Use::Warm;
            } else {
                discard.push(number);
            }
        }
    }
    for segment in discard {
        let start = inner.offset(segment, 0);
        let range = start..start + u64::from(inner.segment_size);
        match inner.namespace.discard(std::slice::from_ref(&range)).await {
            Ok(()) | Err(nvme_async::Error::Unsupported { .. }) => {}
            // It was advice.
            Err(error) => tracing::warn!(segment, %error, "a segment can't be discarded"),
        }
        inner.lock().segments[segment as usize].used_for = Use::Cold;
    }
    if has_freed {
        inner.wanted.notify_one();
        inner.room.notify_waiters();
    }
    Ok(has_freed)
}

/// Writes the index, then a root that makes it count.
async fn checkpoint(inner: &Inner) -> Result<(), Error> {
    let (position, written) = {
        let state = inner.lock();
        state.check_failed()?;
        (state.position(), state.written)
    };
    let mut chunks = Chunks::new(inner);
    for shard in 0..SHARDS {
        let mut records: Vec<u8> = Vec::new();
        let mut ends = Vec::new();
        {
            let state = inner.lock();
            for (key, entry) in state.index.entries(shard) {
                let record = Record {
                    kind: Kind::Entry,
                    expires: entry.expires,
                    key,
                    value: &entry.encode(),
                };
                // The checksum of the batch is enough.
                record.encode(Default::default(), &mut records);
                ends.push(records.len());
            }
        }
        let mut start = 0;
        for end in ends {
            chunks.add(&records[start..end]).await?;
            start = end;
        }
    }
    chunks.end().await?;
    let (segments, count) = (chunks.segments, chunks.count);
    let commit = inner.lock().commit();
    commit.durable().await?;

    let mut root = inner.lock().root.clone();
    root.generation += 1;
    root.position = position;
    root.chunks = count;
    let old = std::mem::replace(&mut root.checkpoint, segments);
    let block = root.generation % 2 * BLOCK as u64;
    inner.write_durably(block, root.encode().into()).await?;

    let mut state = inner.lock();
    // Epochs were given out meanwhile.
    root.next_epoch = state.root.next_epoch;
    state.root = root;
    state.checkpointed = written;
    for (segment, _) in old {
        state.segments[segment as usize].used_for = Use::Draining;
    }
    drop(state);
    inner.statistics().checkpoints += 1;
    Ok(())
}

/// Writes the batches of a checkpoint.
struct Chunks<'a> {
    inner: &'a Inner,
    segments: Vec<(u32, u64)>,
    /// In the last segment.
    offset: usize,
    open: Vec<u8>,
    count: u64,
}

impl<'a> Chunks<'a> {
    fn new(inner: &'a Inner) -> Self {
        Self {
            inner,
            segments: Vec::new(),
            offset: inner.segment_size as usize,
            open: vec![0; BATCH_HEADER],
            count: 0,
        }
    }

    async fn add(&mut self, record: &[u8]) -> Result<(), Error> {
        let room = self.inner.segment_size as usize - self.offset;
        let len = self.open.len() + record.len();
        if len > room || len > PIECE && self.open.len() > BATCH_HEADER {
            self.end().await?;
        }
        let room = self.inner.segment_size as usize - self.offset;
        if self.open.len() + record.len() > room {
            self.next_segment().await?;
        }
        self.open.extend_from_slice(record);
        Ok(())
    }

    async fn next_segment(&mut self) -> Result<(), Error> {
        let (segment, epoch, store) = {
            let mut state = self.inner.lock();
            let taken = state.take_free(Use::Checkpoint).or_else(|| {
                let ready = state.ready.pop_back()?;
                let segment = &mut state.segments[ready as usize];
                segment.used_for = Use::Checkpoint;
                Some((ready, segment.epoch, false))
            });
            let no_room = || Error::Damaged("there is no segment for a checkpoint".to_owned());
            let (segment, epoch, _) = taken
                .filter(|_| self.segments.len() < MAX_CHECKPOINT_SEGMENTS)
                .ok_or_else(no_room)?;
            (segment, epoch, state.root.store)
        };
        self.segments.push((segment, epoch));
        self.offset = BLOCK;
        let header = segment_header(store, epoch).into();
        self.inner
            .write_durably(self.inner.offset(segment, 0), header)
            .await
    }

    /// Writes the records that there are.
    async fn end(&mut self) -> Result<(), Error> {
        let Some((segment, _)) = self.segments.last().copied() else {
            return Ok(());
        };
        if self.open.len() == BATCH_HEADER {
            return Ok(());
        }
        let mut batch = std::mem::replace(&mut self.open, vec![0; BATCH_HEADER]);
        let seed = self.inner.lock().seed(segment);
        seal_batch(&mut batch, seed, OF_CHECKPOINT | self.count);
        let at = self.inner.offset(segment, self.offset as u32);
        self.offset += batch.len();
        self.count += 1;
        self.inner.write_durably(at, batch.into()).await
    }
}

/// Copies what lives in a segment to the log's end, and frees the segment.
async fn compact(inner: &Inner, victim: u32) -> Result<(), Error> {
    let mut scanner = Scanner::new(&inner.lock(), victim, BLOCK as u32);
    let (mut bytes, mut moved) = (0, 0);
    let mut records_read = VecDeque::new();
    loop {
        let is_dead = inner.lock().segments[victim as usize].live == 0;
        let batch = match is_dead {
            true => None,
            false => match scanner.next(&inner.namespace).await {
                Ok(batch) => batch,
                // It stays as it is: each key in it may be readable nonetheless.
                Err(error) => {
                    tracing::error!(segment = victim, %error, "a segment can't be read");
                    None
                }
            },
        };
        if let Some(batch) = &batch {
            bytes += batch.bytes.len().next_multiple_of(BLOCK);
            records_read.extend(records(&batch.bytes).map(|(offset, record)| {
                let bytes = batch.bytes.slice(offset..offset + record.len());
                (batch.offset + offset as u32, bytes)
            }));
            if bytes < PIECE {
                continue;
            }
        }
        moved += move_records(inner, victim, &mut records_read).await?;
        if batch.is_none() {
            break;
        }
        throttle(inner, std::mem::take(&mut bytes)).await;
    }
    let commit = inner.lock().commit();
    commit.durable().await?;
    let mut state = inner.lock();
    let segment = &mut state.segments[victim as usize];
    segment.used_for = match segment.live {
        0 => Use::Draining,
        live => {
            tracing::error!(segment = victim, live, "a part of a segment can't be read");
            Use::Damaged
        }
    };
    drop(state);
    let mut statistics = inner.statistics();
    statistics.compacted += 1;
    statistics.moved_bytes += moved;
    Ok(())
}

/// Appends those records that the index refers to; returns how many bytes. Many at once, so that what
/// was spread over many batches comes to lie in few.
async fn move_records(
    inner: &Inner,
    victim: u32,
    records: &mut VecDeque<(u32, Bytes)>,
) -> Result<u64, Error> {
    let mut moved = 0;
    loop {
        let mut room = std::pin::pin!(inner.room.notified());
        room.as_mut().enable();
        let is_done = {
            let mut state = inner.lock();
            state.check_failed()?;
            let is_done = loop {
                let Some((offset, bytes)) = records.front() else {
                    break true;
                };
                let record = Record::decode(bytes).filter(|record| record.kind == Kind::Set);
                if let Some(mut record) = record
                    && let Some(entry) = state.index.get(record.key)
                    && (entry.segment, entry.offset) == (victim, *offset)
                {
                    // What was said of it later.
                    record.expires = entry.expires;
                    if state.reserve(record.len(), Class::Move, 0).is_err() {
                        break false;
                    }
                    state.append(record);
                    moved += record.len() as u64;
                }
                records.pop_front();
            };
            inner.appended.notify_one();
            is_done
        };
        if is_done {
            return Ok(moved);
        }
        inner.wanted.notify_one();
        room.await;
    }
}

/// Keeps to the rate of compaction, unless writers wait for room.
async fn throttle(inner: &Inner, bytes: usize) {
    let has_room = {
        let state = inner.lock();
        state.available(state.checkpoint_need()) > READY + 1
    };
    if has_room {
        let rate = inner.options.compaction_rate.max(1) as f64;
        sleep(Duration::from_secs_f64(bytes as f64 / rate)).await;
    }
}
