//! One mapping as look-ups see it, and who uses it.
//!
//! A slot's memory stays a slot for as long as its table lives; when a mapping has gone, another
//! one gets the slot. So whoever holds an old pointer to it reads a slot, if maybe another
//! mapping's, and can find out: it [pins](Slot::pin) the slot and then looks what is in it.
//!
//! ```text
//!  state:  63 ........ 45  44 ........ 5    4      3     2    1    0
//!          tenancy         guards         wanted  temp  wr   rd  live
//! ```
//!
//! * **tenancy**: another number for each mapping that has the slot, so that who read it before
//!   it changed hands does not pin the next one. (A hit doesn't rest on that; it would only be a
//!   surprise if a look-up were the last to use somebody else's mapping, and unmapped it.)
//! * **wanted**: somebody waits for room, and wants to know when there is no guard any more.
//! * **live**: there is a registration, or the address space keeps the mapping for later. Only
//!   then can the number of guards rise from what others see.
//! * The tenant leaves when the slot is not live and has no guard, which happens once: by clearing
//!   "live" with no guard left, or by dropping the last guard with "live" cleared.

use std::ptr::NonNull;

use crate::Direction;
use crate::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

const LIVE: u64 = 1 << 0;
/// The device may read.
const READ: u64 = 1 << 1;
/// The device may write.
const WRITE: u64 = 1 << 2;
/// A hit is to be noted in `used`.
const TEMPORARY: u64 = 1 << 3;
const WANTED: u64 = 1 << 4;
const GUARD: u64 = 1 << 5;
const TENANCY: u64 = 1 << 45;
/// All guards.
const GUARDS: u64 = TENANCY - GUARD;
/// Set when there are more guards than anybody can have but by leaking them. No more are made then,
/// or they would run into the tenancy.
const TOO_MANY: u64 = TENANCY >> 1;

/// What has a slot while it is mapped.
pub(crate) trait Tenant: Sized {
    /// What [`idle`](Self::idle) needs.
    type Notify;

    /// Called once, by whoever ended the last use of `slot`. The slot is linked nowhere any more,
    /// and is to be given to [`Table::recycle`](super::Table::recycle).
    fn leave(self: Box<Self>, slot: SlotRef<Self>);

    /// Called by whoever dropped the last guard of a mapping that is live and wanted. The tenant
    /// may have left since; what `notify` gave was made while it was there.
    fn idle(notify: Self::Notify);

    /// What [`idle`](Self::idle) needs, taken while the tenant is sure to be there.
    fn notify(&self) -> Self::Notify;
}

/// One mapping: the host bytes `first..=last`, and where the device finds them.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Slot<L> {
    state: AtomicU64,
    first: AtomicUsize,
    last: AtomicUsize,
    iova: AtomicU64,
    /// The generation in which a temporary mapping was last looked up.
    used: AtomicU32,
    tenant: AtomicPtr<L>,
}

/// What is mapped where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) first: usize,
    pub(crate) last: usize,
    /// The I/O address of byte `first`.
    pub(crate) iova: u64,
    pub(crate) direction: Direction,
    pub(crate) temporary: bool,
}

/// The accesses that a slot must allow, as bits of its state.
fn access(direction: Direction) -> u64 {
    match direction {
        Direction::ToDevice => READ,
        Direction::FromDevice => WRITE,
        Direction::Bidirectional => READ | WRITE,
    }
}

impl<L> Slot<L> {
    pub(super) fn vacant() -> Self {
        Self {
            state: AtomicU64::new(0),
            first: AtomicUsize::new(0),
            last: AtomicUsize::new(0),
            iova: AtomicU64::new(0),
            used: AtomicU32::new(0),
            tenant: AtomicPtr::new(std::ptr::null_mut()),
        }
    }
}

/// A slot of a table that is still there.
///
/// Who has one answers for that: a table keeps its slots until it is dropped, and what has a slot
/// in use (a tenant) keeps the table.
#[derive(Debug)]
pub(crate) struct SlotRef<L>(NonNull<Slot<L>>);

impl<L> Clone for SlotRef<L> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<L> Copy for SlotRef<L> {}

impl<L> PartialEq for SlotRef<L> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

// SAFETY: a reference to atomics, and through them to the tenant, which may be used and dropped in
// any thread.
unsafe impl<L: Send + Sync> Send for SlotRef<L> {}
// SAFETY: as for Send.
unsafe impl<L: Send + Sync> Sync for SlotRef<L> {}

impl<L> SlotRef<L> {
    /// # Safety
    ///
    /// The slot is one of a table, which outlives this value's uses.
    pub(super) unsafe fn new(slot: NonNull<Slot<L>>) -> Self {
        Self(slot)
    }

    pub(super) fn as_ptr(self) -> NonNull<Slot<L>> {
        self.0
    }

    /// A number that tells slots apart.
    pub(crate) fn address(self) -> usize {
        self.0.addr().get()
    }

    fn slot(&self) -> &Slot<L> {
        // SAFETY: the table is still there (`new`), and slots are only ever shared.
        unsafe { self.0.as_ref() }
    }

    /// Moves a tenant in. `guards` are there from the beginning; with `live` there can be more.
    pub(super) fn move_in(self, place: Place, tenant: Box<L>, live: bool, guards: u64) {
        let slot = self.slot();
        // Published by the state, which is not live before.
        slot.first.store(place.first, Ordering::Relaxed);
        slot.last.store(place.last, Ordering::Relaxed);
        slot.iova.store(place.iova, Ordering::Relaxed);
        slot.tenant.store(Box::into_raw(tenant), Ordering::Relaxed);
        let before = slot.state.load(Ordering::Relaxed);
        let tenancy = (before & !(TENANCY - 1)).wrapping_add(TENANCY);
        let mut state = tenancy | access(place.direction) | (guards * GUARD);
        if live {
            state |= LIVE;
        }
        if place.temporary {
            state |= TEMPORARY;
        }
        slot.state.store(state, Ordering::Release);
    }

    /// The host bytes of the mapping. For whoever keeps the tenant here.
    pub(crate) fn bytes(self) -> (usize, usize) {
        let slot = self.slot();
        (
            slot.first.load(Ordering::Relaxed),
            slot.last.load(Ordering::Relaxed),
        )
    }

    /// How many guards there are.
    pub(crate) fn guards(self) -> u64 {
        guards(self.slot().state.load(Ordering::Relaxed)) / GUARD
    }

    /// Asks that [`Tenant::idle`] be called when there is no guard any more. Whether there is one
    /// now; if not, it is not called.
    ///
    /// The slot is live, and the caller is the only one to end that.
    pub(crate) fn want(self) -> bool {
        guards(self.slot().state.fetch_or(WANTED, Ordering::Relaxed)) > 0
    }

    /// The generation in which it was last looked up.
    pub(crate) fn used(self) -> u32 {
        self.slot().used.load(Ordering::Relaxed)
    }

    pub(crate) fn set_used(self, generation: u32) {
        self.slot().used.store(generation, Ordering::Relaxed);
    }

    /// The tenant.
    ///
    /// # Safety
    ///
    /// It can't leave while the result is used: the slot is live, and the caller is the only one
    /// to end that, or the caller has a guard.
    pub(crate) unsafe fn tenant<'a>(self) -> &'a L {
        let tenant = self.slot().tenant.load(Ordering::Relaxed);
        // SAFETY: a slot that is live or has a guard has a tenant, boxed by `move_in`; it stays by
        // the caller's word.
        unsafe { &*tenant }
    }

    /// One more guard, of a slot that has one or is kept live by the caller.
    pub(crate) fn add_guard(self) {
        let before = self.slot().state.fetch_add(GUARD, Ordering::Relaxed);
        if before & TOO_MANY != 0 {
            std::process::abort();
        }
    }

    /// A guard, if the slot is live, holds all of `first..=last` and allows `direction`.
    ///
    /// The slot may be anyone's by now, see the module's documentation.
    #[inline]
    pub(super) fn pin(self, first: usize, last: usize, direction: Direction) -> Option<Found<L>>
    where
        L: Tenant,
    {
        let slot = self.slot();
        let holds = || {
            slot.first.load(Ordering::Relaxed) <= first && last <= slot.last.load(Ordering::Relaxed)
        };
        let needed = LIVE | access(direction);
        let mut state = slot.state.load(Ordering::Acquire);
        loop {
            if state & (needed | TOO_MANY) != needed || !holds() {
                return None;
            }
            let mut next = state + GUARD;
            if state & WANTED != 0 && guards(state) == 0 {
                // Whoever wanted there to be none has been told.
                next &= !WANTED;
            }
            match slot.state.compare_exchange_weak(
                state,
                next,
                Ordering::Acquire,
                Ordering::Acquire,
            ) {
                Ok(_) => break,
                Err(now) => state = now,
            }
        }
        let pinned = Pinned(self);
        // Only now it can't become another mapping's any more.
        holds().then(|| {
            let offset = first - slot.first.load(Ordering::Relaxed);
            Found {
                iova: slot.iova.load(Ordering::Relaxed) + offset as u64,
                temporary: state & TEMPORARY != 0,
                pinned,
            }
        })
    }

    /// Lets no new guards be made. Gives the tenant if there is none now.
    pub(crate) fn end(self) -> Option<Box<L>> {
        let before = self.slot().state.fetch_and(!LIVE, Ordering::AcqRel);
        debug_assert!(before & LIVE != 0, "ended twice");
        // SAFETY: not live, and without a guard: this was the one transition to that.
        (guards(before) == 0).then(|| unsafe { self.take_tenant() })
    }

    /// As [`end`](Self::end), but only if there is no guard.
    pub(crate) fn end_if_idle(self) -> Option<Box<L>> {
        let slot = self.slot();
        let mut state = slot.state.load(Ordering::Relaxed);
        loop {
            if guards(state) > 0 {
                return None;
            }
            debug_assert!(state & LIVE != 0, "ended twice");
            match slot.state.compare_exchange_weak(
                state,
                state & !LIVE,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                // SAFETY: as in `end`.
                Ok(_) => return Some(unsafe { self.take_tenant() }),
                Err(now) => state = now,
            }
        }
    }

    /// # Safety
    ///
    /// The caller made the slot neither live nor guarded, and calls this once for that.
    unsafe fn take_tenant(self) -> Box<L> {
        let tenant = self
            .slot()
            .tenant
            .swap(std::ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: boxed by `move_in`, and nobody else can reach it any more.
        unsafe { Box::from_raw(tenant) }
    }
}

/// What a look-up found.
#[derive(Debug)]
pub(crate) struct Found<L: Tenant> {
    pub(crate) pinned: Pinned<L>,
    /// The I/O address of the first byte that was looked for.
    pub(crate) iova: u64,
    pub(crate) temporary: bool,
}

/// A guard: as long as it lives, the tenant stays.
#[derive(Debug)]
pub(crate) struct Pinned<L: Tenant>(SlotRef<L>);

impl<L: Tenant> Pinned<L> {
    /// # Safety
    ///
    /// One of the slot's guards is counted for this value and for nothing else.
    pub(crate) unsafe fn new(slot: SlotRef<L>) -> Self {
        Self(slot)
    }

    pub(crate) fn slot(&self) -> SlotRef<L> {
        self.0
    }

    pub(crate) fn tenant(&self) -> &L {
        // SAFETY: this is a guard, and it lives as long as the result.
        unsafe { self.0.tenant() }
    }
}

impl<L: Tenant> Clone for Pinned<L> {
    fn clone(&self) -> Self {
        self.0.add_guard();
        Self(self.0)
    }
}

impl<L: Tenant> Drop for Pinned<L> {
    #[inline]
    fn drop(&mut self) {
        let slot = self.0.slot();
        if slot.state.load(Ordering::Relaxed) & TEMPORARY != 0 {
            return self.drop_temporary();
        }
        // From here on the slot may be gone with its table, unless the tenant, which keeps that,
        // has become ours.
        let before = slot.state.fetch_sub(GUARD, Ordering::AcqRel);
        if before & LIVE == 0 && guards(before) == GUARD {
            self.leave();
        }
    }
}

impl<L: Tenant> Pinned<L> {
    /// The drop of a guard that somebody may want to be the last one.
    fn drop_temporary(&self) {
        let slot = self.0.slot();
        let mut state = slot.state.load(Ordering::Relaxed);
        let mut notify = None;
        loop {
            if state & WANTED != 0 && notify.is_none() {
                notify = Some(self.tenant().notify());
            }
            // Not subtracted unseen: it must not become wanted between the look and that.
            match slot.state.compare_exchange_weak(
                state,
                state - GUARD,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => break,
                Err(now) => state = now,
            }
        }
        // As above, from here on.
        if guards(state) != GUARD {
            return;
        }
        if state & LIVE == 0 {
            self.leave();
        } else if let Some(notify) = notify {
            L::idle(notify);
        }
    }

    /// Lets the tenant leave, which was live no more and had this as its last guard.
    #[cold]
    fn leave(&self) {
        // SAFETY: not live, and without a guard: this was the one transition to that.
        let tenant = unsafe { self.0.take_tenant() };
        tenant.leave(self.0);
    }
}

fn guards(state: u64) -> u64 {
    state & GUARDS
}
