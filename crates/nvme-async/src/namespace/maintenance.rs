//! Flush, Write Zeroes, Verify, Dataset Management, and waiting for all commands.

use std::ops::Range;

use nvme_spec::identify::OptionalNvmCommands;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Sqe, dsm, nvm};
use zerocopy::IntoBytes;

use super::NamespaceInner;
use super::batches::{BatchLimits, batches};
use crate::controller::choose_queue;
use crate::engine::state::Command;
use crate::engine::submission::Drain;
use crate::engine::{QueueAccess, Submission};
use crate::error::CommandError;
use crate::io::split::split;
use crate::io::{End, Flow, Holdings, Order, Part, Payload, Reason, Write};
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
        self.check_usable()?;
        if !self.has_volatile_cache() {
            return Ok(());
        }
        let flush = nvm::flush(self.nsid);
        self.command(choose_queue(queues), flush, "Flush", None)
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
        if !self.optional_commands().write_zeroes() {
            return self.write_plain_zeroes(queues, offset, len).await;
        }
        let deallocate = zeroes == Zeroes::MayDeallocate && self.live.zeroes_deallocate();
        let queue = choose_queue(queues);
        for part in split(blocks, self.zeroing_limits()) {
            let count = (part.end - part.start) as u32;
            let sqe = nvm::write_zeroes(self.nsid, part.start, count, deallocate, false);
            self.command(queue, sqe, "Write Zeroes", Some(part)).await?;
        }
        Ok(())
    }

    pub(super) async fn verify<Q: QueueAccess>(
        &self,
        queues: &[Q],
        offset: u64,
        len: u64,
    ) -> Result<(), Error> {
        self.require("Verify", |commands| commands.verify())?;
        let blocks = self.blocks(offset, len)?;
        let queue = choose_queue(queues);
        for part in split(blocks, self.verify_limits()) {
            let count = (part.end - part.start) as u32;
            let sqe = nvm::verify(self.nsid, part.start, count, false);
            self.command(queue, sqe, "Verify", Some(part)).await?;
        }
        Ok(())
    }

    pub(super) async fn discard<Q: QueueAccess>(
        &self,
        queues: &[Q],
        ranges: &[Range<u64>],
    ) -> Result<(), Error> {
        self.require("Dataset Management", |commands| {
            commands.dataset_management()
        })?;
        let mut all = Vec::with_capacity(ranges.len());
        for range in ranges {
            let len = range.end.saturating_sub(range.start);
            all.push(self.blocks(range.start, len)?);
        }
        let queue = choose_queue(queues);
        let limits = self.controller.inner.limits;
        let limits = BatchLimits {
            ranges: limits.discard_ranges,
            range_blocks: limits.discard_range_blocks,
            blocks: limits.discard_blocks,
        };
        // At most DMRSL blocks, which fits 32 bits.
        let entry = |start, count| dsm::Range::new(start, count as u32);
        for batch in batches(&all, limits, entry) {
            let sqe = nvm::dataset_management(self.nsid, batch.len() as u32, true);
            self.list_command(queue, sqe, batch.as_bytes(), "Dataset Management", None)
                .await?;
        }
        Ok(())
    }

    pub(super) async fn quiesce<Q: QueueAccess>(&self, queues: &[Q]) -> Result<(), Error> {
        let all = queues
            .iter()
            .flat_map(|queue| [Some(queue), queue.polled()]);
        // All of them take their mark now, not one after the other.
        futures::future::try_join_all(all.flatten().map(Drain::new))
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

    /// The optional commands that the controller has (ONCS).
    fn optional_commands(&self) -> OptionalNvmCommands {
        self.controller.inner.identify.optional_nvm_commands()
    }

    /// Refuses what needs an optional command that the controller does not have.
    pub(crate) fn require(
        &self,
        command: &'static str,
        is_there: impl FnOnce(OptionalNvmCommands) -> bool,
    ) -> Result<(), Error> {
        if is_there(self.optional_commands()) {
            Ok(())
        } else {
            Err(self.unsupported(command))
        }
    }

    pub(super) fn unsupported(&self, what: &'static str) -> Error {
        Error::Unsupported {
            address: self.address().to_owned(),
            what,
        }
    }

    /// Runs a command whose data is a list, at most 8 KiB.
    pub(super) async fn list_command<Q: QueueAccess>(
        &self,
        queue: &Q,
        sqe: Sqe,
        list: &[u8],
        name: &'static str,
        blocks: Option<Range<u64>>,
    ) -> Result<(), Error> {
        let mut buffer = match self.dma().buffer(list.len()) {
            Ok(buffer) => buffer,
            Err(Error::Memory(_)) => DmaBuf::heap(list.len()),
            Err(error) => return Err(error),
        };
        buffer.copy_from_slice(list);
        let order = Order {
            command: self.to_submit(sqe),
            flow: Flow::Write,
            range: 0..list.len(),
        };
        let (end, _) = Part::new(self.dma(), queue, order, Payload::Dma(buffer)).await;
        self.result(end, name, blocks)
    }

    async fn command<Q: QueueAccess>(
        &self,
        queue: &Q,
        sqe: Sqe,
        name: &'static str,
        blocks: Option<Range<u64>>,
    ) -> Result<(), Error> {
        let submission = Submission::new(queue, self.to_submit(sqe), Holdings::default());
        self.result(submission.await.into(), name, blocks)
    }

    fn to_submit(&self, sqe: Sqe) -> Command {
        Command {
            sqe,
            timeout: self.timeout(),
            repeatable: self.may_repeat(&sqe),
        }
    }

    /// Whether a command may be sent again although the device may have executed it.
    fn may_repeat(&self, sqe: &Sqe) -> bool {
        let only_asks = matches!(
            NvmOpcode(sqe.opcode()),
            NvmOpcode::FLUSH | NvmOpcode::VERIFY
        );
        only_asks || self.repeats_writes()
    }

    /// How a command ended, for its caller.
    pub(crate) fn result(
        &self,
        end: End,
        name: &'static str,
        blocks: Option<Range<u64>>,
    ) -> Result<(), Error> {
        let End::Failure(reason) = end else {
            return Ok(());
        };
        match *reason {
            Reason::Status(status) => Err(Box::new(CommandError {
                command: self.name(name, blocks),
                status,
            })
            .into()),
            Reason::Failed(failed) => Err(failed.into_error(self.name(name, blocks))),
            Reason::Unsubmitted(error) => Err(error),
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
