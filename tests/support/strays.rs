//! Stray accesses of software controllers that were opened by URL, where nobody has the device.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// By the kernel's number of the controller's thread.
static SEEN: Mutex<Option<HashMap<u32, u64>>> = Mutex::new(None);

/// Counts from now on.
pub(super) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing::subscriber::set_global_default(Watch).expect("there is no other subscriber");
    });
}

/// Those of the controller with this thread.
pub(super) fn of(thread: u32) -> u64 {
    let seen = lock();
    seen.as_ref()
        .and_then(|seen| seen.get(&thread))
        .copied()
        .unwrap_or(0)
}

struct Watch;

impl Subscriber for Watch {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR && metadata.target() == "nvme_async::device::soft::iommu"
    }

    fn event(&self, _: &Event<'_>) {
        let thread = std::fs::read_link("/proc/thread-self")
            .ok()
            .and_then(|link| {
                let name = link.file_name()?.to_str()?;
                name.parse().ok()
            });
        let thread = thread.expect("/proc is mounted");
        *lock().get_or_insert_default().entry(thread).or_default() += 1;
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn lock() -> MutexGuard<'static, Option<HashMap<u32, u64>>> {
    SEEN.lock().unwrap_or_else(PoisonError::into_inner)
}
