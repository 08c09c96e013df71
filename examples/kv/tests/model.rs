//! Random operations with restarts, against a `BTreeMap`.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::{Disk, busy, change, contents, full, set, usage};
use crate::store::Change;

const SOME_DAY: u64 = 9_000_000_000_000;

#[derive(Clone, Debug)]
enum Step {
    Set(Bytes, usize, u8),
    Delete(Bytes),
    Expire(Bytes, u64),
    Append(Bytes, usize),
    Clear,
    /// In order, or not.
    Restart(bool),
}

fn key() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        9 => (0..40u8).prop_map(|number| Bytes::from(vec![b'k', number])),
        1 => (0..3u8).prop_map(|number| Bytes::from(vec![number; 5000])),
        1 => Just(Bytes::new()),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![0..200usize, 0..20_000usize];
    prop_oneof![
        20 => (key(), len, any::<u8>()).prop_map(|(key, len, fill)| Step::Set(key, len, fill)),
        5 => key().prop_map(Step::Delete),
        3 => (key(), 0..5u64).prop_map(|(key, later)| Step::Expire(key, SOME_DAY + later)),
        5 => (key(), 0..500usize).prop_map(|(key, len)| Step::Append(key, len)),
        1 => Just(Step::Clear),
        2 => any::<bool>().prop_map(Step::Restart),
    ]
}

async fn follows_the_model(steps: Vec<Step>) {
    let disk = Disk::new(4 << 20);
    let mut store = disk.open(busy()).await.expect("formats");
    let mut model: BTreeMap<Bytes, (Bytes, u64)> = BTreeMap::new();
    for step in steps {
        match step {
            Step::Set(key, len, fill) => {
                let value = Bytes::from(vec![fill; len]);
                change(&store, vec![set(key.clone(), value.clone())])
                    .await
                    .expect("fits");
                model.insert(key, (value, 0));
            }
            Step::Delete(key) => {
                model.remove(&key);
                change(&store, vec![Change::delete(&key)])
                    .await
                    .expect("works");
            }
            Step::Expire(key, expires) => {
                if let Some(entry) = model.get_mut(&key) {
                    entry.1 = expires;
                }
                change(&store, vec![Change::expire(&key, expires)])
                    .await
                    .expect("works");
            }
            Step::Append(key, len) => {
                let append = |found: Option<(crate::store::Entry, Bytes)>| {
                    let (expires, old) = found.map_or_else(Default::default, |(facts, value)| {
                        (facts.expires, value.to_vec())
                    });
                    let value = Bytes::from([old, vec![7; len]].concat());
                    let change = Change::set(&key, &value, expires);
                    (vec![change], (value, expires))
                };
                let (entry, commit) = store.modify(&key, append).await.expect("fits");
                commit.durable().await.expect("works");
                let old = model.entry(key.clone()).or_default();
                assert_eq!(entry.0, [old.0.to_vec(), vec![7; len]].concat());
                assert_eq!(entry.1, old.1);
                *old = entry;
            }
            Step::Clear => {
                change(&store, vec![Change::clear()]).await.expect("works");
                model.clear();
            }
            Step::Restart(in_order) => {
                if in_order {
                    store.close().await.expect("closes");
                }
                drop(store);
                store = disk.open(busy()).await.expect("opens");
            }
        }
    }
    assert_eq!(contents(&store).await, model);
    drop(store);
    let store = disk.open(busy()).await.expect("opens");
    assert_eq!(contents(&store).await, model);
    assert_eq!(usage(&store).keys, model.len());
}

#[test]
fn it_is_a_map_whatever_happens() {
    let config = ProptestConfig {
        cases: if full() { 500 } else { 24 },
        rng_seed: RngSeed::Fixed(0x5eed),
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let runtime = tokio::runtime::Runtime::new().expect("starts");
    proptest!(config, |(steps in prop::collection::vec(step(), 1..400))| {
        runtime.block_on(follows_the_model(steps));
    });
}
