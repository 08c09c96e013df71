//! Copy: the controller moves blocks of its own (NVM command set specification 1.0, section 3.2.2).

use std::ops::Range;

use nvme_spec::copy::SourceRange;
use nvme_spec::identify::IdentifyNamespace;
use nvme_spec::nvm;
use zerocopy::IntoBytes;

use super::NamespaceInner;
use super::batches::{BatchLimits, batches};
use crate::Error;
use crate::controller::choose_queue;
use crate::engine::QueueAccess;

impl NamespaceInner {
    pub(super) async fn copy<Q: QueueAccess>(
        &self,
        queues: &[Q],
        sources: &[Range<u64>],
        destination: u64,
    ) -> Result<(), Error> {
        self.require("Copy", |commands| commands.copy())?;
        let limits = limits_of(&self.identify())
            .ok_or_else(|| self.unsupported("Copy of any block (MSSRL or MCL is 0)"))?;
        let mut all = Vec::with_capacity(sources.len());
        let mut len = 0u64;
        for source in sources {
            let source_len = source.end.saturating_sub(source.start);
            all.push(self.blocks(source.start, source_len)?);
            // Too much for the destination in any case.
            len = len.saturating_add(source_len);
        }
        if all.is_empty() {
            return Ok(());
        }
        let blocks = self.blocks(destination, len)?;
        // Its effect would depend on how the controller copies, and on where the request is split.
        let overlaps =
            |source: &&Range<u64>| source.start < blocks.end && blocks.start < source.end;
        if let Some(source) = all.iter().find(overlaps) {
            let shift = self.block_shift;
            return Err(Error::Overlap {
                range: source.start << shift..source.end << shift,
                destination: destination..destination + len,
            });
        }
        let queue = choose_queue(queues);
        let mut next = blocks.start;
        // At most MSSRL blocks, which fits 16 bits.
        let entry = |start, count| SourceRange::new(start, count as u32);
        for batch in batches(&all, limits, entry) {
            let start = next;
            next += batch
                .iter()
                .map(|range| u64::from(range.blocks()))
                .sum::<u64>();
            let sqe = nvm::copy(self.nsid, start, batch.len() as u32, false);
            self.list_command(queue, sqe, batch.as_bytes(), "Copy", Some(start..next))
                .await?;
        }
        Ok(())
    }
}

/// The limits that a namespace states; nothing if they allow no block at all.
fn limits_of(identify: &IdentifyNamespace) -> Option<BatchLimits> {
    let range_blocks = u64::from(identify.mssrl.get());
    let blocks = u64::from(identify.mcl.get());
    (range_blocks != 0 && blocks != 0).then(|| BatchLimits {
        ranges: identify.max_copy_ranges().into(),
        range_blocks,
        blocks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_allows_no_block_has_no_copy() {
        let mut identify = IdentifyNamespace::default();
        for (mssrl, mcl) in [(0, 0), (0, 128), (128, 0)] {
            (identify.mssrl, identify.mcl) = (mssrl.into(), mcl.into());
            assert!(limits_of(&identify).is_none());
        }
        (identify.mssrl, identify.mcl, identify.msrc) = (0xffff.into(), 1.into(), 0xff);
        let limits = limits_of(&identify).expect("there are some");
        assert_eq!(
            (limits.ranges, limits.range_blocks, limits.blocks),
            (256, 0xffff, 1)
        );
    }
}
