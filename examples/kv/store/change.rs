//! What writers want, and whether there is space for it.

use std::collections::HashSet;

use bytes::Bytes;

use super::format::{BATCH_HEADER, BLOCK, Kind, Record};
use super::log::{Class, Commit, State};
use super::read::{Facts, View};
use super::{Error, Store, maintenance};

/// What a write does.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// Expires in milliseconds since 1970; 0 is never.
    Set {
        key: Bytes,
        value: Bytes,
        expires: u64,
    },
    Delete {
        key: Bytes,
    },
    Expire {
        key: Bytes,
        expires: u64,
    },
    Clear,
}

impl Change {
    fn record(&self) -> Record<'_> {
        let (kind, key, value, expires): (_, &[u8], &[u8], _) = match self {
            Self::Set {
                key,
                value,
                expires,
            } => (Kind::Set, key, value, *expires),
            Self::Delete { key } => (Kind::Delete, key, &[], 0),
            Self::Expire { key, expires } => (Kind::Expire, key, &[], *expires),
            Self::Clear => (Kind::Clear, &[], &[], 0),
        };
        Record {
            kind,
            expires,
            key,
            value,
        }
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
        self.change_if(|_| true, &mut decide)
            .await
            .map(|result| result.expect("it is changed in any state"))
    }

    /// As [`change`](Self::change), for one key and by its value. What `decide` returns as an error,
    /// changes nothing.
    pub(crate) async fn modify<R>(
        &self,
        key: &[u8],
        mut decide: impl FnMut(Option<(Facts, Bytes)>) -> (Vec<Change>, R),
    ) -> Result<(R, Commit), Error> {
        loop {
            let found = self.get(key)?;
            let seen = found.entry;
            let value = found.peek().await?;
            let mut decide = |view: &View<'_>| {
                let facts = seen.and_then(|_| view.get(key));
                decide(facts.zip(value.clone()))
            };
            let is_same = |state: &State| match (state.index.get(key), seen) {
                (Some(entry), Some(seen)) => entry.place == seen.place,
                (entry, None) => entry.is_none_or(|entry| entry.is_expired(self.inner.now())),
                (None, Some(_)) => false,
            };
            // No other record comes to be in the place of the one that was found: `found` lives.
            if let Some(result) = self.change_if(is_same, &mut decide).await? {
                return Ok(result);
            }
        }
    }

    async fn change_if<R>(
        &self,
        is_wanted: impl Fn(&State) -> bool,
        decide: &mut impl FnMut(&View<'_>) -> (Vec<Change>, R),
    ) -> Result<Option<(R, Commit)>, Error> {
        loop {
            let mut room = std::pin::pin!(self.inner.room.notified());
            room.as_mut().enable();
            {
                let mut state = self.inner.lock();
                state.check()?;
                if !is_wanted(&state) {
                    return Ok(None);
                }
                let (changes, result) = decide(&View(&state, self.inner.now()));
                if self.append(&mut state, &changes)? {
                    return Ok(Some((result, state.commit())));
                }
            }
            self.inner.wanted.notify_one();
            self.inner.tidy.notify_one();
            room.await;
        }
    }

    /// Appends records for the changes; not if there is no room for them at present.
    fn append(&self, state: &mut State, changes: &[Change]) -> Result<bool, Error> {
        if changes.is_empty() {
            return Ok(true);
        }
        let records = changes.iter().map(Change::record);
        let len: usize = records.clone().map(|record| record.len()).sum();
        let most = state.root.segment_size as usize - BLOCK - BATCH_HEADER;
        if len > most {
            return Err(Error::TooLarge(len, most));
        }
        let mut class = Class::Delete;
        let mut more = 0;
        let mut checkpoint = state.index.extent();
        let mut keys = HashSet::new();
        for record in records.clone().filter(|record| record.kind == Kind::Set) {
            class = Class::Set;
            more += state.cost(record.len()) as i64;
            // What is set twice, takes the place of what was there once.
            if changes.len() > 1 && !keys.insert(record.key) {
                continue;
            }
            match state.index.get(record.key) {
                Some(old) => more -= state.cost(old.record_len(record.key)) as i64,
                None => checkpoint.add(record.key),
            }
        }
        let need = state.need(&checkpoint);
        let (used, limit) = (state.used, state.limit(need));
        if class == Class::Set && more > 0 && used.saturating_add_signed(more) > limit {
            return Err(Error::Full { used, limit });
        }
        if state.reserve(len, class, need).is_none() {
            return Ok(false);
        }
        records.for_each(|record| state.append(&record));
        self.inner.appended.notify_one();
        if state.ready.len() < maintenance::READY {
            self.inner.wanted.notify_one();
        }
        Ok(true)
    }
}
