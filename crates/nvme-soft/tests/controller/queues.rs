//! I/O queues: creation, deletion, flow control, Abort.

use std::time::Duration;

use nvme_spec::admin::{self, QueuePriority};
use nvme_spec::registers::{DoorbellKind, offset};
use nvme_spec::{Sqe, Status, nvm};

use crate::host::{Host, config, prp, usual_configuration, wait_for};

#[test]
fn bad_completion_queues_are_refused() {
    let mut config = config(512);
    config.io_queue_pairs = 4;
    config.max_queue_entries = 64;
    let mut host = Host::enabled(config);
    let memory = host.allocate(4096);
    let create = |id, entries, vector| admin::create_completion_queue(id, entries, memory, vector);
    host.admin_refused(create(0, 16, None), Status::INVALID_QUEUE_ID);
    host.admin_refused(create(5, 16, None), Status::INVALID_QUEUE_ID);
    host.admin_refused(create(1, 65, None), Status::INVALID_QUEUE_SIZE);
    // A size of 0 means one entry.
    let one = create(1, 16, None).with_cdw10(1);
    host.admin_refused(one, Status::INVALID_QUEUE_SIZE);
    host.admin_refused(create(1, 16, Some(8)), Status::INVALID_INTERRUPT_VECTOR);
    host.admin_refused(create(1, 16, None).with_cdw11(0), Status::INVALID_FIELD);
    let misaligned = create(1, 16, None).with_data(prp(memory + 64));
    host.admin_refused(misaligned, Status::PRP_OFFSET_INVALID);
    host.admin_ok(create(1, 64, Some(7)));
    host.admin_refused(create(1, 16, None), Status::INVALID_QUEUE_ID);
}

#[test]
fn bad_submission_queues_are_refused() {
    let mut config = config(512);
    config.io_queue_pairs = 4;
    config.max_queue_entries = 64;
    let mut host = Host::enabled(config);
    let memory = host.allocate(4096);
    let create = |id, entries, completion| {
        admin::create_submission_queue(id, entries, memory, completion, QueuePriority::High)
    };
    host.admin_refused(create(1, 16, 1), Status::COMPLETION_QUEUE_INVALID);
    host.admin_ok(admin::create_completion_queue(1, 16, memory, None));
    host.admin_refused(create(0, 16, 1), Status::INVALID_QUEUE_ID);
    host.admin_refused(create(5, 16, 1), Status::INVALID_QUEUE_ID);
    host.admin_refused(create(1, 16, 0), Status::INVALID_QUEUE_ID);
    host.admin_refused(create(1, 16, 5), Status::INVALID_QUEUE_ID);
    host.admin_refused(create(1, 65, 1), Status::INVALID_QUEUE_SIZE);
    host.admin_refused(create(1, 16, 1).with_cdw10(1), Status::INVALID_QUEUE_SIZE);
    host.admin_refused(create(1, 16, 1).with_cdw11(1 << 16), Status::INVALID_FIELD);
    let misaligned = create(1, 16, 1).with_data(prp(memory + 4));
    host.admin_refused(misaligned, Status::PRP_OFFSET_INVALID);
    host.admin_ok(create(1, 16, 1));
    host.admin_refused(create(1, 16, 1), Status::INVALID_QUEUE_ID);
    host.admin_ok(create(2, 16, 1));
}

#[test]
fn entry_sizes_are_needed_before_io_queues() {
    let mut host = Host::new(config(512));
    host.enable_with(usual_configuration().with_iosqes(0).with_iocqes(0));
    wait_for(|| host.status().rdy().then_some(()));
    let memory = host.allocate(4096);
    let create = admin::create_completion_queue(1, 16, memory, None);
    host.admin_refused(create, Status::INVALID_QUEUE_SIZE);
    // They may be set while the controller is enabled.
    host.write_configuration(usual_configuration());
    host.admin_ok(create);
}

#[test]
fn deletion_follows_the_order() {
    let mut host = Host::ready(config(512));
    let delete_completion = admin::delete_completion_queue;
    let delete_submission = admin::delete_submission_queue;
    host.admin_refused(delete_completion(1), Status::INVALID_QUEUE_DELETION);
    for id in [0, 2, 65, 0xffff] {
        host.admin_refused(delete_completion(id), Status::INVALID_QUEUE_ID);
        host.admin_refused(delete_submission(id), Status::INVALID_QUEUE_ID);
    }
    host.admin_ok(delete_submission(1));
    host.admin_refused(delete_submission(1), Status::INVALID_QUEUE_ID);
    host.admin_ok(delete_completion(1));
    host.admin_refused(delete_completion(1), Status::INVALID_QUEUE_ID);
    host.create_pair(1, 8, None);
    host.io_ok(nvm::flush(1));
}

#[test]
fn the_numbers_granted_bound_the_identifiers() {
    let mut host = Host::enabled(config(512));
    let two = nvme_spec::feature::NumberOfQueues::pairs(2).into_bits();
    host.admin_ok(admin::set_features(
        nvme_spec::feature::id::NUMBER_OF_QUEUES,
        two,
        false,
    ));
    let memory = host.allocate(4096);
    let create = |id| admin::create_completion_queue(id, 16, memory, None);
    host.admin_ok(create(2));
    host.admin_refused(create(3), Status::INVALID_QUEUE_ID);
}

#[test]
fn a_full_completion_queue_is_not_overrun() {
    let mut host = Host::enabled(config(512));
    // Two submission queues with room for more than the completion queue has.
    host.create_pair(1, 8, Some(1));
    let commands = 5;
    let mut cids = Vec::new();
    for _ in 0..commands {
        cids.push(host.submit(1, nvm::flush(1)));
    }
    for _ in 0..commands {
        wait_for(|| host.look(1));
    }
    // The head is not rung: room for two more entries is left.
    for _ in 0..7 {
        cids.push(host.place(1, nvm::flush(1)));
    }
    host.ring(1);
    for _ in 0..2 {
        wait_for(|| host.look(1));
    }
    host.controller.set_bus_master(true);
    assert!(host.look(1).is_none());
    let fetched = host.controller.counters().commands;
    assert!(fetched <= 12);
    host.ring_head(1);
    for _ in 0..5 {
        wait_for(|| host.look(1));
    }
    host.ring_head(1);
    assert!(host.look(1).is_none());
    assert_eq!(host.controller.counters().commands, 12);
    assert_eq!(host.controller.counters().invalid_doorbells, 0);
    host.io_ok(nvm::flush(1));
}

#[test]
fn many_laps_around_the_rings_with_many_queues() {
    let mut host = Host::enabled(config(512));
    for id in 1..=4 {
        host.create_pair(id, 2 + u32::from(id), Some(id));
    }
    for round in 0..200_u32 {
        for id in 1..=4_u16 {
            let count = 1 + (round % u32::from(id)) as u16;
            let cids: Vec<_> = (0..count).map(|_| host.place(id, nvm::flush(1))).collect();
            host.ring(id);
            for cid in cids {
                let entry = host.wait(id, cid);
                assert!(entry.status().is_success());
            }
        }
    }
    for id in 1..=4 {
        assert!(host.vectors.raised(id) > 0);
    }
    let counters = host.controller.counters();
    assert_eq!(counters.redundant_completion_heads, 0);
    assert_eq!(counters.refused_accesses, 0);
}

#[test]
fn submission_queues_can_share_a_completion_queue() {
    let mut host = Host::enabled(config(512));
    host.create_pair(1, 16, None);
    let memory = host.allocate(4096);
    let command = admin::create_submission_queue(2, 16, memory, 1, QueuePriority::Low);
    host.admin_ok(command);
    let bytes = nvm::flush(1).with_cid(77).dwords();
    for (index, dword) in bytes.into_iter().enumerate() {
        host.memory
            .set(memory + index as u64 * 4, &dword.to_le_bytes());
    }
    host.ring_raw(2, DoorbellKind::SubmissionTail, 1);
    let acq = host.controller.read64(offset::ACQ);
    assert_ne!(acq, 0);
    let entry = wait_for(|| host.look_from(1, 2));
    assert_eq!((entry.cid(), entry.sq_id(), entry.sq_head()), (77, 2, 1));
}

#[test]
fn heads_in_completions_follow_the_queue() {
    let mut host = Host::enabled(config(512));
    host.create_pair(1, 4, None);
    for expected in [1, 2, 3, 0, 1] {
        let cid = host.submit(1, nvm::flush(1));
        assert_eq!(host.wait(1, cid).sq_head(), expected);
    }
}

#[test]
fn queues_without_interrupts_raise_none() {
    let mut host = Host::enabled(config(512));
    host.create_pair(1, 16, None);
    let before = host.controller.counters().interrupts;
    for _ in 0..10 {
        host.io_ok(nvm::flush(1));
    }
    host.controller.set_bus_master(true);
    assert_eq!(host.controller.counters().interrupts, before);
}

#[test]
fn an_identifier_in_use_is_a_conflict() {
    let mut config = config(512);
    config.latency = Duration::from_millis(20);
    let mut host = Host::ready(config);
    host.place_as(1, nvm::flush(1).with_cid(9));
    host.place_as(1, nvm::flush(1).with_cid(9));
    host.ring(1);
    let first = host.reap(1);
    assert!(first.status().is(Status::COMMAND_ID_CONFLICT), "{first:?}");
    let second = host.reap(1);
    assert!(second.status().is_success());
    assert_eq!(second.cid(), 9);
}

/// A host with commands that complete only when they are aborted.
fn stalled() -> Host {
    let mut config = config(512);
    config.latency = Duration::from_secs(3600);
    config.abort_limit = 3;
    Host::ready(config)
}

#[test]
fn abort_ends_a_command_early() {
    let mut host = stalled();
    let cids: Vec<_> = (0..3).map(|_| host.submit(1, nvm::flush(1))).collect();
    wait_for(|| (host.controller.counters().commands == 3).then_some(()));
    assert_eq!(host.admin_ok(admin::abort(1, cids[1])), 0);
    let entry = host.reap(1);
    assert_eq!(entry.cid(), cids[1]);
    assert!(entry.status().is(Status::ABORT_REQUESTED));
    assert!(!entry.status().dnr());
    // Once more there is nothing to abort.
    assert_eq!(host.admin_ok(admin::abort(1, cids[1])), 1);
    host.admin_refused(admin::abort(2, 0), Status::INVALID_FIELD);
}

#[test]
fn more_aborts_than_the_limit_are_refused() {
    let mut host = stalled();
    host.controller.hold();
    let cids: Vec<_> = (0..5)
        .map(|cid| host.place(0, admin::abort(1, cid)))
        .collect();
    host.ring(0);
    host.controller.release();
    let statuses: Vec<_> = cids.iter().map(|&cid| host.wait(0, cid).status()).collect();
    assert!(statuses[..3].iter().all(|status| status.is_success()));
    assert!(
        statuses[3..]
            .iter()
            .all(|status| status.is(Status::ABORT_LIMIT_EXCEEDED))
    );
}

#[test]
fn deleting_a_queue_aborts_its_commands() {
    let mut host = stalled();
    let cid = host.submit(1, nvm::flush(1));
    wait_for(|| (host.controller.counters().commands == 1).then_some(()));
    host.admin_ok(admin::delete_submission_queue(1));
    let entry = host.reap(1);
    assert_eq!(entry.cid(), cid);
    assert!(entry.status().is(Status::ABORTED_SQ_DELETION));
    host.admin_ok(admin::delete_completion_queue(1));
}

#[test]
fn a_latency_is_waited_for() {
    let mut config = config(512);
    config.latency = Duration::from_millis(5);
    let mut host = Host::ready(config);
    let start = std::time::Instant::now();
    let cids: Vec<_> = (0..16).map(|_| host.submit(1, nvm::flush(1))).collect();
    for cid in cids {
        assert!(host.wait(1, cid).status().is_success());
    }
    // Only the lower bound is certain.
    assert!(start.elapsed() >= Duration::from_millis(5));
}

#[test]
fn commands_that_follow_each_other_wrap_in_one_fetch() {
    let mut host = Host::enabled(config(512));
    host.create_pair(1, 8, None);
    for count in [5, 7, 6, 7, 7] {
        let cids: Vec<_> = (0..count).map(|_| host.place(1, Sqe::new(0x7f))).collect();
        host.ring(1);
        for cid in cids {
            assert!(host.wait(1, cid).status().is(Status::INVALID_OPCODE));
        }
    }
}
