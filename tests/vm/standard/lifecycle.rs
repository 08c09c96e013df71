//! The ends of controllers, and new beginnings.

use std::fs;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use futures::FutureExt;
use nvme_async::{Error, Namespace};
use tokio::runtime::Builder;

use crate::harness::{self, run, url, within};

const LEN: usize = 64 << 10;

async fn leave_mark(namespace: &Namespace, mark: u8) {
    namespace.write(0, vec![mark; LEN]).await.expect("writes");
}

async fn find_mark(namespace: &Namespace, mark: u8) {
    let read = namespace.read(0, LEN).await.expect("reads");
    assert_eq!(read, vec![mark; LEN]);
}

#[test]
fn opens_again_after_a_shutdown() {
    run(120, async || {
        for mark in 1..6 {
            let namespace = harness::open("plain").await;
            if mark > 1 {
                find_mark(&namespace, mark - 1).await;
            }
            leave_mark(&namespace, mark).await;
            harness::close(namespace).await;
        }
    });
}

/// The kernel refuses it for that long.
#[test]
fn opens_while_somebody_resets_the_function() {
    run(120, async || {
        let reset = format!("/sys/bus/pci/devices/{}/reset", harness::address("plain"));
        for _ in 0..3 {
            let path = reset.clone();
            let resetting = thread::spawn(move || fs::write(path, "1"));
            // A reset of a function takes 100 ms (PCI Express base specification 6.0, section 6.6.2).
            thread::sleep(Duration::from_millis(20));
            harness::close(harness::open("plain").await).await;
            let reset = resetting.join().expect("does not panic");
            reset.expect("root may reset it");
        }
    });
}

#[test]
fn handles_from_before_a_shutdown_are_closed() {
    run(120, async || {
        let before = harness::open("plain").await;
        let controller = before.controller().clone();
        controller.shutdown().await.expect("shuts down");
        let read = before.read(0, 512).await;
        assert!(matches!(read, Err(Error::Closed { .. })), "{read:?}");
        let error = before.write(0, vec![1; 512]).await.expect_err("closed");
        assert!(matches!(error.error, Error::Closed { .. }), "{error:?}");
        assert_eq!(error.buffer, Some(vec![1; 512]));
        assert!(matches!(before.flush().await, Err(Error::Closed { .. })));
        assert!(matches!(before.local(), Err(Error::Closed { .. })));

        // They do not keep others from opening it.
        let after = harness::open("plain").await;
        leave_mark(&after, 0x77).await;
        find_mark(&after, 0x77).await;
        assert!(matches!(
            before.read(0, 512).await,
            Err(Error::Closed { .. })
        ));
        harness::close(after).await;
    });
}

#[test]
fn opens_again_after_the_last_handle_was_dropped() {
    run(120, async || {
        for mark in 1..11 {
            let namespace = harness::open("plain").await;
            if mark > 1 {
                find_mark(&namespace, mark - 1).await;
            }
            leave_mark(&namespace, mark).await;
            drop(namespace);
        }
        harness::close(harness::open("plain").await).await;
    });
}

/// The device is in the middle of transfers when nobody wants them any more; the IOMMU would
/// report an access after the memory is gone.
#[test]
fn opens_again_after_a_drop_with_commands_in_flight() {
    run(120, async || {
        for round in 0..10 {
            let namespace = harness::open("plain").await;
            for index in 0..20 + round {
                let offset = index * 2 * LEN as u64;
                drop(namespace.read(offset, 2 * LEN).now_or_never());
                let write = namespace.write(offset, vec![round as u8; 2 * LEN]);
                drop(write.now_or_never());
            }
            drop(namespace);
        }
        harness::close(harness::open("plain").await).await;
    });
}

#[test]
fn dropped_futures_are_waited_for() {
    run(120, async || {
        let namespace = harness::open("plain").await;
        for round in 0..50u8 {
            let offset = u64::from(round) * 4096;
            drop(namespace.write(offset, vec![0xdd; LEN]).now_or_never());
            drop(namespace.read(offset, LEN).now_or_never());
            if round % 3 == 0 {
                tokio::task::yield_now().await;
            }
            namespace.quiesce().await.expect("quiesces");
            let data = vec![round; LEN];
            let data = namespace.write(offset, data).await.expect("writes");
            assert_eq!(namespace.read(offset, LEN).await.expect("reads"), data);
        }
        harness::close(namespace).await;
    });
}

#[test]
fn a_shutdown_waits_for_dropped_futures() {
    run(120, async || {
        for _ in 0..5 {
            let namespace = harness::open("plain").await;
            for index in 0..30 {
                let write = namespace.write(index * LEN as u64, vec![0x99; LEN]);
                drop(write.now_or_never());
            }
            harness::close(namespace).await;
        }
        let namespace = harness::open("plain").await;
        for index in 0..30 {
            let read = namespace.read(index * LEN as u64, LEN).await;
            assert_eq!(read.expect("reads"), vec![0x99; LEN], "write {index}");
        }
        harness::close(namespace).await;
    });
}

/// As in a program whose tests each have a runtime.
#[test]
fn outlives_its_runtime() {
    static NAMESPACE: Mutex<Option<Namespace>> = Mutex::new(None);
    let take = || NAMESPACE.lock().expect("nobody panicked").take();
    within(120, move || {
        for mark in 1..6 {
            let runtime = Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let namespace = match take() {
                    None => harness::open("plain").await,
                    Some(namespace) => namespace,
                };
                if mark > 1 {
                    find_mark(&namespace, mark - 1).await;
                }
                leave_mark(&namespace, mark).await;
                NAMESPACE
                    .lock()
                    .expect("nobody panicked")
                    .replace(namespace);
            });
        }
        let runtime = Builder::new_current_thread().enable_all().build();
        let namespace = take().expect("it is open");
        runtime
            .expect("a runtime")
            .block_on(harness::close(namespace));
    });
}

/// A controller of this process is found by its URL, however it is written.
#[test]
fn opened_twice_it_is_one() {
    run(120, async || {
        let first = harness::open("plain").await;
        let address = harness::address("plain");
        let short = format!("nvme://{}", address.trim_start_matches("0000:"));
        for url in [url("plain", 1), format!("nvme://{address}"), short] {
            let second = nvme_async::open(&url).await;
            let second = second.unwrap_or_else(|error| panic!("{url}: {error}"));
            leave_mark(&second, 0x21).await;
            let completions = |namespace: &Namespace| namespace.controller().counters().completions;
            assert_eq!(completions(&first), completions(&second));
        }
        find_mark(&first, 0x21).await;
        harness::close(first).await;
    });
}
