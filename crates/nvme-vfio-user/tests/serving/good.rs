//! Clients that mean well.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nvme_spec::registers::offset;
use nvme_spec::{admin, nvm};
use nvme_vfio_user::{Doorbells, Options};
use rustix::io::Errno;
use vfio_user::{
    Command, DmaUnmap, IrqAction, IrqData, Limits, RegionWrite, Reply, Request, SetIrqs,
    WriteMulti, irq, region,
};

use crate::client::{BASE, Client, LAST_PAGE, MEMORIES, MEMORY, Memory, device, map, with};
use crate::queues::{DATA, EVENT_INDEX, SHADOW, prp};

fn options(doorbells: Doorbells) -> Options {
    let mut options = Options::default();
    options.doorbells = doorbells;
    options
}

fn write(client: &mut Client, lba: u64, byte: u8) {
    client.ram.write_all_at(&[byte; 4096], DATA - BASE).unwrap();
    client.io_ok(nvm::write(1, lba, 8, false).with_data(prp(DATA)));
}

fn read(client: &mut Client, lba: u64) -> Vec<u8> {
    client.ram.write_all_at(&[0xee; 4096], DATA - BASE).unwrap();
    client.io_ok(nvm::read(1, lba, 8, false).with_data(prp(DATA)));
    let mut data = vec![0; 4096];
    client.ram.read_exact_at(&mut data, DATA - BASE).unwrap();
    data
}

#[test]
fn everything_from_the_first_message_to_data() {
    for doorbells in [Doorbells::Trapped, Doorbells::Mapped] {
        let device = device(&options(doorbells));
        for memory in MEMORIES {
            with(&device, |stream| {
                let mut client = Client::up(stream, memory);
                let is_mapped = doorbells == Doorbells::Mapped;
                assert_eq!(client.doorbells.is_some(), is_mapped);
                client.admin_ok(admin::identify_controller().with_data(prp(DATA)));
                assert!(client.is_signalled(0), "{memory:?}");
                let mut serial = [0; 8];
                client
                    .ram
                    .read_exact_at(&mut serial, DATA - BASE + 4)
                    .unwrap();
                assert_eq!(&serial, b"SOFT0001");
                client.create_queues();
                for round in 0..40_u8 {
                    write(&mut client, u64::from(round) * 8, round);
                    assert!(client.is_signalled(1), "{memory:?}");
                }
                for round in 0..40_u8 {
                    assert_eq!(read(&mut client, u64::from(round) * 8), [round; 4096]);
                }
            });
        }
        assert_eq!(device.controller().counters().refused_accesses, 0);
        assert_eq!(device.controller().counters().invalid_doorbells, 0);
    }
}

#[test]
fn the_vendor_is_the_same_everywhere() {
    let mut options = Options::default();
    options.pci_id = (0x1234, 0x5678);
    let device = device(&options);
    with(&device, |stream| {
        let mut client = Client::up(stream, Memory::Sealed);
        client.admin_ok(admin::identify_controller().with_data(prp(DATA)));
        let mut data = [0; 4];
        client.ram.read_exact_at(&mut data, DATA - BASE).unwrap();
        assert_eq!(data[..2], client.read(region::CONFIG, 0x00, 2));
        assert_eq!(data[2..], client.read(region::CONFIG, 0x2c, 2));
        assert_eq!(client.config16(0), 0x1234);
    });
}

#[test]
fn registers_of_both_sizes() {
    let device = device(&Options::default());
    with(&device, |stream| {
        let mut client = Client::new(stream, Memory::Sealed);
        let cap = client.read(region::BAR0, 0, 8);
        let halves = [client.read32(0), client.read32(4)];
        assert_eq!(cap[..4], halves[0].to_le_bytes());
        assert_eq!(cap[4..], halves[1].to_le_bytes());
        assert_eq!(client.read32(offset::VS), 0x0002_0000);
        client.write(region::BAR0, 0x28, &0x1_2345_6000_u64.to_le_bytes());
        assert_eq!((client.read32(0x28), client.read32(0x2c)), (0x2345_6000, 1));
        // Bytes in the middle of registers.
        assert_eq!(client.read(region::BAR0, 9, 2), [0, 2]);
        assert_eq!(
            client.read(region::BAR0, 0x29, 8),
            [0x60, 0x45, 0x23, 1, 0, 0, 0, 0]
        );
        // All of the BAR, doorbells and tables included.
        assert_eq!(client.read(region::BAR0, 0, 0x4000).len(), 0x4000);
        assert_eq!(client.read32(0x200c), 1, "masked at first");
        client.write32(0x2000, 0xfee0_0000);
        assert_eq!(client.read32(0x2000), 0xfee0_0000);
        let writes = [
            RegionWrite {
                region: region::BAR0,
                offset: 0x2004,
                data: &[1, 0, 0, 0],
            },
            RegionWrite {
                region: region::CONFIG,
                offset: 0x3c,
                data: &[9],
            },
        ];
        let request = Request::RegionWriteMulti(WriteMulti::new(&writes).unwrap());
        client.ask_ok(&request, &[]);
        assert_eq!((client.read32(0x2004), client.config16(0x3c)), (1, 9));
    });
}

#[test]
fn what_the_device_says_of_itself() {
    let device = device(&Options::default());
    with(&device, |stream| {
        let mut client = Client::new(stream, Memory::Sealed);
        let limits = Limits::default();
        let answer = client.ask(&Request::DeviceInfo { argsz: 16 }, &[]);
        let Ok(Reply::DeviceInfo(info)) = answer.reply(&limits) else {
            panic!("{answer:?}");
        };
        assert!(info.resets && info.is_pci && (info.regions, info.irqs) == (9, 5));
        for index in 0..9 {
            let answer = client.ask(&Request::RegionInfo { argsz: 32, index }, &[]);
            let Ok(Reply::RegionInfo(info)) = answer.reply(&limits) else {
                panic!("{answer:?}");
            };
            let size = match index {
                region::BAR0 => 0x4000,
                region::CONFIG => 4096,
                _ => 0,
            };
            assert_eq!((info.index, info.size), (index, size));
            assert_eq!(info.readable && info.writable, size > 0);
        }
        for index in 0..5 {
            let answer = client.ask(&Request::IrqInfo { argsz: 16, index }, &[]);
            let Ok(Reply::IrqInfo(info)) = answer.reply(&limits) else {
                panic!("{answer:?}");
            };
            let count = if index == irq::MSIX { 65 } else { 0 };
            assert_eq!(
                (info.index, info.count, info.eventfd),
                (index, count, count > 0)
            );
        }
        // NVMe, by class; INTx has no pin.
        let class = client.read(region::CONFIG, 9, 3);
        assert_eq!(class, [0x02, 0x08, 0x01]);
    });
}

#[test]
fn shadow_doorbells_spare_messages() {
    const ROUNDS: u32 = 500;
    for memory in MEMORIES {
        let device = device(&Options::default());
        with(&device, |stream| {
            let mut client = Client::up(stream, memory);
            client.admin_ok(admin::doorbell_buffer_config(SHADOW, EVENT_INDEX));
            client.shadow = true;
            client.create_queues();
            let before = client.register_writes;
            for _ in 0..ROUNDS {
                client.io_ok(nvm::flush(1));
            }
            let writes = client.register_writes - before;
            // One to wake it after each sleep at most, and none for heads but once in a lap.
            assert!(writes <= ROUNDS + ROUNDS / 8, "{memory:?}: {writes}");
        });
    }
}

#[test]
fn the_next_client_finds_nothing_of_the_last() {
    for doorbells in [Doorbells::Trapped, Doorbells::Mapped] {
        let device = device(&options(doorbells));
        let first = with(&device, |stream| {
            let mut client = Client::up(stream, Memory::Sealed);
            client.create_queues();
            write(&mut client, 0, 0x77);
            // In the middle of commands.
            device.controller().hold_io();
            for lba in 0..10 {
                client.submit(1, nvm::read(1, lba, 8, false).with_data(prp(DATA)));
            }
            client.stream.shutdown(std::net::Shutdown::Both).unwrap();
            client
        });
        device.controller().release();
        let before: Vec<u8> = {
            let mut all = vec![0; MEMORY as usize];
            first.ram.read_exact_at(&mut all, 0).unwrap();
            all
        };
        with(&device, |stream| {
            let mut client = Client::new(stream, Memory::Sealed);
            assert_eq!(client.config16(4), 0);
            assert_eq!(client.config16(0x52), 64);
            assert_eq!(
                (client.read32(offset::CC), client.read32(offset::CSTS)),
                (0, 0)
            );
            assert_eq!(client.read32(0x200c), 1);
            drop(client);
        });
        with(&device, |stream| {
            let mut client = Client::up(stream, Memory::Sealed);
            client.create_queues();
            // The first one still has a page of doorbells mapped, which nobody looks at any more.
            if let Some(page) = &first.doorbells {
                page.write_all_at(&[0x3; 4096], 0x1000).unwrap();
            }
            assert_eq!(read(&mut client, 0), [0x77; 4096]);
        });
        let mut after = vec![0; MEMORY as usize];
        first.ram.read_exact_at(&mut after, 0).unwrap();
        assert!(
            before == after,
            "memory of a client that is gone was written"
        );
        assert!(first.eventfds.iter().all(|eventfd| {
            // What was signalled before it left.
            let _ = rustix::io::read(eventfd, &mut [0; 8]);
            rustix::io::read(eventfd, &mut [0; 8]) == Err(Errno::AGAIN)
        }));
        assert_eq!(device.controller().counters().invalid_doorbells, 0);
    }
}

#[test]
fn resets() {
    let device = device(&Options::default());
    with(&device, |stream| {
        let mut client = Client::up(stream, Memory::Sealed);
        client.create_queues();
        // DEVICE_RESET leaves configuration space alone.
        client.ask_ok(&Request::DeviceReset, &[]);
        assert_eq!(
            (client.read32(offset::CC), client.read32(offset::CSTS)),
            (0, 0)
        );
        assert_eq!(
            (client.config16(4), client.config16(0x52)),
            (0x0406, 0x8040)
        );
        client.enable();
        client.create_queues();
        client.io_ok(nvm::flush(1));
        assert!(client.is_signalled(1));
        // A function level reset does not.
        client.write(region::CONFIG, 0x68, &0x8000_u16.to_le_bytes());
        assert_eq!(client.read32(offset::CC), 0);
        assert_eq!((client.config16(4), client.config16(0x52)), (0, 64));
        client.write(region::CONFIG, 4, &0x0406_u16.to_le_bytes());
        client.write(region::CONFIG, 0x52, &0x8000_u16.to_le_bytes());
        client.enable();
        client.create_queues();
        client.io_ok(nvm::flush(1));
        assert!(client.is_signalled(1));
    });
}

#[test]
fn without_bus_mastering_memory_is_not_touched() {
    let device = device(&Options::default());
    with(&device, |stream| {
        let mut client = Client::up(stream, Memory::Sealed);
        client.write(region::CONFIG, 4, &0x0402_u16.to_le_bytes());
        let cid = client.submit(0, admin::identify_controller().with_data(prp(DATA)));
        let accesses = device.controller().counters().admin_commands;
        assert!(client.look(0).is_none());
        client.write(region::CONFIG, 4, &0x0406_u16.to_le_bytes());
        let entry = client.wait("the completion", |client| client.look(0));
        assert_eq!(entry.cid(), cid);
        assert_eq!(device.controller().counters().admin_commands, accesses + 1);
    });
}

#[test]
fn masked_vectors_wait() {
    let device = device(&Options::default());
    with(&device, |stream| {
        let mut client = Client::up(stream, Memory::Sealed);
        client.write32(0x200c, 1);
        client.admin_ok(admin::identify_controller().with_data(prp(DATA)));
        client.wait("the pending bit", |client| {
            (client.read32(0x3000) == 1).then_some(())
        });
        assert!(rustix::io::read(&client.eventfds[0], &mut [0; 8]).is_err());
        client.write32(0x200c, 0);
        assert!(client.is_signalled(0));
        assert_eq!(client.read32(0x3000), 0);
        // The client triggers one itself.
        let request = Request::SetIrqs(SetIrqs {
            index: irq::MSIX,
            start: 0,
            count: 2,
            action: IrqAction::Trigger,
            data: IrqData::Bool(&[0, 1]),
        });
        client.ask_ok(&request, &[]);
        assert!(client.is_signalled(1));
    });
}

/// Only for clients that say that they know what it is: others may let their guests write to it.
#[test]
fn vectors_are_masked_by_stores() {
    for doorbells in [Doorbells::Trapped, Doorbells::Mapped] {
        let device = device(&options(doorbells));
        with(&device, |stream| {
            let mut client = Client::masking(stream);
            client.create_queues();
            let table = client.table.take().unwrap();
            let store = |value: u32| table.write_all_at(&value.to_le_bytes(), 0x201c).unwrap();
            // Setting an eventfd has unmasked it.
            let mut word = [0; 4];
            table.read_exact_at(&mut word, 0x201c).unwrap();
            assert_eq!(word, [0; 4]);
            for round in 0..20 {
                write(&mut client, round, 1);
                assert!(client.is_signalled(1));
                store(1);
                for lba in 0..4 {
                    write(&mut client, lba, 2);
                }
                assert!(rustix::io::read(&client.eventfds[1], &mut [0; 8]).is_err());
                assert_eq!((client.read32(0x201c), client.read32(0x3000)), (1, 0b10));
                // An idle server finds it some time.
                let sleeps = device.controller().counters().sleeps;
                if round % 4 == 0 {
                    client.wait("a sleep", |_| {
                        (device.controller().counters().sleeps > sleeps).then_some(())
                    });
                }
                store(0);
                assert!(client.is_signalled(1));
                assert_eq!(client.read32(0x3000), 0);
            }
            assert_eq!(device.controller().counters().invalid_doorbells, 0);
        });
        with(&device, |stream| {
            let client = Client::up(stream, Memory::Sealed);
            assert!(client.table.is_none());
        });
    }
}

/// What a client has stored is nothing to the next one.
#[test]
fn the_table_is_another_one_for_each_client() {
    let device = device(&Options::default());
    let table = with(&device, |stream| {
        let client = Client::masking(stream);
        client.table.unwrap()
    });
    with(&device, |stream| {
        let mut client = Client::masking(stream);
        client.create_queues();
        table.write_all_at(&[0xff; 0x1000], 0x2000).unwrap();
        write(&mut client, 0, 1);
        assert!(client.is_signalled(1));
        assert_eq!(client.read32(0x201c), 0);
    });
}

#[test]
fn memory_comes_and_goes() {
    let device = device(&Options::default());
    with(&device, |stream| {
        let mut client = Client::up(stream, Memory::Messages);
        client.create_queues();
        let other = crate::client::memfd(true);
        let far = BASE + MEMORY;
        let map = map(far, 0x1000, 0x2000);
        client.ask_ok(&Request::DmaMap(map), &[other.as_fd()]);
        // Data that spans two regions of two kinds: a page of each.
        let pointer = nvme_spec::DataPointer::Prp {
            prp1: far - 0x1000,
            prp2: far,
        };
        client.io_ok(nvm::write(1, 0, 16, false).with_data(pointer));
        let unmap = DmaUnmap {
            all: false,
            address: far,
            size: 0x2000,
        };
        client.ask_ok(&Request::DmaUnmap(unmap), &[]);
        let entry = client.run(1, nvm::write(1, 0, 16, false).with_data(pointer));
        assert!(!entry.status().is_success());
        assert_eq!(client.errno(&Request::DmaUnmap(unmap)), 22);
        let all = DmaUnmap {
            all: true,
            address: 0,
            size: 0,
        };
        client.ask_ok(&Request::DmaUnmap(all), &[]);
    });
}

#[test]
fn migration_is_refused() {
    let device = device(&Options::default());
    with(&device, |stream| {
        let mut client = Client::new(stream, Memory::Sealed);
        let refusals = [
            (Command::DEVICE_FEATURE, Errno::NOTTY),
            (Command::MIG_DATA_READ, Errno::OPNOTSUPP),
            (Command::MIG_DATA_WRITE, Errno::OPNOTSUPP),
            (Command::DIRTY_PAGES, Errno::OPNOTSUPP),
            (Command(999), Errno::OPNOTSUPP),
        ];
        for (command, errno) in refusals {
            let answer = client.errno(&Request::Other(command));
            assert_eq!(answer, errno.raw_os_error() as u32, "{command}");
        }
        let io_fds = Request::RegionIoFds {
            argsz: 16,
            index: 0,
        };
        assert_eq!(
            client.errno(&io_fds),
            Errno::OPNOTSUPP.raw_os_error() as u32
        );
    });
}

#[test]
fn an_idle_server_with_mapped_doorbells_is_found_again() {
    let mut options = options(Doorbells::Mapped);
    options.idle_interval = Duration::from_millis(2);
    let device = device(&options);
    with(&device, |stream| {
        let mut client = Client::up(stream, Memory::Sealed);
        client.create_queues();
        for _ in 0..5 {
            let sleeps = device.controller().counters().sleeps;
            client.wait("naps", |_| {
                (device.controller().counters().sleeps > sleeps + 10).then_some(())
            });
            client.io_ok(nvm::flush(1));
        }
    });
}

#[test]
fn only_memory_that_is_asked_for_needs_long_messages() {
    let device = device(&Options::default());
    for max_transfer in [0, 1, 63] {
        with(&device, |stream| {
            let mut client = Client::of_transfer(stream, Memory::Sealed, max_transfer);
            let request = Request::DmaMap(map(LAST_PAGE, 0, 4096));
            assert_eq!(client.errno(&request), 22, "{max_transfer}");
            client.set_up();
            client.create_queues();
            write(&mut client, 0, 1);
            assert_eq!(read(&mut client, 0), [1; 4096]);
        });
    }
    with(&device, |stream| {
        let mut client = Client::of_transfer(stream, Memory::Messages, 64);
        client.set_up();
        client.create_queues();
        assert_eq!(read(&mut client, 0), [1; 4096]);
    });
}

#[test]
fn memory_may_end_where_addresses_do() {
    let device = device(&Options::default());
    for memory in MEMORIES {
        with(&device, |stream| {
            let mut client = Client::up(stream, memory);
            client.create_queues();
            let ram = client.ram.try_clone().unwrap();
            let fds = [ram.as_fd()];
            let fds = match memory {
                Memory::Sealed | Memory::Unsealed => &fds[..],
                Memory::Messages | Memory::Twin => &[],
            };
            client.ask_ok(&Request::DmaMap(map(LAST_PAGE, DATA - BASE, 4096)), fds);
            client.ram.write_all_at(&[5; 4096], DATA - BASE).unwrap();
            client.io_ok(nvm::write(1, 0, 8, false).with_data(prp(LAST_PAGE)));
            client.ram.write_all_at(&[0; 4096], DATA - BASE).unwrap();
            client.io_ok(nvm::read(1, 0, 8, false).with_data(prp(LAST_PAGE)));
            assert_eq!(read(&mut client, 0), [5; 4096], "{memory:?}");
        });
    }
}
