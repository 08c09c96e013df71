//! Doorbell Buffer Config (base specification 2.0, section 5.8).

use nvme_spec::{DataPointer, Sqe, Status};

use crate::engine::{Engine, Outcome};

impl Engine {
    /// Whoever sends this again moves the buffers.
    pub(super) fn doorbell_buffer_config(&mut self, command: &Sqe) -> Outcome {
        let Ok(DataPointer::Prp { prp1, prp2 }) = command.data_pointer() else {
            return Err(Status::INVALID_FIELD);
        };
        let page = self.limits.page_size;
        if !prp1.is_multiple_of(page) || !prp2.is_multiple_of(page) {
            return Err(Status::INVALID_FIELD);
        }
        let seen = self.queues.seen_doorbells();
        // Whatever is wrong with the addresses, there is one status for that.
        self.doorbells
            .set_up(self.dma.clone(), prp1, prp2, &seen)
            .map_err(|_| Status::INVALID_FIELD)?;
        Ok(0)
    }
}
