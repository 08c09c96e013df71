//! I/O queue pairs, and how their doorbells and interrupts go.

use std::sync::Arc;
use std::time::Duration;

use nvme_spec::admin::{doorbell_buffer_config, set_features};
use nvme_spec::feature::{self, InterruptCoalescing};
use nvme_spec::identify::IdentifyController;
use nvme_spec::registers::{DoorbellKind, doorbell_buffer_offset, doorbell_offset};

use super::{Admin, BringUp};
use crate::Error;
use crate::engine::state::Core;
use crate::engine::{PollMode, QueueSettings, SharedQueue, State};
use crate::memory::DmaWords;
use crate::queue::{CompletionRing, DoorbellBuffers, QueueCore, QueueDoorbell, SubmissionRing};
use crate::recovery::QueueLayout;

impl BringUp<'_> {
    /// Has the controller put interrupts off, if that is wanted; returns what it was told.
    pub(super) async fn coalesce_interrupts(&self, admin: &Admin) -> Option<InterruptCoalescing> {
        let coalescing = self.options.coalescing;
        if coalescing == InterruptCoalescing::new() {
            return None;
        }
        let value = coalescing.into_bits();
        let set = set_features(feature::id::INTERRUPT_COALESCING, value, false);
        match admin.run(set).await {
            Ok(_) => Some(coalescing),
            Err(error) => {
                tracing::warn!(%error, "the controller does not coalesce interrupts");
                None
            }
        }
    }

    /// Leaves doorbells in memory, if the controller offers that and all queues have room there.
    pub(super) async fn share_doorbells(
        &self,
        admin: &Admin,
        identify: &IdentifyController,
    ) -> Result<Option<Arc<DoorbellBuffers>>, Error> {
        let (last, dstrd) = (self.options.queue_pairs(), self.capabilities.dstrd());
        let end = doorbell_buffer_offset(last, DoorbellKind::CompletionHead, dstrd);
        let offered = identify.optional_admin_commands().doorbell_buffer_config();
        if !self.options.shadow_doorbells || !offered || !DoorbellBuffers::holds(end) {
            return Ok(None);
        }
        let buffers = DoorbellBuffers::new(&self.pool)?;
        let (values, event_index) = buffers.iovas();
        match admin.run(doorbell_buffer_config(values, event_index)).await {
            Ok(_) => Ok(Some(buffers)),
            // With any other outcome it may look for them there, and this bring-up ends: their memory is
            // the pool's, which outlives the controller.
            Err(Error::Command(error)) => {
                tracing::debug!(%error, "doorbells are not left in memory");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Creates as many I/O queue pairs as are wanted and granted.
    pub(super) async fn create_queues(
        &self,
        admin: &Admin,
        retry_delays: [Duration; 3],
        buffers: Option<&Arc<DoorbellBuffers>>,
    ) -> Result<Vec<(QueueLayout, Arc<SharedQueue>)>, Error> {
        let wanted = self.options.queue_pairs();
        let granted = admin.request_queue_pairs(wanted).await?;
        let entries = self
            .capabilities
            .max_queue_entries()
            .min(self.options.queue_entries.into())
            .min(u16::MAX.into()) as u16;
        let vectors = self.registers.device.vectors();
        let settings = self.queue_settings(retry_delays);
        // The one with the interrupt comes first.
        let mode_of = |id| match settings.mode {
            PollMode::Paired if id % 2 == 1 => PollMode::Interrupt,
            mode => mode,
        };
        let mut queues: Vec<(QueueLayout, Arc<SharedQueue>)> = Vec::with_capacity(granted.into());
        for id in 1..=granted {
            let (submission, completion) = self.ring_memory(entries)?;
            // Vector 0 is the admin queue's, and shared only if there is no other.
            let vector = match vectors.len() {
                1 => 0,
                count => 1 + usize::from(id - 1) % (count - 1),
            };
            let settings = QueueSettings {
                mode: mode_of(id),
                ..settings
            };
            let layout = QueueLayout {
                id,
                entries,
                submission: submission.iova(),
                completion: completion.iova(),
                vector: settings.mode.has_interrupt().then_some(vector as u16),
            };
            let core = self.core(id, entries, submission, completion, buffers)?;
            let mut state = State::new(core, settings);
            let is_alone = usize::from(granted) < vectors.len();
            if settings.mode == PollMode::Adaptive && is_alone {
                let mask = self.registers.device.vector_mask(vector as u16);
                let wanted = self.options.mask_interrupts;
                mask.filter(|mask| wanted.unwrap_or_else(|| mask.is_exclusive()))
                    .into_iter()
                    .for_each(|mask| state.mask_by(mask));
            }
            let queue = SharedQueue::new(state, vectors[vector].clone());
            if settings.mode == PollMode::Paired
                && let Some((_, interrupting)) = queues.last()
            {
                interrupting.pair_with(&queue);
            }
            queues.push((layout, queue));
            admin.run(layout.create_completion_queue()).await?;
            admin.run(layout.create_submission_queue()).await?;
        }
        Ok(queues)
    }

    pub(super) fn ring_memory(&self, entries: u16) -> Result<(DmaWords, DmaWords), Error> {
        let submission = DmaWords::new(&self.pool, usize::from(entries) * 16)?;
        let completion = DmaWords::new(&self.pool, usize::from(entries) * 4)?;
        Ok((submission, completion))
    }

    pub(super) fn core(
        &self,
        id: u16,
        entries: u16,
        submission: DmaWords,
        completion: DmaWords,
        buffers: Option<&Arc<DoorbellBuffers>>,
    ) -> Result<Core, Error> {
        let dstrd = self.capabilities.dstrd();
        let doorbell = |kind| {
            let offset = doorbell_offset(id, kind, dstrd);
            let register = self.registers.device.doorbell(offset)?;
            Ok::<_, Error>(match buffers {
                None => QueueDoorbell::new(register),
                Some(buffers) => {
                    let offset = doorbell_buffer_offset(id, kind, dstrd);
                    QueueDoorbell::with_shadow(register, buffers.clone(), offset)
                }
            })
        };
        Ok(QueueCore::new(
            id,
            entries,
            SubmissionRing::new(submission, doorbell(DoorbellKind::SubmissionTail)?, entries),
            CompletionRing::new(completion, doorbell(DoorbellKind::CompletionHead)?, entries),
        ))
    }
}
