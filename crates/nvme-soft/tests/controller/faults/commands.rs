//! Commands that are late, wait, or do something else than their work.

use std::time::{Duration, Instant};

use nvme_soft::fault::{
    Behaviour, Fault, FaultKind, FaultQueue, FaultStatus, Loss, TornBlocks, TornEnd,
};
use nvme_spec::opcode::{AdminOpcode, NvmOpcode};
use nvme_spec::{Status, admin, nvm};

use super::{
    HOUR, hits, host_with, host_with_fault, nothing_but_a_flush_completes, read, submit_write,
    write,
};
use crate::host::{Host, config, pattern, prp, wait_for};

/// Dword 0 of an Abort that did not abort.
const NOT_ABORTED: u32 = 1;

#[test]
fn a_delayed_command_is_late_and_others_pass_it() {
    const DELAY: Duration = Duration::from_millis(20);
    let fault = Fault::new(Behaviour::Delay(DELAY)).queue(FaultQueue::Io);
    let mut host = host_with_fault(fault.nth(2));
    let start = Instant::now();
    let cids: Vec<_> = (0..3).map(|_| host.place(1, nvm::flush(1))).collect();
    host.ring(1);
    let order: Vec<_> = (0..3).map(|_| host.reap(1).cid()).collect();
    assert_eq!(order, [cids[0], cids[2], cids[1]]);
    assert!(start.elapsed() >= DELAY);
    assert_eq!(hits(&host, FaultKind::Delay), 1);
}

#[test]
fn commands_wait_in_the_order_in_which_they_are_due() {
    let mut config = config(512);
    config.latency = HOUR;
    for (nth, delay) in [(1, 3 * HOUR), (2, HOUR), (3, 2 * HOUR), (5, Duration::MAX)] {
        let delay = Behaviour::Delay(delay);
        let fault = Fault::new(delay).queue(FaultQueue::Io).nth(nth);
        config.faults.push(fault);
    }
    let mut host = Host::ready(config);
    let cids: Vec<_> = (0..5).map(|_| host.submit(1, nvm::flush(1))).collect();
    wait_for(|| (hits(&host, FaultKind::Delay) == 4).then_some(()));
    // Their end with the queue comes in that order too.
    host.admin_ok(admin::delete_submission_queue(1));
    let order: Vec<_> = std::iter::from_fn(|| host.look(1))
        .map(|entry| entry.cid())
        .collect();
    assert_eq!(order, [3, 1, 2, 0, 4].map(|index| cids[index]));
}

#[test]
fn a_delayed_command_can_be_aborted() {
    let mut host = host_with(Behaviour::Delay(HOUR));
    let cid = host.submit(1, nvm::flush(1));
    nothing_but_a_flush_completes(&mut host);
    assert_eq!(host.admin_ok(admin::abort(1, cid)), 0);
    assert!(host.wait(1, cid).status().is(Status::ABORT_REQUESTED));
    // It is not there any more.
    assert_eq!(host.admin_ok(admin::abort(1, cid)), NOT_ABORTED);
}

#[test]
fn an_admin_command_can_be_delayed_and_aborted() {
    let fault = Fault::new(Behaviour::Delay(HOUR)).opcode(AdminOpcode::IDENTIFY);
    let mut host = host_with_fault(fault);
    let buffer = host.allocate(4096);
    let cid = host.submit(0, admin::identify_controller().with_data(prp(buffer)));
    assert_eq!(host.admin_ok(admin::abort(0, cid)), 0);
    assert!(host.wait(0, cid).status().is(Status::ABORT_REQUESTED));
}

#[test]
fn aborts_that_wait_count_against_the_limit() {
    let mut config = config(512);
    config.abort_limit = 2;
    let fault = Fault::new(Behaviour::Delay(HOUR)).opcode(AdminOpcode::ABORT);
    config.faults.push(fault.times(2));
    let mut host = Host::ready(config);
    let waiting = [(); 2].map(|()| host.submit(0, admin::abort(1, 9)));
    host.admin_refused(admin::abort(1, 9), Status::ABORT_LIMIT_EXCEEDED);
    host.controller.reset().unwrap();
    host.enable();
    host.create_pair(1, 16, None);
    assert_eq!(host.admin_ok(admin::abort(1, waiting[0])), NOT_ABORTED);
}

#[test]
fn a_swallowed_command_is_outstanding_and_can_be_released() {
    let mut host = host_with(Behaviour::Swallow { execute: false });
    let cid = submit_write(&mut host, 4, 1, 1);
    nothing_but_a_flush_completes(&mut host);
    assert_eq!(read(&mut host, 4, 1), [0; 512]);
    assert_eq!(host.admin_ok(admin::abort(1, cid)), NOT_ABORTED);
    host.place_as(1, nvm::flush(1).with_cid(cid));
    host.ring(1);
    assert!(host.wait(1, cid).status().is(Status::COMMAND_ID_CONFLICT));
    host.controller.release_stuck();
    assert!(host.wait(1, cid).status().is_success());
    assert_eq!(read(&mut host, 4, 1), pattern(1, 512));
    assert_eq!(hits(&host, FaultKind::Swallow), 1);
}

#[test]
fn a_swallowed_command_may_have_done_its_work() {
    let mut host = host_with(Behaviour::Swallow { execute: true });
    let cid = submit_write(&mut host, 4, 1, 1);
    nothing_but_a_flush_completes(&mut host);
    assert_eq!(read(&mut host, 4, 1), pattern(1, 512));
    // Its release does not do it again.
    assert!(write(&mut host, 4, 2).status().is_success());
    host.controller.release_stuck();
    assert!(host.wait(1, cid).status().is_success());
    assert_eq!(read(&mut host, 4, 1), pattern(2, 512));
}

#[test]
fn a_held_command_waits_for_its_abort() {
    let mut host = host_with(Behaviour::Hold);
    let cid = host.submit(1, nvm::flush(1));
    nothing_but_a_flush_completes(&mut host);
    assert_eq!(host.admin_ok(admin::abort(1, cid)), 0);
    let status = host.wait(1, cid).status();
    assert!(status.is(Status::ABORT_REQUESTED) && !status.dnr());
    host.controller.release_stuck();
    assert_eq!(host.look(1), None);
}

#[test]
fn deleting_a_queue_ends_what_waits_there() {
    let mut host = Host::ready(config(512));
    for then in [
        Behaviour::Swallow { execute: false },
        Behaviour::Hold,
        Behaviour::OutOfOrder(9),
        Behaviour::Delay(HOUR),
        Behaviour::CompleteTwice(HOUR),
    ] {
        let fault = Fault::new(then).queue(FaultQueue::Id(1));
        host.controller.inject(fault).unwrap();
    }
    let cids: Vec<_> = (0..5).map(|_| host.submit(1, nvm::flush(1))).collect();
    assert_eq!(host.reap(1).cid(), cids[4]);
    host.admin_ok(admin::delete_submission_queue(1));
    let mut ended = Vec::new();
    while let Some(entry) = host.look(1) {
        let status = entry.status();
        assert!(status.is(Status::ABORTED_SQ_DELETION), "{status}");
        ended.push(entry.cid());
    }
    ended.sort();
    assert_eq!(ended, cids[1..4]);
    host.admin_ok(admin::delete_completion_queue(1));
    host.create_pair(1, 16, None);
    host.controller.release_stuck();
    host.io_ok(nvm::flush(1));
    assert_eq!(host.look(1), None);
}

#[test]
fn a_disabled_controller_forgets_what_waits() {
    let mut host = Host::ready(config(512));
    for then in [
        Behaviour::Swallow { execute: false },
        Behaviour::Hold,
        Behaviour::CompleteTwice(HOUR),
        Behaviour::Status(FaultStatus::after_execution(Status::INTERNAL_ERROR)),
    ] {
        let fault = Fault::new(then).queue(FaultQueue::Io);
        host.controller.inject(fault).unwrap();
    }
    for _ in 0..3 {
        host.submit(1, nvm::flush(1));
    }
    host.reap(1);
    host.disable();
    let accesses = host.memory.accesses();
    host.controller.release();
    assert_eq!(host.memory.accesses(), accesses);
    host.enable();
    host.create_pair(1, 16, None);
    host.controller.release_stuck();
    host.controller.release();
    assert_eq!(host.look(1), None);
    // The fault that has not struck yet is still there.
    host.io_refused(nvm::flush(1), Status::INTERNAL_ERROR);
    host.io_ok(nvm::flush(1));
}

#[test]
fn what_was_to_happen_to_a_command_ends_with_it() {
    let status = FaultStatus::after_execution(Status::INTERNAL_ERROR);
    let fault = Fault::new(Behaviour::Status(status));
    let mut config = config(512);
    config.latency = HOUR;
    config.faults.push(fault.clone().queue(FaultQueue::Io));
    let mut host = Host::ready(config);
    let cid = host.submit(1, nvm::flush(1));
    wait_for(|| (hits(&host, FaultKind::Status) == 1).then_some(()));
    assert_eq!(host.admin_ok(admin::abort(1, cid)), 0);
    assert!(host.wait(1, cid).status().is(Status::ABORT_REQUESTED));

    // A request that waits for an event, with the identifier of the first command after a reset.
    host.disable();
    host.enable();
    let fault = fault.opcode(AdminOpcode::ASYNC_EVENT_REQUEST);
    host.controller.inject(fault).unwrap();
    assert_eq!(host.submit(0, admin::async_event_request()), 0);
    wait_for(|| (hits(&host, FaultKind::Status) == 2).then_some(()));
    host.disable();
    host.enable();
    host.create_pair(1, 16, None);
}

#[test]
fn a_command_is_served_after_later_ones() {
    let mut host = host_with(Behaviour::OutOfOrder(2));
    let first = host.submit(1, nvm::flush(1));
    let second = host.submit(1, nvm::flush(1));
    assert_eq!(host.reap(1).cid(), second);
    nothing_but_a_flush_completes_before(&mut host, first);
    assert_eq!(hits(&host, FaultKind::OutOfOrder), 1);
}

fn nothing_but_a_flush_completes_before(host: &mut Host, last: u16) {
    assert_eq!(host.look(1), None);
    let cid = host.submit(1, nvm::flush(1));
    assert_eq!([host.reap(1).cid(), host.reap(1).cid()], [cid, last]);
}

#[test]
fn early_completions_come_before_the_data() {
    let mut host = host_with(Behaviour::CompleteEarly(HOUR));
    assert!(write(&mut host, 3, 1).status().is_success());
    assert_eq!(read(&mut host, 3, 1), [0; 512]);

    let mut host = host_with_fault(
        Fault::new(Behaviour::CompleteEarly(Duration::from_millis(5))).opcode(NvmOpcode::READ),
    );
    assert!(write(&mut host, 3, 1).status().is_success());
    let buffer = host.allocate(512);
    host.io_ok(nvm::read(1, 3, 1, false).with_data(prp(buffer)));
    wait_for(|| (host.memory.get(buffer, 512) == pattern(1, 512)).then_some(()));
    // It completed once.
    nothing_but_a_flush_completes(&mut host);
}

#[test]
fn a_status_comes_before_or_after_the_work() {
    let retry = Status::NAMESPACE_NOT_READY.with_crd(2).with_more(true);
    for (status, is_written) in [
        (FaultStatus::new(retry), false),
        (FaultStatus::after_execution(retry), true),
    ] {
        let mut host = host_with(Behaviour::Status(status));
        assert_eq!(write(&mut host, 0, 1).status(), retry);
        let expected = if is_written {
            pattern(1, 512)
        } else {
            vec![0; 512]
        };
        assert_eq!(read(&mut host, 0, 1), expected);
        assert_eq!(host.controller.counters().failed_commands, 1);
        assert_eq!(hits(&host, FaultKind::Status), 1);
    }
    // A lost write: it says that it succeeded.
    let mut host = host_with(Behaviour::Status(FaultStatus::new(Status::SUCCESS)));
    assert!(write(&mut host, 0, 1).status().is_success());
    assert_eq!(read(&mut host, 0, 1), [0; 512]);
}

#[test]
fn data_for_the_host_is_corrupted() {
    let corrupt = |offset, byte| Behaviour::CorruptData {
        offset,
        bytes: vec![byte; 4],
    };
    let fault = Fault::new(corrupt(4094, 0xee)).opcode(AdminOpcode::IDENTIFY);
    let mut host = host_with_fault(fault);
    let data = host.admin_data(admin::identify_controller(), 4096);
    assert_eq!(data[4090..], [0, 0, 0, 0, 0xee, 0xee]);
    let fault = Fault::new(corrupt(510, 0xdd)).opcode(NvmOpcode::READ);
    host.controller.inject(fault).unwrap();
    let mut expected = vec![0; 1024];
    expected[510..514].fill(0xdd);
    assert_eq!(read(&mut host, 0, 2), expected);
    assert_eq!(read(&mut host, 0, 2), [0; 1024]);
    assert_eq!(hits(&host, FaultKind::CorruptData), 2);
}

#[test]
fn data_for_the_host_is_cut() {
    let fault = Fault::new(Behaviour::TruncateData(100)).opcode(AdminOpcode::GET_LOG_PAGE);
    let mut host = host_with_fault(fault);
    let log = admin::get_log_page(
        nvme_spec::log::id::SMART_HEALTH,
        admin::ALL_NAMESPACES,
        512,
        0,
        true,
    );
    let data = host.admin_data(log, 512);
    assert!(data[..100].iter().any(|byte| *byte != 0xa5));
    assert_eq!(data[100..], [0xa5; 412]);

    // Beyond the log page there are zeros, which are sent on their own.
    let at = |offset| Behaviour::CorruptData {
        offset,
        bytes: vec![0xee],
    };
    for then in [at(600), Behaviour::TruncateData(600)] {
        let fault = Fault::new(then).opcode(AdminOpcode::GET_LOG_PAGE);
        host.controller.inject(fault).unwrap();
    }
    let log = admin::get_log_page(nvme_spec::log::id::FIRMWARE_SLOT, 0, 1024, 0, true);
    let data = host.admin_data(log, 1024);
    assert_eq!(data[598..602], [0, 0, 0xee, 0]);
    let data = host.admin_data(log, 1024);
    assert_eq!(data[598..602], [0, 0, 0xa5, 0xa5]);

    // Over several pages that do not touch.
    let fault = Fault::new(Behaviour::TruncateData(5000)).opcode(NvmOpcode::READ);
    host.controller.inject(fault).unwrap();
    let first = host.allocate(4096);
    host.allocate(4096);
    let second = host.allocate(4096);
    host.memory.set(first, &[0xa5; 3 * 4096]);
    let data = nvme_spec::DataPointer::Prp {
        prp1: first,
        prp2: second,
    };
    host.io_ok(nvm::read(1, 0, 16, false).with_data(data));
    assert_eq!(host.memory.get(first, 4096), [0; 4096]);
    assert_eq!(host.memory.get(second, 904), [0; 904]);
    assert_eq!(
        host.memory.get(second + 904, 4096 - 904),
        [0xa5; 4096 - 904]
    );
}

#[test]
fn of_a_torn_write_whole_blocks_are_written() {
    let status = FaultStatus::new(Status::WRITE_FAULT);
    for (blocks, then) in [
        (TornBlocks::First(3), TornEnd::Swallow),
        (TornBlocks::First(3), TornEnd::Status(status)),
        (TornBlocks::Random(1), TornEnd::PowerLoss(Loss::Nothing)),
        (TornBlocks::Random(4), TornEnd::PowerLoss(Loss::All)),
    ] {
        let mut host = Host::ready(config(512));
        let cid = submit_write(&mut host, 8, 8, 1);
        assert!(host.wait(1, cid).status().is_success());
        let tear = Fault::new(Behaviour::Tear { blocks, then }).queue(FaultQueue::Io);
        host.controller.inject(tear).unwrap();
        let cid = submit_write(&mut host, 8, 8, 2);
        match then {
            TornEnd::Swallow => nothing_but_a_flush_completes(&mut host),
            TornEnd::Status(_) => assert!(host.wait(1, cid).status().is(Status::WRITE_FAULT)),
            TornEnd::PowerLoss(_) => {
                wait_for(|| (!host.status().rdy()).then_some(()));
                host.enable();
                host.create_pair(1, 64, None);
            }
        }
        assert_eq!(hits(&host, FaultKind::Tear), 1);
        let (old, new) = (pattern(1, 4096), pattern(2, 4096));
        let data = read(&mut host, 8, 8);
        let written: Vec<bool> = data
            .chunks(512)
            .zip(old.chunks(512).zip(new.chunks(512)))
            .map(|(block, (old, new))| {
                assert!(block == old || block == new, "mixed");
                block == new
            })
            .collect();
        match (blocks, then) {
            (TornBlocks::First(count), _) => {
                assert!(
                    written
                        .iter()
                        .enumerate()
                        .all(|(at, is)| *is == (at < count as usize))
                );
            }
            (_, TornEnd::PowerLoss(Loss::All)) => assert_eq!(written, [false; 8]),
            _ => assert!(
                written.contains(&true) && written.contains(&false),
                "{written:?}"
            ),
        }
        // Only that one write.
        let cid = submit_write(&mut host, 8, 8, 3);
        assert!(host.wait(1, cid).status().is_success());
        assert_eq!(read(&mut host, 8, 8), pattern(3, 4096));
    }
}

#[test]
fn zeroes_are_torn_too_and_what_is_refused_is_not() {
    let torn = Behaviour::Tear {
        blocks: TornBlocks::First(1),
        then: TornEnd::Status(FaultStatus::new(Status::WRITE_FAULT)),
    };
    let mut host = Host::ready(config(512));
    let cid = submit_write(&mut host, 0, 2, 1);
    assert!(host.wait(1, cid).status().is_success());
    let fault = Fault::new(torn).queue(FaultQueue::Io).times(3);
    host.controller.inject(fault).unwrap();
    host.io_refused(
        nvm::write_zeroes(1, 0, 2, false, false),
        Status::WRITE_FAULT,
    );
    let expected = [&[0; 512], &pattern(1, 1024)[512..]].concat();
    assert_eq!(read(&mut host, 0, 2), expected);
    host.io_refused(
        nvm::write_zeroes(1, 2047, 2, false, false),
        Status::LBA_OUT_OF_RANGE,
    );
    let missing = nvm::write_zeroes(7, 0, 1, false, false);
    host.io_refused(missing, Status::INVALID_NAMESPACE_OR_FORMAT);
}
