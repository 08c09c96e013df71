//! Data that one driver writes is what another one reads: ours, and the kernel's.

use fastrand::Rng;
use nvme_async::Zeroes;

use crate::harness::{self, address, full, run};
use crate::kernel::Kernel;
use crate::memory::{self, KINDS, assert_same};

/// The longest read or write.
const LARGEST: usize = 2 << 20;
/// How many lengths are drawn.
const DRAWN: usize = 100;

/// One read or write.
struct Extent {
    offset: u64,
    len: usize,
}

/// Where all lengths lie beside each other in random order, a block apart, and where that ends.
fn extents(block: usize, random: &mut Rng) -> (Vec<Extent>, usize) {
    let mut lengths: Vec<usize> = (1..=64).collect();
    let mut power = 1;
    while power * block <= LARGEST {
        lengths.extend([power - 1, power, power + 1]);
        power *= 2;
    }
    for _ in 0..DRAWN {
        // Each order of magnitude is as likely as another.
        let most = 1 << random.u32(0..=(LARGEST / block).ilog2());
        lengths.push(random.usize(1..=most));
    }
    lengths.retain(|&blocks| blocks > 0);
    random.shuffle(&mut lengths);
    let mut next = 0;
    let extents = lengths.into_iter().map(|blocks| {
        let offset = (next * block) as u64;
        next += blocks + 1;
        Extent {
            offset,
            len: blocks * block,
        }
    });
    (extents.collect(), next * block)
}

/// Each length in one kind of memory, or in all of them.
fn rounds() -> usize {
    if full() { KINDS.len() } else { 1 }
}

/// Writes random data through us, and returns what the device should contain.
async fn write(name: &str) -> Vec<u8> {
    let namespace = harness::open(name).await;
    let mut random = Rng::with_seed(0xf0);
    let (extents, area) = extents(namespace.block_size() as usize, &mut random);
    let zeroed = namespace
        .write_zeroes(0, area as u64, Zeroes::Allocated)
        .await;
    zeroed.expect("writes zeroes");
    let mut image = vec![0; area];
    for round in 0..rounds() {
        for (index, extent) in extents.iter().enumerate() {
            let data = &mut image[extent.offset as usize..][..extent.len];
            random.fill(data);
            let kind = KINDS[(index + round) % KINDS.len()];
            memory::write(&namespace, kind, extent.offset, data).await;
        }
    }
    harness::close(namespace).await;
    image
}

async fn the_kernel_reads_what_we_wrote(name: &str) {
    let image = write(name).await;
    let kernel = Kernel::take(&address(name));
    let read = kernel.disk(1).read(image.len());
    assert_same(&read, &image, "what the kernel reads");
}

async fn we_read_what_the_kernel_wrote(name: &str, block_size: usize) {
    let mut random = Rng::with_seed(0xf1);
    let (extents, area) = extents(block_size, &mut random);
    let mut image = vec![0; area];
    random.fill(&mut image);
    let kernel = Kernel::take(&address(name));
    kernel.disk(1).write(&image);
    drop(kernel);

    let namespace = harness::open(name).await;
    assert_eq!(namespace.block_size() as usize, block_size);
    for round in 0..rounds() {
        for (index, extent) in extents.iter().enumerate() {
            let kind = KINDS[(index + round) % KINDS.len()];
            let read = memory::read(&namespace, kind, extent.offset, extent.len).await;
            let expected = &image[extent.offset as usize..][..extent.len];
            assert_same(&read, expected, &format!("what we read into {kind:?}"));
        }
    }
    harness::close(namespace).await;
}

#[test]
fn the_kernel_reads_what_we_write() {
    run(300, async || the_kernel_reads_what_we_wrote("plain").await);
}

#[test]
fn the_kernel_reads_what_we_write_in_blocks_of_4096() {
    run(300, async || {
        the_kernel_reads_what_we_wrote("lba4096").await
    });
}

#[test]
fn we_read_what_the_kernel_writes() {
    run(300, async || {
        we_read_what_the_kernel_wrote("plain", 512).await
    });
}

#[test]
fn we_read_what_the_kernel_writes_in_blocks_of_4096() {
    run(300, async || {
        we_read_what_the_kernel_wrote("lba4096", 4096).await
    });
}
