//! Log pages (NVMe base specification 2.0, "Get Log Page command").

use nvme_spec::admin;
use nvme_spec::log::{ErrorEntry, FirmwareSlot, SmartHealth, id};
use zerocopy::{FromBytes, IntoBytes};

use super::Controller;
use super::admin::Admin;
use crate::Error;
use crate::memory::DEVICE_PAGE;

/// LPA: Get Log Page takes offsets.
const EXTENDED_DATA: u8 = 1 << 2;

/// Whether reading a log page acknowledges the event that belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Acknowledge {
    No,
    Yes,
}

/// Reads log pages.
#[derive(Clone)]
pub(super) struct Logs {
    pub(super) admin: Admin,
    /// Log Page Attributes (LPA).
    pub(super) attributes: u8,
    /// Entries of the error log (ELPE), counting from 1.
    pub(super) error_entries: usize,
}

impl Logs {
    /// `len` bytes of a log page from `offset` on. A device that writes less leaves zeroes.
    pub(super) async fn read(
        &self,
        page: u8,
        nsid: u32,
        offset: u64,
        len: usize,
        acknowledge: Acknowledge,
    ) -> Result<Vec<u8>, Error> {
        let mut contents = Vec::new();
        while contents.len() < len {
            let from = offset + contents.len() as u64;
            // The command counts in dwords.
            let skip = (from % 4) as usize;
            if from - skip as u64 != 0 && self.attributes & EXTENDED_DATA == 0 {
                return Err(Error::Unsupported {
                    address: self.admin.address.to_string(),
                    what: "offsets into log pages (LPA bit 2)",
                });
            }
            let wanted = (skip + len - contents.len())
                .next_multiple_of(4)
                .min(DEVICE_PAGE);
            let is_last = contents.len() + wanted - skip >= len;
            let retain = acknowledge == Acknowledge::No || !is_last;
            let command =
                admin::get_log_page(page, nsid, wanted as u32, from - skip as u64, retain);
            let buffer = self.admin.fetch(command, wanted).await?;
            let more = &buffer[skip..];
            contents.extend_from_slice(&more[..more.len().min(len - contents.len())]);
        }
        Ok(contents)
    }

    /// A log page of the controller that has a fixed size.
    pub(super) async fn read_as<T: FromBytes>(
        &self,
        page: u8,
        acknowledge: Acknowledge,
    ) -> Result<Box<T>, Error> {
        let len = size_of::<T>();
        let contents = self
            .read(page, admin::ALL_NAMESPACES, 0, len, acknowledge)
            .await?;
        let value = T::read_from_bytes(&contents).map_err(|_| Error::Unusable {
            address: self.admin.address.to_string(),
            // As many bytes were read as it has.
            reason: "a log page of the wrong size".to_owned(),
        })?;
        Ok(Box::new(value))
    }

    /// The entries of the error log, the newest first.
    pub(super) async fn errors(&self, acknowledge: Acknowledge) -> Result<Vec<ErrorEntry>, Error> {
        const SIZE: usize = size_of::<ErrorEntry>();
        let count = match self.attributes & EXTENDED_DATA {
            0 => self.error_entries.min(DEVICE_PAGE / SIZE),
            _ => self.error_entries,
        };
        let contents = self
            .read(
                id::ERROR,
                admin::ALL_NAMESPACES,
                0,
                count * SIZE,
                acknowledge,
            )
            .await?;
        let mut entries = vec![ErrorEntry::default(); count];
        entries.as_mut_bytes().copy_from_slice(&contents);
        // Their numbers decrease; between two commands all may have moved, so that some come twice.
        let mut last = u64::MAX;
        entries.retain(|entry| {
            let number = entry.error_count.get();
            let is_next = number != 0 && number < last;
            if is_next {
                last = number;
            }
            is_next
        });
        Ok(entries)
    }
}

impl Controller {
    /// The controller's health: temperature, wear, data read and written, errors (NVMe base
    /// specification 2.0, "SMART / Health Information").
    ///
    /// # Errors
    ///
    /// [`Error::Command`] with the status when the controller refuses, and those of a controller
    /// that is gone.
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives up the result only.
    pub async fn smart_log(&self) -> Result<SmartHealth, Error> {
        let logs = self.inner.events.logs();
        let health = logs.read_as::<SmartHealth>(id::SMART_HEALTH, Acknowledge::No);
        health.await.map(|health| *health)
    }

    /// The last errors, the newest first (NVMe base specification 2.0, "Error Information"). Only
    /// the first 64 if the controller takes no offsets into log pages.
    ///
    /// # Errors
    ///
    /// As [`smart_log`](Self::smart_log).
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives up the result only.
    pub async fn error_log(&self) -> Result<Vec<ErrorEntry>, Error> {
        self.inner.events.logs().errors(Acknowledge::No).await
    }

    /// What firmware there is, and which one runs (NVMe base specification 2.0, "Firmware Slot
    /// Information").
    ///
    /// # Errors
    ///
    /// As [`smart_log`](Self::smart_log).
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives up the result only.
    pub async fn firmware_log(&self) -> Result<FirmwareSlot, Error> {
        let logs = self.inner.events.logs();
        let slots = logs.read_as::<FirmwareSlot>(id::FIRMWARE_SLOT, Acknowledge::No);
        slots.await.map(|slots| *slots)
    }

    /// `len` bytes at `offset` of any log page ([`nvme_spec::log::id`]), for a namespace or, with
    /// `nsid` [`nvme_spec::admin::ALL_NAMESPACES`], for the controller. What the controller does
    /// not write reads as zeroes.
    ///
    /// It acknowledges no event (Retain Asynchronous Event is set). Large pages are read by several
    /// commands, between which they may change.
    ///
    /// # Errors
    ///
    /// As [`smart_log`](Self::smart_log), and [`Error::Unsupported`] for what lies past the first
    /// 4 KiB if the controller takes no offsets into log pages.
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives up the result only.
    pub async fn log_page(
        &self,
        page: u8,
        nsid: u32,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, Error> {
        let logs = self.inner.events.logs();
        logs.read(page, nsid, offset, len, Acknowledge::No).await
    }
}
