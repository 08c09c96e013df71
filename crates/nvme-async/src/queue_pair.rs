//! Raw commands on one queue pair.
#![expect(
    unsafe_code,
    reason = "a raw command can make the device write anywhere it reaches"
)]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use nvme_spec::{Cqe, Sqe};

use crate::engine::state::Command;
use crate::engine::{SharedQueue, Submission};
use crate::io::{Convert, Flow, Holdings, Payload};
use crate::memory::DmaBuf;
use crate::{CommandName, Controller, IoError};

/// A submission queue with its completion queue, as a handle whose futures resolve when commands
/// complete.
///
/// It is for commands that this crate has no function for; reads and writes are better made
/// through a [`Namespace`](crate::Namespace).
#[derive(Clone)]
pub struct QueuePair {
    controller: Controller,
    queue: Arc<SharedQueue>,
}

/// The data of a raw command.
#[derive(Debug)]
#[non_exhaustive]
pub enum CommandData {
    /// None.
    None,
    /// The device writes the buffer.
    FromDevice(DmaBuf),
    /// The device reads the buffer.
    ToDevice(DmaBuf),
}

/// A raw command that completed, with whatever status.
#[derive(Debug)]
#[non_exhaustive]
pub struct Completion {
    /// The completion queue entry.
    pub cqe: Cqe,
    /// The buffer.
    pub data: Option<DmaBuf>,
}

impl QueuePair {
    pub(crate) fn new(controller: Controller, queue: Arc<SharedQueue>) -> Self {
        Self { controller, queue }
    }

    /// Submits `command` and waits for its completion. The command identifier and data pointer
    /// are filled in. A completion with an error status is returned as any other.
    ///
    /// # Errors
    ///
    /// When there is no completion: the deadline (the controller's default) passed, the
    /// controller is gone or closed. The buffer comes back unless the device may still use it.
    ///
    /// # Cancel safety
    ///
    /// Nothing happens before the first poll. When it is dropped later, the command goes on and
    /// its buffer stays with the queue until it is done.
    ///
    /// # Safety
    ///
    /// The device does what the command says. The caller sees to it that the command
    ///
    /// * transfers no more bytes than `data` has, and in its direction;
    /// * does not create or delete queues, does not give the controller other host memory, and is
    ///   no asynchronous event request.
    pub async unsafe fn submit(
        &self,
        command: Sqe,
        data: CommandData,
    ) -> Result<Completion, IoError<DmaBuf>> {
        let dma = &self.controller.inner.dma;
        let (flow, buffer) = match data {
            CommandData::None => return self.run(command, Holdings::default(), None).await,
            CommandData::FromDevice(buffer) => (Flow::Read, buffer),
            CommandData::ToDevice(buffer) => (Flow::Write, buffer),
        };
        let range = 0..buffer.len();
        let mut holdings = Holdings::new(Payload::Dma(buffer));
        if range.is_empty() {
            return self.run(command, holdings, None).await;
        }
        let prepared = match dma.prepare(flow, &mut holdings, range.clone()) {
            Ok(pointer) => Ok(pointer),
            Err(unready) => {
                let payload = holdings.take_payload();
                let later = dma.prepare_later(flow, unready, payload, range.clone());
                let (prepared, all) = later.await;
                holdings = all;
                prepared
            }
        };
        match prepared {
            Ok(pointer) => {
                let collect = (flow == Flow::Read).then_some(range);
                self.run(command.with_data(pointer), holdings, collect)
                    .await
            }
            Err(error) => Err(IoError {
                error,
                buffer: DmaBuf::from_payload(holdings.take_payload()),
            }),
        }
    }

    /// How many commands can be outstanding.
    pub fn depth(&self) -> usize {
        self.queue.with(|state| state.depth()).unwrap_or(0)
    }

    async fn run(
        &self,
        sqe: Sqe,
        holdings: Holdings,
        collect: Option<Range<usize>>,
    ) -> Result<Completion, IoError<DmaBuf>> {
        let inner = &self.controller.inner;
        let command = Command {
            sqe,
            timeout: inner.timeout,
            repeatable: false,
        };
        let mut submission = Submission::new(&self.queue, command, holdings);
        let result = (&mut submission).await;
        let mut holdings = submission.take_holdings();
        if let (Ok(cqe), Some(range)) = (&result, collect)
            && cqe.status().is_success()
            && let Some(reach) = &holdings.reach
        {
            reach.collect(&holdings.payload, range);
        }
        let data = DmaBuf::from_payload(holdings.take_payload());
        match result {
            Ok(cqe) => Ok(Completion { cqe, data }),
            Err(failure) => {
                let command = CommandName {
                    address: self.controller.address().to_owned(),
                    name: "raw command",
                    nsid: (sqe.nsid() != 0).then(|| sqe.nsid()),
                    blocks: None,
                };
                Err(IoError {
                    error: failure.into_error(command),
                    buffer: data,
                })
            }
        }
    }
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePair")
            .field("controller", &self.controller)
            .field("depth", &self.depth())
            .finish_non_exhaustive()
    }
}
