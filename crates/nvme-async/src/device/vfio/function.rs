//! One function as the kernel gives it: a file of regions.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use iova::vfio::InfoReply;
use vfio_bindings::bindings::vfio as abi;

use super::closable::Closable;
use super::error::OpenError;
use super::group::Member;
use super::info;
use super::pci::PciAddress;
use super::registry::{Entry, Opened, Registry};
use super::sys;
use crate::device::DoorbellCall;
use crate::device::bar::Region;
use crate::device::config::{self, ReadConfig, WriteConfig};

/// The functions that this process has open.
static OPEN_FUNCTIONS: Registry<PciAddress, Function> = Registry::new();

/// A function that was opened. Closing it, or dropping the last reference, makes the kernel clear
/// bus mastering, disable its interrupts and reset it.
#[derive(Debug)]
pub(super) struct Function {
    address: String,
    open: Closable<OpenFunction>,
    bar: Region,
    config: Region,
    can_reset: bool,
    /// Guards read-modify-write cycles of the PCI command register.
    command: Mutex<()>,
    doorbell_failed: AtomicBool,
}

#[derive(Debug)]
struct OpenFunction {
    file: File,
    /// The function's places in its group and in the registry. Last: the group outlives the file.
    _places: Box<dyn Any + Send + Sync>,
}

impl Function {
    /// Opens a function of a group, once at a time; the kernel resets it on the way if it can.
    pub(super) fn open(member: Member, address: PciAddress) -> Result<Arc<Self>, OpenError> {
        let operation = "opening the function";
        let open = |entry: Entry<_, _>| {
            let file = member.group().device(address);
            let open = file.map(|file| OpenFunction {
                file,
                // In this order: the next opener is let in at the very end.
                _places: Box::new((member, entry)),
            });
            let function = open.and_then(|open| Self::new(open, address));
            function.map_err(|source| OpenError::System {
                address,
                operation,
                source,
            })
        };
        match OPEN_FUNCTIONS.open(address, open)? {
            Opened::Now(function) => Ok(function),
            Opened::Before(_) => Err(OpenError::AlreadyOpen { address }),
        }
    }

    fn new(open: OpenFunction, address: PciAddress) -> io::Result<Self> {
        let file = &open.file;
        let info = sys::device_info(file.as_fd())?;
        if info.flags & abi::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "not a PCI device",
            ));
        }
        let region = |index| {
            let reply = sys::region_info(file.as_fd(), index)?;
            info::region(InfoReply::new(&reply))
        };
        let bar = region(abi::VFIO_PCI_BAR0_REGION_INDEX)?;
        let config = region(abi::VFIO_PCI_CONFIG_REGION_INDEX)?;
        let can_reset = info.flags & abi::VFIO_DEVICE_FLAGS_RESET != 0;
        Ok(Self {
            address: address.to_string(),
            open: Closable::new(open),
            bar,
            config,
            can_reset,
            command: Mutex::new(()),
            doorbell_failed: AtomicBool::new(false),
        })
    }

    /// Closes it, whoever still refers to it: what they then do fails with `ENODEV`. Its group is
    /// closed too if it has no other function open.
    ///
    /// This waits for a reset that is in progress, and blocks for as long as the kernel takes to
    /// reset the function, which is long if it is not there any more.
    pub(super) fn close(&self) {
        self.open.close();
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Does something with the function's file, unless it is closed: `ENODEV`.
    pub(super) fn with_file<R>(
        &self,
        usage: impl FnOnce(BorrowedFd<'_>) -> io::Result<R>,
    ) -> io::Result<R> {
        self.open.with(|open| usage(open.file.as_fd()))
    }

    pub(super) fn bar(&self) -> &Region {
        &self.bar
    }

    /// Reads a 32-bit register of BAR 0.
    pub(super) fn read32(&self, offset: u32) -> io::Result<u32> {
        check_register(&self.bar, offset)?;
        self.read_at(self.bar.offset + u64::from(offset))
            .map(u32::from_le_bytes)
    }

    /// Writes a 32-bit register of BAR 0.
    pub(super) fn write32(&self, offset: u32, value: u32) -> io::Result<()> {
        check_register(&self.bar, offset)?;
        self.write_at(&value.to_le_bytes(), self.bar.offset + u64::from(offset))
    }

    /// Sets and clears bits of the PCI command register, and checks that it took them.
    pub(super) fn change_command(&self, set: u16, clear: u16) -> io::Result<()> {
        let _guard = self.command.lock().unwrap_or_else(PoisonError::into_inner);
        config::change_command(self, set, clear)
    }

    /// Resets the function.
    pub(super) fn reset(&self) -> io::Result<()> {
        if !self.can_reset {
            let reason = "neither the function nor its slot can be reset on its own";
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        self.with_file(sys::reset)
    }

    fn read_at<const N: usize>(&self, at: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        let read = self.open.with(|open| open.file.read_at(&mut bytes, at))?;
        whole(read, N)?;
        Ok(bytes)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let written = self.open.with(|open| open.file.write_at(bytes, at))?;
        whole(written, bytes.len())
    }
}

impl ReadConfig for Function {
    fn read<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        self.read_at(self.config.offset + offset)
    }
}

impl WriteConfig for Function {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_at(bytes, self.config.offset + offset)
    }
}

impl DoorbellCall for Function {
    fn ring(&self, offset: u32, value: u32) {
        // There is nobody to tell: a command whose doorbell is not heard runs into its deadline.
        if let Err(error) = self.write32(offset, value)
            // What was given back takes doorbells without a word.
            && error.raw_os_error() != Some(libc::ENODEV)
            && !self.doorbell_failed.swap(true, Ordering::Relaxed)
        {
            let device = self.address.as_str();
            tracing::error!(device, offset, %error, "doorbell could not be written");
        }
    }
}

fn check_register(bar: &Region, offset: u32) -> io::Result<()> {
    if !offset.is_multiple_of(4) || u64::from(offset) + 4 > bar.size {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("no 32-bit register there in a BAR of {:#x} bytes", bar.size),
        ));
    }
    Ok(())
}

/// Registers are accessed whole or not at all; half of one would be another access.
fn whole(done: usize, wanted: usize) -> io::Result<()> {
    if done == wanted {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::device::config::MEMORY_SPACE;

    /// Where the configuration space is in the file that stands for a device.
    const CONFIG: u64 = 0x2000;

    fn is_open(path: &Path) -> bool {
        let descriptors = fs::read_dir("/proc/self/fd").unwrap();
        descriptors
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .any(|target| target == path)
    }

    fn function(file: File, places: impl Send + Sync + 'static) -> Function {
        let region = |offset, size| Region {
            offset,
            size,
            mappable: Vec::new(),
        };
        Function {
            address: "0000:00:04.0".to_owned(),
            open: Closable::new(OpenFunction {
                file,
                _places: Box::new(places),
            }),
            bar: region(0, CONFIG),
            config: region(CONFIG, 0x100),
            can_reset: true,
            command: Mutex::new(()),
            doorbell_failed: AtomicBool::new(false),
        }
    }

    /// Lets the next opener in: not before this one's file is closed.
    struct Place {
        path: PathBuf,
        left: Arc<AtomicBool>,
    }

    impl Drop for Place {
        fn drop(&mut self) {
            self.left.store(!is_open(&self.path), Ordering::SeqCst);
        }
    }

    #[test]
    fn what_is_closed_gives_errors_and_lets_the_next_one_in() {
        let (file, path) = tempfile::NamedTempFile::new().unwrap().into_parts();
        file.set_len(CONFIG + 0x100).unwrap();
        let left = Arc::new(AtomicBool::new(false));
        let function = function(
            file,
            Place {
                path: path.to_path_buf(),
                left: left.clone(),
            },
        );
        function.write32(0x14, 0x46_0001).unwrap();
        assert_eq!(function.read32(0x14).unwrap(), 0x46_0001);
        function.change_command(MEMORY_SPACE, 0).unwrap();
        function.ring(0x1000, 7);
        assert_eq!(function.read32(0x1000).unwrap(), 7);
        let code = |result: io::Result<()>| result.unwrap_err().raw_os_error();
        assert_eq!(code(function.reset()), Some(libc::ENOTTY));
        assert!(is_open(&path));

        function.close();
        assert!(left.load(Ordering::SeqCst), "closed, and in that order");
        assert!(!is_open(&path));
        let results = [
            function.read32(0x14).map(drop),
            function.write32(0x14, 0),
            function.change_command(0, MEMORY_SPACE),
            function.reset(),
            function.with_file(|_| Ok(())),
        ];
        for result in results {
            assert_eq!(code(result), Some(libc::ENODEV));
        }
        function.ring(0x1000, 8);
        assert!(!function.doorbell_failed.load(Ordering::Relaxed));
        function.close();
    }

    #[test]
    fn registers_are_aligned_and_inside_of_the_bar() {
        let bar = Region {
            size: 0x2000,
            ..Region::default()
        };
        for offset in [0, 4, 0x1000, 0x1ffc] {
            assert!(check_register(&bar, offset).is_ok(), "{offset:#x}");
        }
        for offset in [2, 0x1ffe, 0x2000, u32::MAX - 3, u32::MAX] {
            assert!(check_register(&bar, offset).is_err(), "{offset:#x}");
        }
    }
}
