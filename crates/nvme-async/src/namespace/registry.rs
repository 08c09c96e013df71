//! Which namespaces there are and who has them open, so that changes reach all handles.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nvme_spec::identify::IdentifyNamespace;

use super::NamespaceInner;
use super::live::{Condition, Geometry};
use crate::controller::NamespaceChange;

/// A namespace is another one, by the identifiers that are never used twice.
const IS_ANOTHER: &str = "is another namespace by its NGUID or EUI64";

/// What is known of the namespaces of one controller.
///
/// Whoever asks the controller takes a ticket before, and what it answers counts only if nothing
/// with a later ticket was applied: answers may overtake each other. A change that an answer misses
/// is reported by an event, which leads to a question with a later ticket.
#[derive(Default)]
pub(crate) struct Registry {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    last_ticket: Ticket,
    /// Those that are active, once that is known, and the ticket of the question.
    active: Option<BTreeSet<u32>>,
    active_ticket: Ticket,
    namespaces: HashMap<u32, Entry>,
}

/// The order of questions to the controller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

#[derive(Default)]
struct Entry {
    ticket: Ticket,
    identify: Option<(Arc<IdentifyNamespace>, Geometry)>,
    handle: Weak<NamespaceInner>,
}

impl Entry {
    /// Tells the handles that the namespace is not active. Returns what they share, to be dropped
    /// without the lock: it may be the last one, with which the controller goes.
    fn set_gone(&mut self, ticket: Ticket) -> Option<Arc<NamespaceInner>> {
        let handle = self.handle.upgrade();
        if self.ticket <= ticket {
            self.ticket = ticket;
            self.identify = None;
            if let Some(handle) = &handle {
                handle.live.set_gone();
            }
        }
        handle
    }
}

impl Registry {
    /// To be taken before the controller is asked.
    pub(crate) fn ticket(&self) -> Ticket {
        let mut known = self.lock();
        known.last_ticket.0 += 1;
        known.last_ticket
    }

    /// Whether someone has asked after this ticket was taken.
    pub(crate) fn is_stale(&self, ticket: Ticket) -> bool {
        self.lock().last_ticket != ticket
    }

    /// Whether the namespace was active when that was asked last.
    pub(crate) fn is_active(&self, nsid: u32) -> bool {
        let known = self.lock();
        known
            .active
            .as_ref()
            .is_some_and(|active| active.contains(&nsid))
    }

    /// The active namespaces that are open.
    pub(crate) fn open(&self) -> Vec<u32> {
        let known = self.lock();
        let open = known.namespaces.iter().filter_map(|(&nsid, entry)| {
            let is_open = entry.handle.strong_count() > 0;
            // One that is not active has nothing to be looked at.
            (is_open
                && known
                    .active
                    .as_ref()
                    .is_some_and(|active| active.contains(&nsid)))
            .then_some(nsid)
        });
        open.collect()
    }

    /// Takes note of the active namespaces, and returns which came and which went since the last
    /// time. At the first time nothing is known to have come.
    pub(crate) fn set_active(&self, ticket: Ticket, active: &[u32]) -> Arrivals {
        let mut known = self.lock();
        let mut arrivals = Arrivals::default();
        if ticket < known.active_ticket {
            return arrivals;
        }
        known.active_ticket = ticket;
        let now: BTreeSet<u32> = active.iter().copied().collect();
        let before = known.active.replace(now.clone());
        if let Some(before) = &before {
            arrivals.came = now.difference(before).copied().collect();
            arrivals.went = before.difference(&now).copied().collect();
        }
        let mut handles = Vec::new();
        known.namespaces.retain(|nsid, entry| {
            if now.contains(nsid) {
                return true;
            }
            let handle = entry.set_gone(ticket);
            let is_open = handle.is_some();
            handles.extend(handle);
            is_open
        });
        drop(known);
        drop(handles);
        arrivals
    }

    /// Takes note of what the controller says of an active namespace, and updates its handles.
    /// Returns what has changed, if anything has.
    pub(crate) fn apply(
        &self,
        nsid: u32,
        ticket: Ticket,
        identify: Arc<IdentifyNamespace>,
        geometry: Geometry,
    ) -> Option<NamespaceChange> {
        let mut known = self.lock();
        let entry = known.namespaces.entry(nsid).or_default();
        if ticket < entry.ticket {
            return None;
        }
        entry.ticket = ticket;
        let before = entry.identify.replace((identify.clone(), geometry));
        let change = match &before {
            Some((data, _)) if !is_same_namespace(data, &identify) => {
                Some(NamespaceChange::Replaced)
            }
            Some((_, old)) if !old.has_format_of(&geometry) => Some(NamespaceChange::Reformatted {
                block_size: geometry.block_size,
                metadata: geometry.metadata,
            }),
            Some((_, old)) if old.blocks != geometry.blocks => Some(NamespaceChange::Resized {
                from: old.capacity(),
                to: geometry.capacity(),
            }),
            Some((data, _)) if is_equal_but_for_use(data, &identify) => None,
            _ => Some(NamespaceChange::Other),
        };
        let handle = entry.handle.upgrade();
        if let Some(handle) = &handle
            && !update(handle, identify, geometry)
        {
            // Whoever opens it next gets a handle of its own.
            entry.handle = Weak::new();
        }
        drop(known);
        drop(handle);
        change
    }

    /// Takes note that a namespace is not active.
    pub(crate) fn set_gone(&self, nsid: u32, ticket: Ticket) {
        let mut known = self.lock();
        let Some(entry) = known.namespaces.get_mut(&nsid) else {
            return;
        };
        let handle = entry.set_gone(ticket);
        drop(known);
        drop(handle);
    }

    /// The shared part of all handles of a namespace: `new`, unless there is one already that it
    /// can be.
    pub(crate) fn adopt(&self, ticket: Ticket, new: NamespaceInner) -> Arc<NamespaceInner> {
        let mut known = self.lock();
        let entry = known.namespaces.entry(new.nsid).or_default();
        let identify = new.identify();
        let is_latest = ticket >= entry.ticket;
        if is_latest {
            entry.ticket = ticket;
            entry.identify = Some((identify.clone(), new.geometry()));
        }
        let old = entry.handle.upgrade();
        let shared = old.as_ref().filter(|old| match is_latest {
            true => update(old, identify, new.geometry()),
            false => can_be_shared(old, &new),
        });
        let inner = match shared {
            Some(shared) => shared.clone(),
            None => {
                let new = Arc::new(new);
                entry.handle = Arc::downgrade(&new);
                new
            }
        };
        drop(known);
        drop(old);
        inner
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Nothing that can panic runs under the lock in a state that must not be seen.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What came and went.
#[derive(Debug, Default)]
pub(crate) struct Arrivals {
    pub(crate) came: Vec<u32>,
    pub(crate) went: Vec<u32>,
}

/// Whether the handles of `old` can go on where `new` was found.
fn can_be_shared(old: &NamespaceInner, new: &NamespaceInner) -> bool {
    !matches!(old.live.condition(), Condition::Changed { .. })
        && old.block_size() == new.block_size()
        && is_same_namespace(&old.identify(), &new.identify())
}

/// Tells the handles of a namespace what it is now; returns whether they can go on using it.
fn update(inner: &NamespaceInner, identify: Arc<IdentifyNamespace>, geometry: Geometry) -> bool {
    let live = &inner.live;
    if !is_same_namespace(&live.identify(), &identify) {
        live.set_changed(IS_ANOTHER);
    } else if geometry.block_size != inner.block_size() {
        live.set_changed("has another logical block size");
    } else if geometry.metadata != 0 {
        live.set_changed("has metadata with each block");
    } else {
        live.update(identify, geometry.blocks);
    }
    !matches!(live.condition(), Condition::Changed { .. })
}

/// Whether both can be of one namespace: identifiers that both have are the same.
fn is_same_namespace(one: &IdentifyNamespace, other: &IdentifyNamespace) -> bool {
    fn agree<const N: usize>(one: [u8; N], other: [u8; N]) -> bool {
        one == other || one == [0; N] || other == [0; N]
    }
    agree(one.nguid, other.nguid) && agree(one.eui64, other.eui64)
}

/// Whether they differ in nothing but the blocks that are allocated.
fn is_equal_but_for_use(one: &IdentifyNamespace, other: &IdentifyNamespace) -> bool {
    let mut one = Box::new(*one);
    one.nuse = other.nuse;
    *one == *other
}
