//! Identify (base specification 2.0, section 5.17).

use nvme_spec::feature::AsyncEventConfiguration;
use nvme_spec::identify::{
    ActiveNamespaces, Cns, IdentifyController, IdentifyNamespace, IdentifyNvmController, LbaFormat,
    NamespaceDescriptor, NamespaceDescriptors, NamespaceFeatures, OptionalAdminCommands,
    OptionalNvmCommands, SglAlignment, SglSupport,
};
use nvme_spec::{Sqe, Status};
use zerocopy::IntoBytes;

use super::features::WARNING_TEMPERATURE;
use super::log::ERROR_LOG_ENTRIES;
use crate::config::Config;
use crate::engine::{Engine, Outcome};
use crate::namespace::Namespace;
use crate::registers::VERSION;

/// The longest that a shutdown may take (RTD3E), in microseconds. It has a file to sync.
const SHUTDOWN_MICROS: u32 = 30_000_000;
/// The composite temperature from which on the controller would fail (CCTEMP), in kelvins: 80 °C.
const CRITICAL_TEMPERATURE: u16 = 353;

impl Engine {
    pub(super) fn identify(&mut self, command: &Sqe) -> Outcome {
        let nsid = command.nsid();
        match Cns(command.cdw10() as u8) {
            Cns::CONTROLLER => {
                let data = self.controller_data();
                self.answer(command, data.as_bytes())
            }
            Cns::NAMESPACE => {
                let data = match self.namespaces.valid(nsid)? {
                    Some(namespace) => namespace_data(namespace, self.config.copy),
                    None => IdentifyNamespace::default(),
                };
                self.answer(command, data.as_bytes())
            }
            Cns::ACTIVE_NAMESPACES => {
                let data = self.active_namespaces(nsid)?;
                self.answer(command, data.as_bytes())
            }
            Cns::COMMAND_SET_ACTIVE_NAMESPACES => {
                nvm_command_set(command)?;
                let data = self.active_namespaces(nsid)?;
                self.answer(command, data.as_bytes())
            }
            Cns::NAMESPACE_DESCRIPTORS => {
                self.namespaces.find(nsid)?;
                let data = NamespaceDescriptors::from_descriptors(&[
                    NamespaceDescriptor::Uuid(uuid(&self.config.serial, nsid)),
                    NamespaceDescriptor::CommandSet(0),
                ]);
                self.answer(command, data.as_bytes())
            }
            Cns::COMMAND_SET_NAMESPACE => {
                nvm_command_set(command)?;
                self.namespaces.valid(nsid)?;
                // Storage tags and protection information, of which there are none.
                self.answer(command, &[0; 4096])
            }
            Cns::COMMAND_SET_CONTROLLER => {
                nvm_command_set(command)?;
                let data = IdentifyNvmController {
                    vsl: self.config.vsl,
                    wzsl: self.config.wzsl,
                    dmrl: self.config.dmrl,
                    dmrsl: self.config.dmrsl.into(),
                    dmsl: self.config.dmsl.into(),
                    ..IdentifyNvmController::default()
                };
                self.answer(command, data.as_bytes())
            }
            Cns::COMMAND_SETS => {
                // One combination: the NVM command set alone.
                let mut data = [0; 4096];
                data[0] = 1;
                self.answer(command, &data)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn controller_data(&self) -> IdentifyController {
        let config = &self.config;
        let mut data = IdentifyController {
            vid: config.pci_vendor.into(),
            ssvid: config.pci_subsystem_vendor.into(),
            mdts: config.mdts,
            ver: VERSION.into_bits().into(),
            rtd3e: SHUTDOWN_MICROS.into(),
            oaes: AsyncEventConfiguration::new()
                .with_namespace_attributes(true)
                .into_bits()
                .into(),
            // An I/O controller.
            cntrltype: 1,
            oacs: OptionalAdminCommands::new()
                .with_doorbell_buffer_config(config.doorbell_buffers)
                .into_bits()
                .into(),
            acl: (config.abort_limit - 1) as u8,
            aerl: (config.async_event_limit - 1) as u8,
            // One slot, read only.
            frmw: 0b0_0011,
            // Offsets and long lengths in Get Log Page.
            lpa: 0b100,
            elpe: (ERROR_LOG_ENTRIES - 1) as u8,
            wctemp: WARNING_TEMPERATURE.into(),
            cctemp: CRITICAL_TEMPERATURE.into(),
            sqes: 0x66,
            cqes: 0x44,
            nn: self.namespaces.max().into(),
            oncs: OptionalNvmCommands::new()
                .with_compare(config.compare)
                .with_verify(config.verify)
                .with_copy(config.copy)
                .with_dataset_management(true)
                .with_write_zeroes(true)
                .with_save_and_select(true)
                .into_bits()
                .into(),
            // Flush of all namespaces at once is supported, with or without a cache.
            vwc: 0b110 | u8::from(config.volatile_write_cache),
            awun: ((config.atomic_write_normal - 1) as u16).into(),
            awupf: ((config.atomic_write_power_fail - 1) as u16).into(),
            // Format 0 of Copy's source ranges.
            ocfs: u16::from(config.copy).into(),
            sgls: sgl_support(config).into_bits().into(),
            ..IdentifyController::default()
        };
        fill(&mut data.sn, &config.serial);
        fill(&mut data.mn, &config.model);
        fill(&mut data.fr, &config.firmware);
        let capacity: u128 = self
            .namespaces
            .iter()
            .map(|namespace| u128::from(namespace.blocks) << namespace.lba_shift)
            .sum();
        data.tnvmcap = capacity.into();
        let name = format!(
            "nqn.2014-08.org.nvmexpress:uuid:{}",
            hyphenated(uuid(&config.serial, 0))
        );
        data.subnqn[..name.len()].copy_from_slice(name.as_bytes());
        data
    }

    fn active_namespaces(&self, after: u32) -> Result<ActiveNamespaces, Status> {
        if after >= 0xffff_fffe {
            return Err(Status::INVALID_NAMESPACE_OR_FORMAT);
        }
        let mut list = ActiveNamespaces::default();
        let active = self.namespaces.active().filter(|&nsid| nsid > after);
        for (entry, nsid) in list.entries.iter_mut().zip(active) {
            entry.set(nsid);
        }
        Ok(list)
    }
}

fn namespace_data(namespace: &Namespace, has_copy: bool) -> IdentifyNamespace {
    let mut data = IdentifyNamespace {
        nsze: namespace.blocks.into(),
        ncap: namespace.blocks.into(),
        nuse: (namespace.store.allocated() >> namespace.lba_shift).into(),
        // Deallocated blocks read as zeros, and Write Zeroes may deallocate.
        dlfeat: 0b0_1001,
        noiob: namespace.optimal_io_boundary.into(),
        nvmcap: (u128::from(namespace.blocks) << namespace.lba_shift).into(),
        ..IdentifyNamespace::default()
    };
    if let Some(granularity) = namespace.deallocate_granularity.checked_sub(1) {
        data.nsfeat = NamespaceFeatures::new()
            .with_optimal_performance(true)
            .into_bits();
        data.npdg = (granularity as u16).into();
        data.npda = (granularity as u16).into();
    }
    if has_copy {
        data.mssrl = namespace.copy_range_blocks.into();
        data.mcl = namespace.copy_blocks.into();
        data.msrc = (namespace.copy_ranges - 1) as u8;
    }
    data.lbaf[0] = LbaFormat {
        lbads: namespace.lba_shift,
        ..LbaFormat::default()
    };
    data
}

fn sgl_support(config: &Config) -> SglSupport {
    if config.sgl {
        SglSupport::new()
            .with_alignment(SglAlignment::Byte)
            .with_bit_bucket(true)
    } else {
        SglSupport::new()
    }
}

/// CSI in command dword 11 must be that of the NVM command set.
fn nvm_command_set(command: &Sqe) -> Result<(), Status> {
    match command.cdw11() >> 24 {
        0 => Ok(()),
        _ => Err(Status::INVALID_FIELD),
    }
}

/// Fills an ASCII field, which is padded with spaces. The length was checked at the start.
fn fill(field: &mut [u8], text: &str) {
    field.fill(b' ');
    field[..text.len()].copy_from_slice(text.as_bytes());
}

/// An identifier that is the same for the same serial number: a UUID of version 8 (RFC 9562),
/// made by the FNV-1a hash.
fn uuid(serial: &str, nsid: u32) -> [u8; 16] {
    const OFFSET_BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let mut hash = OFFSET_BASIS;
    for byte in serial.bytes().chain(nsid.to_le_bytes()) {
        hash = (hash ^ u128::from(byte)).wrapping_mul(PRIME);
    }
    let mut bytes = hash.to_be_bytes();
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

fn hyphenated(uuid: [u8; 16]) -> String {
    let digits = format!("{:032x}", u128::from_be_bytes(uuid));
    let parts = [
        &digits[..8],
        &digits[8..12],
        &digits[12..16],
        &digits[16..20],
        &digits[20..],
    ];
    parts.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_stable_and_differ() {
        let id = hyphenated(uuid("SOFT0001", 1));
        assert_eq!(id, hyphenated(uuid("SOFT0001", 1)));
        assert_ne!(id, hyphenated(uuid("SOFT0001", 2)));
        assert_ne!(id, hyphenated(uuid("SOFT0002", 1)));
        assert_eq!((id.len(), &id[14..15]), (36, "8"));
    }
}
