//! Controllers that are served, and the checks at the end: no stray access, no memory kept.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_async::device::soft::{SoftDevice, SoftOptions};
use nvme_async::{Controller, Namespace, OpenOptions};
use nvme_export::Export;
use nvme_export::vhost_user_blk::{Device, Options};
use nvme_soft::store::MemoryStore;
use nvme_soft::{Config, NamespaceConfig};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::guest::{FrontEnd, Ram, Wishes};

/// Bytes of the namespace.
pub(crate) const SIZE: u64 = 16 << 20;

/// A controller with one namespace, and what serves it.
pub(crate) struct Host {
    pub(crate) runtime: Runtime,
    pub(crate) soft: Arc<SoftDevice>,
    pub(crate) controller: Controller,
    pub(crate) namespace: Namespace,
    directory: TempDir,
    mappings: u64,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::with(512, |_| {})
    }

    pub(crate) fn with(lba_size: u32, change: impl FnOnce(&mut Config)) -> Self {
        Self::opened(2, OpenOptions::new(), lba_size, change)
    }

    /// With so many worker threads, and a controller that is opened so.
    pub(crate) fn opened(
        workers: usize,
        options: OpenOptions,
        lba_size: u32,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(workers)
            .enable_all()
            .build()
            .expect("a runtime");
        let mut config = Config::default();
        let store = MemoryStore::new(SIZE).expect("a little memory");
        config
            .namespaces
            .push(NamespaceConfig::new(store, lba_size));
        change(&mut config);
        let soft = SoftDevice::new("soft", config, &SoftOptions::default()).expect("starts");
        let soft = Arc::new(soft);
        let attached = options.attach(soft.clone());
        let controller = runtime.block_on(attached).expect("comes up");
        let namespace = runtime.block_on(controller.namespace(1)).expect("is there");
        Self {
            mappings: controller.mappings().fixed_mappings,
            runtime,
            soft,
            controller,
            namespace,
            directory: tempfile::tempdir().expect("a directory"),
        }
    }

    pub(crate) fn export(&self) -> Export {
        Export::new(self.namespace.clone()).expect("is there")
    }

    pub(crate) fn serve(&self) -> Served {
        self.serve_as("disk", self.export(), &Options::default())
    }

    pub(crate) fn serve_as(&self, name: &str, export: Export, options: &Options) -> Served {
        let socket = self.directory.path().join(name);
        // That of a server that was killed.
        let _ = std::fs::remove_file(&socket);
        let listener = {
            let _runtime = self.runtime.enter();
            UnixListener::bind(&socket).expect("a socket")
        };
        let device = Device::new(export, options);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = self.runtime.spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            device.run(listener, stopped).await
        });
        Served { socket, stop, task }
    }

    /// What lies at `offset`.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let read = self.runtime.block_on(self.namespace.read(offset, len));
        read.expect("reads").into()
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let write = self.namespace.write(offset, data.to_vec());
        self.runtime.block_on(write).expect("writes");
    }

    pub(crate) fn bounced(&self) -> u64 {
        self.controller.counters().bounced_bytes
    }

    /// Waits until no guest's memory is registered any more.
    pub(crate) fn wait_for_memory(&self) {
        eventually("all memory is given back", || {
            self.controller.mappings().fixed_mappings <= self.mappings
        });
    }

    /// Ends in order, after `served` has.
    pub(crate) fn end(self, served: impl IntoIterator<Item = Served>) {
        for served in served {
            self.stop(served);
        }
        self.wait_for_memory();
        let Self {
            runtime,
            soft,
            controller,
            namespace,
            ..
        } = self;
        runtime.block_on(async move {
            drop(namespace);
            controller.shutdown().await.expect("shuts down");
        });
        eventually("all memory is unmapped", || soft.iommu().mappings() == 0);
        let last = soft.iommu().last_stray();
        assert_eq!(soft.stray_accesses(), 0, "the last one: {last:x?}");
        let counters = soft.counters();
        assert_eq!(counters.refused_accesses, 0);
        assert_eq!(counters.invalid_doorbells, 0);
    }

    /// Ends as a process does that is killed: nothing that runs in it goes on, and nobody hears of it.
    pub(crate) fn kill(self) {
        let Self { runtime, soft, .. } = self;
        runtime.shutdown_timeout(Duration::from_secs(20));
        soft.controller().release();
    }

    pub(crate) fn stop(&self, served: Served) {
        let Served { socket, stop, task } = served;
        drop(stop);
        self.runtime.block_on(task).expect("does not panic");
        std::fs::remove_file(socket).expect("nobody else does");
    }
}

/// A server that runs.
pub(crate) struct Served {
    pub(crate) socket: PathBuf,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Served {
    pub(crate) fn connect(&self, ram: &Ram, wishes: &Wishes) -> FrontEnd {
        FrontEnd::connect(&self.socket, ram, wishes)
    }
}

/// Waits for something that comes true, and fails if it does not.
pub(crate) fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !is_true() {
        assert!(Instant::now() < until, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
