//! The doorbells of BAR 0 as a page that clients map.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use nvme_soft::DoorbellMemory;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::bar;
use crate::memory::mapping::Mapping;

/// The page, a new one for each client: the one before may still have it mapped.
#[derive(Debug)]
pub(crate) struct DoorbellPage(RwLock<Page>);

#[derive(Debug)]
struct Page {
    /// Has the page where it is in BAR 0. Nobody can make it shorter.
    file: File,
    words: Mapping,
}

impl Page {
    fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("nvme-doorbells", flags)?);
        file.set_len(u64::from(bar::DOORBELLS + bar::PAGE))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals)?;
        let (start, len) = (bar::DOORBELLS.into(), bar::PAGE as usize);
        let words = Mapping::new(file.as_fd(), start, len, true, true)?;
        Ok(Self { file, words })
    }
}

impl DoorbellPage {
    pub(crate) fn new() -> io::Result<Self> {
        Page::new().map(|page| Self(RwLock::new(page)))
    }

    fn page(&self) -> RwLockReadGuard<'_, Page> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a client maps at [`bar::DOORBELLS`].
    pub(crate) fn file(&self) -> io::Result<OwnedFd> {
        self.page().file.try_clone().map(OwnedFd::from)
    }

    /// Puts a new page in the place of the one that a client has.
    pub(crate) fn renew(&self) -> io::Result<()> {
        let page = Page::new()?;
        let old = std::mem::replace(
            &mut *self.0.write().unwrap_or_else(PoisonError::into_inner),
            page,
        );
        drop(old);
        Ok(())
    }
}

impl DoorbellMemory for DoorbellPage {
    fn load(&self, offset: u32) -> u32 {
        let place = offset.checked_sub(bar::DOORBELLS);
        place
            .and_then(|place| self.page().words.load_acquire(place as usize))
            .unwrap_or(0)
    }

    fn store(&self, offset: u32, value: u32) {
        if let Some(place) = offset.checked_sub(bar::DOORBELLS) {
            self.page().words.store_release(place as usize, value);
        }
    }
}
