//! The two passes of `--verify` over the whole region: writing all of it before a run, and
//! reading back after a run what was written.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use indicatif::ProgressBar;
use tokio::task::JoinSet;
use tokio::task::coop::consume_budget;

use super::ledger::{Claim, Contents};
use super::pattern::{self, Origin};
use super::plan::{PASS_BYTES, PASS_TASKS, Plan};
use super::worker::{Shared, Tally, TaskError, Verification};
use crate::failure::Failure;
use crate::progress;

/// Writes every block of the region.
pub(super) async fn fill(shared: &Arc<Shared>) -> Result<(), Failure> {
    let bar = progress::transfer("writing the region", shared.plan.size());
    let filled = sweep(shared, &bar, |shared, blocks| async move {
        fill_chunk(&shared, blocks).await.map(|()| 0)
    })
    .await;
    bar.finish_and_clear();
    let (_, errors) = filled?;
    match errors {
        0 => Ok(()),
        _ => {
            let first = shared.first_error.get().map_or("", String::as_str);
            Err(Failure::operation(format_args!(
                "writing the region first: {first}"
            )))
        }
    }
}

/// Reads every block that the run wrote; returns how many there were, and how many errors.
pub(super) async fn read_back(shared: &Arc<Shared>) -> Result<(u64, u64), Failure> {
    let bar = progress::transfer("reading back", shared.plan.size());
    let checked = sweep(shared, &bar, check_chunk).await;
    bar.finish_and_clear();
    checked
}

/// Calls `chunk` for all blocks of the region, with several calls under way; returns the sum of
/// its results and the number of errors.
async fn sweep<F>(
    shared: &Arc<Shared>,
    bar: &ProgressBar,
    chunk: impl Fn(Arc<Shared>, Range<u64>) -> F + Copy + Send + 'static,
) -> Result<(u64, u64), Failure>
where
    F: Future<Output = Result<u64, ChunkErrors>> + Send + 'static,
{
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..PASS_TASKS {
        let (shared, next, bar) = (shared.clone(), next.clone(), bar.clone());
        tasks.spawn(async move {
            let tally = Tally::default();
            let chunk_blocks = chunk_blocks(&shared.plan);
            let mut sum = 0;
            loop {
                let first = next.fetch_add(chunk_blocks, Ordering::Relaxed);
                let end = (first + chunk_blocks).min(shared.plan.blocks);
                if first >= end {
                    break;
                }
                match chunk(shared.clone(), first..end).await {
                    Ok(done) => sum += done,
                    Err(errors) => {
                        sum += errors.done;
                        errors
                            .all
                            .iter()
                            .for_each(|error| shared.report(&tally, error));
                        if errors.all.iter().any(TaskError::is_final) {
                            break;
                        }
                    }
                }
                bar.inc((end - first) * shared.plan.bs as u64);
                consume_budget().await;
            }
            (sum, tally.errors())
        });
    }
    let mut total = (0, 0);
    while let Some(joined) = tasks.join_next().await {
        let (sum, errors) = joined.map_err(Failure::operation)?;
        total = (total.0 + sum, total.1 + errors);
    }
    Ok(total)
}

/// What failed in a chunk, and how many blocks of it were fine.
struct ChunkErrors {
    done: u64,
    all: Vec<TaskError>,
}

impl From<TaskError> for ChunkErrors {
    fn from(error: TaskError) -> Self {
        Self {
            done: 0,
            all: vec![error],
        }
    }
}

fn chunk_blocks(plan: &Plan) -> u64 {
    (PASS_BYTES / plan.bs).max(1) as u64
}

async fn fill_chunk(shared: &Shared, blocks: Range<u64>) -> Result<(), ChunkErrors> {
    let Shared {
        plan, namespace, ..
    } = shared;
    let Some(verification) = &shared.verification else {
        return Ok(());
    };
    let offset = plan.offset_of(blocks.start);
    let len = (blocks.end - blocks.start) as usize * plan.bs;
    let mut buffer = namespace.allocate(len).map_err(TaskError::Memory)?;
    let mut claims = Vec::new();
    for (data, block) in buffer.chunks_exact_mut(plan.bs).zip(blocks) {
        // The run has not begun, so that all blocks are free.
        if let Some(claim) = verification.ledger.claim(block) {
            let sequence = claim.next_sequence();
            let origin = Origin {
                run: verification.run,
                sequence,
            };
            pattern::stamp(data, plan.block_size, plan.offset_of(block), origin);
            claims.push((claim, Contents::Written { sequence }));
        }
    }
    namespace
        .write(offset, buffer)
        .await
        .map_err(|error| TaskError::Io(error.error))?;
    claims
        .into_iter()
        .for_each(|(claim, contents)| claim.release(contents));
    Ok(())
}

async fn check_chunk(shared: Arc<Shared>, blocks: Range<u64>) -> Result<u64, ChunkErrors> {
    let Shared {
        plan, namespace, ..
    } = &*shared;
    let Some(verification) = &shared.verification else {
        return Ok(0);
    };
    let written: Vec<_> = blocks
        .clone()
        .filter_map(|block| Some((block, written(verification, block)?)))
        .collect();
    if written.is_empty() {
        return Ok(0);
    }
    let offset = plan.offset_of(blocks.start);
    let len = (blocks.end - blocks.start) as usize * plan.bs;
    let buffer = namespace.allocate(len).map_err(TaskError::Memory)?;
    let buffer = namespace
        .read_into(offset, buffer)
        .await
        .map_err(|error| TaskError::Io(error.error))?;
    let mut errors = ChunkErrors {
        done: 0,
        all: Vec::new(),
    };
    for (block, (claim, sequence)) in written {
        let start = (block - blocks.start) as usize * plan.bs;
        let data = &buffer[start..start + plan.bs];
        let origin = Origin {
            run: verification.run,
            sequence,
        };
        match pattern::check(data, plan.block_size, plan.offset_of(block), Some(origin)) {
            Ok(()) => errors.done += 1,
            Err(mismatch) => errors.all.push(TaskError::Mismatch(mismatch)),
        }
        claim.release(Contents::Written { sequence });
    }
    if errors.all.is_empty() {
        Ok(errors.done)
    } else {
        Err(errors)
    }
}

/// The last write of a block, if it is known. Writes that may still be under way have their
/// blocks claimed for ever.
fn written(verification: &Verification, block: u64) -> Option<(Claim<'_>, u32)> {
    let claim = verification.ledger.claim(block)?;
    match claim.contents() {
        Contents::Written { sequence } => Some((claim, sequence)),
        Contents::Unknown => {
            claim.release(Contents::Unknown);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Workload;
    use super::super::testing::{Disk, close, shared};
    use super::*;

    const WORKLOAD: Workload = Workload::Write;

    #[tokio::test]
    async fn what_was_filled_reads_back() {
        // The last chunk is a short one.
        let shared = shared("mem:?size=1000k", 4096, WORKLOAD).await;
        fill(&shared).await.expect("fill");
        assert_eq!(read_back(&shared).await.expect("read back"), (250, 0));
        close(&shared).await;
    }

    #[tokio::test]
    async fn what_was_never_written_is_not_checked() {
        let shared = shared("mem:?size=1M", 4096, WORKLOAD).await;
        assert_eq!(read_back(&shared).await.expect("read back"), (0, 0));
        fill_chunk(&shared, 3..5).await.ok().expect("two blocks");
        assert_eq!(read_back(&shared).await.expect("read back"), (2, 0));
        close(&shared).await;
    }

    #[tokio::test]
    async fn blocks_larger_than_a_chunk() {
        let shared = shared("mem:?size=4M&lba=4096", 1 << 20, WORKLOAD).await;
        fill(&shared).await.expect("fill");
        assert_eq!(read_back(&shared).await.expect("read back"), (4, 0));
        close(&shared).await;
    }

    #[tokio::test]
    async fn damage_to_the_file_is_found() {
        let disk = Disk::new();
        let shared = shared(&disk.url("256k"), 4096, WORKLOAD).await;
        fill(&shared).await.expect("fill");

        // One byte, a block in the place of another one, and a block of zeroes.
        let block = disk.read(5 * 4096, 4096);
        disk.write(5 * 4096 + 1234, &[block[1234] ^ 1]);
        disk.write(10 * 4096, &disk.read(9 * 4096, 4096));
        disk.write(20 * 4096, &[0; 4096]);

        assert_eq!(read_back(&shared).await.expect("read back"), (61, 3));
        assert!(shared.first_error.get().is_some());
        close(&shared).await;
    }
}
