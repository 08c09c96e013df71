//! Get Log Page (base specification 2.0, section 5.16).

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use nvme_spec::log::{ChangedNamespaces, ErrorEntry, FirmwareSlot, SmartHealth, id};
use nvme_spec::status::StatusCodeType;
use nvme_spec::{Sqe, Status, admin};
use zerocopy::IntoBytes;

use crate::engine::{Engine, Outcome};

/// The errors that are remembered.
pub(super) const ERROR_LOG_ENTRIES: usize = 64;
/// Stands for "no command" and "no queue" in the error log.
const NONE: u16 = 0xffff;

/// What went wrong since the controller was started; resets do not clear it.
pub(super) struct ErrorLog {
    started: Instant,
    /// The newest first.
    entries: VecDeque<ErrorEntry>,
    count: u64,
    media_errors: u64,
}

impl ErrorLog {
    pub(super) fn new() -> Self {
        Self {
            started: Instant::now(),
            entries: VecDeque::new(),
            count: 0,
            media_errors: 0,
        }
    }

    pub(super) fn note_failure(&mut self, submission_queue: u16, command: &Sqe, status: Status) {
        // Data that differ from what a host compares them with are none.
        if status.code_type() == StatusCodeType::MediaAndDataIntegrity
            && !status.is(Status::COMPARE_FAILURE)
        {
            self.media_errors += 1;
        }
        let is_io = submission_queue != 0;
        self.push(ErrorEntry {
            sqid: submission_queue.into(),
            cid: command.cid().into(),
            parameter_error_location: NONE.into(),
            lba: if is_io { command.cdw10_11() } else { 0 }.into(),
            nsid: command.nsid().into(),
            ..ErrorEntry::default().with_status(status)
        });
    }

    /// An error that belongs to no command.
    pub(super) fn note_event(&mut self) {
        self.push(ErrorEntry {
            sqid: NONE.into(),
            cid: NONE.into(),
            parameter_error_location: NONE.into(),
            ..ErrorEntry::default()
        });
    }

    fn push(&mut self, mut entry: ErrorEntry) {
        self.count += 1;
        entry.error_count.set(self.count);
        self.entries.truncate(ERROR_LOG_ENTRIES - 1);
        self.entries.push_front(entry);
    }
}

/// Namespaces that changed since the host read their list; resets do not clear it.
#[derive(Default)]
pub(crate) struct ChangedNamespaceLog(BTreeSet<u32>);

impl ChangedNamespaceLog {
    pub(crate) fn note(&mut self, nsid: u32) {
        self.0.insert(nsid);
    }

    fn contents(&self) -> ChangedNamespaces {
        let mut list = ChangedNamespaces::default();
        if self.0.len() > list.entries.len() {
            return ChangedNamespaces::overflowed();
        }
        for (entry, &nsid) in list.entries.iter_mut().zip(&self.0) {
            entry.set(nsid);
        }
        list
    }
}

impl Engine {
    pub(super) fn log_page(&mut self, command: &Sqe) -> Outcome {
        /// RAE in command dword 10.
        const RETAIN_ASYNC_EVENT: u32 = 1 << 15;
        /// OT in command dword 14: the offset is an index.
        const INDEX_OFFSET: u32 = 1 << 23;
        let log_page = command.cdw10() as u8;
        let contents = self.log_page_contents(log_page, command.nsid())?;
        let dwords = u64::from(command.cdw11() & 0xffff) << 16 | u64::from(command.cdw10() >> 16);
        let len = (dwords + 1) * 4;
        let offset = u64::from(command.cdw13()) << 32 | u64::from(command.cdw12());
        if len > self.limits.max_transfer
            || !offset.is_multiple_of(4)
            || offset > contents.len() as u64
            || command.cdw14() & INDEX_OFFSET != 0
        {
            return Err(Status::INVALID_FIELD);
        }
        self.answer_padded(command, &contents[offset as usize..], len)?;
        if command.cdw10() & RETAIN_ASYNC_EVENT == 0 {
            if log_page == id::CHANGED_NAMESPACES {
                self.admin.changed_namespaces.0.clear();
            }
            self.admin.events.log_page_read(log_page);
            self.deliver_events();
        }
        Ok(0)
    }

    fn log_page_contents(&self, log_page: u8, nsid: u32) -> Result<Vec<u8>, Status> {
        Ok(match log_page {
            id::ERROR => {
                let mut entries = [ErrorEntry::default(); ERROR_LOG_ENTRIES];
                for (slot, entry) in entries.iter_mut().zip(&self.admin.errors.entries) {
                    *slot = *entry;
                }
                entries.as_bytes().to_vec()
            }
            // There is no log by namespace (LPA bit 0).
            id::SMART_HEALTH if nsid == 0 || nsid == admin::ALL_NAMESPACES => {
                self.smart_health().as_bytes().to_vec()
            }
            id::SMART_HEALTH => return Err(Status::INVALID_FIELD),
            id::FIRMWARE_SLOT => {
                let mut slots = FirmwareSlot {
                    afi: 1,
                    ..FirmwareSlot::default()
                };
                let revision = self.config.firmware.as_bytes();
                slots.frs[0] = [b' '; 8];
                slots.frs[0][..revision.len()].copy_from_slice(revision);
                slots.as_bytes().to_vec()
            }
            id::CHANGED_NAMESPACES => self.admin.changed_namespaces.contents().as_bytes().to_vec(),
            _ => return Err(Status::INVALID_LOG_PAGE),
        })
    }

    fn smart_health(&self) -> SmartHealth {
        const HOUR: Duration = Duration::from_secs(3600);
        let counters = &self.shared.counters;
        let errors = &self.admin.errors;
        let data_units = |bytes: u64| u128::from(bytes.div_ceil(512_000)).into();
        let hours = errors.started.elapsed().as_secs() / HOUR.as_secs();
        SmartHealth {
            critical_warning: self.critical_warnings().into_bits(),
            composite_temperature: self.admin.health.temperature.into(),
            available_spare: 100,
            available_spare_threshold: 10,
            // Of the commands of the NVM command set Compare and Verify count as reads.
            data_units_read: data_units(counters.bytes_read.get() + counters.bytes_checked.get()),
            data_units_written: data_units(counters.bytes_written.get()),
            host_read_commands: u128::from(counters.reads.get()).into(),
            host_write_commands: u128::from(counters.writes.get()).into(),
            power_cycles: u128::from(self.admin.health.power_cycles).into(),
            unsafe_shutdowns: u128::from(self.admin.health.unsafe_shutdowns).into(),
            power_on_hours: u128::from(hours).into(),
            media_errors: u128::from(errors.media_errors).into(),
            error_log_entries: u128::from(errors.count).into(),
            ..SmartHealth::default()
        }
    }
}
