//! Changes of namespaces while the controller runs.

use serde::{Deserialize, Serialize};

/// What becomes of a namespace, as a namespace management tool on another path to the NVM subsystem
/// would do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum NamespaceChange {
    /// It gets another size in bytes, rounded down to whole blocks; its store is resized
    /// ([`Store::resize`](crate::store::Store::resize)).
    Resize {
        /// The namespace.
        nsid: u32,
        /// The new size in bytes, at least one block.
        bytes: u64,
    },
    /// It gets another block size. The bytes of its store stay what they are.
    Format {
        /// The namespace.
        nsid: u32,
        /// The new block size in bytes: 512 or 4096.
        #[serde(rename = "lba-size")]
        lba_size: u32,
    },
    /// It becomes inactive: commands for it are refused until it is attached again. Its contents
    /// stay.
    Detach {
        /// The namespace.
        nsid: u32,
    },
    /// It becomes active again.
    Attach {
        /// The namespace.
        nsid: u32,
    },
}

/// Why a namespace could not be changed. Nothing has happened then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// There is no such namespace, attached or not.
    #[error("there is no namespace {nsid}")]
    NoNamespace {
        /// The identifier.
        nsid: u32,
    },
    /// There are as many namespaces as the controller has identifiers for.
    #[error("all {max_namespaces} namespaces exist (Config::max_namespaces)")]
    Full {
        /// The largest identifier (NN).
        max_namespaces: u32,
    },
    /// The block size or another field of a namespace's configuration is out of its range, or the
    /// size holds no block.
    #[error(transparent)]
    Invalid(#[from] crate::StartError),
    /// The store could not be resized.
    #[error("the store of namespace {nsid} could not be resized: {source}")]
    Store {
        /// The namespace.
        nsid: u32,
        /// Why.
        source: std::io::Error,
    },
    /// The controller's thread has ended.
    #[error("the controller's thread has ended")]
    Ended,
}
