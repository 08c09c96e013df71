//! The commands of the admin queue (base specification 2.0, section 5).

mod doorbells;
pub(crate) mod events;
pub(crate) mod features;
pub(crate) mod health;
mod identify;
mod log;
mod queues;

use nvme_spec::opcode::AdminOpcode;
use nvme_spec::{DataPointer, Sqe, Status};

use self::events::Events;
use self::features::Features;
use self::health::Health;
use self::log::{ChangedNamespaceLog, ErrorLog};
use crate::config::Config;
use crate::data::Flow;
use crate::engine::{Engine, Outcome, Reply};

/// State of the admin commands.
pub(crate) struct Admin {
    pub(crate) events: Events,
    pub(crate) features: Features,
    pub(crate) health: Health,
    pub(crate) changed_namespaces: ChangedNamespaceLog,
    errors: ErrorLog,
    /// Abort commands of the batch that is being served: those were outstanding together.
    aborts: u32,
}

impl Admin {
    pub(crate) fn new(config: &Config, namespaces: u32, vectors: u16) -> Self {
        Self {
            events: Events::new(config.async_event_limit),
            features: Features::new(config, namespaces, vectors),
            health: Health::new(),
            changed_namespaces: ChangedNamespaceLog::default(),
            errors: ErrorLog::new(),
            aborts: 0,
        }
    }

    /// A controller reset: features go back to their defaults and pending requests are forgotten.
    /// The logs stay.
    pub(crate) fn reset(&mut self, config: &Config) {
        self.events = Events::new(config.async_event_limit);
        self.features = self.features.defaults(config);
        self.health.reset();
        self.aborts = 0;
    }

    pub(crate) fn begin_batch(&mut self) {
        self.aborts = 0;
    }

    pub(crate) fn note_failure(&mut self, submission_queue: u16, command: &Sqe, status: Status) {
        self.errors.note_failure(submission_queue, command, status);
    }
}

impl Engine {
    /// Serves one command.
    pub(crate) fn admin_command(&mut self, command: &Sqe) -> Reply {
        let serve = match AdminOpcode(command.opcode()) {
            AdminOpcode::DELETE_IO_SUBMISSION_QUEUE => Self::delete_submission_queue,
            AdminOpcode::CREATE_IO_SUBMISSION_QUEUE => Self::create_submission_queue,
            AdminOpcode::GET_LOG_PAGE => Self::log_page,
            AdminOpcode::DELETE_IO_COMPLETION_QUEUE => Self::delete_completion_queue,
            AdminOpcode::CREATE_IO_COMPLETION_QUEUE => Self::create_completion_queue,
            AdminOpcode::IDENTIFY => Self::identify,
            AdminOpcode::ABORT => Self::abort,
            AdminOpcode::SET_FEATURES => Self::set_features,
            AdminOpcode::GET_FEATURES => Self::get_features,
            AdminOpcode::DOORBELL_BUFFER_CONFIG if self.config.doorbell_buffers => {
                Self::doorbell_buffer_config
            }
            AdminOpcode::ASYNC_EVENT_REQUEST => return self.async_event_request(command),
            _ => return Reply::Now(Err(Status::INVALID_OPCODE)),
        };
        // Admin commands are never fused, and over PCIe they use PRPs.
        if command.fuse() != 0 || command.psdt() != 0 {
            return Reply::Now(Err(Status::INVALID_FIELD));
        }
        Reply::Now(serve(self, command))
    }

    /// Answers with data of the length that the command asked for.
    fn answer(&mut self, command: &Sqe, data: &[u8]) -> Outcome {
        self.answer_padded(command, data, data.len() as u64)
    }

    /// Answers with `data`, cut or followed by zeros to be `len` bytes.
    fn answer_padded(&mut self, command: &Sqe, data: &[u8], len: u64) -> Outcome {
        const ZEROS: [u8; 4096] = [0; 4096];
        let pointer = command.data_pointer().map_err(|error| error.status())?;
        if !matches!(pointer, DataPointer::Prp { .. }) {
            return Err(Status::INVALID_FIELD);
        }
        self.transfer
            .prepare(&self.dma, pointer, Flow::ToHost, len, self.limits.page_size)?;
        let data = &data[..data.len().min(usize::try_from(len).unwrap_or(usize::MAX))];
        self.transfer.send(&self.dma, data)?;
        let mut left = len - data.len() as u64;
        while left > 0 {
            let part = left.min(ZEROS.len() as u64);
            self.transfer.send(&self.dma, &ZEROS[..part as usize])?;
            left -= part;
        }
        Ok(0)
    }

    fn abort(&mut self, command: &Sqe) -> Outcome {
        /// Dword 0 of the completion when the command was not aborted.
        const NOT_ABORTED: u32 = 1;
        self.admin.aborts += 1;
        let outstanding = self.admin.aborts as usize + self.waiting_aborts();
        if outstanding > usize::from(self.config.abort_limit) {
            return Err(Status::ABORT_LIMIT_EXCEEDED);
        }
        let submission_queue = command.cdw10() as u16;
        let cid = (command.cdw10() >> 16) as u16;
        if self.queues.submission(submission_queue).is_none() {
            return Err(Status::INVALID_FIELD);
        }
        let event_request = match submission_queue {
            0 => self.admin.events.abort(cid),
            _ => None,
        };
        let aborted = match event_request {
            Some(request) => {
                self.complete(0, &request, Err(Status::ABORT_REQUESTED));
                true
            }
            None => self.abort_waiting(submission_queue, cid),
        };
        Ok(if aborted { 0 } else { NOT_ABORTED })
    }
}
