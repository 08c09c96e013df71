//! What a controller reports: streams of events, storms, and lies.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use nvme_async::{Controller, ControllerEvent, Error, EventStream, NamespaceChange as Change};
use nvme_soft::store::MemoryStore;
use nvme_spec::Status;
use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::identify::{
    IdentifyNamespace, LbaFormat, NamespaceDescriptor, NamespaceDescriptors,
};
use nvme_spec::log::{CriticalWarning, ErrorEntry, SmartHealth, id};
use nvme_spec::opcode::AdminOpcode;
use zerocopy::IntoBytes;

use crate::support::bounded::{comes_true, on_both_flavours};
use crate::support::liar::Liar;
use crate::support::rig::{Setup, assert_harmless};

const SIZE: u64 = 1 << 20;

async fn next(events: &mut EventStream) -> ControllerEvent {
    events.next().await.expect("the controller is open")
}

#[test]
fn every_kind_of_event_reaches_every_stream() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let soft = rig.device.controller();
        let mut streams = [rig.controller().events(), rig.controller().events()];

        soft.set_temperature(360);
        for events in &mut streams {
            let ControllerEvent::Smart { event, health } = next(events).await else {
                panic!("another event");
            };
            assert_eq!(event, Event::TemperatureThreshold);
            assert_eq!(health.composite_temperature.get(), 360);
            assert!(health.warnings().temperature());
        }
        soft.set_critical_warning(CriticalWarning::new().with_read_only(true));
        for events in &mut streams {
            let ControllerEvent::Smart { event, health } = next(events).await else {
                panic!("another event");
            };
            assert_eq!(event, Event::SubsystemReliability);
            assert!(health.warnings().read_only());
        }

        // An error that is in the log.
        let missing = rig.controller().log_page(0xc7, 0, 0, 512).await;
        let refused = missing.expect_err("there is no such log page");
        assert!(
            matches!(&refused, Error::Command(failed) if failed.status.is(Status::INVALID_LOG_PAGE))
        );
        soft.raise_event(AsyncEvent::report(Event::TransientInternalError));
        for events in &mut streams {
            let ControllerEvent::Error { event, entries } = next(events).await else {
                panic!("another event");
            };
            assert_eq!(event, Event::TransientInternalError);
            assert!(entries[0].status().is(Status::INVALID_LOG_PAGE));
            assert!(entries.iter().all(|entry| entry.error_count.get() > 0));
        }

        soft.raise_event(AsyncEvent::report(Event::FirmwareActivationStarting));
        for events in &mut streams {
            let ControllerEvent::Firmware { slots } = next(events).await else {
                panic!("another event");
            };
            assert_eq!(slots.active_slot(), 1);
        }

        // One of a vendor with a log page that can be read, one with none, and one without any.
        for (raw, has_log) in [
            (0x0003_0007, true),
            (0x00c0_1207, false),
            (0x0000_0003, false),
        ] {
            let raw = AsyncEvent::from_bits(raw);
            soft.raise_event(raw);
            for events in &mut streams {
                let ControllerEvent::Other { event, log } = next(events).await else {
                    panic!("another event");
                };
                assert_eq!((event, !log.is_empty()), (raw, has_log));
            }
        }

        soft.detach_namespace(1).expect("goes");
        for events in &mut streams {
            let event = next(events).await;
            let detached = matches!(
                event,
                ControllerEvent::NamespaceChanged {
                    nsid: 1,
                    change: Change::Detached
                }
            );
            assert!(detached, "{event:?}");
        }

        rig.close().await;
        for events in &mut streams {
            assert!(events.next().await.is_none());
        }
    });
}

#[test]
fn a_stream_ends_with_the_controller() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let controller = rig.controller().clone();
        let mut events = controller.events();
        controller.shutdown().await.expect("shuts down");
        assert!(events.next().await.is_none());
        assert!(controller.events().next().await.is_none());
        drop(controller);
        rig.close().await;

        let rig = Setup::memory(SIZE).open().await;
        let mut events = rig.controller().events();
        rig.abandon().await;
        assert!(events.next().await.is_none());
    });
}

#[test]
fn a_stream_that_is_not_read_tells_what_it_lost() {
    on_both_flavours(async || {
        const COUNT: u32 = 400;
        let mut setup = Setup::empty();
        for _ in 0..COUNT {
            setup = setup.store(MemoryStore::new(4096).expect("a little memory"), 512);
        }
        let rig = setup.open().await;
        let mut idle = rig.controller().events();
        let mut busy = rig.controller().events();
        let soft = rig.device.controller();
        let mut seen = Vec::new();
        for nsid in 1..=COUNT {
            soft.detach_namespace(nsid).expect("goes");
        }
        while seen.len() < COUNT as usize {
            match next(&mut busy).await {
                ControllerEvent::NamespaceChanged {
                    nsid,
                    change: Change::Detached,
                } => seen.push(nsid),
                // On one thread all come between two chances to read.
                ControllerEvent::Lost { count } => seen.extend((0..count).map(|_| 0)),
                event => panic!("{event:?}"),
            }
        }
        let ControllerEvent::Lost { count } = next(&mut idle).await else {
            panic!("nothing was lost");
        };
        assert!((1..=u64::from(COUNT) - 256).contains(&count), "{count}");
        // The oldest are lost, and no others.
        for expected in count as u32 + 1..=COUNT {
            let event = next(&mut idle).await;
            let ControllerEvent::NamespaceChanged { nsid, .. } = event else {
                panic!("{event:?}");
            };
            assert_eq!(nsid, expected);
        }
        assert!(idle.next().now_or_never().is_none());
        rig.close().await;
    });
}

#[test]
fn a_storm_of_events_is_slowed_down_and_does_no_harm() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE)
            .store(MemoryStore::new(SIZE).expect("a little memory"), 512)
            .open()
            .await;
        let namespace = rig.namespace().await;
        let stop = Arc::new(AtomicBool::new(false));
        let (device, ended) = (rig.device.clone(), stop.clone());
        let before = rig.device.counters().admin_commands;
        let storm = thread::spawn(move || {
            let mut raised = 0;
            while !ended.load(Ordering::SeqCst) {
                // One whose type is not masked, so that each request gets one at once.
                let event = AsyncEvent::from_bits(0x00c0_1207);
                device.controller().raise_event(event);
                raised += 1;
            }
            raised
        });
        tokio::time::sleep(Duration::from_secs(2)).await;
        let commands = rig.device.counters().admin_commands - before;
        for block in 0..100 {
            namespace
                .write(block * 512, vec![block as u8; 512])
                .await
                .expect("writes");
        }
        rig.device
            .controller()
            .resize_namespace(1, SIZE / 2)
            .expect("shrinks");
        comes_true("the size is known in spite of the storm", || {
            namespace.capacity() == SIZE / 2
        })
        .await;
        stop.store(true, Ordering::SeqCst);
        let raised = storm.join().expect("no panics");
        assert!(raised > 200, "{raised} is no storm");
        // Two commands for each event.
        assert!((8..100).contains(&commands), "{commands} commands");
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn a_controller_is_given_up_in_the_middle_of_a_storm() {
    on_both_flavours(async || {
        for in_order in [true, false] {
            let rig = Setup::memory(SIZE).open().await;
            let device = rig.device.clone();
            let vendor = AsyncEvent::from_bits(0x00c0_1207);
            for _ in 0..200 {
                device.controller().raise_event(vendor);
                tokio::task::yield_now().await;
            }
            match in_order {
                true => rig.close().await,
                false => rig.abandon().await,
            }
        }
    });
}

#[test]
fn no_more_requests_are_outstanding_than_allowed() {
    on_both_flavours(async || {
        for (limit, expected) in [(1, 1), (3, 3), (4, 4), (256, 4)] {
            let setup = Setup::memory(SIZE).config(|config| config.async_event_limit = limit);
            let liar = Liar::open(setup).await;
            let requests = |liar: &Liar| {
                let seen = liar.take_seen();
                let request = |opcode| AdminOpcode(opcode) == AdminOpcode::ASYNC_EVENT_REQUEST;
                seen.iter()
                    .filter(|command| request(command.opcode()))
                    .count()
            };
            let mut count = requests(&liar);
            assert_eq!(count, expected);
            let mut events = liar.controller.events();
            for _ in 0..3 {
                liar.soft.controller().set_temperature(360);
                next(&mut events).await;
                liar.soft.controller().set_temperature(300);
            }
            comes_true("each event is followed by a request", || {
                count += requests(&liar);
                count >= expected + 3
            })
            .await;
            assert_eq!(count, expected + 3);
            assert_eq!(liar.soft.counters().failed_commands, 0);
            liar.close().await;
        }
    });
}

#[test]
fn only_an_event_is_acknowledged_by_reading_its_log_page() {
    on_both_flavours(async || {
        /// RAE in command dword 10.
        const RETAIN: u32 = 1 << 15;
        let liar = Liar::open(Setup::memory(SIZE)).await;
        let mut events = liar.controller.events();
        let pages = |liar: &Liar| -> Vec<(u8, bool)> {
            let seen = liar.take_seen();
            seen.iter()
                .filter(|command| AdminOpcode(command.opcode()) == AdminOpcode::GET_LOG_PAGE)
                .map(|command| (command.cdw10() as u8, command.cdw10() & RETAIN != 0))
                .collect()
        };
        pages(&liar);
        let health = liar.controller.smart_log().await.expect("reads");
        assert_eq!(health.composite_temperature.get(), 310);
        assert!(liar.controller.error_log().await.expect("reads").is_empty());
        let slots = liar.controller.firmware_log().await.expect("reads");
        assert_eq!(slots.active_slot(), 1);
        let read = [id::SMART_HEALTH, id::ERROR, id::FIRMWARE_SLOT];
        assert_eq!(pages(&liar), read.map(|page| (page, true)));
        liar.soft.controller().set_temperature(360);
        next(&mut events).await;
        assert_eq!(pages(&liar), [(id::SMART_HEALTH, false)]);
        liar.close().await;
    });
}

#[test]
fn log_pages_are_read_at_any_offset_and_length() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let controller = rig.controller();
        for _ in 0..3 {
            let refused = controller.log_page(0xc7, 0, 0, 512).await;
            refused.expect_err("there is no such log page");
        }
        let all = nvme_spec::admin::ALL_NAMESPACES;
        let whole = controller.log_page(id::ERROR, all, 0, 4096).await;
        let whole = whole.expect("reads");
        let entries = controller.error_log().await.expect("reads");
        assert_eq!(entries.len(), 3);
        assert_eq!(entries.as_bytes(), &whole[..3 * size_of::<ErrorEntry>()]);
        for (offset, len) in [(0, 1), (1, 1), (3, 2), (63, 130), (4, 0), (4093, 3)] {
            let part = controller.log_page(id::ERROR, all, offset, len).await;
            let offset = offset as usize;
            assert_eq!(
                part.expect("reads"),
                whole[offset..offset + len],
                "{offset} {len}"
            );
        }
        // It takes several commands, and past the end there are zeroes.
        let more = controller.log_page(id::ERROR, all, 0, 8192).await;
        let more = more.expect("reads");
        assert_eq!(more[..4096], whole);
        assert!(more[4096..].iter().all(|&byte| byte == 0));
        rig.close().await;
    });
}

#[test]
fn a_wrong_log_page_does_not_silence_the_events_of_its_type() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let soft = rig.device.controller();
        let mut events = rig.controller().events();
        // A temperature with the list of namespaces, which this controller wants to have read
        // before it reports another one.
        soft.raise_event(AsyncEvent::from_bits(0x0004_0101));
        for kelvins in [310, 360] {
            soft.set_temperature(kelvins);
            let ControllerEvent::Smart { health, .. } = next(&mut events).await else {
                panic!("another event");
            };
            assert_eq!(health.composite_temperature.get(), kelvins);
        }
        // The list was not lost by that.
        let namespace = rig.namespace().await;
        soft.resize_namespace(1, SIZE / 2).expect("shrinks");
        soft.raise_event(AsyncEvent::from_bits(0x0004_0101));
        comes_true("the size is known", || namespace.capacity() == SIZE / 2).await;
        drop(namespace);
        rig.close().await;
    });
}

/// A controller with three namespaces of which 2 is open, and 2 shrinks to half its size while it
/// lies.
async fn shrinks_under_lies(lie: impl AsyncFn(&Liar)) -> (u64, Controller, Liar) {
    let store = || MemoryStore::new(SIZE).expect("a little memory");
    let setup = Setup::empty()
        .store(store(), 512)
        .store(store(), 512)
        .store(store(), 512);
    let liar = Liar::open(setup).await;
    let namespace = liar.controller.namespace(2).await.expect("is there");
    lie(&liar).await;
    let mut events = liar.controller.events();
    liar.soft
        .controller()
        .resize_namespace(2, SIZE / 2)
        .expect("shrinks");
    // An event that comes after it was dealt with.
    let vendor = AsyncEvent::from_bits(0x00c0_1207);
    loop {
        liar.soft.controller().raise_event(vendor);
        if let ControllerEvent::Other { .. } = next(&mut events).await {
            break;
        }
    }
    let capacity = namespace.capacity();
    // Whatever it says, commands go on and are checked by the controller.
    let read = namespace.read(0, 512).await;
    assert!(
        matches!(read, Ok(_) | Err(Error::NamespaceGone { .. })),
        "{read:?}"
    );
    let controller = liar.controller.clone();
    (capacity, controller, liar)
}

fn list(nsids: &[u32]) -> Vec<u8> {
    nsids.iter().flat_map(|nsid| nsid.to_le_bytes()).collect()
}

#[test]
fn absurd_entries_of_the_changed_list_are_left_out() {
    on_both_flavours(async || {
        let full: Vec<u32> = (0..1024).map(|index| 5000 - index).collect();
        let repeated = vec![3; 1024];
        let cases: [(&[u32], bool); 10] = [
            // Where nothing credible is left, all that is open is looked at.
            (&[], true),
            (&[0, 2], true),
            (&[4], true),
            (&[0xffff_fffe], true),
            (&[0xffff_ffff, 2], true),
            // Among others that can't be.
            (&[2, 1, 2, 4, 0xffff_ffff], true),
            (&[7, 2], true),
            (&full, true),
            // It says that another one changed.
            (&[1], false),
            (&repeated, false),
        ];
        for (nsids, is_noticed) in cases {
            let (capacity, controller, liar) = shrinks_under_lies(async |liar| {
                liar.log_page(id::CHANGED_NAMESPACES, list(nsids));
            })
            .await;
            let expected = if is_noticed { SIZE / 2 } else { SIZE };
            assert_eq!(capacity, expected, "{nsids:?}");
            liar.be_honest();
            controller.rescan().await.expect("scans");
            let namespace = controller.namespace(2).await.expect("is there");
            assert_eq!(namespace.capacity(), SIZE / 2);
            drop((namespace, controller));
            liar.close().await;
        }
    });
}

fn identify(blocks: u64, change: impl FnOnce(&mut IdentifyNamespace)) -> Vec<u8> {
    let mut data = IdentifyNamespace {
        nsze: blocks.into(),
        ncap: blocks.into(),
        ..IdentifyNamespace::default()
    };
    data.lbaf[0] = LbaFormat {
        lbads: 9,
        ..LbaFormat::default()
    };
    change(&mut data);
    data.as_bytes().to_vec()
}

#[test]
fn absurd_identify_data_changes_nothing() {
    on_both_flavours(async || {
        let cases = [
            identify(u64::MAX, |_| {}),
            identify(u64::MAX - 1, |_| {}),
            identify(1 << 55, |_| {}),
            identify(100, |data| data.flbas = 7),
            identify(100, |data| data.lbaf[0].lbads = 0),
            identify(100, |data| data.lbaf[0].lbads = 255),
        ];
        for data in cases {
            let (capacity, controller, liar) =
                shrinks_under_lies(async |liar| liar.namespace(2, data.clone())).await;
            assert_eq!(capacity, SIZE);
            liar.be_honest();
            controller.rescan().await.expect("scans");
            drop(controller);
            liar.close().await;
        }
    });
}

#[test]
fn what_cannot_be_used_any_more_is_not_used() {
    on_both_flavours(async || {
        let cases = [
            identify(100, |data| data.lbaf[0].ms = 8.into()),
            identify(100, |data| data.lbaf[0].lbads = 12),
        ];
        for data in cases {
            let liar = Liar::open(Setup::memory(SIZE)).await;
            let namespace = liar.controller.namespace(1).await.expect("is there");
            liar.namespace(1, data);
            liar.controller.rescan().await.expect("scans");
            let refused = namespace.read(0, 4096).await.expect_err("has changed");
            assert!(
                matches!(refused, Error::NamespaceChanged { nsid: 1, .. }),
                "{refused:?}"
            );
            drop(namespace);
            liar.close().await;
        }
    });
}

#[test]
fn another_namespace_in_its_place_is_not_mistaken_for_it() {
    on_both_flavours(async || {
        let liar = Liar::open(Setup::memory(SIZE)).await;
        let named = |name: u8| identify(SIZE / 512, |data| data.nguid = [name; 16]);
        liar.namespace(1, named(1));
        let namespace = liar.controller.namespace(1).await.expect("is there");
        let mut events = liar.controller.events();
        // As it was, but for the blocks in use.
        liar.namespace(
            1,
            identify(SIZE / 512, |data| {
                data.nguid = [1; 16];
                data.nuse = 7.into();
            }),
        );
        liar.controller.rescan().await.expect("scans");
        namespace.read(0, 512).await.expect("reads");
        assert!(events.next().now_or_never().is_none());
        liar.namespace(1, named(2));
        liar.controller.rescan().await.expect("scans");
        let event = next(&mut events).await;
        assert!(
            matches!(
                event,
                ControllerEvent::NamespaceChanged {
                    change: Change::Replaced,
                    ..
                }
            ),
            "{event:?}"
        );
        let refused = namespace.write(0, vec![7; 512]).await.expect_err("another");
        assert!(
            matches!(refused.error, Error::NamespaceChanged { .. }),
            "{refused:?}"
        );
        let other = liar.controller.namespace(1).await.expect("is there");
        other.write(0, vec![7; 512]).await.expect("writes");
        // Or by its UUID alone, which it had from the start.
        let uuid = NamespaceDescriptor::Uuid([7; 16]);
        let list = NamespaceDescriptors::from_descriptors(&[uuid]);
        liar.descriptors(1, list.bytes);
        liar.controller.rescan().await.expect("scans");
        let refused = other.flush().await.expect_err("another");
        assert!(
            matches!(refused, Error::NamespaceChanged { .. }),
            "{refused:?}"
        );
        // A list that is broken says nothing.
        let third = liar.controller.namespace(1).await.expect("is there");
        liar.descriptors(1, [3, 200, 0, 0, 1, 1]);
        liar.controller.rescan().await.expect("scans");
        third.flush().await.expect("flushes");
        drop((namespace, other, third));
        liar.close().await;
    });
}

#[test]
fn an_absurd_list_of_active_namespaces() {
    on_both_flavours(async || {
        let full: Vec<u32> = (1..=1024).collect();
        let cases: [(&[u32], &[u32]); 5] = [
            (&[1, 1, 2], &[1, 2]),
            (&[3, 1, 2], &[3]),
            (&[0, 1, 2, 3], &[]),
            (&[1, 2, 3, 4, 0xffff_ffff], &[1, 2, 3]),
            // The same full list again and again.
            (&full, &[1, 2, 3]),
        ];
        for (claimed, believed) in cases {
            let store = || MemoryStore::new(SIZE).expect("a little memory");
            let setup = Setup::empty()
                .store(store(), 512)
                .store(store(), 512)
                .store(store(), 512);
            let liar = Liar::open(setup).await;
            let namespace = liar.controller.namespace(3).await.expect("is there");
            liar.active(claimed);
            let active = liar.controller.active_namespaces().await;
            assert_eq!(active.expect("lists"), believed, "{claimed:?}");
            liar.controller.rescan().await.expect("scans");
            let is_there = namespace.read(0, 512).await.is_ok();
            assert_eq!(is_there, believed.contains(&3), "{claimed:?}");
            liar.be_honest();
            liar.controller.rescan().await.expect("scans");
            namespace.read(0, 512).await.expect("reads");
            drop(namespace);
            liar.close().await;
        }
    });
}

#[test]
fn log_pages_that_are_too_short_read_as_zeroes() {
    on_both_flavours(async || {
        let liar = Liar::open(Setup::memory(SIZE)).await;
        let mut events = liar.controller.events();
        let soft = liar.soft.controller();
        for page in [id::ERROR, id::SMART_HEALTH, id::FIRMWARE_SLOT] {
            liar.log_page(page, []);
        }
        soft.set_temperature(360);
        let ControllerEvent::Smart { health, .. } = next(&mut events).await else {
            panic!("another event");
        };
        assert_eq!(*health, SmartHealth::default());
        soft.raise_event(AsyncEvent::report(Event::PersistentInternalError));
        let ControllerEvent::Error { entries, .. } = next(&mut events).await else {
            panic!("another event");
        };
        assert!(entries.is_empty());
        soft.raise_event(AsyncEvent::report(Event::FirmwareActivationStarting));
        let ControllerEvent::Firmware { slots } = next(&mut events).await else {
            panic!("another event");
        };
        assert_eq!(slots.active_slot(), 0);
        // Entries whose numbers do not decrease come once.
        let entry = |number: u64| ErrorEntry {
            error_count: number.into(),
            ..ErrorEntry::default()
        };
        let entries = [entry(5), entry(5), entry(9), entry(4), entry(0), entry(3)];
        liar.log_page(id::ERROR, entries.as_bytes());
        let numbers = liar.controller.error_log().await.expect("reads");
        let numbers: Vec<_> = numbers
            .iter()
            .map(|entry| entry.error_count.get())
            .collect();
        assert_eq!(numbers, [5, 4, 3]);
        liar.close().await;
    });
}

#[test]
fn events_that_contradict_themselves() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        let mut events = rig.controller().events();
        let soft = rig.device.controller();
        // A change of namespaces with the log page of the errors, and so on.
        for raw in [0x0001_0002, 0x0004_0101, 0x00ff_0000, 0x0002_0102] {
            soft.raise_event(AsyncEvent::from_bits(raw));
        }
        // Types and events that do not exist.
        for raw in [
            0x0001_ff00,
            0x0002_ff01,
            0x0004_ff02,
            0x0081_0304,
            0xffff_ffff,
        ] {
            soft.raise_event(AsyncEvent::from_bits(raw));
        }
        soft.resize_namespace(1, SIZE / 2).expect("shrinks");
        comes_true("the size is known", || namespace.capacity() == SIZE / 2).await;
        let mut others = 0;
        while others < 5 {
            if let ControllerEvent::Other { .. } = next(&mut events).await {
                others += 1;
            }
        }
        let device = rig.device.clone();
        drop(namespace);
        rig.close().await;
        assert_harmless(&device);
    });
}
