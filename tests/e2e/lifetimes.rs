//! Sharing a controller, closing it, and opening it again; and the limits of its memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use nvme_async::{DmaBuf, Error, OpenOptions, RegisteredSlice};

use crate::support::bounded::{comes_true, on_both_flavours, on_current_thread};
use crate::support::owners::Ledger;
use crate::support::rig::{Setup, assert_no_strays, close, open};
use crate::support::suite::{self, AREA};

const SIZE: u64 = 1 << 20;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn url(&self, rest: &str) -> String {
        format!("file:{}/{rest}", self.0.path().display())
    }
}

#[test]
fn two_urls_of_a_file_share_its_controller() {
    on_both_flavours(async || {
        let folder = Folder::new();
        let first = open(&folder.url("disk.img?size=1M&namespaces=2")).await;
        let second = open(&folder.url("disk.img?ns=2")).await;
        let third = open(&folder.url("./disk.img")).await;
        assert_eq!((first.nsid(), second.nsid(), third.nsid()), (1, 2, 1));
        let thread = first.controller().software_thread();
        for other in [&second, &third] {
            assert_eq!(other.controller().software_thread(), thread);
        }
        first.write(0, vec![1; 512]).await.expect("writes");
        assert_eq!(second.read(0, 512).await.expect("reads"), vec![0; 512]);
        assert_eq!(third.read(0, 512).await.expect("reads"), vec![1; 512]);
        drop((first, third));
        second
            .write(0, vec![2; 512])
            .await
            .expect("is open for as long as one is used");
        close(second).await;
    });
}

/// However the file is named, and whether or not it exists yet.
#[test]
fn all_names_of_a_file_are_the_same_file() {
    on_current_thread(async || {
        let folder = Folder::new();
        let inside = folder.0.path().join("inside");
        std::fs::create_dir(&inside).expect("creates");
        std::os::unix::fs::symlink(&inside, folder.0.path().join("link")).expect("links");
        let first = open(&folder.url("link/../inside/disk.img?size=1M")).await;
        let link = inside.join("other.img");
        std::os::unix::fs::symlink(inside.join("disk.img"), link).expect("links");
        for name in ["inside/disk.img", "link/disk.img", "link/other.img"] {
            let other = open(&folder.url(name)).await;
            assert_eq!(
                other.controller().software_thread(),
                first.controller().software_thread(),
                "{name}"
            );
        }
        close(first).await;
    });
}

#[test]
fn opened_at_the_same_time_there_is_one_controller() {
    on_both_flavours(async || {
        let folder = Folder::new();
        let url = folder.url("disk.img?size=1M");
        let opened = futures::future::join_all((0..8).map(|_| open(&url))).await;
        let thread = opened[0].controller().software_thread();
        for namespace in &opened {
            assert_eq!(namespace.controller().software_thread(), thread);
        }
        for namespace in opened.iter().skip(1) {
            drop(namespace.clone());
        }
        let [first, ..] = &opened[..] else {
            unreachable!("there are eight");
        };
        close(first.clone()).await;
    });
}

#[test]
fn memory_is_new_each_time() {
    on_current_thread(async || {
        let first = open("mem:?size=1M").await;
        let second = open("mem:?size=1M").await;
        assert_ne!(
            first.controller().software_thread(),
            second.controller().software_thread()
        );
        first.write(0, vec![1; 512]).await.expect("writes");
        assert_eq!(second.read(0, 512).await.expect("reads"), vec![0; 512]);
        close(first).await;
        close(second).await;
    });
}

/// The next one to open a file waits until the last one has let go of it.
#[test]
fn the_last_handle_is_dropped_with_writes_in_flight() {
    on_both_flavours(async || {
        let folder = Folder::new();
        let url = folder.url("disk.img?size=1M&latency=300us");
        let ledger = Ledger::default();
        for round in 1..=20_u8 {
            let namespace = open(&url).await;
            let read = namespace.read(0, 64 << 10).await.expect("reads");
            assert!(read.iter().all(|&byte| byte < round), "nothing comes later");
            for index in 0..16 {
                let write = namespace.write(index * 4096, ledger.bytes(4096, round));
                drop(write.now_or_never());
            }
            assert_no_strays(&namespace);
            drop(namespace);
        }
        let namespace = open(&url).await;
        close(namespace).await;
        comes_true("all memory is back", || ledger.alive() == 0).await;
    });
}

/// As above, with a look at what is left.
#[test]
fn a_controller_that_is_dropped_leaves_nothing() {
    on_both_flavours(async || {
        for held in [false, true] {
            let rig = Setup::memory(SIZE)
                .config(|config| config.latency = Duration::from_micros(200))
                .open()
                .await;
            let namespace = rig.namespace().await;
            let ledger = Ledger::default();
            if held {
                rig.device.controller().hold_io();
            }
            for index in 0..300 {
                let write = namespace.write(index * 512, ledger.bytes(512, 1));
                drop(write.now_or_never());
            }
            drop(namespace);
            rig.abandon().await;
            assert_eq!(ledger.alive(), 0);
        }
    });
}

/// A task that is in the middle of something keeps its controller, also past the last other handle.
#[test]
fn a_task_keeps_its_controller() {
    on_both_flavours(async || {
        let namespace = open("mem:?size=1M&latency=1ms").await;
        let last = namespace.clone();
        let task = tokio::spawn(async move {
            last.write(0, vec![5; 4096]).await.expect("writes");
            let read = last.read(0, 4096).await.expect("reads");
            close(last).await;
            read
        });
        drop(namespace);
        assert_eq!(task.await.expect("does not panic"), vec![5; 4096]);
    });
}

/// After a shutdown, the device is free at once although the old handles exist.
#[test]
fn reopened_after_shutdown() {
    on_both_flavours(async || {
        let folder = Folder::new();
        let url = folder.url("disk.img?size=1M");
        let old = open(&url).await;
        old.write(0, vec![1; 512]).await.expect("writes");
        old.controller().shutdown().await.expect("shuts down");
        let new = open(&url).await;
        assert_eq!(new.read(0, 512).await.expect("reads"), vec![1; 512]);
        assert!(matches!(old.read(0, 512).await, Err(Error::Closed { .. })));
        close(new).await;
        assert_no_strays(&old);
    });
}

/// An open that is given up does not keep others out.
#[test]
fn an_open_by_url_that_is_given_up() {
    on_both_flavours(async || {
        let folder = Folder::new();
        let url = folder.url("disk.img?size=1M");
        for micros in (0..4000).step_by(200) {
            let limit = Duration::from_micros(micros);
            drop(tokio::time::timeout(limit, nvme_async::open(&url)).await);
        }
        close(open(&url).await).await;
    });
}

#[test]
fn bytes_and_buffers_outlive_the_controller() {
    on_both_flavours(async || {
        let namespace = open("mem:?size=1M").await;
        namespace.write(0, vec![9; 8192]).await.expect("writes");
        let bytes = namespace.read(0, 8192).await.expect("reads");
        let mut buffer = namespace.allocate(4096).expect("room");
        buffer.fill(3);
        close(namespace).await;
        assert_eq!(bytes, vec![9; 8192]);
        assert_eq!(bytes.slice(100..200), vec![9; 100]);
        assert!(buffer.iter().all(|&byte| byte == 3));
        // Memory of one controller is foreign memory for another.
        let other = open("mem:?size=1M").await;
        other.write(0, bytes).await.expect("writes");
        other.write(4096, buffer).await.expect("writes");
        assert_eq!(other.read(0, 4096).await.expect("reads"), vec![9; 4096]);
        assert_eq!(other.read(4096, 4096).await.expect("reads"), vec![3; 4096]);
        close(other).await;
    });
}

#[test]
fn past_the_limit_of_the_pool_data_is_copied() {
    on_both_flavours(async || {
        let rig = Setup::memory(AREA)
            .config(|config| config.mdts = 5)
            .options(|options| options.pool_limit(4 << 20).queues(1).local_queues(1))
            .open()
            .await;
        let namespace = rig.namespace().await;
        namespace.write(0, vec![4; 64 << 10]).await.expect("writes");
        let mut hoard = Vec::new();
        let refusal = loop {
            match namespace.allocate(4096) {
                Ok(buffer) => hoard.push(buffer),
                Err(error) => break error,
            }
        };
        assert!(matches!(refusal, Error::Memory(_)), "{refusal:?}");
        assert!(refusal.to_string().contains("limit"), "{refusal}");
        let bounced = || rig.controller().counters().bounced_bytes;

        let before = bounced();
        let reads = (0..32).map(|index| namespace.read(index * 2048, 2048));
        for read in futures::future::join_all(reads).await {
            let read = read.expect("goes through the reserve");
            assert_eq!(read, vec![4; 2048]);
        }
        assert_eq!(bounced() - before, 64 << 10);

        let before = bounced();
        let writes = (0..32).map(|index| namespace.write(index * 2048, DmaBuf::heap(2048)));
        for written in futures::future::join_all(writes).await {
            written.expect("goes through the reserve");
        }
        // Larger than a block of the reserve, and in pieces.
        namespace
            .write(1 << 20, vec![6; 512 << 10])
            .await
            .expect("writes");
        let pieces: Vec<_> = (0..64).map(|_| bytes::Bytes::from(vec![8; 1000])).collect();
        namespace.write(2 << 20, pieces).await.expect("writes");
        assert!(bounced() - before >= 64 << 10);
        assert_eq!(
            namespace.read(1 << 20, 512 << 10).await.expect("reads"),
            vec![6; 512 << 10]
        );
        assert_eq!(
            namespace.read(2 << 20, 512).await.expect("reads"),
            vec![8; 512]
        );
        namespace
            .discard(&[0..512, 1024..1536])
            .await
            .expect("discards");
        namespace.flush().await.expect("flushes");

        // With room again there is nothing to copy.
        hoard.clear();
        let before = bounced();
        drop(namespace.read(0, 2048).await.expect("reads"));
        assert_eq!(bounced(), before);
        drop(namespace);
        rig.close().await;
    });
}

/// What is copied and what is not: the price list of the documentation.
#[test]
fn what_is_copied() {
    on_current_thread(async || {
        for sgl in [false, true] {
            let rig = Setup::memory(AREA)
                .config(|config| config.sgl = sgl)
                .open()
                .await;
            let namespace = rig.namespace().await;
            let seen = AtomicU64::new(0);
            let copied = || {
                let now = rig.controller().counters().bounced_bytes;
                now - seen.swap(now, Ordering::Relaxed)
            };
            let mut buffer = namespace.allocate(8192).expect("room");
            buffer.fill(1);
            let bytes: bytes::Bytes = namespace.write(0, buffer).await.expect("writes").into();
            let pooled = namespace.write(0, bytes.clone()).await.expect("writes");
            namespace
                .write(0, pooled.slice(4096..))
                .await
                .expect("writes");
            drop(namespace.read(0, 8192).await.expect("reads"));
            namespace.write(0, vec![1; 1 << 20]).await.expect("writes");
            assert_eq!(copied(), 0, "memory of the pool, and large memory");

            namespace.write(0, vec![1; 4096]).await.expect("writes");
            assert_eq!(copied(), 4096, "small foreign memory");
            // A PRP list describes whole pages only; an address that is a multiple of 4 is fine.
            let halves = vec![bytes.slice(512..1024), bytes.slice(2048..2560)];
            namespace.write(0, halves).await.expect("writes");
            assert_eq!(copied(), if sgl { 0 } else { 1024 });
            namespace
                .write(0, bytes.slice(2..514))
                .await
                .expect("writes");
            let odd = copied();
            assert!(odd == 0 || odd == 512);

            let ledger = Ledger::default();
            let guest = rig.controller().register(ledger.registered(64 << 10));
            let guest = guest.await.expect("room");
            let list = |parts: &[(usize, usize)]| -> Vec<RegisteredSlice> {
                let slice = |&(start, len)| guest.slice(start, len).expect("inside");
                parts.iter().map(slice).collect()
            };
            // As a guest lists the pages of a file: in any order, and the same one twice in a write.
            let pages = list(&[(40960, 4096), (8192, 4096), (40960, 4096)]);
            let pages = namespace.write(0, pages).await.expect("writes");
            assert_eq!(pages.len(), 3);
            let ends = list(&[(1024, 3072), (20480, 4096), (32768, 1024)]);
            namespace.read_into(0, ends).await.expect("reads");
            assert_eq!(copied(), 0, "pages, but for both ends");
            let blocks = list(&[(512, 512), (2048, 512)]);
            let blocks = namespace.read_into(0, blocks).await.expect("reads");
            namespace.write(0, blocks).await.expect("writes");
            assert_eq!(copied(), if sgl { 0 } else { 2048 });
            drop((pages, guest, bytes, pooled, namespace));
            rig.close().await;
        }
    });
}

#[test]
fn registered_memory_is_kept_while_it_is_used() {
    on_both_flavours(async || {
        let rig = Setup::memory(AREA).open().await;
        let namespace = rig.namespace().await;
        let ledger = Ledger::default();
        let registration = rig.controller().register(ledger.registered(64 << 10));
        let registration = registration.await.expect("registers");
        let mappings = rig.device.iommu().mappings();
        let slice = registration.slice(512, 8192).expect("fits");
        assert!(registration.slice(60 << 10, 8192).is_none());
        rig.device.controller().hold_io();
        assert!(namespace.read_into(0, slice).now_or_never().is_none());
        let registration = registration.unregister().expect_err("a slice is in use");
        drop(registration);
        assert_eq!(ledger.alive(), 1, "the device may write to it");
        assert_eq!(rig.device.iommu().mappings(), mappings);
        rig.device.controller().release();
        namespace.quiesce().await.expect("quiesces");
        comes_true("it is unregistered", || ledger.alive() == 0).await;
        assert_eq!(rig.device.iommu().mappings(), mappings - 1);
        drop(namespace);
        rig.close().await;
    });
}

/// One namespace through which several run the suite on parts that overlap with nobody's.
#[test]
fn a_second_controller_does_not_disturb_the_first() {
    on_current_thread(async || {
        let options = || OpenOptions::new().queues(1).local_queues(0);
        let (first, second) = futures::join!(
            options().url("mem:?size=6M").open(),
            options().url("mem:?size=6M&lba=4096").open()
        );
        let (first, second) = (first.expect("opens"), second.expect("opens"));
        futures::join!(suite::all(&first, false), suite::all(&second, false));
        close(first).await;
        close(second).await;
    });
}
