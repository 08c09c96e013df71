//! How a controller is opened.

use std::sync::Arc;
use std::time::Duration;

use nvme_spec::feature::InterruptCoalescing;

use crate::device::Device;
use crate::engine::PollMode;
use crate::url::Target;
use crate::{Controller, Error, Namespace};

/// What to open, and how.
///
/// ```no_run
/// # async fn example() -> Result<(), nvme_async::Error> {
/// let namespace = nvme_async::OpenOptions::new()
///     .device("0000:44:00.0")
///     .namespace(1)
///     .queues(4)
///     .open()
///     .await?;
/// # Ok(()) }
/// ```
///
/// Options other than the namespace belong to the controller: when it is open in this process
/// already, it stays as it is.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    pub(crate) target: Option<Result<Target, crate::url::UrlError>>,
    pub(crate) namespace: Option<u32>,
    pub(crate) queues: u16,
    pub(crate) local_queues: u16,
    pub(crate) queue_entries: u16,
    pub(crate) poll_mode: PollMode,
    pub(crate) max_window: Duration,
    /// Nothing if that is for the device to say.
    pub(crate) mask_interrupts: Option<bool>,
    pub(crate) coalescing: InterruptCoalescing,
    pub(crate) shadow_doorbells: bool,
    pub(crate) timeout: Option<Duration>,
    pub(crate) retries: u32,
    pub(crate) repeat_writes: bool,
    pub(crate) on_recovery: OnRecovery,
    pub(crate) pool_limit: usize,
    pub(crate) retained_bytes: u64,
    pub(crate) isolate: bool,
    pub(crate) max_transfer: usize,
}

/// What becomes of commands that are submitted while a queue pair is created anew or the controller
/// is reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnRecovery {
    /// They wait for its end, which comes within the times that [`OpenOptions::timeout`] describes.
    #[default]
    Wait,
    /// They fail with [`Error::Recovering`].
    Fail,
}

impl Default for OpenOptions {
    fn default() -> Self {
        let parallelism =
            std::thread::available_parallelism().map_or(1, |n| n.get().min(64) as u16);
        Self {
            target: None,
            namespace: None,
            // One for each worker and one for all who are no worker.
            queues: parallelism + 1,
            local_queues: parallelism,
            queue_entries: 256,
            poll_mode: PollMode::default(),
            max_window: Duration::from_micros(100),
            mask_interrupts: None,
            coalescing: InterruptCoalescing::new(),
            shadow_doorbells: true,
            timeout: Some(Duration::from_secs(30)),
            retries: 5,
            repeat_writes: false,
            on_recovery: OnRecovery::default(),
            pool_limit: 256 << 20,
            retained_bytes: 0,
            isolate: false,
            max_transfer: 1 << 20,
        }
    }
}

impl OpenOptions {
    /// The defaults, with no device.
    pub fn new() -> Self {
        Self::default()
    }

    /// The PCI function to open, such as `0000:44:00.0`, through the kernel's VFIO.
    pub fn device(mut self, address: &str) -> Self {
        self.target = Some(Target::pci(address));
        self
    }

    /// The vfio-user socket of the controller to open, whatever characters are in its path.
    #[cfg(feature = "vfio-user")]
    pub fn vfio_user(mut self, socket: impl Into<std::path::PathBuf>) -> Self {
        self.target = Some(Ok(Target::VfioUser {
            path: socket.into(),
            namespace: None,
        }));
        self
    }

    /// The device to open, as a URL; see [`open`](crate::open) for their forms. A namespace in the
    /// URL counts unless [`namespace`](Self::namespace) is called.
    pub fn url(mut self, url: &str) -> Self {
        self.target = Some(url.parse());
        self
    }

    /// The namespace to open, 1 if neither this nor the URL says otherwise.
    pub fn namespace(mut self, nsid: u32) -> Self {
        self.namespace = Some(nsid);
        self
    }

    /// How many queue pairs all threads share: at least 1; by default one for each core and one
    /// more. The controller may grant fewer.
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues.max(1);
        self
    }

    /// How many queue pairs are kept for [`LocalNamespace`](crate::LocalNamespace)s; by default
    /// one for each core. When the controller grants fewer queue pairs, these are cut first.
    pub fn local_queues(mut self, queues: u16) -> Self {
        self.local_queues = queues;
        self
    }

    /// Entries of each I/O queue, 2 to 4096; by default 256. One entry stays empty. The
    /// controller's limit (CAP.MQES) is honoured.
    pub fn queue_entries(mut self, entries: u16) -> Self {
        self.queue_entries = entries.clamp(2, 4096);
        self
    }

    /// When queues poll for completions; by default [`PollMode::Adaptive`].
    pub fn poll_mode(mut self, mode: PollMode) -> Self {
        self.poll_mode = mode;
        self
    }

    /// The longest time that an adaptive queue polls without a completion; by default 100 µs.
    pub fn max_window(mut self, window: Duration) -> Self {
        self.max_window = window;
        self
    }

    /// Whether the interrupts of adaptive queues are masked while they are polled. Otherwise they come
    /// although nobody waits for them. By default they are masked where nobody else touches the masks
    /// ([`VectorMask::is_exclusive`]), as with the software controller, here or served by another process.
    ///
    /// It is done in the MSI-X table where that can be mapped ([`Device::vector_mask`]) and the
    /// controller has a vector for each queue; elsewhere nothing changes. Over VFIO the kernel does not
    /// know of it, and unmasks a vector when it moves it to another processor.
    ///
    /// [`VectorMask::is_exclusive`]: crate::device::VectorMask::is_exclusive
    pub fn mask_interrupts(mut self, mask: bool) -> Self {
        self.mask_interrupts = Some(mask);
        self
    }

    /// Has the controller wait with the interrupt until there are so many completions, or so much time
    /// has passed since the first one (feature Interrupt Coalescing, NVMe base specification 2.0,
    /// section 5.27.1.6); by default it does not. The number is 1 to 256, where 1 is off; the time is
    /// rounded up to 100 µs, up to 25.5 ms, and zero is no delay.
    ///
    /// It saves interrupts where many commands are outstanding and nobody polls, and makes single
    /// completions late. A controller that refuses it is used without.
    pub fn coalesce_interrupts(mut self, completions: u16, time: Duration) -> Self {
        let threshold = completions.clamp(1, 256) - 1;
        let units = time.as_micros().div_ceil(100).min(u8::MAX.into());
        self.coalescing = InterruptCoalescing::new()
            .with_thr(threshold as u8)
            .with_time(units as u8);
        self
    }

    /// Whether doorbell values are left in memory where the controller offers that (Doorbell Buffer
    /// Config, NVMe base specification 2.0, section 5.8), and written to a register only when it asks for
    /// it; by default they are. Emulated controllers offer it, to which a register access is expensive.
    pub fn shadow_doorbells(mut self, shadow: bool) -> Self {
        self.shadow_doorbells = shadow;
        self
    }

    /// How long a command may take, its repeats included, `None` for ever; by default 30 s. It counts
    /// from when the command gets its place in a queue.
    ///
    /// What takes longer is aborted; if that does not help, its queue pair is created anew, and if
    /// that does not, the controller is reset. So the future of a command resolves, with its buffer,
    /// at the latest after this time and what those take: up to 2 s for the Abort, 0.5 s more for the
    /// command to end, this time again (at most 10 minutes) for each command of the recovery that the
    /// device does not answer, and for each reset twice what the controller claims that it may take
    /// (CAP.TO), at most three times.
    pub fn timeout(mut self, timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self
    }

    /// How often a command is sent again that may be, within its time; by default 5 times. That is
    /// done when the controller says that it is worth trying (an error status without Do Not Retry,
    /// after the delay that it asks for), and when the command was outstanding during a reset.
    ///
    /// What only asks may be sent again (reads, compares, flushes). What writes is not, unless it was
    /// allowed: [`repeat_writes`](Self::repeat_writes), [`Write::repeatable`](crate::Write::repeatable).
    pub fn retries(mut self, retries: u32) -> Self {
        self.retries = retries;
        self
    }

    /// Whether commands that write may be sent again although the device may have executed them; by
    /// default they may not. It is right for programs that never have two writes of one block
    /// outstanding, and read no block of which a write is.
    pub fn repeat_writes(mut self, repeat: bool) -> Self {
        self.repeat_writes = repeat;
        self
    }

    /// What becomes of commands that are submitted during recovery; by default they wait.
    pub fn on_recovery(mut self, on_recovery: OnRecovery) -> Self {
        self.on_recovery = on_recovery;
        self
    }

    /// The most bytes of memory that the driver maps for buffers, queues and lists; by default
    /// 256 MiB. Past it, reads go through the heap and are copied.
    pub fn pool_limit(mut self, bytes: usize) -> Self {
        self.pool_limit = bytes;
        self
    }

    /// The most bytes of large `Bytes` that stay mapped after they were written from where they are;
    /// by default none. A later write of the same `Bytes`, or of a slice of them, then finds them
    /// mapped, and saves the system calls.
    ///
    /// It is for programs that write the same memory again and again. While `Bytes` are mapped, the
    /// driver holds a clone of them:
    ///
    /// * their memory is not freed, and whatever their owner stands for (a place in a pool, a permit)
    ///   not given back; nor are they the only handle to it, so that a `BytesMut` can't have it again.
    ///   An owner that holds this controller keeps it open;
    /// * a slice keeps all of the memory that it is a part of; only the slice counts here;
    /// * it counts towards RLIMIT_MEMLOCK and the kernel's limit on mappings, which other controllers
    ///   of the process may need.
    ///
    /// Those that were not used for longest are given up when this limit or one of the kernel's is
    /// reached, and all when the controller is shut down.
    pub fn retained_bytes(mut self, bytes: u64) -> Self {
        self.retained_bytes = bytes;
        self
    }

    /// Copies all data between memory that the device reaches and memory that it does not, for
    /// devices that are not trusted to leave memory alone after a command has completed.
    pub fn isolate(mut self, isolate: bool) -> Self {
        self.isolate = isolate;
        self
    }

    /// The most bytes that one command transfers; by default 1 MiB. The controller's limit (MDTS)
    /// is honoured; larger requests are split.
    pub fn max_transfer(mut self, bytes: usize) -> Self {
        self.max_transfer = bytes.max(4096);
        self
    }

    /// How many I/O queue pairs are asked for.
    pub(crate) fn queue_pairs(&self) -> u16 {
        let each = match self.poll_mode {
            PollMode::Paired => 2,
            _ => 1,
        };
        let queues = self.queues.saturating_add(self.local_queues);
        queues.saturating_mul(each)
    }

    /// Opens the namespace.
    ///
    /// # Errors
    ///
    /// As [`open`](crate::open).
    ///
    /// # Cancel safety
    ///
    /// Dropping it leaves the controller as a dropped [`Controller`] would.
    pub async fn open(self) -> Result<Namespace, Error> {
        let nsid = self.namespace.or_else(|| match &self.target {
            Some(Ok(target)) => target.namespace(),
            _ => None,
        });
        self.open_controller()
            .await?
            .namespace(nsid.unwrap_or(1))
            .await
    }

    /// Opens the controller.
    ///
    /// # Errors
    ///
    /// As [`open`](crate::open).
    ///
    /// # Cancel safety
    ///
    /// Dropping it leaves the controller as a dropped [`Controller`] would.
    pub async fn open_controller(self) -> Result<Controller, Error> {
        crate::controller::registry::open(self).await
    }

    /// Brings up the controller behind a device that was opened otherwise, such as a
    /// [`SoftDevice`](crate::device::soft::SoftDevice) with a configuration of its own. What was
    /// said of the device's address does not count.
    ///
    /// # Errors
    ///
    /// As [`open`](crate::open), those of opening the device excepted.
    ///
    /// # Cancel safety
    ///
    /// Dropping it leaves the controller as a dropped [`Controller`] would.
    pub async fn attach(self, device: Arc<dyn Device>) -> Result<Controller, Error> {
        crate::controller::registry::attach(device, &self).await
    }
}
