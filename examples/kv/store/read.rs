//! What is there: of keys from memory, of values from memory or the device.

use std::sync::Arc;

use bytes::Bytes;

use super::format::{RECORD_HEADER, Record, Seed};
use super::index::{Entry, SHARDS};
use super::log::{Commit, State};
use super::{Error, Inner, Store};

/// What is known of a key without a look at the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) len: usize,
    /// In milliseconds since 1970; 0 is never.
    pub(crate) expires: u64,
}

/// All keys, at one moment.
pub(crate) struct View<'a>(pub(super) &'a State, pub(super) u64);

impl View<'_> {
    pub(crate) fn get(&self, key: &[u8]) -> Option<Facts> {
        let entry = self.0.index.get(key)?;
        (!entry.is_expired(self.1)).then_some(Facts {
            len: entry.value_len as usize,
            expires: entry.expires,
        })
    }

    /// How many there are, with those that have expired lately.
    pub(crate) fn count(&self) -> usize {
        self.0.index.len()
    }

    /// Up to about `count` keys, and where to go on, 0 at the end. Keys that are there all the time are
    /// returned at least once.
    pub(crate) fn scan(&self, cursor: usize, count: usize) -> (usize, Vec<Bytes>) {
        let mut keys = Vec::new();
        for shard in cursor..SHARDS {
            if keys.len() >= count {
                return (shard, keys);
            }
            let entries = self.0.index.entries(shard);
            let alive = entries.filter(|(_, entry)| !entry.is_expired(self.1));
            keys.extend(alive.map(|(key, _)| Bytes::copy_from_slice(key)));
        }
        (0, keys)
    }
}

/// What was found of a key. Where its record is, no other one comes to be as long as this lives.
pub(crate) struct Found {
    pub(super) entry: Option<Entry>,
    source: Source,
    /// Of what it is there or not there for, and of its record.
    causes: [Commit; 2],
    _pin: Option<Arc<()>>,
}

enum Source {
    /// There is no value, or it is not on the device yet.
    Memory(Option<Bytes>),
    /// It is in the record of this key.
    Device(Arc<Inner>, Seed, Bytes, Entry),
}

impl Store {
    /// Looks for a key. It is decided now what is found; resolving the result gets it.
    pub(crate) fn get(&self, key: &[u8]) -> Result<Found, Error> {
        let mut state = self.inner.lock();
        state.check()?;
        let entry = state.index.get(key).copied();
        let Some(entry) = entry.filter(|entry| !entry.is_expired(self.inner.now())) else {
            return Ok(Found {
                entry: None,
                source: Source::Memory(None),
                causes: [state.absences.outstanding(), Commit::default()],
                _pin: None,
            });
        };
        let segment = entry.place.segment;
        let (source, commit) = match state.pending(&entry, entry.record_len(key)) {
            Some((record, commit)) => {
                let value = record.slice(RECORD_HEADER + key.len()..);
                (Source::Memory(Some(value)), commit)
            }
            None => {
                let (seed, key) = (state.seed(segment), Bytes::copy_from_slice(key));
                let source = Source::Device(self.inner.clone(), seed, key, entry);
                (source, Commit::default())
            }
        };
        Ok(Found {
            entry: Some(entry),
            source,
            causes: [state.presences.outstanding(), commit],
            _pin: Some(state.segment(segment).pin.clone()),
        })
    }

    /// What is known of keys, and when that is durable.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&View<'_>) -> R) -> Result<(R, Commit), Error> {
        let mut state = self.inner.lock();
        state.check()?;
        Ok((look(&View(&state, self.inner.now())), state.commit()))
    }
}

impl Found {
    /// Bytes of the value.
    pub(crate) fn size(&self) -> usize {
        self.entry.map_or(0, |entry| entry.value_len as usize)
    }

    /// The value, once it is durable; nothing if there is no such key.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] if the device does not have what was written, and those of the device.
    pub(crate) async fn value(mut self) -> Result<Option<Bytes>, Error> {
        for cause in std::mem::take(&mut self.causes) {
            cause.durable().await?;
        }
        self.peek().await
    }

    /// The value, durable or not.
    pub(super) async fn peek(&self) -> Result<Option<Bytes>, Error> {
        let (inner, seed, key, entry) = match &self.source {
            Source::Memory(value) => return Ok(value.clone()),
            Source::Device(inner, seed, key, entry) => (inner, *seed, key, entry),
        };
        let at = inner.offset(entry.place);
        let len = entry.record_len(key);
        let block = u64::from(inner.namespace.block_size());
        let start = at / block * block;
        let end = (at + len as u64).next_multiple_of(block);
        let bytes = inner.namespace.read(start, (end - start) as usize).await?;
        let record = bytes.slice((at - start) as usize..).slice(..len);
        match Record::verify(&record, seed) {
            Some(found) if found.key == key => Ok(Some(record.slice(RECORD_HEADER + key.len()..))),
            _ => Err(Error::Damaged(format!(
                "the record at byte {at} is not the one that was written"
            ))),
        }
    }
}
