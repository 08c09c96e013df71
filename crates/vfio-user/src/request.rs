//! What one side asks of the other.

use zerocopy::IntoBytes;

use crate::dma::{DmaAccess, DmaMap, DmaUnmap};
use crate::error::DecodeError;
use crate::header::{Command, HEADER_SIZE, Header};
use crate::irq::{IrqData, SetIrqs};
use crate::message::Limits;
use crate::region::{RegionAccess, RegionWrite, WriteMulti};
use crate::version::Version;
use crate::wire::{self, expect, expect_size};

/// A command with its arguments.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Request<'a> {
    /// VERSION.
    Version(Version),
    /// DMA_MAP.
    DmaMap(DmaMap),
    /// DMA_UNMAP.
    DmaUnmap(DmaUnmap),
    /// DEVICE_GET_INFO.
    DeviceInfo {
        /// Bytes of payload that the reply may have.
        argsz: u32,
    },
    /// DEVICE_GET_REGION_INFO.
    RegionInfo {
        /// Bytes of payload that the reply may have.
        argsz: u32,
        /// Which region.
        index: u32,
    },
    /// DEVICE_GET_REGION_IO_FDS.
    RegionIoFds {
        /// Bytes of payload that the reply may have.
        argsz: u32,
        /// Which region.
        index: u32,
    },
    /// DEVICE_GET_IRQ_INFO.
    IrqInfo {
        /// Bytes of payload that the reply may have.
        argsz: u32,
        /// Which type of interrupts.
        index: u32,
    },
    /// DEVICE_SET_IRQS.
    SetIrqs(SetIrqs<'a>),
    /// REGION_READ.
    RegionRead(RegionAccess),
    /// REGION_WRITE.
    RegionWrite(RegionWrite<'a>),
    /// REGION_WRITE_MULTI.
    RegionWriteMulti(WriteMulti),
    /// DMA_READ.
    DmaRead(DmaAccess),
    /// DMA_WRITE.
    DmaWrite {
        /// The first DMA address.
        address: u64,
        /// What is written.
        data: &'a [u8],
    },
    /// DEVICE_RESET.
    DeviceReset,
    /// A command that this crate knows nothing of, whose payload was not looked at.
    Other(Command),
}

impl<'a> Request<'a> {
    /// Decodes a command that has so many file descriptors beside it.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] if it is not what the specification says, or exceeds `limits`.
    pub fn decode(
        header: &Header,
        payload: &'a [u8],
        descriptors: usize,
        limits: &Limits,
    ) -> Result<Self, DecodeError> {
        let command = header.command();
        if header.is_reply() {
            return Err(DecodeError::Direction(command));
        }
        let max = limits.max_transfer;
        let request = match command {
            Command::VERSION => Self::Version(Version::decode(payload)?),
            Command::DMA_MAP => Self::DmaMap(DmaMap::decode(payload)?),
            Command::DMA_UNMAP => Self::DmaUnmap(DmaUnmap::decode(payload)?),
            Command::DEVICE_GET_INFO => {
                let (wire, _): (wire::DeviceInfo, _) = wire::split(command, payload)?;
                Self::DeviceInfo {
                    argsz: room::<wire::DeviceInfo>(command, wire.argsz.get())?,
                }
            }
            Command::DEVICE_GET_REGION_INFO => {
                let (wire, _): (wire::RegionInfo, _) = wire::split(command, payload)?;
                Self::RegionInfo {
                    argsz: room::<wire::RegionInfo>(command, wire.argsz.get())?,
                    index: wire.index.get(),
                }
            }
            Command::DEVICE_GET_REGION_IO_FDS => {
                let (wire, _): (wire::RegionIoFds, _) = wire::split(command, payload)?;
                expect(command, "flags", wire.flags.get(), wire.flags.get() == 0)?;
                Self::RegionIoFds {
                    argsz: room::<wire::RegionIoFds>(command, wire.argsz.get())?,
                    index: wire.index.get(),
                }
            }
            Command::DEVICE_GET_IRQ_INFO => {
                let (wire, _): (wire::IrqInfo, _) = wire::split(command, payload)?;
                Self::IrqInfo {
                    argsz: room::<wire::IrqInfo>(command, wire.argsz.get())?,
                    index: wire.index.get(),
                }
            }
            Command::DEVICE_SET_IRQS => Self::SetIrqs(SetIrqs::decode(payload, descriptors)?),
            Command::REGION_READ => {
                let (access, data) = RegionAccess::split(command, payload, max)?;
                expect_no_data(command, payload, data)?;
                Self::RegionRead(access)
            }
            Command::REGION_WRITE => {
                let (access, data) = RegionAccess::split(command, payload, max)?;
                expect_data(command, payload, data, access.count.into())?;
                Self::RegionWrite(RegionWrite {
                    region: access.region,
                    offset: access.offset,
                    data,
                })
            }
            Command::REGION_WRITE_MULTI => Self::RegionWriteMulti(WriteMulti::decode(payload)?),
            Command::DMA_READ => {
                let (access, data) = DmaAccess::split(command, payload, max)?;
                expect_no_data(command, payload, data)?;
                Self::DmaRead(access)
            }
            Command::DMA_WRITE => {
                let (access, data) = DmaAccess::split(command, payload, max)?;
                expect_data(command, payload, data, access.count)?;
                Self::DmaWrite {
                    address: access.address,
                    data,
                }
            }
            Command::DEVICE_RESET => {
                expect_no_data(command, payload, payload)?;
                Self::DeviceReset
            }
            command => return Ok(Self::Other(command)),
        };
        request.check_descriptors(descriptors)?;
        Ok(request)
    }

    fn check_descriptors(&self, count: usize) -> Result<(), DecodeError> {
        let allowed = match self {
            Self::DmaMap(_) => 1,
            // Checked where they are decoded.
            Self::SetIrqs(SetIrqs {
                data: IrqData::Eventfd,
                ..
            }) => return Ok(()),
            _ => 0,
        };
        if count <= allowed {
            return Ok(());
        }
        Err(DecodeError::Descriptors {
            command: self.command(),
            count,
        })
    }

    /// The command.
    pub fn command(&self) -> Command {
        match self {
            Self::Version(_) => Command::VERSION,
            Self::DmaMap(_) => Command::DMA_MAP,
            Self::DmaUnmap(_) => Command::DMA_UNMAP,
            Self::DeviceInfo { .. } => Command::DEVICE_GET_INFO,
            Self::RegionInfo { .. } => Command::DEVICE_GET_REGION_INFO,
            Self::RegionIoFds { .. } => Command::DEVICE_GET_REGION_IO_FDS,
            Self::IrqInfo { .. } => Command::DEVICE_GET_IRQ_INFO,
            Self::SetIrqs(_) => Command::DEVICE_SET_IRQS,
            Self::RegionRead(_) => Command::REGION_READ,
            Self::RegionWrite(_) => Command::REGION_WRITE,
            Self::RegionWriteMulti(_) => Command::REGION_WRITE_MULTI,
            Self::DmaRead(_) => Command::DMA_READ,
            Self::DmaWrite { .. } => Command::DMA_WRITE,
            Self::DeviceReset => Command::DEVICE_RESET,
            Self::Other(command) => *command,
        }
    }

    /// The whole message, named `id`.
    pub fn encode(&self, id: u16, no_reply: bool) -> Vec<u8> {
        // The header follows when the size is known.
        let mut bytes = vec![0; HEADER_SIZE];
        let into = &mut bytes;
        match self {
            Self::Version(version) => version.encode(into),
            Self::DmaMap(map) => map.encode(into),
            Self::DmaUnmap(unmap) => unmap.encode(into),
            Self::DeviceInfo { argsz } => {
                let wire = wire::DeviceInfo {
                    argsz: (*argsz).into(),
                    ..wire::DeviceInfo::default()
                };
                into.extend_from_slice(wire.as_bytes());
            }
            Self::RegionInfo { argsz, index } => {
                let wire = wire::RegionInfo {
                    argsz: (*argsz).into(),
                    index: (*index).into(),
                    ..wire::RegionInfo::default()
                };
                into.extend_from_slice(wire.as_bytes());
            }
            Self::RegionIoFds { argsz, index } => {
                let wire = wire::RegionIoFds {
                    argsz: (*argsz).into(),
                    index: (*index).into(),
                    ..wire::RegionIoFds::default()
                };
                into.extend_from_slice(wire.as_bytes());
            }
            Self::IrqInfo { argsz, index } => {
                let wire = wire::IrqInfo {
                    argsz: (*argsz).into(),
                    index: (*index).into(),
                    ..wire::IrqInfo::default()
                };
                into.extend_from_slice(wire.as_bytes());
            }
            Self::SetIrqs(set) => set.encode(into),
            Self::RegionRead(access) => access.encode(&[], into),
            Self::RegionWrite(write) => write.access().encode(write.data, into),
            Self::RegionWriteMulti(writes) => writes.encode(into),
            Self::DmaRead(access) => access.encode(&[], into),
            Self::DmaWrite { address, data } => {
                let access = DmaAccess {
                    address: *address,
                    count: data.len() as u64,
                };
                access.encode(data, into);
            }
            Self::DeviceReset | Self::Other(_) => {}
        }
        let header = Header::command_of(id, self.command(), bytes.len() - HEADER_SIZE, no_reply);
        bytes[..HEADER_SIZE].copy_from_slice(&header.encode());
        bytes
    }
}

/// Refuses an `argsz` that has no room for a reply without extras.
fn room<T>(command: Command, argsz: u32) -> Result<u32, DecodeError> {
    expect(command, "argsz", argsz, argsz as usize >= size_of::<T>())?;
    Ok(argsz)
}

pub(crate) fn expect_no_data(
    command: Command,
    payload: &[u8],
    data: &[u8],
) -> Result<(), DecodeError> {
    expect_data(command, payload, data, 0)
}

pub(crate) fn expect_data(
    command: Command,
    payload: &[u8],
    data: &[u8],
    count: u64,
) -> Result<(), DecodeError> {
    let fixed = (payload.len() - data.len()) as u64;
    expect_size(
        command,
        fixed + count,
        payload.len(),
        data.len() as u64 == count,
    )
}
