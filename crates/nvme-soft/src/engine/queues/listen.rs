//! What the host is to be asked about the doorbells of the queues that there are.

use nvme_spec::registers::DoorbellKind;

use super::{QueueError, Queues};
use crate::doorbells::HostDoorbells;

impl Queues {
    /// The doorbells of all queues, with the values that were seen last.
    pub(crate) fn seen_doorbells(&self) -> Vec<(u16, DoorbellKind, u32)> {
        let submission = (0..).zip(&self.submission).filter_map(|(id, queue)| {
            let seen = queue.as_ref()?.doorbell;
            Some((id, DoorbellKind::SubmissionTail, seen))
        });
        let completion = (0..).zip(&self.completion).filter_map(|(id, queue)| {
            let seen = queue.as_ref()?.seen_head();
            Some((id, DoorbellKind::CompletionHead, seen))
        });
        submission.chain(completion).collect()
    }

    /// Asks the host to write the registers of the doorbells that the controller is about to wait
    /// for: new commands, and room where something waits for it.
    pub(crate) fn listen(&self, doorbells: &mut HostDoorbells) -> Result<(), QueueError> {
        if !doorbells.has_buffers() {
            return Ok(());
        }
        for &id in &self.active {
            if let Some(queue) = &self.submission[usize::from(id)] {
                doorbells
                    .listen(id, DoorbellKind::SubmissionTail, queue.doorbell)
                    .map_err(|_| QueueError::HostMemory)?;
            }
        }
        for &id in &self.congested {
            if let Some(queue) = &self.completion[usize::from(id)] {
                doorbells
                    .listen(id, DoorbellKind::CompletionHead, queue.seen_head())
                    .map_err(|_| QueueError::HostMemory)?;
            }
        }
        Ok(())
    }
}
