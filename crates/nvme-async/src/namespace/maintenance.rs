//! Flush, Write Zeroes, Dataset Management, and waiting for all commands.

use std::ops::Range;

use nvme_spec::{Sqe, dsm, nvm};
use zerocopy::IntoBytes;

use super::NamespaceInner;
use crate::controller::choose_queue;
use crate::engine::QueueAccess;
use crate::engine::submission::Drain;
use crate::error::CommandError;
use crate::io::split::split;
use crate::io::{End, Flow, Order, Part, Payload, Write};
use crate::memory::DmaBuf;
use crate::{CommandName, Error};

/// Bytes of a write of zeroes for a controller without Write Zeroes.
const ZEROES: u64 = 128 * 1024;

/// What may become of blocks that are to read as zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Zeroes {
    /// They stay allocated, so that later writes to them can't fail for lack of space.
    #[default]
    Allocated,
    /// They may be deallocated where deallocated blocks read as zeroes.
    MayDeallocate,
}

impl NamespaceInner {
    pub(super) async fn flush<Q: QueueAccess>(&self, queues: &[Q]) -> Result<(), Error> {
        self.controller.check_open()?;
        if !self.has_volatile_cache() {
            return Ok(());
        }
        let flush = nvm::flush(self.nsid);
        self.command(choose_queue(queues), flush, "Flush", None, true)
            .await
    }

    pub(super) async fn write_zeroes<Q: QueueAccess>(
        self: &std::sync::Arc<Self>,
        queues: &[Q],
        offset: u64,
        len: u64,
        zeroes: Zeroes,
    ) -> Result<(), Error> {
        let blocks = self.blocks(offset, len)?;
        if !self
            .controller
            .inner
            .identify
            .optional_nvm_commands()
            .write_zeroes()
        {
            return self.write_plain_zeroes(queues, offset, len).await;
        }
        let deallocate =
            zeroes == Zeroes::MayDeallocate && self.identify.write_zeroes_deallocates();
        let queue = choose_queue(queues);
        for part in split(blocks, self.zeroing_limits()) {
            let count = (part.end - part.start) as u32;
            let sqe = nvm::write_zeroes(self.nsid, part.start, count, deallocate, false);
            let repeatable = self.repeats_writes();
            self.command(queue, sqe, "Write Zeroes", Some(part), repeatable)
                .await?;
        }
        Ok(())
    }

    pub(super) async fn discard<Q: QueueAccess>(
        &self,
        queues: &[Q],
        ranges: &[Range<u64>],
    ) -> Result<(), Error> {
        if !self
            .controller
            .inner
            .identify
            .optional_nvm_commands()
            .dataset_management()
        {
            return Err(Error::Unsupported {
                address: self.address().to_owned(),
                what: "Dataset Management",
            });
        }
        let mut all = Vec::with_capacity(ranges.len());
        for range in ranges {
            let len = range.end.saturating_sub(range.start);
            all.push(self.blocks(range.start, len)?);
        }
        let queue = choose_queue(queues);
        let limits = self.controller.inner.limits;
        for batch in batches(
            &all,
            limits.discard_ranges,
            limits.discard_range_blocks,
            limits.discard_blocks,
        ) {
            let bytes = batch.as_bytes();
            let mut buffer = match self.dma().buffer(bytes.len()) {
                Ok(buffer) => buffer,
                Err(Error::Memory(_)) => DmaBuf::heap(bytes.len()),
                Err(error) => return Err(error),
            };
            buffer.copy_from_slice(bytes);
            let order = Order {
                sqe: nvm::dataset_management(self.nsid, batch.len() as u32, true),
                flow: Flow::Write,
                range: 0..bytes.len(),
                timeout: self.timeout(),
                repeatable: self.repeats_writes(),
            };
            let (end, _) = Part::new(self.dma(), queue, order, Payload::Dma(buffer)).await;
            self.result(end, "Dataset Management", None)?;
        }
        Ok(())
    }

    pub(super) async fn quiesce<Q: QueueAccess>(&self, queues: &[Q]) -> Result<(), Error> {
        // All of them take their mark now, not one after the other.
        futures::future::try_join_all(queues.iter().map(Drain::new))
            .await
            .map(drop)
            .map_err(|failed| failed.into_error(self.name("quiesce", None)))
    }

    async fn write_plain_zeroes<Q: QueueAccess>(
        self: &std::sync::Arc<Self>,
        queues: &[Q],
        offset: u64,
        len: u64,
    ) -> Result<(), Error> {
        let mut buffer = self
            .dma()
            .read_buffer(len.min(ZEROES.max(self.block_size().into())) as usize)?;
        buffer.fill(0);
        let mut done = 0;
        while done < len {
            buffer.truncate((len - done).min(buffer.len() as u64) as usize);
            let now = buffer.len() as u64;
            buffer = Write::new(self, queues, offset + done, buffer).await?;
            done += now;
        }
        Ok(())
    }

    async fn command<Q: QueueAccess>(
        &self,
        queue: &Q,
        sqe: Sqe,
        name: &'static str,
        blocks: Option<Range<u64>>,
        repeatable: bool,
    ) -> Result<(), Error> {
        let command = crate::engine::state::Command {
            sqe,
            holdings: crate::io::Holdings::default(),
            timeout: self.timeout(),
            repeatable,
        };
        let (result, _) = crate::engine::Submission::new(queue, command).await;
        let end = match result {
            Ok(cqe) if cqe.status().is_success() => End::Success,
            Ok(cqe) => End::Status(cqe.status()),
            Err(failed) => End::Failed(failed),
        };
        self.result(end, name, blocks)
    }

    /// How a command ended, for its caller.
    pub(crate) fn result(
        &self,
        end: End,
        name: &'static str,
        blocks: Option<Range<u64>>,
    ) -> Result<(), Error> {
        match end {
            End::Success => Ok(()),
            End::Status(status) => Err(Box::new(CommandError {
                command: self.name(name, blocks),
                status,
            })
            .into()),
            End::Failed(failed) => Err(failed.into_error(self.name(name, blocks))),
            End::Unsubmitted(error) => Err(error),
        }
    }

    fn name(&self, name: &'static str, blocks: Option<Range<u64>>) -> CommandName {
        CommandName {
            address: self.address().to_owned(),
            name,
            nsid: Some(self.nsid),
            blocks,
        }
    }
}

/// Distributes ranges of blocks over as few commands as the controller's limits allow.
fn batches(
    ranges: &[Range<u64>],
    max_ranges: usize,
    max_range_blocks: u64,
    max_blocks: u64,
) -> Vec<Vec<dsm::Range>> {
    let mut batches: Vec<Vec<dsm::Range>> = Vec::new();
    let mut room = 0;
    for range in ranges {
        let mut next = range.start;
        while next < range.end {
            let full = batches.last().is_none_or(|batch| batch.len() >= max_ranges);
            if full || room == 0 {
                batches.push(Vec::new());
                room = max_blocks;
            }
            let count = (range.end - next).min(max_range_blocks).min(room);
            if let Some(batch) = batches.last_mut() {
                // At most max_range_blocks, which fits 32 bits.
                batch.push(dsm::Range::new(next, count as u32));
            }
            room -= count;
            next += count;
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn batches_hold_all_blocks_within_the_limits(
            lens in prop::collection::vec((0..1000u64, 1..5000u64), 0..40),
            max_ranges in 1..20usize,
            max_range_blocks in 1..3000u64,
            max_blocks in 1..20_000u64,
        ) {
            let ranges: Vec<_> = lens.iter().map(|&(start, len)| start..start + len).collect();
            let batches = batches(&ranges, max_ranges, max_range_blocks, max_blocks);
            let mut expected: Vec<u64> = ranges.iter().cloned().flatten().collect();
            let mut found = Vec::new();
            for batch in &batches {
                prop_assert!(!batch.is_empty() && batch.len() <= max_ranges);
                let blocks: u64 = batch.iter().map(|range| u64::from(range.blocks.get())).sum();
                prop_assert!(blocks <= max_blocks);
                for range in batch {
                    let len = u64::from(range.blocks.get());
                    prop_assert!(len > 0 && len <= max_range_blocks);
                    found.extend(range.slba.get()..range.slba.get() + len);
                }
            }
            expected.sort_unstable();
            found.sort_unstable();
            prop_assert_eq!(found, expected);
        }
    }
}
