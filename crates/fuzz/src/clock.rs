//! A monotonic clock that goes on by itself instead of being waited for.
//!
//! The driver measures time by the system's monotonic clock and Tokio sleeps in `epoll_wait`. Threads
//! of its own sleep in `ppoll` and `nanosleep`. Linked into a program, this module stands in for all of
//! them: whoever would sleep finds that the time has passed. So a device that never answers costs no
//! time. The wall clock, by which libFuzzer measures, is left alone.

mod sleepers;

use std::ptr;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

/// How far each look at the clock moves it at least, in nanoseconds: what polls until a time has come
/// gets there.
const TICK: i64 = 10_000;
/// And by so much of the time that has passed since [`start`]: also an hour comes after some thousand
/// looks.
const FRACTION: i64 = 1024;
const SECOND: i64 = 1_000_000_000;
/// The first time. It is not 0: programs subtract from the time that it is.
const EPOCH: i64 = 1_000_000 * SECOND;

/// In nanoseconds.
static NOW: AtomicI64 = AtomicI64::new(EPOCH);

/// When the current run began.
static START: AtomicI64 = AtomicI64::new(EPOCH);

/// Begins a run, and checks that this clock is the one that is used.
///
/// # Panics
///
/// If another one is, so that a run would test little and take for ever.
pub fn start() {
    let before = NOW.load(Ordering::Relaxed);
    START.store(before, Ordering::Relaxed);
    PATIENCE.begin();
    sleepers::leave_to_others(false);
    let _ = Instant::now();
    let ticked = NOW.load(Ordering::Relaxed) - before;
    assert!(ticked >= TICK, "the monotonic clock is not the virtual one");
}

/// Moves the clock.
fn advance(nanoseconds: i64) {
    NOW.fetch_add(nanoseconds.max(0), Ordering::Relaxed);
}

/// clock_gettime(2), with the virtual clock as the monotonic one.
///
/// # Safety
///
/// As the system call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(
    clock: libc::clockid_t,
    time: *mut libc::timespec,
) -> libc::c_int {
    if clock != libc::CLOCK_MONOTONIC {
        // SAFETY: the arguments are those of a caller of this very system call.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) } as libc::c_int;
    }
    let passed = NOW.load(Ordering::Relaxed) - START.load(Ordering::Relaxed);
    let now = NOW.fetch_add(TICK.max(passed / FRACTION), Ordering::Relaxed);
    let now = libc::timespec {
        tv_sec: now / SECOND,
        tv_nsec: now % SECOND,
    };
    // SAFETY: a caller passes memory for the time.
    unsafe { time.write(now) };
    0
}

/// epoll_wait(2): the sleep of the thread that runs the program. With a timeout it ends at once, at that
/// time if nothing is ready, unless another thread has something to do before.
///
/// # Safety
///
/// As the system call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_wait(
    epoll: libc::c_int,
    events: *mut libc::epoll_event,
    count: libc::c_int,
    timeout: libc::c_int,
) -> libc::c_int {
    let wait = |timeout: libc::c_int| {
        // SAFETY: the arguments are those of a caller of this very system call.
        let ready = unsafe { libc::syscall(libc::SYS_epoll_wait, epoll, events, count, timeout) };
        ready as libc::c_int
    };
    let end = match timeout {
        ..0 => i64::MAX,
        _ => NOW.load(Ordering::Relaxed) + i64::from(timeout) * (SECOND / 1000),
    };
    loop {
        // What is found ready is not found again.
        let ready = wait(PATIENCE.grant(end));
        if ready != 0 {
            return ready;
        }
        match sleepers::next(end) {
            sleepers::Next::Woken => PATIENCE.begin(),
            sleepers::Next::Ours if timeout < 0 => return wait(timeout),
            // A program that polls moves the clock while others are at work.
            sleepers::Next::Busy if timeout > 0 => thread::yield_now(),
            _ if PATIENCE.is_due(end) => {}
            _ => {
                NOW.fetch_max(end, Ordering::Relaxed);
                return 0;
            }
        }
    }
}

/// Real time for other threads, which the program may be waiting for: the more, the later it is.
struct Patience {
    /// Since when.
    since: AtomicI64,
    /// After so many seconds, as a power of two, it is granted next.
    level: AtomicU32,
}

static PATIENCE: Patience = Patience {
    since: AtomicI64::new(EPOCH),
    level: AtomicU32::new(0),
};

impl Patience {
    /// The most that is granted at a time, in milliseconds.
    const MOST: libc::c_int = 250;
    /// From this level on it is granted whatever the program could do meanwhile.
    const LATE: u32 = 10;

    fn begin(&self) {
        self.since
            .store(NOW.load(Ordering::Relaxed), Ordering::Relaxed);
        self.level.store(0, Ordering::Relaxed);
    }

    /// Whether some is due before the clock gets there.
    fn is_due(&self, end: i64) -> bool {
        let passed = end.saturating_sub(self.since.load(Ordering::Relaxed));
        end != i64::MAX && passed >= SECOND << self.level.load(Ordering::Relaxed)
    }

    /// For how many milliseconds the program may wait for what is ready, before the clock gets there.
    fn grant(&self, end: i64) -> libc::c_int {
        if !self.is_due(end) {
            return 0;
        }
        let level = self.level.fetch_add(1, Ordering::Relaxed);
        if level < Self::LATE {
            return (1 << level).min(Self::MOST);
        }
        // SAFETY: no entries are read, since there are none.
        unsafe { libc::syscall(libc::SYS_poll, ptr::null::<libc::pollfd>(), 0, Self::MOST) };
        0
    }
}

/// ppoll(2): the sleep of a thread of the driver's own. It ends when a descriptor is ready, or when the
/// thread that runs the program has nothing to do before the timeout, at that time.
///
/// # Safety
///
/// As the system call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ppoll(
    fds: *mut libc::pollfd,
    count: libc::nfds_t,
    timeout: *const libc::timespec,
    _mask: *const libc::sigset_t,
) -> libc::c_int {
    // SAFETY: a caller passes so many entries.
    let fds = unsafe { std::slice::from_raw_parts_mut(fds, count as usize) };
    // SAFETY: a caller passes a time or nothing.
    let timeout = unsafe { timeout.as_ref() };
    let end = timeout.map(|time| {
        let nanoseconds = time
            .tv_sec
            .saturating_mul(SECOND)
            .saturating_add(time.tv_nsec);
        NOW.load(Ordering::Relaxed).saturating_add(nanoseconds)
    });
    sleepers::sleep(fds, end)
}

/// Says that the thread that runs the program waits for others until the next run.
pub fn leave_to_others() {
    sleepers::leave_to_others(true);
}

/// clock_nanosleep(2): the time has passed when it returns.
///
/// # Safety
///
/// As the system call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_nanosleep(
    _clock: libc::clockid_t,
    flags: libc::c_int,
    time: *const libc::timespec,
    _left: *mut libc::timespec,
) -> libc::c_int {
    // SAFETY: a caller passes a time.
    let time = unsafe { time.read() };
    let nanoseconds = time
        .tv_sec
        .saturating_mul(SECOND)
        .saturating_add(time.tv_nsec);
    if flags & libc::TIMER_ABSTIME != 0 {
        NOW.fetch_max(nanoseconds, Ordering::Relaxed);
    } else {
        advance(nanoseconds);
    }
    thread::yield_now();
    0
}

/// nanosleep(2): the time has passed when it returns.
///
/// # Safety
///
/// As the system call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nanosleep(
    time: *const libc::timespec,
    left: *mut libc::timespec,
) -> libc::c_int {
    // SAFETY: the caller's promises are the same.
    unsafe { clock_nanosleep(libc::CLOCK_MONOTONIC, 0, time, left) }
}
