//! Compare and Verify.

use nvme_soft::NamespaceConfig;
use nvme_soft::store::MemoryStore;
use nvme_spec::identify::IdentifyController;
use nvme_spec::log::SmartHealth;
use nvme_spec::{Sqe, Status, admin, log, nvm};
use zerocopy::FromBytes;

use crate::host::{Host, config, pattern, prp};
use crate::io::{Broken, everywhere, file_config, write};

fn compare(host: &mut Host, slba: u64, data: &[u8], lba_size: u64) -> Sqe {
    let buffer = host.allocate(data.len() as u64);
    host.memory.set(buffer, data);
    let pointer = host.prps(buffer, data.len() as u64);
    let blocks = (data.len() as u64 / lba_size) as u32;
    nvm::compare(1, slba, blocks, false).with_data(pointer)
}

#[test]
fn compare_finds_each_difference() {
    everywhere(|config, lba_size| {
        let mut host = Host::ready(config);
        let mut data = pattern(1, 3 * lba_size as usize);
        write(&mut host, 2, &data, lba_size);
        let equal = compare(&mut host, 2, &data, lba_size);
        host.io_ok(equal);
        let fua = equal.with_cdw12(equal.cdw12() | 1 << 30);
        host.io_ok(fua);
        let elsewhere = compare(&mut host, 1, &data, lba_size);
        host.io_refused(elsewhere, Status::COMPARE_FAILURE);
        for place in [0, lba_size as usize, data.len() - 1] {
            data[place] ^= 0x10;
            let differs = compare(&mut host, 2, &data, lba_size);
            host.io_refused(differs, Status::COMPARE_FAILURE);
            data[place] ^= 0x10;
        }
        let counters = host.controller.counters();
        assert_eq!(counters.bytes_checked, 6 * 3 * lba_size);
        assert_eq!(counters.bytes_read, 0);
    });
}

#[test]
fn differences_beyond_the_internal_buffer_are_found() {
    let (_directory, mut config) = file_config(512);
    config.mdts = 0;
    config.namespaces[0].store = Box::new(MemoryStore::new(4 << 20).unwrap());
    let mut host = Host::ready(config);
    let mut data = pattern(3, 3 << 20);
    write(&mut host, 100, &data, 512);
    let equal = compare(&mut host, 100, &data, 512);
    host.io_ok(equal);
    data[(1 << 20) + 7] ^= 1;
    let differs = compare(&mut host, 100, &data, 512);
    host.io_refused(differs, Status::COMPARE_FAILURE);
}

#[test]
fn compare_needs_data_that_it_can_reach() {
    let mut host = Host::ready(config(512));
    let command = nvm::compare(1, 0, 1, false);
    host.io_refused(command.with_data(prp(0x1000)), Status::DATA_TRANSFER_ERROR);
    let buffer = host.allocate(4096);
    let fused = command.with_data(prp(buffer)).with_fuse(1);
    host.io_refused(fused, Status::INVALID_FIELD);
}

#[test]
fn verify_reads_without_a_transfer() {
    everywhere(|config, lba_size| {
        let mut host = Host::ready(config);
        let accesses = host.memory.accesses();
        host.io_ok(nvm::verify(1, 0, 5, false));
        // The command itself and its completion.
        assert!(host.memory.accesses() - accesses <= 4);
        assert_eq!(host.controller.counters().bytes_checked, 5 * lba_size);
        let syncs = host.controller.counters().syncs;
        host.io_ok(nvm::verify(1, 0, 5, true));
        assert_eq!(host.controller.counters().syncs, syncs + 1);
    });
}

#[test]
fn the_limit_of_verify_is_its_own() {
    let mut limited = config(512);
    (limited.mdts, limited.vsl) = (1, 3);
    let mut host = Host::ready(limited);
    host.io_ok(nvm::verify(1, 0, 64, false));
    host.io_refused(nvm::verify(1, 0, 65, false), Status::INVALID_FIELD);
    let mut unlimited = config(512);
    unlimited.mdts = 1;
    let mut host = Host::ready(unlimited);
    host.io_ok(nvm::verify(1, 0, 2048, false));
}

#[test]
fn what_cannot_be_read_is_no_difference() {
    let mut config = config(512);
    let store = Broken {
        writes: true,
        kind: std::io::ErrorKind::Other,
    };
    config.namespaces.push(NamespaceConfig::new(store, 512));
    let mut host = Host::ready(config);
    let buffer = host.allocate(4096);
    for command in [nvm::compare(2, 0, 1, false), nvm::verify(2, 0, 1, false)] {
        let command = command.with_data(prp(buffer));
        host.io_refused(command, Status::UNRECOVERED_READ_ERROR);
    }
    assert_eq!(host.controller.counters().bytes_checked, 0);
}

#[test]
fn checks_count_as_reads_and_differences_not_as_media_errors() {
    let mut host = Host::ready(config(512));
    host.io_ok(nvm::verify(1, 0, 1, false));
    let differs = compare(&mut host, 0, &[1; 512], 512);
    host.io_refused(differs, Status::COMPARE_FAILURE);
    let page = admin::get_log_page(log::id::SMART_HEALTH, admin::ALL_NAMESPACES, 512, 0, true);
    let smart = host.admin_data(page, 512);
    let smart = SmartHealth::read_from_bytes(&smart).unwrap();
    assert_eq!(smart.host_read_commands.get(), 2);
    assert_eq!(smart.data_units_read.get(), 1);
    assert_eq!(smart.media_errors.get(), 0);
    assert_eq!(smart.error_log_entries.get(), 1);
}

#[test]
fn what_there_is_not_is_not_announced() {
    for there in [false, true] {
        let mut config = config(512);
        (config.compare, config.verify, config.copy) = (there, there, there);
        let mut host = Host::ready(config);
        let identify = host.admin_data(admin::identify_controller(), 4096);
        let identify = IdentifyController::read_from_bytes(&identify).unwrap();
        let commands = identify.optional_nvm_commands();
        assert_eq!(
            (commands.compare(), commands.verify(), commands.copy()),
            (there, there, there)
        );
        assert_eq!(identify.ocfs.get(), there.into());
    }
}
