//! The structures as they lie in messages: in the byte order of the host, at any byte position.

use zerocopy::native_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::DecodeError;
use crate::header::Command;

macro_rules! wire {
    ($(#[$doc:meta] $name:ident($size:literal) { $($field:ident: $type:ty,)* })*) => {$(
        #[$doc]
        #[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub(crate) struct $name {
            $(pub(crate) $field: $type,)*
        }

        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

wire! {
    /// Of each message.
    Header(16) { id: U16, command: U16, size: U32, flags: U32, errno: U32, }
    /// VERSION, before the JSON.
    Version(4) { major: U16, minor: U16, }
    /// DMA_MAP.
    DmaMap(32) { argsz: U32, flags: U32, offset: U64, address: U64, size: U64, }
    /// DMA_UNMAP and its reply.
    DmaUnmap(24) { argsz: U32, flags: U32, address: U64, size: U64, }
    /// DEVICE_GET_INFO and its reply.
    DeviceInfo(16) { argsz: U32, flags: U32, num_regions: U32, num_irqs: U32, }
    /// DEVICE_GET_REGION_INFO and its reply.
    RegionInfo(32) { argsz: U32, flags: U32, index: U32, cap_offset: U32, size: U64, offset: U64, }
    /// A capability of a region.
    Capability(8) { id: U16, version: U16, next: U32, }
    /// What follows the header of the capability for sparse mmap, before the areas.
    SparseMmap(8) { nr_areas: U32, reserved: U32, }
    /// An area that can be mapped.
    SparseArea(16) { offset: U64, size: U64, }
    /// DEVICE_GET_REGION_IO_FDS and its reply.
    RegionIoFds(16) { argsz: U32, flags: U32, index: U32, count: U32, }
    /// DEVICE_GET_IRQ_INFO and its reply.
    IrqInfo(16) { argsz: U32, flags: U32, index: U32, count: U32, }
    /// DEVICE_SET_IRQS, before the data.
    IrqSet(20) { argsz: U32, flags: U32, index: U32, start: U32, count: U32, }
    /// REGION_READ, REGION_WRITE and their replies, before the data.
    RegionAccess(16) { offset: U64, region: U32, count: U32, }
    /// One write of REGION_WRITE_MULTI.
    Write(24) { offset: U64, region: U32, count: U32, data: [u8; 8], }
    /// DMA_READ, DMA_WRITE and their replies, before the data.
    DmaAccess(16) { address: U64, count: U64, }
}

/// Splits a structure off the beginning of a payload.
pub(crate) fn split<T: FromBytes + KnownLayout + Immutable>(
    command: Command,
    payload: &[u8],
) -> Result<(T, &[u8]), DecodeError> {
    T::read_from_prefix(payload).map_err(|_| DecodeError::Size {
        command,
        expected: size_of::<T>() as u64,
        actual: payload.len() as u64,
    })
}

/// The structure that is all of a payload.
pub(crate) fn whole<T: FromBytes + KnownLayout + Immutable>(
    command: Command,
    payload: &[u8],
) -> Result<T, DecodeError> {
    let (value, rest) = split(command, payload)?;
    expect_size(
        command,
        size_of::<T>() as u64,
        payload.len(),
        rest.is_empty(),
    )?;
    Ok(value)
}

/// Refuses a payload of the wrong size.
pub(crate) fn expect_size(
    command: Command,
    expected: u64,
    actual: usize,
    is_right: bool,
) -> Result<(), DecodeError> {
    if is_right {
        return Ok(());
    }
    Err(DecodeError::Size {
        command,
        expected,
        actual: actual as u64,
    })
}

/// Refuses a field's value.
pub(crate) fn expect(
    command: Command,
    name: &'static str,
    value: impl Into<u64>,
    is_right: bool,
) -> Result<(), DecodeError> {
    if is_right {
        return Ok(());
    }
    Err(field(command, name, value))
}

/// A field has a value that it may not have.
pub(crate) fn field(command: Command, name: &'static str, value: impl Into<u64>) -> DecodeError {
    DecodeError::Field {
        command,
        field: name,
        value: value.into(),
    }
}

/// A bit of a field of flags, or none.
pub(crate) fn flag(is_set: bool, bit: u32) -> u32 {
    if is_set { bit } else { 0 }
}
