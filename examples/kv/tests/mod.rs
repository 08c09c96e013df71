//! Tests of the key-value service: of the store on devices that lose power, and of the server with real
//! clients.

mod clients;
mod history;
mod kill;
#[cfg(feature = "vm")]
mod machine;
mod model;
mod power;
mod recovery;
mod room;
mod store;
mod visible;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use clap::Parser;
use nvme_async::device::Device;
use nvme_async::device::soft::{SoftDevice, SoftOptions};
use nvme_async::{Namespace, OpenOptions};
use nvme_soft::fault::Loss;
use nvme_soft::store::Store as BlockStore;
use nvme_soft::{Config, NamespaceConfig};

use crate::Arguments;
use crate::server::Limits;
use crate::store::{Change, Error, Options, Store};

/// Whether to run the full counts (`NVME_ASYNC_FULL=1`).
fn full() -> bool {
    std::env::var_os("NVME_ASYNC_FULL").is_some_and(|value| value == "1")
}

/// Media that outlive their controllers, as a power cut needs it.
#[derive(Clone)]
struct Disk {
    media: Arc<Mutex<Media>>,
    /// The controller that it is in.
    device: Arc<Mutex<Option<Arc<SoftDevice>>>>,
}

impl Disk {
    fn new(size: usize) -> Self {
        Self {
            media: Arc::new(Mutex::new(Media {
                bytes: vec![0; size],
                durable: BTreeMap::new(),
            })),
            device: Arc::default(),
        }
    }

    fn media(&self) -> MutexGuard<'_, Media> {
        self.media.lock().expect("no one panics with it")
    }

    /// Takes it out of its controller, which does nothing to it any more.
    fn detach(&self, loss: Loss) {
        let device = self.device.lock().expect("no one panics with it").take();
        if let Some(device) = device {
            device.controller().vanish(loss);
        }
    }

    /// Puts it into a controller, whose cache is lost with its power.
    async fn attach(&self, change: impl FnOnce(&mut Config)) -> (Arc<SoftDevice>, Namespace) {
        let mut config = Config {
            track_unflushed: true,
            namespaces: vec![NamespaceConfig::new(Shared(self.media.clone()), 512)],
            ..Config::default()
        };
        change(&mut config);
        self.detach(Loss::Nothing);
        let device = SoftDevice::new("disk", config, &SoftOptions::default()).expect("starts");
        let device = Arc::new(device);
        *self.device.lock().expect("no one panics with it") = Some(device.clone());
        let controller = OpenOptions::new()
            .attach(device.clone() as Arc<dyn Device>)
            .await
            .expect("comes up");
        let namespace = controller.namespace(1).await.expect("is there");
        (device, namespace)
    }

    /// Opens the store on it, in a controller of its own.
    async fn open(&self, options: Options) -> Result<Store, Error> {
        let (_, namespace) = self.attach(|_| {}).await;
        Store::open(namespace, options).await
    }
}

const BLOCK: usize = 512;

/// Bytes, with a cache that outlives controllers: what it holds is lost only when told.
struct Media {
    bytes: Vec<u8>,
    /// What durably is in those blocks that have other bytes by now.
    durable: BTreeMap<usize, Vec<u8>>,
}

impl Media {
    fn lose_power(&mut self) {
        for (block, bytes) in std::mem::take(&mut self.durable) {
            self.bytes[block * BLOCK..][..BLOCK].copy_from_slice(&bytes);
        }
    }

    fn change(&mut self, offset: u64, len: usize, durable: bool, change: impl FnOnce(&mut [u8])) {
        let offset = offset as usize;
        for block in offset / BLOCK..(offset + len).div_ceil(BLOCK) {
            if durable {
                self.durable.remove(&block);
            } else {
                let bytes = &self.bytes[block * BLOCK..][..BLOCK];
                self.durable.entry(block).or_insert_with(|| bytes.to_vec());
            }
        }
        change(&mut self.bytes[offset..][..len]);
    }
}

/// What a controller sees of a disk.
struct Shared(Arc<Mutex<Media>>);

impl Shared {
    fn media(&self) -> MutexGuard<'_, Media> {
        self.0.lock().expect("no one panics with it")
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

impl BlockStore for Shared {
    fn size(&self) -> u64 {
        self.media().bytes.len() as u64
    }

    fn read(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        out.copy_from_slice(&self.media().bytes[offset as usize..][..out.len()]);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let copy = |bytes: &mut [u8]| bytes.copy_from_slice(data);
        self.media().change(offset, data.len(), durable, copy);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.media().durable.clear();
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64, _deallocate: bool) -> io::Result<()> {
        let zero = |bytes: &mut [u8]| bytes.fill(0);
        self.media().change(offset, len as usize, false, zero);
        Ok(())
    }
}

/// As without arguments.
impl Default for Options {
    fn default() -> Self {
        Arguments::parse_from(["kv"]).store
    }
}

impl Default for Limits {
    fn default() -> Self {
        Arguments::parse_from(["kv"]).limits
    }
}

/// How much there is in a store.
#[derive(Debug)]
struct Usage {
    keys: usize,
    used: u64,
    limit: u64,
    available: usize,
}

fn usage(store: &Store) -> Usage {
    let state = store.state();
    Usage {
        keys: state.index.len(),
        used: state.used,
        limit: state.limit(state.checkpoint_need()),
        available: state.available(),
    }
}

/// A store that takes checkpoints and compacts all the time.
fn busy() -> Options {
    Options {
        batch_bytes: 4096,
        compaction_rate: u64::MAX,
        checkpoint_bytes: 256 << 10,
        ..Options::default()
    }
}

fn set(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Change {
    Change::set(&key.into(), &value.into(), 0)
}

/// Changes something durably.
async fn change(store: &Store, changes: Vec<Change>) -> Result<(), Error> {
    let (_, commit) = store.change(|_| (changes.clone(), ())).await?;
    commit.durable().await
}

fn delete(key: impl Into<Bytes>) -> Change {
    Change::delete(&key.into())
}

async fn get(store: &Store, key: impl Into<Bytes>) -> Option<Bytes> {
    let found = store.get(&key.into()).expect("works");
    found.value().await.expect("can be read")
}

/// All keys with their values and times of expiry.
async fn contents(store: &Store) -> BTreeMap<Bytes, (Bytes, u64)> {
    let ((next, keys), _) = store.look(|view| view.scan(0, usize::MAX)).expect("works");
    assert_eq!(next, 0);
    let mut contents = BTreeMap::new();
    for key in keys {
        let (entry, _) = store.look(|view| view.get(&key)).expect("works");
        let entry = entry.expect("nothing changes meanwhile");
        let value = get(store, key.clone())
            .await
            .expect("nothing changes meanwhile");
        assert_eq!(entry.value_len as usize, value.len());
        contents.insert(key, (value, entry.expires));
    }
    contents
}
