//! A monotonic clock that goes on by itself instead of being waited for.
//!
//! The driver measures time by the system's monotonic clock and Tokio sleeps in `epoll_wait`. Linked
//! into a program, this module stands in for both: whoever would sleep finds that the time has
//! passed. So a device that never answers costs no time, and the same input takes the same course.
//! The wall clock, by which libFuzzer measures, is left alone.

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
    let _ = Instant::now();
    let ticked = NOW.load(Ordering::Relaxed) - before;
    assert!(ticked >= TICK, "the monotonic clock is not the virtual one");
}

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

/// epoll_wait(2): with a timeout it ends at once, at that time if nothing is ready. A long timeout is
/// of somebody who waits for another thread, which is given real time.
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
    let ready = wait(match timeout {
        ..0 => timeout,
        0..LONG => 0,
        LONG.. => OTHER_THREAD,
    });
    if ready == 0 && timeout > 0 {
        advance(i64::from(timeout) * (SECOND / 1000));
    }
    ready
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
