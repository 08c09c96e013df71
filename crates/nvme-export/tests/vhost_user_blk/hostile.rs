//! Guests and front ends that do not mean well.

use std::io::Write;
use std::os::unix::net::UnixStream;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::guest::{
    DATA, Descriptor, Driver, F_EVENT_IDX, F_INDIRECT, FrontEnd, IN, INDIRECT, IOERR, NEXT, OK,
    OUT, RAM, Ram, USER, WRITE, Wishes, header, memfd, region,
};
use crate::host::{Host, Served, eventually};

/// What breaks a queue: each gets a driver that has written nothing yet.
type Attack = (&'static str, fn(&mut Driver));

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}

/// A header and a status that are as they should be.
fn ends(driver: &Driver, ram: &Ram) -> (u64, u64) {
    let slot = driver.slot(0);
    ram.write(slot, &header(IN, 0));
    (slot, slot + 32)
}

const ATTACKS: &[Attack] = &[
    ("a chain that is a ring", |driver| {
        driver.describe(0, descriptor(DATA, 16, NEXT, 1));
        driver.describe(1, descriptor(DATA, 16, NEXT, 0));
        driver.publish(0);
    }),
    ("a descriptor that follows itself", |driver| {
        driver.describe(3, descriptor(DATA, 0, NEXT, 3));
        driver.publish(3);
    }),
    ("a next descriptor that is not there", |driver| {
        driver.describe(0, descriptor(DATA, 16, NEXT, 128));
        driver.publish(0);
    }),
    ("a head that is not there", |driver| driver.publish(128)),
    ("a head that is far from there", |driver| {
        driver.publish(65535)
    }),
    ("more available than there are", |driver| {
        driver.set_available_index(129);
    }),
    ("an index that goes back", |driver| {
        driver.set_available_index(65535);
    }),
    ("memory to read after memory to write", |driver| {
        driver.describe(0, descriptor(DATA, 16, NEXT, 1));
        driver.describe(1, descriptor(DATA, 512, WRITE | NEXT, 2));
        driver.describe(2, descriptor(DATA, 512, 0, 0));
        driver.publish(0);
    }),
    ("a header that is too short", |driver| {
        driver.describe(0, descriptor(DATA, 15, NEXT, 1));
        driver.describe(1, descriptor(DATA, 1, WRITE, 0));
        driver.publish(0);
    }),
    ("a header outside of memory", |driver| {
        driver.describe(0, descriptor(RAM - 8, 16, NEXT, 1));
        driver.describe(1, descriptor(DATA, 1, WRITE, 0));
        driver.publish(0);
    }),
    ("a header at the end of addresses", |driver| {
        driver.describe(0, descriptor(u64::MAX - 7, 16, NEXT, 1));
        driver.describe(1, descriptor(DATA, 1, WRITE, 0));
        driver.publish(0);
    }),
    ("no place for a status", |driver| {
        driver.describe(0, descriptor(DATA, 16, 0, 0));
        driver.publish(0);
    }),
    ("a status of no bytes", |driver| {
        driver.describe(0, descriptor(DATA, 16, NEXT, 1));
        driver.describe(1, descriptor(DATA, 0, WRITE, 0));
        driver.publish(0);
    }),
    ("more than 2^32 bytes", |driver| {
        driver.describe(0, descriptor(DATA, u32::MAX, NEXT, 1));
        driver.describe(1, descriptor(DATA, u32::MAX, WRITE, 0));
        driver.publish(0);
    }),
    ("an empty table", |driver| {
        driver.describe(0, descriptor(DATA, 0, INDIRECT, 0));
        driver.publish(0);
    }),
    ("a table that is no table", |driver| {
        driver.describe(0, descriptor(DATA, 33, INDIRECT, 0));
        driver.publish(0);
    }),
    ("a table that is too large", |driver| {
        driver.describe(0, descriptor(DATA, 1025 * 16, INDIRECT, 0));
        driver.publish(0);
    }),
    ("a table outside of memory", |driver| {
        driver.describe(0, descriptor(RAM, 32, INDIRECT, 0));
        driver.publish(0);
    }),
    ("a table at the end of addresses", |driver| {
        driver.describe(0, descriptor(u64::MAX - 8, 32, INDIRECT, 0));
        driver.publish(0);
    }),
    ("a table with something after it", |driver| {
        driver.write_table(DATA);
        driver.describe(0, descriptor(DATA, 32, INDIRECT | NEXT, 1));
        driver.describe(1, descriptor(DATA, 16, WRITE, 0));
        driver.publish(0);
    }),
    ("a table in a table", |driver| {
        driver.write_table(DATA + 4096);
        driver.describe_at(DATA, descriptor(DATA + 4096, 32, INDIRECT, 0));
        driver.describe(0, descriptor(DATA, 32, INDIRECT, 0));
        driver.publish(0);
    }),
    ("a table after one in a chain", |driver| {
        driver.write_table(DATA);
        driver.describe_at(DATA + 16, descriptor(DATA, 32, INDIRECT, 0));
        driver.describe(0, descriptor(DATA, 32, INDIRECT, 0));
        driver.publish(0);
    }),
    ("a table that leads out of itself", |driver| {
        driver.describe_at(DATA, descriptor(DATA, 16, NEXT, 2));
        driver.describe(0, descriptor(DATA, 32, INDIRECT, 0));
        driver.publish(0);
    }),
    ("a table that is a ring", |driver| {
        driver.describe_at(DATA, descriptor(DATA, 16, NEXT, 1));
        driver.describe_at(DATA + 16, descriptor(DATA, 16, NEXT, 0));
        driver.describe(0, descriptor(DATA, 32, INDIRECT, 0));
        driver.publish(0);
    }),
];

/// A guest that means well, on a queue of another disk of the same controller.
fn is_served(driver: &mut Driver, ram: &Ram, seed: u8) {
    ram.write(DATA, &[seed; 8192]);
    assert_eq!(driver.run(OUT, 8, &[(DATA, 8192)]), OK);
    assert_eq!(driver.run(IN, 8, &[(DATA + 0x10000, 8192)]), OK);
    assert_eq!(ram.read(DATA + 0x10000, 8192), [seed; 8192]);
}

#[test]
fn a_broken_queue_stops_and_nobody_else_notices() {
    let host = Host::new();
    let served = host.serve();
    let other = host.serve_as("other", host.export(), &Default::default());
    let good = Ram::new();
    let mut good_front_end = other.connect(&good, &Wishes::default());
    let neighbour = &mut good_front_end.start()[0];
    for (seed, (what, attack)) in ATTACKS.iter().enumerate() {
        println!("{what}");
        let ram = Ram::new();
        let wishes = Wishes {
            queues: 2,
            ..Wishes::default()
        };
        let mut front_end = served.connect(&ram, &wishes);
        let mut drivers = front_end.start();
        // Something that works is in flight as well.
        let head = drivers[0].request(IN, 0, &[(DATA, 4096)]);
        assert_eq!(drivers[0].finish(head).0, OK);
        front_end.messages.get_vring_base(0).expect("stops");
        let mut victim = Driver::new(&ram, 0, 128, front_end.features);
        front_end.start_queue(&victim, 0);
        attack(&mut victim);
        victim.kick.write(1).expect("kicked");
        victim.wait_broken();
        assert_eq!(victim.used_index(), 0, "{what}");
        is_served(&mut drivers[1], &ram, seed as u8);
        is_served(neighbour, &good, seed as u8);
        // It is as good as new after a reset, or for the next guest.
        front_end.messages.get_vring_base(0).expect("stops");
        let mut driver = Driver::new(&ram, 0, 128, front_end.features);
        front_end.start_queue(&driver, 0);
        is_served(&mut driver, &ram, 255);
    }
    drop(good_front_end);
    host.end([served, other]);
}

#[test]
fn what_was_not_agreed_on_is_not_done() {
    let host = Host::new();
    let served = host.serve();
    let ram = Ram::new();
    let wishes = Wishes {
        without: vec![F_INDIRECT, F_EVENT_IDX],
        ..Wishes::default()
    };
    let mut front_end = served.connect(&ram, &wishes);
    let driver = &mut front_end.start()[0];
    driver.is_indirect = true;
    driver.request(IN, 0, &[(DATA, 512)]);
    driver.wait_broken();
    drop(front_end);
    host.end([served]);
}

/// Requests that make no sense, in queues that do.
#[test]
fn memory_that_is_not_there_is_an_error_of_the_request() {
    let host = Host::new();
    let served = host.serve();
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    let driver = &mut front_end.start()[0];
    for kind in [IN, OUT] {
        for (address, len) in [
            (RAM, 512),
            (RAM - 512, 1024),
            (1 << 40, 4096),
            (u64::MAX - 511, 512),
            (u64::MAX, 512),
            (u64::MAX - 100, 1024),
            (USER, 512),
            (DATA, 0x7fff_fe00),
        ] {
            let status = driver.run(kind, 0, &[(address, len)]);
            assert_eq!(status, IOERR, "{kind} {address:#x} {len:#x}");
        }
        assert_eq!(driver.run(kind, 0, &[(DATA, 512), (RAM, 512)]), IOERR);
    }
    // Where the status is to go is known when the request is done. There is nobody to tell.
    ram.write(DATA, &header(IN, 0));
    let head = driver.add(&[(DATA, 16)], &[(DATA + 0x1000, 512), (RAM, 1)]);
    driver.kick(driver.available.wrapping_sub(1));
    assert_eq!(driver.wait().0, head);
    assert_eq!(driver.run(IN, 0, &[(DATA, 512)]), OK);
    drop(front_end);
    host.end([served]);
}

/// The queues themselves, as data.
#[test]
fn a_guest_that_overwrites_its_queues_harms_itself_only() {
    let host = Host::new();
    host.write(0, &[0xff; 1 << 20]);
    let served = host.serve();
    let ram = Ram::new();
    let wishes = Wishes {
        queues: 2,
        ..Wishes::default()
    };
    let mut front_end = served.connect(&ram, &wishes);
    let mut drivers = front_end.start();
    // All of queue 0, while it is at work.
    let (slot, status) = ends(&drivers[0], &ram);
    drivers[0].add(&[(slot, 16)], &[(0, 0x2_0000), (status, 1)]);
    drivers[0].kick.write(1).expect("kicked");
    eventually("it is overwritten", || ram.read(0, 16) == [0xff; 16]);
    drivers[0].kick.write(1).expect("kicked");
    is_served(&mut drivers[1], &ram, 1);
    drop(front_end);
    let mut front_end = served.connect(&Ram::new(), &Wishes::default());
    let ram = front_end.ram.clone();
    is_served(&mut front_end.start()[0], &ram, 2);
    drop(front_end);
    host.end([served]);
}

#[test]
fn the_same_request_twice_is_refused() {
    let host = Host::new();
    let served = host.serve();
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    let driver = &mut front_end.start()[0];
    host.soft.controller().hold_io();
    let head = driver.request(IN, 0, &[(DATA, 512)]);
    driver.publish(head);
    driver.kick.write(1).expect("kicked");
    driver.wait_broken();
    host.soft.controller().release();
    // What was taken is done.
    assert_eq!(driver.finish(head).0, OK);
    drop(front_end);
    host.end([served]);
}

fn refused(served: &Served, what: &str, ask: impl FnOnce(&mut FrontEnd) -> bool) {
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    assert!(!ask(&mut front_end), "{what} is refused");
}

#[test]
fn front_ends_that_make_no_sense() {
    let host = Host::new();
    let served = host.serve();
    let described = |size, offset, file: &_| region(1 << 32, size, USER + (1 << 40), offset, file);
    let sealed = memfd(1 << 20, true);
    let open = memfd(1 << 20, false);
    let null = std::fs::File::open("/dev/null").expect("there");
    let plain = tempfile::tempfile().expect("a file");
    plain.set_len(1 << 20).expect("sized");
    for (what, size, offset, file) in [
        ("memory that can be taken away", 1 << 20, 0, &open),
        ("a file of a disk", 1 << 20, 0, &plain),
        ("no file", 1 << 20, 0, &null),
        ("more than there is", 2 << 20, 0, &sealed),
        ("what is past the end", 1 << 20, 4096, &sealed),
        ("parts of pages", 4095, 0, &sealed),
        ("parts of pages", 4096, 1, &sealed),
    ] {
        refused(&served, what, |front_end| {
            front_end
                .messages
                .add_mem_region(&described(size, offset, file))
                .is_ok()
        });
        refused(&served, what, |front_end| {
            let ram = front_end.ram.region();
            front_end
                .messages
                .set_mem_table(&[ram, described(size, offset, file)])
                .is_ok()
        });
    }
    refused(&served, "memory twice", |front_end| {
        let ram = front_end.ram.region();
        front_end.messages.add_mem_region(&ram).is_ok()
    });
    refused(&served, "memory that is not there", |front_end| {
        front_end
            .messages
            .remove_mem_region(&described(1 << 20, 0, &sealed))
            .is_ok()
    });
    refused(&served, "features that were not offered", |front_end| {
        let features = front_end.features | 1 << 33;
        front_end.messages.set_features(features).is_ok()
    });
    for size in [0, 3, 2048] {
        refused(&served, "a size", |front_end| {
            front_end.messages.set_vring_num(0, size).is_ok()
        });
    }
    refused(&served, "a queue that is not there", |front_end| {
        front_end.messages.set_vring_num(16, 128).is_ok()
    });
    refused(&served, "a queue without a place", |front_end| {
        let driver = Driver::new(&front_end.ram, 0, 128, 0);
        front_end.messages.set_vring_num(0, 128).expect("taken");
        let kick = front_end.messages.set_vring_kick(0, &driver.kick);
        kick.is_ok() && front_end.messages.set_vring_enable(0, true).is_ok()
    });
    refused(&served, "a queue outside of memory", |front_end| {
        let mut driver = Driver::new(&front_end.ram, 0, 128, 0);
        driver.index = 0;
        let mut places = vhost::VringConfigData {
            queue_max_size: 128,
            queue_size: 128,
            flags: 0,
            desc_table_addr: USER,
            used_ring_addr: USER + 0x14000,
            avail_ring_addr: USER + 0x10000,
            log_addr: None,
        };
        places.desc_table_addr = USER + RAM - 16;
        front_end.messages.set_vring_num(0, 128).expect("taken");
        let placed = front_end.messages.set_vring_addr(0, &places).is_ok();
        placed
            && front_end.messages.set_vring_kick(0, &driver.kick).is_ok()
            && front_end.messages.set_vring_enable(0, true).is_ok()
    });
    refused(&served, "the disk's size", |front_end| {
        let flags = vhost::vhost_user::message::VhostUserConfigFlags::empty();
        front_end.messages.set_config(0, flags, &[0; 8]).is_ok()
    });
    // Half a message, and nothing but noise.
    for noise in [&[1_u8, 0, 0, 0][..], &[0xa5; 300]] {
        let mut stream = UnixStream::connect(&served.socket).expect("connects");
        stream.write_all(noise).expect("sent");
    }
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    is_served(&mut front_end.start()[0], &ram, 9);
    drop(front_end);
    host.end([served]);
}

/// A front end that is trusted may have any file that can be mapped.
#[test]
fn a_trusted_front_end() {
    let host = Host::new();
    let mut options = nvme_export::vhost_user_blk::Options::default();
    options.trust_client = true;
    let served = host.serve_as("trusting", host.export(), &options);
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    let open = memfd(1 << 20, false);
    let region = region(1 << 32, 1 << 20, 1 << 40, 0, &open);
    front_end
        .messages
        .add_mem_region(&region)
        .expect("taken as it is");
    let driver = &mut front_end.start()[0];
    assert_eq!(driver.run(IN, 0, &[(1 << 32, 4096)]), OK);
    drop(front_end);
    host.end([served]);
}
