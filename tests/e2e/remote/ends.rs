//! The server goes while there is work: everything ends, with its memory, and a new opening reaches the
//! next server.

use std::time::Duration;

use nvme_async::device::vfio_user::VfioUserDevice;
use nvme_async::{Controller, ControllerState, Error, Namespace, OpenOptions};

use super::impatient;
use super::peer::{Act, Peer, Traps};
use crate::support::bounded::{comes_true, on_both_flavours, on_current_thread};
use crate::support::owners::Ledger;

const DEPTH: usize = 32;

/// Reads and writes with so many at a time until the device is gone; returns how many there were.
async fn work(namespace: &Namespace, ledger: &Ledger) -> u64 {
    let workers = (0..DEPTH as u64).map(|worker| async move {
        let mut count = 0;
        loop {
            let bytes = ledger.bytes(8192, worker as u8);
            let failed = if worker % 2 == 0 {
                let buffer = namespace.allocate(8192).expect("allocates");
                let read = namespace.read_into(worker * 8192, buffer).await;
                read.map(drop)
                    .map_err(|error| (error.error, error.buffer.is_some()))
            } else {
                let written = namespace.write(worker * 8192, bytes).await;
                written
                    .map(drop)
                    .map_err(|error| (error.error, error.buffer.is_some()))
            };
            match failed {
                Ok(()) => count += 1,
                Err((error, has_buffer)) => {
                    assert!(matches!(error, Error::Removed { .. }), "{error}");
                    assert!(has_buffer, "the buffer comes back");
                    return count;
                }
            }
        }
    });
    futures::future::join_all(workers).await.into_iter().sum()
}

fn gone(controller: &Controller) -> bool {
    controller.state() == ControllerState::Removed
}

#[test]
fn the_server_hangs_up_under_load() {
    on_both_flavours(async || {
        for maps_doorbells in [false, true] {
            let traps = Traps {
                maps_doorbells,
                ..Traps::default()
            };
            let peer = Peer::start(traps);
            let ledger = Ledger::default();
            for _ in 0..2 {
                let namespace = nvme_async::open(&peer.url()).await.expect("opens");
                let end = async {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    peer.hang_up();
                };
                let (done, ()) = futures::join!(work(&namespace, &ledger), end);
                assert!(done > 0, "there was work");
                assert_eq!(ledger.alive(), 0);
                assert!(gone(namespace.controller()));
                let shutdown = namespace.controller().shutdown().await;
                assert!(matches!(shutdown, Err(Error::Removed { .. })));
            }
            comes_true("the server sees it too", || {
                peer.shared().dma.regions() == 0
            })
            .await;
        }
    });
}

#[test]
fn commands_that_the_server_never_ends() {
    on_current_thread(async || {
        let peer = Peer::start(Traps::default());
        let namespace = nvme_async::open(&peer.url()).await.expect("opens");
        peer.shared().function.controller.hold_io();
        let ledger = Ledger::default();
        let end = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            peer.hang_up();
        };
        let (done, ()) = futures::join!(work(&namespace, &ledger), end);
        assert_eq!((done, ledger.alive()), (0, 0));
        peer.shared().function.controller.release();
    });
}

/// Nothing says that such a server accesses no memory any more, unless it closes its side too.
#[test]
fn a_server_that_breaks_the_protocol() {
    on_current_thread(async || {
        let peer = Peer::start(Traps::default());
        let namespace = nvme_async::open(&peer.url()).await.expect("opens");
        let ledger = Ledger::default();
        peer.shared().dma.ask_nothing(&[0xff; 16]);
        work(&namespace, &ledger).await;
        assert_eq!(ledger.alive(), 0);
        comes_true("the controller is gone", || gone(namespace.controller())).await;
        let namespace = nvme_async::open(&peer.url()).await.expect("opens");
        namespace.controller().shutdown().await.expect("shuts down");
    });
}

#[test]
fn a_server_that_hangs_is_given_up() {
    on_current_thread(async || {
        let peer = Peer::start(Traps::default());
        let path = peer.path().to_owned();
        let opened = tokio::task::spawn_blocking(move || VfioUserDevice::open(&path, &impatient()));
        let device = opened.await.expect("does not panic").expect("opens");
        let options = OpenOptions::new().timeout(Some(Duration::from_millis(200)));
        let controller = options
            .attach(std::sync::Arc::new(device))
            .await
            .expect("comes up");
        let namespace = controller.namespace(1).await.expect("is there");
        peer.shared().function.controller.hold();
        peer.hook(|_| Some(Act::Silence));
        let read = namespace.read(0, 4096).await.expect_err("nobody answers");
        assert!(matches!(read, Error::Removed { .. }), "{read}");
        comes_true("the controller is gone", || gone(&controller)).await;
        peer.shared().function.controller.release();
    });
}
