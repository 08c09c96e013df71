//! Clients that hold the server up, or try to.

use std::os::fd::OwnedFd;
use std::time::Duration;

use nvme_spec::{admin, nvm};
use nvme_vfio_user::Options;
use rustix::fs::OFlags;
use vfio_user::{IrqAction, IrqData, RegionAccess, RegionWrite, Request, SetIrqs, irq, region};

use crate::bad::is_served;
use crate::client::{Client, Memory, device, raw, with};
use crate::queues::{DATA, prp};

#[test]
fn a_client_that_leaves_while_it_is_asked_holds_nobody_up() {
    let device = device(&Options::default());
    for memory in [Memory::Messages, Memory::Twin] {
        with(&device, |stream| {
            let mut client = Client::up(stream, memory);
            client.submit(0, admin::identify_controller().with_data(prp(DATA)));
            // What would wait for the controller's thread, which waits for an answer.
            client.send_raw(&Request::DeviceReset.encode(1, false), &[]);
            client.send_raw(&Request::DeviceReset.encode(2, false), &[]);
        });
    }
    is_served(&device);
}

#[test]
fn whoever_does_not_go_on_is_sent_away() {
    let mut options = Options::default();
    options.patience = Duration::from_millis(50);
    let impatient = device(&options);
    // Says nothing, or the beginning of VERSION.
    let version = raw(1, 0, &[0, 0, 1, 0]);
    for there in [0, 1, 16, version.len() - 1] {
        with(&impatient, |stream| {
            let mut client = Client::silent(stream, Memory::Sealed);
            client.send_raw(&version[..there], &[]);
            assert!(client.is_over(), "{there}");
        });
    }
    // Says that, and later the beginning of a message. There has to be time for the first.
    options.patience = Duration::from_millis(500);
    let device = device(&options);
    for there in [1, 16, 17] {
        with(&device, |stream| {
            let mut client = Client::new(stream, Memory::Sealed);
            client.send_raw(&raw(2, 0, &[0; 32])[..there], &[]);
            assert!(client.is_over(), "{there}");
        });
    }
    // Does not read the answers to what it asks for, on and on.
    with(&device, |stream| {
        let client = Client::new(stream, Memory::Sealed);
        let read = Request::RegionRead(RegionAccess {
            region: region::BAR0,
            offset: 0,
            count: 0x4000,
        });
        let bytes = read.encode(1, false);
        while vfio_user::socket::send(&client.stream, &bytes, &[]).is_ok() {}
    });
    // Silence of a client that owes nothing is no offence.
    with(&device, |stream| {
        let mut client = Client::up(stream, Memory::Sealed);
        std::thread::sleep(2 * options.patience);
        client.create_queues();
        client.io_ok(nvm::flush(1));
    });
}

/// Fills an eventfd and makes it block, so that whoever signals it waits until it is read.
fn clog(eventfd: &OwnedFd) {
    rustix::fs::fcntl_setfl(eventfd, OFlags::NONBLOCK).unwrap();
    // What is there already need not leave room for so much.
    let _ = rustix::io::read(eventfd, &mut [0; 8]);
    rustix::io::write(eventfd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    rustix::fs::fcntl_setfl(eventfd, OFlags::empty()).unwrap();
}

#[test]
fn an_eventfd_that_blocks_holds_up_its_client_only() {
    let device = device(&Options::default());
    let trigger = |data| {
        Request::SetIrqs(SetIrqs {
            index: irq::MSIX,
            start: 0,
            count: 1,
            action: IrqAction::Trigger,
            data,
        })
    };
    // Signalled because the client asks for it, by a write to the table, and by the controller.
    for way in 0..3 {
        with(&device, |stream| {
            let mut client = Client::up(stream, Memory::Sealed);
            client.admin_ok(admin::identify_controller().with_data(prp(DATA)));
            if way == 1 {
                client.write32(0x200c, 1);
            }
            clog(&client.eventfds[0]);
            match way {
                0 => client.send_raw(&trigger(IrqData::None).encode(1, false), &[]),
                _ => {
                    client.submit(0, admin::identify_controller().with_data(prp(DATA)));
                    client.wait("a completion", |client| client.look(0));
                }
            }
            if way == 1 {
                let unmask = RegionWrite {
                    region: region::BAR0,
                    offset: 0x200c,
                    data: &[0; 4],
                };
                client.send_raw(&Request::RegionWrite(unmask).encode(1, false), &[]);
            }
            // What comes later has to wait: a little more than there is room for.
            for _ in 0..1030 {
                client.send_raw(&trigger(IrqData::Bool(&[1])).encode(2, true), &[]);
            }
        });
        is_served(&device);
    }
}
