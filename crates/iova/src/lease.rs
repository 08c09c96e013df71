//! What is mapped, who keeps it mapped, and how it ends.

use std::mem::ManuallyDrop;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use crate::inner::Space;
use crate::sync::atomic::AtomicU32;
use crate::sync::{Mutex, lock};
use crate::table::{SlotRef, Tenant};
use crate::{Direction, Error, MapError, Owner};

/// What kind of mapping something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Fixed,
    Temporary,
}

/// Memory that is mapped. To get rid of it, it is given to [`Space::remove`].
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) iova: u64,
    /// In whole pages, as mapped.
    pub(crate) len: u64,
    pub(crate) kind: Kind,
    pub(crate) direction: Direction,
    /// Not dropped before the mapping was removed, not even by a panic.
    pub(crate) owner: Option<ManuallyDrop<Owner>>,
    /// Whoever waits for the end.
    pub(crate) removal: OnceLock<Arc<Removal>>,
    /// The share that was the last to go, if it was one.
    pub(crate) last_share: Option<ManuallyDrop<Share>>,
}

impl Mapping {
    /// Drops the owners, and tells those who wait for that.
    pub(crate) fn removed(self) {
        let share = self.last_share.map(ManuallyDrop::into_inner);
        // Told and dropped when this goes, in this order, even if an owner panics.
        let _ended = (
            share.map(Share::ending),
            Ending::new(self.owner.map(ManuallyDrop::into_inner), self.removal),
        );
    }

    /// Keeps the owners for ever, and tells why.
    pub(crate) fn leaked(self, why: &Arc<MapError>) {
        let Self { iova, len, .. } = self;
        let share = self.last_share.map(|share| {
            let Share { owner, removal } = ManuallyDrop::into_inner(share);
            std::mem::forget(owner);
            removal
        });
        for removal in [Some(self.removal), share].into_iter().flatten() {
            if let Some(removal) = removal.into_inner() {
                removal.tell(Err(Error::Unmap {
                    iova,
                    len,
                    source: Arc::clone(why),
                }));
            }
        }
    }
}

/// A mapping and its space. It ends with the last lease of it.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(crate) space: Arc<Space>,
    /// How many registrations there are of it; changed under the space's lock.
    pub(crate) registrations: AtomicU32,
    /// Until it is given to [`Space::remove`].
    mapping: Option<Mapping>,
}

impl Backing {
    pub(crate) fn new(space: Arc<Space>, mapping: Mapping) -> Self {
        Self {
            space,
            registrations: AtomicU32::new(0),
            mapping: Some(mapping),
        }
    }

    pub(crate) fn mapping(&self) -> Option<&Mapping> {
        self.mapping.as_ref()
    }

    /// The mapping, for the caller to remove.
    pub(crate) fn into_mapping(mut self) -> Option<Mapping> {
        self.mapping.take()
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take() {
            self.space.remove(vec![mapping]);
        }
    }
}

/// A part of a mapping that can be looked up or is used by a request: the tenant of a slot.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) backing: Arc<Backing>,
    pub(crate) share: Option<Share>,
}

/// What is special about the registration of memory that another registration had mapped.
#[derive(Debug)]
pub(crate) struct Share {
    pub(crate) owner: Owner,
    pub(crate) removal: OnceLock<Arc<Removal>>,
}

impl Share {
    fn ending(self) -> Ending {
        Ending::new(Some(self.owner), self.removal)
    }
}

/// An owner, and who is to be told when it was dropped, which both happen with this value.
struct Ending {
    // First.
    _owner: Option<Owner>,
    _told: Told,
}

struct Told(OnceLock<Arc<Removal>>);

impl Ending {
    fn new(owner: Option<Owner>, removal: OnceLock<Arc<Removal>>) -> Self {
        Self {
            _owner: owner,
            _told: Told(removal),
        }
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(removal) = self.0.take() {
            removal.tell(Ok(()));
        }
    }
}

impl Lease {
    /// Tells `removal` when the device can no longer reach the memory through this lease.
    pub(crate) fn on_removal(&self, removal: Arc<Removal>) {
        let place = match (&self.share, self.backing.mapping()) {
            (Some(share), _) => &share.removal,
            (None, Some(mapping)) => &mapping.removal,
            // A backing in use has its mapping.
            (None, None) => return removal.tell(Ok(())),
        };
        // It is asked for once, by the registration that ends.
        let _ = place.set(removal);
    }
}

impl Tenant for Lease {
    type Notify = Arc<Space>;

    fn notify(&self) -> Arc<Space> {
        Arc::clone(&self.backing.space)
    }

    fn idle(space: Arc<Space>) {
        // What nobody uses any more makes room.
        space.change(|_| ());
    }

    fn leave(self: Box<Self>, slot: SlotRef<Self>) {
        let Self { backing, share } = *self;
        let space = Arc::clone(&backing.space);
        space.table.recycle(slot);
        match (Arc::into_inner(backing), share) {
            (Some(last), share) => {
                let mapping = last.into_mapping().map(|mapping| Mapping {
                    last_share: share.map(ManuallyDrop::new),
                    ..mapping
                });
                space.remove(mapping.into_iter().collect());
            }
            // The memory is still mapped, but no longer on this account.
            (None, Some(share)) => drop(share.ending()),
            (None, None) => {}
        }
    }
}

/// Resolves when memory that was unregistered can no longer be reached by the device, and its
/// owner has been dropped. See [`FixedMapping::unregister`](crate::FixedMapping::unregister).
#[derive(Debug)]
#[must_use = "the memory is unregistered either way, but this tells when that is done"]
pub struct Unregister {
    pub(crate) removal: Arc<Removal>,
}

impl Future for Unregister {
    type Output = Result<(), Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let waiting = Progress::Waiting(cx.waker().clone());
        let mut progress = lock(&self.removal.progress);
        let before = std::mem::replace(&mut *progress, waiting);
        // Wakers are dropped outside of the lock.
        drop(progress);
        match before {
            Progress::Done(result) => Poll::Ready(result),
            Progress::Waiting(_) => Poll::Pending,
        }
    }
}

/// How far the removal of a mapping is.
#[derive(Debug)]
pub(crate) struct Removal {
    progress: Mutex<Progress>,
}

#[derive(Debug)]
enum Progress {
    Waiting(Waker),
    Done(Result<(), Error>),
}

impl Removal {
    pub(crate) fn new() -> Self {
        Self {
            progress: Mutex::new(Progress::Waiting(Waker::noop().clone())),
        }
    }

    pub(crate) fn tell(&self, result: Result<(), Error>) {
        let before = std::mem::replace(&mut *lock(&self.progress), Progress::Done(result));
        if let Progress::Waiting(waker) = before {
            waker.wake();
        }
    }
}
