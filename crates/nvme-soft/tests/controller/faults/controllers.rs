//! What happens to the controller as a whole.

use std::time::{Duration, Instant};

use nvme_soft::NamespaceChange;
use nvme_soft::fault::{Behaviour, EnableRefusal, Fault, FaultError, FaultKind, FaultQueue, Loss};
use nvme_spec::registers::{ControllerConfiguration, ShutdownNotification, ShutdownStatus, offset};
use nvme_spec::{Status, admin, nvm};

use super::{HOUR, hits, host_with, read, write};
use crate::host::{Host, config, pattern, prp, usual_configuration, wait_for};

fn host_not_enabled(fault: Fault) -> Host {
    let mut config = config(512);
    config.faults.push(fault);
    Host::new(config)
}

#[test]
fn an_enable_is_refused_that_often() {
    let refuse = |refusal| Fault::new(Behaviour::RefuseEnable(refusal)).times(2);
    let mut host = host_not_enabled(refuse(EnableRefusal::Fail));
    for _ in 0..2 {
        host.enable_with(usual_configuration());
        wait_for(|| host.status().cfs().then_some(()));
        assert!(!host.status().rdy());
        host.disable();
        wait_for(|| (!host.status().cfs()).then_some(()));
    }
    host.enable();
    host.disable();

    host.controller
        .inject(refuse(EnableRefusal::NeverReady))
        .unwrap();
    for round in 1..=2 {
        host.enable_with(usual_configuration());
        wait_for(|| {
            (host.controller.faults_hit(FaultKind::RefuseEnable) == 2 + round).then_some(())
        });
        // Any change is acted on after that.
        host.controller.release();
        assert_eq!(host.status().into_bits(), 0);
        host.disable();
        host.controller.release();
    }
    host.enable();
}

#[test]
fn a_slow_controller_becomes_ready_in_its_time() {
    const TIME: Duration = Duration::from_millis(30);
    let mut host = host_not_enabled(Fault::new(Behaviour::SlowReady(TIME)).times(2));
    let start = Instant::now();
    host.enable();
    assert!(start.elapsed() >= TIME);
    host.create_pair(1, 16, None);
    host.io_ok(nvm::flush(1));
    host.disable();
    // Given up before it is ready, it does not become so.
    host.enable_with(usual_configuration());
    wait_for(|| (hits(&host, FaultKind::SlowReady) == 2).then_some(()));
    host.write_configuration(ControllerConfiguration::new());
    host.controller.release();
    std::thread::sleep(2 * TIME);
    assert!(!host.status().rdy());
    host.enable();
}

#[test]
fn a_controller_that_hangs_in_disable_goes_on() {
    let mut host = host_not_enabled(Fault::new(Behaviour::HangDisable));
    host.enable();
    host.create_pair(1, 16, None);
    host.write_configuration(usual_configuration().with_en(false));
    wait_for(|| (hits(&host, FaultKind::HangDisable) == 1).then_some(()));
    host.io_ok(nvm::flush(1));
    assert!(host.status().rdy());
    // A function reset helps.
    host.controller.reset().unwrap();
    assert!(!host.status().rdy());
    host.enable();
    host.disable();
}

#[test]
fn a_function_reset_fails_that_often() {
    let mut host = host_with(Behaviour::Hold);
    host.controller
        .inject(Fault::new(Behaviour::FailReset).times(2))
        .unwrap();
    for _ in 0..2 {
        host.controller.reset().unwrap_err();
        assert!(host.status().rdy());
        host.admin_ok(admin::get_features(1, admin::FeatureSelect::Current));
    }
    host.controller.reset().unwrap();
    assert!(!host.status().rdy());
    assert_eq!(hits(&host, FaultKind::FailReset), 2);
}

#[test]
fn a_shutdown_does_not_complete() {
    let mut host = host_with(Behaviour::Hold);
    host.controller
        .inject(Fault::new(Behaviour::HangShutdown))
        .unwrap();
    let shutdown = usual_configuration().with_shn(ShutdownNotification::Normal);
    host.write_configuration(shutdown);
    wait_for(|| (hits(&host, FaultKind::HangShutdown) == 1).then_some(()));
    host.submit(1, nvm::flush(1));
    host.controller.release();
    assert_eq!(host.status().shst(), ShutdownStatus::Occurring);
    assert_eq!(host.look(1), None);
    host.disable();
    host.enable();
    host.write_configuration(shutdown);
    wait_for(|| (host.status().shst() == ShutdownStatus::Complete).then_some(()));
}

#[test]
fn a_controller_fails_and_may_go_on() {
    let mut host = host_with(Behaviour::Fail { serve: true });
    host.io_ok(nvm::flush(1));
    assert!(host.status().cfs());
    host.io_ok(nvm::flush(1));

    let mut host = host_with(Behaviour::Fail { serve: false });
    host.submit(1, nvm::flush(1));
    wait_for(|| host.status().cfs().then_some(()));
    host.submit(1, nvm::flush(1));
    host.controller.release();
    assert_eq!(host.look(1), None);
    assert_eq!(hits(&host, FaultKind::Fail), 1);
    host.disable();
    host.enable();
    host.controller.fail();
    assert!(host.status().cfs());
}

#[test]
fn a_function_that_vanished_is_not_there() {
    let mut host = host_with(Behaviour::Vanish(Loss::Nothing));
    host.submit(1, nvm::flush(1));
    wait_for(|| (host.controller.read32(offset::CSTS) == u32::MAX).then_some(()));
    assert_eq!(hits(&host, FaultKind::Vanish), 1);
    assert_eq!(host.controller.read32(offset::VS), u32::MAX);
    assert_eq!(host.controller.read64(offset::CAP), u64::MAX);
    let accesses = host.memory.accesses();
    host.ring(1);
    host.write_configuration(ControllerConfiguration::new());
    host.write_configuration(usual_configuration());
    host.controller.set_bus_master(false);
    host.controller.reset().unwrap_err();
    host.controller.fail();
    assert_eq!(host.memory.accesses(), accesses);
    assert_eq!(host.controller.counters().invalid_doorbells, 0);
    assert_eq!(host.controller.read32(offset::CC), u32::MAX);

    host.controller.reappear();
    assert_eq!(host.controller.read32(offset::CC), 0);
    assert_eq!(host.controller.read64(offset::ASQ), 0);
    assert_eq!(host.status().into_bits(), 0);
    host.enable();
    host.create_pair(1, 16, Some(1));
    assert!(write(&mut host, 0, 1).status().is_success());
    // A second time, and what is durable stays.
    host.io_ok(nvm::flush(1));
    host.controller.vanish(Loss::All);
    assert_eq!(host.controller.read32(offset::CSTS), u32::MAX);
    host.controller.reappear();
    host.enable();
    host.create_pair(1, 16, Some(1));
    assert_eq!(read(&mut host, 0, 1), pattern(1, 512));
}

#[test]
fn the_power_fails_while_commands_are_in_flight() {
    let mut host = host_with(Behaviour::Delay(HOUR));
    host.submit(1, nvm::flush(1));
    host.controller
        .inject(Fault::new(Behaviour::PowerLoss(Loss::All)).queue(FaultQueue::Io))
        .unwrap();
    host.submit(1, nvm::flush(1));
    wait_for(|| (!host.status().rdy()).then_some(()));
    assert_eq!(host.controller.read32(offset::CC), 0);
    assert_eq!(host.look(1), None);
    assert_eq!(hits(&host, FaultKind::PowerLoss), 1);
    host.enable();
    host.create_pair(1, 16, None);
    host.io_ok(nvm::flush(1));
}

#[test]
fn namespaces_change_under_commands() {
    let mut config = config(512);
    config.max_namespaces = 2;
    for then in [
        Behaviour::ChangeNamespace(NamespaceChange::Resize {
            nsid: 1,
            bytes: 2 << 20,
        }),
        Behaviour::ChangeNamespace(NamespaceChange::Detach { nsid: 1 }),
        Behaviour::ChangeNamespace(NamespaceChange::Attach { nsid: 1 }),
        // There is none with that identifier: the command is served all the same.
        Behaviour::ChangeNamespace(NamespaceChange::Detach { nsid: 9 }),
        Behaviour::AddNamespace {
            bytes: 1 << 20,
            lba_size: 4096,
        },
    ] {
        config.faults.push(Fault::new(then).queue(FaultQueue::Io));
    }
    let mut host = Host::ready(config);
    // Beyond the end until now.
    host.io_ok(nvm::write_zeroes(1, 4095, 1, false, false));
    host.io_refused(nvm::flush(1), Status::INVALID_FIELD);
    host.io_ok(nvm::flush(1));
    host.io_ok(nvm::flush(1));
    host.io_ok(nvm::flush(2));
    assert_eq!(hits(&host, FaultKind::ChangeNamespace), 4);
    assert_eq!(hits(&host, FaultKind::AddNamespace), 1);
}

#[test]
fn without_bus_mastering_nothing_is_released() {
    let mut host = host_with(Behaviour::Swallow { execute: false });
    let cid = host.submit(1, nvm::flush(1));
    wait_for(|| (hits(&host, FaultKind::Swallow) == 1).then_some(()));
    host.controller.set_bus_master(false);
    let accesses = host.memory.accesses();
    host.controller.release_stuck();
    host.controller.set_bus_master(false);
    assert_eq!(host.memory.accesses(), accesses);
    host.controller.set_bus_master(true);
    assert!(host.wait(1, cid).status().is_success());
}

/// Whatever was struck: with bus mastering off, after a disable and after a reset the controller
/// leaves memory alone, and afterwards it can be used again.
#[test]
fn a_controller_that_was_stopped_leaves_memory_alone() {
    const SOON: Duration = Duration::from_millis(3);
    let commands = [
        Behaviour::Delay(SOON),
        Behaviour::Swallow { execute: false },
        Behaviour::Swallow { execute: true },
        Behaviour::Hold,
        Behaviour::CompleteTwice(SOON),
        Behaviour::OutOfOrder(3),
        Behaviour::CompleteEarly(SOON),
        Behaviour::FlipPhase,
        Behaviour::TruncateData(9),
        Behaviour::SpuriousInterrupt,
        Behaviour::PowerLoss(Loss::All),
        Behaviour::Fail { serve: true },
        Behaviour::Fail { serve: false },
    ];
    let stops: [fn(&Host); 3] = [
        |host| host.controller.set_bus_master(false),
        Host::disable,
        |host| host.controller.reset().unwrap(),
    ];
    for then in commands {
        for stop in stops {
            let mut host = host_with(then.clone());
            let buffer = host.allocate(512);
            for _ in 0..3 {
                host.submit(1, nvm::read(1, 0, 1, false).with_data(prp(buffer)));
            }
            wait_for(|| (hits(&host, then.kind()) == 1).then_some(()));
            stop(&host);
            let accesses = host.memory.accesses();
            host.controller.release_stuck();
            std::thread::sleep(2 * SOON);
            host.controller.release();
            assert_eq!(host.memory.accesses(), accesses, "{then:?}");
            host.controller.reset().unwrap();
            host.controller.set_bus_master(true);
            host.enable();
            host.create_pair(1, 16, None);
            host.io_ok(nvm::flush(1));
            assert_eq!(host.look(1), None, "{then:?}");
        }
    }
}

#[test]
fn faults_are_forgotten() {
    let mut host = host_with(Behaviour::Hold);
    host.controller.clear_faults();
    host.io_ok(nvm::flush(1));
    assert_eq!(hits(&host, FaultKind::Hold), 0);
}

#[test]
fn a_fault_that_makes_no_sense_is_refused() {
    let host = Host::new(config(512));
    let refused = |fault| host.controller.inject(fault).unwrap_err();
    let reset = Fault::new(Behaviour::FailReset).namespace(1);
    assert_eq!(
        refused(reset),
        FaultError::NoCommand {
            kind: FaultKind::FailReset,
            key: "nsid"
        }
    );
    let held = || Fault::new(Behaviour::Hold);
    assert_eq!(
        refused(held().nth(0)).to_string(),
        "nth: not within 1 and above"
    );
    assert_eq!(
        refused(held().probability(f64::NAN, 0)).to_string(),
        "probability: not within 0.0..=1.0"
    );
    assert_eq!(
        refused(held().blocks(4..4)).to_string(),
        "lba: not within start < end"
    );
}
