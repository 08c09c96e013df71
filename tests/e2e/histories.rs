//! Random histories: operations of all kinds and sizes, with any memory, some of them given up, on
//! controllers of all kinds; the same ones each time.

use std::time::Duration;

use fastrand::Rng;
use futures::FutureExt;
use nvme_async::{PollMode, Zeroes};
use nvme_soft::store::MemoryStore;

use crate::support::bounded::{bounded, current_thread, multi_thread};
use crate::support::full;
use crate::support::rig::Setup;
use crate::support::suite::disk::{Disk, READ_FORMS, WRITE_FORMS};
use crate::support::suite::target::{How, Target};

const SIZE: u64 = 1 << 20;

/// A controller with limits of its own.
fn any_setup(random: &mut Rng) -> Setup {
    let mut any = |choices: &[u32]| choices[random.usize(0..choices.len())];
    let store = MemoryStore::new(SIZE).expect("a little memory");
    let lba_size = any(&[512, 4096]);
    let entries = any(&[2, 3, 5, 64]);
    let pairs = any(&[1, 2, 9]) as u16;
    let latency = Duration::from_micros(any(&[0, 0, 0, 40]).into());
    let poll_mode = [PollMode::Adaptive, PollMode::Interrupt, PollMode::Busy];
    let poll_mode = poll_mode[any(&[0, 0, 1, 2]) as usize];
    let (mdts, wzsl, sgl) = (
        any(&[1, 2, 5, 7]) as u8,
        any(&[0, 1, 3]) as u8,
        any(&[0, 1]) == 1,
    );
    let cache = any(&[0, 1]) == 1;
    let ranges = (any(&[0, 1, 5]) as u8, any(&[0, 3]), any(&[0, 8]).into());
    let vsl = any(&[0, 1, 3]) as u8;
    let copies = (
        any(&[1, 7, 1024]) as u16,
        any(&[1024, 2048]),
        any(&[1, 3, 256]) as u16,
    );
    let (fd_only, vectors) = (any(&[0, 0, 1]) == 1, any(&[1, 2, 17]) as u16);
    let (isolate, max_transfer) = (
        any(&[0, 0, 0, 1]) == 1,
        any(&[4096, 20_000, 1 << 20]) as usize,
    );
    Setup::empty()
        .store(store, lba_size)
        .config(|config| {
            config.max_queue_entries = entries;
            config.io_queue_pairs = pairs;
            config.latency = latency;
            (config.mdts, config.wzsl, config.sgl) = (mdts, wzsl, sgl);
            config.volatile_write_cache = cache;
            (config.dmrl, config.dmrsl, config.dmsl) = ranges;
            config.vsl = vsl;
            let namespace = &mut config.namespaces[0];
            namespace.copy_range_blocks = copies.0;
            (namespace.copy_blocks, namespace.copy_ranges) = (copies.1, copies.2);
        })
        .device(|device| {
            device.fd_only = fd_only;
            device.vectors = vectors;
        })
        .options(|options| {
            options
                .poll_mode(poll_mode)
                .isolate(isolate)
                .max_transfer(max_transfer)
        })
}

async fn history(namespace: &impl Target, seed: u64, steps: usize) {
    let mut disk = Disk::new(namespace, seed, SIZE).await;
    let mut random = Rng::with_seed(!seed);
    for _ in 0..steps {
        let largest = namespace.block_size() << random.u32(0..7);
        let len = random.usize(1..=largest / namespace.block_size()) * namespace.block_size();
        let offset = disk.place(len);
        match random.u32(0..23) {
            0..6 => {
                let form = disk.any(&WRITE_FORMS);
                let how = disk.any(&[How::Plain, How::Fua]);
                disk.write(form, how, offset, len).await;
            }
            6..11 => {
                let form = disk.any(&READ_FORMS);
                disk.check(form, offset, len).await;
            }
            11..14 => disk.dropped_write(random.usize(0..6), len).await,
            14 => {
                // A read that is given up, in the middle of others.
                drop(namespace.read(offset, len).now_or_never());
                let form = disk.any(&READ_FORMS);
                disk.check(form, offset, len).await;
            }
            15 => drop(namespace.flush().now_or_never()),
            16 => namespace.flush().await.expect("flushes"),
            17 => {
                let zeroes = disk.any(&[Zeroes::Allocated, Zeroes::MayDeallocate]);
                disk.write_zeroes(zeroes, offset, len).await;
            }
            18 => disk.concurrent(random.usize(1..30)).await,
            19 => {
                let form = disk.any(&WRITE_FORMS);
                assert!(disk.compare(form, offset, len).await);
            }
            20 => {
                let verified = namespace.verify(offset, len as u64).await;
                verified.expect("it can be read");
            }
            21 => assert!(disk.copy_anything().await),
            _ => namespace.quiesce().await.expect("quiesces"),
        }
    }
    disk.check_all().await;
}

fn histories(seeds: std::ops::Range<u64>, steps: usize) {
    for seed in seeds {
        bounded(move || {
            let mut random = Rng::with_seed(seed);
            let new = if random.bool() {
                current_thread
            } else {
                multi_thread
            };
            let runtime = new();
            let setup = any_setup(&mut random);
            // Shown if it fails.
            println!("seed {seed}: {:?} {:?}", setup.config, setup.options);
            runtime.block_on(async {
                let rig = setup.open().await;
                let namespace = rig.namespace().await;
                let worker = namespace.clone();
                let run = tokio::spawn(async move { history(&worker, seed, steps).await });
                if let Err(panic) = run.await {
                    std::panic::resume_unwind(panic.into_panic());
                }
                drop(namespace);
                rig.close().await;
            });
        });
    }
}

#[test]
fn short_ones() {
    histories(0..if full() { 300 } else { 60 }, 60);
}

#[test]
fn long_ones() {
    histories(
        1000..if full() { 1020 } else { 1002 },
        if full() { 5000 } else { 600 },
    );
}
