//! What writers want, and whether there is space for it.

use std::collections::HashSet;
use std::pin::pin;

use bytes::Bytes;

use super::format::{BATCH_HEADER, BLOCK, Kind, Record};
use super::index::Entry;
use super::log::{Commit, State};
use super::read::View;
use super::{Error, Inner, Store, maintenance};

/// What a write does.
pub(crate) type Change = Record<Bytes>;

impl Change {
    fn new(kind: Kind, key: &Bytes, value: &Bytes, expires: u64) -> Self {
        Self {
            kind,
            expires,
            key: key.clone(),
            value: value.clone(),
        }
    }

    /// Expires in milliseconds since 1970; 0 is never.
    pub(crate) fn set(key: &Bytes, value: &Bytes, expires: u64) -> Self {
        Self::new(Kind::Set, key, value, expires)
    }

    pub(crate) fn delete(key: &Bytes) -> Self {
        Self::new(Kind::Delete, key, &Bytes::new(), 0)
    }

    pub(crate) fn expire(key: &Bytes, expires: u64) -> Self {
        Self::new(Kind::Expire, key, &Bytes::new(), expires)
    }

    /// All keys go.
    pub(crate) fn clear() -> Self {
        Self::new(Kind::Clear, &Bytes::new(), &Bytes::new(), 0)
    }
}

impl Store {
    /// Decides by the keys that there are what to change, and changes that. Resolves when the order of it
    /// among all changes is fixed, which may take until there is room. The changes are durable
    /// together. `decide` may be called again.
    ///
    /// # Errors
    ///
    /// [`Error::Full`], when something is set and there is no space for it; [`Error::TooLarge`].
    ///
    /// # Cancel safety
    ///
    /// Dropped before it resolves, it has done nothing.
    pub(crate) async fn change<R>(
        &self,
        mut decide: impl FnMut(&View<'_>) -> (Vec<Change>, R),
    ) -> Result<(R, Commit), Error> {
        let attempt = |state: &mut State| {
            state.check()?;
            let (changes, result) = decide(&View(state, self.inner.now()));
            let has_room = self.inner.append(state, &changes)?;
            Ok(has_room.then(|| (result, state.commit())))
        };
        self.inner.with_room(attempt).await
    }

    /// As [`change`](Self::change), for one key and by its value.
    pub(crate) async fn modify<R>(
        &self,
        key: &Bytes,
        mut decide: impl FnMut(Option<(Entry, Bytes)>) -> (Vec<Change>, R),
    ) -> Result<(R, Commit), Error> {
        loop {
            // As long as this lives, no other record comes to be in the place of the one that was found.
            let found = self.get(key)?;
            let value = found.peek().await?;
            let decide = |view: &View<'_>| {
                let entry = view.get(key);
                let is_other = |entry: &Entry| found.entry.is_none_or(|e| e.place != entry.place);
                if entry.as_ref().is_some_and(is_other) {
                    return (Vec::new(), None);
                }
                let (changes, result) = decide(entry.zip(value.clone()));
                (changes, Some(result))
            };
            if let (Some(result), commit) = self.change(decide).await? {
                return Ok((result, commit));
            }
        }
    }
}

impl Inner {
    /// Tries something until there is room for it.
    pub(super) async fn with_room<R>(
        &self,
        mut attempt: impl FnMut(&mut State) -> Result<Option<R>, Error>,
    ) -> Result<R, Error> {
        loop {
            let mut room = pin!(self.room.notified());
            room.as_mut().enable();
            if let Some(result) = attempt(&mut self.lock())? {
                return Ok(result);
            }
            self.wanted.notify_one();
            self.tidy.notify_one();
            room.await;
        }
    }

    /// Appends the changes; not if there is no room for them at present.
    fn append(&self, state: &mut State, changes: &[Change]) -> Result<bool, Error> {
        if changes.is_empty() {
            return Ok(true);
        }
        let len = changes.iter().map(Change::len).sum();
        let most = self.segment_size as usize - BLOCK - BATCH_HEADER;
        if len > most {
            return Err(Error::TooLarge(len, most));
        }
        let (mut more, mut checkpoint) = (0, state.index.extent);
        let mut keys = HashSet::new();
        let is_set = |change: &&Change| change.kind == Kind::Set;
        for change in changes.iter().filter(is_set) {
            more += state.cost(change.len()) as i64;
            // What is set twice, takes the place of what was there once.
            if changes.len() > 1 && !keys.insert(&change.key[..]) {
                continue;
            }
            match state.index.get(&change.key) {
                Some(old) => more -= state.cost(old.record_len(&change.key)) as i64,
                None => checkpoint.add(&change.key),
            }
        }
        let need = state.need(&checkpoint);
        let (used, limit) = (state.used, state.limit(need));
        if more > 0 && used.saturating_add_signed(more) > limit {
            return Err(Error::Full { used, limit });
        }
        // Compaction gets along with one segment for each that it frees, as long as nobody else uses that.
        let kept = if changes.iter().any(|change| is_set(&change)) {
            3
        } else {
            2
        };
        if state.reserve(len, need + kept).is_none() {
            return Ok(false);
        }
        changes.iter().for_each(|change| state.append(change));
        self.appended.notify_one();
        if state.ready.len() < maintenance::READY {
            self.wanted.notify_one();
        }
        Ok(true)
    }
}
