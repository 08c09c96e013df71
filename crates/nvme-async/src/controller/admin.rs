//! Admin commands.

use std::sync::Arc;
use std::time::Duration;

use nvme_spec::identify::{
    ActiveNamespaces, IdentifyController, IdentifyNamespace, IdentifyNvmController,
    NamespaceDescriptors,
};
use nvme_spec::opcode::AdminOpcode;
use nvme_spec::{Cqe, DataPointer, Sqe, admin, feature};
use zerocopy::FromBytes;

use crate::engine::state::Command;
use crate::engine::{SharedQueue, Submission};
use crate::error::CommandError;
use crate::io::{Holdings, Payload};
use crate::memory::{DEVICE_PAGE, DmaBuf, Pool};
use crate::{CommandName, Error, Fate};

/// More active namespaces than this are not looked at: there is memory for each.
const MOST_NAMESPACES: usize = 65_536;

/// The admin queue, with what its commands need.
#[derive(Clone)]
pub(crate) struct Admin {
    pub(crate) address: Arc<str>,
    pub(crate) queue: Arc<SharedQueue>,
    pub(crate) pool: Pool,
    pub(crate) timeout: Option<Duration>,
}

impl Admin {
    /// Runs a command without data.
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, the command goes on.
    pub(crate) async fn run(&self, sqe: Sqe) -> Result<Cqe, Error> {
        self.submit(sqe, Holdings::default())
            .await
            .map(|(cqe, _)| cqe)
    }

    /// Runs a command that returns `len` bytes, at most a page.
    ///
    /// # Cancel safety
    ///
    /// When it is dropped after its first poll, the command goes on, and its buffer is freed when
    /// it is done.
    pub(crate) async fn fetch(&self, sqe: Sqe, len: usize) -> Result<DmaBuf, Error> {
        debug_assert!(len <= DEVICE_PAGE);
        let mut buffer = self.pool.alloc(len)?;
        // A device that writes less than it should must not pass off old contents as its answer.
        buffer.fill(0);
        let prp1 = buffer.iova().expect("a block of the pool has an address");
        let sqe = sqe.with_data(DataPointer::Prp { prp1, prp2: 0 });
        let holdings = Holdings::new(Payload::Dma(buffer));
        let (_, holdings) = self.submit(sqe, holdings).await?;
        self.buffer(holdings)
    }

    pub(crate) async fn identify_controller(&self) -> Result<Box<IdentifyController>, Error> {
        self.fetch_as(admin::identify_controller()).await
    }

    pub(crate) async fn identify_nvm_controller(
        &self,
    ) -> Result<Box<IdentifyNvmController>, Error> {
        self.fetch_as(admin::identify_nvm_controller()).await
    }

    pub(crate) async fn identify_namespace(
        &self,
        nsid: u32,
    ) -> Result<Box<IdentifyNamespace>, Error> {
        self.fetch_as(admin::identify_namespace(nsid)).await
    }

    pub(crate) async fn namespace_descriptors(
        &self,
        nsid: u32,
    ) -> Result<Box<NamespaceDescriptors>, Error> {
        self.fetch_as(admin::namespace_descriptors(nsid)).await
    }

    /// All active namespaces, in order, of the `most` that there can be (NN).
    pub(crate) async fn active_namespaces(&self, most: u32) -> Result<Vec<u32>, Error> {
        let mut all = Vec::new();
        loop {
            let after = all.last().copied().unwrap_or(0);
            let list: Box<ActiveNamespaces> =
                self.fetch_as(admin::active_namespaces(after)).await?;
            let page: Vec<u32> = list.iter().collect();
            let full = page.len() == ActiveNamespaces::ENTRIES;
            let address = &*self.address;
            for nsid in page {
                let is_next = all.last().is_none_or(|&last| nsid > last);
                if nsid > most || !is_next {
                    tracing::warn!(
                        address,
                        nsid,
                        "the list of active namespaces has an entry that can't be"
                    );
                } else if all.len() == MOST_NAMESPACES {
                    tracing::warn!(
                        address,
                        "there are more active namespaces than this driver looks at"
                    );
                    return Ok(all);
                } else {
                    all.push(nsid);
                }
            }
            // Strictly increasing, or a device could keep us here for ever.
            if !full || all.last().is_none_or(|&last| last <= after) {
                return Ok(all);
            }
        }
    }

    /// Asks for queue pairs and returns how many were granted (NVMe base specification 2.0,
    /// "Number of Queues").
    pub(crate) async fn request_queue_pairs(&self, pairs: u16) -> Result<u16, Error> {
        let asked = feature::NumberOfQueues::pairs(pairs).into_bits();
        let cqe = self
            .run(admin::set_features(
                feature::id::NUMBER_OF_QUEUES,
                asked,
                false,
            ))
            .await?;
        let granted = feature::NumberOfQueues::from_bits(cqe.result());
        let granted = granted.submission_queues().min(granted.completion_queues());
        Ok(u16::try_from(granted).unwrap_or(u16::MAX).min(pairs))
    }

    async fn fetch_as<T: FromBytes>(&self, sqe: Sqe) -> Result<Box<T>, Error> {
        let buffer = self.fetch(sqe, size_of::<T>()).await?;
        match T::read_from_bytes(&buffer) {
            Ok(value) => Ok(Box::new(value)),
            // The buffer has the size of T.
            Err(_) => Err(Error::Unusable {
                address: self.address.to_string(),
                reason: "identify data of the wrong size".to_owned(),
            }),
        }
    }

    async fn submit(&self, sqe: Sqe, holdings: Holdings) -> Result<(Cqe, Holdings), Error> {
        let command = Command {
            sqe,
            timeout: self.timeout,
            repeatable: is_repeatable(&sqe),
        };
        let mut submission = Submission::new(&self.queue, command, holdings);
        let cqe = (&mut submission)
            .await
            .map_err(|failure| failure.into_error(self.name(&sqe)))?;
        let status = cqe.status();
        if !status.is_success() {
            return Err(Box::new(CommandError {
                command: self.name(&sqe),
                status,
            })
            .into());
        }
        Ok((cqe, submission.take_holdings()))
    }

    /// Sets a feature whose value is the data of the command, in `buffer`.
    pub(crate) async fn set_feature(&self, id: u8, buffer: DmaBuf) -> Result<DmaBuf, Error> {
        let prp1 = buffer.iova().expect("a block of the pool has an address");
        let data = DataPointer::Prp { prp1, prp2: 0 };
        let sqe = admin::set_features(id, 0, false).with_data(data);
        let holdings = Holdings::new(Payload::Dma(buffer));
        self.submit(sqe, holdings)
            .await
            .and_then(|(_, holdings)| self.buffer(holdings))
    }

    fn buffer(&self, holdings: Holdings) -> Result<DmaBuf, Error> {
        match holdings.payload {
            Payload::Dma(buffer) => Ok(buffer),
            _ => Err(Error::Closed {
                address: self.address.to_string(),
                fate: Fate::Unknown,
            }),
        }
    }

    fn name(&self, sqe: &Sqe) -> CommandName {
        CommandName {
            address: self.address.to_string(),
            name: AdminOpcode(sqe.opcode()).name().unwrap_or("admin command"),
            nsid: (sqe.nsid() != 0).then(|| sqe.nsid()),
            blocks: None,
        }
    }
}

/// Whether a command only asks, so that it may be sent again.
fn is_repeatable(sqe: &Sqe) -> bool {
    matches!(
        AdminOpcode(sqe.opcode()),
        AdminOpcode::IDENTIFY | AdminOpcode::GET_LOG_PAGE | AdminOpcode::GET_FEATURES
    )
}
