//! The NVM commands.

use nvme_soft::store::{FileStore, MemoryStore};
use nvme_soft::{Config, NamespaceConfig};
use nvme_spec::dsm::Range;
use nvme_spec::feature::id;
use nvme_spec::{Sqe, Status, admin, nvm};
use zerocopy::IntoBytes;

use crate::host::{Host, config, pattern, prp};

pub(crate) fn file_config(lba_size: u32) -> (tempfile::TempDir, Config) {
    let directory = tempfile::tempdir().unwrap();
    let store = FileStore::create(directory.path().join("disk.img"), 1 << 20).unwrap();
    let mut config = Config::default();
    config
        .namespaces
        .push(NamespaceConfig::new(store, lba_size));
    (directory, config)
}

/// Both stores with both block sizes.
pub(crate) fn everywhere(test: impl Fn(Config, u64)) {
    for lba_size in [512_u32, 4096] {
        test(config(lba_size), lba_size.into());
        let (_directory, config) = file_config(lba_size);
        test(config, lba_size.into());
    }
}

pub(crate) fn write(host: &mut Host, slba: u64, data: &[u8], lba_size: u64) {
    let mark = host.mark();
    let buffer = host.allocate(data.len() as u64);
    host.memory.set(buffer, data);
    let pointer = host.prps(buffer, data.len() as u64);
    let blocks = (data.len() as u64 / lba_size) as u32;
    host.io_ok(nvm::write(1, slba, blocks, false).with_data(pointer));
    host.free_to(mark);
}

pub(crate) fn read(host: &mut Host, slba: u64, len: u64, lba_size: u64) -> Vec<u8> {
    let mark = host.mark();
    let buffer = host.allocate(len);
    let pointer = host.prps(buffer, len);
    host.io_ok(nvm::read(1, slba, (len / lba_size) as u32, false).with_data(pointer));
    let data = host.memory.get(buffer, len as usize);
    host.free_to(mark);
    data
}

#[test]
fn what_is_written_is_read() {
    everywhere(|config, lba_size| {
        let mut host = Host::ready(config);
        let data = pattern(1, 3 * lba_size as usize);
        write(&mut host, 2, &data, lba_size);
        let mut expected = vec![0; lba_size as usize];
        expected.extend(&data);
        expected.extend(vec![0; lba_size as usize]);
        assert!(read(&mut host, 1, 5 * lba_size, lba_size) == expected);
        let counters = host.controller.counters();
        assert_eq!(counters.bytes_written, 3 * lba_size);
        assert_eq!(counters.bytes_read, 5 * lba_size);
    });
}

#[test]
fn the_largest_transfer_works_and_one_more_block_does_not() {
    let mut config = config(512);
    config.mdts = 2;
    let mut host = Host::ready(config);
    let data = pattern(9, 16384);
    write(&mut host, 0, &data, 512);
    assert!(read(&mut host, 0, 16384, 512) == data);
    let buffer = host.allocate(32768);
    let pointer = host.prps(buffer, 16896);
    for command in [
        nvm::read(1, 0, 33, false),
        nvm::write(1, 0, 33, false),
        nvm::compare(1, 0, 33, false),
    ] {
        host.io_refused(command.with_data(pointer), Status::INVALID_FIELD);
    }
}

#[test]
fn transfers_beyond_the_internal_buffer_are_whole() {
    let (_directory, mut config) = file_config(512);
    config.mdts = 0;
    config.namespaces[0].store = Box::new(MemoryStore::new(4 << 20).unwrap());
    let mut host = Host::ready(config);
    let data = pattern(3, 3 << 20);
    write(&mut host, 100, &data, 512);
    assert!(read(&mut host, 100, 3 << 20, 512) == data);
}

#[test]
fn ranges_outside_of_the_namespace_are_refused() {
    everywhere(|config, lba_size| {
        let mut host = Host::ready(config);
        let blocks = (1 << 20) / lba_size;
        let buffer = host.allocate(8192);
        // Data that Compare finds equal.
        let commands: [fn(u64, u32) -> Sqe; 5] = [
            |slba, blocks| nvm::compare(1, slba, blocks, false),
            |slba, blocks| nvm::verify(1, slba, blocks, false),
            |slba, blocks| nvm::read(1, slba, blocks, false),
            |slba, blocks| nvm::write(1, slba, blocks, false),
            |slba, blocks| nvm::write_zeroes(1, slba, blocks, false, false),
        ];
        for command in commands {
            host.io_ok(command(blocks - 1, 1).with_data(prp(buffer)));
            for (slba, count) in [
                (blocks, 1),
                (blocks - 1, 2),
                (u64::MAX, 1),
                (u64::MAX - 1, 2),
            ] {
                let command = command(slba, count).with_data(prp(buffer));
                host.io_refused(command, Status::LBA_OUT_OF_RANGE);
            }
        }
    });
}

#[test]
fn namespaces_that_do_not_exist_are_refused() {
    let mut host = Host::ready(config(512));
    let buffer = host.allocate(4096);
    for nsid in [0, 2, 0xffff_fffe] {
        for command in [
            nvm::read(nsid, 0, 1, false),
            nvm::write(nsid, 0, 1, false),
            nvm::flush(nsid),
            nvm::write_zeroes(nsid, 0, 1, false, false),
            nvm::dataset_management(nsid, 1, true),
            nvm::compare(nsid, 0, 1, false),
            nvm::verify(nsid, 0, 1, false),
            nvm::copy(nsid, 0, 1, false),
        ] {
            let command = command.with_data(prp(buffer));
            host.io_refused(command, Status::INVALID_NAMESPACE_OR_FORMAT);
        }
    }
    let all = nvm::read(admin::ALL_NAMESPACES, 0, 1, false).with_data(prp(buffer));
    host.io_refused(all, Status::INVALID_NAMESPACE_OR_FORMAT);
}

#[test]
fn commands_and_fields_that_are_not_supported_are_refused() {
    let mut config = config(512);
    (config.compare, config.verify, config.copy) = (false, false, false);
    let mut host = Host::ready(config);
    let buffer = host.allocate(4096);
    for opcode in [0x04, 0x05, 0x0c, 0x0d, 0x19, 0x80, 0xff] {
        host.io_refused(Sqe::new(opcode).with_nsid(1), Status::INVALID_OPCODE);
    }
    let write = nvm::write(1, 0, 1, false).with_data(prp(buffer));
    for fuse in 1..=3 {
        host.io_refused(write.with_fuse(fuse), Status::INVALID_FIELD);
    }
    let directive = write.with_cdw12(write.cdw12() | 1 << 20);
    host.io_refused(directive, Status::INVALID_FIELD);
}

#[test]
fn namespaces_are_separate() {
    let mut config = config(512);
    let store = MemoryStore::new(1 << 20).unwrap();
    config.namespaces.push(NamespaceConfig::new(store, 4096));
    let mut host = Host::ready(config);
    let buffer = host.allocate(4096);
    host.memory.set(buffer, &[1; 4096]);
    host.io_ok(nvm::write(1, 0, 8, false).with_data(prp(buffer)));
    host.memory.set(buffer, &[2; 4096]);
    host.io_ok(nvm::write(2, 0, 1, false).with_data(prp(buffer)));
    host.io_ok(nvm::read(1, 0, 8, false).with_data(prp(buffer)));
    assert_eq!(host.memory.get(buffer, 4096), [1; 4096]);
    host.io_ok(nvm::read(2, 0, 1, false).with_data(prp(buffer)));
    assert_eq!(host.memory.get(buffer, 4096), [2; 4096]);
}

#[test]
fn write_zeroes_zeroes() {
    everywhere(|config, lba_size| {
        let mut host = Host::ready(config);
        let data = pattern(4, 8 * lba_size as usize);
        for deallocate in [false, true] {
            write(&mut host, 0, &data, lba_size);
            host.io_ok(nvm::write_zeroes(1, 2, 3, deallocate, true));
            let mut expected = data.clone();
            expected[2 * lba_size as usize..5 * lba_size as usize].fill(0);
            assert!(read(&mut host, 0, 8 * lba_size, lba_size) == expected);
        }
    });
}

#[test]
fn the_limit_of_write_zeroes_is_its_own() {
    let mut config = config(512);
    (config.mdts, config.wzsl) = (1, 3);
    let mut host = Host::ready(config);
    host.io_ok(nvm::write_zeroes(1, 0, 64, false, false));
    host.io_refused(
        nvm::write_zeroes(1, 0, 65, false, false),
        Status::INVALID_FIELD,
    );
}

fn dataset_management(host: &mut Host, ranges: &[Range], deallocate: bool) -> Sqe {
    let buffer = host.allocate(4096);
    host.memory.set(buffer, ranges.as_bytes());
    nvm::dataset_management(1, ranges.len() as u32, deallocate).with_data(prp(buffer))
}

#[test]
fn deallocated_blocks_read_as_zeros() {
    everywhere(|config, lba_size| {
        let mut host = Host::ready(config);
        let data = pattern(4, 8 * lba_size as usize);
        write(&mut host, 0, &data, lba_size);
        let ranges = [Range::new(1, 2), Range::new(0, 0), Range::new(5, 1)];
        // A hint without deallocation changes nothing.
        let hint = dataset_management(&mut host, &ranges, false);
        host.io_ok(hint);
        assert!(read(&mut host, 0, 8 * lba_size, lba_size) == data);
        let deallocate = dataset_management(&mut host, &ranges, true);
        host.io_ok(deallocate);
        let mut expected = data;
        let lba_size = lba_size as usize;
        expected[lba_size..3 * lba_size].fill(0);
        expected[5 * lba_size..6 * lba_size].fill(0);
        assert!(read(&mut host, 0, expected.len() as u64, lba_size as u64) == expected);
    });
}

#[test]
fn one_bad_range_spoils_a_deallocation() {
    let mut config = config(512);
    (config.dmrl, config.dmrsl, config.dmsl) = (4, 100, 150);
    let mut host = Host::ready(config);
    let data = pattern(4, 4096);
    write(&mut host, 0, &data, 512);
    let good = Range::new(0, 8);
    let many = vec![good; 5];
    let cases: [(&[Range], Status); 5] = [
        (&[good, Range::new(2048, 1)], Status::LBA_OUT_OF_RANGE),
        (&[good, Range::new(u64::MAX, 2)], Status::LBA_OUT_OF_RANGE),
        (&many, Status::COMMAND_SIZE_LIMIT_EXCEEDED),
        (
            &[good, Range::new(8, 101)],
            Status::COMMAND_SIZE_LIMIT_EXCEEDED,
        ),
        (
            &[good, Range::new(8, 100), Range::new(8, 43)],
            Status::COMMAND_SIZE_LIMIT_EXCEEDED,
        ),
    ];
    for (ranges, status) in cases {
        let command = dataset_management(&mut host, ranges, true);
        host.io_refused(command, status);
    }
    assert!(read(&mut host, 0, 4096, 512) == data);
    let unreachable = nvm::dataset_management(1, 1, true).with_data(prp(0x1000));
    host.io_refused(unreachable, Status::DATA_TRANSFER_ERROR);
}

#[test]
fn durability_costs_a_sync_where_it_must() {
    let (_directory, config) = file_config(512);
    let mut host = Host::ready(config);
    let buffer = host.allocate(4096);
    let syncs = |host: &Host| host.controller.counters().syncs;
    let write = nvm::write(1, 0, 8, false).with_data(prp(buffer));
    let durable = nvm::write(1, 0, 8, true).with_data(prp(buffer));
    host.io_ok(write);
    assert_eq!(syncs(&host), 0);
    host.io_ok(durable);
    assert_eq!(syncs(&host), 1);
    host.io_ok(nvm::flush(1));
    host.io_ok(nvm::flush(admin::ALL_NAMESPACES));
    host.io_ok(nvm::read(1, 0, 8, true).with_data(prp(buffer)));
    assert_eq!(syncs(&host), 4);
    // Turning the cache off writes it back; then each write is durable and flushes are free.
    host.admin_ok(admin::set_features(id::VOLATILE_WRITE_CACHE, 0, false));
    assert_eq!(syncs(&host), 5);
    host.io_ok(write);
    host.io_ok(nvm::write_zeroes(1, 0, 1, true, false));
    host.io_ok(nvm::flush(1));
    assert_eq!(syncs(&host), 7);
    let deallocate = dataset_management(&mut host, &[Range::new(0, 1)], true);
    host.io_ok(deallocate);
    assert_eq!(syncs(&host), 8);
}

#[test]
fn commands_that_arrive_together_are_durable_each_for_itself() {
    let (_directory, config) = file_config(512);
    let mut host = Host::ready(config);
    let buffer = host.allocate(8 * 512);
    let data = pattern(6, 8 * 512);
    host.memory.set(buffer, &data);
    let mut cids: Vec<_> = (0..8)
        .map(|block| {
            let write = nvm::write(1, block, 1, true).with_data(prp(buffer + block * 512));
            host.place(1, write)
        })
        .collect();
    cids.push(host.place(1, nvm::flush(1)));
    host.ring(1);
    for cid in cids {
        assert!(host.wait(1, cid).status().is_success());
    }
    let counters = host.controller.counters();
    assert_eq!((counters.syncs, counters.bytes_written), (9, 4096));
    assert!(read(&mut host, 0, 4096, 512) == data);
}

#[test]
fn a_sync_that_fails_fails_its_command_only() {
    let mut config = config(512);
    let store = Broken {
        writes: true,
        kind: std::io::ErrorKind::Other,
    };
    config.namespaces.push(NamespaceConfig::new(store, 512));
    let mut host = Host::ready(config);
    let buffer = host.allocate(512);
    let commands = [
        (nvm::write(2, 0, 1, true), true),
        (nvm::flush(1), true),
        (nvm::write(1, 0, 1, true), true),
        (nvm::flush(2), false),
        (nvm::read(1, 0, 1, false), true),
    ];
    let placed =
        commands.map(|(command, good)| (host.place(1, command.with_data(prp(buffer))), good));
    host.ring(1);
    for (cid, good) in placed {
        let status = host.wait(1, cid).status();
        assert_eq!(status.is_success(), good, "{status}");
        assert!(good || status.is(Status::WRITE_FAULT));
    }
}

#[test]
fn without_a_volatile_cache_flush_succeeds_and_does_nothing() {
    let mut config = config(512);
    config.volatile_write_cache = false;
    let mut host = Host::ready(config);
    let buffer = host.allocate(4096);
    host.io_ok(nvm::flush(1));
    assert_eq!(host.controller.counters().syncs, 0);
    host.io_ok(nvm::write(1, 0, 1, false).with_data(prp(buffer)));
    assert_eq!(host.controller.counters().syncs, 1);
}

#[test]
fn contents_of_a_file_outlive_the_controller() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    let data = pattern(8, 4096);
    for round in 0..2 {
        let mut config = Config::default();
        let store = FileStore::create(&path, 1 << 20).unwrap();
        config.namespaces.push(NamespaceConfig::new(store, 4096));
        let mut host = Host::ready(config);
        if round == 0 {
            write(&mut host, 9, &data, 4096);
        } else {
            assert!(read(&mut host, 9, 4096, 4096) == data);
        }
    }
}

/// A store whose medium is broken.
#[derive(Debug)]
pub(crate) struct Broken {
    /// Writes reach the cache; only the medium is broken.
    pub(crate) writes: bool,
    pub(crate) kind: std::io::ErrorKind,
}

impl nvme_soft::store::Store for Broken {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read(&mut self, _offset: u64, _out: &mut [u8]) -> std::io::Result<()> {
        Err(self.kind.into())
    }
    fn write(&mut self, _offset: u64, _data: &[u8], _durable: bool) -> std::io::Result<()> {
        if self.writes {
            Ok(())
        } else {
            Err(self.kind.into())
        }
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Err(self.kind.into())
    }
    fn zero(&mut self, _offset: u64, _len: u64, _deallocate: bool) -> std::io::Result<()> {
        Err(self.kind.into())
    }
}

#[test]
fn errors_of_the_store_are_media_errors() {
    let mut config = Config::default();
    let kinds = [std::io::ErrorKind::Other, std::io::ErrorKind::StorageFull];
    for kind in kinds {
        config.namespaces.push(NamespaceConfig::new(
            Broken {
                writes: false,
                kind,
            },
            512,
        ));
    }
    let mut host = Host::ready(config);
    let buffer = host.allocate(4096);
    for (nsid, failed) in [(1, Status::WRITE_FAULT), (2, Status::CAPACITY_EXCEEDED)] {
        let read = nvm::read(nsid, 0, 1, false).with_data(prp(buffer));
        let entry = host.io(read);
        assert!(entry.status().is(Status::UNRECOVERED_READ_ERROR));
        assert!(!entry.status().dnr());
        let write = nvm::write(nsid, 0, 1, false).with_data(prp(buffer));
        host.io_refused(write, failed);
        host.io_refused(nvm::flush(nsid), failed);
        host.io_refused(nvm::write_zeroes(nsid, 0, 1, false, false), failed);
    }
    assert_eq!(host.controller.counters().failed_commands, 8);
}
