//! The guest's memory: what the front end has shared, mapped and registered with the controller.

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nvme_async::{Controller, RegisteredSlice, Registration};
use rustix::fs::{SealFlags, fcntl_get_seals, fstatfs};
use tokio::sync::oneshot;
use tokio::time::timeout;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::bitmap::BS;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use super::mapping::Mapping;

/// Huge pages: a page that was punched out of the file need not be there again.
const HUGETLBFS: u64 = 0x9584_58f6;
/// What the address and the size of a region are multiples of.
const PAGE: u64 = 4096;

/// How long is waited for memory to be given back. Requests have deadlines, so that it takes longer only where a
/// controller can't be stopped, which keeps it for ever.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why memory can't be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error(
        "the front end can take the memory away, which would end this process (SIGBUS): it is not sealed \
         (F_SEAL_SHRINK), or of huge pages; QEMU's memory-backend-memfd seals it, and --trust-client takes it as \
         it is"
    )]
    NotSealed,
    #[error("{size} bytes at offset {offset} are not pages of a file that has them")]
    NotThere { offset: u64, size: u64 },
    #[error("the regions can't be together: {0}")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
    #[error("{size} bytes at guest address {start:#x} are past the end of addresses")]
    Nowhere { start: u64, size: u64 },
    #[error("there is no such region")]
    Unknown,
    #[error("after {} s the controller still has some of it", PATIENCE.as_secs())]
    InUse,
    #[error("mapping it: {0}")]
    Map(#[from] std::io::Error),
    #[error("registering it with the controller: {0}")]
    Register(#[from] nvme_async::Error),
}

/// A region of guest memory.
#[derive(Debug)]
pub(super) struct Region {
    start: GuestAddress,
    /// Where the front end has it, which is how it names the places of rings.
    user_address: u64,
    mapping: Arc<Mapping>,
    registration: Registration,
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.registration.len() as GuestUsize
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    fn bitmap(&self) -> BS<'_, Self::B> {}

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        let offset =
            usize::try_from(offset.0).map_err(|_| GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.mapping.slice().subslice(offset, count)?)
    }
}

impl GuestMemoryRegionBytes for Region {}

/// The guest's memory at one time. Held for as long as something is looked up, never across a wait.
pub(super) type Regions = GuestRegionCollection<Region>;

/// The guest's address of what the front end has at `user_address`.
pub(super) fn guest_address(regions: &Regions, user_address: u64) -> Option<GuestAddress> {
    regions.iter().find_map(|region| {
        let offset = user_address.checked_sub(region.user_address)?;
        let address = region.start.0.checked_add(offset)?;
        (offset < region.len()).then_some(GuestAddress(address))
    })
}

/// Appends `len` bytes at `address`, as memory that a command can use. Nothing of what is outside of the guest's
/// memory.
pub(super) fn slices(
    regions: &Regions,
    address: GuestAddress,
    len: u64,
    to: &mut Vec<RegisteredSlice>,
) -> Option<()> {
    let (mut address, mut left) = (address.0, len);
    while left > 0 {
        let region = regions.find_region(GuestAddress(address))?;
        let offset = address - region.start.0;
        let here = left.min(region.len() - offset);
        let slice = region
            .registration
            .slice(usize::try_from(offset).ok()?, usize::try_from(here).ok()?)?;
        to.push(slice);
        left -= here;
        address = address.checked_add(here)?;
    }
    Some(())
}

/// What the queues look things up in.
#[derive(Debug, Default)]
pub(super) struct SharedRegions(Mutex<Arc<Regions>>);

impl SharedRegions {
    pub(super) fn get(&self) -> Arc<Regions> {
        // It is replaced in one go.
        let regions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        regions.clone()
    }

    fn set(&self, regions: Regions) {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *current, Arc::new(regions));
        drop(current);
        // To unmap takes its time.
        drop(old);
    }
}

/// All that the front end has shared. Changed by its messages only.
#[derive(Debug)]
pub(super) struct Memory {
    controller: Controller,
    trust_client: bool,
    shared: Arc<SharedRegions>,
    /// For each region what tells when it is gone.
    gone: Vec<(GuestAddress, oneshot::Receiver<()>)>,
}

impl Memory {
    pub(super) fn new(
        controller: Controller,
        trust_client: bool,
        shared: Arc<SharedRegions>,
    ) -> Self {
        Self {
            controller,
            trust_client,
            shared,
            gone: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.gone.len()
    }

    /// Puts these regions in the place of all that there are, which are gone when it resolves.
    pub(super) async fn replace(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<(), MemoryError> {
        let mut regions = Vec::with_capacity(table.len());
        let mut gone = Vec::with_capacity(table.len());
        for (described, file) in table.iter().zip(files) {
            let (region, receiver) = self.map(described, file).await?;
            gone.push((region.start, receiver));
            regions.push(Arc::new(region));
        }
        regions.sort_by_key(|region| region.start);
        self.shared.set(Regions::from_arc_regions(regions)?);
        let old = std::mem::replace(&mut self.gone, gone);
        wait_for(old).await
    }

    pub(super) async fn add(
        &mut self,
        described: &VhostUserMemoryRegion,
        file: File,
    ) -> Result<(), MemoryError> {
        let (region, receiver) = self.map(described, file).await?;
        let start = region.start;
        self.shared
            .set(self.shared.get().insert_region(Arc::new(region))?);
        self.gone.push((start, receiver));
        Ok(())
    }

    /// Takes a region away. When it resolves, no request uses it any more, and the controller can't reach it.
    pub(super) async fn remove(
        &mut self,
        described: &VhostUserMemoryRegion,
    ) -> Result<(), MemoryError> {
        let (start, user_address) = (described.guest_phys_addr, described.user_addr);
        let start = GuestAddress(start);
        let regions = self.shared.get();
        let region = regions.find_region(start).ok_or(MemoryError::Unknown)?;
        if region.user_address != user_address {
            return Err(MemoryError::Unknown);
        }
        let removed = regions.remove_region(start, described.memory_size);
        let (left, region) = removed.map_err(|_| MemoryError::Unknown)?;
        drop((region, regions));
        self.shared.set(left);
        let old = self.gone.extract_if(.., |(other, _)| *other == start);
        let old = old.collect();
        wait_for(old).await
    }

    /// Takes all away.
    pub(super) async fn clear(&mut self) -> Result<(), MemoryError> {
        self.shared.set(Regions::new());
        wait_for(std::mem::take(&mut self.gone)).await
    }

    async fn map(
        &self,
        described: &VhostUserMemoryRegion,
        file: File,
    ) -> Result<(Region, oneshot::Receiver<()>), MemoryError> {
        let (offset, size) = (described.mmap_offset, described.memory_size);
        let (start, user_address) = (described.guest_phys_addr, described.user_addr);
        if start.checked_add(size).is_none() || user_address.checked_add(size).is_none() {
            return Err(MemoryError::Nowhere { start, size });
        }
        let (mapping, gone) = map(file, offset, size, self.trust_client)?;
        let mapping = Arc::new(mapping);
        let registration = self.controller.register(mapping.clone()).await?;
        let region = Region {
            start: GuestAddress(start),
            user_address,
            mapping,
            registration,
        };
        Ok((region, gone))
    }
}

/// Maps `size` bytes of `file` from `offset` on, if its owner can't take them away or is trusted not to.
pub(super) fn map(
    file: File,
    offset: u64,
    size: u64,
    trust_client: bool,
) -> Result<(Mapping, oneshot::Receiver<()>), MemoryError> {
    // Whatever has seals is memory. Of anything else not even the size is asked for unless it is trusted: that may
    // be for another process to say, such as the front end.
    let seals = fcntl_get_seals(&file);
    if !trust_client && !seals.is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
        return Err(MemoryError::NotSealed);
    }
    let file_system = fstatfs(&file).map_err(std::io::Error::from)?;
    let is_huge = file_system.f_type as u64 == HUGETLBFS;
    if !trust_client && is_huge {
        return Err(MemoryError::NotSealed);
    }
    // After the look at the seals: it can't have become shorter since.
    let metadata = file.metadata()?;
    let are_pages = offset.is_multiple_of(PAGE) && size.is_multiple_of(PAGE) && size > 0;
    let are_there = offset
        .checked_add(size)
        .is_some_and(|end| end <= metadata.len());
    let page = match u64::try_from(file_system.f_bsize) {
        Ok(page) if is_huge && page.is_power_of_two() => page,
        _ => PAGE,
    };
    match usize::try_from(size) {
        Ok(len) if metadata.is_file() && are_pages && are_there => {
            Ok(Mapping::new(file, offset, len, page)?)
        }
        _ => Err(MemoryError::NotThere { offset, size }),
    }
}

async fn wait_for(gone: Vec<(GuestAddress, oneshot::Receiver<()>)>) -> Result<(), MemoryError> {
    let all = async {
        for (_, receiver) in gone {
            // Nobody sends: it ends when the sender goes, with the mapping.
            let _ = receiver.await;
        }
    };
    timeout(PATIENCE, all).await.map_err(|_| MemoryError::InUse)
}
