//! All kinds of requests, in all the ways in which a driver makes them.

use nvme_export::Export;
use nvme_export::vhost_user_blk::Options;

use crate::guest::{
    DATA, DISCARD, Driver, F_CONFIG_WCE, F_DISCARD, F_EVENT_IDX, F_FLUSH, F_INDIRECT, F_RO,
    F_VERSION_1, FLUSH, GET_ID, IN, IOERR, OK, OUT, Ram, UNSUPP, WRITE_ZEROES, Wishes, header,
    range,
};
use crate::host::{Host, SIZE};

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|index| (index as u8).wrapping_mul(31).wrapping_add(seed))
        .collect()
}

/// Each way in which a driver can have its queues.
fn ways() -> Vec<(Wishes, bool)> {
    let mut ways = Vec::new();
    for without in [vec![], vec![F_EVENT_IDX], vec![F_EVENT_IDX, F_INDIRECT]] {
        for is_indirect in [false, true] {
            if is_indirect && without.contains(&F_INDIRECT) {
                continue;
            }
            let wishes = Wishes {
                without: without.clone(),
                has_slots: is_indirect,
                ..Wishes::default()
            };
            ways.push((wishes, is_indirect));
        }
    }
    ways
}

#[test]
fn data_goes_both_ways_without_a_copy() {
    let host = Host::new();
    let served = host.serve();
    for (wishes, is_indirect) in ways() {
        let ram = Ram::new();
        let mut front_end = served.connect(&ram, &wishes);
        let driver = &mut front_end.start()[0];
        driver.is_indirect = is_indirect;
        // Pages in any order, the ends inside of one.
        let written = [
            (DATA + 0x3400, 0xc00),
            (DATA + 0x9000, 0x1000),
            (DATA + 0x6000, 0x1000),
            (DATA, 0x400),
        ];
        let data = pattern(1, 0x3000);
        let mut rest = data.as_slice();
        for (address, len) in written {
            let (now, later) = rest.split_at(len as usize);
            ram.write(address, now);
            rest = later;
        }
        assert_eq!(driver.run(OUT, 16, &written), OK);
        assert_eq!(host.read(16 * 512, data.len()), data);
        let to = [(DATA + 0x20000, 0x1000), (DATA + 0x30000, 0x2000)];
        let head = driver.request(IN, 16, &to);
        assert_eq!(driver.finish(head), (OK, 0x3001));
        let mut read = ram.read(DATA + 0x20000, 0x1000);
        read.extend(ram.read(DATA + 0x30000, 0x2000));
        assert_eq!(read, data);
        assert_eq!(driver.run(FLUSH, 0, &[]), OK);
        assert_eq!(host.bounced(), 0, "{wishes:?}");
        // Blocks of 512 bytes that lie anywhere can't be described by PRPs, but come along.
        let odd = [(DATA + 0x1200, 0x200), (DATA + 0x5202, 0x200)];
        ram.write(DATA + 0x1200, &data[..0x200]);
        ram.write(DATA + 0x5202, &data[0x200..0x400]);
        assert_eq!(driver.run(OUT, 100, &odd), OK);
        assert_eq!(host.read(51200, 0x400), data[..0x400]);
        let last = SIZE / 512 - 1;
        assert_eq!(driver.run(OUT, last, &[(DATA, 512)]), OK, "the last block");
        for (sector, len) in [
            (last, 1024),
            (last + 1, 512),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (0, 511),
            (0, 513),
        ] {
            for kind in [IN, OUT] {
                let status = driver.run(kind, sector, &[(DATA, len)]);
                assert_eq!(status, IOERR, "{kind} of {len} bytes at {sector}");
            }
        }
        assert_eq!(driver.run(IN, 0, &[]), IOERR, "nothing");
        drop(front_end);
    }
    host.end([served]);
}

#[test]
fn more_than_a_command_takes_and_many_at_a_time() {
    let host = Host::with(512, |config| config.mdts = 5);
    let served = host.serve();
    for (wishes, is_indirect) in ways() {
        let ram = Ram::new();
        let mut front_end = served.connect(&ram, &wishes);
        let driver = &mut front_end.start()[0];
        driver.is_indirect = is_indirect;
        let data = pattern(7, 4 << 20);
        ram.write(DATA, &data);
        // 64 pages apart from each other, and one run of 4 MiB.
        let pages: Vec<_> = (0..64).map(|page| (DATA + page * 0x2000, 0x1000)).collect();
        assert_eq!(driver.run(OUT, 0, &pages), OK);
        let expected: Vec<u8> = (0..64)
            .flat_map(|page| &data[page * 0x2000..][..0x1000])
            .copied()
            .collect();
        assert_eq!(host.read(0, 64 * 0x1000), expected);
        assert_eq!(driver.run(OUT, 8192, &[(DATA, 4 << 20)]), OK);
        assert_eq!(host.read(4 << 20, 4 << 20), data);
        assert_eq!(host.bounced(), 0);

        // As many segments as are offered.
        let pages: Vec<_> = (0..126)
            .map(|page| (DATA + page * 0x2000, 0x1000))
            .collect();
        assert_eq!(driver.run(OUT, 0, &pages), OK);
        let expected: Vec<u8> = (0..126)
            .flat_map(|page| &data[page * 0x2000..][..0x1000])
            .copied()
            .collect();
        assert_eq!(host.read(0, 126 * 0x1000), expected);

        // As many as there is room for, which come back in any order, again and again.
        let mut expected = 0;
        for round in 0..20_u64 {
            let old = driver.available;
            let at_a_time = match is_indirect {
                true => 100,
                false => 40,
            };
            for index in 0..at_a_time {
                let place = DATA + index * 0x1000;
                driver.prepare(
                    IN,
                    (4 << 20) / 512 + (index + round) * 8,
                    &[(place, 0x1000)],
                );
                expected += 1;
            }
            driver.kick(old);
            for _ in 0..at_a_time {
                let (head, len) = driver.wait();
                assert_eq!((driver.status(head), len), (OK, 0x1001));
                expected -= 1;
            }
            for index in 0..at_a_time {
                let place = ((index + round) * 0x1000) as usize;
                let read = ram.read(DATA + index * 0x1000, 0x1000);
                assert!(read == data[place..][..0x1000], "{round} {index}");
            }
            // The data that the next round compares with.
        }
        assert_eq!(expected, 0);
        drop(front_end);
    }
    host.end([served]);
}

#[test]
fn several_queues_at_a_time() {
    let host = Host::new();
    let served = host.serve();
    let ram = Ram::new();
    let wishes = Wishes {
        queues: 4,
        ..Wishes::default()
    };
    let mut front_end = served.connect(&ram, &wishes);
    let drivers = front_end.start();
    std::thread::scope(|scope| {
        for mut driver in drivers {
            let ram = &ram;
            scope.spawn(move || {
                let index = driver.index as u64;
                let place = DATA + (index << 20);
                for round in 0..200_u64 {
                    let data = pattern((index * 50 + round) as u8, 0x2000);
                    ram.write(place, &data);
                    let sector = index * 4096 + round % 50 * 16;
                    assert_eq!(driver.run(OUT, sector, &[(place, 0x2000)]), OK);
                    assert_eq!(driver.run(IN, sector, &[(place + 0x8000, 0x2000)]), OK);
                    assert_eq!(ram.read(place + 0x8000, 0x2000), data);
                }
            });
        }
    });
    assert_eq!(host.bounced(), 0);
    drop(front_end);
    host.end([served]);
}

fn dma(driver: &mut Driver, ram: &Ram, kind: u32, list: &[u8]) -> u8 {
    ram.write(DATA, list);
    driver.run(kind, 0, &[(DATA, list.len() as u32)])
}

#[test]
fn discard_and_write_zeroes() {
    for lba_size in [512, 4096] {
        let host = Host::with(lba_size, |_| {});
        let served = host.serve();
        let ram = Ram::new();
        let mut front_end = served.connect(&ram, &Wishes::default());
        let driver = &mut front_end.start()[0];
        host.write(0, &[7; 128 << 10]);
        let list = [range(8, 8, 0), range(32, 16, 1)].concat();
        assert_eq!(dma(driver, &ram, WRITE_ZEROES, &list), OK);
        let mut expected = vec![7; 128 << 10];
        expected[4096..8192].fill(0);
        expected[16384..24576].fill(0);
        assert_eq!(host.read(0, 128 << 10), expected);
        // Its memory reads as zeroes when it is discarded.
        let list = [range(64, 8, 0), range(128, 8, 0)].concat();
        assert_eq!(dma(driver, &ram, DISCARD, &list), OK);
        expected[32768..36864].fill(0);
        expected[65536..69632].fill(0);
        assert_eq!(host.read(0, 128 << 10), expected);
        // Parts of blocks stay as they are; to write them there is no way.
        let list = range(97, 9, 0);
        assert_eq!(dma(driver, &ram, DISCARD, &list), OK);
        let zeroes = dma(driver, &ram, WRITE_ZEROES, &range(97, 9, 0));
        if lba_size == 4096 {
            assert_eq!(zeroes, IOERR);
            assert_eq!(host.read(0, 128 << 10), expected);
        } else {
            assert_eq!(zeroes, OK);
        }
        let end = (SIZE / 512) as u32;
        for (kind, list, status) in [
            (DISCARD, range(0, 8, 1), UNSUPP),
            (DISCARD, range(0, 8, 2), UNSUPP),
            (WRITE_ZEROES, range(0, 8, 2), UNSUPP),
            (DISCARD, range(0, end + 8, 0), IOERR),
            (WRITE_ZEROES, range(8, end, 0), IOERR),
            (DISCARD, range(u64::MAX, 8, 0), IOERR),
            (WRITE_ZEROES, range(0, u32::MAX, 0), IOERR),
            (DISCARD, vec![], IOERR),
            (DISCARD, vec![0; 15], IOERR),
            (WRITE_ZEROES, vec![0; 17], IOERR),
            (DISCARD, vec![0; 65 * 16], IOERR),
            (DISCARD, range(0, 0, 0), OK),
            (WRITE_ZEROES, range(0, 0, 0), OK),
        ] {
            assert_eq!(dma(driver, &ram, kind, &list), status, "{kind} {list:?}");
        }
        drop(front_end);
        host.end([served]);
    }
}

#[test]
fn the_identifier_and_what_is_not_known() {
    let host = Host::new();
    let mut options = Options::default();
    options.id = Some("a disk with a name that is too long".to_owned());
    let served = host.serve_as("named", host.export(), &options);
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    let driver = &mut front_end.start()[0];
    ram.write(DATA, &[9; 32]);
    assert_eq!(driver.run(GET_ID, 0, &[(DATA, 20)]), OK);
    assert_eq!(ram.read(DATA, 21), b"a disk with a name t\x09");
    // Less, and in pieces.
    assert_eq!(driver.run(GET_ID, 0, &[(DATA + 64, 3), (DATA + 96, 4)]), OK);
    assert_eq!(ram.read(DATA + 64, 3), b"a d");
    assert_eq!(ram.read(DATA + 96, 4), b"isk ");
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 26, u32::MAX] {
        assert_eq!(driver.run(kind, 0, &[(DATA, 512)]), UNSUPP, "{kind}");
    }
    drop(front_end);
    host.end([served]);
}

/// A driver may cut a request into descriptors as it likes (virtio 1.2, section 2.7.4).
#[test]
fn any_layout() {
    let host = Host::new();
    let served = host.serve();
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    let driver = &mut front_end.start()[0];
    let data = pattern(3, 4096);
    // A header in three pieces, of which the last one has the data too.
    let head = header(OUT, 24);
    ram.write(DATA + 0x1ffb, &head[..5]);
    ram.write(DATA + 0x3000, &head[5..6]);
    ram.write(DATA + 0x5000 - 10, &head[6..]);
    ram.write(DATA + 0x5000, &data);
    let readable = [
        (DATA + 0x1ffb, 5),
        (DATA + 0x3000, 1),
        (DATA + 0x5000 - 10, 10 + 4096),
    ];
    ram.write(DATA, &[0xee]);
    let head = driver.add(&readable, &[(DATA, 1)]);
    driver.kick(driver.available.wrapping_sub(1));
    assert_eq!(driver.wait(), (head, 1));
    assert_eq!(ram.read(DATA, 1), [OK]);
    assert_eq!(host.read(24 * 512, 4096), data);
    // The status right after the data.
    ram.write(DATA + 0x100, &header(IN, 24));
    let head = driver.add(&[(DATA + 0x100, 16)], &[(DATA + 0x8000, 4097)]);
    driver.kick(driver.available.wrapping_sub(1));
    assert_eq!(driver.wait(), (head, 4097));
    assert_eq!(ram.read(DATA + 0x8000, 4096), data);
    assert_eq!(ram.read(DATA + 0x9000, 1), [OK]);
    assert_eq!(host.bounced(), 0);
    drop(front_end);
    host.end([served]);
}

#[test]
fn configuration() {
    let host = Host::with(4096, |_| {});
    let export = Export::of_range(host.namespace.clone(), 4096..(8 << 20)).expect("inside");
    let served = host.serve_as("part", export.clone(), &Options::default());
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    for bit in [F_FLUSH, F_CONFIG_WCE, F_DISCARD, F_VERSION_1, F_EVENT_IDX] {
        assert_ne!(front_end.features >> bit & 1, 0, "{bit}");
    }
    // ACCESS_PLATFORM, packed rings and read-only are not.
    for bit in [F_RO, 33, 34] {
        assert_eq!(front_end.features >> bit & 1, 0, "{bit}");
    }
    let config = front_end.config(0, 60);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().expect("four bytes"));
    assert_eq!((word(0), word(4)), ((8 << 11) - 8, 0), "sectors");
    assert_eq!(word(12), 126, "segments");
    assert_eq!(word(20), 4096, "block size");
    assert_eq!(config[32], 1, "write cache");
    assert_eq!(u16::from_le_bytes([config[34], config[35]]), 16, "queues");
    assert_eq!(word(44), 8, "discard alignment");
    assert_eq!(config[56], 1, "zeroes may unmap");
    assert_eq!(front_end.config(250, 6), [0; 6]);
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::empty();
    use vhost::vhost_user::VhostUserFrontend;
    front_end
        .messages
        .set_config(32, flags, &[0])
        .expect("taken");
    assert_eq!(front_end.config(32, 1), [0]);
    // The range is the disk.
    let driver = &mut front_end.start()[0];
    ram.write(DATA, &[5; 4096]);
    assert_eq!(driver.run(OUT, 0, &[(DATA, 4096)]), OK);
    assert_eq!(host.read(4096, 4096), [5; 4096]);
    let end = ((8 << 20) - 4096) / 512;
    assert_eq!(driver.run(OUT, end, &[(DATA, 4096)]), IOERR);
    drop(front_end);

    let read_only = host.serve_as("ro", export.read_only(), &Options::default());
    let mut front_end = read_only.connect(&ram, &Wishes::default());
    assert_ne!(front_end.features >> F_RO & 1, 0);
    assert_eq!(front_end.features >> F_DISCARD & 1, 0);
    let driver = &mut front_end.start()[0];
    assert_eq!(driver.run(IN, 0, &[(DATA, 4096)]), OK);
    assert_eq!(ram.read(DATA, 4096), [5; 4096]);
    assert_eq!(driver.run(OUT, 0, &[(DATA, 4096)]), IOERR);
    assert_eq!(dma(driver, &ram, DISCARD, &range(0, 8, 0)), IOERR);
    assert_eq!(dma(driver, &ram, WRITE_ZEROES, &range(0, 8, 0)), IOERR);
    assert_eq!(host.read(4096, 4096), [5; 4096]);
    drop(front_end);
    host.end([served, read_only]);
}

/// What a driver without a write cache is told of is there whatever happens.
#[test]
fn durable_writes() {
    for (without, writeback) in [
        (vec![], Some(false)),
        (vec![F_CONFIG_WCE, F_FLUSH], None),
        (vec![], None),
        (vec![F_CONFIG_WCE], None),
    ] {
        let host = Host::with(512, |config| config.volatile_write_cache = true);
        let served = host.serve();
        let ram = Ram::new();
        let wishes = Wishes {
            without: without.clone(),
            ..Wishes::default()
        };
        let mut front_end = served.connect(&ram, &wishes);
        if let Some(writeback) = writeback {
            let flags = vhost::vhost_user::message::VhostUserConfigFlags::empty();
            use vhost::vhost_user::VhostUserFrontend;
            front_end
                .messages
                .set_config(32, flags, &[writeback.into()])
                .expect("taken");
        }
        let driver = &mut front_end.start()[0];
        ram.write(DATA, &[6; 4096]);
        let syncs = || host.soft.counters().syncs;
        let before = syncs();
        assert_eq!(driver.run(OUT, 0, &[(DATA, 4096)]), OK);
        let is_durable = writeback == Some(false) || without.contains(&F_FLUSH);
        assert_eq!(syncs() > before, is_durable, "{without:?}");
        let before = syncs();
        assert_eq!(dma(driver, &ram, WRITE_ZEROES, &range(0, 8, 0)), OK);
        assert_eq!(syncs() > before, is_durable, "{without:?}");
        assert_eq!(driver.run(FLUSH, 0, &[]), OK);
        assert!(syncs() > before);
        drop(front_end);
        host.end([served]);
    }
}
