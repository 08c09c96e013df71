//! Enable, disable, reset, shutdown.

use std::time::Duration;

use nvme_soft::Config;
use nvme_spec::registers::{ControllerConfiguration, ShutdownNotification, ShutdownStatus, offset};
use nvme_spec::{Status, admin, nvm};

use crate::host::{Host, config, prp, usual_configuration, wait_for};

#[test]
fn enable_and_disable_follow_cc() {
    let mut host = Host::new(config(512));
    assert!(!host.status().rdy());
    for _ in 0..3 {
        host.enable();
        host.admin_ok(admin::get_features(1, admin::FeatureSelect::Current));
        host.disable();
    }
    assert!(!host.status().cfs());
}

#[test]
fn a_configuration_that_is_not_supported_is_fatal() {
    let wrong: [fn(ControllerConfiguration) -> ControllerConfiguration; 5] = [
        |cc| cc.with_css(1),
        |cc| cc.with_mps(5),
        |cc| cc.with_ams(1),
        |cc| cc.with_iosqes(7),
        |cc| cc.with_iocqes(5),
    ];
    let mut host = Host::new(config(512));
    for wrong in wrong {
        host.enable_with(wrong(usual_configuration()));
        let status = wait_for(|| Some(host.status()).filter(|status| status.cfs()));
        assert!(!status.rdy());
        host.write_configuration(ControllerConfiguration::new());
        wait_for(|| (!host.status().cfs()).then_some(()));
    }
    host.enable();
}

#[test]
fn admin_queues_need_two_entries_and_alignment() {
    let mut host = Host::new(config(512));
    host.write_configuration(usual_configuration());
    wait_for(|| host.status().cfs().then_some(()));
    host.disable();
    host.enable_with(usual_configuration().with_en(false).with_mps(1));
    let base = host.controller.read64(offset::ASQ);
    host.controller
        .write64(offset::ASQ, base / 8192 * 8192 + 4096);
    host.write_configuration(usual_configuration().with_mps(1));
    wait_for(|| host.status().cfs().then_some(()));
}

#[test]
fn all_command_sets_can_be_selected() {
    let mut host = Host::new(config(512));
    host.enable_with(usual_configuration().with_css(6));
    wait_for(|| host.status().rdy().then_some(()));
}

#[test]
fn shutdown_completes_and_stops_the_controller() {
    for notification in [ShutdownNotification::Normal, ShutdownNotification::Abrupt] {
        let mut host = Host::ready(config(512));
        host.write_configuration(usual_configuration().with_shn(notification));
        wait_for(|| (host.status().shst() == ShutdownStatus::Complete).then_some(()));
        assert!(host.status().rdy());
        host.submit(1, nvm::flush(1));
        // Neither is served: a controller that is shut down needs a reset.
        host.controller.set_bus_master(true);
        assert!(host.look(1).is_none());
        host.disable();
        assert_eq!(host.status().shst(), ShutdownStatus::Normal);
        host.enable();
        host.create_pair(1, 16, None);
        host.io_ok(nvm::flush(1));
    }
}

#[test]
fn a_disabled_controller_can_be_shut_down() {
    let mut host = Host::new(config(512));
    let shutdown = ControllerConfiguration::new().with_shn(ShutdownNotification::Normal);
    host.write_configuration(shutdown);
    wait_for(|| (host.status().shst() == ShutdownStatus::Complete).then_some(()));
    host.enable();
    assert_eq!(host.status().shst(), ShutdownStatus::Normal);
}

#[test]
fn after_a_reset_no_memory_is_accessed() {
    let mut config = config(512);
    config.latency = Duration::from_secs(3600);
    let mut host = Host::ready(config);
    let buffer = host.allocate(4096);
    for _ in 0..20 {
        host.place(1, nvm::read(1, 0, 8, false).with_data(prp(buffer)));
    }
    host.ring(1);
    wait_for(|| (host.controller.counters().commands == 20).then_some(()));
    host.controller.reset().unwrap();
    let accesses = host.memory.accesses();
    assert!(!host.status().rdy());
    assert_eq!(host.controller.read32(offset::CC), 0);
    assert_eq!(host.controller.read32(offset::AQA), 0);
    assert_eq!(host.controller.read64(offset::ASQ), 0);
    // Its doorbells are dead.
    host.ring(1);
    host.controller.set_bus_master(true);
    assert_eq!(host.memory.accesses(), accesses);
    assert_eq!(host.controller.counters().invalid_doorbells, 1);
    host.enable();
    host.create_pair(1, 16, None);
}

#[test]
fn disable_forgets_what_is_in_flight() {
    let mut config = config(512);
    config.latency = Duration::from_secs(3600);
    let mut host = Host::ready(config);
    host.submit(1, nvm::flush(1));
    wait_for(|| (host.controller.counters().commands == 1).then_some(()));
    host.disable();
    assert!(host.look(1).is_none());
    host.enable();
    host.create_pair(1, 16, None);
}

#[test]
fn without_bus_mastering_memory_is_left_alone() {
    let mut host = Host::ready(config(512));
    host.controller.set_bus_master(false);
    let accesses = host.memory.accesses();
    let cid = host.submit(1, nvm::flush(1));
    // A second change is in effect only after the doorbell had its chance.
    host.controller.set_bus_master(false);
    assert_eq!(host.memory.accesses(), accesses);
    host.controller.set_bus_master(true);
    assert!(host.wait(1, cid).status().is_success());
}

#[test]
fn hold_leaves_commands_in_their_queues() {
    let mut host = Host::ready(config(512));
    host.controller.hold();
    let cid = host.submit(1, nvm::flush(1));
    let admin_cid = host.submit(0, admin::get_features(1, admin::FeatureSelect::Current));
    host.controller.hold_io();
    assert!(host.wait(0, admin_cid).status().is_success());
    assert!(host.look(1).is_none());
    assert_eq!(host.controller.counters().commands, 0);
    host.controller.release();
    assert!(host.wait(1, cid).status().is_success());
}

#[test]
fn queues_that_are_not_reachable_are_fatal() {
    let mut host = Host::ready(config(512));
    let command = nvm::flush(1);
    let cid = host.submit(1, command);
    host.wait(1, cid);
    let asq = host.controller.read64(offset::ASQ);
    host.memory.forbid(asq, 4096);
    host.submit(0, admin::identify_controller());
    wait_for(|| host.status().cfs().then_some(()));
    assert_eq!(host.controller.counters().refused_accesses, 1);
    // Only a reset leads out.
    host.submit(1, command);
    host.controller.set_bus_master(true);
    assert!(host.look(1).is_none());
    host.disable();
    assert!(!host.status().cfs());
}

#[test]
fn an_idle_controller_sleeps() {
    let mut host = Host::ready(config(512));
    // A sleep is counted when it ends.
    wait_for(|| {
        std::thread::sleep(Duration::from_millis(1));
        host.io_ok(nvm::flush(1));
        Some(host.controller.counters().sleeps).filter(|&sleeps| sleeps > 0)
    });
    assert!(host.controller.thread_id() > 0);
    host.io_refused(nvm::flush(9), Status::INVALID_NAMESPACE_OR_FORMAT);
}

#[test]
fn limits_show_in_the_capabilities() {
    let config = Config {
        max_queue_entries: 256,
        doorbell_stride: 2,
        mpsmin: 1,
        mpsmax: 2,
        ready_timeout: Duration::from_millis(1700),
        ..Config::default()
    };
    let host = Host::new(config);
    let capabilities =
        nvme_spec::registers::Capabilities::from_bits(host.controller.read64(offset::CAP));
    assert_eq!(capabilities.mqes(), 255);
    assert_eq!(capabilities.dstrd(), 2);
    assert_eq!((capabilities.mpsmin(), capabilities.mpsmax()), (1, 2));
    assert_eq!(capabilities.to(), 4);
    assert!(capabilities.cqr());
}
