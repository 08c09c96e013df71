//! A monotonic clock that goes on by itself instead of being waited for.
//!
//! The driver measures time by the system's monotonic clock and Tokio sleeps in `epoll_wait`. Threads
//! of its own sleep in `ppoll` and `nanosleep`. Linked into a program, this module stands in for all of
//! them: whoever would sleep finds that the time has passed. So a device that never answers costs no time, and the same input takes the same course.
//! The wall clock, by which libFuzzer measures, is left alone.

mod sleepers;

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Instant;

/// How far each look at the clock moves it at least, in nanoseconds: what polls until a time has come
/// gets there.
const TICK: i64 = 10_000;
/// And by so much of the time that has passed since [`start`]: also an hour comes after some thousand
/// looks.
const FRACTION: i64 = 1024;
/// Milliseconds. Nothing in the driver that does not wait for a thread sleeps for as long at a time.
const LONG: libc::c_int = 1000;
/// How long another thread may take, in milliseconds of real time.
const OTHER_THREAD: libc::c_int = 5000;
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

/// epoll_wait(2): the sleep of the thread that runs the program.
///
/// With a timeout it ends at once, at that time if nothing is ready, unless another thread has something
/// to do before. A long timeout is of somebody who waits for a thread that never sleeps here, which is
/// given real time.
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
    if timeout == 0 {
        return wait(0);
    }
    let end = match timeout {
        ..0 => i64::MAX,
        _ => NOW.load(Ordering::Relaxed) + i64::from(timeout) * (SECOND / 1000),
    };
    let mut has_waited = false;
    loop {
        let ready = wait(0);
        if ready != 0 {
            return ready;
        }
        match sleepers::next(end) {
            sleepers::Next::Busy => std::thread::yield_now(),
            sleepers::Next::Ours if timeout < 0 => return wait(timeout),
            sleepers::Next::Ours if timeout >= LONG && !has_waited => {
                has_waited = true;
                let ready = wait(OTHER_THREAD);
                if ready != 0 {
                    return ready;
                }
            }
            sleepers::Next::Ours => {
                NOW.fetch_max(end, Ordering::Relaxed);
                return 0;
            }
        }
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
    std::thread::yield_now();
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
