//! Ends of connections, and of the server.

use std::time::Duration;

use nvme_export::nbd::Options;
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;

use crate::client::{Client, DISC, READ, Reply, WRITE, request};
use crate::{open, open_with, pattern, ready, server_of};

#[tokio::test]
async fn who_leaves_in_the_middle_leaves_a_place() {
    let namespace = open("mem:?size=1M").await;
    let mut options = Options::default();
    options.max_connections = 1;
    let server = server_of(&namespace, options);
    let write = request(WRITE, 0, 1, 0, 4096);
    let half = [write.as_slice(), &[7; 2048]].concat();
    let whole = [write.as_slice(), &[8; 4096]].concat();
    let more = [whole.as_slice(), &request(READ, 0, 2, 0, 1 << 20)].concat();
    for (said, found) in [
        (&b""[..], 0),
        (&write[..10], 0),
        (&write, 0),
        (&half, 0),
        (&whole, 8),
        (&more, 8),
    ] {
        namespace.write(0, vec![0; 4096]).await.expect("written");
        let (mut client, serving) = ready(&server).await;
        client.stream.write_all(said).await.expect("sent");
        drop(client);
        serving.await.expect("it ends");
        // A write is executed whole or not at all.
        let data = namespace.read(0, 4096).await.expect("read");
        assert_eq!(data, vec![found; 4096]);
    }
}

#[tokio::test]
async fn what_is_under_way_at_the_goodbye_is_answered() {
    let faults = "[[fault]]\nwhen = { opcode = \"write\" }\nthen = { delay = \"20ms\" }\n";
    let (namespace, _directory) = open_with(faults).await;
    let server = server_of(&namespace, Options::default());
    let (mut client, serving) = ready(&server).await;
    let data = pattern(1, 512);
    let cookie = client.send(WRITE, 0, 0, 512, &data).await;
    client.send(DISC, 0, 0, 0, b"").await;
    // Nothing after it counts.
    client.send(WRITE, 0, 0, 512, &[0; 512]).await;
    assert_eq!(client.reply().await, (cookie, Reply::Done));
    client.is_over().await;
    serving.await.expect("it ends");
    assert_eq!(namespace.read(0, 512).await.expect("read"), data);
}

#[tokio::test]
async fn what_is_under_way_when_the_server_ends_is_answered() {
    let faults = "[[fault]]\nwhen = { opcode = \"write\" }\nthen = { delay = \"50ms\" }\n";
    let (namespace, _directory) = open_with(faults).await;
    let server = server_of(&namespace, Options::default());
    let (ours, theirs) = tokio::io::duplex(4096);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(async move {
        server.serve(theirs, async { drop(stopped.await) }).await;
    });
    let mut client = Client::new(ours).go("disk").await;
    let data = pattern(1, 512);
    // This one is answered after the server has received the write that is late.
    let late = client.send(WRITE, 0, 0, 512, &data).await;
    let read = client.send(READ, 0, 4096, 512, b"").await;
    assert_eq!(client.reply().await.0, read);
    drop(stop);
    assert_eq!(client.reply().await, (late, Reply::Done));
    client.is_over().await;
    serving.await.expect("it ends");
    assert_eq!(namespace.read(0, 512).await.expect("read"), data);
}

#[tokio::test]
async fn the_end_does_not_wait_for_those_who_take_nothing() {
    let namespace = open("mem:?size=1M").await;
    let data = pattern(1, 1 << 20);
    namespace.write(0, data).await.expect("written");
    let mut options = Options::default();
    options.drain_timeout = Duration::from_millis(20);
    let server = server_of(&namespace, options);
    let (ours, theirs) = tokio::io::duplex(4096);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(async move {
        server.serve(theirs, async { drop(stopped.await) }).await;
    });
    let mut client = Client::new(ours).go("disk").await;
    client.send(READ, 0, 0, 1 << 20, b"").await;
    // Its beginning is there, so the rest is waiting.
    client.take(28).await;
    drop(stop);
    serving.await.expect("it ends");
}

#[tokio::test]
async fn the_end_of_the_device_is_an_answer() {
    let namespace = open("mem:?size=1M").await;
    let server = server_of(&namespace, Options::default());
    let (mut client, _serving) = ready(&server).await;
    assert_eq!(client.read(0, 512).await.bytes(), [0; 512]);
    namespace.controller().shutdown().await.expect("shut down");
    assert_eq!(client.read(0, 512).await.errno(), 108);
    assert_eq!(client.write(0, &[0; 512]).await.errno(), 108);
}
