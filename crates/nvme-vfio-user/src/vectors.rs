//! MSI-X: the table, the pending bits, and an eventfd for each vector (PCI Express base specification,
//! section "MSI-X Capability and Table Structure").

#[cfg(test)]
mod tests;

use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvme_soft::Interrupts;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, readlink};
use rustix::io::{Errno, ReadWriteFlags};
use vfio_user::{IrqAction, IrqData, SetIrqs};

use crate::pages::SharedPages;

/// Bytes of an entry of the table.
const ENTRY: u32 = 16;
/// Where the Vector Control word of an entry is.
const CONTROL: u32 = 12;
/// In that word: the vector is masked.
const MASKED: u32 = 1 << 0;
/// Vectors that the table's page has room for.
pub(crate) const MAX_VECTORS: u16 = 256;

/// The vectors of the function.
#[derive(Debug)]
pub(crate) struct Vectors {
    count: u16,
    /// Whether a vector may be pending.
    has_pending: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Bits of Message Control in configuration space.
    enabled: bool,
    function_masked: bool,
    /// The client leaves: no eventfd of it is taken any more.
    is_closed: bool,
    vectors: Vec<Vector>,
    table: Table,
}

/// The MSI-X table, which the client may have mapped: what it stores there is to be looked at each time. The eventfds
/// stand for Message Address and Message Data, which nobody here reads.
#[derive(Debug)]
struct Table(Arc<SharedPages>);

impl Table {
    fn control(index: usize) -> u32 {
        index as u32 * ENTRY + CONTROL
    }

    fn is_masked(&self, index: usize) -> bool {
        self.0.table_word(Self::control(index)) & MASKED != 0
    }

    fn mask(&self, index: usize, masked: bool) {
        let word = if masked { MASKED } else { 0 };
        self.0.set_table_word(Self::control(index), word);
    }

    fn reset(&self, index: usize) {
        let at = index as u32 * ENTRY;
        for word in (at..at + CONTROL).step_by(4) {
            self.0.set_table_word(word, 0);
        }
    }
}

#[derive(Debug, Default)]
struct Vector {
    pending: bool,
    /// Signalled when the vector is triggered, masked and unmasked.
    trigger: Option<Arc<OwnedFd>>,
    on_mask: Option<Arc<OwnedFd>>,
    on_unmask: Option<Arc<OwnedFd>>,
}

/// What to signal once the lock is released.
type Signals = Vec<Arc<OwnedFd>>;

impl Vectors {
    pub(crate) fn new(count: u16, pages: Arc<SharedPages>) -> Self {
        let vectors = Self {
            count,
            has_pending: AtomicBool::new(false),
            state: Mutex::new(State {
                enabled: false,
                function_masked: false,
                is_closed: false,
                vectors: (0..count).map(|_| Vector::default()).collect(),
                table: Table(pages),
            }),
        };
        vectors.reset_table();
        vectors
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is complete in itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something, and signals what follows from it; that may wait for the client until
    /// [`Vectors::close`].
    fn change(&self, change: impl FnOnce(&mut State, &mut Signals)) {
        let mut signals = Signals::new();
        let mut state = self.state();
        change(&mut state, &mut signals);
        state.fire_pending(&mut signals);
        let has_pending = state.vectors.iter().any(|vector| vector.pending);
        self.has_pending.store(has_pending, Ordering::Relaxed);
        drop(state);
        for eventfd in signals {
            signal(&eventfd);
        }
    }

    /// Takes note of Message Control.
    pub(crate) fn set_control(&self, enabled: bool, function_masked: bool) {
        self.change(|state, _| {
            state.enabled = enabled;
            state.function_masked = function_masked;
        });
    }

    /// A word of the table; 0 past its end.
    pub(crate) fn read_table(&self, offset: u32) -> u32 {
        let index = (offset / ENTRY) as usize;
        match offset % ENTRY {
            _ if index >= self.count.into() => 0,
            CONTROL if self.state().table.is_masked(index) => MASKED,
            CONTROL => 0,
            _ => self.state().table.0.table_word(offset),
        }
    }

    /// Writes a word of the table.
    pub(crate) fn write_table(&self, offset: u32, value: u32) {
        self.change(|state, signals| {
            let index = (offset / ENTRY) as usize;
            match offset % ENTRY {
                _ if index >= state.vectors.len() => {}
                CONTROL => state.mask(index, value & MASKED != 0, signals),
                _ => state.table.0.set_table_word(offset, value),
            }
        });
    }

    /// A word of the pending bits; 0 past their end.
    pub(crate) fn read_pending(&self, offset: u32) -> u32 {
        let state = self.state();
        let first = (offset as usize).saturating_mul(8);
        let vectors = state.vectors.iter().skip(first).take(32);
        vectors.enumerate().fold(0, |bits, (bit, vector)| {
            bits | u32::from(vector.pending) << bit
        })
    }

    /// Does what DEVICE_SET_IRQS asks for.
    ///
    /// # Errors
    ///
    /// EINVAL if a vector is out of range, or a descriptor is no eventfd; nothing has happened then.
    pub(crate) fn set(&self, set: &SetIrqs<'_>, fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let start = set.start as usize;
        let end = start.saturating_add(set.count as usize);
        if end > usize::from(self.count) {
            return Err(Errno::INVAL);
        }
        let mut eventfds = Vec::with_capacity(fds.len());
        for fd in fds {
            eventfds.push(Arc::new(check_eventfd(fd)?));
        }
        let mut gone = Vec::new();
        self.change(|state, signals| {
            if state.is_closed {
                return;
            }
            if set.count == 0 && set.action == IrqAction::Trigger && set.data == IrqData::None {
                gone = state.forget_eventfds();
                return;
            }
            let mut eventfds = eventfds.into_iter();
            for index in start..end {
                match set.data {
                    IrqData::Eventfd => {
                        gone.extend(state.set_eventfd(index, set.action, eventfds.next()));
                    }
                    IrqData::Bool(chosen)
                        if chosen.get(index - start).is_none_or(|byte| *byte == 0) => {}
                    IrqData::Bool(_) | IrqData::None => match set.action {
                        IrqAction::Mask => state.mask(index, true, signals),
                        IrqAction::Unmask => state.mask(index, false, signals),
                        IrqAction::Trigger => signals.extend(state.vectors[index].trigger.clone()),
                    },
                }
            }
        });
        release(gone);
        Ok(())
    }

    /// Forgets pending interrupts, as a reset of the controller does.
    pub(crate) fn forget_pending(&self) {
        for vector in &mut self.state().vectors {
            vector.pending = false;
        }
    }

    /// Sets the table and Message Control to what they are at first, as a reset of the function does. The
    /// eventfds stay.
    pub(crate) fn reset_table(&self) {
        let mut state = self.state();
        let state = &mut *state;
        (state.enabled, state.function_masked) = (false, false);
        for (index, vector) in state.vectors.iter_mut().enumerate() {
            state.table.reset(index);
            // What has an eventfd stays unmasked, as in the kernel's VFIO, which restores the table.
            state.table.mask(index, vector.trigger.is_none());
            vector.pending = false;
        }
    }

    /// Forgets the eventfds of a client that leaves, and takes no more of them until [`Vectors::clear`]. Whoever
    /// waited for one goes on.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.is_closed = true;
        let gone = state.forget_eventfds();
        drop(state);
        release(gone);
    }

    /// Forgets everything, for the next client.
    pub(crate) fn clear(&self) {
        self.close();
        self.reset_table();
        self.state().is_closed = false;
    }
}

impl State {
    fn fire_pending(&mut self, signals: &mut Signals) {
        if !self.enabled || self.function_masked {
            return;
        }
        for (index, vector) in self.vectors.iter_mut().enumerate() {
            if vector.pending
                && !self.table.is_masked(index)
                && let Some(trigger) = &vector.trigger
            {
                signals.push(trigger.clone());
                vector.pending = false;
            }
        }
    }

    fn forget_eventfds(&mut self) -> Vec<Arc<OwnedFd>> {
        let mut gone = Vec::new();
        for (index, vector) in self.vectors.iter_mut().enumerate() {
            gone.extend(vector.trigger.take());
            gone.extend(vector.on_mask.take());
            gone.extend(vector.on_unmask.take());
            self.table.mask(index, true);
        }
        gone
    }

    fn mask(&mut self, index: usize, masked: bool, signals: &mut Signals) {
        if self.table.is_masked(index) != masked {
            let vector = &self.vectors[index];
            let told = if masked {
                &vector.on_mask
            } else {
                &vector.on_unmask
            };
            signals.extend(told.clone());
        }
        self.table.mask(index, masked);
    }

    /// Sets or takes away an eventfd; returns the one before.
    fn set_eventfd(
        &mut self,
        index: usize,
        action: IrqAction,
        eventfd: Option<Arc<OwnedFd>>,
    ) -> Option<Arc<OwnedFd>> {
        let vector = &mut self.vectors[index];
        let place = match action {
            IrqAction::Mask => &mut vector.on_mask,
            IrqAction::Unmask => &mut vector.on_unmask,
            IrqAction::Trigger => {
                self.table.mask(index, eventfd.is_none());
                &mut vector.trigger
            }
        };
        std::mem::replace(place, eventfd)
    }
}

impl Interrupts for Vectors {
    fn count(&self) -> u16 {
        self.count
    }

    fn raise(&self, vector: u16) {
        let mut state = self.state();
        let index = usize::from(vector);
        let passes = state.enabled && !state.function_masked && !state.table.is_masked(index);
        let Some(vector) = state.vectors.get_mut(index) else {
            return;
        };
        match &vector.trigger {
            Some(trigger) if passes => {
                let trigger = trigger.clone();
                drop(state);
                signal(&trigger);
            }
            _ => {
                vector.pending = true;
                self.has_pending.store(true, Ordering::Relaxed);
            }
        }
    }

    fn raise_unmasked(&self) -> bool {
        // Set by this thread, or with the lock held by one that has fired what it could.
        if !self.has_pending.load(Ordering::Relaxed) {
            return false;
        }
        let mut is_held_back = false;
        self.change(|state, signals| {
            state.fire_pending(signals);
            let passes = state.enabled && !state.function_masked;
            let mut vectors = state.vectors.iter();
            is_held_back = passes && vectors.any(|each| each.pending && each.trigger.is_some());
        });
        is_held_back
    }
}

/// Makes an eventfd readable. One that is full is readable anyway.
fn signal(eventfd: &OwnedFd) {
    if let Err(error) = rustix::io::write(eventfd, &1_u64.to_ne_bytes())
        && error != Errno::AGAIN
    {
        tracing::debug!(%error, "an eventfd of the client's");
    }
}

/// Refuses a descriptor that is no eventfd, and makes it nonblocking.
fn check_eventfd(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let name = readlink(path, Vec::new())?;
    if name.to_bytes() != b"anon_inode:[eventfd]" {
        return Err(Errno::INVAL);
    }
    unblock(&fd)?;
    Ok(fd)
}

fn unblock(fd: impl AsFd) -> Result<(), Errno> {
    let flags = fcntl_getfl(&fd)?;
    if flags.contains(OFlags::NONBLOCK) {
        return Ok(());
    }
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK)
}

/// Drops eventfds that are taken out of the table. A client that made one block again and filled it holds up
/// whoever signals it right now: that one goes on when it is emptied. All of them at once, since whoever waits
/// for one may have others yet to signal.
fn release(mut eventfds: Vec<Arc<OwnedFd>>) {
    loop {
        eventfds.retain(|eventfd| Arc::strong_count(eventfd) > 1);
        if eventfds.is_empty() {
            return;
        }
        for eventfd in &eventfds {
            // If it is empty, nobody is held up. Whether it blocks is for the client to say at any time, but
            // not for a read that says so itself; an eventfd has no position.
            let mut count = [0; 8];
            let into = &mut [IoSliceMut::new(&mut count)];
            let _ = rustix::io::preadv2(eventfd, into, u64::MAX, ReadWriteFlags::NOWAIT);
        }
        std::thread::yield_now();
    }
}
