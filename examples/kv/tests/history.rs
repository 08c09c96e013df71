//! What writers asked for, and whether what is found after a crash can be.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::store::{Change, Kind};

/// Each has keys of its own, and asks for one change after the other.
pub(super) const WRITERS: usize = 4;
/// Of each writer.
pub(super) const KEYS: usize = 8;
/// Far away.
const SOME_DAY: u64 = 9_000_000_000_000;

pub(super) type Contents = BTreeMap<Bytes, (Bytes, u64)>;

/// What one writer did.
#[derive(Debug, Default)]
pub(super) struct History {
    /// What was there at first.
    pub(super) start: Contents,
    /// Changes that were asked for, in their order; each entry is atomic.
    pub(super) asked: Vec<Vec<Change>>,
    /// How many of them were acknowledged.
    pub(super) acknowledged: usize,
}

impl History {
    /// The number of changes after which the contents are those that were found.
    #[track_caller]
    fn check(&self, found: &Contents, seed: u64) {
        let mut state = self.start.clone();
        for (done, changes) in (0..).zip(&self.asked) {
            if done >= self.acknowledged && state == *found {
                return;
            }
            changes.iter().for_each(|change| apply(&mut state, change));
        }
        if state == *found {
            return;
        }
        let brief = |contents: &Contents| {
            let brief = contents.iter().map(|(key, (value, expires))| {
                (key.clone(), value.len(), value.first().copied(), *expires)
            });
            brief.collect::<Vec<_>>()
        };
        panic!(
            "seed {seed}: {} of {} changes were acknowledged; found {:?}, expected {:?} or earlier",
            self.acknowledged,
            self.asked.len(),
            brief(found),
            brief(&state),
        );
    }
}

fn apply(state: &mut Contents, change: &Change) {
    match change.kind {
        Kind::Set => {
            let value = (change.value.clone(), change.expires);
            state.insert(change.key.clone(), value);
        }
        Kind::Delete => {
            state.remove(&change.key);
        }
        Kind::Expire => {
            if let Some(entry) = state.get_mut(&change.key) {
                entry.1 = change.expires;
            }
        }
        Kind::Clear => state.clear(),
        Kind::Entry => unreachable!("it is for checkpoints"),
    }
}

pub(super) fn random_change(random: &mut fastrand::Rng, writer: usize) -> Vec<Change> {
    let key =
        |random: &mut fastrand::Rng| Bytes::from(format!("{writer}:{}", random.usize(..KEYS)));
    let set = |random: &mut fastrand::Rng| {
        let len = match random.u8(..10) {
            0 => 0,
            1..7 => random.usize(..300),
            7..9 => random.usize(..6000),
            _ => random.usize(..20_000),
        };
        let mut value = vec![0; len];
        random.fill(&mut value);
        Change::set(&key(random), &value.into(), 0)
    };
    match random.u8(..10) {
        0..6 => vec![set(random)],
        6 => vec![set(random), set(random), set(random)],
        7 => vec![Change::expire(
            &key(random),
            SOME_DAY + u64::from(random.u8(..)),
        )],
        8 => vec![Change::delete(&key(random)), set(random)],
        _ => vec![Change::delete(&key(random))],
    }
}

/// Compares what was found with what was done, and starts new histories from there.
pub(super) fn check(histories: &mut Vec<History>, found: Contents, seed: u64) {
    let mut found_by = vec![Contents::new(); WRITERS];
    for (key, value) in found {
        let writer = usize::from(key[0] - b'0');
        found_by[writer].insert(key, value);
    }
    let old = std::mem::take(histories);
    for (history, found) in old.iter().zip(found_by) {
        history.check(&found, seed);
        histories.push(History {
            start: found,
            ..History::default()
        });
    }
}

/// Of writers on an empty device.
pub(super) fn fresh() -> Vec<History> {
    std::iter::repeat_with(History::default)
        .take(WRITERS)
        .collect()
}
