//! Version and capabilities, the first message of each side ("VFIO_USER_VERSION").

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use crate::error::DecodeError;
use crate::header::Command;
use crate::wire;

/// The major version that this crate speaks.
pub const MAJOR: u16 = 0;
/// The minor version that this crate speaks. The reply has that of the client if it is less.
pub const MINOR: u16 = 1;

/// What one side speaks and can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// The major version, the same on both sides.
    pub major: u16,
    /// The minor version, in the reply not more than in the command.
    pub minor: u16,
    /// What the sender can do.
    pub capabilities: Capabilities,
}

/// What one side can do. What it does not say has the default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// File descriptors that it can receive with one message.
    pub max_msg_fds: u32,
    /// Bytes that can be transferred by one message to it.
    pub max_data_xfer_size: u32,
    /// The page sizes of DMA mappings, or'ed together.
    pub pgsizes: u64,
    /// DMA mappings that there may be at a time.
    pub max_dma_maps: u64,
    /// There is REGION_WRITE_MULTI.
    pub write_multiple: bool,
    /// A socket of their own for the commands of the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
    /// The device can be migrated. Only read: nobody here can.
    #[serde(skip_serializing, deserialize_with = "is_there")]
    pub migration: bool,
    /// An extension of this project's, which others neither send nor look at. The client: it knows an MSI-X
    /// table that can be mapped for what it is, and does not let a guest write there unseen. The server: the
    /// table can be mapped, and masks that are set there by stores count.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub msix_table_mappable: bool,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            max_msg_fds: 1,
            max_data_xfer_size: 1 << 20,
            pgsizes: 4096,
            max_dma_maps: 65_535,
            write_multiple: false,
            twin_socket: None,
            migration: false,
            msix_table_mappable: false,
        }
    }
}

/// Whether the commands of the server have a socket of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TwinSocket {
    /// The sender can have it so; in the reply, it is so.
    pub supported: bool,
    /// In the reply, which of the descriptors beside it is that socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u32>,
}

fn is_there<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Option::<serde::de::IgnoredAny>::deserialize(deserializer).map(|value| value.is_some())
}

/// The version data.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Data {
    capabilities: Capabilities,
}

impl Version {
    pub(crate) fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let (wire, data): (wire::Version, _) = wire::split(Command::VERSION, payload)?;
        let data = match data.split_last() {
            None => Data::default(),
            Some((0, json)) => serde_json::from_slice(json)
                .map_err(|error| DecodeError::Capabilities(error.to_string()))?,
            Some(_) => {
                return Err(DecodeError::Capabilities(
                    "the version data does not end with a NUL".to_owned(),
                ));
            }
        };
        Ok(Self {
            major: wire.major.get(),
            minor: wire.minor.get(),
            capabilities: data.capabilities,
        })
    }

    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        let wire = wire::Version {
            major: self.major.into(),
            minor: self.minor.into(),
        };
        into.extend_from_slice(wire.as_bytes());
        let data = Data {
            capabilities: self.capabilities.clone(),
        };
        // Numbers and booleans by name: nothing in it can fail.
        if let Ok(json) = serde_json::to_vec(&data) {
            into.extend_from_slice(&json);
            into.push(0);
        }
    }
}
