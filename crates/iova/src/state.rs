//! What of an address space is taken, by whom, and who waits for it.

use crate::Error;
use crate::cache::Cache;
use crate::lease::Kind;
use crate::ranges::FreeRanges;
use crate::waiters::Waiters;

/// What of an address space changes, under its lock.
pub(crate) struct State {
    pub(crate) free: FreeRanges,
    pub(crate) tallies: Tallies,
    /// Fixed mappings that have a registration. Others are being made or are about to go.
    pub(crate) registered: Amount,
    /// How many kept mappings were given up.
    pub(crate) recycled: u64,
    /// How often something was released or changed that others may wait for.
    pub(crate) releases: u64,
    pub(crate) cache: Cache,
    pub(crate) waiters: Waiters,
    /// Nothing more is kept.
    pub(crate) is_closed: bool,
}

/// Counts what isn't free: what is mapped, and what is being mapped or unmapped.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tallies {
    pub(crate) fixed: Amount,
    pub(crate) temporary: Amount,
    pub(crate) leaked: Amount,
}

impl Tallies {
    pub(crate) fn of(&mut self, kind: Kind) -> &mut Amount {
        match kind {
            Kind::Fixed => &mut self.fixed,
            Kind::Temporary => &mut self.temporary,
        }
    }

    pub(crate) fn mappings(&self) -> u64 {
        self.fixed.mappings + self.temporary.mappings + self.leaked.mappings
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.fixed.bytes + self.temporary.bytes + self.leaked.bytes
    }
}

impl State {
    /// Nothing is taken but what is not free.
    pub(crate) fn new(free: FreeRanges) -> Self {
        Self {
            free,
            tallies: Tallies::default(),
            registered: Amount::default(),
            recycled: 0,
            releases: 0,
            cache: Cache::default(),
            waiters: Waiters::default(),
            is_closed: false,
        }
    }

    /// What will go by itself, or change its kind: neither registered nor kept nor leaked.
    /// Whenever some of it does, the first one who waits is woken.
    pub(crate) fn leaving(&self) -> Amount {
        let Tallies {
            fixed, temporary, ..
        } = self.tallies;
        let kept = self.cache.amount();
        Amount {
            mappings: temporary.mappings - kept.mappings
                + (fixed.mappings - self.registered.mappings),
            bytes: temporary.bytes - kept.bytes + (fixed.bytes - self.registered.bytes),
        }
    }

    /// Whether there can be `needed` mappings beside what is registered, if `max` is the limit.
    pub(crate) fn check_ever(&self, needed: u64, max: Option<u64>) -> Result<(), Error> {
        let in_use = self.registered.mappings + self.tallies.leaked.mappings;
        limit(needed, in_use, max)
    }

    /// Whether there can be `needed` mappings more now.
    pub(crate) fn check_now(&self, needed: u64, max: Option<u64>) -> Result<(), Error> {
        limit(needed, self.tallies.mappings(), max)
    }

    /// Undoes [`Space::reserve`](crate::inner::Space::reserve).
    pub(crate) fn give_back(&mut self, iova: u64, len: u64, kind: Kind) {
        self.tallies.of(kind).remove(len);
        self.free.give_back(iova, len);
    }

    /// Counts as leaked what was counted as `kind`; the addresses stay taken.
    pub(crate) fn leak(&mut self, len: u64, kind: Kind) {
        self.tallies.of(kind).remove(len);
        self.tallies.leaked.add(len);
    }
}

fn limit(needed: u64, in_use: u64, max: Option<u64>) -> Result<(), Error> {
    match max {
        Some(limit) if needed > limit.saturating_sub(in_use) => Err(Error::MappingLimit {
            needed,
            in_use,
            max,
        }),
        _ => Ok(()),
    }
}

/// So many mappings, and so many bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    pub(crate) mappings: u64,
    pub(crate) bytes: u64,
}

impl Amount {
    /// More than there is.
    pub(crate) const ALL: Self = Self {
        mappings: u64::MAX,
        bytes: u64::MAX,
    };

    /// One mapping of `len` bytes.
    pub(crate) fn of_one(len: u64) -> Self {
        Self {
            mappings: 1,
            bytes: len,
        }
    }

    pub(crate) fn is_zero(self) -> bool {
        self == Self::default()
    }

    /// With one mapping more.
    pub(crate) fn add(&mut self, len: u64) {
        self.mappings += 1;
        self.bytes += len;
    }

    /// With one mapping less, which was in it.
    pub(crate) fn remove(&mut self, len: u64) {
        self.mappings -= 1;
        self.bytes -= len;
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            mappings: self.mappings.saturating_add(other.mappings),
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }

    /// What is left of it without `other`.
    pub(crate) fn less(self, other: Self) -> Self {
        Self {
            mappings: self.mappings.saturating_sub(other.mappings),
            bytes: self.bytes.saturating_sub(other.bytes),
        }
    }

    pub(crate) fn max(self, other: Self) -> Self {
        Self {
            mappings: self.mappings.max(other.mappings),
            bytes: self.bytes.max(other.bytes),
        }
    }
}
