//! The I/O suite on all kinds of software controllers.

use nvme_async::{Namespace, OpenOptions};
use nvme_soft::store::{FileStore, MemoryStore};

use crate::support::bounded::{on_both_flavours, on_current_thread, on_multi_thread};
use crate::support::full;
use crate::support::rig::{Rig, Setup, close, open};
use crate::support::suite::{self, AREA};

const SIZE: u64 = AREA + (64 << 10);

async fn run_on(setup: Setup) {
    let rig = setup.open().await;
    suite::all(&rig.namespace().await, full()).await;
    rig.close().await;
}

fn memory(lba_size: u32) -> Setup {
    let store = MemoryStore::new(SIZE).expect("a little memory");
    Setup::empty().store(store, lba_size)
}

#[test]
fn memory_with_blocks_of_512_bytes() {
    on_both_flavours(async || run_on(memory(512)).await);
}

#[test]
fn memory_with_blocks_of_4096_bytes() {
    on_both_flavours(async || run_on(memory(4096)).await);
}

#[test]
fn a_file_with_blocks_of_each_size() {
    on_current_thread(async || {
        for lba_size in [512, 4096] {
            let directory = tempfile::tempdir().expect("a directory");
            let store = FileStore::create(directory.path().join("disk.img"), SIZE);
            run_on(Setup::empty().store(store.expect("creates"), lba_size)).await;
        }
    });
}

/// By URL, from a worker of the runtime.
async fn run_in_worker(namespace: Namespace) {
    let handle = namespace.clone();
    let run = tokio::spawn(async move { suite::all(&handle, full()).await });
    run.await.expect("does not panic");
    close(namespace).await;
}

#[test]
fn memory_by_url() {
    on_multi_thread(async || run_in_worker(open("mem:?size=6M").await).await);
}

#[test]
fn a_file_by_url() {
    on_multi_thread(async || {
        let directory = tempfile::tempdir().expect("a directory");
        let url = format!("file:{}/disk.img?size=6M", directory.path().display());
        run_in_worker(open(&url).await).await;
    });
}

#[test]
fn a_controller_that_sees_file_descriptors_only() {
    on_current_thread(async || {
        run_on(memory(512).device(|device| device.fd_only = true)).await;
    });
    on_multi_thread(async || run_in_worker(open("mem:?size=6M&lba=4096&fd-only").await).await);
}

#[test]
fn a_controller_without_sgls() {
    on_both_flavours(async || run_on(memory(512).config(|config| config.sgl = false)).await);
}

#[test]
fn the_smallest_transfers() {
    on_multi_thread(async || {
        for sgl in [false, true] {
            let setup = memory(512).config(|config| {
                config.mdts = 1;
                config.sgl = sgl;
                config.wzsl = 1;
                (config.dmrl, config.dmrsl, config.dmsl) = (3, 1, 2);
            });
            run_on(setup).await;
        }
    });
}

#[test]
fn transfers_without_a_limit() {
    on_current_thread(async || {
        let setup = memory(512)
            .config(|config| config.mdts = 0)
            .options(|options| options.max_transfer(usize::MAX));
        run_on(setup).await;
    });
}

#[test]
fn transfers_that_end_at_boundaries() {
    on_current_thread(async || {
        let setup = memory(512).config(|config| {
            config.namespaces[0].optimal_io_boundary = 100;
            config.volatile_write_cache = false;
            config.atomic_write_power_fail = 64;
        });
        run_on(setup).await;
    });
}

#[test]
fn isolation() {
    on_current_thread(async || {
        let rig = memory(512)
            .options(|options| options.isolate(true))
            .open()
            .await;
        let namespace = rig.namespace().await;
        suite::all(&namespace, full()).await;
        let counters = rig.device.counters();
        let copied = rig.controller().counters().bounced_bytes;
        assert!(
            copied >= counters.bytes_read + counters.bytes_written,
            "all data was copied"
        );
        let buffer = namespace.allocate(4096).expect("of the heap");
        assert_eq!(buffer.iova(), None, "out of the device's reach");
        drop((buffer, namespace));
        rig.close().await;
    });
}

#[test]
fn few_mappings_are_enough() {
    on_current_thread(async || {
        run_on(memory(512).device(|device| device.max_mappings = Some(40))).await;
    });
}

#[test]
fn two_namespaces_are_two_disks() {
    on_both_flavours(async || {
        let stores = [512, 4096].map(|lba_size| (MemoryStore::new(SIZE), lba_size));
        let setup = stores
            .into_iter()
            .fold(Setup::empty(), |setup, (store, lba_size)| {
                setup.store(store.expect("a little memory"), lba_size)
            });
        let rig: Rig = setup.open().await;
        assert_eq!(
            rig.controller().active_namespaces().await.ok(),
            Some(vec![1, 2])
        );
        let first = rig.controller().namespace(1).await.expect("is there");
        let second = rig.controller().namespace(2).await.expect("is there");
        assert_eq!((first.block_size(), second.block_size()), (512, 4096));
        futures::join!(suite::all(&first, false), suite::all(&second, false));
        drop((first, second));
        rig.close().await;
    });
}

#[test]
fn the_contents_of_a_file_outlive_its_controller() {
    on_current_thread(async || {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.img");
        let url = format!("file:{}?size=1M", path.display());
        let namespace = open(&url).await;
        namespace.write(4096, vec![7; 8192]).await.expect("writes");
        close(namespace).await;
        let contents = std::fs::read(&path).expect("a file");
        assert_eq!(contents.len(), 1 << 20);
        assert!(contents[4096..4096 + 8192].iter().all(|&byte| byte == 7));
        let url = format!("file:{}", path.display());
        let namespace = OpenOptions::new().url(&url).open().await.expect("reopens");
        assert_eq!(
            namespace.read(4096, 8192).await.expect("reads"),
            vec![7; 8192]
        );
        close(namespace).await;
    });
}
