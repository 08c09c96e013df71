//! Software controllers as `file:` and `mem:` URLs describe them.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use nvme_soft::fault::{Plan, PlanError};
use nvme_soft::store::{FileStore, MemoryStore};
use nvme_soft::{Config, NamespaceConfig};

use super::{SoftDevice, SoftOptions};
use crate::Error;
use crate::device::Device;
use crate::url::{SoftTarget, Target, UrlError};

/// What a `file:` or `mem:` URL describes, for a controller that is served to other processes rather than
/// opened here. It makes the files that are to be made, and blocks for as long as that takes.
///
/// What says how the controller is opened in this process, `ns` and `fd-only`, makes no difference.
///
/// # Errors
///
/// [`Error::Url`] if it is no such URL, and [`Error::Open`] if a file, or the plan of faults, can't be opened.
pub fn config(url: &str) -> Result<Config, Error> {
    match url.parse()? {
        Target::Soft(target) => config_of(&target),
        _ => Err(UrlError {
            url: url.to_owned(),
            reason:
                "names no software controller; expected file:disk.img?size=1G or mem:?size=256M"
                    .to_owned(),
        }
        .into()),
    }
}

/// Starts the controller that a URL describes. It blocks for as long as files take to open.
pub(crate) fn open(target: &SoftTarget, vectors: u16) -> Result<Arc<dyn Device>, Error> {
    let config = config_of(target)?;
    let options = SoftOptions {
        vectors,
        fd_only: target.fd_only,
        ..SoftOptions::default()
    };
    match SoftDevice::new(address(target), config, &options) {
        Ok(device) => Ok(Arc::new(device)),
        Err(error) => Err(failed(target, error)),
    }
}

fn address(target: &SoftTarget) -> String {
    match &target.path {
        Some(path) => format!("file:{}", path.display()),
        None => "mem:".to_owned(),
    }
}

fn failed(target: &SoftTarget, reason: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Open {
        address: address(target),
        reason: Box::new(reason),
    }
}

fn config_of(target: &SoftTarget) -> Result<Config, Error> {
    let mut config = Config {
        latency: target.latency,
        ..Config::default()
    };
    // Before files are made, for nothing if the plan is wrong.
    if let Some(plan) = &target.faults {
        let plan = Plan::read(plan).map_err(|source| {
            let address = address(target);
            failed(target, OpenPlanError { address, source })
        })?;
        config.faults = plan.faults;
    }
    for number in 1..=target.namespaces {
        let namespace = namespace(target, number).map_err(|error| failed(target, error))?;
        config.namespaces.push(namespace);
    }
    Ok(config)
}

fn namespace(target: &SoftTarget, number: u32) -> Result<NamespaceConfig, OpenFileError> {
    let Some(path) = &target.path else {
        // `mem:` without a size is refused when the URL is parsed.
        let store = MemoryStore::new(target.size.unwrap_or_default());
        return match store {
            Ok(store) => Ok(NamespaceConfig::new(store, target.lba_size)),
            Err(source) => Err(OpenFileError {
                path: PathBuf::from("memory"),
                source,
            }),
        };
    };
    let path = match number {
        1 => path.clone(),
        _ => {
            let mut name = OsString::from(path);
            name.push(format!(".{number}"));
            PathBuf::from(name)
        }
    };
    let store = match target.size {
        Some(size) => FileStore::create(&path, size),
        None => FileStore::open(&path),
    };
    match store {
        Ok(store) => Ok(NamespaceConfig::new(store, target.lba_size)),
        Err(source) => Err(OpenFileError { path, source }),
    }
}

/// A plan of faults that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("{address}: the plan of faults: {source}")]
struct OpenPlanError {
    address: String,
    source: PlanError,
}

/// A backing file that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}{}", path.display(), hint(source))]
struct OpenFileError {
    path: PathBuf,
    source: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; give a size (file:disk.img?size=1G) to create it",
        io::ErrorKind::PermissionDenied => "; the file must be readable and writable",
        _ => "",
    }
}
