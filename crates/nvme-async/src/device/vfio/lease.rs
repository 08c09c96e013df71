//! A part of a container's I/O address space, for one function.
//!
//! Functions of one IOMMU group see the same addresses. So that each can have an address space of
//! its own all the same, and so that what is left of an earlier opening (memory that the
//! application still holds) is in nobody's way, each opening gets a part that no other one has:
//! half of what is free, which is plenty of 2^48 and enough of 2^39.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use iova::vfio::Type1Container;
use iova::{Direction, DmaMapper, Geometry, HostMemory, IovaRange, MapError};

use super::group::Group;

/// Where a part may be cut, if what it is cut from is not smaller: the largest page of IOMMUs.
const CUT: u64 = 1 << 30;

/// The addresses of a container that nobody has, in order.
#[derive(Debug)]
pub(super) struct Unleased(Mutex<Vec<IovaRange>>);

impl Unleased {
    pub(super) fn new(usable: &[IovaRange]) -> Self {
        let unleased = Self(Mutex::new(Vec::new()));
        unleased.give_back(usable);
        unleased
    }

    /// Half of what is there, the lower addresses; empty if too little is left to cut.
    fn take(&self) -> Vec<IovaRange> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let total: u128 = free.iter().map(size).sum();
        let mut wanted = total / 2;
        let mut taken = Vec::new();
        while let Some(range) = free.first().copied().filter(|_| wanted > 0) {
            if size(&range) <= wanted {
                wanted -= size(&range);
                taken.push(free.remove(0));
                continue;
            }
            let middle = u64::try_from(u128::from(range.first) + wanted).unwrap_or(u64::MAX);
            let cut = middle - middle % CUT;
            if cut > range.first {
                taken.push(IovaRange {
                    first: range.first,
                    last: cut - 1,
                });
                free[0].first = cut;
            }
            break;
        }
        taken
    }

    fn give_back(&self, ranges: &[IovaRange]) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(ranges.iter().filter(|range| range.first <= range.last));
        free.sort_by_key(|range| range.first);
        free.dedup_by(|next, range| {
            let adjacent = range.last.checked_add(1) == Some(next.first);
            if adjacent {
                range.last = next.last;
            }
            adjacent
        });
    }
}

fn size(range: &IovaRange) -> u128 {
    u128::from(range.last - range.first) + 1
}

/// A function's part. Whoever has mapped memory through it keeps it, and with it the container,
/// though not what is mapped there: that ends with the last open function of the group.
#[derive(Debug)]
pub(super) struct Lease {
    ranges: Vec<IovaRange>,
    ended: AtomicBool,
    group: Arc<Group>,
}

impl Lease {
    /// Takes a part; nothing if too little is left.
    pub(super) fn new(group: Arc<Group>) -> Option<Self> {
        let ranges = group.unleased().take();
        (!ranges.is_empty()).then_some(Self {
            ranges,
            ended: AtomicBool::new(false),
            group,
        })
    }

    pub(super) fn group(&self) -> &Group {
        &self.group
    }

    /// Refuses mappings from here on: their function was given back.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // What could not be unmapped before may still be mapped: such addresses are not used again.
        let unmapped = |range: &IovaRange| {
            // At most half of all addresses, so this does not overflow.
            let len = range.last - range.first + 1;
            let unmap = |container: &Type1Container<_>| container.unmap_within(range.first, len);
            self.group
                .with_container(unmap)
                .inspect_err(|error| tracing::warn!(%error, "I/O addresses stay mapped"))
                .is_ok()
        };
        self.ranges.retain(unmapped);
        self.group.unleased().give_back(&self.ranges);
    }
}

// SAFETY: the container keeps the contract, the lease's own group keeps the container open, and its
// addresses are some of the container's that no other lease has; they don't change. Mappings end
// with the lease too, which nobody then maps through, and when the group leaves the container, where
// it has no open functions then.
unsafe impl DmaMapper for Lease {
    fn geometry(&self) -> Geometry {
        Geometry {
            usable: self.ranges.clone(),
            ..self.group.with_container(DmaMapper::geometry)
        }
    }

    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError> {
        if self.ended.load(Ordering::Relaxed) {
            return Err(MapError::DeviceGone);
        }
        self.group.with_container(|container| {
            // SAFETY: what the caller promises about the memory and this lease's addresses.
            unsafe { container.map(iova, memory, direction) }
        })
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        self.group
            .with_container(|container| container.unmap(iova, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const X86: [IovaRange; 2] = [
        IovaRange {
            first: 0,
            last: 0xfedf_ffff,
        },
        IovaRange {
            first: 0xfef0_0000,
            last: 0xffff_ffff_ffff,
        },
    ];

    fn total(ranges: &[IovaRange]) -> u128 {
        ranges.iter().map(size).sum()
    }

    #[test]
    fn each_gets_half_of_what_is_left() {
        let unleased = Unleased::new(&X86);
        let first = unleased.take();
        assert_eq!(first[0], X86[0]);
        assert_eq!(first[1].first, X86[1].first);
        assert_eq!(first[1].last, 0x7fff_ffff_ffff);
        let second = unleased.take();
        assert_eq!(
            second,
            [IovaRange {
                first: 0x8000_0000_0000,
                last: 0xbfff_ffff_ffff
            }]
        );
    }

    #[test]
    fn what_is_given_back_grows_together() {
        let unleased = Unleased::new(&X86);
        let leases = [unleased.take(), unleased.take(), unleased.take()];
        for lease in [1, 0, 2] {
            unleased.give_back(&leases[lease]);
        }
        assert_eq!(*unleased.0.lock().unwrap(), X86);
    }

    #[test]
    fn no_two_have_the_same_address() {
        let unleased = Unleased::new(&X86);
        let mut all = Vec::new();
        for _ in 0..64 {
            all.extend(unleased.take());
        }
        all.sort_by_key(|range| range.first);
        assert!(all.windows(2).all(|pair| pair[0].last < pair[1].first));
        assert!(total(&all) > total(&X86) - u128::from(2 * CUT));
    }

    #[test]
    fn all_64_bits() {
        let unleased = Unleased::new(&[IovaRange {
            first: 0,
            last: u64::MAX,
        }]);
        assert_eq!(
            unleased.take(),
            [IovaRange {
                first: 0,
                last: u64::MAX / 2
            }]
        );
        let rest = unleased.take();
        assert_eq!(rest[0].first, 1 << 63);
        unleased.give_back(&rest);
        assert_eq!(unleased.take(), rest);
    }

    #[test]
    fn too_little_to_cut_gives_nothing() {
        let unleased = Unleased::new(&[IovaRange {
            first: 0x1000,
            last: 0xffff,
        }]);
        assert_eq!(unleased.take(), []);
        assert_eq!(Unleased::new(&[]).take(), []);
    }
}
