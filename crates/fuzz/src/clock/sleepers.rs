//! The driver's own threads that sleep in `ppoll`, and whose turn it is when everybody sleeps.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::NOW;
use crate::eventfd;

static STATE: Mutex<State> = Mutex::new(State {
    sleepers: Vec::new(),
    left_to_others: false,
});

struct State {
    /// The threads that have slept here.
    sleepers: Vec<Sleeper>,
    /// Whether the thread that runs the program moves the clock no more.
    left_to_others: bool,
}

struct Sleeper {
    /// An eventfd, by which it is woken and told from others.
    bell: RawFd,
    place: Place,
}

enum Place {
    /// It does something.
    Awake,
    /// It sleeps until one of these is ready, or this time.
    Asleep { fds: Vec<libc::pollfd>, end: i64 },
}

/// Who is the next to do something.
pub(super) enum Next {
    /// Another thread is at work.
    Busy,
    /// Another thread, for which the time has come.
    Woken,
    /// Whoever asked.
    Ours,
}

thread_local! {
    static ENTRY: Entry = Entry(eventfd());
}

/// This thread's bell. Its sleeper ends with the thread.
struct Entry(OwnedFd);

impl Drop for Entry {
    fn drop(&mut self) {
        let bell = self.0.as_raw_fd();
        state().sleepers.retain(|sleeper| sleeper.bell != bell);
    }
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn leave_to_others(leave: bool) {
    let mut state = state();
    state.left_to_others = leave;
    for sleeper in &state.sleepers {
        ring(sleeper.bell);
    }
}

/// Moves the clock to when the first of the other threads wants to be woken, if that is before `end`.
pub(super) fn next(end: i64) -> Next {
    let mut state = state();
    let mut first: Option<(i64, usize)> = None;
    for (index, sleeper) in state.sleepers.iter_mut().enumerate() {
        let Place::Asleep { fds, end } = &mut sleeper.place else {
            return Next::Busy;
        };
        if is_ready(fds, 0) {
            return Next::Busy;
        }
        if first.is_none_or(|(earliest, _)| *end < earliest) {
            first = Some((*end, index));
        }
    }
    match first {
        Some((at, index)) if at < end => {
            NOW.fetch_max(at, super::Ordering::Relaxed);
            let sleeper = &mut state.sleepers[index];
            sleeper.place = Place::Awake;
            ring(sleeper.bell);
            Next::Woken
        }
        _ => Next::Ours,
    }
}

/// Sleeps until a descriptor is ready or, if there is one, the time has come.
pub(super) fn sleep(fds: &mut [libc::pollfd], end: Option<i64>) -> libc::c_int {
    let bell = ENTRY.with(|entry| entry.0.as_raw_fd());
    let end = end.unwrap_or(i64::MAX);
    if end <= NOW.load(super::Ordering::Relaxed) {
        is_ready(fds, 0);
        return ready_ones(fds);
    }
    let mut all = fds.to_vec();
    state().set(
        bell,
        Place::Asleep {
            fds: all.clone(),
            end,
        },
    );
    all.push(libc::pollfd {
        fd: bell,
        events: libc::POLLIN,
        revents: 0,
    });
    loop {
        is_ready(&mut all, -1);
        silence(bell);
        let mut state = state();
        let was_woken = state
            .sleepers
            .iter()
            .any(|sleeper| sleeper.bell == bell && matches!(sleeper.place, Place::Awake));
        let jumps = state.left_to_others && end < i64::MAX;
        if jumps {
            NOW.fetch_max(end, super::Ordering::Relaxed);
        }
        let is_over = ready_ones(&all[..fds.len()]) > 0;
        if was_woken || jumps || is_over {
            state.set(bell, Place::Awake);
            break;
        }
    }
    fds.copy_from_slice(&all[..fds.len()]);
    ready_ones(fds)
}

fn ready_ones(fds: &[libc::pollfd]) -> libc::c_int {
    fds.iter().filter(|fd| fd.revents != 0).count() as libc::c_int
}

impl State {
    fn set(&mut self, bell: RawFd, place: Place) {
        self.sleepers.retain(|sleeper| sleeper.bell != bell);
        let is_left = self.left_to_others && matches!(place, Place::Asleep { .. });
        self.sleepers.push(Sleeper { bell, place });
        if is_left {
            ring(bell);
        }
    }
}

/// Waits so many milliseconds of real time, or for ever, for one of them to be ready.
fn is_ready(fds: &mut [libc::pollfd], milliseconds: libc::c_int) -> bool {
    let (first, count) = (fds.as_mut_ptr(), fds.len() as libc::nfds_t);
    // SAFETY: so many entries are there.
    let ready = unsafe { libc::syscall(libc::SYS_poll, first, count, milliseconds) };
    ready > 0
}

fn ring(bell: RawFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: the bytes are there. The bell is open: its sleeper ends before it.
    let _ = unsafe { libc::write(bell, one.as_ptr().cast(), one.len()) };
}

fn silence(bell: RawFd) {
    let mut count = [0; 8];
    // SAFETY: there is room for the count, and the bell is open for as long as its thread.
    let _ = unsafe { libc::read(bell, count.as_mut_ptr().cast(), count.len()) };
}
