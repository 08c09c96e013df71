//! What this process has open, so that it is opened once.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

/// Things of type `V` that are open, being opened or being closed, by their keys.
///
/// The kernel gives a group and a function to one opener at a time. Whoever comes while another
/// thread is opening or dropping the same one waits for that; both end by themselves.
pub(super) struct Registry<K, V> {
    /// A key without a living value is being opened or dropped.
    entries: Mutex<BTreeMap<K, Weak<V>>>,
    changed: Condvar,
}

/// What [`Registry::open`] found.
pub(super) enum Opened<V> {
    /// It was open already.
    Before(Arc<V>),
    /// It was opened just now.
    Now(Arc<V>),
}

impl<K: Ord + Copy, V> Registry<K, V> {
    pub(super) const fn new() -> Self {
        Self {
            entries: Mutex::new(BTreeMap::new()),
            changed: Condvar::new(),
        }
    }

    /// Gives what is open under this key, or opens it. The value keeps the entry that `open` is
    /// given, to be dropped last, or when it is closed.
    pub(super) fn open<E>(
        &'static self,
        key: K,
        open: impl FnOnce(Entry<K, V>) -> Result<V, E>,
    ) -> Result<Opened<V>, E> {
        let mut entries = self.lock();
        while let Some(value) = entries.get(&key) {
            if let Some(value) = value.upgrade() {
                return Ok(Opened::Before(value));
            }
            entries = self
                .changed
                .wait(entries)
                .unwrap_or_else(PoisonError::into_inner);
        }
        entries.insert(key, Weak::new());
        drop(entries);

        let value = Arc::new(open(Entry {
            registry: self,
            key,
        })?);
        self.lock().insert(key, Arc::downgrade(&value));
        self.changed.notify_all();
        Ok(Opened::Now(value))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<K, Weak<V>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of a value in a registry; dropping it lets the next opener in, whoever still has the
/// value.
pub(super) struct Entry<K: Ord + Copy + 'static, V: 'static> {
    registry: &'static Registry<K, V>,
    key: K,
}

impl<K: Ord + Copy, V> Drop for Entry<K, V> {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.key);
        self.registry.changed.notify_all();
    }
}

impl<K: Ord + Copy + fmt::Debug, V> fmt::Debug for Entry<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Entry").field(&self.key).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    use super::*;
    use crate::device::vfio::closable::Closable;

    struct Value {
        open: &'static AtomicU32,
        _entry: Entry<u32, Self>,
    }

    impl Value {
        fn new(open: &'static AtomicU32, entry: Entry<u32, Self>) -> Self {
            assert_eq!(open.fetch_add(1, Ordering::SeqCst), 0, "open twice");
            Self {
                open,
                _entry: entry,
            }
        }
    }

    impl Drop for Value {
        fn drop(&mut self) {
            thread::yield_now();
            self.open.fetch_sub(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn the_second_finds_the_first() {
        static REGISTRY: Registry<u32, Value> = Registry::new();
        static OPEN: AtomicU32 = AtomicU32::new(0);
        let open = || {
            REGISTRY
                .open(1, |entry| Ok::<_, ()>(Value::new(&OPEN, entry)))
                .unwrap()
        };
        let Opened::Now(first) = open() else {
            panic!("nothing was open")
        };
        let Opened::Before(second) = open() else {
            panic!("it was open")
        };
        assert!(Arc::ptr_eq(&first, &second));
        drop((first, second));
        assert!(matches!(open(), Opened::Now(_)));
    }

    #[test]
    fn what_gave_its_place_up_is_opened_anew_though_others_hold_it() {
        struct Closed(Closable<Entry<u32, Self>>);
        static REGISTRY: Registry<u32, Closed> = Registry::new();
        let open = || {
            let new = |entry| Ok::<_, ()>(Closed(Closable::new(entry)));
            match REGISTRY.open(1, new).unwrap() {
                Opened::Before(value) => (value, false),
                Opened::Now(value) => (value, true),
            }
        };
        let (old, _) = open();
        old.0.close();
        let (new, is_new) = open();
        assert!(is_new);
        old.0.close();
        drop(old);
        let (found, is_new) = open();
        assert!(!is_new && Arc::ptr_eq(&found, &new));
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        static REGISTRY: Registry<u32, Value> = Registry::new();
        static OPEN: AtomicU32 = AtomicU32::new(0);
        assert_eq!(REGISTRY.open(1, |_| Err("no")).err(), Some("no"));
        assert!(
            REGISTRY
                .open(1, |entry| Ok::<_, ()>(Value::new(&OPEN, entry)))
                .is_ok()
        );
    }

    #[test]
    fn never_open_twice_however_many_come_and_go() {
        static REGISTRY: Registry<u32, Value> = Registry::new();
        static OPEN: AtomicU32 = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let opened =
                            REGISTRY.open(1, |entry| Ok::<_, ()>(Value::new(&OPEN, entry)));
                        drop(opened);
                    }
                });
            }
        });
        assert_eq!(OPEN.load(Ordering::SeqCst), 0);
        assert!(REGISTRY.lock().is_empty());
    }
}
