//! Lists that Identify returns: active namespaces, and a namespace's identifiers.

use core::fmt;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Active Namespace ID list, CNS 02h, 4096 bytes (Base, section 5.17.2.2):
/// up to 1,024 identifiers in increasing order, zeroes behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct ActiveNamespaces {
    /// The entries.
    pub entries: [U32; Self::ENTRIES],
}

const _: () = assert!(size_of::<ActiveNamespaces>() == 4096);

impl ActiveNamespaces {
    /// How many entries the list has room for. A full list is followed by another one, asked for with
    /// its last identifier.
    pub const ENTRIES: usize = 1024;

    /// The identifiers up to the first 0. Their order is as the controller gave it: a caller that
    /// asks for the next list has to see that they increase.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.entries
            .iter()
            .map(|entry| entry.get())
            .take_while(|&nsid| nsid != 0)
    }
}

impl Default for ActiveNamespaces {
    /// The empty list.
    fn default() -> Self {
        Self::new_zeroed()
    }
}

/// Namespace Identification Descriptor list, CNS 03h, 4096 bytes (Base, section 5.17, figure
/// "Namespace Identification Descriptor").
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct NamespaceDescriptors {
    /// The list as it came.
    pub bytes: [u8; 4096],
}

const _: () = assert!(size_of::<NamespaceDescriptors>() == 4096);

/// NIDT, NIDL and two reserved bytes before each identifier.
const HEADER: usize = 4;

impl NamespaceDescriptors {
    /// The descriptors up to the one of length 0 that ends the list. After an error there is nothing
    /// more.
    pub fn iter(&self) -> impl Iterator<Item = Result<NamespaceDescriptor, DescriptorError>> + '_ {
        let mut rest = self.bytes.as_slice();
        core::iter::from_fn(move || match next_descriptor(rest) {
            Ok((descriptor, behind)) => {
                rest = behind;
                descriptor.map(Ok)
            }
            Err(error) => {
                rest = &[];
                Some(Err(error))
            }
        })
    }

    /// The list of these descriptors, for a controller to answer with; what does not fit any more
    /// and descriptors of [`Other`](NamespaceDescriptor::Other) type are left out.
    pub fn from_descriptors(descriptors: &[NamespaceDescriptor]) -> Self {
        let mut list = Self::default();
        let mut position = 0;
        for descriptor in descriptors {
            let (kind, id) = match descriptor {
                NamespaceDescriptor::Eui64(id) => (1, id.as_slice()),
                NamespaceDescriptor::Nguid(id) => (2, id.as_slice()),
                NamespaceDescriptor::Uuid(id) => (3, id.as_slice()),
                NamespaceDescriptor::CommandSet(csi) => (4, core::slice::from_ref(csi)),
                NamespaceDescriptor::Other { .. } => continue,
            };
            let end = position + HEADER + id.len();
            let Some(place) = list.bytes.get_mut(position..end) else {
                break;
            };
            place[0] = kind;
            place[1] = id.len() as u8;
            place[HEADER..].copy_from_slice(id);
            position = end;
        }
        list
    }
}

impl Default for NamespaceDescriptors {
    /// The empty list.
    fn default() -> Self {
        Self::new_zeroed()
    }
}

impl fmt::Debug for NamespaceDescriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// One identifier of a namespace. Identifiers are big endian, as they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamespaceDescriptor {
    /// NIDT 1h: IEEE Extended Unique Identifier.
    Eui64([u8; 8]),
    /// NIDT 2h: Namespace Globally Unique Identifier.
    Nguid([u8; 16]),
    /// NIDT 3h: Namespace UUID.
    Uuid([u8; 16]),
    /// NIDT 4h: the identifier of the namespace's I/O command set; 0 is the NVM command set.
    CommandSet(u8),
    /// A type that is not defined here.
    Other {
        /// NIDT.
        kind: u8,
        /// NIDL, in bytes.
        length: u8,
    },
}

/// A namespace identification descriptor is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DescriptorError {
    /// The identifier's length is not the one that its type has.
    Length {
        /// NIDT.
        kind: u8,
        /// NIDL, in bytes.
        length: u8,
    },
    /// The descriptor reaches past the end of the list.
    Truncated,
}

impl fmt::Display for DescriptorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { kind, length } => write!(
                f,
                "namespace identification descriptor of type {kind:#x} has length {length:#x}"
            ),
            Self::Truncated => {
                f.write_str("namespace identification descriptor reaches past the end of its list")
            }
        }
    }
}

impl core::error::Error for DescriptorError {}

type Parsed<'a> = (Option<NamespaceDescriptor>, &'a [u8]);

fn next_descriptor(list: &[u8]) -> Result<Parsed<'_>, DescriptorError> {
    let Some((&[kind, length, _, _], rest)) = list.split_first_chunk::<HEADER>() else {
        return Ok((None, &[]));
    };
    if length == 0 {
        return Ok((None, &[]));
    }
    let Some((id, rest)) = rest.split_at_checked(usize::from(length)) else {
        return Err(DescriptorError::Truncated);
    };
    let wrong_length = |_| DescriptorError::Length { kind, length };
    let descriptor = match kind {
        1 => NamespaceDescriptor::Eui64(id.try_into().map_err(wrong_length)?),
        2 => NamespaceDescriptor::Nguid(id.try_into().map_err(wrong_length)?),
        3 => NamespaceDescriptor::Uuid(id.try_into().map_err(wrong_length)?),
        4 => {
            let [csi] = id.try_into().map_err(wrong_length)?;
            NamespaceDescriptor::CommandSet(csi)
        }
        _ => NamespaceDescriptor::Other { kind, length },
    };
    Ok((Some(descriptor), rest))
}
