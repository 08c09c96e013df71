//! What real servers do that a client might not expect.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use iova::MapError;
use nvme_async::device::Device;
use nvme_async::device::vfio_user::{OpenError, VfioUserDevice, VfioUserOptions};
use nvme_async::{Error, OpenOptions};
use nvme_spec::registers::{ControllerConfiguration, ControllerStatus, offset};
use vfio_user::{RegionAccess, RegionWrite, Request, region};

use super::impatient;
use super::peer::{Act, Event, Peer, Traps};
use crate::support::bounded::{bounded, on_current_thread};
use crate::support::suite;

const BUS_MASTER: u16 = 1 << 2;
const INTX_DISABLE: u16 = 1 << 10;
const MSIX_ENABLE: u16 = 1 << 15;

#[test]
fn what_a_former_client_left_is_undone_in_order() {
    on_current_thread(async || {
        let traps = Traps {
            // INTx enabled, bus mastering too; MSI-X enabled and masked as a whole.
            command: 0x0006,
            msix_control: 0xc000,
            ..Traps::default()
        };
        let peer = Peer::start(traps);
        for _ in 0..2 {
            let options = OpenOptions::new()
                .url(&peer.url())
                .queues(2)
                .local_queues(0);
            let namespace = options.open().await.expect("opens");
            let events = peer.events();
            let at = |wanted: &dyn Fn(&Event) -> bool| {
                let found = events.iter().position(wanted);
                found.unwrap_or_else(|| panic!("not in {events:?}"))
            };
            let intx_off = at(&|event| matches!(event, Event::Command(_)));
            let Event::Command(command) = events[intx_off] else {
                unreachable!("was just found");
            };
            assert_eq!(command & (INTX_DISABLE | BUS_MASTER), INTX_DISABLE);
            let msix_off = at(&|event| *event == Event::MsixControl(0));
            let eventfds = at(&|event| matches!(event, Event::Vectors(0, _)));
            let msix_on = at(&|event| *event == Event::MsixControl(MSIX_ENABLE));
            let memory =
                at(&|event| matches!(event, Event::Command(command) if command & BUS_MASTER != 0));
            let enabled = at(&|event| {
                let is_on = |value| ControllerConfiguration::from_bits(value).en();
                matches!(event, Event::Write(offset::CC, value) if is_on(*value))
            });
            assert!(intx_off < msix_off && msix_off < eventfds && eventfds < msix_on);
            assert!(msix_on < memory && memory < enabled);
            namespace.write(0, vec![7; 4096]).await.expect("writes");

            // Not in order: CC.EN and all the rest stay as they are.
            peer.hang_up();
            // Until that is noticed, what is in memory works as before.
            let gone = loop {
                if let Err(error) = namespace.read(0, 4096).await {
                    break error;
                }
            };
            assert!(matches!(gone, Error::Removed { .. }), "{gone}");
            let status = peer.shared().function.controller.read32(offset::CSTS);
            assert!(ControllerStatus::from_bits(status).rdy());
            peer.events();
        }
    });
}

#[test]
fn registers_of_a_millisecond_each() {
    on_current_thread(async || {
        let traps = Traps {
            register_time: Duration::from_millis(1),
            ..Traps::default()
        };
        let peer = Peer::start(traps);
        // It takes its time to become ready, and is not asked again and again.
        let (mut ready_at, looks) = (None, Arc::new(AtomicUsize::new(0)));
        let looked = looks.clone();
        peer.hook(move |request| match request {
            Request::RegionWrite(RegionWrite {
                region: region::BAR0,
                offset: 0x14,
                data: [low, ..],
            }) if low & 1 != 0 => {
                ready_at = Some(Instant::now() + Duration::from_millis(300));
                None
            }
            Request::RegionRead(RegionAccess {
                region: region::BAR0,
                offset: 0x1c,
                ..
            }) => {
                looked.fetch_add(1, Ordering::Relaxed);
                let is_early = ready_at.is_some_and(|at| Instant::now() < at);
                is_early.then(|| Act::Edit(Box::new(|reply| reply[32] = 0)))
            }
            _ => None,
        });
        let namespace = nvme_async::open(&peer.url()).await.expect("opens");
        let looks = looks.load(Ordering::Relaxed);
        assert!((5..60).contains(&looks), "{looks} looks at CSTS in 300 ms");
        let reads = peer.events();
        let reads = reads.iter().filter(|event| matches!(event, Event::Read(_)));
        assert!(reads.count() < looks + 30);
        suite::all(&namespace, false).await;
        namespace.controller().shutdown().await.expect("shuts down");
    });
}

#[test]
fn a_reset_that_leaves_the_controller_enabled() {
    bounded(|| {
        let traps = Traps {
            reset_disables: false,
            ..Traps::default()
        };
        let peer = Peer::start(traps);
        let device = VfioUserDevice::open(peer.path(), &VfioUserOptions::default()).expect("opens");
        let enable = ControllerConfiguration::new()
            .with_en(true)
            .with_iosqes(6)
            .with_iocqes(4);
        device.set_bus_master(true).expect("works");
        device.write32(offset::AQA, 0x3f_003f).expect("works");
        device.write64(offset::ASQ, 0x10000).expect("works");
        device.write64(offset::ACQ, 0x20000).expect("works");
        device
            .write32(offset::CC, enable.into_bits())
            .expect("works");
        let status = || {
            let bits = device.read32(offset::CSTS).expect("reads");
            ControllerStatus::from_bits(bits)
        };
        while !status().rdy() {
            std::thread::yield_now();
        }
        peer.events();
        device.reset().expect("disables it");
        assert!(!status().rdy());
        let events = peer.events();
        assert_eq!(events[0], Event::Reset);
        assert!(events.contains(&Event::Vectors(0, 8)));
        assert!(events.contains(&Event::MsixControl(MSIX_ENABLE)));

        // One that stays enabled whatever is done was not reset.
        peer.hook(|request| match request {
            Request::RegionRead(RegionAccess { offset: 0x1c, .. }) => {
                Some(Act::Edit(Box::new(|reply| reply[32] = 1)))
            }
            _ => None,
        });
        let error = device.reset().expect_err("is enabled");
        assert!(
            error.to_string().contains("is enabled after the reset"),
            "{error}"
        );
    });
}

#[test]
fn a_second_client_waits_for_the_first_one() {
    bounded(|| {
        let peer = Peer::start(Traps::default());
        let first = VfioUserDevice::open(peer.path(), &VfioUserOptions::default()).expect("opens");
        let second = VfioUserDevice::open(peer.path(), &impatient());
        let error = second.expect_err("has to wait");
        assert!(matches!(error, OpenError::Busy { .. }), "{error}");
        assert!(
            error.to_string().contains("one client at a time"),
            "{error}"
        );

        // It waits as long as it may.
        let path = peer.path().to_owned();
        let waits = move || VfioUserDevice::open(&path, &VfioUserOptions::default());
        let waiting = std::thread::spawn(waits);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        drop(first);
        waiting.join().expect("does not panic").expect("opens");
    });
}

#[test]
fn nobody_listens() {
    bounded(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("nvme.sock");
        let error = VfioUserDevice::open(&path, &impatient()).expect_err("is not there");
        assert!(error.to_string().contains("is it started"), "{error}");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("listens"));
        let error = VfioUserDevice::open(&path, &impatient()).expect_err("has ended");
        assert!(error.to_string().contains("has ended"), "{error}");
        let long = directory.path().join("x".repeat(200));
        VfioUserDevice::open(&long, &impatient()).expect_err("is too long");
    });
}

#[test]
fn memory_that_the_server_refuses() {
    on_current_thread(async || {
        let peer = Peer::start(Traps::default());
        for errno in [libc::ENOSPC, libc::EINVAL, 0] {
            peer.hook(move |request| {
                matches!(request, Request::DmaMap(_)).then_some(Act::Refuse(errno as u32))
            });
            let error = nvme_async::open(&peer.url()).await.expect_err("no memory");
            assert!(matches!(error, Error::Memory(_)), "{error}");
        }
    });
}

#[test]
fn what_was_closed_gives_errors_and_takes_doorbells() {
    bounded(|| {
        for maps_doorbells in [false, true] {
            let traps = Traps {
                maps_doorbells,
                ..Traps::default()
            };
            let peer = Peer::start(traps);
            let device =
                VfioUserDevice::open(peer.path(), &VfioUserOptions::default()).expect("opens");
            let doorbell = device.doorbell(0x1000).expect("is there");
            let mapper = device.mapper();
            device.close();
            device.close();
            doorbell.ring(1);
            device.read32(offset::CSTS).expect_err("is closed");
            device.reset().expect_err("is closed");
            device.set_bus_master(true).expect_err("is closed");
            device.set_bus_master(false).expect("accesses nothing");
            mapper.unmap(0x10000, 4096).expect("ended with it");
            let memory = nvme_async::memory::SharedMemory::new(4096).expect("a little memory");
            let host = iova::HostMemory::new(memory.addr(), 4096);
            let host = host.with_file(memory.fd(), 0);
            let direction = iova::Direction::Bidirectional;
            // SAFETY: nothing is mapped.
            let mapped = unsafe { mapper.map(0x10000, &host, direction) };
            assert!(matches!(mapped, Err(MapError::DeviceGone)), "{mapped:?}");
            drop(device);
            doorbell.ring(2);
            // Another client may have it.
            VfioUserDevice::open(peer.path(), &VfioUserOptions::default()).expect("opens");
        }
    });
}

#[test]
fn doorbells_are_where_doorbells_can_be() {
    bounded(|| {
        let peer = Peer::start(Traps::default());
        let device = VfioUserDevice::open(peer.path(), &VfioUserOptions::default()).expect("opens");
        for offset in [0, 0x14, 0xffc, 0x1002, 0x3ffe, 0x4000, u32::MAX - 3] {
            device.doorbell(offset).expect_err("is none");
            let _ = device.read32(offset | 1).expect_err("is no register");
        }
        device.doorbell(0x3ffc).expect("is the last one");
        // Whoever does not say so does not look at masks.
        assert!(device.vector_mask(0).is_none());
    });
}
