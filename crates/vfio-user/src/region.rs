//! The device and its regions (DEVICE_GET_INFO, DEVICE_GET_REGION_INFO, REGION_READ, REGION_WRITE).

use zerocopy::{FromBytes, IntoBytes};

use crate::error::DecodeError;
use crate::header::Command;
use crate::wire::{self, expect, expect_size, field, flag};

/// BAR 0, index of the region of a PCI function (`<linux/vfio.h>`); the other BARs follow.
pub const BAR0: u32 = 0;
/// The expansion ROM.
pub const ROM: u32 = 6;
/// The configuration space.
pub const CONFIG: u32 = 7;
/// How many regions a PCI function has.
pub const COUNT: u32 = 9;

const DEVICE_RESET: u32 = 1 << 0;
const DEVICE_PCI: u32 = 1 << 1;

const REGION_READ: u32 = 1 << 0;
const REGION_WRITE: u32 = 1 << 1;
const REGION_MMAP: u32 = 1 << 2;
const REGION_CAPS: u32 = 1 << 3;

const CAPABILITY_SPARSE_MMAP: u16 = 1;
/// Areas that one region may have: more than pages that anyone maps one by one.
const MAX_AREAS: usize = 4096;

/// What a device is ("VFIO_USER_DEVICE_GET_INFO").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// There is DEVICE_RESET.
    pub resets: bool,
    /// It is a PCI function.
    pub is_pci: bool,
    /// How many regions there are.
    pub regions: u32,
    /// How many types of interrupts there are.
    pub irqs: u32,
}

impl DeviceInfo {
    pub(crate) fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let (wire, _): (wire::DeviceInfo, _) = wire::split(Command::DEVICE_GET_INFO, payload)?;
        let flags = wire.flags.get();
        Ok(Self {
            resets: flags & DEVICE_RESET != 0,
            is_pci: flags & DEVICE_PCI != 0,
            regions: wire.num_regions.get(),
            irqs: wire.num_irqs.get(),
        })
    }

    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        let flags = flag(self.resets, DEVICE_RESET) | flag(self.is_pci, DEVICE_PCI);
        let wire = wire::DeviceInfo {
            argsz: (size_of::<wire::DeviceInfo>() as u32).into(),
            flags: flags.into(),
            num_regions: self.regions.into(),
            num_irqs: self.irqs.into(),
        };
        into.extend_from_slice(wire.as_bytes());
    }
}

/// An area of a region that can be mapped ("VFIO sparse mmap cap header").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparseArea {
    /// Where it begins in the region, in bytes. In the file it is [`RegionInfo::offset`] further on.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// A region of a device ("VFIO_USER_DEVICE_GET_REGION_INFO").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Which one.
    pub index: u32,
    /// It can be read.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// It can be mapped, by the file descriptor beside the reply: all of it, or else what
    /// [`RegionInfo::sparse`] says.
    pub mappable: bool,
    /// Its size in bytes; 0 if there is no such region.
    pub size: u64,
    /// Where it begins in the file that is mapped, in bytes.
    pub offset: u64,
    /// The areas that can be mapped, if that is not all of it. They are inside of the region.
    pub sparse: Option<Vec<SparseArea>>,
}

impl RegionInfo {
    /// Bytes of the payload of the reply.
    pub fn full_size(&self) -> u32 {
        let areas = self.sparse.as_ref().map_or(0, |areas| {
            size_of::<wire::Capability>()
                + size_of::<wire::SparseMmap>()
                + areas.len() * size_of::<wire::SparseArea>()
        });
        (size_of::<wire::RegionInfo>() + areas) as u32
    }

    /// Decodes a reply; also returns the size of its full payload, and whether this is it.
    pub(crate) fn decode(payload: &[u8]) -> Result<(Self, u32, bool), DecodeError> {
        const COMMAND: Command = Command::DEVICE_GET_REGION_INFO;
        let (wire, _): (wire::RegionInfo, _) = wire::split(COMMAND, payload)?;
        let flags = wire.flags.get();
        let mut info = Self {
            index: wire.index.get(),
            readable: flags & REGION_READ != 0,
            writable: flags & REGION_WRITE != 0,
            mappable: flags & REGION_MMAP != 0,
            size: wire.size.get(),
            offset: wire.offset.get(),
            sparse: None,
        };
        let argsz = wire.argsz.get();
        if argsz as usize > payload.len() {
            return Ok((info, argsz, false));
        }
        if flags & REGION_CAPS != 0 {
            info.sparse = info.capabilities(wire.cap_offset.get(), payload)?;
        }
        Ok((info, argsz, true))
    }

    /// Looks for the areas that can be mapped among the capabilities, of which each is to be behind the
    /// one before it.
    fn capabilities(
        &self,
        first: u32,
        payload: &[u8],
    ) -> Result<Option<Vec<SparseArea>>, DecodeError> {
        const COMMAND: Command = Command::DEVICE_GET_REGION_INFO;
        let mut areas = None;
        let mut next = first;
        let mut end = size_of::<wire::RegionInfo>();
        while next != 0 {
            let refused = || field(COMMAND, "offset of a capability", next);
            let capability = payload.get(next as usize..).ok_or_else(refused)?;
            if (next as usize) < end {
                return Err(refused());
            }
            let (header, body) =
                wire::Capability::read_from_prefix(capability).map_err(|_| refused())?;
            end = next as usize + size_of::<wire::Capability>();
            if header.id.get() == CAPABILITY_SPARSE_MMAP && areas.is_none() {
                areas = Some(self.areas(body)?);
            }
            next = header.next.get();
        }
        Ok(areas)
    }

    fn areas(&self, body: &[u8]) -> Result<Vec<SparseArea>, DecodeError> {
        const COMMAND: Command = Command::DEVICE_GET_REGION_INFO;
        let (head, body): (wire::SparseMmap, _) = wire::split(COMMAND, body)?;
        let count = head.nr_areas.get() as usize;
        let refused = || field(COMMAND, "nr_areas", head.nr_areas.get());
        if count > MAX_AREAS {
            return Err(refused());
        }
        let (areas, _) =
            <[wire::SparseArea]>::ref_from_prefix_with_elems(body, count).map_err(|_| refused())?;
        areas
            .iter()
            .map(|area| {
                let (offset, size) = (area.offset.get(), area.size.get());
                let is_inside = offset.checked_add(size).is_some_and(|end| end <= self.size);
                expect(COMMAND, "offset of an area", offset, is_inside)?;
                Ok(SparseArea { offset, size })
            })
            .collect()
    }

    /// Encodes the payload.
    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        self.encode_parts(self.full_size(), self.sparse.as_deref(), into);
    }

    /// Encodes the payload without capabilities, for which `argsz` bytes would be needed. It does not
    /// say that there are some, since some clients then refuse a reply that has none.
    pub(crate) fn encode_cut(&self, argsz: u32, into: &mut Vec<u8>) {
        self.encode_parts(argsz, None, into);
    }

    fn encode_parts(&self, argsz: u32, areas: Option<&[SparseArea]>, into: &mut Vec<u8>) {
        let flags = flag(self.readable, REGION_READ)
            | flag(self.writable, REGION_WRITE)
            | flag(self.mappable, REGION_MMAP)
            | flag(areas.is_some(), REGION_CAPS);
        let fixed = size_of::<wire::RegionInfo>() as u32;
        let wire = wire::RegionInfo {
            argsz: argsz.into(),
            flags: flags.into(),
            index: self.index.into(),
            cap_offset: flag(areas.is_some(), fixed).into(),
            size: self.size.into(),
            offset: self.offset.into(),
        };
        into.extend_from_slice(wire.as_bytes());
        let Some(areas) = areas else {
            return;
        };
        let header = wire::Capability {
            id: CAPABILITY_SPARSE_MMAP.into(),
            version: 1.into(),
            next: 0.into(),
        };
        let head = wire::SparseMmap {
            nr_areas: (areas.len() as u32).into(),
            reserved: 0.into(),
        };
        into.extend_from_slice(header.as_bytes());
        into.extend_from_slice(head.as_bytes());
        for area in areas {
            let area = wire::SparseArea {
                offset: area.offset.into(),
                size: area.size.into(),
            };
            into.extend_from_slice(area.as_bytes());
        }
    }
}

/// A range of a region ("VFIO_USER_REGION_READ").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAccess {
    /// Which region.
    pub region: u32,
    /// Where the range begins in it, in bytes.
    pub offset: u64,
    /// Bytes.
    pub count: u32,
}

impl RegionAccess {
    /// Splits the range off the beginning of a payload.
    pub(crate) fn split(
        command: Command,
        payload: &[u8],
        max: u32,
    ) -> Result<(Self, &[u8]), DecodeError> {
        let (wire, data): (wire::RegionAccess, _) = wire::split(command, payload)?;
        let access = Self {
            region: wire.region.get(),
            offset: wire.offset.get(),
            count: wire.count.get(),
        };
        access.check(command, max)?;
        Ok((access, data))
    }

    fn check(&self, command: Command, max: u32) -> Result<(), DecodeError> {
        let is_right = (1..=max).contains(&self.count)
            && self.offset.checked_add(u64::from(self.count)).is_some();
        expect(command, "count", self.count, is_right)
    }

    pub(crate) fn encode(&self, data: &[u8], into: &mut Vec<u8>) {
        let wire = wire::RegionAccess {
            offset: self.offset.into(),
            region: self.region.into(),
            count: self.count.into(),
        };
        into.extend_from_slice(wire.as_bytes());
        into.extend_from_slice(data);
    }
}

/// A write to a region ("VFIO_USER_REGION_WRITE").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionWrite<'a> {
    /// Which region.
    pub region: u32,
    /// Where it begins in the region, in bytes.
    pub offset: u64,
    /// What is written.
    pub data: &'a [u8],
}

impl RegionWrite<'_> {
    /// What is written, without the data.
    pub fn access(&self) -> RegionAccess {
        RegionAccess {
            region: self.region,
            offset: self.offset,
            count: self.data.len() as u32,
        }
    }
}

/// Several writes of at most 8 bytes, in order ("VFIO_USER_REGION_WRITE_MULTI").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteMulti(Vec<(RegionAccess, [u8; 8])>);

impl WriteMulti {
    /// These writes; `None` if one of them has no data, or more than 8 bytes.
    pub fn new(writes: &[RegionWrite<'_>]) -> Option<Self> {
        let writes = writes.iter().map(|write| {
            let mut data = [0; 8];
            data.get_mut(..write.data.len())?
                .copy_from_slice(write.data);
            let access = write.access();
            (access.count > 0).then_some((access, data))
        });
        writes.collect::<Option<_>>().map(Self)
    }

    /// The writes.
    pub fn iter(&self) -> impl Iterator<Item = RegionWrite<'_>> {
        self.0.iter().map(|(access, data)| RegionWrite {
            region: access.region,
            offset: access.offset,
            // At most 8: `new` and `decode` see to that.
            data: &data[..access.count as usize],
        })
    }

    /// How many writes there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        const COMMAND: Command = Command::REGION_WRITE_MULTI;
        let (count, rest): (zerocopy::native_endian::U64, _) = wire::split(COMMAND, payload)?;
        let expected = count.get().checked_mul(size_of::<wire::Write>() as u64);
        let is_right = expected == Some(rest.len() as u64);
        expect_size(
            COMMAND,
            expected
                .and_then(|size| size.checked_add(8))
                .unwrap_or(u64::MAX),
            payload.len(),
            is_right,
        )?;
        let writes = <[wire::Write]>::ref_from_bytes(rest)
            .map_err(|_| field(COMMAND, "wr_cnt", count.get()))?;
        let writes = writes.iter().map(|write| {
            let access = RegionAccess {
                region: write.region.get(),
                offset: write.offset.get(),
                count: write.count.get(),
            };
            access.check(COMMAND, 8)?;
            Ok((access, write.data))
        });
        writes.collect::<Result<_, _>>().map(Self)
    }

    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        into.extend_from_slice(&(self.0.len() as u64).to_ne_bytes());
        for (access, data) in &self.0 {
            access.encode(data, into);
        }
    }
}
