//! What a crash leaves, and what recovery makes of it.

use std::time::Duration;

use nvme_soft::fault::{Behaviour, Fault, FaultKind, Loss};
use nvme_spec::opcode::NvmOpcode;
use tokio::time::sleep;

use super::{Disk, busy, change, set};
use crate::store::{Change, Options, Store};

const MIB: usize = 1 << 20;

#[tokio::test]
async fn batches_of_a_checkpoint_are_none_of_the_log() {
    const KEYS: usize = 60_000;
    let key = |number: usize| format!("{number:08}");
    let disk = Disk::new(64 * MIB);
    let (device, namespace) = disk.attach(|_| {}).await;
    let options = Options {
        checkpoint_bytes: 0,
        ..Options::default()
    };
    let store = Store::open(namespace, options).await.expect("formats");
    // A checkpoint does not come to its end: its root is not written.
    let stuck = Fault::new(Behaviour::Hold).opcode(NvmOpcode::WRITE);
    let stuck = stuck.blocks(0..16).times(0);
    device.controller().inject(stuck).expect("makes sense");
    // It is due once the log is four times as large. Its second segment starts with its ninth batch,
    // whose number is 8.
    for _ in 0..6 {
        let all = (0..KEYS).map(|number| set(key(number), "")).collect();
        change(&store, all).await.expect("fits");
    }
    while device.controller().faults_hit(FaultKind::Hold) == 0 {
        sleep(Duration::from_millis(10)).await;
    }
    let gone = (0..KEYS / 2).map(|number| Change::Delete {
        key: key(number).into(),
    });
    change(&store, gone.collect()).await.expect("works");
    // The log goes on with number 8.
    disk.detach(Loss::Nothing);
    drop(store);
    let store = disk.open(busy()).await.expect("opens");
    assert_eq!(store.usage().keys, KEYS / 2);
}
