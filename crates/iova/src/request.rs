//! The mappings of one request: all or none, in turn.

use std::fmt;
use std::mem::ManuallyDrop;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::vec;

use crate::inner::Space;
use crate::lease::{Backing, Kind, Lease, Mapping};
use crate::state::Amount;
use crate::sync::lock;
use crate::table::{Pinned, Place};
use crate::waiters::{Alarm, Turn, Verdict};
use crate::{Direction, Error, HostMemory, Mapped, Owner};

/// One stretch of the memory that a request transfers.
#[derive(Clone)]
pub struct Segment<'fd> {
    memory: HostMemory<'fd>,
    owner: Option<(HostMemory<'fd>, Owner)>,
}

impl<'fd> Segment<'fd> {
    /// Memory that nobody keeps in place beyond the request.
    #[must_use]
    pub fn new(memory: HostMemory<'fd>) -> Self {
        Self {
            memory,
            owner: None,
        }
    }

    /// Adds what keeps the memory alive and unmoved: a clone of the `Bytes` that it belongs to, for
    /// example. If the memory is mapped for the request, the mapping may be kept for later ones,
    /// and with it the owner.
    ///
    /// For as long as memory with an owner may be mapped it must not be changed in ways that the
    /// device must not see, nor, if the direction is one in which the device writes, be relied on
    /// not to change: an owner of immutable data, or of memory that is only used for I/O.
    #[must_use]
    pub fn owned_by(self, owner: Owner) -> Self {
        let whole = self.memory;
        self.within(whole, owner)
    }

    /// As [`owned_by`](Self::owned_by), for an owner that keeps more than the request's memory:
    /// the `whole` is mapped at once, so that requests for other parts of it find it mapped. (If
    /// it is more than may be [kept](crate::Retention), or than a limit allows, only the request's
    /// memory is mapped.) For transports that need files, `whole` has the file.
    #[must_use]
    pub fn within(self, whole: HostMemory<'fd>, owner: Owner) -> Self {
        Self {
            owner: Some((whole, owner)),
            ..self
        }
    }
}

impl fmt::Debug for Segment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment")
            .field("memory", &self.memory)
            .field("owned_within", &self.owner.as_ref().map(|(whole, _)| whole))
            .finish()
    }
}

/// The mappings of one request, as a future. See [`AddressSpace::map`](crate::AddressSpace::map).
#[must_use = "futures do nothing unless polled"]
pub struct MapRequest<'fd> {
    direction: Direction,
    /// Before the turn: what is held is gone when the next in the queue is woken.
    items: Vec<Item<'fd>>,
    turn: Turn,
    thrift: Thrift,
    /// Whether the last attempt was at more than the segments themselves.
    asked_for_more: bool,
    is_over: bool,
}

/// A segment, and its mapping when it has one.
struct Item<'fd> {
    segment: Segment<'fd>,
    held: Option<Held>,
    /// The number of the plan that it is a part of, while there are plans.
    plan: usize,
}

struct Held {
    mapped: Mapped,
    /// Whether the mapping counts as one of a request.
    is_temporary: bool,
    /// The size of the mapping, if it was made by this request and is nobody else's; of one of the
    /// items, if it is that of several.
    own: Amount,
}

/// What to do without, once it turned out to be too much.
#[derive(Clone, Copy, Default)]
struct Thrift {
    /// To map more of an owner's memory than the request transfers.
    whole: bool,
    /// To map neighbours as one.
    joined: bool,
}

/// A mapping to be made, and the items that it is for.
struct Plan<'fd> {
    /// What look-ups may find, if it is kept.
    memory: HostMemory<'fd>,
    /// The whole pages around it.
    pages: HostMemory<'fd>,
    owner: Option<Owner>,
    /// What has become of it.
    made: Option<Made>,
}

/// A mapping that was made: a guard, the I/O address of its first byte, and its size if it is the
/// request's alone.
struct Made {
    pinned: Pinned<Lease>,
    iova: u64,
    own: Amount,
}

/// What was reserved and has not been used: given back, also when a mapper panics.
struct Unused<'a> {
    space: &'a Space,
    ranges: vec::IntoIter<(u64, u64)>,
}

impl Drop for Unused<'_> {
    fn drop(&mut self) {
        for (iova, len) in &mut self.ranges {
            self.space.give_back(iova, len, Kind::Temporary);
        }
    }
}

/// What an attempt at everything comes to.
enum Step {
    Done,
    Waiting,
    Failed(Error),
}

/// What an attempt at what is missing comes to.
enum Missing {
    Mapped,
    /// Others wait before us: an error if we don't.
    NotOurTurn(Option<Error>),
    /// There was no room when others had released something so often.
    Limit(Error, u64),
    /// There is no way.
    Failed(Error),
}

impl<'fd> MapRequest<'fd> {
    pub(crate) fn new(
        space: Arc<Space>,
        segments: impl IntoIterator<Item = Segment<'fd>>,
        direction: Direction,
    ) -> Self {
        let items = segments.into_iter().map(|segment| Item {
            segment,
            held: None,
            plan: 0,
        });
        Self {
            direction,
            items: items.collect(),
            turn: Turn::new(space),
            thrift: Thrift::default(),
            asked_for_more: false,
            is_over: false,
        }
    }

    /// Serves the request now or not at all.
    pub(crate) fn now(mut self) -> Result<Vec<Mapped>, Error> {
        match self.attempt(None) {
            Step::Done => Ok(self.finish()),
            Step::Failed(error) => Err(error),
            Step::Waiting => unreachable!("there is no waker to wait with"),
        }
    }

    /// Maps what is not mapped yet. Without a waker, what would wait fails.
    fn attempt(&mut self, waker: Option<&Waker>) -> Step {
        loop {
            if let Err(error) = self.look_up() {
                return Step::Failed(error);
            }
            if self.items.iter().all(|item| item.held.is_some()) {
                return Step::Done;
            }
            let mut alarm = Alarm::new(waker);
            let (error, releases) = match self.map_missing(&mut alarm) {
                Missing::Mapped => continue,
                Missing::NotOurTurn(None) => {
                    self.let_go(|_| false);
                    return Step::Waiting;
                }
                Missing::NotOurTurn(Some(error)) | Missing::Failed(error) => {
                    return Step::Failed(error);
                }
                Missing::Limit(error, releases) => (error, releases),
            };
            if self.saves(&error) {
                continue;
            }
            match self.make_room(error, releases, alarm) {
                Verdict::Retry => {}
                Verdict::Wait => {
                    // What we found rather than made may be what we wait for: a mapping that is
                    // about to go.
                    self.let_go(|held| !held.own.is_zero());
                    return Step::Waiting;
                }
                Verdict::Queue => {
                    self.let_go(|_| false);
                    return Step::Waiting;
                }
                Verdict::Fail(error) => return Step::Failed(error),
            }
        }
    }

    fn look_up(&mut self) -> Result<(), Error> {
        let space = self.turn.space();
        for item in self.items.iter_mut().filter(|item| item.held.is_none()) {
            let memory = &item.segment.memory;
            // Refuses what can't be.
            space.whole_pages(memory)?;
            let first = memory.addr().addr().get();
            let found = space.find(first, memory.last(), self.direction);
            item.held = found.map(|found| Held {
                mapped: Mapped::new(found.pinned, found.iova, memory.len()),
                is_temporary: found.temporary,
                own: Amount::default(),
            });
        }
        Ok(())
    }

    /// Maps what is missing, if it is our turn. If not, we queue up, given a waker.
    fn map_missing(&mut self, alarm: &mut Alarm) -> Missing {
        let space = Arc::clone(self.turn.space());
        let mut plans = match self.plans() {
            Ok(plans) => plans,
            Err(error) => return Missing::Failed(error),
        };
        let needed = plans.len() as u64;
        let in_all = needed + self.held_mappings();
        let mut reserved = Vec::with_capacity(plans.len());
        let mut releases;
        {
            let mut state = lock(&space.state);
            if let Err(queued) = self.turn.check(&mut state, alarm) {
                return Missing::NotOurTurn(queued);
            }
            releases = state.releases;
            if let Err(error) = state.check_ever(in_all, space.max_mappings) {
                return Missing::Failed(error);
            }
            if let Err(error) = state.check_now(needed, space.max_mappings) {
                return Missing::Limit(error, releases);
            }
            for plan in &plans {
                match space.reserve(&mut state, &plan.pages, Kind::Temporary) {
                    Ok(iova) => reserved.push((iova, plan.pages.len() as u64)),
                    Err(error) => {
                        for (iova, len) in reserved {
                            state.give_back(iova, len, Kind::Temporary);
                        }
                        return Missing::Limit(error, releases);
                    }
                }
            }
        }

        let mut unused = Unused {
            space: &space,
            ranges: reserved.into_iter(),
        };
        let mut failure = None;
        for (plan, (iova, _)) in plans.iter_mut().zip(&mut unused.ranges) {
            // SAFETY: the caller of `AddressSpace::map` answers for the memory: with an owner until
            // that is dropped, which is after the mapping was removed, and without one until the
            // guard or the request is dropped, which keep the mapping. (If it can't be removed
            // then, the caller's promise is that the device is done with it.)
            let mapped =
                unsafe { space.carry_out(iova, &plan.pages, self.direction, Kind::Temporary) };
            match mapped {
                Ok(iova) => plan.made = Some(self.made(plan, iova)),
                Err(error) => {
                    // What was reserved for this one has been given back.
                    releases += 1;
                    failure = Some(error);
                    break;
                }
            }
        }
        releases += unused.ranges.len() as u64;
        drop(unused);
        self.hold(&mut plans);
        match failure {
            None => Missing::Mapped,
            Some(error) if error.is_limit() => Missing::Limit(error, releases),
            Some(error) => Missing::Failed(error),
        }
    }

    /// The mappings to be made for what is missing.
    fn plans(&mut self) -> Result<Vec<Plan<'fd>>, Error> {
        let space = self.turn.space();
        let mut plans: Vec<Plan<'fd>> = Vec::new();
        self.asked_for_more = false;
        for item in self.items.iter_mut().filter(|item| item.held.is_none()) {
            let Segment { memory, owner } = &item.segment;
            let mut extent = *memory;
            if let Some((whole, _)) = owner {
                if !whole.holds(memory) {
                    return Err(Error::OutsideOfOwner {
                        addr: memory.addr().addr().get(),
                        len: memory.len(),
                    });
                }
                if !self.thrift.whole && space.may_keep(whole) {
                    extent = *whole;
                }
            }
            let may_grow = owner.is_none() && !self.thrift.joined;
            if let Some((plan, grew)) = join(&mut plans, &extent, owner.is_some(), may_grow) {
                item.plan = plan;
                self.asked_for_more |= grew;
                continue;
            }
            item.plan = plans.len();
            self.asked_for_more |= extent.len() > memory.len();
            plans.push(Plan {
                memory: extent,
                // Once all that is to be joined is known.
                pages: extent,
                owner: owner.as_ref().map(|(_, owner)| Arc::clone(owner)),
                made: None,
            });
        }
        for plan in &mut plans {
            plan.pages = space.whole_pages(&plan.memory)?;
        }
        Ok(plans)
    }

    /// What was just mapped; others may find it if it may be kept.
    fn made(&self, plan: &Plan<'fd>, iova: u64) -> Made {
        let space = self.turn.space();
        let len = plan.pages.len() as u64;
        let may_be_kept = plan.owner.is_some() && space.may_keep(&plan.memory);
        let mapping = Mapping {
            iova,
            len,
            kind: Kind::Temporary,
            direction: self.direction,
            owner: plan.owner.clone().map(ManuallyDrop::new),
            removal: OnceLock::new(),
            last_share: None,
        };
        let lease = Box::new(Lease {
            backing: Arc::new(Backing::new(Arc::clone(space), mapping)),
            share: None,
        });
        let first = plan.memory.addr().addr().get();
        let place = Place {
            first,
            last: plan.memory.last(),
            iova: iova + space.offset(&plan.memory),
            direction: self.direction,
            temporary: true,
        };
        let slot = space.table.admit(place, lease, may_be_kept, 1);
        // SAFETY: the guard that the slot began with.
        let pinned = unsafe { Pinned::new(slot) };
        let is_kept = may_be_kept && space.keep(slot, len, self.turn.ticket());
        let own = if is_kept {
            Amount::default()
        } else {
            Amount::of_one(len)
        };
        Made {
            pinned,
            iova: place.iova,
            own,
        }
    }

    /// Gives the items the mappings that were made for them.
    fn hold(&mut self, plans: &mut [Plan<'fd>]) {
        for item in self.items.iter_mut().filter(|item| item.held.is_none()) {
            let plan = &mut plans[item.plan];
            let Some(made) = &mut plan.made else { continue };
            let memory = &item.segment.memory;
            let offset = memory.addr().addr().get() - plan.memory.addr().addr().get();
            let iova = made.iova + offset as u64;
            item.held = Some(Held {
                mapped: Mapped::new(made.pinned.clone(), iova, memory.len()),
                is_temporary: true,
                own: std::mem::take(&mut made.own),
            });
        }
    }

    /// Does without something that may be too much, if there is such.
    fn saves(&mut self, error: &Error) -> bool {
        let before = self.thrift;
        if !self.asked_for_more {
            return false;
        }
        match error {
            Error::MemoryLimit { .. } => self.thrift.whole = true,
            Error::OutOfAddresses { .. } => {
                self.thrift = Thrift {
                    whole: true,
                    joined: true,
                };
            }
            _ => {}
        }
        (before.whole, before.joined) != (self.thrift.whole, self.thrift.joined)
    }

    fn make_room(&mut self, error: Error, releases: u64, alarm: Alarm) -> Verdict {
        let mut own = Amount::default();
        let mut slots = Vec::with_capacity(self.items.len());
        for held in self.held() {
            own = own.plus(held.own);
            slots.push(held.mapped.slot());
        }
        let spared = |slot| slots.contains(&slot);
        self.turn.make_room(error, releases, own, spared, alarm)
    }

    /// Lets go of what we hold and need not keep while we wait: others may be waiting for it.
    fn let_go(&mut self, keep: impl Fn(&Held) -> bool) {
        let kept: Vec<_> = self
            .held()
            .filter(|held| keep(held))
            .map(|held| held.mapped.slot())
            .collect();
        for item in &mut self.items {
            item.held = item
                .held
                .take()
                .filter(|held| kept.contains(&held.mapped.slot()));
        }
    }

    fn held(&self) -> impl Iterator<Item = &Held> {
        self.items.iter().filter_map(|item| item.held.as_ref())
    }

    /// How many temporary mappings we hold.
    fn held_mappings(&self) -> u64 {
        let temporary = self.held().filter(|held| held.is_temporary);
        let mut slots: Vec<_> = temporary.map(|held| held.mapped.slot().address()).collect();
        slots.sort_unstable();
        slots.dedup();
        slots.len() as u64
    }

    fn finish(&mut self) -> Vec<Mapped> {
        let guards = self.items.drain(..).filter_map(|item| item.held);
        guards.map(|held| held.mapped).collect()
    }
}

/// Adds this memory to one of the last plans, if one mapping can be for both: the number of that, and
/// whether it had to grow.
fn join<'fd>(
    plans: &mut [Plan<'fd>],
    memory: &HostMemory<'fd>,
    has_owner: bool,
    may_grow: bool,
) -> Option<(usize, bool)> {
    /// Looking further would take longer than it is worth.
    const LOOKS: usize = 32;

    let candidates = plans.iter_mut().enumerate().rev().take(LOOKS);
    for (number, plan) in candidates.filter(|(_, plan)| plan.owner.is_some() == has_owner) {
        if plan.memory.holds(memory) {
            return Some((number, false));
        }
        if may_grow && let Some(longer) = plan.memory.extended_by(memory) {
            plan.memory = longer;
            return Some((number, true));
        }
    }
    None
}

impl Future for MapRequest<'_> {
    type Output = Result<Vec<Mapped>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        if this.is_over {
            // As with most futures, polling it again after it resolved never resolves.
            return Poll::Pending;
        }
        let result = match this.attempt(Some(cx.waker())) {
            Step::Waiting => return Poll::Pending,
            Step::Done => Ok(this.finish()),
            Step::Failed(error) => Err(error),
        };
        this.is_over = true;
        this.items.clear();
        this.turn.end();
        Poll::Ready(result)
    }
}

impl fmt::Debug for MapRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MapRequest")
            .field("direction", &self.direction)
            .field("segments", &self.items.len())
            .field("held", &self.held().count())
            .field("turn", &self.turn)
            .finish_non_exhaustive()
    }
}
