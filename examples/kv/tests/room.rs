//! Devices that are full.

use std::time::Duration;

use nvme_soft::fault::Loss;
use tokio::time::timeout;

use super::{Disk, busy, change, delete, full, set, usage};
use crate::store::{Error, Store};

const MIB: usize = 1 << 20;
/// Nothing waits that long.
const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_key_that_is_set_twice_does_not_make_room_twice() {
    let store = Disk::new(4 * MIB).open(busy()).await.expect("formats");
    change(&store, vec![set("a", vec![1; 60_000])])
        .await
        .expect("fits");
    for number in 0.. {
        let more = set(format!("{number}"), vec![1; 15_000]);
        if change(&store, vec![more]).await.is_err() {
            break;
        }
    }
    let before = usage(&store);
    let twice = vec![set("a", ""), set("a", ""), set("b", vec![1; 100_000])];
    let refused = change(&store, twice).await;
    assert!(matches!(refused, Err(Error::Full { .. })), "{before:?}");
}

#[tokio::test]
async fn a_store_that_is_full_of_keys_goes_on_after_a_crash() {
    for (many, size) in [(57, 8), (1000, 4), (3000, 16)] {
        let disk = Disk::new(size * MIB);
        let store = disk.open(busy()).await.expect("formats");
        let mut numbers = 0..;
        loop {
            let keys = numbers.by_ref().take(many);
            let changes = keys
                .map(|number: usize| set(number.to_string(), ""))
                .collect();
            let filled = timeout(LONG, change(&store, changes)).await;
            if filled.expect("does not wait for ever").is_err() {
                break;
            }
        }
        let full = usage(&store);
        assert!(full.used <= full.limit, "{full:?}");
        for _ in 0..3 {
            let store = disk.open(busy()).await.expect("opens");
            assert_eq!(usage(&store).keys, full.keys);
            let gone = change(&store, vec![delete("0")]);
            let gone = timeout(LONG, gone).await.expect("does not wait for ever");
            gone.expect("works");
            change(&store, vec![set("0", "")]).await.expect("fits");
        }
    }
}

/// Changes of random sizes up to and at the limit, with crashes.
async fn fill(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let disk = Disk::new([4 * MIB, 8 * MIB, 16 * MIB][random.usize(..3)]);
    let longest = [1, 20, 300, 5000, 60_000][random.usize(..5)];
    let value = [0, 0, 10, 4000][random.usize(..4)];
    let most = random.usize(1..600);
    let mut store = disk.open(busy()).await.expect("formats");
    let in_time = async |store: &Store, changes| match timeout(LONG, change(store, changes)).await {
        Ok(Err(Error::Full { .. })) => false,
        Ok(outcome) => outcome.map(|()| true).expect("works"),
        Err(_) => panic!("seed {seed}: waits for ever: {:?}", usage(store)),
    };
    let mut refusals = 0;
    for _ in 0..1500 {
        let mut len = 0;
        let changes = std::iter::repeat_with(|| {
            let mut key = random.usize(..1_000_000).to_string().into_bytes();
            key.resize(key.len() + random.usize(..longest), b'k');
            len += key.len() + value + 24;
            match random.u8(..20) {
                0 => (len, delete(key)),
                _ => (len, set(key, vec![1; value])),
            }
        });
        let changes = changes.take(most).take_while(|(len, _)| *len < 120_000);
        let changes = changes.map(|(_, change)| change).collect();
        refusals += usize::from(!in_time(&store, changes).await);
        if refusals % 100 == 99 {
            // Someone makes room.
            let scanned = store.look(|view| view.scan(0, 100)).expect("works");
            let ((_, keys), _) = scanned;
            let gone = keys.into_iter().map(|key| vec![delete(key)]);
            for changes in gone {
                in_time(&store, changes).await;
            }
        }
        if random.u16(..500) == 0 {
            if random.bool() {
                let closed = timeout(LONG, store.close()).await;
                closed.expect("ends").expect("closes");
            }
            disk.detach(Loss::Nothing);
            store = disk.open(busy()).await.expect("opens");
        }
    }
    assert!(
        refusals > 0 || value < 4000,
        "seed {seed}: it is never full"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_says_that_it_is_full_and_never_waits_for_ever() {
    for seed in 0..if full() { 40 } else { 3 } {
        fill(seed).await;
    }
}
