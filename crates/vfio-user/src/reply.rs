//! What one side answers.

use zerocopy::native_endian::U64;

use crate::dma::{DmaAccess, DmaUnmap};
use crate::error::{DecodeError, ReplyError};
use crate::header::{Command, HEADER_SIZE, Header};
use crate::irq::IrqInfo;
use crate::message::Limits;
use crate::region::{DeviceInfo, RegionAccess, RegionInfo};
use crate::request::{Request, expect_data, expect_no_data};
use crate::version::Version;
use crate::wire;

/// A reply without an error.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Reply<'a> {
    /// VERSION.
    Version(Version),
    /// DMA_MAP.
    DmaMap,
    /// DMA_UNMAP.
    DmaUnmap(DmaUnmap),
    /// DEVICE_GET_INFO.
    DeviceInfo(DeviceInfo),
    /// DEVICE_GET_REGION_INFO.
    RegionInfo(RegionInfo),
    /// DEVICE_GET_REGION_INFO, and the capabilities are left out because there was no room for them.
    RegionInfoCut {
        /// The region, without areas.
        info: RegionInfo,
        /// Bytes of the payload that would have them.
        argsz: u32,
    },
    /// DEVICE_GET_IRQ_INFO.
    IrqInfo(IrqInfo),
    /// DEVICE_SET_IRQS.
    SetIrqs,
    /// REGION_READ.
    RegionRead {
        /// Which region.
        region: u32,
        /// Where the data begins in it, in bytes.
        offset: u64,
        /// What was read.
        data: &'a [u8],
    },
    /// REGION_WRITE.
    RegionWrite(RegionAccess),
    /// REGION_WRITE_MULTI.
    RegionWriteMulti {
        /// Writes that were done.
        count: u64,
    },
    /// DMA_READ.
    DmaRead {
        /// The first DMA address.
        address: u64,
        /// What was read.
        data: &'a [u8],
    },
    /// DMA_WRITE.
    DmaWrite(DmaAccess),
    /// DEVICE_RESET.
    DeviceReset,
}

impl<'a> Reply<'a> {
    /// Decodes a reply.
    ///
    /// # Errors
    ///
    /// [`ReplyError::Peer`] if it reports an error, else [`ReplyError::Decode`] if it is not what the
    /// specification says, exceeds `limits`, or answers a command that this crate knows nothing of.
    pub fn decode(
        header: &Header,
        payload: &'a [u8],
        descriptors: usize,
        limits: &Limits,
    ) -> Result<Self, ReplyError> {
        let command = header.command();
        if !header.is_reply() {
            return Err(DecodeError::Direction(command).into());
        }
        if header.is_error() {
            return Err(ReplyError::Peer {
                command,
                errno: header.errno(),
            });
        }
        // Only these have any.
        if descriptors > 0 && !matches!(command, Command::VERSION | Command::DEVICE_GET_REGION_INFO)
        {
            return Err(DecodeError::Descriptors {
                command,
                count: descriptors,
            }
            .into());
        }
        Self::decode_payload(command, payload, limits.max_transfer).map_err(ReplyError::from)
    }

    fn decode_payload(command: Command, payload: &'a [u8], max: u32) -> Result<Self, DecodeError> {
        Ok(match command {
            Command::VERSION => Self::Version(Version::decode(payload)?),
            Command::DMA_MAP => {
                expect_no_data(command, payload, payload)?;
                Self::DmaMap
            }
            Command::DMA_UNMAP => Self::DmaUnmap(DmaUnmap::decode(payload)?),
            Command::DEVICE_GET_INFO => Self::DeviceInfo(DeviceInfo::decode(payload)?),
            Command::DEVICE_GET_REGION_INFO => match RegionInfo::decode(payload)? {
                (info, _, true) => Self::RegionInfo(info),
                (info, argsz, false) => Self::RegionInfoCut { info, argsz },
            },
            Command::DEVICE_GET_IRQ_INFO => Self::IrqInfo(IrqInfo::decode(payload)?),
            Command::DEVICE_SET_IRQS => {
                expect_no_data(command, payload, payload)?;
                Self::SetIrqs
            }
            Command::REGION_READ => {
                let (access, data) = RegionAccess::split(command, payload, max)?;
                expect_data(command, payload, data, access.count.into())?;
                Self::RegionRead {
                    region: access.region,
                    offset: access.offset,
                    data,
                }
            }
            Command::REGION_WRITE => {
                let (access, data) = RegionAccess::split(command, payload, max)?;
                expect_no_data(command, payload, data)?;
                Self::RegionWrite(access)
            }
            Command::REGION_WRITE_MULTI => Self::RegionWriteMulti {
                count: wire::whole::<U64>(command, payload)?.get(),
            },
            Command::DMA_READ => {
                let (access, data) = DmaAccess::split(command, payload, max)?;
                expect_data(command, payload, data, access.count)?;
                Self::DmaRead {
                    address: access.address,
                    data,
                }
            }
            Command::DMA_WRITE => {
                let (access, data) = DmaAccess::split(command, payload, max)?;
                expect_no_data(command, payload, data)?;
                Self::DmaWrite(access)
            }
            Command::DEVICE_RESET => {
                expect_no_data(command, payload, payload)?;
                Self::DeviceReset
            }
            command => {
                return Err(DecodeError::Unsupported {
                    command,
                    what: "the command",
                });
            }
        })
    }

    /// Whether this is an answer to that: to the same command, with the same range or index, and with
    /// all of the data.
    pub fn answers(&self, request: &Request<'_>) -> bool {
        match (self, request) {
            (Self::Version(reply), Request::Version(asked)) => {
                reply.major == asked.major && reply.minor <= asked.minor
            }
            (Self::DmaUnmap(reply), Request::DmaUnmap(asked)) => reply == asked,
            (Self::RegionInfo(info), Request::RegionInfo { index, .. }) => info.index == *index,
            (Self::RegionInfoCut { info, argsz }, Request::RegionInfo { index, argsz: room }) => {
                info.index == *index && argsz > room
            }
            (Self::IrqInfo(info), Request::IrqInfo { index, .. }) => info.index == *index,
            (
                Self::RegionRead {
                    region,
                    offset,
                    data,
                },
                Request::RegionRead(asked),
            ) => {
                (*region, *offset, data.len()) == (asked.region, asked.offset, asked.count as usize)
            }
            (Self::RegionWrite(access), Request::RegionWrite(write)) => *access == write.access(),
            (Self::RegionWriteMulti { count }, Request::RegionWriteMulti(writes)) => {
                *count == writes.len() as u64
            }
            (Self::DmaRead { address, data }, Request::DmaRead(asked)) => {
                (*address, data.len() as u64) == (asked.address, asked.count)
            }
            (Self::DmaWrite(access), Request::DmaWrite { address, data }) => {
                (access.address, access.count) == (*address, data.len() as u64)
            }
            (Self::DmaMap, Request::DmaMap(_))
            | (Self::DeviceInfo(_), Request::DeviceInfo { .. })
            | (Self::SetIrqs, Request::SetIrqs(_))
            | (Self::DeviceReset, Request::DeviceReset) => true,
            _ => false,
        }
    }

    /// The whole message, in answer to the command with this header.
    pub fn encode(&self, to: &Header) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_SIZE];
        let into = &mut bytes;
        match self {
            Self::Version(version) => version.encode(into),
            Self::DmaUnmap(unmap) => unmap.encode(into),
            Self::DeviceInfo(info) => info.encode(into),
            Self::RegionInfo(info) => info.encode(into),
            Self::RegionInfoCut { info, argsz } => info.encode_cut(*argsz, into),
            Self::IrqInfo(info) => info.encode(into),
            Self::RegionRead {
                region,
                offset,
                data,
            } => {
                let access = RegionAccess {
                    region: *region,
                    offset: *offset,
                    count: data.len() as u32,
                };
                access.encode(data, into);
            }
            Self::RegionWrite(access) => access.encode(&[], into),
            Self::RegionWriteMulti { count } => into.extend_from_slice(&count.to_ne_bytes()),
            Self::DmaRead { address, data } => {
                let access = DmaAccess {
                    address: *address,
                    count: data.len() as u64,
                };
                access.encode(data, into);
            }
            Self::DmaWrite(access) => access.encode(&[], into),
            Self::DmaMap | Self::SetIrqs | Self::DeviceReset => {}
        }
        let header = to.reply_to(bytes.len() - HEADER_SIZE);
        bytes[..HEADER_SIZE].copy_from_slice(&header.encode());
        bytes
    }
}

/// The whole message that reports an error (errno) of the command with this header.
pub fn error_reply(to: &Header, errno: u32) -> Vec<u8> {
    to.error_to(errno).encode().to_vec()
}
