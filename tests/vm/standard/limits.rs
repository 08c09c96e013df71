//! Controllers that allow little, and the whole I/O suite on each.

use nvme_async::{Error, Namespace, OpenOptions};
use tokio::runtime::Builder;
use tokio::task::{JoinSet, LocalSet};

use crate::harness::{self, full, run, run_on, url, within};
use crate::suite;

#[test]
fn suite_on_blocks_of_512() {
    run(300, async || suite_on("plain").await);
}

#[test]
fn suite_on_blocks_of_4096() {
    run(300, async || suite_on("lba4096").await);
}

async fn suite_on(name: &str) {
    let namespace = harness::open(name).await;
    suite::all(&namespace, full()).await;
    harness::close(namespace).await;
}

#[test]
fn suite_on_a_local_namespace() {
    within(300, || {
        let runtime = Builder::new_current_thread().enable_all().build();
        let tasks = LocalSet::new();
        let test = tasks.run_until(async {
            let namespace = harness::open("plain").await;
            let local = namespace.local().expect("a queue pair is free");
            suite::all(&local, full()).await;
            let refused = namespace.controller().shutdown().await;
            assert!(matches!(refused, Err(Error::InUse { .. })), "{refused:?}");
            drop(local);
            harness::close(namespace).await;
        });
        runtime.expect("a runtime").block_on(test);
    });
}

/// MDTS 1: two pages a command.
#[test]
fn small_transfers() {
    run(300, async || {
        let namespace = harness::open("mdts").await;
        let before = namespace.controller().counters();
        namespace
            .write(0, vec![0x11; 128 << 10])
            .await
            .expect("writes");
        let after = namespace.controller().counters();
        assert_eq!(after.completions - before.completions, 16);
        suite::all(&namespace, full()).await;
        harness::close(namespace).await;
    });
}

#[test]
fn one_queue_pair_and_four_workers() {
    run_on(4, 300, async || {
        let namespace = harness::open("one_queue").await;
        assert_eq!(namespace.controller().io_queues().len(), 1);
        let refused = namespace.local();
        assert!(matches!(refused, Err(Error::NoFreeQueue { .. })));
        many_tasks(&namespace, 32).await;
        suite::all(&namespace, full()).await;
        harness::close(namespace).await;
    });
}

/// Eight entries a queue, of which seven can be used, for more tasks than that.
#[test]
fn short_queues() {
    run(300, async || {
        let namespace = harness::open("short_queues").await;
        for queue in namespace.controller().io_queues() {
            assert_eq!(queue.depth(), 7);
        }
        many_tasks(&namespace, 64).await;
        suite::all(&namespace, full()).await;
        harness::close(namespace).await;
    });
}

/// So many tasks write and read at once, each in a place of its own.
async fn many_tasks(namespace: &Namespace, tasks: u64) {
    const LEN: usize = 8192;
    let rounds = if full() { 50 } else { 5 };
    let mut set = JoinSet::new();
    for task in 0..tasks {
        let namespace = namespace.clone();
        set.spawn(async move {
            for round in 0..rounds {
                let offset = task * LEN as u64;
                let data = vec![(task * 7 + round) as u8; LEN];
                let data = namespace.write(offset, data).await.expect("writes");
                let read = namespace.read(offset, LEN).await.expect("reads");
                assert_eq!(read, data, "task {task}, round {round}");
            }
        });
    }
    set.join_all().await;
}

#[test]
fn two_namespaces_share_a_controller() {
    run(120, async || {
        let first = nvme_async::open(&url("two_namespaces", 1))
            .await
            .expect("opens");
        let second = nvme_async::open(&url("two_namespaces", 2))
            .await
            .expect("opens");
        assert_eq!((first.nsid(), second.nsid()), (1, 2));
        for round in 0..20 {
            let (one, two) = (vec![round; 16 << 10], vec![!round; 16 << 10]);
            let offset = u64::from(round) * 4096;
            let written = tokio::join!(
                first.write(offset, one.clone()),
                second.write(offset, two.clone())
            );
            written.0.expect("writes");
            written.1.expect("writes");
            let read = tokio::join!(
                first.read(offset, one.len()),
                second.read(offset, two.len())
            );
            assert_eq!(read.0.expect("reads"), one);
            assert_eq!(read.1.expect("reads"), two);
        }
        let completions = |namespace: &Namespace| namespace.controller().counters().completions;
        assert_eq!(completions(&first), completions(&second));

        let missing = nvme_async::open(&url("two_namespaces", 3)).await.err();
        assert!(
            matches!(&missing, Some(Error::NoNamespace { nsid: 3, active, .. }) if *active == [1, 2]),
            "{missing:?}"
        );
        harness::close(first).await;
        let closed = second.read(0, 4096).await;
        assert!(matches!(closed, Err(Error::Closed { .. })), "{closed:?}");
    });
}

#[test]
fn fewer_queue_pairs_than_workers() {
    run_on(4, 120, async || {
        let options = OpenOptions::new()
            .queues(2)
            .local_queues(0)
            .queue_entries(2);
        let namespace = options.url(&url("plain", 1)).open().await.expect("opens");
        assert_eq!(namespace.controller().io_queues().len(), 2);
        many_tasks(&namespace, 16).await;
        harness::close(namespace).await;
    });
}
