//! The pages of BAR 0 that clients map: doorbells, and the MSI-X table.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use nvme_soft::DoorbellMemory;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::bar;
use crate::memory::mapping::Mapping;

/// Where in BAR 0 they end.
const END: u32 = bar::MSIX_TABLE + bar::PAGE;

/// The pages, new ones for each client: the one before may still have them mapped.
#[derive(Debug)]
pub(crate) struct SharedPages(RwLock<Pages>);

#[derive(Debug)]
struct Pages {
    /// Has the pages where they are in BAR 0. Nobody can make it shorter.
    file: File,
    words: Mapping,
}

impl Pages {
    fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("nvme-bar0", flags)?);
        file.set_len(END.into())?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals)?;
        let len = (END - bar::DOORBELLS) as usize;
        let words = Mapping::new(file.as_fd(), bar::DOORBELLS.into(), len, true, true)?;
        Ok(Self { file, words })
    }

    fn load(&self, offset: u32) -> u32 {
        let place = offset.checked_sub(bar::DOORBELLS);
        let word = place.and_then(|place| self.words.load_acquire(place as usize));
        word.unwrap_or(0)
    }

    fn store(&self, offset: u32, value: u32) {
        if let Some(place) = offset.checked_sub(bar::DOORBELLS) {
            self.words.store_release(place as usize, value);
        }
    }
}

impl SharedPages {
    pub(crate) fn new() -> io::Result<Self> {
        Pages::new().map(|pages| Self(RwLock::new(pages)))
    }

    fn pages(&self) -> RwLockReadGuard<'_, Pages> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a client maps, each page at its offset in BAR 0.
    pub(crate) fn file(&self) -> io::Result<OwnedFd> {
        self.pages().file.try_clone().map(OwnedFd::from)
    }

    /// Puts new pages, of zeroes, in the place of those that a client has.
    pub(crate) fn renew(&self) -> io::Result<()> {
        let pages = Pages::new()?;
        let old = std::mem::replace(
            &mut *self.0.write().unwrap_or_else(PoisonError::into_inner),
            pages,
        );
        drop(old);
        Ok(())
    }

    /// The word at this offset of the MSI-X table; 0 past its page.
    pub(crate) fn table_word(&self, offset: u32) -> u32 {
        self.pages().load(bar::MSIX_TABLE.saturating_add(offset))
    }

    /// Sets the word at this offset of the MSI-X table, if that is in its page.
    pub(crate) fn set_table_word(&self, offset: u32, value: u32) {
        let at = bar::MSIX_TABLE.saturating_add(offset);
        self.pages().store(at, value);
    }
}

impl DoorbellMemory for SharedPages {
    fn load(&self, offset: u32) -> u32 {
        match offset {
            ..bar::MSIX_TABLE => self.pages().load(offset),
            _ => 0,
        }
    }

    fn store(&self, offset: u32, value: u32) {
        if offset < bar::MSIX_TABLE {
            self.pages().store(offset, value);
        }
    }
}
