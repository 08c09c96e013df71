//! Interrupts (DEVICE_GET_IRQ_INFO, DEVICE_SET_IRQS).

use zerocopy::IntoBytes;

use crate::error::DecodeError;
use crate::header::Command;
use crate::wire::{self, expect, expect_size, field, flag};

/// Interrupt by pin, index of the type of interrupts of a PCI function (`<linux/vfio.h>`).
pub const INTX: u32 = 0;
/// Message Signalled Interrupts.
pub const MSI: u32 = 1;
/// MSI-X.
pub const MSIX: u32 = 2;
/// An error that was not recovered from.
pub const ERROR: u32 = 3;
/// The device is asked for.
pub const REQUEST: u32 = 4;
/// How many types there are.
pub const COUNT: u32 = 5;

const EVENTFD: u32 = 1 << 0;
const MASKABLE: u32 = 1 << 1;
const AUTOMASKED: u32 = 1 << 2;
const NORESIZE: u32 = 1 << 3;

const DATA_NONE: u32 = 1 << 0;
const DATA_BOOL: u32 = 1 << 1;
const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_MASK: u32 = 1 << 3;
const ACTION_UNMASK: u32 = 1 << 4;
const ACTION_TRIGGER: u32 = 1 << 5;

/// A type of interrupts ("VFIO IRQ info format").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// Which type.
    pub index: u32,
    /// How many interrupts of it there are.
    pub count: u32,
    /// They can be signalled by eventfds.
    pub eventfd: bool,
    /// They can be masked by DEVICE_SET_IRQS.
    pub maskable: bool,
    /// They are masked when they are signalled.
    pub automasked: bool,
    /// All that are wanted are set up at once.
    pub noresize: bool,
}

impl IrqInfo {
    pub(crate) fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let (wire, _): (wire::IrqInfo, _) = wire::split(Command::DEVICE_GET_IRQ_INFO, payload)?;
        let flags = wire.flags.get();
        Ok(Self {
            index: wire.index.get(),
            count: wire.count.get(),
            eventfd: flags & EVENTFD != 0,
            maskable: flags & MASKABLE != 0,
            automasked: flags & AUTOMASKED != 0,
            noresize: flags & NORESIZE != 0,
        })
    }

    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        let flags = flag(self.eventfd, EVENTFD)
            | flag(self.maskable, MASKABLE)
            | flag(self.automasked, AUTOMASKED)
            | flag(self.noresize, NORESIZE);
        let wire = wire::IrqInfo {
            argsz: (size_of::<wire::IrqInfo>() as u32).into(),
            flags: flags.into(),
            index: self.index.into(),
            count: self.count.into(),
        };
        into.extend_from_slice(wire.as_bytes());
    }
}

/// What is done to interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// They are masked; with eventfds, these are told of that.
    Mask,
    /// They are unmasked; with eventfds, these are told of that.
    Unmask,
    /// They are triggered; with eventfds, these are signalled from now on.
    Trigger,
}

/// To which interrupts it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqData<'a> {
    /// All of the range.
    None,
    /// Those whose byte is not 0; one byte for each.
    Bool(&'a [u8]),
    /// All of the range: the message has an eventfd for each, or none, which takes away those that there
    /// are.
    Eventfd,
}

/// What is done to which interrupts ("VFIO_USER_DEVICE_SET_IRQS").
///
/// [`IrqAction::Trigger`] with [`IrqData::None`] and an empty range disables all of the type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// Which type.
    pub index: u32,
    /// The first interrupt.
    pub start: u32,
    /// How many.
    pub count: u32,
    /// What is done.
    pub action: IrqAction,
    /// To which.
    pub data: IrqData<'a>,
}

impl<'a> SetIrqs<'a> {
    pub(crate) fn decode(payload: &'a [u8], descriptors: usize) -> Result<Self, DecodeError> {
        const COMMAND: Command = Command::DEVICE_SET_IRQS;
        let (wire, data): (wire::IrqSet, _) = wire::split(COMMAND, payload)?;
        let (argsz, flags) = (wire.argsz.get(), wire.flags.get());
        let (start, count) = (wire.start.get(), wire.count.get());
        expect(
            COMMAND,
            "argsz",
            argsz,
            argsz as usize >= size_of::<wire::IrqSet>(),
        )?;
        expect(COMMAND, "count", count, start.checked_add(count).is_some())?;
        let all_data = DATA_NONE | DATA_BOOL | DATA_EVENTFD;
        let action = match flags & !all_data {
            ACTION_MASK => IrqAction::Mask,
            ACTION_UNMASK => IrqAction::Unmask,
            ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(field(COMMAND, "flags", flags)),
        };
        let fixed = size_of::<wire::IrqSet>() as u64;
        let (kind, sizes) = match flags & all_data {
            DATA_NONE => (IrqData::None, [0, 0]),
            DATA_BOOL => (IrqData::Bool(data), [count.into(), count.into()]),
            // Some send what the descriptors would be in an ioctl.
            DATA_EVENTFD => (IrqData::Eventfd, [0, 4 * u64::from(count)]),
            _ => return Err(field(COMMAND, "flags", flags)),
        };
        let is_right = sizes.contains(&(data.len() as u64));
        expect_size(COMMAND, fixed + sizes[0], payload.len(), is_right)?;
        let is_right = match kind {
            IrqData::Eventfd => descriptors == 0 || descriptors as u64 == u64::from(count),
            _ => descriptors == 0,
        };
        if !is_right {
            return Err(DecodeError::Descriptors {
                command: COMMAND,
                count: descriptors,
            });
        }
        Ok(Self {
            index: wire.index.get(),
            start,
            count,
            action,
            data: kind,
        })
    }

    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        let action = match self.action {
            IrqAction::Mask => ACTION_MASK,
            IrqAction::Unmask => ACTION_UNMASK,
            IrqAction::Trigger => ACTION_TRIGGER,
        };
        let (data_flag, data) = match self.data {
            IrqData::None => (DATA_NONE, &[] as &[u8]),
            IrqData::Bool(data) => (DATA_BOOL, data),
            IrqData::Eventfd => (DATA_EVENTFD, &[] as &[u8]),
        };
        let wire = wire::IrqSet {
            argsz: ((size_of::<wire::IrqSet>() + data.len()) as u32).into(),
            flags: (action | data_flag).into(),
            index: self.index.into(),
            start: self.start.into(),
            count: self.count.into(),
        };
        into.extend_from_slice(wire.as_bytes());
        into.extend_from_slice(data);
    }
}
