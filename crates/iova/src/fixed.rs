//! Registered memory: how it is mapped, shared, and unmapped again.

use std::fmt;
use std::mem::ManuallyDrop;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use crate::inner::Space;
use crate::lease::{Backing, Kind, Lease, Mapping, Removal, Share, Unregister};
use crate::state::{Amount, State};
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::table::{Pinned, Place, SlotRef, Tenant};
use crate::waiters::{Alarm, Turn, Verdict};
use crate::{Direction, Error, HostMemory, Mapped, Owner};

/// A fixed mapping: memory that stays reachable for the device, and that
/// [`AddressSpace::look_up`](crate::AddressSpace::look_up) finds, until this is dropped.
///
/// Dropping it unregisters the memory: look-ups no longer find it, and as soon as the last
/// [`Mapped`] guard of it is gone (at once, if there is none) it is unmapped and its owner dropped.
/// Both happen in the thread that drops the last of them. [`unregister`](Self::unregister) is for
/// those who want to know when that is.
#[must_use = "the memory is unregistered when this is dropped"]
pub struct FixedMapping {
    /// Kept live by this value.
    slot: SlotRef<Lease>,
    iova: u64,
    len: usize,
}

impl FixedMapping {
    /// The I/O virtual address of the first byte.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Length in bytes, as registered; never 0.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// A guard for the whole of it, as a look-up would give.
    pub fn guard(&self) -> Mapped {
        self.slot.add_guard();
        // SAFETY: that guard.
        let pinned = unsafe { Pinned::new(self.slot) };
        Mapped::new(pinned, self.iova, self.len)
    }

    /// How many guards of this registration there are: requests that still use the memory.
    #[must_use]
    pub fn guards(&self) -> u64 {
        self.slot.guards()
    }

    /// Unregisters the memory, as dropping this does. The future resolves when the device can no
    /// longer reach it on behalf of this registration, and the owner was dropped: when the last
    /// guard is gone, and the last registration that shares the mapping made for this one.
    ///
    /// # Errors
    ///
    /// The future gives [`Error::Unmap`](crate::Error::Unmap) if the mapping could not be removed.
    /// Owner and addresses are leaked then.
    ///
    /// # Cancel safety
    ///
    /// The memory is unregistered by the call itself. Dropping the future changes nothing.
    pub fn unregister(self) -> Unregister {
        let removal = Arc::new(Removal::new());
        // SAFETY: this value keeps the slot live.
        unsafe { self.slot.tenant() }.on_removal(Arc::clone(&removal));
        drop(self);
        Unregister { removal }
    }
}

impl Drop for FixedMapping {
    fn drop(&mut self) {
        {
            // SAFETY: this value keeps the slot live, until it is ended below.
            let backing = &unsafe { self.slot.tenant() }.backing;
            backing.space.table.unlink(self.slot);
            let mut state = lock(&backing.space.state);
            if let Some(mapping) = backing.mapping()
                && backing.registrations.fetch_sub(1, Ordering::Relaxed) == 1
            {
                state.registered.remove(mapping.len);
            }
        }
        if let Some(lease) = self.slot.end() {
            lease.leave(self.slot);
        }
    }
}

impl fmt::Debug for FixedMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "FixedMapping({:#x} bytes at IOVA {:#x})",
            self.len, self.iova
        )
    }
}

/// A registration under way, as a future. See
/// [`AddressSpace::register`](crate::AddressSpace::register).
#[must_use = "futures do nothing unless polled"]
pub struct Register<'fd> {
    turn: Turn,
    memory: HostMemory<'fd>,
    direction: Direction,
    /// Until this resolves.
    owner: Option<Owner>,
}

impl<'fd> Register<'fd> {
    pub(crate) fn new(
        space: Arc<Space>,
        memory: HostMemory<'fd>,
        direction: Direction,
        owner: Owner,
    ) -> Self {
        Self {
            turn: Turn::new(space),
            memory,
            direction,
            owner: Some(owner),
        }
    }

    /// Registers now or not at all, whoever waits.
    pub(crate) fn now(self) -> Result<FixedMapping, Error> {
        let space = self.turn.space();
        let pages = space.whole_pages(&self.memory)?;
        loop {
            if let Some(fixed) = self.share() {
                return Ok(fixed);
            }
            let reserved = self.reserve(&mut lock(&space.state), &pages);
            match reserved.and_then(|iova| self.map(iova, &pages)) {
                Ok(fixed) => return Ok(fixed),
                Err(error) if error.is_limit() && space.make_room(error.need()) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn attempt(&mut self, waker: &Waker) -> Poll<Result<FixedMapping, Error>> {
        let space = Arc::clone(self.turn.space());
        let pages = match space.whole_pages(&self.memory) {
            Ok(pages) => pages,
            Err(error) => return Poll::Ready(Err(error)),
        };
        loop {
            if let Some(fixed) = self.share() {
                return Poll::Ready(Ok(fixed));
            }
            let mut alarm = Alarm::new(Some(waker));
            let (reserved, mut releases) = {
                let mut state = lock(&space.state);
                if let Err(error) = self.turn.check(&mut state, &mut alarm) {
                    return error.map_or(Poll::Pending, |error| Poll::Ready(Err(error)));
                }
                if let Err(error) = state.check_ever(1, space.max_mappings) {
                    return Poll::Ready(Err(error));
                }
                (self.reserve(&mut state, &pages), state.releases)
            };
            let mapped = reserved.and_then(|iova| {
                let mapped = self.map(iova, &pages);
                // What was reserved has been given back.
                releases += u64::from(mapped.is_err());
                mapped
            });
            let error = match mapped {
                Ok(fixed) => return Poll::Ready(Ok(fixed)),
                Err(error) if error.is_limit() => error,
                Err(error) => return Poll::Ready(Err(error)),
            };
            let own = Amount::default();
            match self.turn.make_room(error, releases, own, |_| false, alarm) {
                Verdict::Retry => {}
                Verdict::Wait | Verdict::Queue => return Poll::Pending,
                Verdict::Fail(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn reserve(&self, state: &mut State, pages: &HostMemory<'_>) -> Result<u64, Error> {
        let space = self.turn.space();
        state.check_now(1, space.max_mappings)?;
        space.reserve(state, pages, Kind::Fixed)
    }

    fn map(&self, iova: u64, pages: &HostMemory<'_>) -> Result<FixedMapping, Error> {
        let space = self.turn.space();
        // SAFETY: the caller of `AddressSpace::register` keeps the memory in place until the owner
        // is dropped, which is after the mapping was removed.
        let iova = unsafe { space.carry_out(iova, pages, self.direction, Kind::Fixed) }?;
        Ok(self.found(iova, pages.len() as u64))
    }

    /// The registration of what was just mapped.
    fn found(&self, iova: u64, len: u64) -> FixedMapping {
        let space = self.turn.space();
        let mapping = Mapping {
            iova,
            len,
            kind: Kind::Fixed,
            direction: self.direction,
            owner: self.owner.clone().map(ManuallyDrop::new),
            removal: OnceLock::new(),
            last_share: None,
        };
        let lease = Lease {
            backing: Arc::new(Backing::new(Arc::clone(space), mapping)),
            share: None,
        };
        self.publish(iova + space.offset(&self.memory), lease)
    }

    /// A registration of memory within memory that is registered in the same direction.
    fn share(&self) -> Option<FixedMapping> {
        let (first, last) = (self.memory.addr().addr().get(), self.memory.last());
        let table = &self.turn.space().table;
        let found = table.find(first, last, self.direction, |found| {
            let mapping = found.pinned.tenant().backing.mapping();
            mapping.is_some_and(|mapping| {
                (mapping.kind, mapping.direction) == (Kind::Fixed, self.direction)
            })
        })?;
        let lease = Lease {
            backing: Arc::clone(&found.pinned.tenant().backing),
            share: Some(Share {
                owner: self.owner.clone()?,
                removal: OnceLock::new(),
            }),
        };
        Some(self.publish(found.iova, lease))
    }

    /// Lets look-ups find the memory, whose first byte is mapped at `iova`.
    fn publish(&self, iova: u64, lease: Lease) -> FixedMapping {
        let space = self.turn.space();
        // Who waits for the mapping to go must know that it stays.
        space.change(|state| {
            if let Some(mapping) = lease.backing.mapping()
                && lease.backing.registrations.fetch_add(1, Ordering::Relaxed) == 0
            {
                state.registered.add(mapping.len);
            }
        });
        let place = Place {
            first: self.memory.addr().addr().get(),
            last: self.memory.last(),
            iova,
            direction: self.direction,
            temporary: false,
        };
        let slot = space.table.admit(place, Box::new(lease), true, 0);
        space.table.link(slot);
        FixedMapping {
            slot,
            iova,
            len: self.memory.len(),
        }
    }
}

impl Future for Register<'_> {
    type Output = Result<FixedMapping, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        if this.owner.is_none() {
            // As with most futures, polling it again after it resolved never resolves.
            return Poll::Pending;
        }
        let polled = this.attempt(cx.waker());
        if polled.is_ready() {
            this.owner = None;
            this.turn.end();
        }
        polled
    }
}

impl fmt::Debug for Register<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Register")
            .field("memory", &self.memory)
            .field("direction", &self.direction)
            .finish_non_exhaustive()
    }
}
