//! Memory of the client's (DMA_MAP, DMA_UNMAP, DMA_READ, DMA_WRITE).

use zerocopy::IntoBytes;

use crate::error::DecodeError;
use crate::header::Command;
use crate::wire::{self, expect, flag};

const READABLE: u32 = 1 << 0;
const WRITABLE: u32 = 1 << 1;
const DIRTY_BITMAP: u32 = 1 << 0;
const ALL: u32 = 1 << 1;

/// Memory that the server may access ("VFIO_USER_DMA_MAP").
///
/// With a file descriptor beside it the memory is in that file; without, the server asks for it by
/// DMA_READ and DMA_WRITE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// Whether the server may read.
    pub readable: bool,
    /// Whether the server may write.
    pub writable: bool,
    /// Where the memory begins in the file, in bytes.
    pub offset: u64,
    /// Its first DMA address.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
}

impl DmaMap {
    pub(crate) fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        const COMMAND: Command = Command::DMA_MAP;
        let wire: wire::DmaMap = wire::whole(COMMAND, payload)?;
        let (argsz, flags) = (wire.argsz.get(), wire.flags.get());
        expect(COMMAND, "argsz", argsz, argsz as usize >= payload.len())?;
        expect(COMMAND, "flags", flags, flags & !(READABLE | WRITABLE) == 0)?;
        let map = Self {
            readable: flags & READABLE != 0,
            writable: flags & WRITABLE != 0,
            offset: wire.offset.get(),
            address: wire.address.get(),
            size: wire.size.get(),
        };
        expect_range(COMMAND, "size", map.address, map.size)?;
        expect_range(COMMAND, "offset", map.offset, map.size)?;
        Ok(map)
    }

    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        let wire = wire::DmaMap {
            argsz: (size_of::<wire::DmaMap>() as u32).into(),
            flags: (flag(self.readable, READABLE) | flag(self.writable, WRITABLE)).into(),
            offset: self.offset.into(),
            address: self.address.into(),
            size: self.size.into(),
        };
        into.extend_from_slice(wire.as_bytes());
    }
}

/// Memory that the server may not access any more ("VFIO_USER_DMA_UNMAP").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// Everything, and the range is empty: an extension that libvfio-user has (`VFIO_DMA_UNMAP_FLAG_ALL`).
    pub all: bool,
    /// The first DMA address, of what was mapped at once.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
}

impl DmaUnmap {
    pub(crate) fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        const COMMAND: Command = Command::DMA_UNMAP;
        let (wire, _): (wire::DmaUnmap, _) = wire::split(COMMAND, payload)?;
        let (argsz, flags) = (wire.argsz.get(), wire.flags.get());
        if flags & DIRTY_BITMAP != 0 {
            return Err(DecodeError::Unsupported {
                command: COMMAND,
                what: "a bitmap of dirty pages",
            });
        }
        let wire: wire::DmaUnmap = wire::whole(COMMAND, payload)?;
        expect(COMMAND, "argsz", argsz, argsz as usize >= payload.len())?;
        expect(COMMAND, "flags", flags, flags & !ALL == 0)?;
        let unmap = Self {
            all: flags & ALL != 0,
            address: wire.address.get(),
            size: wire.size.get(),
        };
        if unmap.all {
            expect(COMMAND, "address", unmap.address, unmap.address == 0)?;
            expect(COMMAND, "size", unmap.size, unmap.size == 0)?;
        } else {
            expect_range(COMMAND, "size", unmap.address, unmap.size)?;
        }
        Ok(unmap)
    }

    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        let wire = wire::DmaUnmap {
            argsz: (size_of::<wire::DmaUnmap>() as u32).into(),
            flags: flag(self.all, ALL).into(),
            address: self.address.into(),
            size: self.size.into(),
        };
        into.extend_from_slice(wire.as_bytes());
    }
}

/// A range of DMA addresses ("VFIO_USER_DMA_READ", "VFIO_USER_DMA_WRITE").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaAccess {
    /// The first address.
    pub address: u64,
    /// Bytes.
    pub count: u64,
}

impl DmaAccess {
    /// Splits the range off the beginning of a payload.
    pub(crate) fn split(
        command: Command,
        payload: &[u8],
        max: u32,
    ) -> Result<(Self, &[u8]), DecodeError> {
        let (wire, data): (wire::DmaAccess, _) = wire::split(command, payload)?;
        let access = Self {
            address: wire.address.get(),
            count: wire.count.get(),
        };
        expect(command, "count", access.count, access.count <= max.into())?;
        expect_range(command, "count", access.address, access.count)?;
        Ok((access, data))
    }

    pub(crate) fn encode(&self, data: &[u8], into: &mut Vec<u8>) {
        let wire = wire::DmaAccess {
            address: self.address.into(),
            count: self.count.into(),
        };
        into.extend_from_slice(wire.as_bytes());
        into.extend_from_slice(data);
    }
}

/// Refuses an empty range, and one that does not end within 64 bits.
fn expect_range(
    command: Command,
    field: &'static str,
    first: u64,
    size: u64,
) -> Result<(), DecodeError> {
    expect(
        command,
        field,
        size,
        size > 0 && first.checked_add(size - 1).is_some(),
    )
}
