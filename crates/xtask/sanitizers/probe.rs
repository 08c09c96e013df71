//! Uses what `std.c` stands in for, so that the symbols are in the program.

use std::sync::{Condvar, Mutex, Once, RwLock};
use std::time::Duration;

fn main() {
    let (mutex, condvar, lock) = (Mutex::new(()), Condvar::new(), RwLock::new(()));
    let guard = mutex.lock().unwrap();
    let (guard, _) = condvar.wait_timeout(guard, Duration::ZERO).unwrap();
    drop((condvar.wait(guard), lock.read()));
    drop(lock.write());
    Once::new().call_once(|| ());
}
