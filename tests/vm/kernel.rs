//! The other driver of the same device: the kernel's own.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::nvme_async;

/// Bytes of one read or write.
const CHUNK: usize = 1 << 20;
/// What O_DIRECT wants of addresses.
const ALIGNMENT: usize = 4096;
/// How long the kernel may take to find the disks.
const PROBE: Duration = Duration::from_secs(60);

/// A controller that `nvme-async unbind` has given to the kernel. `nvme-async bind` takes it back
/// when this is dropped.
#[derive(Debug)]
pub(crate) struct Kernel {
    address: String,
}

impl Kernel {
    pub(crate) fn take(address: &str) -> Self {
        nvme_async(&["unbind", address]);
        Self {
            address: address.to_owned(),
        }
    }

    /// The disk of a namespace, once it is there.
    pub(crate) fn disk(&self, nsid: u32) -> Disk {
        let start = Instant::now();
        loop {
            if let Some(path) = self.find(nsid) {
                return Disk { path };
            }
            assert!(
                start.elapsed() < PROBE,
                "the kernel finds no namespace {nsid} of {}",
                self.address
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn find(&self, nsid: u32) -> Option<PathBuf> {
        let device = Path::new("/sys/bus/pci/devices").join(&self.address);
        let controller = entries(&device.join("nvme")).next()?;
        let wanted = nsid.to_string();
        entries(&controller).find_map(|entry| {
            let read = |attribute| fs::read_to_string(entry.join(attribute)).ok();
            let is_wanted = read("nsid")?.trim() == wanted && read("size")?.trim() != "0";
            let path = Path::new("/dev").join(disk_name(entry.file_name()?.to_str()?)?);
            (is_wanted && path.exists()).then_some(path)
        })
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // The probe goes on in the background, and meanwhile the kernel may hold the disk.
        let start = Instant::now();
        loop {
            let ended = crate::harness::program(&["nvme-async", "bind", &self.address]);
            if ended.status == Some(0) {
                return;
            }
            if start.elapsed() > PROBE {
                if thread::panicking() {
                    eprintln!("{} stays with the kernel: {ended:#?}", self.address);
                    return;
                }
                panic!("{} stays with the kernel: {ended:#?}", self.address);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The disk `nvme0n1` is there under this name or, as one of its paths, as `nvme0c0n1`.
fn disk_name(entry: &str) -> Option<String> {
    let (before, namespace) = entry.rsplit_once('n')?;
    let (subsystem, _) = before.rsplit_once('c').unwrap_or((before, ""));
    Some(format!("{subsystem}n{namespace}"))
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path()))
}

/// A namespace as the kernel's block device, accessed past its cache.
#[derive(Debug)]
pub(crate) struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Its first `len` bytes.
    pub(crate) fn read(&self, len: usize) -> Vec<u8> {
        let file = self.open();
        let mut memory = Aligned::new();
        let mut all = Vec::with_capacity(len);
        while all.len() < len {
            let chunk = memory.slice(CHUNK.min(len - all.len()));
            file.read_exact_at(chunk, all.len() as u64)
                .unwrap_or_else(|error| panic!("{}: {error}", self.path.display()));
            all.extend_from_slice(chunk);
        }
        all
    }

    /// Writes its first bytes, durably.
    pub(crate) fn write(&self, data: &[u8]) {
        let file = self.open();
        let mut memory = Aligned::new();
        for (index, data) in data.chunks(CHUNK).enumerate() {
            let chunk = memory.slice(data.len());
            chunk.copy_from_slice(data);
            file.write_all_at(chunk, (index * CHUNK) as u64)
                .unwrap_or_else(|error| panic!("{}: {error}", self.path.display()));
        }
        file.sync_all().expect("the kernel flushes");
    }

    /// Opens it as a file system does that is mounted: nobody else may claim it.
    pub(crate) fn hold(&self) -> File {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(&self.path)
            .unwrap_or_else(|error| panic!("{}: {error}", self.path.display()))
    }

    fn open(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.path)
            .unwrap_or_else(|error| panic!("{}: {error}", self.path.display()))
    }
}

/// Memory at an address that suits O_DIRECT.
struct Aligned {
    bytes: Vec<u8>,
}

impl Aligned {
    fn new() -> Self {
        Self {
            bytes: vec![0; CHUNK + ALIGNMENT],
        }
    }

    fn slice(&mut self, len: usize) -> &mut [u8] {
        let start = self.bytes.as_ptr().align_offset(ALIGNMENT);
        &mut self.bytes[start..start + len]
    }
}
