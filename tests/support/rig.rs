//! Controllers under test, and the checks after each test: no stray access, no memory kept.

use std::sync::Arc;
use std::thread;

use nvme_async::device::Device;
use nvme_async::device::soft::{SoftDevice, SoftOptions};
use nvme_async::{Controller, Error, Namespace, OpenOptions};
use nvme_soft::store::{MemoryStore, Store};
use nvme_soft::{Config, NamespaceConfig};

use super::bounded::comes_true;
use super::strays;

/// What to open, and how.
pub(crate) struct Setup {
    pub(crate) config: Config,
    pub(crate) device: SoftOptions,
    pub(crate) options: OpenOptions,
}

impl Setup {
    /// A controller without namespaces.
    pub(crate) fn empty() -> Self {
        Self {
            config: Config::default(),
            device: SoftOptions::default(),
            options: OpenOptions::new(),
        }
    }

    /// One namespace of `size` bytes of memory and blocks of 512 bytes.
    pub(crate) fn memory(size: u64) -> Self {
        Self::empty().store(MemoryStore::new(size).expect("a little memory"), 512)
    }

    /// Adds a namespace.
    pub(crate) fn store(mut self, store: impl Store + 'static, lba_size: u32) -> Self {
        let namespace = NamespaceConfig::new(store, lba_size);
        self.config.namespaces.push(namespace);
        self
    }

    /// Changes the controller.
    pub(crate) fn config(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    /// Changes how it is attached.
    pub(crate) fn device(mut self, change: impl FnOnce(&mut SoftOptions)) -> Self {
        change(&mut self.device);
        self
    }

    /// Changes how it is opened.
    pub(crate) fn options(mut self, change: impl FnOnce(OpenOptions) -> OpenOptions) -> Self {
        self.options = change(self.options);
        self
    }

    /// Starts the controller without opening it.
    pub(crate) fn start(self) -> (Arc<SoftDevice>, OpenOptions) {
        let device = SoftDevice::new("soft", self.config, &self.device).expect("starts");
        (Arc::new(device), self.options)
    }

    pub(crate) async fn open(self) -> Rig {
        let (device, options) = self.start();
        Rig::attach(device, options).await.expect("comes up")
    }
}

/// A software controller and its driver.
///
/// It is used up by one of the methods that check what is left of it.
pub(crate) struct Rig {
    pub(crate) device: Arc<SoftDevice>,
    controller: Option<Controller>,
    /// The controller forgot its queues while the driver could not know: doorbells that nobody
    /// expects are not held against the driver.
    pub(crate) lost_power: bool,
    checked: bool,
}

impl Rig {
    pub(crate) async fn attach(
        device: Arc<SoftDevice>,
        options: OpenOptions,
    ) -> Result<Self, Error> {
        let controller = options.attach(device.clone() as Arc<dyn Device>).await?;
        Ok(Self {
            device,
            controller: Some(controller),
            lost_power: false,
            checked: false,
        })
    }

    pub(crate) fn controller(&self) -> &Controller {
        self.controller.as_ref().expect("it is taken at the end")
    }

    pub(crate) async fn namespace(&self) -> Namespace {
        self.controller().namespace(1).await.expect("is there")
    }

    /// Shuts down in order. The caller has dropped all other handles and all buffers.
    pub(crate) async fn close(self) {
        self.close_keeping(0).await;
    }

    /// Drops the last handle. The caller has dropped all others and all buffers.
    pub(crate) async fn abandon(self) {
        self.abandon_keeping(0).await;
    }

    /// As [`abandon`](Self::abandon), with other checks of what the controller complains about.
    pub(crate) async fn end(mut self, check: impl FnOnce(&SoftDevice)) {
        self.controller = None;
        self.finish(0, check).await;
    }

    /// As [`close`](Self::close), if forgotten futures own memory in so many mappings.
    pub(crate) async fn close_keeping(mut self, mappings: u64) {
        let controller = self.controller.take().expect("it is taken once");
        controller.shutdown().await.expect("shuts down");
        drop(controller);
        self.check(mappings).await;
    }

    /// As [`abandon`](Self::abandon), if forgotten futures own memory in so many mappings.
    pub(crate) async fn abandon_keeping(mut self, mappings: u64) {
        self.controller = None;
        self.check(mappings).await;
    }

    async fn check(self, kept: u64) {
        let lost_power = self.lost_power;
        self.finish(kept, |device| {
            if lost_power {
                assert_eq!(device.stray_accesses(), 0);
            } else {
                assert_harmless(device);
            }
        })
        .await;
    }

    async fn finish(mut self, kept: u64, check: impl FnOnce(&SoftDevice)) {
        self.checked = true;
        comes_true("all memory is unmapped", || {
            self.device.iommu().mappings() as u64 <= kept
        })
        .await;
        check(&self.device);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        assert!(
            self.checked || thread::panicking(),
            "a test ended without its checks"
        );
    }
}

/// The driver has done nothing that a controller could complain about.
#[track_caller]
pub(crate) fn assert_harmless(device: &SoftDevice) {
    let last = device.iommu().last_stray();
    assert_eq!(device.stray_accesses(), 0, "the last one: {last:x?}");
    let counters = device.counters();
    assert_eq!(counters.refused_accesses, 0);
    assert_eq!(counters.invalid_doorbells, 0);
    assert_eq!(counters.redundant_completion_heads, 0);
}

/// Opens a namespace by URL.
pub(crate) async fn open(url: &str) -> Namespace {
    strays::watch();
    nvme_async::open(url)
        .await
        .unwrap_or_else(|error| panic!("{url}: {error}"))
}

/// Shuts down the controller of a namespace that was opened by URL.
pub(crate) async fn close(namespace: Namespace) {
    namespace.controller().shutdown().await.expect("shuts down");
    assert_no_strays(&namespace);
}

/// The controller of a namespace that was opened by URL had no reason to complain.
#[track_caller]
pub(crate) fn assert_no_strays(namespace: &Namespace) {
    let thread = namespace.controller().software_thread();
    assert_eq!(strays::of(thread.expect("a software controller")), 0);
}
