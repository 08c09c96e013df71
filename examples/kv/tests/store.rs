//! What the store promises besides.

use std::time::Duration;

use bytes::Bytes;
use nvme_soft::fault::{Behaviour, Fault, FaultStatus, Loss};
use nvme_spec::Status;
use nvme_spec::opcode::NvmOpcode;
use tokio::time::{sleep, timeout};

use super::{Disk, busy, change, contents, delete, get, set, usage};
use crate::store::{Change, Durability, Error, Options, Store, now};

const MIB: usize = 1 << 20;

#[tokio::test]
async fn it_is_found_again() {
    let disk = Disk::new(4 * MIB);
    let store = disk.open(busy()).await.expect("formats");
    change(&store, vec![set("a", "1"), set("b", vec![2; 50_000])])
        .await
        .expect("fits");
    change(&store, vec![delete("a")]).await.expect("fits");
    store.close().await.expect("closes");
    assert!(matches!(store.get(&"a".into()), Err(Error::Closed)));
    drop(store);
    for _ in 0..2 {
        let store = disk.open(busy()).await.expect("opens");
        assert_eq!(get(&store, "a").await, None);
        assert_eq!(get(&store, "b").await, Some(vec![2; 50_000].into()));
        assert_eq!(contents(&store).await.len(), 1);
    }
}

#[tokio::test]
async fn another_thing_is_not_overwritten() {
    for at in [1024, 600_000, 4 * MIB - 5] {
        let disk = Disk::new(4 * MIB);
        disk.media().bytes[at] = 1;
        let refused = disk.open(Options::default()).await;
        assert!(matches!(refused.err(), Some(Error::Foreign)), "{at}");
        let format = Options {
            format: true,
            ..Options::default()
        };
        let store = disk.open(format).await.expect("formats");
        change(&store, vec![set("a", "1")]).await.expect("fits");
        drop(store);
        let store = disk.open(Options::default()).await.expect("opens");
        assert_eq!(get(&store, "a").await, Some("1".into()));
    }
    let tiny = Disk::new(MIB).open(Options::default()).await;
    assert!(matches!(tiny.err(), Some(Error::TooSmall(..))));
}

#[tokio::test]
async fn a_format_leaves_nothing() {
    let disk = Disk::new(4 * MIB);
    let store = disk.open(busy()).await.expect("formats");
    for i in 0..500 {
        change(&store, vec![set(format!("{i}"), vec![1; 5000])])
            .await
            .err();
    }
    drop(store);
    let format = Options {
        format: true,
        ..busy()
    };
    let store = disk.open(format).await.expect("formats");
    assert!(contents(&store).await.is_empty());
    change(&store, vec![set("a", "1")]).await.expect("fits");
    drop(store);
    let store = disk.open(busy()).await.expect("opens");
    assert_eq!(contents(&store).await.len(), 1);
}

#[tokio::test]
async fn when_full_it_says_so_and_reads_and_deletes() {
    // The larger ones go into a segment alone, and leave almost a half of it.
    for (len, least) in [(3000, 300), (70_000, 8)] {
        let disk = Disk::new(4 * MIB);
        let store = disk.open(busy()).await.expect("formats");
        let mut keys = 0;
        let full = loop {
            let value = vec![keys as u8; len];
            match change(&store, vec![set(format!("{keys}"), value)]).await {
                Ok(()) => keys += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(full, Error::Full { .. }), "{full}");
        assert!(keys > least, "{keys}");
        // What is there can be overwritten, also many times; and all is to be read.
        for shorter in 1..4 {
            for i in 0..keys {
                let value = vec![i as u8; len - shorter];
                change(&store, vec![set(format!("{i}"), value)])
                    .await
                    .expect("fits");
            }
        }
        for i in 0..keys {
            let value = get(&store, format!("{i}")).await;
            assert_eq!(value, Some(vec![i as u8; len - 3].into()));
        }
        for i in 0..keys {
            change(&store, vec![delete(format!("{i}"))])
                .await
                .expect("works");
        }
        change(&store, vec![set("a", vec![1; 100_000])])
            .await
            .expect("fits again");
        assert!(store.state().statistics.compacted > 0);
        drop(store);
        let store = disk.open(busy()).await.expect("opens");
        assert_eq!(contents(&store).await.len(), 1);
    }
}

#[tokio::test]
async fn what_has_expired_is_gone_for_good() {
    let disk = Disk::new(4 * MIB);
    let store = disk.open(busy()).await.expect("formats");
    let soon = now() + 50;
    let changes = vec![
        Change::set(&"a".into(), &"1".into(), soon),
        set("b", "2"),
        Change::expire(&"b".into(), soon),
        set("c", "3"),
    ];
    change(&store, changes).await.expect("fits");
    while now() < soon {
        sleep(Duration::from_millis(10)).await;
    }
    for _ in 0..3 {
        assert_eq!(get(&store, "a").await, None);
        assert_eq!(get(&store, "b").await, None);
        assert_eq!(get(&store, "c").await, Some("3".into()));
    }
    // The index forgets them too, and so do later ones.
    while usage(&store).keys > 1 {
        sleep(Duration::from_millis(10)).await;
    }
    store.close().await.expect("closes");
    drop(store);
    let store = disk.open(busy()).await.expect("opens");
    assert_eq!(usage(&store).keys, 1);
    assert_eq!(contents(&store).await.len(), 1);
}

#[tokio::test]
async fn damage_is_noticed() {
    let disk = Disk::new(4 * MIB);
    let store = disk.open(busy()).await.expect("formats");
    change(&store, vec![set("key", "a value to be damaged")])
        .await
        .expect("fits");
    let at = {
        let media = disk.media();
        let mut windows = media.bytes.windows(7);
        windows
            .position(|window| window == b"a value")
            .expect("is there")
    };
    disk.media().bytes[at] ^= 1;
    let damaged = store.get(&"key".into()).expect("is known").value().await;
    assert!(matches!(damaged, Err(Error::Damaged(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counters_lose_no_increment() {
    const TASKS: usize = 8;
    const TIMES: usize = 50;
    let disk = Disk::new(4 * MIB);
    let store = disk.open(busy()).await.expect("formats");
    let tasks = (0..TASKS).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            for _ in 0..TIMES {
                let increment = |found: Option<(_, Bytes)>| {
                    let old = found.map_or(0, |(_, value)| {
                        let text = std::str::from_utf8(&value).expect("a number");
                        text.parse::<usize>().expect("a number")
                    });
                    (vec![set("n", (old + 1).to_string())], ())
                };
                let ((), commit) = store.modify(&"n".into(), increment).await.expect("works");
                commit.durable().await.expect("works");
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.expect("no panic");
    }
    assert_eq!(
        get(&store, "n").await,
        Some((TASKS * TIMES).to_string().into())
    );
}

#[tokio::test]
async fn what_was_replayed_stays() {
    let disk = Disk::new(4 * MIB);
    let (device, namespace) = disk.attach(|_| {}).await;
    let options = Options {
        durability: Durability::Flush,
        ..Options::default()
    };
    let store = Store::open(namespace, options.clone())
        .await
        .expect("formats");
    change(&store, vec![set("a", "1")]).await.expect("fits");
    // The next one gets into the cache and no further.
    let stuck = || {
        let stuck = Fault::new(Behaviour::Hold).opcode(NvmOpcode::FLUSH);
        stuck.times(0)
    };
    device.controller().inject(stuck()).expect("makes sense");
    let changes = || vec![set("b", "a value")];
    let (_, commit) = store.change(|_| (changes(), ())).await.expect("fits");
    let is_there = || {
        disk.media()
            .bytes
            .windows(7)
            .any(|window| window == b"a value")
    };
    while !is_there() {
        sleep(Duration::from_millis(5)).await;
    }
    // The process ends, and the cache lives. Whoever sees the change then, sees it for ever; as long as
    // it can't be made durable nobody does.
    disk.detach(Loss::Nothing);
    drop((commit, store, device));
    let (device, namespace) = disk.attach(|_| {}).await;
    device.controller().inject(stuck()).expect("makes sense");
    let opening = timeout(
        Duration::from_millis(300),
        Store::open(namespace, options.clone()),
    );
    let seen = match opening.await {
        Ok(store) => get(&store.expect("opens"), "b").await,
        Err(_) => None,
    };
    disk.detach(Loss::Nothing);
    let survives = async |seen: Option<Bytes>| {
        disk.media().lose_power();
        let store = disk.open(options.clone()).await.expect("opens");
        assert_eq!(get(&store, "a").await, Some("1".into()));
        let found = get(&store, "b").await;
        assert!(seen.is_none() || seen == found, "{found:?}");
        disk.detach(Loss::Nothing);
        found
    };
    let seen = survives(seen).await;
    survives(seen).await;
}

#[tokio::test]
async fn what_is_compacted_stays_until_its_copies_are_durable() {
    const KEYS: usize = 30;
    let disk = Disk::new(4 * MIB);
    let (device, namespace) = disk.attach(|_| {}).await;
    let store = Store::open(namespace, busy()).await.expect("formats");
    let churn = async |times: usize| {
        for _ in 0..times {
            change(&store, vec![set("x", vec![1; 5000])])
                .await
                .expect("fits");
        }
    };
    churn(600).await;
    for key in 0..KEYS {
        change(&store, vec![set(format!("k{key}"), vec![2; 3000])])
            .await
            .expect("fits");
    }
    // Until a checkpoint allows their segments to be compacted.
    let before = store.state().statistics.checkpoints;
    while store.state().statistics.checkpoints < before + 2 {
        churn(1).await;
    }
    // From now on nothing becomes durable; so the copies of what is left are not, and nor is it that
    // the others are gone.
    let stuck = Fault::new(Behaviour::Hold).opcode(NvmOpcode::WRITE);
    device
        .controller()
        .inject(stuck.times(0))
        .expect("makes sense");
    let gone = (1..KEYS).map(|key| delete(format!("k{key}")));
    let gone: Vec<_> = gone.collect();
    let (_, commit) = store.change(|_| (gone.clone(), ())).await.expect("fits");
    let compacted = timeout(Duration::from_secs(1), commit.durable()).await;
    assert!(
        compacted.is_err(),
        "it is durable although nothing was written"
    );
    disk.detach(Loss::Nothing);
    drop(store);
    let store = disk.open(busy()).await.expect("opens");
    for key in 0..KEYS {
        assert_eq!(
            get(&store, format!("k{key}")).await,
            Some(vec![2; 3000].into())
        );
    }
}

#[tokio::test]
async fn a_device_that_fails_ends_it_and_loses_nothing() {
    let disk = Disk::new(4 * MIB);
    let (device, namespace) = disk.attach(|_| {}).await;
    let store = Store::open(namespace, busy()).await.expect("formats");
    change(&store, vec![set("a", "1")]).await.expect("fits");
    // Write faults, as of bad blocks.
    let bad = FaultStatus::new(Status::new(2, 0x80).with_dnr(true));
    let bad = Fault::new(Behaviour::Status(bad)).opcode(NvmOpcode::WRITE);
    let bad = bad.times(0);
    device.controller().inject(bad).expect("makes sense");
    let failed = change(&store, vec![set("a", "2")]).await;
    assert!(matches!(failed, Err(Error::Failed(_))));
    // What is not durable is not read, and nothing is written after the gap, also when it could be.
    device.controller().clear_faults();
    assert!(matches!(store.get(&"a".into()), Err(Error::Failed(_))));
    assert!(change(&store, vec![set("b", "2")]).await.is_err());
    assert!(matches!(store.close().await, Err(Error::Failed(_))));
    drop(store);
    let store = disk.open(busy()).await.expect("opens");
    assert_eq!(get(&store, "a").await, Some("1".into()));
    assert_eq!(usage(&store).keys, 1);
}

#[tokio::test]
async fn a_segment_that_cannot_be_read_or_discarded_is_not_the_end() {
    let disk = Disk::new(4 * MIB);
    let (device, namespace) = disk.attach(|_| {}).await;
    let store = Store::open(namespace, busy()).await.expect("formats");
    change(&store, vec![set("kept", vec![1; 3000])])
        .await
        .expect("fits");
    for opcode in [NvmOpcode::READ, NvmOpcode::DATASET_MANAGEMENT] {
        let bad = FaultStatus::new(Status::new(2, 0x81).with_dnr(true));
        let bad = Fault::new(Behaviour::Status(bad)).opcode(opcode).times(0);
        device.controller().inject(bad).expect("makes sense");
    }
    // Until the segment with the other key would be compacted, and many are freed.
    for _ in 0..1500 {
        change(&store, vec![set("x", vec![2; 5000])])
            .await
            .expect("fits");
    }
    assert!(store.state().statistics.compacted > 20);
    device.controller().clear_faults();
    assert_eq!(get(&store, "kept").await, Some(vec![1; 3000].into()));
}
