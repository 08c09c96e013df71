//! Completion queue entries that lie, and interrupts.

use std::time::Duration;

use nvme_soft::fault::{Behaviour, Change, CompletionField, Fault, FaultKind, FaultQueue};
use nvme_spec::opcode::AdminOpcode;
use nvme_spec::{Status, admin, nvm};

use super::{hits, host_with, host_with_fault, nothing_but_a_flush_completes};
use crate::host::{Host, config, wait_for};

#[test]
fn a_command_completes_twice() {
    for after in [Duration::ZERO, Duration::from_millis(3)] {
        let mut host = host_with(Behaviour::CompleteTwice(after));
        let cid = host.submit(1, nvm::flush(1));
        assert_eq!([host.reap(1).cid(), host.reap(1).cid()], [cid, cid]);
        // The identifier was free after the first one.
        nothing_but_a_flush_completes(&mut host);
        assert_eq!(hits(&host, FaultKind::CompleteTwice), 1);
    }
}

#[test]
fn the_second_completion_ends_no_other_command() {
    let mut host = host_with(Behaviour::CompleteTwice(Duration::from_millis(30)));
    let hold = Fault::new(Behaviour::Hold).queue(FaultQueue::Io).nth(2);
    host.controller.inject(hold).unwrap();
    let cid = host.submit(1, nvm::flush(1));
    assert_eq!(host.reap(1).cid(), cid);
    // Its identifier is used again before the second completion.
    let reused = nvm::flush(1).with_cid(cid);
    host.place_as(1, reused);
    host.ring(1);
    let second = host.reap(1);
    assert!(second.status().is_success() && second.cid() == cid);
    wait_for(|| (hits(&host, FaultKind::Hold) == 1).then_some(()));
    host.place_as(1, reused);
    host.ring(1);
    assert!(host.reap(1).status().is(Status::COMMAND_ID_CONFLICT));
    assert_eq!(host.admin_ok(admin::abort(1, cid)), 0);
    assert!(host.reap(1).status().is(Status::ABORT_REQUESTED));
}

#[test]
fn fields_of_the_completion_are_changed() {
    let mut host = host_with_fault(
        Fault::new(Behaviour::CorruptCompletion {
            field: CompletionField::Result,
            change: Change::Xor(0xffff_0000),
        })
        .opcode(AdminOpcode::ABORT),
    );
    assert_eq!(host.admin_ok(admin::abort(1, 7)), 0xffff_0001);

    let corrupted = |host: &mut Host, field, change| {
        let fault = Behaviour::CorruptCompletion { field, change };
        let fault = Fault::new(fault).queue(FaultQueue::Io);
        host.controller.inject(fault).unwrap();
        let cid = host.submit(1, nvm::flush(1));
        let entry = wait_for(|| host.look_unchecked(1));
        host.ring_head(1);
        assert!(entry.status().is_success());
        (cid, entry)
    };
    let (cid, entry) = corrupted(&mut host, CompletionField::Cid, Change::Xor(0x8001));
    assert_eq!(entry.cid(), cid ^ 0x8001);
    assert_eq!(entry.sq_id(), 1);
    let (cid, entry) = corrupted(&mut host, CompletionField::Cid, Change::Set(0x1_0002));
    assert_eq!((cid, entry.cid()), (1, 2));
    let (cid, entry) = corrupted(&mut host, CompletionField::SqId, Change::Set(0x1234));
    assert_eq!((entry.cid(), entry.sq_id()), (cid, 0x1234));
    let (cid, entry) = corrupted(&mut host, CompletionField::SqHead, Change::Xor(0xff00));
    assert_eq!((entry.cid(), entry.sq_head()), (cid, 0xff04));
    // The identifiers that were not reported are free all the same.
    host.place_as(1, nvm::flush(1).with_cid(0));
    host.ring(1);
    assert!(host.wait(1, 0).status().is_success());
    assert_eq!(hits(&host, FaultKind::CorruptCompletion), 5);
}

#[test]
fn an_entry_with_the_wrong_phase_hides_those_after_it() {
    let mut host = host_with(Behaviour::CorruptCompletion {
        field: CompletionField::Phase,
        change: Change::Xor(1),
    });
    let raised = host.vectors.raised(1);
    // One after the other, so that each has an interrupt of its own.
    let cids = [1, 2].map(|count| {
        let cid = host.submit(1, nvm::flush(1));
        wait_for(|| (host.vectors.raised(1) == raised + count).then_some(()));
        cid
    });
    assert_eq!(host.look(1), None);
    host.skip(1);
    assert_eq!(host.reap(1).cid(), cids[1]);
}

#[test]
fn a_phase_flips_back_and_forth() {
    let mut host = Host::ready(config(512));
    // Fetching a command and writing an entry, up to when the next command is served.
    let accesses_of_a_flush = |host: &mut Host| {
        let before = host.memory.accesses();
        host.io_ok(nvm::flush(1));
        host.controller.release();
        host.memory.accesses() - before
    };
    let usual = accesses_of_a_flush(&mut host);
    let fault = Fault::new(Behaviour::FlipPhase).queue(FaultQueue::Io);
    host.controller.inject(fault).unwrap();
    assert_eq!(accesses_of_a_flush(&mut host), usual + 2);
    assert_eq!(accesses_of_a_flush(&mut host), usual);
    assert_eq!(hits(&host, FaultKind::FlipPhase), 1);
}

#[test]
fn interrupts_are_lost() {
    let mut host = host_with(Behaviour::LoseInterrupt);
    let raised = host.vectors.raised(1);
    host.io_ok(nvm::flush(1));
    // Acted on between two commands, so the interrupt would have been raised by now.
    host.controller.release();
    assert_eq!(host.vectors.raised(1), raised);
    host.io_ok(nvm::flush(1));
    wait_for(|| (host.vectors.raised(1) == raised + 1).then_some(()));
    assert_eq!(hits(&host, FaultKind::LoseInterrupt), 1);
}

#[test]
fn interrupts_come_for_nothing() {
    let mut host = Host::ready(config(512));
    for then in [Behaviour::SpuriousInterrupt, Behaviour::Hold] {
        let fault = Fault::new(then).queue(FaultQueue::Io);
        host.controller.inject(fault).unwrap();
    }
    let raised = host.vectors.raised(1);
    host.io_ok(nvm::flush(1));
    host.controller.release();
    assert_eq!(host.vectors.raised(1), raised + 2);
    assert_eq!(hits(&host, FaultKind::SpuriousInterrupt), 1);
    // The other fault had its turn later.
    let cid = host.submit(1, nvm::flush(1));
    wait_for(|| (hits(&host, FaultKind::Hold) == 1).then_some(()));
    host.admin_ok(admin::abort(1, cid));
    assert!(host.wait(1, cid).status().is(Status::ABORT_REQUESTED));
}
