//! Reads and writes against a model, with several commands in flight.

use std::time::Duration;

use nvme_soft::store::{FileStore, MemoryStore};
use nvme_soft::{Config, NamespaceConfig};
use nvme_spec::copy::SourceRange;
use nvme_spec::dsm::Range;
use nvme_spec::nvm;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use zerocopy::IntoBytes;

use crate::host::{Host, pattern, prp};

const LBA: u64 = 512;
const BLOCKS: u64 = 256;

#[derive(Clone, Debug)]
enum Step {
    Write {
        slba: u64,
        blocks: u64,
        seed: u64,
        fua: bool,
    },
    Zero {
        slba: u64,
        blocks: u64,
        deallocate: bool,
    },
    Deallocate {
        slba: u64,
        blocks: u64,
    },
    /// What lies at one place, twice, to another.
    Copy {
        slba: u64,
        blocks: u64,
        to: u64,
    },
    Flush,
    Check {
        slba: u64,
        blocks: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let range =
        (0..BLOCKS, 1..=64_u64).prop_map(|(slba, blocks)| (slba, blocks.min(BLOCKS - slba)));
    prop_oneof![
        3 => (range.clone(), any::<u64>(), any::<bool>()).prop_map(
            |((slba, blocks), seed, fua)| Step::Write { slba, blocks, seed, fua }
        ),
        1 => (range.clone(), any::<bool>())
            .prop_map(|((slba, blocks), deallocate)| Step::Zero { slba, blocks, deallocate }),
        1 => range.clone().prop_map(|(slba, blocks)| Step::Deallocate { slba, blocks }),
        2 => (range.clone(), 0..BLOCKS - 1).prop_map(|((slba, blocks), to)| Step::Copy {
            slba,
            blocks: blocks.min((BLOCKS - to) / 2),
            to,
        }),
        1 => Just(Step::Flush),
        3 => range.prop_map(|(slba, blocks)| Step::Check { slba, blocks }),
    ]
}

fn follows_model(config: Config, steps: &[Step]) {
    let mut host = Host::enabled(config);
    host.create_pair(1, 5, Some(1));
    let mut model = vec![0; (BLOCKS * LBA) as usize];
    let bytes = |slba: u64, blocks: u64| (slba * LBA) as usize..((slba + blocks) * LBA) as usize;
    let mark = host.mark();
    for step in steps {
        host.free_to(mark);
        match *step {
            Step::Write {
                slba,
                blocks,
                seed,
                fua,
            } => {
                let data = pattern(seed, (blocks * LBA) as usize);
                // An offset in the first page, as PRPs allow.
                let buffer = host.allocate(blocks * LBA + 4096) + seed % 1024 * 4;
                host.memory.set(buffer, &data);
                let pointer = host.prps(buffer, blocks * LBA);
                host.io_ok(nvm::write(1, slba, blocks as u32, fua).with_data(pointer));
                model[bytes(slba, blocks)].copy_from_slice(&data);
            }
            Step::Zero {
                slba,
                blocks,
                deallocate,
            } => {
                host.io_ok(nvm::write_zeroes(1, slba, blocks as u32, deallocate, false));
                model[bytes(slba, blocks)].fill(0);
            }
            Step::Deallocate { slba, blocks } => {
                let list = host.allocate(16);
                host.memory
                    .set(list, Range::new(slba, blocks as u32).as_bytes());
                host.io_ok(nvm::dataset_management(1, 1, true).with_data(prp(list)));
                model[bytes(slba, blocks)].fill(0);
            }
            Step::Copy { slba, blocks, to } => {
                let list = host.allocate(64);
                let ranges = [SourceRange::new(slba, blocks as u32); 2];
                host.memory.set(list, ranges.as_bytes());
                host.io_ok(nvm::copy(1, to, 2, false).with_data(prp(list)));
                let data = model[bytes(slba, blocks)].repeat(2);
                model[bytes(to, 2 * blocks)].copy_from_slice(&data);
            }
            Step::Flush => host.io_ok(nvm::flush(1)),
            Step::Check { slba, blocks } => {
                // The range in commands of one block, all in flight together.
                let buffer = host.allocate(blocks * LBA);
                let mut waiting = std::collections::VecDeque::new();
                for block in 0..blocks {
                    if waiting.len() == 4 {
                        let cid = waiting.pop_front().unwrap();
                        assert!(host.wait(1, cid).status().is_success());
                    }
                    let read = nvm::read(1, slba + block, 1, false);
                    let data = prp(buffer + block * LBA);
                    waiting.push_back(host.submit(1, read.with_data(data)));
                }
                for cid in waiting {
                    assert!(host.wait(1, cid).status().is_success());
                }
                let data = host.memory.get(buffer, (blocks * LBA) as usize);
                assert!(data == model[bytes(slba, blocks)], "{step:?}");
                let pointer = host.prps(buffer, blocks * LBA);
                host.io_ok(nvm::compare(1, slba, blocks as u32, false).with_data(pointer));
            }
        }
    }
    let counters = host.controller.counters();
    assert_eq!(counters.refused_accesses, 0);
    assert_eq!(counters.failed_commands, 0);
    assert_eq!(counters.invalid_doorbells, 0);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        rng_seed: RngSeed::Fixed(0x5eed),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn memory_follows_the_model(
        steps in prop::collection::vec(step(), 1..40),
        latency in prop_oneof![Just(0), Just(30)],
    ) {
        let mut config =
            Config { latency: Duration::from_micros(latency), ..Config::default() };
        let store = MemoryStore::new(BLOCKS * LBA).unwrap();
        config.namespaces.push(NamespaceConfig::new(store, LBA as u32));
        follows_model(config, &steps);
    }

    #[test]
    fn a_file_follows_the_model(steps in prop::collection::vec(step(), 1..20)) {
        let directory = tempfile::tempdir().unwrap();
        let store = FileStore::create(directory.path().join("disk.img"), BLOCKS * LBA).unwrap();
        let mut config = Config::default();
        config.namespaces.push(NamespaceConfig::new(store, LBA as u32));
        follows_model(config, &steps);
    }
}
