//! Finding the mapping that holds a buffer: a page table of host addresses.
//!
//! ```text
//!  host address   56      47      38      29      20    15   11           0
//!                 ├───9───┼───9───┼───9───┼───9───┼──5──┼──4─┼── offset ──┤
//!  entry spans     256 TiB 512 GiB  1 GiB   2 MiB  64 KiB 4 KiB
//! ```
//!
//! As in the processor's, an entry of any level can be a leaf: a mapping is entered where it covers
//! an entry's whole span, with smaller spans at its two ends, so that the memory of a large guest
//! takes few entries. Unlike there, an entry can have several leaves (mappings may overlap in host
//! memory) and have leaves and go on: it is the head of a list of leaves that ends with nothing or
//! with the next node.
//!
//! # Look-ups without a lock
//!
//! Nodes, list cells and slots are type-stable: once made, they are only ever reused as the same
//! thing at the same level, until the table is dropped. So a look-up never reads freed memory,
//! whatever happens meanwhile; it may only read what is no longer meant for it.
//!
//! * A **hit** is sound by itself: the slot was pinned, and then looked at (see [`slot`]).
//! * A **miss** counts only if the look-up was not led astray, from the list of one entry into that
//!   of another: [`Table::reused`] is raised after cells and nodes were unlinked and before they are
//!   used again, and if it was, the look-up is repeated. Changes keep at every moment all mappings in
//!   place that they are not about, and a reused slot hides no other one.
//!
//! What is read on the way is read with Acquire and written with Release, so a look-up that saw
//! anything of a reused thing's new life also sees the raised counter.

mod slot;
#[cfg(all(test, not(loom)))]
mod tests;

use std::ptr::{self, NonNull};

pub(crate) use self::slot::{Found, Pinned, Place, Slot, SlotRef, Tenant};
use crate::Direction;
use crate::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use crate::sync::{Apart, Mutex, lock};

/// Bits of the address that each level takes, from the top. Few under loom, which tracks every
/// single entry.
const BITS: [u32; LEVELS] = if cfg!(loom) {
    [1, 1, 0, 0, 0, 0]
} else {
    [9, 9, 9, 9, 5, 4]
};
const LEVELS: usize = 6;
/// The level whose entries span a page.
const LAST: usize = if cfg!(loom) { 1 } else { LEVELS - 1 };
const PAGE_SHIFT: u32 = 12;

/// Host addresses lie below this. It is the most that any processor of today has.
pub(crate) const END_OF_HOST: usize = 1 << (SHIFT[0] + BITS[0]);

/// Binary logarithm of what an entry of each level spans.
const SHIFT: [u32; LEVELS] = {
    let mut shift = [PAGE_SHIFT; LEVELS];
    let mut level = LEVELS - 1;
    while level > 0 {
        shift[level - 1] = shift[level] + BITS[level];
        level -= 1;
    }
    shift
};

/// An entry of a node, or what follows in its list: a [`Word`].
type Entry<L> = AtomicPtr<Slot<L>>;

/// A tagged pointer.
enum Word<L> {
    Nothing,
    /// The last leaf.
    Leaf(SlotRef<L>),
    /// A leaf, and more.
    Cell(NonNull<Cell<L>>),
    /// The next level.
    Node(NonNull<Entry<L>>),
}

const TAG: usize = 3;
const LEAF: usize = 1;
const CELL: usize = 2;
const NODE: usize = 3;

impl<L> Clone for Word<L> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<L> Copy for Word<L> {}

impl<L> Word<L> {
    #[inline]
    fn load(entry: &Entry<L>) -> Self {
        let word = entry.load(Ordering::Acquire);
        let untagged = word.map_addr(|addr| addr & !TAG);
        let Some(pointer) = NonNull::new(untagged) else {
            return Self::Nothing;
        };
        match word.addr() & TAG {
            NODE => Self::Node(pointer.cast()),
            CELL => Self::Cell(pointer.cast()),
            // SAFETY: entries hold slots of their own table, which the caller's reference keeps.
            _ => Self::Leaf(unsafe { SlotRef::new(pointer) }),
        }
    }

    fn store(self, entry: &Entry<L>) {
        let (pointer, tag) = match self {
            Self::Nothing => (ptr::null_mut(), 0),
            Self::Leaf(slot) => (slot.as_ptr().as_ptr(), LEAF),
            Self::Cell(cell) => (cell.as_ptr().cast(), CELL),
            Self::Node(node) => (node.as_ptr().cast(), NODE),
        };
        entry.store(pointer.map_addr(|addr| addr | tag), Ordering::Release);
    }
}

/// An element of the list of an entry that has more than a single leaf or node.
#[derive(Debug)]
struct Cell<L> {
    slot: AtomicPtr<Slot<L>>,
    next: Entry<L>,
}

impl<L> Cell<L> {
    fn empty() -> Self {
        Self {
            slot: AtomicPtr::new(ptr::null_mut()),
            next: AtomicPtr::new(ptr::null_mut()),
        }
    }
}

/// The mappings by host address.
#[derive(Debug)]
pub(crate) struct Table<L> {
    root: NonNull<Entry<L>>,
    /// How often cells and nodes were unlinked and made free for another use.
    reused: AtomicU64,
    /// In cache lines of its own: each mapping changes it, and each look-up reads what is above.
    writer: Apart<Mutex<Writer<L>>>,
}

// SAFETY: what the table points to is its own and shared only as atomics; tenants may be used and
// dropped in any thread.
unsafe impl<L: Send + Sync> Send for Table<L> {}
// SAFETY: as for Send.
unsafe impl<L: Send + Sync> Sync for Table<L> {}

impl<L> Table<L> {
    pub(crate) fn new() -> Self {
        let mut writer = Writer {
            slots: Arena::new(),
            cells: [const { Arena::new() }; LEVELS],
            nodes: [const { Arena::new() }; LEVELS],
        };
        Self {
            root: writer.node(0),
            reused: AtomicU64::new(0),
            writer: Apart(Mutex::new(writer)),
        }
    }

    /// A mapping that holds all of `first..=last` and allows `direction`, and that is accepted.
    #[inline]
    pub(crate) fn find(
        &self,
        first: usize,
        last: usize,
        direction: Direction,
        accept: impl Fn(&Found<L>) -> bool,
    ) -> Option<Found<L>>
    where
        L: Tenant,
    {
        if last >= END_OF_HOST {
            return None;
        }
        loop {
            let reused = self.reused.load(Ordering::Acquire);
            if let Some(found) = self.walk(first, last, direction, &accept) {
                return Some(found);
            }
            // Each turn more means that others got something done.
            if self.reused.load(Ordering::Relaxed) == reused {
                return None;
            }
        }
    }

    #[inline]
    fn walk(
        &self,
        first: usize,
        last: usize,
        direction: Direction,
        accept: &impl Fn(&Found<L>) -> bool,
    ) -> Option<Found<L>>
    where
        L: Tenant,
    {
        let pin = |slot: SlotRef<L>| slot.pin(first, last, direction).filter(accept);
        let mut node = self.root;
        for level in 0..=LAST {
            // SAFETY: `node` is one of this level.
            let mut word = Word::load(unsafe { entry(node, level, first) });
            node = loop {
                match word {
                    Word::Node(below) => break below,
                    Word::Nothing => return None,
                    Word::Leaf(slot) => return pin(slot),
                    Word::Cell(cell) => {
                        // SAFETY: cells live as long as the table.
                        let cell = unsafe { cell.as_ref() };
                        let slot = NonNull::new(cell.slot.load(Ordering::Acquire))?;
                        // SAFETY: a slot of this table, which outlives this call.
                        let slot = unsafe { SlotRef::new(slot) };
                        if let Some(found) = pin(slot) {
                            return Some(found);
                        }
                        word = Word::load(&cell.next);
                    }
                }
            };
        }
        None
    }

    /// Gives a mapping a slot, without letting look-ups find it. With `live`, somebody has to
    /// [end](SlotRef::end) it; `guards` are counted from the beginning.
    pub(crate) fn admit(
        &self,
        place: Place,
        tenant: Box<L>,
        live: bool,
        guards: u64,
    ) -> SlotRef<L> {
        debug_assert!(place.first <= place.last && place.last < END_OF_HOST);
        let slot = lock(&self.writer.0).slots.take(1, Slot::vacant);
        // SAFETY: a slot of this table; the tenant keeps the table.
        let slot = unsafe { SlotRef::new(slot) };
        slot.move_in(place, tenant, live, guards);
        slot
    }

    /// Lets look-ups find a slot, which is live.
    pub(crate) fn link(&self, slot: SlotRef<L>) {
        let (first, last) = slot.bytes();
        lock(&self.writer.0).link(self.root, 0, first, last, slot);
    }

    /// Undoes [`link`](Self::link), before the tenant leaves.
    pub(crate) fn unlink(&self, slot: SlotRef<L>) {
        let (first, last) = slot.bytes();
        let mut writer = lock(&self.writer.0);
        let mut freed = Freed::default();
        writer.unlink(self.root, 0, first, last, slot, &mut freed);
        if !freed.cells.is_empty() || !freed.nodes.is_empty() {
            // After everything is unlinked, before anything can be taken again.
            self.reused.fetch_add(1, Ordering::AcqRel);
            writer.recycle(freed);
        }
    }

    /// Whether nothing is linked.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn is_empty(&self) -> bool {
        is_empty(self.root, 0)
    }

    /// Takes back the slot of a tenant that has left.
    pub(crate) fn recycle(&self, slot: SlotRef<L>) {
        lock(&self.writer.0).slots.give_back(slot.as_ptr());
    }
}

/// The entry of `addr` in a node.
///
/// # Safety
///
/// `node` is a node of `level` of a table that outlives the result.
#[inline]
unsafe fn entry<'a, L>(node: NonNull<Entry<L>>, level: usize, addr: usize) -> &'a Entry<L> {
    let index = (addr >> SHIFT[level]) & ((1 << BITS[level]) - 1);
    // SAFETY: a node of this level has 1 << BITS[level] entries.
    let entry = unsafe { node.add(index) };
    // SAFETY: nodes live as long as the table, and are only ever shared.
    unsafe { entry.as_ref() }
}

/// What was unlinked and is not yet free for another use.
struct Freed<L> {
    cells: Vec<(usize, NonNull<Cell<L>>)>,
    nodes: Vec<(usize, NonNull<Entry<L>>)>,
}

impl<L> Default for Freed<L> {
    fn default() -> Self {
        Self {
            cells: Vec::new(),
            nodes: Vec::new(),
        }
    }
}

/// The memory of a table, and who changes it.
#[derive(Debug)]
struct Writer<L> {
    slots: Arena<Slot<L>>,
    cells: [Arena<Cell<L>>; LEVELS],
    nodes: [Arena<Entry<L>>; LEVELS],
}

impl<L> Writer<L> {
    /// A node without entries.
    fn node(&mut self, level: usize) -> NonNull<Entry<L>> {
        self.nodes[level].take(1 << BITS[level], || AtomicPtr::new(ptr::null_mut()))
    }

    fn cell(&mut self, level: usize, slot: SlotRef<L>, next: Word<L>) -> NonNull<Cell<L>> {
        let cell = self.cells[level].take(1, Cell::empty);
        // SAFETY: just made or free, and never freed while the table lives.
        let content = unsafe { cell.as_ref() };
        content
            .slot
            .store(slot.as_ptr().as_ptr(), Ordering::Release);
        next.store(&content.next);
        cell
    }

    fn link(
        &mut self,
        node: NonNull<Entry<L>>,
        level: usize,
        first: usize,
        last: usize,
        slot: SlotRef<L>,
    ) {
        for span in spans(level, first, last) {
            // SAFETY: the node is one of this level, the table is being changed.
            let entry = unsafe { entry(node, level, span.first) };
            let word = Word::load(entry);
            if span.is_leaf {
                let word = match word {
                    Word::Nothing => Word::Leaf(slot),
                    more => Word::Cell(self.cell(level, slot, more)),
                };
                word.store(entry);
            } else {
                let below = self.node_below(entry, level);
                self.link(below, level + 1, span.first, span.last, slot);
            }
        }
    }

    /// The node that the list of `entry` ends with; a new one if it has none.
    fn node_below(&mut self, entry: &Entry<L>, level: usize) -> NonNull<Entry<L>> {
        let tail = tail(entry);
        match Word::load(tail) {
            Word::Node(node) => node,
            Word::Leaf(slot) => {
                let node = self.node(level + 1);
                Word::Cell(self.cell(level, slot, Word::Node(node))).store(tail);
                node
            }
            // A tail is no cell.
            Word::Nothing | Word::Cell(_) => {
                let node = self.node(level + 1);
                Word::Node(node).store(tail);
                node
            }
        }
    }

    /// Whether an entry of the node has become empty.
    fn unlink(
        &mut self,
        node: NonNull<Entry<L>>,
        level: usize,
        first: usize,
        last: usize,
        slot: SlotRef<L>,
        freed: &mut Freed<L>,
    ) -> bool {
        let mut emptied = false;
        for span in spans(level, first, last) {
            // SAFETY: the node is one of this level, the table is being changed.
            let entry = unsafe { entry(node, level, span.first) };
            if span.is_leaf {
                take_out(entry, level, slot, freed);
                emptied |= matches!(Word::load(entry), Word::Nothing);
                continue;
            }
            let tail = tail(entry);
            let Word::Node(below) = Word::load(tail) else {
                debug_assert!(false, "unlinked but not linked");
                continue;
            };
            let below_emptied = self.unlink(below, level + 1, span.first, span.last, slot, freed);
            if below_emptied && is_empty(below, level + 1) {
                Word::Nothing.store(tail);
                freed.nodes.push((level + 1, below));
                emptied |= matches!(Word::load(entry), Word::Nothing);
            }
        }
        emptied
    }

    fn recycle(&mut self, freed: Freed<L>) {
        for (level, cell) in freed.cells {
            self.cells[level].give_back(cell);
        }
        for (level, node) in freed.nodes {
            self.nodes[level].give_back(node);
        }
    }
}

/// Where the list of an entry ends.
fn tail<L>(entry: &Entry<L>) -> &Entry<L> {
    let mut tail = entry;
    while let Word::Cell(cell) = Word::load(tail) {
        // SAFETY: cells live as long as the table, which the entry is a part of.
        tail = &unsafe { cell.as_ref() }.next;
    }
    tail
}

/// Takes the leaf of `slot` out of the list of `entry`.
fn take_out<L>(entry: &Entry<L>, level: usize, slot: SlotRef<L>, freed: &mut Freed<L>) {
    let mut at = entry;
    loop {
        match Word::load(at) {
            Word::Leaf(leaf) if leaf == slot => return Word::Nothing.store(at),
            Word::Cell(cell) => {
                // SAFETY: cells live as long as the table, which the entry is a part of.
                let content = unsafe { cell.as_ref() };
                if content.slot.load(Ordering::Relaxed) == slot.as_ptr().as_ptr() {
                    Word::load(&content.next).store(at);
                    freed.cells.push((level, cell));
                    return;
                }
                at = &content.next;
            }
            Word::Leaf(_) | Word::Node(_) | Word::Nothing => {
                debug_assert!(false, "unlinked but not linked");
                return;
            }
        }
    }
}

fn is_empty<L>(node: NonNull<Entry<L>>, level: usize) -> bool {
    (0..1_usize << BITS[level]).all(|index| {
        // SAFETY: the node is one of this level, and the table is being changed.
        let entry = unsafe { entry(node, level, index << SHIFT[level]) };
        matches!(Word::load(entry), Word::Nothing)
    })
}

/// The part of a mapping in the span of one entry.
struct Span {
    first: usize,
    last: usize,
    /// Whether the mapping is entered here: it covers the whole span, or the span is a page.
    is_leaf: bool,
}

/// The parts of `first..=last` in the entries of a node that spans all of it.
fn spans(level: usize, first: usize, last: usize) -> impl Iterator<Item = Span> {
    let size = 1_usize << SHIFT[level];
    let mut next = Some(first);
    std::iter::from_fn(move || {
        let from = next?;
        let end = (from | (size - 1)).min(last);
        next = (end < last).then(|| end + 1);
        Some(Span {
            first: from,
            last: end,
            is_leaf: level == LAST || end - from == size - 1,
        })
    })
}

/// Things of one type that are made once, used again, and freed with the arena.
#[derive(Debug)]
struct Arena<T> {
    slabs: Vec<NonNull<[T]>>,
    free: Vec<NonNull<T>>,
}

/// Things are made so many at a time, if they are small.
const SLAB: usize = if cfg!(loom) { 1 } else { 64 };

impl<T> Arena<T> {
    const fn new() -> Self {
        Self {
            slabs: Vec::new(),
            free: Vec::new(),
        }
    }

    /// A thing made of `len` values in a row, always the same `len` for one arena. A used one is
    /// as it was given back.
    fn take(&mut self, len: usize, make: impl Fn() -> T) -> NonNull<T> {
        if let Some(free) = self.free.pop() {
            return free;
        }
        let count = (SLAB / len).max(1);
        let slab: Box<[T]> = (0..count * len).map(|_| make()).collect();
        let slab = NonNull::from(Box::leak(slab));
        self.slabs.push(slab);
        // SAFETY: within the slab, which has `count * len` values.
        let things = (0..count).map(|index| unsafe { slab.cast::<T>().add(index * len) });
        self.free.extend(things.rev());
        self.free.pop().expect("a slab has at least one thing")
    }

    fn give_back(&mut self, thing: NonNull<T>) {
        self.free.push(thing);
    }
}

impl<T> Drop for Arena<T> {
    fn drop(&mut self) {
        for slab in self.slabs.drain(..) {
            // SAFETY: made by `Box::leak`, dropped once; whoever could use it is gone with the
            // table.
            drop(unsafe { Box::from_raw(slab.as_ptr()) });
        }
    }
}
