//! Namespaces that change while the host uses them, and what the host is told.

use nvme_soft::store::{FileStore, MemoryStore, Store};
use nvme_soft::{ChangeError, Config, NamespaceChange, NamespaceConfig};
use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::feature::{AsyncEventConfiguration, id};
use nvme_spec::identify::{ActiveNamespaces, IdentifyController, IdentifyNamespace};
use nvme_spec::log::{self, ChangedNamespaces};
use nvme_spec::{Status, admin, nvm};
use zerocopy::FromBytes;

use crate::host::{Host, config, pattern, prp};

fn several(count: usize, max_namespaces: u32) -> Config {
    Config {
        max_namespaces,
        namespaces: (0..count)
            .map(|_| NamespaceConfig::new(MemoryStore::new(64 << 10).unwrap(), 512))
            .collect(),
        ..Config::default()
    }
}

fn ask_for_notices(host: &mut Host) {
    let events = AsyncEventConfiguration::new().with_namespace_attributes(true);
    host.admin_ok(admin::set_features(
        id::ASYNC_EVENT_CONFIGURATION,
        events.into_bits(),
        false,
    ));
}

fn changed(host: &mut Host, retain: bool) -> ChangedNamespaces {
    let command = admin::get_log_page(log::id::CHANGED_NAMESPACES, 0, 4096, 0, retain);
    ChangedNamespaces::read_from_bytes(&host.admin_data(command, 4096)).unwrap()
}

fn namespace(host: &mut Host, nsid: u32) -> IdentifyNamespace {
    let data = host.admin_data(admin::identify_namespace(nsid), 4096);
    IdentifyNamespace::read_from_bytes(&data).unwrap()
}

fn active(host: &mut Host) -> Vec<u32> {
    let data = host.admin_data(admin::active_namespaces(0), 4096);
    let list = ActiveNamespaces::read_from_bytes(&data).unwrap();
    list.iter().collect()
}

#[track_caller]
fn expect_event(host: &mut Host, cid: u16, event: Event) {
    let entry = host.wait(0, cid);
    assert!(entry.status().is_success());
    assert_eq!(AsyncEvent::from_bits(entry.result()).event(), event);
}

#[test]
fn a_size_changes_under_the_host() {
    let mut host = Host::ready(config(512));
    let buffer = host.allocate(4096);
    let data = pattern(7, 512);
    host.memory.set(buffer, &data);
    host.io_ok(nvm::write(1, 100, 1, false).with_data(prp(buffer)));
    host.controller.resize_namespace(1, 2 << 20).unwrap();
    assert_eq!(namespace(&mut host, 1).nsze.get(), 4096);
    let last = nvm::read(1, 4095, 1, false).with_data(prp(buffer));
    host.io_ok(last);
    assert_eq!(host.memory.get(buffer, 512), vec![0; 512]);
    host.io_ok(nvm::read(1, 100, 1, false).with_data(prp(buffer)));
    assert_eq!(host.memory.get(buffer, 512), data);
    // 101 blocks and a bit.
    host.controller.resize_namespace(1, 101 * 512 + 5).unwrap();
    assert_eq!(namespace(&mut host, 1).nsze.get(), 101);
    host.io_refused(last, Status::LBA_OUT_OF_RANGE);
    host.io_ok(nvm::read(1, 100, 1, false).with_data(prp(buffer)));
    assert_eq!(host.memory.get(buffer, 512), data);
}

#[test]
fn what_was_cut_off_a_file_reads_as_zeroes_when_it_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    let mut store = FileStore::create(&path, 8192).unwrap();
    store.write(4096, &[7; 512], false).unwrap();
    let mut config = Config::default();
    config.namespaces.push(NamespaceConfig::new(store, 512));
    let mut host = Host::ready(config);
    host.controller.resize_namespace(1, 4096).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096);
    host.controller.resize_namespace(1, 8192).unwrap();
    let buffer = host.allocate(4096);
    host.memory.set(buffer, &[1; 512]);
    host.io_ok(nvm::read(1, 8, 1, false).with_data(prp(buffer)));
    assert_eq!(host.memory.get(buffer, 512), vec![0; 512]);
}

#[test]
fn a_detached_namespace_is_inactive_until_it_is_attached() {
    let mut host = Host::ready(several(2, 3));
    let buffer = host.allocate(4096);
    host.memory.set(buffer, &[9; 512]);
    host.io_ok(nvm::write(1, 3, 1, false).with_data(prp(buffer)));
    host.controller.detach_namespace(1).unwrap();
    assert_eq!(active(&mut host), [2]);
    assert_eq!(namespace(&mut host, 1), IdentifyNamespace::default());
    let read = nvm::read(1, 3, 1, false).with_data(prp(buffer));
    host.io_refused(read, Status::INVALID_FIELD);
    host.io_refused(nvm::flush(1), Status::INVALID_FIELD);
    host.admin_refused(admin::namespace_descriptors(1), Status::INVALID_FIELD);
    // Never there, but could be; and one that can't be.
    host.io_refused(nvm::flush(3), Status::INVALID_FIELD);
    host.io_refused(nvm::flush(4), Status::INVALID_NAMESPACE_OR_FORMAT);
    host.io_ok(nvm::flush(2));
    host.controller.attach_namespace(1).unwrap();
    assert_eq!(active(&mut host), [1, 2]);
    host.memory.set(buffer, &[0; 512]);
    host.io_ok(read);
    assert_eq!(host.memory.get(buffer, 512), vec![9; 512]);
}

#[test]
fn another_block_size_divides_the_same_bytes() {
    let mut host = Host::ready(config(512));
    let format = |lba_size| NamespaceChange::Format { nsid: 1, lba_size };
    host.controller.change_namespace(format(4096)).unwrap();
    let data = namespace(&mut host, 1);
    let lba_size = data.format().and_then(|format| format.lba_size());
    assert_eq!((data.nsze.get(), lba_size), (256, Some(4096)));
    let refused = host.controller.change_namespace(format(1024)).unwrap_err();
    assert!(matches!(refused, ChangeError::Invalid(_)), "{refused}");
}

#[test]
fn namespaces_are_added_as_long_as_there_are_identifiers() {
    let mut host = Host::ready(several(1, 2));
    let data = host.admin_data(admin::identify_controller(), 4096);
    let controller = IdentifyController::read_from_bytes(&data).unwrap();
    assert_eq!(controller.nn.get(), 2);
    let new = || NamespaceConfig::new(MemoryStore::new(1 << 20).unwrap(), 4096);
    assert_eq!(host.controller.add_namespace(new()).unwrap(), 2);
    assert_eq!(active(&mut host), [1, 2]);
    host.io_ok(nvm::flush(2));
    let full = host.controller.add_namespace(new()).unwrap_err();
    assert!(
        matches!(full, ChangeError::Full { max_namespaces: 2 }),
        "{full}"
    );
}

#[test]
fn what_cannot_be_changed_stays_and_nobody_is_told() {
    let mut host = Host::enabled(config(512));
    ask_for_notices(&mut host);
    host.submit(0, admin::async_event_request());
    let missing = host.controller.detach_namespace(2).unwrap_err();
    assert!(
        matches!(missing, ChangeError::NoNamespace { nsid: 2 }),
        "{missing}"
    );
    let empty = host.controller.resize_namespace(1, 511).unwrap_err();
    assert_eq!(
        empty.to_string(),
        "namespace 1: 511 bytes hold no block of 512 bytes"
    );
    let absurd = host.controller.resize_namespace(1, u64::MAX).unwrap_err();
    assert!(
        matches!(absurd, ChangeError::Store { nsid: 1, .. }),
        "{absurd}"
    );
    host.controller.attach_namespace(1).unwrap();
    host.controller.resize_namespace(1, 1 << 20).unwrap();
    assert_eq!(changed(&mut host, true), ChangedNamespaces::default());
    assert!(host.look(0).is_none());
    assert_eq!(namespace(&mut host, 1).nsze.get(), 2048);
}

#[test]
fn a_host_that_asked_is_told_once_until_it_reads_the_list() {
    let mut host = Host::enabled(several(3, 3));
    let requests: Vec<_> = (0..2)
        .map(|_| host.submit(0, admin::async_event_request()))
        .collect();
    // Not asked for, but noted.
    host.controller.resize_namespace(3, 4096).unwrap();
    assert!(changed(&mut host, true).iter().eq([3]));
    assert!(host.look(0).is_none());
    ask_for_notices(&mut host);
    host.controller.detach_namespace(2).unwrap();
    expect_event(&mut host, requests[0], Event::NamespaceAttributeChanged);
    host.controller.resize_namespace(1, 4096).unwrap();
    assert!(changed(&mut host, true).iter().eq([1, 2, 3]));
    assert!(host.look(0).is_none());
    // The second change waits as an event until the list is read.
    assert!(changed(&mut host, false).iter().eq([1, 2, 3]));
    expect_event(&mut host, requests[1], Event::NamespaceAttributeChanged);
    assert_eq!(changed(&mut host, false), ChangedNamespaces::default());
}

#[test]
fn more_changes_than_the_list_has_room_for() {
    let mut host = Host::enabled(several(1025, 0));
    for nsid in 1..=1024 {
        host.controller.resize_namespace(nsid, 4096).unwrap();
    }
    assert!(changed(&mut host, true).iter().eq(1..=1024));
    host.controller.detach_namespace(1025).unwrap();
    let list = changed(&mut host, false);
    assert!(list.has_overflowed());
    assert!(list.entries[1..].iter().all(|entry| entry.get() == 0));
    assert_eq!(changed(&mut host, false), ChangedNamespaces::default());
}

#[test]
fn a_change_under_load_is_made_between_two_commands() {
    let mut host = Host::ready(config(512));
    let buffer = host.allocate(4096);
    let read = nvm::read(1, 2047, 1, false).with_data(prp(buffer));
    for round in 0..50 {
        for _ in 0..20 {
            host.submit(1, read);
        }
        let blocks = if round % 2 == 0 { 1024 } else { 2048 };
        host.controller.resize_namespace(1, blocks * 512).unwrap();
        let mut statuses = Vec::new();
        for _ in 0..20 {
            statuses.push(host.reap(1).status());
        }
        for status in statuses {
            assert!(
                status.is_success() || status.is(Status::LBA_OUT_OF_RANGE),
                "{status}"
            );
        }
        let after = host.io(read).status();
        assert_eq!(after.is_success(), blocks == 2048, "{after}");
    }
}

#[test]
fn a_change_of_a_controller_that_is_not_enabled_is_seen_later() {
    let mut host = Host::new(config(512));
    host.controller.resize_namespace(1, 4096).unwrap();
    host.enable();
    assert_eq!(namespace(&mut host, 1).nsze.get(), 8);
    // A reset leaves both as they are.
    host.disable();
    host.enable();
    assert_eq!(namespace(&mut host, 1).nsze.get(), 8);
    assert!(changed(&mut host, false).iter().eq([1]));
}

#[test]
fn an_event_waits_for_bus_mastering() {
    let mut host = Host::enabled(config(512));
    ask_for_notices(&mut host);
    let request = host.submit(0, admin::async_event_request());
    // Served, so that the request was taken.
    assert_eq!(active(&mut host), [1]);
    host.controller.set_bus_master(false);
    let before = host.memory.accesses();
    host.controller.resize_namespace(1, 4096).unwrap();
    assert_eq!(host.memory.accesses(), before);
    host.controller.set_bus_master(true);
    expect_event(&mut host, request, Event::NamespaceAttributeChanged);
}
