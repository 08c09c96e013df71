//! Power cuts: whatever the device's cache loses, tears or delays, what was acknowledged is there, and
//! what was not is there as a whole or not at all, and nothing that came after something that is not.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesOrdered;
use nvme_soft::fault::{Behaviour, Fault, FaultKind, Loss, TornBlocks, TornEnd};
use nvme_spec::opcode::NvmOpcode;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::history::{self, History, WRITERS, check};
use super::{Disk, busy, contents, full};
use crate::store::{Durability, Options, Store};

/// Cuts that a disk survives before the next one takes over.
const CUTS: u64 = 25;
/// Changes things until it is aborted, a few at a time.
async fn write(store: Store, histories: Arc<Mutex<Vec<History>>>, writer: usize, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut commits = FuturesOrdered::new();
    let with_history = |f: &mut dyn FnMut(&mut History)| {
        f(&mut histories.lock().expect("no one panics with it")[writer]);
    };
    loop {
        while commits.len() < 4 {
            let changes = history::random_change(&mut random, writer);
            with_history(&mut |history| history.asked.push(changes.clone()));
            match store.change(|_| (changes.clone(), ())).await {
                Ok(((), commit)) => commits.push_back(commit.durable()),
                // The device is gone.
                Err(_) => return,
            }
        }
        match commits.next().await {
            Some(Ok(())) => with_history(&mut |history| history.acknowledged += 1),
            _ => return,
        }
    }
}

/// What happens to the device.
fn faults(random: &mut fastrand::Rng) -> (Vec<Fault>, Loss) {
    let loss = match random.u8(..4) {
        0 => Loss::All,
        1 => Loss::Nothing,
        _ => Loss::Random(random.u64(..)),
    };
    let on_write = |behaviour| Fault::new(behaviour).opcode(NvmOpcode::WRITE);
    let nth = random.u64(1..120);
    let mut faults = vec![match random.bool() {
        true => {
            let blocks = match random.bool() {
                true => TornBlocks::First(random.u32(..16)),
                false => TornBlocks::Random(random.u64(..)),
            };
            let then = TornEnd::Swallow;
            on_write(Behaviour::Tear { blocks, then }).nth(nth)
        }
        false => on_write(Behaviour::Vanish(loss)).nth(nth),
    }];
    if random.bool() {
        // Later ones overtake them.
        let delay = Duration::from_micros(random.u64(50..1000));
        let late = on_write(Behaviour::Delay(delay)).times(0);
        faults.push(late.probability(0.3, random.u64(..)));
    }
    (faults, loss)
}

async fn cut(disk: &Disk, histories: &mut Vec<History>, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let options = Options {
        durability: match random.bool() {
            true => Durability::Fua,
            false => Durability::Flush,
        },
        ..busy()
    };
    let has_cache = random.u8(..8) > 0;
    let (device, namespace) = disk
        .attach(|config| config.volatile_write_cache = has_cache)
        .await;
    let (faults, loss) = faults(&mut random);
    // Sometimes recovery itself is cut off.
    let early = random.u8(..8) == 0;
    if early {
        let fault = Fault::new(Behaviour::Vanish(loss)).opcode(NvmOpcode::WRITE);
        let fault = fault.nth(random.u64(1..20));
        device.controller().inject(fault).expect("makes sense");
    }
    let opening = Store::open(namespace, options);
    if early {
        let _ = timeout(Duration::from_millis(random.u64(1..50)), opening).await;
        return disk.detach(loss);
    }
    let store = opening
        .await
        .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    let found = contents(&store).await;
    check(histories, found, seed);
    for fault in faults {
        device.controller().inject(fault).expect("makes sense");
    }
    let shared = Arc::new(Mutex::new(std::mem::take(histories)));
    let mut writers: JoinSet<()> = (0..WRITERS)
        .map(|writer| write(store.clone(), shared.clone(), writer, random.u64(..)))
        .collect();
    let has_struck = || {
        let hit = |kind| device.controller().faults_hit(kind) > 0;
        hit(FaultKind::Tear) || hit(FaultKind::Vanish)
    };
    for _ in 0..100 {
        sleep(Duration::from_micros(500)).await;
        if has_struck() {
            break;
        }
    }
    // A torn write goes on being torn for a while, as others are done; sometimes for so long that all
    // is done that does not wait for it.
    let longest = if random.u8(..8) == 0 { 20_000 } else { 1500 };
    sleep(Duration::from_micros(random.u64(..longest))).await;
    disk.detach(loss);
    writers.shutdown().await;
    drop(store);
    let shared = Arc::into_inner(shared).expect("the writers are gone");
    *histories = shared.into_inner().expect("no one panics with it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_and_nothing_is_half_there() {
    let rounds = if full() { 2000 } else { 100 };
    let (mut disk, mut histories) = (Disk::new(0), Vec::new());
    let mut acknowledged = 0;
    for seed in 0..rounds {
        if seed % CUTS == 0 {
            disk = Disk::new(4 << 20);
            histories = history::fresh();
        }
        cut(&disk, &mut histories, seed).await;
        acknowledged += histories
            .iter()
            .map(|history| history.acknowledged)
            .sum::<usize>();
        if seed % CUTS == CUTS - 1 {
            let store = disk.open(busy()).await.expect("opens");
            check(&mut histories, contents(&store).await, seed);
        }
    }
    assert!(
        acknowledged > 1000,
        "only {acknowledged}: the test does not do what it should"
    );
}
