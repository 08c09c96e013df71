//! Doorbells that are memory: nobody tells the controller of a write.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nvme_soft::{Config, DoorbellMemory, PolledDoorbells};
use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::registers::{DoorbellKind, doorbell_offset};
use nvme_spec::{admin, nvm};

use crate::host::{Host, config, wait_for};

/// A page of words.
#[derive(Debug)]
struct Page(Vec<AtomicU32>);

impl Page {
    fn new() -> Arc<Self> {
        Arc::new(Self((0..1024).map(|_| AtomicU32::new(0)).collect()))
    }

    fn word(&self, offset: u32) -> Option<&AtomicU32> {
        self.0.get(offset.checked_sub(0x1000)? as usize / 4)
    }

    fn set(&self, id: u16, kind: DoorbellKind, value: u32) {
        self.store(doorbell_offset(id, kind, 0), value);
    }
}

impl DoorbellMemory for Page {
    fn load(&self, offset: u32) -> u32 {
        self.word(offset)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, offset: u32, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value, Ordering::Release);
        }
    }
}

fn polled(page: &Arc<Page>, spin: Duration) -> Config {
    Config {
        spin,
        polled_doorbells: Some(PolledDoorbells {
            memory: page.clone(),
            idle_interval: Duration::from_millis(1),
        }),
        ..config(512)
    }
}

#[test]
fn writes_are_found() {
    for spin in [Duration::ZERO, Duration::from_secs(3600)] {
        let page = Page::new();
        let mut host = Host::enabled(polled(&page, spin));
        let values = [7, 9];
        // What another host left there.
        for (kind, value) in [DoorbellKind::SubmissionTail, DoorbellKind::CompletionHead]
            .into_iter()
            .zip(values)
        {
            page.set(1, kind, value);
        }
        // By the registers, which are still there.
        host.create_pair(1, 16, Some(1));
        for _ in 0..100 {
            let cid = host.place(1, nvm::flush(1));
            let tail = host.tail(1);
            page.set(1, DoorbellKind::SubmissionTail, tail);
            let entry = wait_for(|| host.look(1));
            assert_eq!(entry.cid(), cid);
            let head = host.head(1);
            page.set(1, DoorbellKind::CompletionHead, head);
        }
        assert_eq!(host.controller.counters().invalid_doorbells, 0);
        host.disable();
        host.enable();
        host.create_pair(1, 16, Some(1));
        assert_eq!(host.io(nvm::flush(1)).cid(), 0);
    }
}

#[test]
fn any_value_may_be_there() {
    let page = Page::new();
    let mut host = Host::ready(polled(&page, Duration::ZERO));
    host.submit(0, admin::async_event_request());
    page.set(1, DoorbellKind::SubmissionTail, u32::MAX);
    let event = wait_for(|| host.look(0));
    assert_eq!(
        AsyncEvent::from_bits(event.result()).event(),
        Event::InvalidDoorbellValue
    );
    host.ring_head(0);
    // A queue that does not exist, and one that is not rung.
    page.set(5, DoorbellKind::SubmissionTail, 3);
    page.set(1, DoorbellKind::SubmissionTail, 0);
    assert!(host.io(nvm::flush(1)).status().is_success());
}
