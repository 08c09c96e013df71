//! What clients can't take from the server, or from each other.

use std::sync::Arc;
use std::time::Duration;

use nvme_async::OpenOptions;
use nvme_async::device::soft::{SoftDevice, SoftOptions};
use nvme_export::nbd::Options;
use nvme_soft::fault::{Behaviour, Fault, FaultQueue};
use nvme_soft::store::MemoryStore;
use nvme_soft::{Config, NamespaceConfig};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::client::{Client, DF, EINVAL, READ, Reply, WRITE, WRITE_ZEROES, request};
use crate::{connect, open, pattern, ready, server_of};

const REQUEST: u32 = 64 << 10;

#[tokio::test]
async fn requests_have_a_limit() {
    let namespace = open("mem:?size=1M").await;
    let mut options = Options::default();
    options.max_request = REQUEST + 4096;
    let server = server_of(&namespace, options);
    let (mut client, serving) = ready(&server).await;
    assert_eq!(client.read(0, REQUEST).await.bytes().len(), 65536);
    assert_eq!(client.read(0, REQUEST + 512).await.errno(), EINVAL);
    let unfragmented = client.ask(READ, DF, 0, REQUEST + 512, b"").await;
    assert_eq!(unfragmented.errno(), 75);
    // What transfers no data has none.
    let zeroed = client.ask(WRITE_ZEROES, 0, 0, 1 << 20, b"").await;
    assert_eq!(zeroed, Reply::Done);
    let data = pattern(1, REQUEST as usize);
    assert_eq!(client.write(0, &data).await, Reply::Done);
    let long = request(WRITE, 0, 9, 0, REQUEST + 512);
    client.stream.write_all(&long).await.expect("sent");
    client.is_over().await;
    serving.await.expect("it ends");
    assert_eq!(namespace.read(0, 65536).await.expect("read"), data);
}

/// A client that takes no replies is not read for ever, and others don't notice.
#[tokio::test]
async fn who_takes_no_replies_has_no_more_done() {
    const LIMIT: u64 = 8;
    const LEN: u32 = 16 << 10;
    let namespace = open("mem:?size=1M").await;
    namespace
        .write(0, pattern(2, 1 << 20))
        .await
        .expect("written");
    for by_bytes in [false, true] {
        let mut options = Options::default();
        options.max_request = REQUEST;
        if by_bytes {
            options.max_bytes = LIMIT as u32 * LEN;
        } else {
            options.max_requests = LIMIT as usize;
        }
        let server = server_of(&namespace, options);
        let (mut greedy, _greedy) = ready(&server).await;
        let before = namespace.controller().counters().completions;
        const COUNT: u64 = 1000;
        for number in 0..COUNT {
            let offset = number % 64 * u64::from(LEN);
            greedy.send(READ, 0, offset, LEN, b"").await;
        }
        // All the while the server could go on with the other client's requests.
        let (mut modest, _modest) = ready(&server).await;
        const OTHERS: u64 = 200;
        for _ in 0..OTHERS {
            modest.read(0, 512).await.bytes();
        }
        // What lies between the two is no memory of the server's: 64 KiB, and a reply half sent.
        let done = namespace.controller().counters().completions - before - OTHERS;
        assert!((1..=LIMIT + 5).contains(&done), "{done}");
        for _ in 0..COUNT {
            let (cookie, reply) = greedy.reply().await;
            let offset = (cookie - 0x1000) % 64 * u64::from(LEN);
            let Reply::Data { offset: got, data } = reply else {
                panic!("{reply:?}");
            };
            assert_eq!((got, data.len()), (offset, LEN as usize));
        }
    }
}

/// Connections that share a queue pair of the device have each a share of it.
#[tokio::test]
async fn who_asks_for_much_leaves_room_for_others() {
    const DEPTH: u16 = 8;
    let mut config = Config::default();
    let store = MemoryStore::new(1 << 20).expect("a little memory");
    config.namespaces.push(NamespaceConfig::new(store, 512));
    let device = SoftDevice::new("soft", config, &SoftOptions::default()).expect("starts");
    let device = Arc::new(device);
    let options = OpenOptions::new().queues(1).local_queues(0);
    let controller = options.queue_entries(DEPTH + 1).attach(device.clone());
    let controller = controller.await.expect("comes up");
    let namespace = controller.namespace(1).await.expect("is there");
    let soft = device.controller();
    let endless = Fault::new(Behaviour::Hold).queue(FaultQueue::Io);
    soft.inject(endless.blocks(0..8).times(0))
        .expect("makes sense");

    let server = server_of(&namespace, Options::default());
    let (mut modest, _modest) = ready(&server).await;
    modest.read(4096, 512).await.bytes();
    let (mut greedy, serving) = ready(&server).await;
    let before = soft.counters().commands;
    for _ in 0..3 * DEPTH {
        greedy.send(READ, 0, 0, 4096, b"").await;
    }
    let share = u64::from(DEPTH / 2);
    let room_for_others = async {
        while soft.counters().commands - before < share {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for _ in 0..100 {
            modest.read(4096, 512).await.bytes();
        }
    };
    timeout(Duration::from_secs(60), room_for_others)
        .await
        .expect("it is not behind what takes for ever");
    assert_eq!(soft.counters().commands - before, share + 100);

    soft.clear_faults();
    soft.release_stuck();
    for _ in 0..3 * DEPTH {
        greedy.reply().await.1.bytes();
    }
    drop(modest);
    drop(greedy);
    serving.await.expect("it ends");
    drop(namespace);
    controller.shutdown().await.expect("shuts down");
}

/// A server of few places, at a TCP address.
#[tokio::test]
async fn connections_have_a_limit() {
    let namespace = open("mem:?size=1M").await;
    let mut options = Options::default();
    options.max_connections = 2;
    let server = server_of(&namespace, options);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(async move {
        server
            .run(listener.into(), async { drop(stopped.await) })
            .await
    });
    let connect = || async { Client::new(TcpStream::connect(address).await.expect("connected")) };
    let mut first = connect().await.go("disk").await;
    let second = connect().await.go("").await;
    connect().await.is_over().await;
    drop(second);
    // Its place is free once the server has noticed.
    let mut third = loop {
        let mut client = connect().await;
        if client.greet(3).await.is_ok() {
            break client.go_on("disk").await;
        }
    };
    for client in [&mut first, &mut third] {
        assert_eq!(client.write(0, &[9; 512]).await, Reply::Done);
    }
    drop(stop);
    first.is_over().await;
    third.is_over().await;
    serving.await.expect("no panic").expect("it ends");
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn no_plain_text_where_others_can_listen() {
    let namespace = open("mem:?size=1M").await;
    for (allow, address) in [(false, "0.0.0.0:0"), (false, "[::]:0"), (true, "0.0.0.0:0")] {
        let mut options = Options::default();
        options.allow_plaintext = allow;
        let server = server_of(&namespace, options);
        // Not every machine has the newer protocol.
        let Ok(listener) = TcpListener::bind(address).await else {
            assert_eq!(address, "[::]:0");
            continue;
        };
        let served = server.run(listener.into(), async {}).await;
        assert_eq!(served.is_ok(), allow, "{address}: {served:?}");
    }
}

#[tokio::test]
async fn a_refused_write_is_skipped_whole() {
    let namespace = open("mem:?size=1M").await;
    let server = server_of(&namespace, Options::default());
    let (mut client, _serving) = connect(&server);
    client.greet(3).await.expect("greeted");
    let mut client = client.go_on("disk").await;
    // Its data looks like requests.
    let request = request(WRITE_ZEROES, 0, 1, 0, 512);
    let data: Vec<_> = request.iter().copied().cycle().take(256 << 10).collect();
    namespace.write(0, vec![5; 512]).await.expect("written");
    assert_eq!(client.write(1, &data).await.errno(), EINVAL);
    assert_eq!(client.read(0, 512).await.bytes(), [5; 512]);
}
