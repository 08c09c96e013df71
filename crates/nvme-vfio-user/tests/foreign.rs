//! A client that others wrote: that of the crate `vfio_user` of rust-vmm, which cloud-hypervisor uses.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use nvme_soft::store::MemoryStore;
use nvme_soft::{Config, NamespaceConfig};
use nvme_spec::registers::{DoorbellKind, doorbell_offset, offset};
use nvme_spec::{Cqe, DataPointer, admin};
use nvme_vfio_user::{Device, Doorbells, Options, Server};
use rust_vmm_vfio_user::Client;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vfio_user::{irq, region};
use zerocopy::IntoBytes;

/// Where the client's memory begins for the device: the admin queues, a page each, and one for data.
const BASE: u64 = 0x1_0000_0000;
const PAGES: u64 = 3;
/// VFIO_IRQ_SET_DATA_EVENTFD and VFIO_IRQ_SET_ACTION_TRIGGER (linux/vfio.h).
const EVENTFD_TRIGGER: u32 = 0x4 | 0x20;

fn device(doorbells: Doorbells) -> Device {
    let mut config = Config::default();
    let store = MemoryStore::new(1 << 20).unwrap();
    config.namespaces.push(NamespaceConfig::new(store, 512));
    config.serial = "foreign".to_owned();
    let mut options = Options::default();
    options.doorbells = doorbells;
    Device::new(config, &options).unwrap()
}

fn write32(client: &mut Client, offset: u32, value: u32) {
    let (place, data) = (offset.into(), value.to_le_bytes());
    client.region_write(region::BAR0, place, &data).unwrap();
}

fn is_ready(client: &mut Client) -> bool {
    let mut status = [0; 4];
    let place = offset::CSTS.into();
    client
        .region_read(region::BAR0, place, &mut status)
        .unwrap();
    status[0] & 1 != 0
}

/// Finds out what there is, sets interrupts and memory up, enables the controller and has it identify itself.
fn identify(doorbells: Doorbells) {
    let (device, directory) = (device(doorbells), tempfile::tempdir().unwrap());
    let server = Server::bind(directory.path().join("nvme.sock")).unwrap();
    let stopper = server.stopper();
    thread::scope(|scope| {
        scope.spawn(|| server.run(&device).unwrap());
        let mut client = Client::new(server.path()).unwrap();
        let bar = client.region(region::BAR0).unwrap();
        let areas: Vec<_> = bar
            .sparse_areas
            .iter()
            .map(|a| (a.offset, a.size))
            .collect();
        assert_eq!(bar.size, 0x4000);
        let page = match doorbells {
            Doorbells::Trapped => {
                assert!(bar.file_offset.is_none() && areas.is_empty());
                None
            }
            _ => {
                assert_eq!(areas, [(0x1000, 0x1000)]);
                bar.file_offset
                    .as_ref()
                    .map(|at| at.file().try_clone().unwrap())
            }
        };
        assert_eq!(page.is_some(), matches!(doorbells, Doorbells::Mapped));
        assert_ne!(client.get_irq_info(irq::MSIX).unwrap().count, 0);

        let memory = memfd_create("client", MemfdFlags::ALLOW_SEALING).unwrap();
        let memory = File::from(memory);
        memory.set_len(PAGES << 12).unwrap();
        fcntl_add_seals(&memory, SealFlags::SHRINK).unwrap();
        client
            .dma_map(0, BASE, PAGES << 12, memory.as_raw_fd())
            .unwrap();
        // Bus master and interrupt disable in the command register; MSI-X enable.
        client
            .region_write(region::CONFIG, 4, &[0x06, 0x04])
            .unwrap();
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        client
            .set_irqs(irq::MSIX, EVENTFD_TRIGGER, 0, 1, &[event.as_raw_fd()])
            .unwrap();
        client
            .region_write(region::CONFIG, 0x52, &[0x00, 0x80])
            .unwrap();

        write32(&mut client, offset::AQA, 15 << 16 | 15);
        for (register, address) in [(offset::ASQ, BASE), (offset::ACQ, BASE + 0x1000)] {
            let (place, data) = (register.into(), address.to_le_bytes());
            client.region_write(region::BAR0, place, &data).unwrap();
        }
        write32(&mut client, offset::CC, 6 << 16 | 4 << 20 | 1);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_ready(&mut client) {
            assert!(Instant::now() < deadline, "the controller is not ready");
        }

        let data = DataPointer::Prp {
            prp1: BASE + 0x2000,
            prp2: 0,
        };
        let command = admin::identify_controller().with_data(data).with_cid(7);
        memory.write_all_at(command.as_bytes(), 0).unwrap();
        let doorbell = doorbell_offset(0, DoorbellKind::SubmissionTail, 0);
        match &page {
            Some(page) => page.write_all_at(&[1, 0, 0, 0], doorbell.into()).unwrap(),
            None => write32(&mut client, doorbell, 1),
        }
        let mut events = [PollFd::new(&event, PollFlags::IN)];
        let patience = Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        assert_eq!(poll(&mut events, Some(&patience)), Ok(1), "no interrupt");
        let mut entry = [0; 4];
        memory.read_exact_at(entry.as_mut_bytes(), 0x1000).unwrap();
        let entry = Cqe::from_dwords(entry);
        assert!(entry.status().is_success(), "{}", entry.status());
        assert_eq!(entry.cid(), 7);
        let mut serial = [0; 20];
        memory.read_exact_at(&mut serial, 0x2000 + 4).unwrap();
        assert_eq!(&serial, b"foreign             ");

        client.dma_unmap(BASE, PAGES << 12).unwrap();
        client.reset().unwrap();
        assert!(!is_ready(&mut client));
        client.shutdown().unwrap();
        stopper.stop();
    });
}

#[test]
fn uses_trapped_doorbells() {
    identify(Doorbells::Trapped);
}

#[test]
fn uses_mapped_doorbells() {
    identify(Doorbells::Mapped);
}
