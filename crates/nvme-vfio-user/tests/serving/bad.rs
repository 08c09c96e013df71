//! Clients that mean no good, or die.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nvme_spec::{Status, admin, nvm};
use nvme_vfio_user::{Doorbells, Options};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vfio_user::{
    DmaAccess, DmaMap, DmaUnmap, IrqAction, IrqData, RegionAccess, RegionWrite, Request, SetIrqs,
    Version, irq, region,
};

use crate::client::{BASE, Client, MEMORY, Memory, device, is_readable, map, memfd, raw, with};
use crate::queues::{DATA, prp};

const EINVAL: u32 = 22;
const EEXIST: u32 = 17;

/// That a client is served from the beginning.
pub(crate) fn is_served(device: &nvme_vfio_user::Device) {
    with(device, |stream| {
        let mut client = Client::up(stream, Memory::Sealed);
        client.create_queues();
        client.io_ok(nvm::flush(1));
    });
}

#[test]
fn commands_that_are_refused() {
    let device = device(&Options::default());
    with(&device, |stream| {
        let mut client = Client::up(stream, Memory::Sealed);
        let read = |region, offset, count| {
            Request::RegionRead(RegionAccess {
                region,
                offset,
                count,
            })
        };
        let write = |region, offset, data| {
            Request::RegionWrite(RegionWrite {
                region,
                offset,
                data,
            })
        };
        let irqs = |index, start, count, data| {
            Request::SetIrqs(SetIrqs {
                index,
                start,
                count,
                action: IrqAction::Trigger,
                data,
            })
        };
        let version = Version {
            major: 0,
            minor: 1,
            capabilities: Default::default(),
        };
        let requests = [
            Request::Version(version),
            // Regions: out of range, out of bounds, empty, and not by words.
            Request::RegionInfo {
                argsz: 32,
                index: 9,
            },
            Request::RegionInfo {
                argsz: 32,
                index: u32::MAX,
            },
            read(region::BAR0, 0x4000, 4),
            read(region::BAR0, 0x3fff, 2),
            read(region::CONFIG, 4095, 2),
            read(region::CONFIG, u64::MAX - 4, 4),
            read(1, 0, 1),
            read(9, 0, 1),
            read(u32::MAX, 0, 1),
            write(region::BAR0, 0x4000, &[0; 4]),
            write(region::BAR0, 0x1002, &[0; 4]),
            write(region::BAR0, 0x1000, &[0; 2]),
            write(region::CONFIG, 4094, &[0; 4]),
            // Interrupts: there are 65 of one type.
            Request::IrqInfo {
                argsz: 16,
                index: 5,
            },
            irqs(irq::MSIX, 65, 1, IrqData::None),
            irqs(irq::MSIX, 0, 66, IrqData::Eventfd),
            irqs(irq::MSIX, 60, 6, IrqData::Bool(&[1; 6])),
            irqs(irq::INTX, 0, 1, IrqData::None),
            irqs(irq::COUNT, 0, 0, IrqData::None),
            // Memory: not by pages, not there.
            Request::DmaMap(map(0x800, 0, 4096)),
            Request::DmaMap(map(0, 0, 4097)),
            Request::DmaMap(map(0, 512, 4096)),
            Request::DmaUnmap(DmaUnmap {
                all: false,
                address: BASE,
                size: MEMORY - 4096,
            }),
            Request::DmaUnmap(DmaUnmap {
                all: false,
                address: BASE + 4096,
                size: 4096,
            }),
            // What only a server asks for.
            Request::DmaRead(DmaAccess {
                address: BASE,
                count: 4,
            }),
            Request::DmaWrite {
                address: BASE,
                data: &[0; 4],
            },
        ];
        for request in &requests {
            assert_eq!(client.errno(request), EINVAL, "{request:?}");
        }
        // Over what is mapped: all of it, its end, its beginning, and around it.
        for (address, size) in [
            (BASE, MEMORY),
            (BASE + MEMORY - 4096, 8192),
            (BASE - 4096, 8192),
            (BASE - 4096, MEMORY + 8192),
        ] {
            let request = Request::DmaMap(map(address, 0, size));
            assert_eq!(client.errno(&request), EEXIST, "{address:#x}");
        }
        // It still works.
        client.create_queues();
        client.io_ok(nvm::flush(1));
    });
}

#[test]
fn malformed_commands_are_refused_or_end_the_connection() {
    let device = device(&Options::default());
    let descriptor = || OwnedFd::from(memfd(true));
    // What is answered with an error.
    let answered: &[(u16, &[u8], usize)] = &[
        // Too short, for each command that has a payload.
        (1, &[], 0),
        (2, &[0; 31], 0),
        (3, &[0; 23], 0),
        (4, &[0; 15], 0),
        (5, &[0; 31], 0),
        (6, &[0; 15], 0),
        (7, &[0; 15], 0),
        (8, &[0; 19], 0),
        (9, &[0; 15], 0),
        (10, &[0; 15], 0),
        (11, &[0; 15], 0),
        (12, &[0; 15], 0),
        (13, &[0], 0),
        (15, &[0; 7], 0),
        (15, &[0xff; 32], 0),
        // With descriptors where there are to be none, or too many.
        (4, &[16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1),
        (13, &[], 1),
        (2, &[0x20; 32], 2),
        // All ones.
        (2, &[0xff; 32], 1),
        (8, &[0xff; 20], 1),
        (9, &[0xff; 16], 0),
        (0, &[], 0),
        (u16::MAX, &[0; 100], 3),
    ];
    with(&device, |stream| {
        let mut client = Client::new(stream, Memory::Sealed);
        for &(command, payload, descriptors) in answered {
            let fds: Vec<_> = (0..descriptors).map(|_| descriptor()).collect();
            client.send_raw(&raw(command, 0, payload), &fds.iter().collect::<Vec<_>>());
            let answer = client.receive();
            assert!(answer.header.is_error(), "command {command}");
            assert_eq!(answer.header.id(), 7);
            // Nobody asked for an answer: there is none, the next one is to the next command.
            client.send_raw(&raw(command, 0x10, payload), &[]);
        }
        client.map_memory();
    });
    // What ends the connection.
    let large = [&raw(9, 0, &[])[..4], &u32::MAX.to_ne_bytes(), &[0; 8]].concat();
    let small = [&raw(9, 0, &[])[..4], &15_u32.to_ne_bytes(), &[0; 8]].concat();
    let ends = [large, small, raw(9, 2, &[]), raw(11, 1, &[0; 16])];
    for bytes in &ends {
        with(&device, |stream| {
            let mut client = Client::new(stream, Memory::Sealed);
            client.send_raw(bytes, &[]);
            assert!(client.is_over(), "{bytes:?}");
        });
    }
    with(&device, |stream| {
        let mut client = Client::new(stream, Memory::Sealed);
        let fds: Vec<_> = (0..17).map(|_| descriptor()).collect();
        client.send_raw(&raw(13, 0, &[]), &fds.iter().collect::<Vec<_>>());
        assert!(client.is_over());
    });
    is_served(&device);
}

#[test]
fn the_first_message_is_the_version() {
    let device = device(&Options::default());
    let version = |major| {
        Request::Version(Version {
            major,
            minor: 9,
            capabilities: Default::default(),
        })
    };
    for (request, no_reply) in [
        (Request::DeviceReset, false),
        (Request::DmaMap(map(BASE, 0, MEMORY)), false),
        (version(1), false),
        (version(0), true),
    ] {
        with(&device, |stream| {
            let mut client = Client::silent(stream, Memory::Sealed);
            client.send_raw(&request.encode(1, no_reply), &[]);
            if !no_reply {
                assert!(client.receive().header.is_error(), "{request:?}");
            }
            assert!(client.is_over(), "{request:?}");
        });
    }
    is_served(&device);
}

#[test]
fn memory_that_is_no_memory() {
    let device = device(&Options::default());
    with(&device, |stream| {
        let mut client = Client::new(stream, Memory::Sealed);
        let (socket, _other) = UnixStream::pair().unwrap();
        let read_only = File::open("/proc/self/exe").unwrap();
        let short = memfd(true);
        let proc = File::open("/proc/self/status").unwrap();
        let directory = File::open("/").unwrap();
        let page: DmaMap = map(0, 0, 4096);
        let beyond = map(0, MEMORY - 4096, 8192);
        let far = map(0, 1 << 62, 4096);
        for (fd, map) in [
            (socket.as_fd(), page),
            (directory.as_fd(), page),
            (proc.as_fd(), page),
            (short.as_fd(), beyond),
            (short.as_fd(), far),
        ] {
            let answer = client.ask(&Request::DmaMap(map), &[fd]);
            assert!(answer.header.is_error(), "{map:?}");
        }
        // Much of nothing: a part of it is possible, all of it would leave no addresses.
        let huge = memfd(false);
        huge.set_len(1 << 46).unwrap();
        fcntl_add_seals(&huge, SealFlags::SHRINK).unwrap();
        client.ask_ok(&Request::DmaMap(map(1 << 50, 0, 1 << 36)), &[huge.as_fd()]);
        for size in [1 << 44, (1 << 44) - (1 << 36) + 4096, 1 << 46] {
            let request = Request::DmaMap(map(1 << 52, 0, size));
            let answer = client.ask(&request, &[huge.as_fd()]);
            assert!(answer.header.is_error(), "{size:#x}");
            assert_eq!(answer.header.errno(), 12, "{size:#x}");
        }
        // Huge pages can be taken out of the file, and need not be there again.
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
        let pages = File::from(memfd_create("huge", flags).unwrap());
        pages.set_len(2 << 20).unwrap();
        fcntl_add_seals(&pages, SealFlags::SHRINK).unwrap();
        let answer = client.ask(&Request::DmaMap(map(1 << 52, 0, 2 << 20)), &[pages.as_fd()]);
        assert!(answer.header.is_error());
        // A file that can only be read is taken, and writes to it fail when they come.
        client.ask_ok(&Request::DmaMap(page), &[read_only.as_fd()]);
    });
    is_served(&device);
}

#[test]
fn a_file_that_becomes_shorter_is_an_error_and_no_signal() {
    let device = device(&Options::default());
    with(&device, |stream| {
        let mut client = Client::up(stream, Memory::Unsealed);
        client.create_queues();
        // The data, but not the queues.
        client.ram.set_len(DATA - BASE).unwrap();
        let entry = client.run(1, nvm::write(1, 0, 8, false).with_data(prp(DATA)));
        assert!(entry.status().is(Status::DATA_TRANSFER_ERROR));
        // The queues, too: the controller can only fail.
        client.ram.set_len(0).unwrap();
        client.write32(0x1000, 7);
        client.wait("CSTS.CFS", |client| {
            (client.read32(0x1c) & 2 != 0).then_some(())
        });
    });
    is_served(&device);
}

#[test]
fn memory_is_used_as_it_was_mapped() {
    let device = device(&Options::default());
    for memory in [Memory::Sealed, Memory::Unsealed, Memory::Messages] {
        with(&device, |stream| {
            let mut client = Client::up(stream, memory);
            client.create_queues();
            let other = memfd(memory == Memory::Sealed);
            let fds: &[_] = match memory {
                Memory::Messages => &[],
                _ => &[other.as_fd()],
            };
            let (to_device, from_device) = (BASE + (1 << 30), BASE + (2 << 30));
            for (address, readable) in [(to_device, true), (from_device, false)] {
                let map = DmaMap {
                    readable,
                    writable: !readable,
                    ..map(address, 0, 4096)
                };
                client.ask_ok(&Request::DmaMap(map), fds);
            }
            let write = nvm::write(1, 0, 8, false).with_data(prp(from_device));
            assert!(
                client
                    .run(1, write)
                    .status()
                    .is(Status::DATA_TRANSFER_ERROR)
            );
            let read = nvm::read(1, 0, 8, false).with_data(prp(to_device));
            assert!(client.run(1, read).status().is(Status::DATA_TRANSFER_ERROR));
            // Past the end of all memory.
            for address in [BASE + MEMORY, u64::MAX - 4095] {
                let read = nvm::read(1, 0, 8, false).with_data(prp(address));
                assert!(!client.run(1, read).status().is_success());
            }
        });
    }
}

#[test]
fn answers_to_dma_that_are_none() {
    let device = device(&Options::default());
    for memory in [Memory::Messages, Memory::Twin] {
        // An error is an error of the one access.
        with(&device, |stream| {
            let mut client = Client::up(stream, memory);
            client.dma_error = Some(14);
            client.submit(0, admin::identify_controller().with_data(prp(DATA)));
            client.wait("CSTS.CFS", |client| {
                (client.read32(0x1c) & 2 != 0).then_some(())
            });
            client.dma_error = None;
            client.ask_ok(&Request::DeviceReset, &[]);
            client.enable();
        });
    }
    // The wrong answer ends the connection: another one's, too little, a command's.
    for wrong in 0..3 {
        with(&device, |stream| {
            let mut client = Client::up(stream, Memory::Messages);
            client.submit(0, admin::identify_controller().with_data(prp(DATA)));
            assert!(is_readable(&client.stream, crate::client::PATIENCE));
            let mut reader = vfio_user::socket::MessageReader::new(Default::default());
            let Ok(vfio_user::socket::Received::Message(asked)) = reader.read(&client.stream)
            else {
                panic!("not asked");
            };
            let reply = vfio_user::Reply::DmaRead {
                address: BASE,
                data: if wrong == 1 { &[0; 63] } else { &[0; 64] },
            };
            let mut bytes = reply.encode(&asked.header);
            match wrong {
                0 => bytes[0] ^= 1,
                2 => bytes[2] = 12,
                _ => {}
            }
            client.send_raw(&bytes, &[]);
            assert!(client.is_over());
        });
    }
    is_served(&device);
}

#[test]
fn any_doorbell_may_be_written() {
    for doorbells in [Doorbells::Trapped, Doorbells::Mapped] {
        let mut options = Options::default();
        options.doorbells = doorbells;
        let device = device(&options);
        with(&device, |stream| {
            let mut client = Client::up(stream, Memory::Sealed);
            client.create_queues();
            for offset in (0x1008..0x2000).step_by(4) {
                let bytes = u32::MAX.to_le_bytes();
                match &client.doorbells {
                    None => client.write32(offset, u32::MAX),
                    Some(page) => {
                        std::os::unix::fs::FileExt::write_all_at(page, &bytes, offset.into())
                            .unwrap();
                    }
                }
            }
            client.admin_ok(admin::identify_controller().with_data(prp(DATA)));
            if let Some(page) = &client.doorbells {
                assert!(page.set_len(0).is_err(), "it is sealed");
                assert!(page.set_len(1 << 20).is_err(), "it is sealed");
            }
        });
        is_served(&device);
    }
}
