//! What a server may not do, and what it gets for trying.

use vfio_user::{Command, DmaAccess, Limits, ReplyError, Request};

use super::peer::{Act, Peer, Traps};
use crate::support::bounded::{comes_true, on_current_thread};

use nvme_async::ControllerState;

#[test]
fn memory_that_is_not_mapped() {
    on_current_thread(async || {
        let peer = Peer::start(Traps::default());
        let namespace = nvme_async::open(&peer.url()).await.expect("opens");
        let dma = peer.shared().dma.clone();
        let [(first, size)] = dma.ranges()[..] else {
            panic!("one region");
        };
        let ask = move |request: Request<'_>| {
            let answer = dma.ask(&request).expect("an answer");
            let answer = answer.reply(&Limits::default()).map(drop);
            answer.map_err(|error| match error {
                ReplyError::Peer { errno, .. } => errno as i32,
                error => panic!("{request:?}: {error}"),
            })
        };
        let asked = tokio::task::spawn_blocking(move || {
            let read = |address, count| ask(Request::DmaRead(DmaAccess { address, count }));
            let write = |address, data: &[u8]| ask(Request::DmaWrite { address, data });
            let last = first + size - 1;
            assert_eq!(read(first, 4096), Ok(()));
            assert_eq!(read(last, 1), Ok(()));
            assert_eq!(write(last, &[0]), Ok(()));
            for (address, count) in [
                (0, 1),
                (first - 1, 1),
                (first - 1, 4096),
                (last, 2),
                (last + 1, 8),
                (u64::MAX, 1),
            ] {
                assert_eq!(read(address, count), Err(libc::EFAULT), "{address:#x}");
                let data = vec![0xee; count as usize];
                assert_eq!(write(address, &data), Err(libc::EFAULT), "{address:#x}");
            }
            // More than a message may carry, or nothing.
            assert_eq!(read(first, (1 << 20) + 1), Err(libc::EINVAL));
            assert_eq!(read(first, u64::MAX), Err(libc::EINVAL));
            assert_eq!(read(first, 0), Err(libc::EINVAL));
            // What no client has.
            assert_eq!(ask(Request::DeviceReset), Err(libc::EOPNOTSUPP));
            assert_eq!(ask(Request::Other(Command(99))), Err(libc::EOPNOTSUPP));
        });
        asked.await.expect("as it should be");
        namespace.write(0, vec![7; 4096]).await.expect("writes");
        namespace.controller().shutdown().await.expect("shuts down");
    });
}

/// Sends these bytes while the controller is open.
async fn is_ended_by(bytes: &[u8]) {
    let peer = Peer::start(Traps::default());
    let namespace = nvme_async::open(&peer.url()).await.expect("opens");
    peer.shared().dma.ask_nothing(bytes);
    let controller = namespace.controller().clone();
    comes_true("the connection ends", || {
        controller.state() == ControllerState::Removed
    })
    .await;
    namespace.read(0, 512).await.expect_err("is gone");
}

#[test]
fn messages_that_are_none() {
    on_current_thread(async || {
        // Of no size, of a size that nothing has, of a type that there is not, an answer to nothing.
        let header = |id: u16, command: u16, size: u32, flags: u32| {
            let mut bytes = [id.to_ne_bytes(), command.to_ne_bytes()].concat();
            for word in [size, flags, 0] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes
        };
        is_ended_by(&header(1, 11, 0, 0)).await;
        is_ended_by(&header(1, 11, u32::MAX, 0)).await;
        is_ended_by(&header(1, 11, 16, 2)).await;
        is_ended_by(&header(0x7777, 9, 16, 1)).await;
        is_ended_by(&header(0x8001, 2, 16, 1)).await;
    });
}

#[test]
fn requests_that_want_no_reply_and_replies_that_nobody_wanted() {
    on_current_thread(async || {
        let peer = Peer::start(Traps::default());
        let namespace = nvme_async::open(&peer.url()).await.expect("opens");
        let dma = &peer.shared().dma;
        let read = Request::DmaRead(DmaAccess {
            address: 0,
            count: 8,
        });
        for _ in 0..1000 {
            dma.ask_nothing(&read.encode(5, true));
        }
        // Of a doorbell, which some servers answer nevertheless: with success or without.
        for flags in [1_u32, 0x21] {
            let mut reply = [0x8001_u16.to_ne_bytes(), 10_u16.to_ne_bytes()].concat();
            for word in [16, flags, 22] {
                reply.extend(word.to_ne_bytes());
            }
            dma.ask_nothing(&reply);
        }
        namespace.write(0, vec![7; 4096]).await.expect("writes");
        namespace.controller().shutdown().await.expect("shuts down");
    });
}

#[test]
fn files_that_nobody_asked_for() {
    on_current_thread(async || {
        let peer = Peer::start(Traps::default());
        let open_files = || std::fs::read_dir("/proc/self/fd").expect("reads").count();
        peer.hook(|request| {
            let file = std::fs::File::open("/dev/null").expect("opens");
            matches!(request, Request::IrqInfo { .. }).then_some(Act::Pass(file))
        });
        nvme_async::open(&peer.url())
            .await
            .expect_err("a violation");
        // In the place of a file that can be mapped: a device, a directory.
        for path in ["/dev/zero", "/"] {
            peer.hook(move |request| {
                let is_bar = matches!(request, Request::RegionInfo { index: 0, .. });
                is_bar.then(|| Act::Pass(std::fs::File::open(path).expect("opens")))
            });
            let namespace = nvme_async::open(&peer.url()).await.expect("opens");
            namespace.write(0, vec![7; 4096]).await.expect("writes");
            namespace.controller().shutdown().await.expect("shuts down");
        }
        assert!(open_files() < 500, "they were closed");
    });
}

#[test]
fn answers_that_nobody_reads_end_the_reading() {
    on_current_thread(async || {
        let peer = Peer::start(Traps::default());
        let namespace = nvme_async::open(&peer.url()).await.expect("opens");
        let dma = peer.shared().dma.clone();
        let (first, _) = dma.ranges()[0];
        // The answers are 64 MiB, of which the server reads none until it is done.
        let flood = tokio::task::spawn_blocking(move || {
            let (address, count) = (first, 1 << 20);
            let requests = (0..64).map(|_| Request::DmaRead(DmaAccess { address, count }));
            dma.ask_many(requests.collect())
        });
        assert_eq!(flood.await.expect("does not panic"), 64);
        namespace.write(0, vec![7; 4096]).await.expect("writes");
        namespace.controller().shutdown().await.expect("shuts down");
    });
}
