//! A server that takes its time does not hold up the runtime: here it answers only after another task of
//! the only thread has run.

use std::future::Future;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use nvme_async::Namespace;
use vfio_user::Request;

use super::peer::{Peer, Traps};
use crate::support::bounded::{comes_true, on_current_thread};
use crate::support::owners::Ledger;

/// Holds the server's first answer to such a request back until something is sent.
fn held(peer: &Peer, holds: fn(&Request<'_>) -> bool) -> Sender<()> {
    let (go, may_go) = channel::<()>();
    peer.hook(move |request| {
        if holds(request) {
            // Also when nobody will say so any more.
            let _ = may_go.recv();
        }
        None
    });
    go
}

/// Awaits `work`, beside a task that lets the server go on. If that did not run, nothing would go on
/// before the client has lost patience, and that is an error.
async fn beside_a_task<T>(go: Sender<()>, work: impl Future<Output = T>) -> T {
    let release = async move {
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(go);
    };
    let task = tokio::spawn(release);
    let done = work.await;
    task.await.expect("does not panic");
    done
}

async fn open(peer: &Peer) -> Namespace {
    nvme_async::open(&peer.url()).await.expect("opens")
}

#[test]
fn opening() {
    on_current_thread(async || {
        let kinds: [fn(&Request<'_>) -> bool; 4] = [
            |request| matches!(request, Request::Version(_)),
            |request| matches!(request, Request::DmaMap(_)),
            |request| matches!(request, Request::RegionRead(access) if access.offset == 0x1c),
            |request| matches!(request, Request::RegionWrite(write) if write.offset == 0x14),
        ];
        for holds in kinds {
            let peer = Peer::start(Traps::default());
            let go = held(&peer, holds);
            let namespace = beside_a_task(go, open(&peer)).await;
            namespace.controller().shutdown().await.expect("shuts down");
        }
    });
}

#[test]
fn registering_and_what_comes_after() {
    on_current_thread(async || {
        let peer = Peer::start(Traps::default());
        let namespace = open(&peer).await;
        let controller = namespace.controller();
        let ledger = Ledger::default();

        let go = held(&peer, |request| matches!(request, Request::DmaMap(_)));
        let registering = controller.register(ledger.registered(8192));
        let registration = beside_a_task(go, registering).await.expect("maps");

        let go = held(&peer, |request| matches!(request, Request::DmaUnmap(_)));
        drop(registration);
        assert_eq!(ledger.alive(), 1, "the server has yet to let go of it");
        namespace.write(0, vec![1; 512]).await.expect("writes");
        drop(go);
        comes_true("it is unmapped", || ledger.alive() == 0).await;

        let go = held(&peer, |request| {
            matches!(request, Request::RegionRead(_) | Request::RegionWrite(_))
        });
        let ended = beside_a_task(go, controller.shutdown()).await;
        ended.expect("shuts down");
    });
}

#[test]
fn the_last_handle() {
    on_current_thread(async || {
        let peer = Peer::start(Traps::default());
        let namespace = open(&peer).await;
        let go = held(&peer, |_| true);
        drop(namespace);
        drop(go);
        comes_true("the client leaves", || {
            peer.events().contains(&super::peer::Event::Left)
        })
        .await;
        let namespace = open(&peer).await;
        namespace.controller().shutdown().await.expect("shuts down");
    });
}

#[test]
fn doorbells_that_nobody_reads() {
    on_current_thread(async || {
        let traps = Traps {
            maps_doorbells: false,
            ..Traps::default()
        };
        let peer = Peer::start(traps);
        let namespace = open(&peer).await;
        // The server stops in the middle of a doorbell, with thousands to come.
        let go = held(&peer, |request| matches!(request, Request::RegionWrite(_)));
        let release = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            drop(go);
        });
        let work = (0..64).map(|worker: u64| {
            let namespace = namespace.clone();
            async move {
                for _ in 0..50 {
                    let written = namespace
                        .write(worker * 4096, vec![worker as u8; 4096])
                        .await;
                    written.expect("writes");
                }
            }
        });
        futures::future::join_all(work).await;
        release.await.expect("does not panic");
        for worker in 0..64 {
            let read = namespace.read(worker * 4096, 4096).await.expect("reads");
            assert_eq!(read, vec![worker as u8; 4096]);
        }
        namespace.controller().shutdown().await.expect("shuts down");
    });
}
