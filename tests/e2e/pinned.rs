//! Handles that keep to one queue pair.

use std::collections::BTreeMap;
use std::slice;

use nvme_async::{Error, Namespace};
use nvme_soft::fault::{Behaviour, Fault, FaultQueue, FaultStatus};
use nvme_spec::Status;

use crate::support::bounded::{on_both_flavours, on_multi_thread};
use crate::support::rig::{Rig, Setup};
use crate::support::suite;

const QUEUES: u16 = 3;

/// A status code type of which the specification says nothing.
const VENDOR: u8 = 7;

/// A controller that refuses every I/O command, with the identifier of the queue as the status.
async fn refusing() -> Rig {
    let rig = Setup::memory(1 << 20)
        .options(|options| options.queues(QUEUES).local_queues(1).queue_entries(65))
        .open()
        .await;
    for queue in 1..=QUEUES + 1 {
        let status = Status::new(VENDOR, queue as u8).with_dnr(true);
        let fault = Fault::new(Behaviour::Status(FaultStatus::new(status)));
        let fault = fault.queue(FaultQueue::Id(queue)).times(0);
        rig.device.controller().inject(fault).expect("makes sense");
    }
    rig
}

/// The identifier of the queue that a command was sent to.
fn queue_of<T>(result: Result<T, Error>) -> u8 {
    match result {
        Err(Error::Command(failed)) if failed.status.code_type_bits() == VENDOR => {
            failed.status.code()
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was not refused"),
    }
}

/// The queue of a handle, which all of its commands go to wherever they are polled.
async fn queue(namespace: &Namespace) -> u8 {
    let queue = queue_of(namespace.read(0, 512).await);
    for _ in 0..8 {
        let clone = namespace.clone();
        let elsewhere = tokio::spawn(async move { queue_of(clone.read(512, 512).await) });
        assert_eq!(elsewhere.await.expect("does not panic"), queue);
    }
    let written = namespace.write(0, vec![0; 512]).await;
    assert_eq!(queue_of(written.map_err(Error::from)), queue);
    assert_eq!(queue_of(namespace.flush().await), queue);
    assert_eq!(
        queue_of(namespace.discard(slice::from_ref(&(0..512))).await),
        queue
    );
    queue
}

#[test]
fn each_has_the_queue_pair_that_fewest_have() {
    on_both_flavours(async || {
        let rig = refusing().await;
        let namespace = rig.namespace().await;
        let mut handles: Vec<Namespace> = (0..QUEUES).map(|_| namespace.pinned()).collect();
        let mut sharers = BTreeMap::new();
        for handle in &handles {
            *sharers.entry(queue(handle).await).or_insert(0) += 1;
            assert_eq!(handle.fair_depth(), 64);
        }
        assert_eq!(
            sharers.into_values().collect::<Vec<_>>(),
            [1; QUEUES as usize]
        );

        // There is none for these alone.
        handles.extend((0..2 * QUEUES).map(|_| namespace.pinned()));
        let mut sharers = BTreeMap::new();
        for handle in &handles {
            *sharers.entry(queue(handle).await).or_insert(0) += 1;
            assert_eq!(handle.fair_depth(), 64 / 3);
        }
        assert_eq!(
            sharers.into_values().collect::<Vec<_>>(),
            [3; QUEUES as usize]
        );

        // A clone has what it is a clone of.
        let (last, clone) = (queue(&handles[0]).await, handles[0].clone());
        drop(handles);
        assert_eq!(queue(&clone).await, last);
        assert_eq!(clone.fair_depth(), 64);
        let others = [namespace.pinned(), namespace.pinned()];
        for other in &others {
            assert_ne!(queue(other).await, last);
        }
        drop(clone);
        let next = namespace.pinned();
        assert_eq!(queue(&next).await, last);
        drop((namespace, next, others));
        rig.close().await;
    });
}

/// More handles than commands that can be outstanding.
#[test]
fn every_one_has_room() {
    on_multi_thread(async || {
        let rig = Setup::memory(1 << 20)
            .options(|options| options.queues(1).queue_entries(4))
            .open()
            .await;
        let namespace = rig.namespace().await;
        let handles: Vec<Namespace> = (0..8).map(|_| namespace.pinned()).collect();
        for handle in &handles {
            assert_eq!(handle.fair_depth(), 1);
            assert_eq!(handle.read(0, 4096).await.expect("reads").len(), 4096);
        }
        drop((namespace, handles));
        rig.close().await;
    });
}

#[test]
fn the_suite() {
    on_both_flavours(async || {
        let rig = Setup::memory(suite::AREA).open().await;
        suite::all(&rig.namespace().await.pinned(), false).await;
        rig.close().await;
    });
}
