//! Temporary mappings that are kept for later, because the space holds an owner of their memory.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::HostMemory;
use crate::inner::Space;
use crate::lease::{Backing, Lease};
use crate::state::{Amount, State};
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::table::SlotRef;
use crate::waiters::Ticket;

/// The kept mappings, the one that was not used for longest first, as far as is known: a mapping
/// that was looked up since it was put in its place gets a new one when its turn comes.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    clock: VecDeque<Kept>,
    amount: Amount,
}

#[derive(Debug)]
struct Kept {
    slot: SlotRef<Lease>,
    bytes: u64,
    /// When it was put here.
    generation: u32,
}

/// A mapping that was given up: to be unlinked and removed, by who gets this.
#[derive(Debug)]
pub(crate) struct Victim {
    pub(crate) slot: SlotRef<Lease>,
    pub(crate) lease: Box<Lease>,
}

impl Cache {
    pub(crate) fn amount(&self) -> Amount {
        self.amount
    }

    /// Keeps a mapping whose slot is live.
    pub(crate) fn keep(&mut self, slot: SlotRef<Lease>, bytes: u64, generation: u32) {
        slot.set_used(generation);
        self.amount.add(bytes);
        self.clock.push_back(Kept {
            slot,
            bytes,
            generation,
        });
    }

    /// Gives up mappings that no request uses, until they are as much as `need`, or there are no
    /// more among the next `looks`.
    fn give_up_idle(&mut self, mut need: Amount, looks: usize) -> Vec<Victim> {
        let mut victims = Vec::new();
        // Once around for a second chance, and once more.
        for _ in 0..looks.min(2 * self.clock.len()) {
            if need.is_zero() {
                break;
            }
            let Some(mut kept) = self.clock.pop_front() else {
                break;
            };
            let used = kept.slot.used();
            if used == kept.generation
                && let Some(lease) = kept.slot.end_if_idle()
            {
                self.amount.remove(kept.bytes);
                need = need.less(Amount::of_one(kept.bytes));
                let slot = kept.slot;
                victims.push(Victim { slot, lease });
                continue;
            }
            kept.generation = used;
            self.clock.push_back(kept);
        }
        victims
    }

    /// Takes mappings out of the cache, used or not, until they are as much as `need` or there are
    /// no more: no further request shall get them. They are to be unlinked and ended. Those that
    /// `spared` says stay.
    pub(crate) fn retire(
        &mut self,
        mut need: Amount,
        spared: impl Fn(SlotRef<Lease>) -> bool,
    ) -> (Vec<SlotRef<Lease>>, Amount) {
        let mut retired = Vec::new();
        let mut amount = Amount::default();
        for _ in 0..self.clock.len() {
            if need.is_zero() {
                break;
            }
            let Some(kept) = self.clock.pop_front() else {
                break;
            };
            if spared(kept.slot) {
                self.clock.push_back(kept);
                continue;
            }
            self.amount.remove(kept.bytes);
            amount.add(kept.bytes);
            need = need.less(Amount::of_one(kept.bytes));
            retired.push(kept.slot);
        }
        (retired, amount)
    }

    /// Sees to it that the first one who waits hears when one of those that are not `spared` becomes
    /// idle.
    pub(crate) fn want(&self, spared: impl Fn(SlotRef<Lease>) -> bool) -> Wanted {
        let mut wanted = Wanted::Nothing;
        for kept in self.clock.iter().filter(|kept| !spared(kept.slot)) {
            if !kept.slot.want() {
                return Wanted::Idle;
            }
            wanted = Wanted::InUse;
        }
        wanted
    }
}

/// What is kept, for somebody who waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Nothing,
    /// All of it.
    InUse,
    /// Some of it is idle.
    Idle,
}

impl Space {
    /// Gives up kept mappings that nobody uses. Whether there were any.
    pub(crate) fn make_room(&self, need: Amount) -> bool {
        let victims = self.give_up(&mut lock(&self.state), need);
        self.dismantle(victims)
    }

    /// Takes kept mappings that nobody uses out of the cache, to make room: enough for `need`, and
    /// an eighth of all, but not too many at a time. They are to be [dismantled](Self::dismantle).
    pub(crate) fn give_up(&self, state: &mut State, need: Amount) -> Vec<Victim> {
        /// Unmapping so many is a matter of a millisecond.
        const MOST: u64 = 64;

        let generation = Amount {
            mappings: state.cache.amount.mappings.div_ceil(8).min(MOST),
            bytes: 0,
        };
        self.take_victims(state, need.max(generation), usize::MAX)
    }

    fn take_victims(&self, state: &mut State, need: Amount, looks: usize) -> Vec<Victim> {
        let victims = state.cache.give_up_idle(need, looks);
        if !victims.is_empty() {
            state.recycled += victims.len() as u64;
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
        victims
    }

    /// Removes mappings that were given up. Whether there were any.
    pub(crate) fn dismantle(&self, victims: Vec<Victim>) -> bool {
        let any = !victims.is_empty();
        let mappings = victims.into_iter().filter_map(|Victim { slot, lease }| {
            self.table.unlink(slot);
            self.table.recycle(slot);
            // Temporary mappings are not shared.
            Arc::into_inner(lease.backing)?.into_mapping()
        });
        self.remove(mappings.collect());
        any
    }

    /// Lets no further request have mappings that were taken out of the cache.
    pub(crate) fn retire(&self, slots: Vec<SlotRef<Lease>>) {
        let mut mappings = Vec::new();
        for slot in slots {
            self.table.unlink(slot);
            if let Some(lease) = slot.end() {
                self.table.recycle(slot);
                mappings.extend(Arc::into_inner(lease.backing).and_then(Backing::into_mapping));
            }
        }
        self.remove(mappings);
    }

    /// Whether a mapping of this memory is small enough to be kept.
    pub(crate) fn may_keep(&self, memory: &HostMemory<'_>) -> bool {
        self.retention.mappings > 0
            && self
                .whole_pages(memory)
                .is_ok_and(|pages| pages.len() as u64 <= self.retention.bytes)
    }

    /// Lets look-ups find a temporary mapping, whose slot is live, unless that would break a limit
    /// or somebody waits for room. Whether it did; if not, the slot has been ended, and the caller's
    /// guard is the last thing that keeps the mapping.
    pub(crate) fn keep(&self, slot: SlotRef<Lease>, len: u64, ticket: Option<Ticket>) -> bool {
        /// So many of those in the way are looked at; if all are in use, this one is not kept.
        const LOOKS: usize = 64;

        // Before it is in the cache, from where another thread may take it out again.
        self.table.link(slot);
        let mut state = lock(&self.state);
        let mut victims = Vec::new();
        let mut is_kept = false;
        if !state.is_closed && state.waiters.is_first(ticket) {
            let limit = Amount {
                mappings: self.retention.mappings,
                bytes: self.retention.bytes,
            };
            let over = |state: &State| {
                let mut amount = state.cache.amount;
                amount.add(len);
                amount.less(limit)
            };
            let need = over(&state);
            if !need.is_zero() {
                victims = self.take_victims(&mut state, need, LOOKS);
            }
            is_kept = over(&state).is_zero();
        }
        if is_kept {
            let generation = self.generation.load(Ordering::Relaxed);
            state.cache.keep(slot, len, generation);
        }
        drop(state);
        self.dismantle(victims);
        if !is_kept {
            self.table.unlink(slot);
            let lease = slot.end();
            debug_assert!(lease.is_none(), "the caller has a guard");
        }
        is_kept
    }

    /// Nothing is kept any more.
    pub(crate) fn end_retention(&self) {
        let slots = {
            let mut state = lock(&self.state);
            state.is_closed = true;
            state.cache.retire(Amount::ALL, |_| false).0
        };
        self.retire(slots);
    }
}
