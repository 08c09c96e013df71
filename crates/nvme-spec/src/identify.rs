//! The data structures that Identify returns (Base, section 5.17; NVM, section 4.1.5).

use core::fmt;

mod controller;
mod list;
mod namespace;

pub use controller::{
    IdentifyController, IdentifyNvmController, OptionalAdminCommands, OptionalNvmCommands,
    SglAlignment, SglSupport,
};
pub use list::{ActiveNamespaces, DescriptorError, NamespaceDescriptor, NamespaceDescriptors};
pub use namespace::{DeallocatedRead, IdentifyNamespace, LbaFormat, NamespaceFeatures};

/// CNS: which structure an Identify command asks for (Base, section 5.17, figure "Identify - CNS
/// Values"). Any value may occur; those that are used here are named.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cns(pub u8);

impl Cns {
    /// Identify Namespace of the NVM command set, 00h.
    pub const NAMESPACE: Self = Self(0x00);
    /// Identify Controller, 01h.
    pub const CONTROLLER: Self = Self(0x01);
    /// Active Namespace ID list, 02h.
    pub const ACTIVE_NAMESPACES: Self = Self(0x02);
    /// Namespace Identification Descriptor list, 03h.
    pub const NAMESPACE_DESCRIPTORS: Self = Self(0x03);
    /// I/O Command Set specific Identify Namespace, 05h.
    pub const COMMAND_SET_NAMESPACE: Self = Self(0x05);
    /// I/O Command Set specific Identify Controller, 06h.
    pub const COMMAND_SET_CONTROLLER: Self = Self(0x06);
    /// Active Namespace ID list of one I/O command set, 07h.
    pub const COMMAND_SET_ACTIVE_NAMESPACES: Self = Self(0x07);
    /// I/O Command Set independent Identify Namespace, 08h.
    pub const INDEPENDENT_NAMESPACE: Self = Self(0x08);
    /// Allocated Namespace ID list, 10h.
    pub const ALLOCATED_NAMESPACES: Self = Self(0x10);
    /// I/O Command Set data structure, 1Ch.
    pub const COMMAND_SETS: Self = Self(0x1c);
}

impl fmt::Debug for Cns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cns({:#04x})", self.0)
    }
}

#[cfg(test)]
mod tests;
