//! Identify, features and log pages.

use nvme_soft::store::MemoryStore;
use nvme_soft::{Config, NamespaceConfig};
use nvme_spec::admin::{self, FeatureSelect};
use nvme_spec::feature::{FeatureCapabilities, NumberOfQueues, TemperatureThreshold, id};
use nvme_spec::identify::{
    ActiveNamespaces, Cns, DeallocatedRead, IdentifyController, IdentifyNamespace,
    IdentifyNvmController, NamespaceDescriptor, NamespaceDescriptors,
};
use nvme_spec::log::{self, ErrorEntry, FirmwareSlot, SmartHealth};
use nvme_spec::{Sqe, Status, nvm};
use zerocopy::FromBytes;

use crate::host::{Host, config, pattern, prp};

fn two_namespaces() -> Config {
    let mut config = config(512);
    let store = MemoryStore::new((2 << 20) + 100).unwrap();
    let mut second = NamespaceConfig::new(store, 4096);
    second.optimal_io_boundary = 32;
    second.deallocate_granularity = 8;
    config.namespaces.push(second);
    config
}

fn identify<T: FromBytes>(host: &mut Host, command: Sqe) -> T {
    T::read_from_bytes(&host.admin_data(command, 4096)).unwrap()
}

#[test]
fn identify_controller_says_what_is_configured() {
    let mut config = two_namespaces();
    config.serial = "serial 1".into();
    config.pci_vendor = 0x1234;
    config.pci_subsystem_vendor = 0x5678;
    config.mdts = 5;
    config.abort_limit = 2;
    config.volatile_write_cache = false;
    let mut host = Host::enabled(config);
    let data: IdentifyController = identify(&mut host, admin::identify_controller());
    assert_eq!(data.serial_number(), "serial 1");
    assert_eq!((data.vid.get(), data.ssvid.get()), (0x1234, 0x5678));
    assert_eq!(data.model_number(), "nvme-soft");
    assert_eq!(data.max_transfer_bytes(4096), Some(128 << 10));
    assert_eq!(data.version().to_string(), "2.0");
    assert_eq!((data.acl, data.aerl), (1, 3));
    assert_eq!(data.nn.get(), 2);
    assert!(data.supports_nvm_entry_sizes());
    assert!(!data.has_volatile_write_cache());
    assert!(data.flushes_all_namespaces());
    assert!(data.optional_nvm_commands().dataset_management());
    assert!(data.sgl_support().bit_bucket());
    assert_eq!(data.tnvmcap.get(), 3 << 20);
    assert_eq!(data.cntrltype, 1);
    assert!(
        data.subsystem_name()
            .starts_with("nqn.2014-08.org.nvmexpress:uuid:")
    );
}

#[test]
fn identify_namespace_says_what_is_configured() {
    let mut host = Host::enabled(two_namespaces());
    let first: IdentifyNamespace = identify(&mut host, admin::identify_namespace(1));
    assert_eq!(first.nsze.get(), 2048);
    assert_eq!(
        first.format().and_then(|format| format.lba_size()),
        Some(512)
    );
    assert_eq!(first.deallocated_read(), DeallocatedRead::Zeroes);
    assert!(first.write_zeroes_deallocates());
    assert!(!first.features().optimal_performance());
    let second: IdentifyNamespace = identify(&mut host, admin::identify_namespace(2));
    assert_eq!(second.nsze.get(), 512);
    assert_eq!(
        second.format().and_then(|format| format.lba_size()),
        Some(4096)
    );
    assert_eq!(second.noiob.get(), 32);
    assert!(second.features().optimal_performance());
    assert_eq!((second.npdg.get(), second.npda.get()), (7, 7));
    for nsid in [0, 3, admin::ALL_NAMESPACES] {
        let command = admin::identify_namespace(nsid);
        host.admin_refused(command, Status::INVALID_NAMESPACE_OR_FORMAT);
    }
}

#[test]
fn namespaces_are_listed_and_described() {
    let mut host = Host::enabled(two_namespaces());
    for (after, expected) in [(0, &[1, 2][..]), (1, &[2]), (2, &[]), (7, &[])] {
        let list: ActiveNamespaces = identify(&mut host, admin::active_namespaces(after));
        assert!(list.iter().eq(expected.iter().copied()));
    }
    for after in [0xffff_fffe, 0xffff_ffff] {
        let command = admin::active_namespaces(after);
        host.admin_refused(command, Status::INVALID_NAMESPACE_OR_FORMAT);
    }
    let mut uuids = Vec::new();
    for nsid in 1..=2 {
        let list: NamespaceDescriptors = identify(&mut host, admin::namespace_descriptors(nsid));
        let list: Vec<_> = list.iter().map(Result::unwrap).collect();
        let [
            NamespaceDescriptor::Uuid(uuid),
            NamespaceDescriptor::CommandSet(0),
        ] = list[..]
        else {
            panic!("{list:?}");
        };
        uuids.push(uuid);
    }
    assert_ne!(uuids[0], uuids[1]);
    let missing = admin::namespace_descriptors(3);
    host.admin_refused(missing, Status::INVALID_NAMESPACE_OR_FORMAT);
}

#[test]
fn command_set_structures_are_those_of_nvm() {
    let mut config = two_namespaces();
    (config.wzsl, config.dmrl, config.dmrsl, config.dmsl) = (5, 16, 1000, 5000);
    config.vsl = 7;
    let mut host = Host::enabled(config);
    let limits: IdentifyNvmController = identify(&mut host, admin::identify_nvm_controller());
    assert_eq!((limits.vsl, limits.wzsl, limits.dmrl), (7, 5, 16));
    assert_eq!((limits.dmrsl.get(), limits.dmsl.get()), (1000, 5000));
    let sets = host.admin_data(admin::identify(Cns::COMMAND_SETS, 0, 0), 4096);
    assert_eq!(
        (sets[0], sets.iter().filter(|&&byte| byte != 0).count()),
        (1, 1)
    );
    let zoned = 2 << 24;
    for cns in [Cns::COMMAND_SET_CONTROLLER, Cns::COMMAND_SET_NAMESPACE] {
        let other = admin::identify(cns, 1, 0).with_cdw11(zoned);
        host.admin_refused(other, Status::INVALID_FIELD);
    }
    host.admin_data(admin::identify(Cns::COMMAND_SET_NAMESPACE, 1, 0), 4096);
    let list = admin::identify(Cns::COMMAND_SET_ACTIVE_NAMESPACES, 0, 0);
    let list: ActiveNamespaces = identify(&mut host, list);
    assert_eq!(list.iter().count(), 2);
    host.admin_refused(admin::identify(Cns(0x77), 0, 0), Status::INVALID_FIELD);
}

#[test]
fn opcodes_and_forms_that_are_not_supported_are_refused() {
    let mut host = Host::enabled(config(512));
    for opcode in [0x03, 0x0d, 0x10, 0x7c, 0x80, 0xc0, 0xff] {
        host.admin_refused(Sqe::new(opcode), Status::INVALID_OPCODE);
    }
    let fused = admin::identify_controller().with_fuse(1);
    host.admin_refused(fused, Status::INVALID_FIELD);
    for psdt in 1..=3 {
        let mut dwords = admin::identify_controller().dwords();
        dwords[0] |= psdt << 14;
        host.admin_refused(Sqe::from_dwords(dwords), Status::INVALID_FIELD);
    }
    let mut dwords = admin::async_event_request().dwords();
    dwords[0] |= 1 << 14;
    host.admin_refused(Sqe::from_dwords(dwords), Status::INVALID_FIELD);
    // All of those are final.
    let refused = host.admin(Sqe::new(0xff));
    assert!(refused.status().dnr());
}

fn get(host: &mut Host, feature: u8, select: FeatureSelect) -> u32 {
    host.admin_ok(admin::get_features(feature, select))
}

#[test]
fn features_are_set_and_reset() {
    let mut host = Host::enabled(config(512));
    let values = [
        (id::ARBITRATION, 0x0302_0107),
        (id::POWER_MANAGEMENT, 0x20),
        (id::VOLATILE_WRITE_CACHE, 0),
        (id::INTERRUPT_COALESCING, 0x0207),
        (id::WRITE_ATOMICITY, 1),
        (id::ASYNC_EVENT_CONFIGURATION, 0x100),
    ];
    let mut defaults = Vec::new();
    for (feature, value) in values {
        let default = get(&mut host, feature, FeatureSelect::Current);
        assert_ne!(default, value);
        host.admin_ok(admin::set_features(feature, value, false));
        assert_eq!(get(&mut host, feature, FeatureSelect::Current), value);
        assert_eq!(get(&mut host, feature, FeatureSelect::Default), default);
        assert_eq!(get(&mut host, feature, FeatureSelect::Saved), default);
        let capabilities =
            FeatureCapabilities::from_bits(get(&mut host, feature, FeatureSelect::Supported));
        assert!(capabilities.changeable() && !capabilities.saveable());
        defaults.push((feature, default));
    }
    host.disable();
    host.enable();
    for (feature, default) in defaults {
        assert_eq!(get(&mut host, feature, FeatureSelect::Current), default);
    }
}

#[test]
fn features_with_selectors_are_kept_apart() {
    let mut host = Host::enabled(two_namespaces());
    let recovery = admin::set_features(id::ERROR_RECOVERY, 7, false);
    host.admin_ok(recovery.with_nsid(2));
    let get_recovery = admin::get_features(id::ERROR_RECOVERY, FeatureSelect::Current);
    assert_eq!(host.admin_ok(get_recovery.with_nsid(1)), 0);
    assert_eq!(host.admin_ok(get_recovery.with_nsid(2)), 7);
    host.admin_ok(recovery.with_nsid(admin::ALL_NAMESPACES));
    assert_eq!(host.admin_ok(get_recovery.with_nsid(1)), 7);
    for nsid in [0, 3] {
        host.admin_refused(
            recovery.with_nsid(nsid),
            Status::INVALID_NAMESPACE_OR_FORMAT,
        );
        host.admin_refused(
            get_recovery.with_nsid(nsid),
            Status::INVALID_NAMESPACE_OR_FORMAT,
        );
    }
    let vector = |value| admin::set_features(id::INTERRUPT_VECTOR_CONFIGURATION, value, false);
    host.admin_ok(vector(0x1_0003));
    host.admin_refused(vector(8), Status::INVALID_FIELD);
    let get_vector =
        admin::get_features(id::INTERRUPT_VECTOR_CONFIGURATION, FeatureSelect::Current);
    assert_eq!(host.admin_ok(get_vector.with_cdw11(3)), 0x1_0003);
    assert_eq!(host.admin_ok(get_vector.with_cdw11(4)), 4);
    host.admin_refused(get_vector.with_cdw11(8), Status::INVALID_FIELD);
    let threshold = TemperatureThreshold::new().with_tmpth(200).with_thsel(1);
    host.admin_ok(admin::set_features(
        id::TEMPERATURE_THRESHOLD,
        threshold.into_bits(),
        false,
    ));
    let get_threshold = admin::get_features(id::TEMPERATURE_THRESHOLD, FeatureSelect::Current);
    let under = TemperatureThreshold::new().with_thsel(1).into_bits();
    assert_eq!(host.admin_ok(get_threshold.with_cdw11(under)), 200);
    assert_eq!(host.admin_ok(get_threshold), 343);
    let sensor = TemperatureThreshold::new().with_tmpsel(3).into_bits();
    host.admin_refused(get_threshold.with_cdw11(sensor), Status::INVALID_FIELD);
}

#[test]
fn bad_feature_commands_are_refused() {
    let mut host = Host::enabled(config(512));
    let set = |feature, value| admin::set_features(feature, value, false);
    for feature in [0x00, 0x0d, 0x10, 0x7f, 0xc0] {
        host.admin_refused(set(feature, 0), Status::INVALID_FIELD);
        let get = admin::get_features(feature, FeatureSelect::Current);
        host.admin_refused(get, Status::INVALID_FIELD);
        let supported = admin::get_features(feature, FeatureSelect::Supported);
        host.admin_refused(supported, Status::INVALID_FIELD);
    }
    let save = admin::set_features(id::ARBITRATION, 0, true);
    host.admin_refused(save, Status::FEATURE_NOT_SAVEABLE);
    let namespaced = set(id::ARBITRATION, 0).with_nsid(1);
    host.admin_refused(namespaced, Status::FEATURE_NOT_NAMESPACE_SPECIFIC);
    host.admin_refused(set(id::POWER_MANAGEMENT, 1), Status::INVALID_FIELD);
    host.admin_refused(set(id::NUMBER_OF_QUEUES, 0xffff), Status::INVALID_FIELD);
    host.admin_refused(
        set(id::NUMBER_OF_QUEUES, 0xffff_0000),
        Status::INVALID_FIELD,
    );
    host.admin_refused(set(id::COMMAND_SET_PROFILE, 1), Status::INVALID_FIELD);
    let deallocated_errors = set(id::ERROR_RECOVERY, 0x1_0000).with_nsid(1);
    host.admin_refused(deallocated_errors, Status::INVALID_FIELD);
    let select = admin::get_features(id::ARBITRATION, FeatureSelect::Current).with_cdw10(0x0401);
    host.admin_refused(select, Status::INVALID_FIELD);

    let mut config = config(512);
    config.volatile_write_cache = false;
    let mut host = Host::enabled(config);
    host.admin_refused(set(id::VOLATILE_WRITE_CACHE, 1), Status::INVALID_FIELD);
    let get = admin::get_features(id::VOLATILE_WRITE_CACHE, FeatureSelect::Current);
    host.admin_refused(get, Status::INVALID_FIELD);
}

#[test]
fn queues_are_granted_up_to_what_there_is() {
    let mut config = config(512);
    config.io_queue_pairs = 4;
    let mut host = Host::enabled(config);
    let ask = |pairs| admin::set_features(id::NUMBER_OF_QUEUES, pairs, false);
    let granted = NumberOfQueues::from_bits(host.admin_ok(ask(0x0009_0001)));
    assert_eq!(
        (granted.submission_queues(), granted.completion_queues()),
        (2, 4)
    );
    assert_eq!(
        get(&mut host, id::NUMBER_OF_QUEUES, FeatureSelect::Current),
        granted.into_bits()
    );
    host.create_pair(1, 8, None);
    host.admin_refused(ask(0), Status::COMMAND_SEQUENCE_ERROR);
}

#[test]
fn smart_log_counts_what_was_done() {
    let mut host = Host::ready(config(512));
    let buffer = host.allocate(4096);
    host.memory.set(buffer, &pattern(1, 4096));
    for _ in 0..3 {
        host.io_ok(nvm::write(1, 0, 8, false).with_data(prp(buffer)));
    }
    host.io_ok(nvm::read(1, 0, 8, false).with_data(prp(buffer)));
    let nsid = admin::ALL_NAMESPACES;
    let data = host.admin_data(
        admin::get_log_page(log::id::SMART_HEALTH, nsid, 512, 0, false),
        512,
    );
    let smart = SmartHealth::read_from_bytes(&data).unwrap();
    assert_eq!(smart.host_write_commands.get(), 3);
    assert_eq!(smart.host_read_commands.get(), 1);
    assert_eq!(smart.data_units_written.get(), 1);
    assert_eq!(smart.critical_warning, 0);
    assert_eq!(smart.composite_temperature.get(), 310);
    let by_namespace = admin::get_log_page(log::id::SMART_HEALTH, 1, 512, 0, false);
    host.admin_refused(by_namespace, Status::INVALID_FIELD);
}

#[test]
fn the_error_log_has_the_newest_first() {
    let mut host = Host::ready(config(512));
    for slba in [5000, 6000] {
        host.io_refused(nvm::read(1, slba, 1, false), Status::LBA_OUT_OF_RANGE);
    }
    let data = host.admin_data(admin::get_log_page(log::id::ERROR, 0, 192, 0, false), 192);
    let entries: Vec<_> = data
        .chunks_exact(64)
        .map(|entry| ErrorEntry::read_from_bytes(entry).unwrap())
        .collect();
    let seen = entries
        .iter()
        .map(|entry| (entry.error_count.get(), entry.lba.get()));
    assert!(seen.eq([(2, 6000), (1, 5000), (0, 0)]));
    assert_eq!((entries[0].sqid.get(), entries[0].nsid.get()), (1, 1));
    assert!(entries[0].status().is(Status::LBA_OUT_OF_RANGE));
}

#[test]
fn log_pages_are_read_in_parts() {
    let mut host = Host::enabled(config(512));
    let whole = admin::get_log_page(log::id::FIRMWARE_SLOT, 0, 512, 0, false);
    let whole = host.admin_data(whole, 512);
    let slots = FirmwareSlot::read_from_bytes(&whole).unwrap();
    assert_eq!(slots.active_slot(), 1);
    let part = admin::get_log_page(log::id::FIRMWARE_SLOT, 0, 16, 8, false);
    let part = host.admin_data(part, 32);
    assert_eq!(part[..16], whole[8..24]);
    assert_eq!(part[16..], [0xa5; 16]);
    // What is past the end of the page reads as zeros.
    let long = admin::get_log_page(log::id::FIRMWARE_SLOT, 0, 1024, 256, false);
    let long = host.admin_data(long, 1024);
    assert_eq!((&long[..256], &long[256..]), (&whole[256..], &[0; 768][..]));
    let changed = admin::get_log_page(log::id::CHANGED_NAMESPACES, 0, 4096, 0, false);
    assert_eq!(host.admin_data(changed, 4096), [0; 4096]);
}

#[test]
fn bad_log_commands_are_refused() {
    let mut config = config(512);
    config.mdts = 1;
    let mut host = Host::enabled(config);
    let page = log::id::FIRMWARE_SLOT;
    for unknown in [0x00, 0x06, 0x70, 0xc0] {
        let command = admin::get_log_page(unknown, 0, 64, 0, false);
        host.admin_refused(command, Status::INVALID_LOG_PAGE);
    }
    let command = admin::get_log_page(page, 0, 64, 0, false);
    host.admin_refused(command.with_cdw12(2), Status::INVALID_FIELD);
    host.admin_refused(command.with_cdw12(516), Status::INVALID_FIELD);
    host.admin_refused(command.with_cdw13(1), Status::INVALID_FIELD);
    host.admin_refused(command.with_cdw14(1 << 23), Status::INVALID_FIELD);
    let too_long = admin::get_log_page(page, 0, 8196, 0, false);
    host.admin_refused(too_long, Status::INVALID_FIELD);
}
