//! What is there: of keys from memory, of values from memory or the device.

use std::mem::take;
use std::sync::Arc;

use bytes::Bytes;

use super::format::{RECORD_HEADER, Record, Seed};
use super::index::{Entry, SHARDS};
use super::log::{Commit, State};
use super::{Error, Inner, Store};

/// All keys, at one moment.
pub(crate) struct View<'a>(pub(super) &'a State, pub(super) u64);

impl View<'_> {
    /// What is known of a key without a look at the device.
    pub(crate) fn get(&self, key: &[u8]) -> Option<Entry> {
        let entry = self.0.index.get(key).copied();
        entry.filter(|entry| !entry.is_expired(self.1))
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
    inner: Arc<Inner>,
    key: Bytes,
    /// Nothing if there is no such key.
    pub(super) entry: Option<Entry>,
    /// Of the record.
    seed: Seed,
    /// The value, if it is not on the device yet.
    value: Option<Bytes>,
    /// Of what it is there or not there for, and of its record.
    causes: [Commit; 2],
    _pin: Option<Arc<()>>,
}

impl Store {
    /// Looks for a key. It is decided now what is found; resolving the result gets it.
    pub(crate) fn get(&self, key: &Bytes) -> Result<Found, Error> {
        let mut state = self.inner.lock();
        state.check()?;
        let mut found = Found {
            inner: self.inner.clone(),
            key: key.clone(),
            entry: View(&state, self.inner.now()).get(key),
            seed: Seed::default(),
            value: None,
            causes: Default::default(),
            _pin: None,
        };
        let Some(entry) = found.entry else {
            found.causes[0] = state.absences.outstanding();
            return Ok(found);
        };
        found.causes[0] = state.presences.outstanding();
        found.seed = state.seed(entry.place.segment);
        found._pin = Some(state.segment(entry.place.segment).pin.clone());
        if let Some((record, commit)) = state.pending(&entry, entry.record_len(key)) {
            found.value = Some(record.slice(RECORD_HEADER + key.len()..));
            found.causes[1] = commit;
        }
        Ok(found)
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
        for cause in take(&mut self.causes) {
            cause.durable().await?;
        }
        self.peek().await
    }

    /// The value, durable or not.
    pub(super) async fn peek(&self) -> Result<Option<Bytes>, Error> {
        let (Some(entry), None) = (self.entry, &self.value) else {
            return Ok(self.value.clone());
        };
        let namespace = &self.inner.namespace;
        let (at, len) = (self.inner.offset(entry.place), entry.record_len(&self.key));
        let block = u64::from(namespace.block_size());
        let start = at / block * block;
        let end = (at + len as u64).next_multiple_of(block);
        let bytes = namespace.read(start, (end - start) as usize).await?;
        let record = bytes.slice((at - start) as usize..).slice(..len);
        match Record::verify(&record, self.seed) {
            Some(found) if found.key == self.key => {
                Ok(Some(record.slice(RECORD_HEADER + self.key.len()..)))
            }
            _ => Err(Error::Damaged(format!(
                "the record at byte {at} is not the one that was written"
            ))),
        }
    }
}
