//! One slot, and many who wait for it: dropped in every order.

use futures::poll;
use nvme_async::{LocalNamespace, Namespace};
use tokio::task::LocalSet;

use crate::support::bounded::{bounded, comes_true, current_thread, multi_thread};
use crate::support::owners::Ledger;
use crate::support::rig::{Rig, Setup};
use crate::support::suite::target::{How, Target};

const WAITERS: usize = 5;

/// All orders of the first `count` numbers.
fn orders(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let shorter = orders(count - 1);
    let longer = shorter.into_iter().flat_map(|order| {
        (0..count).map(move |place| {
            let mut order = order.clone();
            order.insert(place, count - 1);
            order
        })
    });
    longer.collect()
}

async fn every_order(rig: &Rig, target: &impl Target) {
    let ledger = Ledger::default();
    let soft = rig.device.controller();
    let orders = orders(WAITERS);
    assert_eq!(orders.len(), 120);
    for order in orders {
        for dropped in 0..=WAITERS {
            soft.hold_io();
            let before = soft.counters().commands;
            let mut writes: Vec<_> = (0..WAITERS)
                .map(|index| {
                    let buffer = ledger.bytes(512, index as u8);
                    let write = target.send(index as u64 * 512, buffer, How::Plain);
                    Some(Box::pin(write))
                })
                .collect();
            for write in writes.iter_mut().flatten() {
                assert!(poll!(write).is_pending());
            }
            // The first one has the slot, and its memory is with the device.
            let mut alive = WAITERS;
            for &index in &order[..dropped] {
                writes[index] = None;
                alive -= usize::from(index != 0);
                assert_eq!(ledger.alive(), alive, "{order:?}, {dropped}");
            }
            soft.release();
            for write in writes.into_iter().flatten() {
                drop(write.await.expect("writes"));
            }
            target.quiesce().await.expect("quiesces");
            comes_true("all memory is back", || ledger.alive() == 0).await;
            let submitted = soft.counters().commands - before;
            assert_eq!(submitted, alive as u64, "{order:?}, {dropped}");
        }
    }
}

fn one_slot() -> Setup {
    Setup::memory(1 << 20).options(|options| options.queues(1).local_queues(1).queue_entries(2))
}

#[test]
fn namespace() {
    for new in [current_thread, multi_thread] {
        bounded(move || {
            new().block_on(async {
                let rig = one_slot().open().await;
                let namespace: Namespace = rig.namespace().await;
                every_order(&rig, &namespace).await;
                drop(namespace);
                rig.close().await;
            });
        });
    }
}

#[test]
fn local_namespace() {
    for new in [current_thread, multi_thread] {
        bounded(move || {
            LocalSet::new().block_on(&new(), async {
                let rig = one_slot().open().await;
                let namespace = rig.namespace().await;
                let local: LocalNamespace = namespace.local().expect("one is set apart");
                every_order(&rig, &local).await;
                drop((local, namespace));
                rig.close().await;
            });
        });
    }
}
