//! What kind of controller to be.

use std::sync::Arc;
use std::time::Duration;

use crate::DoorbellMemory;
use crate::fault::{Fault, FaultError};
use crate::store::Store;

const MAX_NAMESPACES: u64 = 65_536;

/// The properties of a [`SoftController`](crate::SoftController).
///
/// Fields that are limits are what the controller announces, in units that are easy to write;
/// names in parentheses are the specification's.
#[derive(Debug)]
pub struct Config {
    /// Serial number (SN), at most 20 printable ASCII characters.
    pub serial: String,
    /// Model number (MN), at most 40 printable ASCII characters.
    pub model: String,
    /// Firmware revision (FR), at most 8 printable ASCII characters.
    pub firmware: String,
    /// Vendor of the PCI function (VID), as in its configuration space. 0 stands for a controller that is none.
    pub pci_vendor: u16,
    /// Vendor of the subsystem (SSVID), likewise.
    pub pci_subsystem_vendor: u16,
    /// Entries that a queue may have (CAP.MQES), 2 to 65,536.
    pub max_queue_entries: u32,
    /// I/O queue pairs that there may be, 1 to 65,534.
    pub io_queue_pairs: u16,
    /// The largest data transfer is the smallest page size shifted left by this (MDTS); 0 stands
    /// for no limit.
    pub mdts: u8,
    /// The smallest memory page is 4 KiB shifted left by this (CAP.MPSMIN), at most 15.
    pub mpsmin: u8,
    /// The largest memory page is 4 KiB shifted left by this (CAP.MPSMAX), at most 15.
    pub mpsmax: u8,
    /// Whether SGLs are accepted for I/O commands.
    pub sgl: bool,
    /// Whether there is a volatile write cache. Without, each write is durable when it completes.
    pub volatile_write_cache: bool,
    /// Doorbells are 4 bytes shifted left by this apart (CAP.DSTRD), at most 15.
    pub doorbell_stride: u8,
    /// Whether there is Doorbell Buffer Config (OACS), for hosts to which a register write is
    /// expensive. The doorbells of all queues are then to fit into the smallest page.
    pub doorbell_buffers: bool,
    /// The host writes the doorbells to memory, where the controller looks for them.
    pub polled_doorbells: Option<PolledDoorbells>,
    /// How long becoming ready may take, as announced (CAP.TO, CRTO); rounded up to 500 ms.
    pub ready_timeout: Duration,
    /// Abort commands that may be outstanding (ACL), 1 to 256.
    pub abort_limit: u16,
    /// Asynchronous Event Requests that may be outstanding (AERL), 1 to 256.
    pub async_event_limit: u16,
    /// Blocks that are written atomically in normal operation (AWUN), 1 to 65,536. Announced as 1
    /// to 65,536 whatever the block size.
    pub atomic_write_normal: u32,
    /// Blocks that are written atomically across a loss of power (AWUPF), 1 to 65,536.
    pub atomic_write_power_fail: u32,
    /// Whether there is Compare (ONCS).
    pub compare: bool,
    /// Whether there is Verify (ONCS).
    pub verify: bool,
    /// Whether there is Copy (ONCS); its limits are those of each
    /// [namespace](NamespaceConfig::copy_blocks).
    pub copy: bool,
    /// The largest Verify is the smallest page size shifted left by this (VSL); 0 stands for no
    /// limit.
    pub vsl: u8,
    /// The largest Write Zeroes is the smallest page size shifted left by this (WZSL); 0 stands
    /// for no limit.
    pub wzsl: u8,
    /// Ranges of one deallocating Dataset Management (DMRL); 0 stands for no limit but the 256 of
    /// the command.
    pub dmrl: u8,
    /// Blocks in one such range (DMRSL); 0 stands for no limit.
    pub dmrsl: u32,
    /// Blocks in all ranges of one such command (DMSL); 0 stands for no limit.
    pub dmsl: u64,
    /// How long each I/O command takes from fetch to completion. Commands do not wait for each
    /// other; data moves at the end of that time.
    pub latency: Duration,
    /// The longest time for which the controller's thread looks for new commands before it sleeps. It is
    /// less where they come so rarely that it sleeps anyway.
    pub spin: Duration,
    /// The largest identifier that a namespace may have (NN), at most 65,536; 0 stands for as many
    /// as there are at the start, so that none can be added.
    pub max_namespaces: u32,
    /// Keeps apart what a loss of power would lose, which costs memory and a read for each write.
    /// Switched on by any of [`Config::faults`] that loses something; this is for
    /// [`SoftController::power_loss`](crate::SoftController::power_loss).
    pub track_unflushed: bool,
    /// Faults that strike from the start on. Of several that match, the first is taken.
    pub faults: Vec<Fault>,
    /// The namespaces; the first one has identifier 1.
    pub namespaces: Vec<NamespaceConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            serial: "SOFT0001".into(),
            model: "nvme-soft".into(),
            firmware: env!("CARGO_PKG_VERSION").into(),
            pci_vendor: 0,
            pci_subsystem_vendor: 0,
            max_queue_entries: 1024,
            io_queue_pairs: 64,
            mdts: 7,
            mpsmin: 0,
            mpsmax: 4,
            sgl: true,
            volatile_write_cache: true,
            doorbell_stride: 0,
            doorbell_buffers: false,
            polled_doorbells: None,
            ready_timeout: Duration::from_secs(5),
            abort_limit: 4,
            async_event_limit: 4,
            atomic_write_normal: 128,
            atomic_write_power_fail: 1,
            compare: true,
            verify: true,
            copy: true,
            vsl: 0,
            wzsl: 0,
            dmrl: 0,
            dmrsl: 0,
            dmsl: 0,
            latency: Duration::ZERO,
            spin: Duration::from_micros(50),
            max_namespaces: 0,
            track_unflushed: false,
            faults: Vec::new(),
            namespaces: Vec::new(),
        }
    }
}

/// Doorbells that are memory, whose writes nobody tells of.
#[derive(Clone, Debug)]
pub struct PolledDoorbells {
    /// The memory.
    pub memory: Arc<dyn DoorbellMemory>,
    /// How often the controller looks at it when nothing has been to do for long. Before that it looks
    /// all the time for [`Config::spin`], and then ever less often, beginning with 50 µs.
    pub idle_interval: Duration,
}

/// One namespace.
#[derive(Debug)]
pub struct NamespaceConfig {
    /// Where the blocks are kept. What exceeds a multiple of the block size is not used.
    pub store: Box<dyn Store>,
    /// The size of a logical block in bytes: 512 or 4096.
    pub lba_size: u32,
    /// Reads and writes should not cross a multiple of that many blocks (NOIOB); 0 stands for
    /// no such boundary.
    pub optimal_io_boundary: u16,
    /// Blocks to which deallocations should be aligned and of which their length should be a
    /// multiple (NPDA, NPDG), 1 to 65,536; 0 stands for not announced.
    pub deallocate_granularity: u32,
    /// Blocks in one source range of a Copy (MSSRL), at least 1.
    pub copy_range_blocks: u16,
    /// Blocks in all source ranges of one Copy (MCL), from `copy_range_blocks` to 65,536. The
    /// controller keeps as much memory.
    pub copy_blocks: u32,
    /// Source ranges of one Copy (MSRC), 1 to 256.
    pub copy_ranges: u16,
}

impl NamespaceConfig {
    /// A namespace over `store` with blocks of `lba_size` bytes (512 or 4096).
    pub fn new(store: impl Store + 'static, lba_size: u32) -> Self {
        Self {
            store: Box::new(store),
            lba_size,
            optimal_io_boundary: 0,
            deallocate_granularity: 0,
            copy_range_blocks: 1024,
            copy_blocks: 2048,
            copy_ranges: 128,
        }
    }
}

/// Why a controller could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A field of [`Config`] is out of its range.
    #[error("{field}: {value} is not within {allowed}")]
    OutOfRange {
        /// The name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What would be accepted.
        allowed: &'static str,
    },
    /// A text of [`Config`] is too long or not printable ASCII.
    #[error("{field}: not at most {max} printable ASCII characters: {value:?}")]
    Text {
        /// The name of the field.
        field: &'static str,
        /// Its value.
        value: String,
        /// The longest that is accepted.
        max: usize,
    },
    /// A namespace's store is smaller than one block.
    #[error("namespace {nsid}: {size} bytes hold no block of {lba_size} bytes")]
    EmptyNamespace {
        /// The namespace.
        nsid: u32,
        /// The size of its store in bytes.
        size: u64,
        /// The size of a block in bytes.
        lba_size: u32,
    },
    /// A fault makes no sense.
    #[error("fault {number}: {source}")]
    Fault {
        /// Which one, from 1.
        number: usize,
        /// What is wrong with it.
        source: FaultError,
    },
    /// There is no interrupt vector for the admin queue.
    #[error("at least one interrupt vector is needed")]
    NoVectors,
    /// The thread could not be started.
    #[error("the controller's thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

impl Config {
    pub(crate) fn check(&self) -> Result<(), StartError> {
        let text = |field, value: &str, max| {
            if value.len() <= max && value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
                Ok(())
            } else {
                Err(StartError::Text {
                    field,
                    value: value.into(),
                    max,
                })
            }
        };
        text("serial", &self.serial, 20)?;
        text("model", &self.model, 40)?;
        text("firmware", &self.firmware, 8)?;
        within(
            "max_queue_entries",
            self.max_queue_entries.into(),
            2,
            65_536,
            "2..=65536",
        )?;
        within(
            "io_queue_pairs",
            self.io_queue_pairs.into(),
            1,
            65_534,
            "1..=65534",
        )?;
        within("mdts", self.mdts.into(), 0, 19, "0..=19")?;
        within("mpsmax", self.mpsmax.into(), 0, 15, "0..=15")?;
        within(
            "mpsmin",
            self.mpsmin.into(),
            0,
            self.mpsmax.into(),
            "0..=mpsmax",
        )?;
        within(
            "doorbell_stride",
            self.doorbell_stride.into(),
            0,
            15,
            "0..=15",
        )?;
        if self.doorbell_buffers {
            within(
                "io_queue_pairs, with doorbell_buffers",
                self.io_queue_pairs.into(),
                1,
                ((4096 << self.mpsmin) / (8 << self.doorbell_stride) as u64).saturating_sub(1),
                "what fits into one page: 1..=(4096 << mpsmin) / (8 << doorbell_stride) - 1",
            )?;
        }
        within("abort_limit", self.abort_limit.into(), 1, 256, "1..=256")?;
        within(
            "async_event_limit",
            self.async_event_limit.into(),
            1,
            256,
            "1..=256",
        )?;
        within(
            "atomic_write_normal",
            self.atomic_write_normal.into(),
            1,
            65_536,
            "1..=65536",
        )?;
        within(
            "atomic_write_power_fail",
            self.atomic_write_power_fail.into(),
            1,
            self.atomic_write_normal.into(),
            "1..=atomic_write_normal",
        )?;
        within("vsl", self.vsl.into(), 0, 19, "0..=19")?;
        within("wzsl", self.wzsl.into(), 0, 19, "0..=19")?;
        for (index, fault) in self.faults.iter().enumerate() {
            fault.check().map_err(|source| StartError::Fault {
                number: index + 1,
                source,
            })?;
        }
        let least = match self.max_namespaces {
            0 => 0,
            _ => self.namespaces.len() as u64,
        };
        within(
            "max_namespaces",
            self.max_namespaces.into(),
            least,
            MAX_NAMESPACES,
            "namespaces.len()..=65536",
        )?;
        for (nsid, namespace) in (1..).zip(&self.namespaces) {
            namespace.check(nsid)?;
        }
        Ok(())
    }
}

impl NamespaceConfig {
    pub(crate) fn check(&self, nsid: u32) -> Result<(), StartError> {
        check_lba_size(self.lba_size)?;
        within(
            "deallocate_granularity",
            self.deallocate_granularity.into(),
            0,
            65_536,
            "0..=65536",
        )?;
        let range_blocks = u64::from(self.copy_range_blocks);
        within("copy_range_blocks", range_blocks, 1, 65_535, "1..=65535")?;
        within(
            "copy_blocks",
            self.copy_blocks.into(),
            range_blocks,
            65_536,
            "copy_range_blocks..=65536",
        )?;
        let ranges = self.copy_ranges.into();
        within("copy_ranges", ranges, 1, 256, "1..=256")?;
        check_size(nsid, self.store.size(), self.lba_size)
    }
}

pub(crate) fn check_lba_size(lba_size: u32) -> Result<(), StartError> {
    match lba_size {
        512 | 4096 => Ok(()),
        _ => Err(StartError::OutOfRange {
            field: "lba_size",
            value: lba_size.into(),
            allowed: "512, 4096",
        }),
    }
}

/// A namespace has at least one block.
pub(crate) fn check_size(nsid: u32, size: u64, lba_size: u32) -> Result<(), StartError> {
    if size < u64::from(lba_size) {
        return Err(StartError::EmptyNamespace {
            nsid,
            size,
            lba_size,
        });
    }
    Ok(())
}

fn within(
    field: &'static str,
    value: u64,
    least: u64,
    most: u64,
    allowed: &'static str,
) -> Result<(), StartError> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(StartError::OutOfRange {
            field,
            value,
            allowed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    fn refused(change: impl FnOnce(&mut Config)) -> String {
        let mut config = Config::default();
        change(&mut config);
        config.check().expect_err("out of range").to_string()
    }

    #[test]
    fn the_default_is_accepted() {
        Config::default().check().expect("the default");
        let doorbell_buffers = Config {
            doorbell_buffers: true,
            io_queue_pairs: 511,
            ..Config::default()
        };
        doorbell_buffers.check().expect("512 pairs fill a page");
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        assert_eq!(
            refused(|config| config.max_queue_entries = 1),
            "max_queue_entries: 1 is not within 2..=65536"
        );
        assert_eq!(
            refused(|config| config.serial = "Ä".into()),
            "serial: not at most 20 printable ASCII characters: \"Ä\""
        );
        assert_eq!(
            refused(|config| {
                config.doorbell_buffers = true;
                (config.mpsmin, config.doorbell_stride) = (1, 2);
                config.io_queue_pairs = 256;
            }),
            "io_queue_pairs, with doorbell_buffers: 256 is not within what fits into one page: \
             1..=(4096 << mpsmin) / (8 << doorbell_stride) - 1"
        );
        let store = |size| MemoryStore::new(size).expect("small");
        assert_eq!(
            refused(|config| config.namespaces = vec![NamespaceConfig::new(store(1024), 1024)]),
            "lba_size: 1024 is not within 512, 4096"
        );
        assert_eq!(
            refused(|config| {
                let mut namespace = NamespaceConfig::new(store(1024), 512);
                (namespace.copy_range_blocks, namespace.copy_blocks) = (9, 8);
                config.namespaces = vec![namespace];
            }),
            "copy_blocks: 8 is not within copy_range_blocks..=65536"
        );
        assert_eq!(
            refused(|config| config.namespaces = vec![NamespaceConfig::new(store(1024), 4096)]),
            "namespace 1: 1024 bytes hold no block of 4096 bytes"
        );
    }
}
