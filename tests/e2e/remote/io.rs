//! The I/O suite through a socket, in the ways that servers reach memory and are told of doorbells.

use std::ptr::NonNull;
use std::sync::Arc;

use nvme_async::memory::SharedMemory;
use nvme_async::{DmaBuf, Error, OpenOptions, PollMode, Registered};

use super::peer::{Event, Peer, Traps, config};
use crate::support::bounded::{comes_true, on_both_flavours, on_current_thread, on_multi_thread};
use crate::support::owners::Ledger;
use crate::support::suite;

/// Memory that says nothing of a file.
struct Unfiled(SharedMemory);

// SAFETY: the mapping stays where it is while the value lives, and this process never accesses it.
unsafe impl Registered for Unfiled {
    fn addr(&self) -> NonNull<u8> {
        self.0.addr()
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// Opens the peer's namespace by URL, runs the suite, and closes it.
async fn run_on(peer: &Peer) {
    let namespace = nvme_async::open(&peer.url()).await.expect("opens");
    suite::all(&namespace, false).await;
    namespace.controller().shutdown().await.expect("shuts down");
}

#[test]
fn doorbells_that_are_mapped() {
    on_both_flavours(async || run_on(&Peer::start(Traps::default())).await);
}

#[test]
fn interrupts_only_while_no_head_moves() {
    for mode in [PollMode::Adaptive, PollMode::Interrupt] {
        on_both_flavours(async move || {
            let traps = Traps {
                adaptive_interrupts: true,
                ..Traps::default()
            };
            let peer = Peer::start(traps);
            let options = OpenOptions::new().url(&peer.url()).poll_mode(mode);
            let namespace = options.open().await.expect("opens");
            suite::all(&namespace, false).await;
            // Where the peer's thread does not get to run, some may be missed.
            let counters = namespace.controller().counters();
            assert!(counters.lost_interrupts < counters.interrupts);
            namespace.controller().shutdown().await.expect("shuts down");
        });
    }
}

#[test]
fn doorbells_that_are_messages() {
    on_both_flavours(async || {
        let traps = Traps {
            maps_doorbells: false,
            ..Traps::default()
        };
        let peer = Peer::start(traps);
        run_on(&peer).await;
        let events = peer.events();
        let is_of_io = |event: &Event| matches!(event, Event::Doorbell(0x1008..));
        assert!(events.iter().any(is_of_io));
    });
}

#[test]
fn doorbells_in_memory_make_messages_rare() {
    on_current_thread(async || {
        let traps = Traps {
            maps_doorbells: false,
            ..Traps::default()
        };
        let mut config = config();
        config.doorbell_buffers = true;
        let peer = Peer::with(traps, config);
        run_on(&peer).await;
    });
}

#[test]
fn memory_by_messages() {
    on_multi_thread(async || {
        let traps = Traps {
            asks_for_memory: true,
            ..Traps::default()
        };
        run_on(&Peer::start(traps)).await;
    });
}

#[test]
fn a_file_of_doorbells_that_is_too_short_is_not_mapped() {
    on_current_thread(async || {
        let traps = Traps {
            short_file: true,
            ..Traps::default()
        };
        run_on(&Peer::start(traps)).await;
    });
}

#[test]
fn once_open_io_takes_no_message() {
    on_current_thread(async || {
        let peer = Peer::start(Traps::default());
        let options = OpenOptions::new().url(&peer.url()).pool_limit(64 << 20);
        let namespace = options.open().await.expect("opens");
        let opening = peer.events();
        let maps = opening
            .iter()
            .filter(|event| matches!(event, Event::Map(_)));
        let maps: Vec<_> = maps.collect();
        assert_eq!(maps, [&Event::Map(64 << 20)], "queues are in one region");

        for len in [512, 4096, 128 << 10, 2 << 20, 3 << 20] {
            let mut buffer = namespace.allocate(len).expect("allocates");
            buffer.fill(7);
            namespace.write(0, buffer).await.expect("writes");
            assert_eq!(namespace.read(0, len).await.expect("reads"), vec![7; len]);
        }
        let buffers: Vec<_> = (0..32).map(|_| namespace.allocate(2 << 20)).collect();
        assert!(buffers.iter().any(Result::is_err), "the pool has a limit");
        drop(buffers);
        let written = namespace.write(0, vec![8; 1 << 20]).await;
        drop(written.expect("writes"));
        let read = namespace.read_into(0, DmaBuf::heap(1 << 20)).await;
        assert_eq!(*read.expect("reads"), vec![8; 1 << 20]);
        assert_eq!(peer.events(), []);
        namespace.controller().shutdown().await.expect("shuts down");
    });
}

#[test]
fn fewer_descriptors_in_a_message_than_there_are_vectors() {
    on_current_thread(async || {
        let traps = Traps {
            max_msg_fds: 3,
            ..Traps::default()
        };
        let peer = Peer::start(traps);
        let options = OpenOptions::new()
            .url(&peer.url())
            .queues(5)
            .local_queues(2);
        let options = options.poll_mode(PollMode::Interrupt);
        let namespace = options.open().await.expect("opens");
        let events = peer.events();
        let vectors = events
            .iter()
            .filter(|event| matches!(event, Event::Vectors(..)));
        let vectors: Vec<_> = vectors.collect();
        assert_eq!(
            vectors,
            [
                &Event::Vectors(0, 3),
                &Event::Vectors(3, 3),
                &Event::Vectors(6, 2)
            ]
        );
        suite::all(&namespace, false).await;
        assert!(namespace.controller().counters().interrupts > 0);
        namespace.controller().shutdown().await.expect("shuts down");
    });
}

#[test]
fn foreign_memory_is_mapped_by_its_file_or_not_at_all() {
    on_both_flavours(async || {
        let traps = Traps {
            max_dma_maps: 2,
            ..Traps::default()
        };
        let peer = Peer::start(traps);
        let namespace = nvme_async::open(&peer.url()).await.expect("opens");
        let controller = namespace.controller();
        assert_eq!(peer.shared().dma.regions(), 1);

        let ledger = Ledger::default();
        let registration = controller.register(ledger.registered(64 << 10)).await;
        let registration = registration.expect("maps");
        assert_eq!(peer.shared().dma.regions(), 2);
        let slice = registration.slice(4096, 8192).expect("is inside");
        namespace.write(0, vec![9; 8192]).await.expect("writes");
        let slice = namespace.read_into(0, slice).await.expect("reads");
        let slice = namespace.write(1 << 20, slice).await.expect("writes");
        let read = namespace.read(1 << 20, 8192).await.expect("reads");
        assert_eq!(read, vec![9; 8192]);

        let another = controller.register(ledger.registered(4096)).await;
        assert!(matches!(
            another,
            Err(Error::Mapping(iova::Error::MappingLimit { .. }))
        ));
        drop((slice, registration));
        comes_true("it is unmapped", || peer.shared().dma.regions() == 1).await;
        comes_true("its owner is dropped", || ledger.alive() == 0).await;

        let memory = SharedMemory::new(64 << 10).expect("a little memory");
        let without = controller.register(Arc::new(Unfiled(memory))).await;
        let error = without.expect_err("has no file");
        let mut reason: &dyn std::error::Error = &error;
        while let Some(source) = reason.source() {
            reason = source;
        }
        let reason = reason.to_string();
        assert!(reason.contains("shared mapping of a file"), "{reason}");
        controller.shutdown().await.expect("shuts down");
    });
}
