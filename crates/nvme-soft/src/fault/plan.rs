//! Faults in a file.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Fault, FaultError};

/// Faults as they are in a TOML file: see the documentation of this module.
///
/// It is parsed by [`FromStr`] and written by [`fmt::Display`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The faults. Of several that match a command, the first that has strikes left is taken.
    #[serde(rename = "fault", default)]
    pub faults: Vec<Fault>,
}

/// A plan that could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The file could not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no TOML, or not of this form. The message has the line.
    #[error("{0}")]
    Parse(Box<toml::de::Error>),
    /// A fault makes no sense.
    #[error("fault {number} of the plan: {source}")]
    Fault {
        /// Which one, from 1.
        number: usize,
        /// What is wrong with it.
        source: FaultError,
    },
    /// The plan in a file could not be parsed.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Self>,
    },
}

impl Plan {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`PlanError`] that names the file, and the line where there is one.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, PlanError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|source| PlanError::Read {
            path: path.to_owned(),
            source,
        })?;
        text.parse().map_err(|source| PlanError::File {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }
}

impl FromStr for Plan {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let plan: Self = toml::from_str(text).map_err(|error| PlanError::Parse(Box::new(error)))?;
        for (index, fault) in plan.faults.iter().enumerate() {
            fault.check().map_err(|source| PlanError::Fault {
                number: index + 1,
                source,
            })?;
        }
        Ok(plan)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = toml::to_string(self).map_err(|_| fmt::Error)?;
        f.write_str(&text)
    }
}
