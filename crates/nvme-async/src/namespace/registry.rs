//! Which namespaces there are and who has them open, so that changes reach all handles.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::NamespaceInner;
use super::live::Condition;
use super::seen::Seen;
use crate::controller::NamespaceChange;

const IS_ANOTHER: &str = "is another namespace by its identifiers";

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
    seen: Option<Seen>,
    handle: Weak<NamespaceInner>,
}

impl Entry {
    /// Tells the handles that the namespace is not active. Returns what they share, to be dropped
    /// without the lock: it may be the last one, with which the controller goes.
    fn set_gone(&mut self, ticket: Ticket) -> Option<Arc<NamespaceInner>> {
        let handle = self.handle.upgrade();
        if self.ticket <= ticket {
            self.ticket = ticket;
            self.seen = None;
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
    pub(crate) fn apply(&self, nsid: u32, ticket: Ticket, seen: Seen) -> Option<NamespaceChange> {
        let mut known = self.lock();
        let entry = known.namespaces.entry(nsid).or_default();
        if ticket < entry.ticket {
            return None;
        }
        entry.ticket = ticket;
        let geometry = seen.geometry();
        let change = match &entry.seen {
            Some(before) if !before.is_same_namespace(&seen) => Some(NamespaceChange::Replaced),
            Some(before) if !before.geometry().has_format_of(&geometry) => {
                Some(NamespaceChange::Reformatted {
                    block_size: geometry.block_size,
                    metadata: geometry.metadata,
                })
            }
            Some(before) if before.geometry() != geometry => Some(NamespaceChange::Resized {
                from: before.geometry().capacity(),
                to: geometry.capacity(),
            }),
            Some(before) if before.is_equal_but_for_use(&seen) => None,
            _ => Some(NamespaceChange::Other),
        };
        entry.seen = Some(seen.clone());
        let handle = entry.handle.upgrade();
        if let Some(handle) = &handle
            && !update(handle, seen)
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
        let seen = new.live.seen();
        let is_latest = ticket >= entry.ticket;
        if is_latest {
            entry.ticket = ticket;
            entry.seen = Some(seen.clone());
        }
        let old = entry.handle.upgrade();
        let shared = old.as_ref().filter(|old| match is_latest {
            true => update(old, seen),
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
        && old.live.seen().is_same_namespace(&new.live.seen())
}

/// Tells the handles of a namespace what it is now; returns whether they can go on using it.
fn update(inner: &NamespaceInner, seen: Seen) -> bool {
    let live = &inner.live;
    let before = live.seen();
    let geometry = seen.geometry();
    if !before.is_same_namespace(&seen) {
        live.set_changed(IS_ANOTHER);
    } else if geometry.block_size != inner.block_size() {
        live.set_changed("has another logical block size");
    } else if geometry.metadata != 0 {
        live.set_changed("has metadata with each block");
    } else {
        live.update(before.followed_by(seen));
    }
    !matches!(live.condition(), Condition::Changed { .. })
}

#[cfg(test)]
mod tests {
    use super::super::seen::tests::{identify, seen};
    use super::*;

    #[test]
    fn an_answer_that_was_overtaken_does_not_count() {
        let registry = Registry::default();
        let [early, late, last] = [(); 3].map(|()| registry.ticket());
        let sized = |blocks| seen(identify(blocks, 9));
        assert_eq!(
            registry.apply(1, late, sized(20)),
            Some(NamespaceChange::Other)
        );
        assert_eq!(registry.apply(1, early, sized(10)), None);
        registry.set_gone(1, early);
        assert_eq!(registry.apply(1, late, sized(20)), None);
        let shrunk = NamespaceChange::Resized {
            from: 20 * 512,
            to: 10 * 512,
        };
        assert_eq!(registry.apply(1, last, sized(10)), Some(shrunk));
        assert!(!registry.is_stale(last) && registry.is_stale(late));
    }

    #[test]
    fn lists_of_active_namespaces_are_compared() {
        let registry = Registry::default();
        let [early, first, second] = [(); 3].map(|()| registry.ticket());
        let arrivals = registry.set_active(first, &[1, 3]);
        assert!(arrivals.came.is_empty() && arrivals.went.is_empty());
        let overtaken = registry.set_active(early, &[5]);
        assert!(overtaken.came.is_empty() && overtaken.went.is_empty());
        let arrivals = registry.set_active(second, &[2, 3]);
        assert_eq!((arrivals.came, arrivals.went), (vec![2], vec![1]));
        assert!(registry.is_active(2) && !registry.is_active(1));
        assert!(registry.open().is_empty());
    }
}
