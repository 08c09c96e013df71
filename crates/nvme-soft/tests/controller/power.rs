//! Losses of power against a model of what is durable.

use std::collections::HashSet;

use nvme_soft::fault::{Behaviour, Fault, FaultQueue, Loss, TornBlocks, TornEnd};
use nvme_soft::store::{FileStore, MemoryStore};
use nvme_soft::{Config, NamespaceConfig};
use nvme_spec::dsm::Range;
use nvme_spec::log::SmartHealth;
use nvme_spec::registers::{ShutdownNotification, ShutdownStatus};
use nvme_spec::{admin, nvm};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use zerocopy::{FromBytes, IntoBytes};

use crate::host::{Host, config, pattern, prp, usual_configuration, wait_for};

const LBA: u64 = 512;
const BLOCKS: u64 = 32;
const SIZE: u64 = LBA * BLOCKS;

#[derive(Clone, Debug)]
enum Step {
    Write {
        slba: u64,
        blocks: u64,
        seed: u64,
        fua: bool,
    },
    /// Some of its blocks are written, and then the power fails.
    Torn {
        slba: u64,
        blocks: u64,
        seed: u64,
        fua: bool,
    },
    Zero {
        slba: u64,
        blocks: u64,
        fua: bool,
    },
    Deallocate {
        slba: u64,
        blocks: u64,
    },
    Flush,
    Cache(bool),
    Reset,
    Shutdown,
    Vanish(Loss),
    PowerLoss(Loss),
}

fn loss() -> impl Strategy<Value = Loss> {
    prop_oneof![
        Just(Loss::Nothing),
        Just(Loss::All),
        any::<u64>().prop_map(Loss::Random)
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..BLOCKS, 1..=8_u64).prop_map(|(slba, blocks)| (slba, blocks.min(BLOCKS - slba)));
    let write = (range.clone(), any::<u64>(), prop::bool::weighted(0.2));
    prop_oneof![
        8 => write.clone().prop_map(
            |((slba, blocks), seed, fua)| Step::Write { slba, blocks, seed, fua }
        ),
        1 => write.prop_map(
            |((slba, blocks), seed, fua)| Step::Torn { slba, blocks, seed, fua }
        ),
        1 => (range.clone(), any::<bool>())
            .prop_map(|((slba, blocks), fua)| Step::Zero { slba, blocks, fua }),
        1 => range.prop_map(|(slba, blocks)| Step::Deallocate { slba, blocks }),
        1 => Just(Step::Flush),
        1 => any::<bool>().prop_map(Step::Cache),
        1 => Just(Step::Reset),
        1 => Just(Step::Shutdown),
        1 => loss().prop_map(Step::Vanish),
        2 => loss().prop_map(Step::PowerLoss),
    ]
}

/// What each block may hold after a loss of power: what was durable last, and all that was written
/// since, the newest last.
struct Model {
    versions: Vec<Vec<Vec<u8>>>,
    cached: bool,
}

impl Model {
    fn write(&mut self, slba: u64, data: &[u8], durable: bool) {
        for (block, data) in (slba as usize..).zip(data.chunks(LBA as usize)) {
            let versions = &mut self.versions[block];
            if durable {
                versions.clear();
            }
            versions.push(data.to_vec());
        }
    }

    fn flush(&mut self) {
        for versions in &mut self.versions {
            versions.drain(..versions.len() - 1);
        }
    }

    /// Compares with what the controller has; that is all there is from here on.
    fn settle(&mut self, contents: &[u8], loss: Option<Loss>) {
        for (block, contents) in contents.chunks(LBA as usize).enumerate() {
            let versions = &mut self.versions[block];
            let is_right = match loss {
                None | Some(Loss::Nothing) => versions.last().is_some_and(|last| last == contents),
                Some(Loss::All) => versions[0] == contents,
                Some(Loss::Random(_)) => versions.iter().any(|version| version == contents),
            };
            assert!(is_right, "block {block} after {loss:?}");
            *versions = vec![contents.to_vec()];
        }
    }
}

fn contents(host: &mut Host) -> Vec<u8> {
    let mark = host.mark();
    let buffer = host.allocate(SIZE);
    let data = host.prps(buffer, SIZE);
    host.io_ok(nvm::read(1, 0, BLOCKS as u32, false).with_data(data));
    host.free_to(mark);
    host.memory.get(buffer, SIZE as usize)
}

fn set_cache(host: &mut Host, on: bool) {
    let feature = nvme_spec::feature::id::VOLATILE_WRITE_CACHE;
    host.admin_ok(admin::set_features(feature, u32::from(on), false));
}

fn follows_model(config: Config, steps: &[Step]) {
    let mut host = Host::new(config);
    let start = host.mark();
    let restart = |host: &mut Host| {
        host.free_to(start);
        host.enable();
        host.create_pair(1, 16, Some(1));
    };
    restart(&mut host);
    let mut model = Model {
        versions: vec![vec![vec![0; LBA as usize]]; BLOCKS as usize],
        cached: true,
    };
    for step in steps {
        let mark = host.mark();
        match *step {
            Step::Write {
                slba,
                blocks,
                seed,
                fua,
            } => {
                let data = pattern(seed, (blocks * LBA) as usize);
                let buffer = host.allocate(blocks * LBA);
                host.memory.set(buffer, &data);
                host.io_ok(nvm::write(1, slba, blocks as u32, fua).with_data(prp(buffer)));
                model.write(slba, &data, fua || !model.cached);
            }
            Step::Torn {
                slba,
                blocks,
                seed,
                fua,
            } => {
                let loss = Loss::Random(seed);
                let torn = Behaviour::Tear {
                    blocks: TornBlocks::Random(seed),
                    then: TornEnd::PowerLoss(loss),
                };
                let fault = Fault::new(torn).queue(FaultQueue::Io);
                host.controller.inject(fault).unwrap();
                let data = pattern(seed, (blocks * LBA) as usize);
                let buffer = host.allocate(blocks * LBA);
                host.memory.set(buffer, &data);
                host.submit(
                    1,
                    nvm::write(1, slba, blocks as u32, fua).with_data(prp(buffer)),
                );
                wait_for(|| (!host.status().rdy()).then_some(()));
                // It never completed, so none of it is durable for sure.
                model.write(slba, &data, false);
                restart(&mut host);
                model.cached = true;
                model.settle(&contents(&mut host), Some(loss));
                continue;
            }
            Step::Zero { slba, blocks, fua } => {
                host.io_ok(nvm::write_zeroes(1, slba, blocks as u32, false, fua));
                model.write(slba, &vec![0; (blocks * LBA) as usize], false);
                if fua || !model.cached {
                    // It is made durable by a flush of everything.
                    model.flush();
                }
            }
            Step::Deallocate { slba, blocks } => {
                let list = host.allocate(16);
                host.memory
                    .set(list, Range::new(slba, blocks as u32).as_bytes());
                host.io_ok(nvm::dataset_management(1, 1, true).with_data(prp(list)));
                model.write(slba, &vec![0; (blocks * LBA) as usize], false);
                if !model.cached {
                    model.flush();
                }
            }
            Step::Flush => {
                host.io_ok(nvm::flush(1));
                if model.cached {
                    model.flush();
                }
            }
            Step::Cache(on) => {
                set_cache(&mut host, on);
                if !on {
                    model.flush();
                }
                model.cached = on;
            }
            Step::Reset => {
                host.controller.reset().unwrap();
                restart(&mut host);
                model.cached = true;
                continue;
            }
            Step::Shutdown => {
                let shutdown = usual_configuration().with_shn(ShutdownNotification::Normal);
                host.write_configuration(shutdown);
                wait_for(|| (host.status().shst() == ShutdownStatus::Complete).then_some(()));
                model.flush();
                host.disable();
                restart(&mut host);
                model.cached = true;
                continue;
            }
            Step::Vanish(loss) | Step::PowerLoss(loss) => {
                if matches!(step, Step::Vanish(_)) {
                    host.controller.vanish(loss);
                    host.controller.reappear();
                } else {
                    host.controller.power_loss(loss);
                }
                restart(&mut host);
                model.cached = true;
                model.settle(&contents(&mut host), Some(loss));
                continue;
            }
        }
        host.free_to(mark);
    }
    let newest = contents(&mut host);
    for (versions, contents) in model.versions.iter().zip(newest.chunks(LBA as usize)) {
        assert!(versions.last().unwrap() == contents);
    }
}

fn tracked(store: impl nvme_soft::store::Store + 'static) -> Config {
    let mut config = Config {
        track_unflushed: true,
        ..Config::default()
    };
    config
        .namespaces
        .push(NamespaceConfig::new(store, LBA as u32));
    config
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        rng_seed: RngSeed::Fixed(0x5eed),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn after_a_power_loss_each_block_has_a_version_that_it_may_have(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        follows_model(tracked(MemoryStore::new(SIZE).unwrap()), &steps);
    }

    #[test]
    fn a_file_loses_what_a_power_loss_takes(steps in prop::collection::vec(step(), 1..20)) {
        let directory = tempfile::tempdir().unwrap();
        let store = FileStore::create(directory.path().join("disk.img"), SIZE).unwrap();
        follows_model(tracked(store), &steps);
    }
}

#[test]
fn a_random_loss_keeps_some_blocks_and_loses_others() {
    let mut outcomes = HashSet::new();
    for seed in 0..4 {
        let mut host = Host::ready(tracked(MemoryStore::new(SIZE).unwrap()));
        let buffer = host.allocate(4096);
        host.memory.set(buffer, &[1; 4096]);
        host.io_ok(nvm::write(1, 0, 8, false).with_data(prp(buffer)));
        host.controller.power_loss(Loss::Random(seed));
        host.enable();
        host.create_pair(1, 16, None);
        let kept: Vec<_> = contents(&mut host)
            .chunks(LBA as usize)
            .map(|block| block[0])
            .collect();
        outcomes.insert(kept);
    }
    assert!(outcomes.len() > 1, "{outcomes:?}");
    assert!(
        outcomes
            .iter()
            .any(|kept| kept[..8].contains(&0) && kept[..8].contains(&1))
    );
}

#[test]
fn losses_of_power_are_counted() {
    let mut host = Host::enabled(config(512));
    let counts = |host: &mut Host| {
        let log = nvme_spec::log::id::SMART_HEALTH;
        let log = admin::get_log_page(log, admin::ALL_NAMESPACES, 512, 0, true);
        let data = host.admin_data(log, 512);
        let health = SmartHealth::read_from_bytes(&data).unwrap();
        (health.power_cycles.get(), health.unsafe_shutdowns.get())
    };
    assert_eq!(counts(&mut host), (1, 0));
    host.controller.power_loss(Loss::Nothing);
    host.enable();
    assert_eq!(counts(&mut host), (2, 1));
    let shutdown = usual_configuration().with_shn(ShutdownNotification::Normal);
    host.write_configuration(shutdown);
    wait_for(|| (host.status().shst() == ShutdownStatus::Complete).then_some(()));
    host.controller.vanish(Loss::Nothing);
    // There is no more power to lose.
    host.controller.vanish(Loss::Nothing);
    host.controller.power_loss(Loss::Nothing);
    host.controller.reappear();
    host.enable();
    assert_eq!(counts(&mut host), (3, 1));
}

#[test]
fn a_namespace_that_was_added_has_a_cache_too() {
    let mut config = tracked(MemoryStore::new(SIZE).unwrap());
    config.max_namespaces = 2;
    let mut host = Host::ready(config);
    let added = NamespaceConfig::new(MemoryStore::new(SIZE).unwrap(), LBA as u32);
    assert_eq!(host.controller.add_namespace(added).unwrap(), 2);
    let buffer = host.allocate(LBA);
    host.memory.set(buffer, &[1; LBA as usize]);
    host.io_ok(nvm::write(2, 0, 1, false).with_data(prp(buffer)));
    host.controller.power_loss(Loss::All);
    host.enable();
    host.create_pair(1, 16, None);
    host.io_ok(nvm::read(2, 0, 1, false).with_data(prp(buffer)));
    assert_eq!(host.memory.get(buffer, LBA as usize), [0; LBA as usize]);
}

#[test]
fn what_a_resize_cuts_off_does_not_come_back() {
    let mut host = Host::ready(tracked(MemoryStore::new(SIZE).unwrap()));
    let buffer = host.allocate(LBA);
    let last = BLOCKS - 1;
    for fill in [1, 2] {
        host.memory.set(buffer, &[fill; LBA as usize]);
        host.io_ok(nvm::write(1, last, 1, fill == 1).with_data(prp(buffer)));
        host.io_ok(nvm::write(1, 0, 1, fill == 1).with_data(prp(buffer)));
    }
    host.controller.resize_namespace(1, SIZE / 2).unwrap();
    host.controller.resize_namespace(1, SIZE).unwrap();
    host.controller.power_loss(Loss::All);
    host.enable();
    host.create_pair(1, 16, None);
    let contents = contents(&mut host);
    assert_eq!(contents[..LBA as usize], [1; LBA as usize]);
    assert_eq!(contents[(last * LBA) as usize..], [0; LBA as usize]);
}

#[test]
fn without_tracking_nothing_is_lost() {
    let mut host = Host::ready(config(512));
    let buffer = host.allocate(512);
    host.memory.set(buffer, &[1; 512]);
    host.io_ok(nvm::write(1, 0, 1, false).with_data(prp(buffer)));
    host.controller.power_loss(Loss::All);
    host.enable();
    host.create_pair(1, 16, None);
    assert_eq!(contents(&mut host)[..512], [1; 512]);
}
