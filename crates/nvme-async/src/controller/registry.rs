//! Which controllers are open in this process, so that two URLs of one device share it.

use std::collections::HashMap;
#[cfg(any(feature = "soft", feature = "vfio-user"))]
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::bring_up::bring_up;
use super::{Controller, ControllerInner};
use crate::device::{self, Device};
use crate::url::Target;
use crate::{Error, Fate, OpenOptions};

/// Held by a controller until its device has been given up.
#[derive(Debug, Default)]
pub(crate) struct Release {
    _permit: Option<OwnedSemaphorePermit>,
}

/// One device that is or was open.
#[derive(Clone)]
struct Entry {
    /// Held while somebody opens it.
    opening: Arc<tokio::sync::Mutex<()>>,
    /// One permit, which the open controller has.
    device: Arc<Semaphore>,
    controller: Weak<ControllerInner>,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            opening: Arc::default(),
            device: Arc::new(Semaphore::new(1)),
            controller: Weak::new(),
        }
    }
}

static OPEN: LazyLock<Mutex<HashMap<String, Entry>>> = LazyLock::new(Mutex::default);

/// Opens the controller that `options` name, or finds it open.
pub(crate) async fn open(options: OpenOptions) -> Result<Controller, Error> {
    let target = match &options.target {
        Some(target) => target.clone()?,
        None => {
            return Err(Error::Url(crate::url::UrlError {
                url: String::new(),
                reason: "no device was named; call OpenOptions::url or OpenOptions::device"
                    .to_owned(),
            }));
        }
    };
    let Some(key) = key(&target) else {
        let inner = start(&target, &options, Release::default()).await?;
        return Ok(Controller { inner });
    };
    let entry = lock().entry(key.clone()).or_default().clone();
    let _opening = entry.opening.lock().await;
    if let Some(inner) = find(&key) {
        return Ok(Controller { inner });
    }
    // Until whoever had it last has given it up. The semaphore is never closed.
    let permit = entry.device.acquire_owned().await.ok();
    let inner = start(&target, &options, Release { _permit: permit }).await?;
    if let Some(entry) = lock().get_mut(&key) {
        entry.controller = Arc::downgrade(&inner);
    }
    Ok(Controller { inner })
}

/// Brings up a controller that is not shared by address.
pub(crate) async fn attach(
    device: Arc<dyn Device>,
    options: &OpenOptions,
) -> Result<Controller, Error> {
    let inner = bring_up(device, options, Release::default()).await?;
    Ok(Controller { inner })
}

async fn start(
    target: &Target,
    options: &OpenOptions,
    release: Release,
) -> Result<Arc<ControllerInner>, Error> {
    let (device, release) = open_device(target, options, release).await?;
    bring_up(device, options, release).await
}

/// Opens the device in a thread where it may block: it makes system calls that can take long.
///
/// The thread goes on when this is dropped, so it has the release until it is done.
async fn open_device(
    target: &Target,
    options: &OpenOptions,
    release: Release,
) -> Result<(Arc<dyn Device>, Release), Error> {
    let address = key(target).unwrap_or_else(|| "mem:".to_owned());
    let Ok(runtime) = Handle::try_current() else {
        let fate = Fate::NotExecuted;
        return Err(Error::RuntimeGone { address, fate });
    };
    let target = target.clone();
    let vectors = options.queue_pairs().saturating_add(1);
    let opening = runtime.spawn_blocking(move || Ok((device::open(&target, vectors)?, release)));
    match opening.await {
        Ok(opened) => opened,
        Err(error) => Err(Error::Open {
            address,
            reason: Box::new(error),
        }),
    }
}

fn find(key: &str) -> Option<Arc<ControllerInner>> {
    let inner = lock().get(key)?.controller.upgrade()?;
    inner.is_usable().then_some(inner)
}

/// What identifies the device; nothing for memory, which is new each time.
fn key(target: &Target) -> Option<String> {
    match target {
        Target::Pci { address, .. } => Some(format!("nvme://{address}")),
        #[cfg(feature = "soft")]
        Target::Soft(soft) => {
            let path = soft.path.as_deref()?;
            Some(format!("file:{}", resolved(path).display()))
        }
        #[cfg(feature = "vfio-user")]
        Target::VfioUser { path, .. } => Some(format!("vfio-user:{}", resolved(path).display())),
    }
}

/// A path by which a file is always the same one.
#[cfg(any(feature = "soft", feature = "vfio-user"))]
fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    // The file may be about to be created; its folder is there.
    let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
    let path = match (folder, path.file_name()) {
        (Some(folder), Some(name)) => folder.join(name),
        _ => path,
    };
    path.canonicalize().unwrap_or(path)
}

fn lock() -> std::sync::MutexGuard<'static, HashMap<String, Entry>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}
