//! The function that is served, which outlives its clients.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nvme_soft::{Config, PolledDoorbells, SoftController};
use rustix::io::Errno;

use crate::bar;
use crate::config_space::{ConfigSpace, Identity};
use crate::memory::ClientMemory;
use crate::pages::SharedPages;
use crate::vectors::{MAX_VECTORS, Vectors};

/// For how long at least the controller looks for the next command all the time before it sleeps: waking it
/// takes a message.
const TRAPPED_SPIN: Duration = Duration::from_micros(50);
/// As [`TRAPPED_SPIN`], where it wakes by itself: each sleep is as long as many commands take.
const MAPPED_SPIN: Duration = Duration::from_micros(200);

/// How clients ring doorbells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Doorbells {
    /// By messages. The controller offers Doorbell Buffer Config, with which most of them are spared.
    #[default]
    Trapped,
    /// By stores to a page that clients map, at which the controller looks: all the time for 200 µs after a
    /// command, then ever less often.
    Mapped,
}

/// How a controller is served.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// How clients ring doorbells.
    pub doorbells: Doorbells,
    /// How often mapped doorbells are looked at when nothing has been to do for long; 1 ms by default. Looking
    /// costs a few microseconds.
    pub idle_interval: Duration,
    /// Maps memory of clients even if they can take it away, which would end the server by SIGBUS. For clients
    /// that are the same user's own.
    pub trust_client: bool,
    /// How long a client may take for what it has begun, 10 s by default: from when it is its turn to VERSION,
    /// from the first byte of a message to the last, and to read what it is sent. Its connection ends then,
    /// so that it does not keep others waiting. A client that owes nothing may be silent for ever.
    pub patience: Duration,
    /// MSI-X vectors, 1 to 256; `None` for one for each queue pair.
    pub vectors: Option<u16>,
    /// Vendor and device ID in configuration space, and the vendor in Identify data. The default names no
    /// vendor's device; drivers go by the class code.
    pub pci_id: (u16, u16),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            doorbells: Doorbells::Trapped,
            idle_interval: Duration::from_millis(1),
            trust_client: false,
            patience: Duration::from_secs(10),
            vectors: None,
            pci_id: (0x4e56, 0x0001),
        }
    }
}

/// Why a controller can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Its configuration is not possible.
    #[error(transparent)]
    Controller(#[from] nvme_soft::StartError),
    /// The doorbells of all queue pairs don't fit into a page.
    #[error(
        "the doorbells of {io_queue_pairs} I/O queue pairs with a stride of {} bytes don't fit into a page",
        4_u64 << stride
    )]
    Doorbells {
        /// I/O queue pairs of the configuration.
        io_queue_pairs: u16,
        /// The stride of the configuration (CAP.DSTRD).
        stride: u8,
    },
    /// Another number of vectors than there can be.
    #[error("{0} MSI-X vectors are not within 1..=256")]
    Vectors(u16),
    /// The pages that clients map could not be made.
    #[error("the pages that clients map: {0}")]
    Page(#[source] io::Error),
}

/// A controller with all that makes it a PCI function. Dropping it stops the controller; nothing is flushed
/// then, as when power is lost.
#[derive(Debug)]
pub struct Device {
    controller: SoftController,
    pub(crate) memory: Arc<ClientMemory>,
    pub(crate) vectors: Arc<Vectors>,
    pub(crate) pages: Arc<SharedPages>,
    pub(crate) maps_doorbells: bool,
    pub(crate) trust_client: bool,
    pub(crate) patience: Duration,
    config: Mutex<ConfigSpace>,
    /// Held for as long as there is a client.
    pub(crate) client: Mutex<()>,
}

impl Device {
    /// Starts a controller. How doorbells are rung is for `options` to say: what `config` says about that, and
    /// about the PCI function, is replaced, and [`Config::spin`] is raised to 50 µs, or 200 µs with mapped doorbells.
    ///
    /// # Errors
    ///
    /// [`StartError`] if the configuration is not possible.
    pub fn new(config: Config, options: &Options) -> Result<Self, StartError> {
        let mut config = config;
        let (pairs, stride) = (config.io_queue_pairs, config.doorbell_stride);
        let bytes = (u64::from(pairs) + 1) << (3 + u64::from(stride.min(15)));
        if bytes > bar::PAGE.into() {
            return Err(StartError::Doorbells {
                io_queue_pairs: pairs,
                stride,
            });
        }
        let count = options
            .vectors
            .unwrap_or_else(|| pairs.saturating_add(1).min(MAX_VECTORS));
        if !(1..=MAX_VECTORS).contains(&count) {
            return Err(StartError::Vectors(count));
        }
        let pages = Arc::new(SharedPages::new().map_err(StartError::Page)?);
        let maps_doorbells = options.doorbells == Doorbells::Mapped;
        config.doorbell_buffers = !maps_doorbells;
        config.polled_doorbells = maps_doorbells.then(|| PolledDoorbells {
            memory: pages.clone(),
            idle_interval: options.idle_interval,
        });
        config.spin = config.spin.max(match options.doorbells {
            Doorbells::Trapped => TRAPPED_SPIN,
            Doorbells::Mapped => MAPPED_SPIN,
        });
        let (vendor, device) = options.pci_id;
        config.pci_vendor = vendor;
        config.pci_subsystem_vendor = vendor;
        let memory = Arc::new(ClientMemory::default());
        let vectors = Arc::new(Vectors::new(count, pages.clone()));
        let controller = SoftController::start(config, memory.clone(), vectors.clone())?;
        controller.set_bus_master(false);
        Ok(Self {
            controller,
            memory,
            vectors,
            pages,
            maps_doorbells,
            trust_client: options.trust_client,
            patience: options.patience,
            config: Mutex::new(ConfigSpace::new(Identity { vendor, device }, count)),
            client: Mutex::default(),
        })
    }

    /// The controller itself, to change its namespaces, to inject faults or to see its counters.
    pub fn controller(&self) -> &SoftController {
        &self.controller
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        // Each byte is valid whatever the others are.
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn read_config(&self, offset: usize, out: &mut [u8]) {
        self.config().read(offset, out);
    }

    /// Writes to configuration space, and does what that asks for. Returns when it is in effect.
    ///
    /// # Errors
    ///
    /// EIO if a function level reset was asked for and had no effect.
    pub(crate) fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), Errno> {
        let mut config = self.config();
        let was_bus_master = config.is_bus_master();
        let mut outcome = Ok(());
        if config.write(offset, data) {
            config.reset();
            self.vectors.reset_table();
            outcome = self.controller.reset().map_err(|_| Errno::IO);
        }
        let (enabled, masked) = config.msix();
        self.vectors.set_control(enabled, masked);
        let is_bus_master = config.is_bus_master();
        if is_bus_master != was_bus_master {
            self.controller.set_bus_master(is_bus_master);
        }
        outcome
    }

    /// DEVICE_RESET: the controller is reset, configuration space stays as it is.
    ///
    /// # Errors
    ///
    /// EIO if that had no effect.
    pub(crate) fn reset(&self) -> Result<(), Errno> {
        self.controller.reset().map_err(|_| Errno::IO)?;
        self.vectors.forget_pending();
        Ok(())
    }

    /// Forgets a client: nothing of it is accessed or known any more.
    pub(crate) fn forget_client(&self) {
        // First, since the controller's thread may wait for one of the client's eventfds.
        self.vectors.close();
        self.controller.set_bus_master(false);
        if self.controller.reset().is_err() {
            // Only where a fault was asked for that prevents it.
            tracing::error!("the controller could not be reset");
        }
        // Not before, or what is in flight would be a failure of the controller's.
        self.memory.clear();
        self.vectors.clear();
        self.config().reset();
    }

    /// Sees to it that a client shares nothing with the one before, which may have its pages mapped for ever.
    ///
    /// # Errors
    ///
    /// If there are no other pages. The client can't be served then.
    pub(crate) fn welcome_client(&self) -> io::Result<()> {
        self.pages.renew()?;
        self.vectors.reset_table();
        Ok(())
    }
}
