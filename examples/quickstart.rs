//! What a program on nvme-async looks like: many tasks that write, read and verify at the same
//! time, on a software NVMe controller over a file. No hardware and no privileges are needed.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```
//!
//! With a URL it uses that device instead, and OVERWRITES its first 64 MiB:
//!
//! ```text
//! cargo run --release --example quickstart -- nvme://0000:44:00.0/1
//! ```

use std::error::Error;
use std::time::{Duration, Instant};

use nvme_async::Namespace;
use tokio::task::JoinSet;

/// Tasks that work at the same time, each with one request in flight.
const TASKS: u64 = 32;
/// Bytes of a request.
const BLOCK: usize = 4096;
/// Blocks of each task.
const BLOCKS: u64 = 512;
/// Reads of each task.
const READS: u64 = 8 * BLOCKS;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    // The file is created on the spot, sparse, and goes with its directory.
    let directory = tempfile::tempdir()?;
    let file = format!("file:{}/disk.img?size=64M", directory.path().display());
    let url = std::env::args().nth(1).unwrap_or(file);

    let namespace = nvme_async::open(&url).await?;
    let model = namespace.controller().identify().model_number();
    println!("{url}: {model}, {} MiB", namespace.capacity() >> 20);

    run("write", &namespace, write).await?;
    namespace.flush().await?;
    run("read", &namespace, read).await?;

    // In order: waits for what is in flight, flushes the controller's cache, frees everything.
    namespace.controller().shutdown().await?;
    println!(
        "all {} blocks held what was written to them",
        TASKS * BLOCKS
    );
    Ok(())
}

/// Writes the blocks of one task and returns how long each write took.
async fn write(namespace: Namespace, task: u64) -> Result<Vec<Duration>> {
    let mut latencies = Vec::new();
    // Memory that the device reaches without a copy. Each write takes it and gives it back.
    let mut buffer = namespace.allocate(BLOCK)?;
    for block in task * BLOCKS..(task + 1) * BLOCKS {
        buffer.copy_from_slice(&contents(block));
        let start = Instant::now();
        buffer = namespace.write(block * BLOCK as u64, buffer).await?;
        latencies.push(start.elapsed());
    }
    Ok(latencies)
}

/// Reads blocks of all tasks in random order, checks them, and returns how long each read took.
async fn read(namespace: Namespace, task: u64) -> Result<Vec<Duration>> {
    let mut latencies = Vec::new();
    let mut random = fastrand::Rng::with_seed(task);
    for _ in 0..READS {
        let block = random.u64(..TASKS * BLOCKS);
        let start = Instant::now();
        let bytes = namespace.read(block * BLOCK as u64, BLOCK).await?;
        latencies.push(start.elapsed());
        if bytes != contents(block) {
            return Err(format!("block {block} does not hold what was written to it").into());
        }
    }
    Ok(latencies)
}

/// What belongs into a block: words that differ from all others of the run.
fn contents(block: u64) -> Vec<u8> {
    let first = block * BLOCK as u64;
    (0..BLOCK as u64 / 8)
        .flat_map(|word| (first + word).to_le_bytes())
        .collect()
}

/// Runs `work` in all tasks at once and prints how fast they were.
async fn run<F>(name: &str, namespace: &Namespace, work: fn(Namespace, u64) -> F) -> Result<()>
where
    F: Future<Output = Result<Vec<Duration>>> + Send + 'static,
{
    let start = Instant::now();
    let mut tasks: JoinSet<_> = (0..TASKS)
        .map(|task| work(namespace.clone(), task))
        .collect();
    let mut latencies = Vec::new();
    while let Some(finished) = tasks.join_next().await {
        latencies.extend(finished??);
    }
    let iops = latencies.len() as f64 / start.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let percentile = |percent| latencies[(latencies.len() - 1) * percent / 100];
    let (p50, p99) = (percentile(50), percentile(99));
    println!("{name:>5}: {iops:>9.0} IOPS, latency p50 {p50:.1?}, p99 {p99:.1?}");
    Ok(())
}
