//! Each behaviour of a fault, as the host sees it.

mod commands;
mod completions;
mod controllers;

use nvme_soft::fault::{Behaviour, Fault, FaultKind, FaultQueue};
use nvme_spec::{Cqe, nvm};

use crate::host::{Host, config, pattern, prp};

const HOUR: std::time::Duration = std::time::Duration::from_secs(3600);

/// A host whose controller has a fault for its first I/O commands.
fn host_with(then: Behaviour) -> Host {
    host_with_fault(Fault::new(then).queue(FaultQueue::Io))
}

fn host_with_fault(fault: Fault) -> Host {
    let mut config = config(512);
    config.faults.push(fault);
    Host::ready(config)
}

fn hits(host: &Host, kind: FaultKind) -> u64 {
    host.controller.faults_hit(kind)
}

/// Nothing has completed, and a command that is not struck passes those that are.
fn nothing_but_a_flush_completes(host: &mut Host) {
    let cid = host.submit(1, nvm::flush(1));
    assert_eq!(host.reap(1).cid(), cid);
    assert_eq!(host.look(1), None);
}

/// Writes one block; returns its completion.
fn write(host: &mut Host, slba: u64, seed: u64) -> Cqe {
    let cid = submit_write(host, slba, 1, seed);
    host.wait(1, cid)
}

fn submit_write(host: &mut Host, slba: u64, blocks: u32, seed: u64) -> u16 {
    let buffer = host.allocate(u64::from(blocks) * 512);
    host.memory
        .set(buffer, &pattern(seed, blocks as usize * 512));
    let command = nvm::write(1, slba, blocks, false).with_data(prp(buffer));
    host.submit(1, command)
}

/// Reads blocks with a command that must succeed.
fn read(host: &mut Host, slba: u64, blocks: u32) -> Vec<u8> {
    let buffer = host.allocate(u64::from(blocks) * 512);
    host.io_ok(nvm::read(1, slba, blocks, false).with_data(prp(buffer)));
    host.memory.get(buffer, blocks as usize * 512)
}
