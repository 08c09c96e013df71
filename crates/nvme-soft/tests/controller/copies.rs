//! Copy.

use nvme_soft::{Config, NamespaceConfig};
use nvme_spec::copy::SourceRange;
use nvme_spec::identify::IdentifyNamespace;
use nvme_spec::{Sqe, Status, admin, nvm};
use zerocopy::{FromBytes, IntoBytes};

use crate::host::{Host, config, pattern, prp};
use crate::io::{Broken, everywhere, file_config, read, write};

fn copy(host: &mut Host, ranges: &[SourceRange], to: u64) -> Sqe {
    let list = host.allocate(size_of_val(ranges) as u64);
    host.memory.set(list, ranges.as_bytes());
    let pointer = host.prps(list, size_of_val(ranges) as u64);
    nvm::copy(1, to, ranges.len() as u32, false).with_data(pointer)
}

/// A namespace whose limits are 8 blocks a range, 20 in all, and 4 ranges.
fn limited() -> Config {
    let mut config = config(512);
    let namespace = &mut config.namespaces[0];
    (namespace.copy_range_blocks, namespace.copy_blocks) = (8, 20);
    namespace.copy_ranges = 4;
    config
}

#[test]
fn sources_are_put_one_after_the_other() {
    everywhere(|config, lba_size| {
        let mut host = Host::ready(config);
        let data = pattern(1, 8 * lba_size as usize);
        write(&mut host, 0, &data, lba_size);
        let ranges = [
            SourceRange::new(5, 2),
            SourceRange::new(0, 1),
            SourceRange::new(6, 1),
        ];
        let command = copy(&mut host, &ranges, 100);
        host.io_ok(command);
        let block = |index: usize| &data[index * lba_size as usize..][..lba_size as usize];
        let expected = [block(5), block(6), block(0), block(6)].concat();
        assert!(read(&mut host, 100, 4 * lba_size, lba_size) == expected);
        assert!(
            read(&mut host, 104, lba_size, lba_size)
                .iter()
                .all(|&byte| byte == 0)
        );
        assert!(read(&mut host, 0, 8 * lba_size, lba_size) == data);
        assert_eq!(host.controller.counters().bytes_copied, 4 * lba_size);
    });
}

#[test]
fn a_source_may_overlap_the_destination() {
    for (from, to) in [(0, 3), (3, 0), (2, 2)] {
        let mut host = Host::ready(config(512));
        let data = pattern(1, 8 * 512);
        write(&mut host, from, &data, 512);
        let command = copy(&mut host, &[SourceRange::new(from, 8)], to);
        host.io_ok(command);
        assert!(read(&mut host, to, 8 * 512, 512) == data);
    }
}

#[test]
fn the_limits_are_announced_and_kept() {
    let mut host = Host::ready(limited());
    let identify = host.admin_data(admin::identify_namespace(1), 4096);
    let identify = IdentifyNamespace::read_from_bytes(&identify).unwrap();
    assert_eq!(
        (identify.mssrl.get(), identify.mcl.get(), identify.msrc),
        (8, 20, 3)
    );
    let data = pattern(1, 20 * 512);
    write(&mut host, 0, &data, 512);
    let range = |blocks| SourceRange::new(0, blocks);
    for good in [
        &[range(8)][..],
        &[range(8), range(8), range(4)],
        &[range(1); 4],
    ] {
        let command = copy(&mut host, good, 100);
        host.io_ok(command);
    }
    let before = read(&mut host, 100, 20 * 512, 512);
    for bad in [
        &[range(9)][..],
        &[range(8), range(8), range(5)],
        &[range(1); 5],
    ] {
        let command = copy(&mut host, bad, 100);
        host.io_refused(command, Status::COMMAND_SIZE_LIMIT_EXCEEDED);
    }
    assert!(read(&mut host, 100, 20 * 512, 512) == before);
}

#[test]
fn the_most_ranges_work() {
    let mut config = config(512);
    config.namespaces[0].copy_ranges = 256;
    let mut host = Host::ready(config);
    let data = pattern(1, 256 * 512);
    write(&mut host, 0, &data, 512);
    let backwards: Vec<_> = (0..256)
        .rev()
        .map(|slba| SourceRange::new(slba, 1))
        .collect();
    let command = copy(&mut host, &backwards, 1000);
    host.io_ok(command);
    let expected: Vec<u8> = data.chunks(512).rev().flatten().copied().collect();
    assert!(read(&mut host, 1000, 256 * 512, 512) == expected);
}

#[test]
fn one_bad_range_spoils_a_copy() {
    let mut host = Host::ready(config(512));
    let blocks = 2048;
    let good = SourceRange::new(0, 8);
    let data = pattern(1, 8 * 512);
    write(&mut host, 0, &data, 512);
    let cases: [(&[SourceRange], u64); 5] = [
        (&[good, SourceRange::new(blocks, 1)], 100),
        (&[good, SourceRange::new(blocks - 1, 2)], 100),
        (&[good, SourceRange::new(u64::MAX, 2)], 100),
        (&[good], blocks - 7),
        (&[good], u64::MAX),
    ];
    for (ranges, to) in cases {
        let command = copy(&mut host, ranges, to);
        host.io_refused(command, Status::LBA_OUT_OF_RANGE);
    }
    assert!(
        read(&mut host, 100, 8 * 512, 512)
            .iter()
            .all(|&byte| byte == 0)
    );
    let command = copy(&mut host, &[good], blocks - 8);
    host.io_ok(command);
}

#[test]
fn fields_that_are_not_supported_are_refused() {
    let mut host = Host::ready(config(512));
    let command = copy(&mut host, &[SourceRange::new(0, 1)], 100);
    // Another format of source ranges, a directive.
    for bits in [1 << 8, 0xf << 8, 1 << 20] {
        let command = command.with_cdw12(command.cdw12() | bits);
        host.io_refused(command, Status::INVALID_FIELD);
    }
    host.io_refused(command.with_fuse(1), Status::INVALID_FIELD);
    let unreachable = nvm::copy(1, 0, 1, false).with_data(prp(0x1000));
    host.io_refused(unreachable, Status::DATA_TRANSFER_ERROR);
}

#[test]
fn a_copy_is_as_durable_as_a_write() {
    let (_directory, config) = file_config(512);
    let mut host = Host::ready(config);
    let command = copy(&mut host, &[SourceRange::new(0, 1)], 100);
    host.io_ok(command);
    assert_eq!(host.controller.counters().syncs, 0);
    host.io_ok(command.with_cdw12(command.cdw12() | 1 << 30));
    assert_eq!(host.controller.counters().syncs, 1);
}

#[test]
fn errors_of_the_store_are_told_apart() {
    let mut config = config(512);
    let store = Broken {
        writes: false,
        kind: std::io::ErrorKind::Other,
    };
    config.namespaces.push(NamespaceConfig::new(store, 512));
    let mut host = Host::ready(config);
    let command = copy(&mut host, &[SourceRange::new(0, 1)], 100).with_nsid(2);
    host.io_refused(command, Status::UNRECOVERED_READ_ERROR);
    assert_eq!(host.controller.counters().bytes_copied, 0);
}
