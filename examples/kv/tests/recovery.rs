//! What a crash leaves, and what recovery makes of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nvme_soft::fault::{Behaviour, Fault, FaultKind, Loss};
use nvme_spec::opcode::NvmOpcode;
use tokio::time::sleep;

use super::{Disk, busy, change, contents, delete, set, usage};
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
    let gone = (0..KEYS / 2).map(|number| delete(key(number)));
    change(&store, gone.collect()).await.expect("works");
    // The log goes on with number 8.
    disk.detach(Loss::Nothing);
    drop(store);
    let store = disk.open(busy()).await.expect("opens");
    assert_eq!(usage(&store).keys, KEYS / 2);
}

#[tokio::test]
async fn expired_keys_whose_segments_were_freed_are_no_damage() {
    static CLOCK: AtomicU64 = AtomicU64::new(0);
    let options = Options {
        clock: || CLOCK.load(Ordering::Relaxed),
        ..busy()
    };
    let quiet = Options {
        checkpoint_bytes: u64::MAX,
        ..options.clone()
    };
    // The second time the clock is set back, to when those keys had not expired.
    for at_recovery in [3000, 1000] {
        CLOCK.store(1000, Ordering::Relaxed);
        let disk = Disk::new(4 * MIB);
        let store = disk.open(options.clone()).await.expect("formats");
        for number in 0..100 {
            let key = format!("brief {number}").into();
            let brief = Change::set(&key, &vec![1; 8000].into(), 2000);
            change(&store, vec![brief]).await.expect("fits");
        }
        store.close().await.expect("closes");
        drop(store);
        // They are in the checkpoint, expire, and others come to be in their place.
        let store = disk.open(quiet.clone()).await.expect("opens");
        CLOCK.store(3000, Ordering::Relaxed);
        while usage(&store).keys > 0 || usage(&store).available < 24 {
            sleep(Duration::from_millis(10)).await;
        }
        for number in 0..60 {
            let value = vec![number; 8000];
            change(&store, vec![set(format!("{number}"), value)])
                .await
                .expect("fits");
        }
        disk.detach(Loss::Nothing);
        drop(store);
        CLOCK.store(at_recovery, Ordering::Relaxed);
        let store = disk.open(options.clone()).await.expect("opens");
        let mut found = contents(&store).await;
        found.retain(|key, _| !key.starts_with(b"brief"));
        assert_eq!(found.len(), 60);
        // No segment is kept back.
        CLOCK.store(3000, Ordering::Relaxed);
        while usage(&store).keys > 60 || usage(&store).available < 20 {
            sleep(Duration::from_millis(10)).await;
        }
    }
}
