//! Shared, shrink-sealed, zeroed memory with a file descriptor.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

/// The page that an x86-64 IOMMU and CPU can map with one entry of their second level.
const HUGE_PAGE: usize = 2 << 20;

const NAME: &CStr = c"nvme-async";

/// A shared mapping of a sealed memfd.
///
/// It is zeroed when created, and neither it nor its file can shrink, so an access to it does not
/// fail because of what another process does with the file. Nothing here reads or writes it:
/// whoever does decides which accesses may happen at the same time.
pub struct SharedMemory {
    addr: NonNull<u8>,
    len: usize,
    file: OwnedFd,
}

impl SharedMemory {
    /// Maps `len` bytes, rounded up to whole pages of the host.
    ///
    /// From 2 MiB on, the address is a multiple of 2 MiB, and the kernel is advised to use huge
    /// pages. Whether it has any makes no difference otherwise.
    ///
    /// # Errors
    ///
    /// Those of `memfd_create`, `ftruncate`, `fcntl` and `mmap`; [`io::ErrorKind::InvalidInput`]
    /// when `len` is zero or larger than a file can be.
    pub fn new(len: usize) -> io::Result<Self> {
        let len = len
            .checked_next_multiple_of(host_page())
            .filter(|&len| len > 0);
        let (len, file_len) = len
            .and_then(|len| Some((len, libc::off_t::try_from(len).ok()?)))
            .ok_or(io::ErrorKind::InvalidInput)?;

        let file = create_file()?;
        // SAFETY: `file` is an open descriptor; no memory is passed.
        check(unsafe { libc::ftruncate(file.as_raw_fd(), file_len) })?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: `file` is an open descriptor; F_ADD_SEALS takes an integer.
        check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;

        let addr = map(&file, len)?;
        if len >= HUGE_PAGE {
            // SAFETY: exactly the mapping made above, and the advice does not change contents.
            // The result does not matter: a kernel without huge pages refuses.
            let _ = unsafe { libc::madvise(addr.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        }
        Ok(Self { addr, len, file })
    }

    /// Where the mapping starts; a multiple of the host's page size. It is valid for reads and
    /// writes of [`len`](Self::len) bytes until the value is dropped.
    pub fn addr(&self) -> NonNull<u8> {
        self.addr
    }

    /// The length in bytes, a multiple of the host's page size and never zero.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The file, which holds this memory from its offset 0 on.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and belongs to this value alone; its address
        // is valid until now, as `addr` says.
        let unmapped = unsafe { libc::munmap(self.addr.as_ptr().cast(), self.len) };
        debug_assert_eq!(unmapped, 0, "a mapping of our own could not be removed");
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMemory")
            .field("addr", &self.addr)
            .field("len", &self.len)
            .field("file", &self.file)
            .finish()
    }
}

// SAFETY: the value is an address, a length and a descriptor; it has no methods that access the
// memory, and a mapping belongs to the process, not to a thread.
unsafe impl Send for SharedMemory {}
// SAFETY: as for Send; all methods only return the fields.
unsafe impl Sync for SharedMemory {}

fn create_file() -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // Hosts with `vm.memfd_noexec=2` insist on NOEXEC_SEAL, kernels before 6.3 do not know it.
    match create_file_with(flags | libc::MFD_NOEXEC_SEAL) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => create_file_with(flags),
        file => file,
    }
}

fn create_file_with(flags: libc::c_uint) -> io::Result<OwnedFd> {
    // SAFETY: NAME is a string with its terminator.
    let fd = check(unsafe { libc::memfd_create(NAME.as_ptr(), flags) })?;
    // SAFETY: the call has just returned this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Maps all `len` bytes of `file`, at a multiple of [`HUGE_PAGE`] if they fill one.
fn map(file: &OwnedFd, len: usize) -> io::Result<NonNull<u8>> {
    if len < HUGE_PAGE {
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        return unsafe { map_at(ptr::null_mut(), 0, file, len) };
    }

    let reserved_len = len
        .checked_add(HUGE_PAGE)
        .ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: as above; the reservation is inaccessible and has no file.
    let reserved = unsafe {
        libc::mmap(
            ptr::null_mut(),
            reserved_len,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if reserved == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }

    let head = reserved.addr().next_multiple_of(HUGE_PAGE) - reserved.addr();
    let aligned = reserved.wrapping_byte_add(head);
    // SAFETY: head < HUGE_PAGE, so aligned..aligned + len lies inside of the reservation, which
    // is ours and which nothing else uses.
    let mapped = unsafe { map_at(aligned, libc::MAP_FIXED, file, len) };
    if mapped.is_err() {
        // SAFETY: the reservation, whole or with a hole where the attempt failed, is ours.
        unsafe { libc::munmap(reserved, reserved_len) };
        return mapped;
    }
    if head > 0 {
        // SAFETY: the part of our reservation before the mapping.
        unsafe { libc::munmap(reserved, head) };
    }
    let tail = HUGE_PAGE - head;
    // SAFETY: the part of our reservation behind the mapping; not empty, as head < HUGE_PAGE.
    unsafe { libc::munmap(aligned.wrapping_byte_add(len), tail) };
    mapped
}

/// # Safety
///
/// With MAP_FIXED in `flags`, `addr..addr + len` is address space of the caller that nothing uses.
unsafe fn map_at(
    addr: *mut libc::c_void,
    flags: libc::c_int,
    file: &OwnedFd,
    len: usize,
) -> io::Result<NonNull<u8>> {
    // SAFETY: without MAP_FIXED the kernel picks free addresses; with it the caller vouches.
    let mapped = unsafe {
        libc::mmap(
            addr,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | flags,
            file.as_raw_fd(),
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(mapped.cast()).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

fn host_page() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(super::DEVICE_PAGE)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    fn file(memory: &SharedMemory) -> File {
        File::from(memory.fd().try_clone_to_owned().unwrap())
    }

    #[test]
    fn is_zeroed_aligned_and_rounded_up() {
        for (len, expected, alignment) in [
            (1, host_page(), host_page()),
            (host_page() + 1, 2 * host_page(), host_page()),
            (HUGE_PAGE, HUGE_PAGE, HUGE_PAGE),
            (3 * HUGE_PAGE + 1, 3 * HUGE_PAGE + host_page(), HUGE_PAGE),
        ] {
            let memory = SharedMemory::new(len).unwrap();
            assert_eq!(memory.len(), expected);
            assert!(memory.addr().addr().get().is_multiple_of(alignment));
            // SAFETY: the mapping is live and nothing else accesses it.
            let bytes = unsafe { std::slice::from_raw_parts(memory.addr().as_ptr(), memory.len()) };
            assert!(bytes.iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn impossible_lengths_are_refused() {
        for len in [0, usize::MAX, usize::MAX / 2 + 1] {
            let error = SharedMemory::new(len).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        assert!(SharedMemory::new(isize::MAX as usize - HUGE_PAGE).is_err());
    }

    #[test]
    fn can_neither_shrink_nor_grow_nor_be_unsealed() {
        let memory = SharedMemory::new(8192).unwrap();
        // SAFETY: an open descriptor; F_GET_SEALS passes no memory.
        let seals = unsafe { libc::fcntl(memory.fd().as_raw_fd(), libc::F_GET_SEALS) };
        let wanted = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        assert_eq!(seals & wanted, wanted);
        assert_eq!(seals & libc::F_SEAL_WRITE, 0);

        let file = file(&memory);
        for len in [0, 4096, 16384] {
            let error = file.set_len(len).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
        // SAFETY: as above; F_ADD_SEALS takes an integer.
        let sealed =
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
        assert_eq!(sealed, -1);
    }

    #[test]
    fn closes_on_exec() {
        let memory = SharedMemory::new(1).unwrap();
        // SAFETY: an open descriptor; F_GETFD passes no memory.
        let flags = unsafe { libc::fcntl(memory.fd().as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }

    #[test]
    fn file_and_mapping_show_the_same_bytes() {
        let memory = SharedMemory::new(HUGE_PAGE + 4096).unwrap();
        let file = file(&memory);
        for offset in [0, 4095, HUGE_PAGE, memory.len() - 1] {
            // SAFETY: offset < len.
            let byte = unsafe { memory.addr().add(offset) };
            // SAFETY: inside of the live mapping; the file is not accessed at the same time.
            unsafe { byte.write_volatile(0x5a) };
            let mut read = [0];
            file.read_exact_at(&mut read, offset as u64).unwrap();
            assert_eq!(read, [0x5a]);

            file.write_all_at(&[0xa5], offset as u64).unwrap();
            // SAFETY: as for the write.
            assert_eq!(unsafe { byte.read_volatile() }, 0xa5);
        }
    }

    #[test]
    fn leaves_no_mapping_behind() {
        let memory = SharedMemory::new(HUGE_PAGE + 4096).unwrap();
        // The address may be used again at once by another thread, the inode is not.
        let inode = format!(" {} ", file(&memory).metadata().unwrap().ino());
        let is_mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            maps.lines()
                .any(|line| line.contains("memfd:nvme-async") && line.contains(&inode))
        };
        assert!(is_mapped());
        drop(memory);
        assert!(!is_mapped());
    }
}
