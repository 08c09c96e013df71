//! Creation and deletion of I/O queues (base specification 2.0, sections 5.4 to 5.7).

use nvme_spec::{DataPointer, Sqe, Status};

use crate::engine::{Engine, Outcome};

/// PC in command dword 11: the queue is physically contiguous.
const CONTIGUOUS: u32 = 1 << 0;
/// The sizes of queue entries that CC must hold by now: 64 and 16 bytes.
const ENTRY_SIZES: (u8, u8) = (6, 4);

impl Engine {
    pub(super) fn create_completion_queue(&mut self, command: &Sqe) -> Outcome {
        /// IEN in command dword 11.
        const INTERRUPTS: u32 = 1 << 1;
        let id = queue_id(command)?;
        if u32::from(id) > self.admin.features.completion_queues()
            || self.queues.completion(id).is_some()
        {
            return Err(Status::INVALID_QUEUE_ID);
        }
        let (address, entries) = self.new_queue_memory(command)?;
        let vector = (command.cdw11() & INTERRUPTS != 0).then_some((command.cdw11() >> 16) as u16);
        if vector.is_some_and(|vector| vector >= self.interrupts.count()) {
            return Err(Status::INVALID_INTERRUPT_VECTOR);
        }
        self.queues
            .create_completion(&mut self.doorbells, id, address, entries, vector);
        Ok(0)
    }

    pub(super) fn create_submission_queue(&mut self, command: &Sqe) -> Outcome {
        let id = queue_id(command)?;
        if u32::from(id) > self.admin.features.submission_queues()
            || self.queues.submission(id).is_some()
        {
            return Err(Status::INVALID_QUEUE_ID);
        }
        let completion_queue = (command.cdw11() >> 16) as u16;
        if completion_queue == 0
            || u32::from(completion_queue) > self.admin.features.completion_queues()
        {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if self.queues.completion(completion_queue).is_none() {
            return Err(Status::COMPLETION_QUEUE_INVALID);
        }
        // The priority means something only with an arbitration that is not supported.
        let (address, entries) = self.new_queue_memory(command)?;
        self.queues
            .create_submission(&mut self.doorbells, id, address, entries, completion_queue);
        Ok(0)
    }

    pub(super) fn delete_submission_queue(&mut self, command: &Sqe) -> Outcome {
        let id = queue_id(command)?;
        if self.queues.submission(id).is_none() {
            return Err(Status::INVALID_QUEUE_ID);
        }
        self.abort_queue(id);
        self.queues.delete_submission(&self.doorbells, id);
        Ok(0)
    }

    pub(super) fn delete_completion_queue(&mut self, command: &Sqe) -> Outcome {
        let id = queue_id(command)?;
        let queue = self.queues.completion(id).ok_or(Status::INVALID_QUEUE_ID)?;
        if queue.users > 0 {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        let vector = queue.vector;
        self.queues.delete_completion(&self.doorbells, id);
        if let Some(vector) = vector {
            self.end_vector(vector);
        }
        Ok(0)
    }

    /// Address and number of entries of a queue that is to be created.
    fn new_queue_memory(&self, command: &Sqe) -> Result<(u64, u32), Status> {
        let entries = (command.cdw10() >> 16) + 1;
        if entries < 2 || entries > self.config.max_queue_entries {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if self.entry_sizes() != ENTRY_SIZES {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        // CAP.CQR says that queues are contiguous.
        if command.cdw11() & CONTIGUOUS == 0 {
            return Err(Status::INVALID_FIELD);
        }
        let Ok(DataPointer::Prp { prp1, .. }) = command.data_pointer() else {
            return Err(Status::INVALID_FIELD);
        };
        if !prp1.is_multiple_of(self.limits.page_size) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        Ok((prp1, entries))
    }
}

/// The identifier of an I/O queue in command dword 10.
fn queue_id(command: &Sqe) -> Result<u16, Status> {
    match command.cdw10() as u16 {
        0 => Err(Status::INVALID_QUEUE_ID),
        id => Ok(id),
    }
}
