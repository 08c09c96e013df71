//! Requests and replies.

use std::collections::HashMap;

use nvme_export::Export;
use nvme_export::nbd::{Options, Server};

use crate::client::{
    BLOCK_STATUS, CACHE, DF, EINVAL, EIO, ENOSPC, EPERM, FLUSH, FUA, READ, Reply, TRIM, WRITE,
    WRITE_ZEROES,
};
use crate::{connect, open, open_with, pattern, ready, server_of};

#[tokio::test]
async fn every_command() {
    let namespace = open("mem:?size=1M").await;
    let server = server_of(&namespace, Options::default());
    let (mut client, serving) = ready(&server).await;
    let data = pattern(1, 8192);
    assert_eq!(client.write(512, &data).await, Reply::Done);
    assert_eq!(namespace.read(512, 8192).await.expect("read"), data);
    assert_eq!(
        client.read(512, 8192).await,
        Reply::Data {
            offset: 512,
            data: data.clone()
        }
    );
    assert_eq!(client.ask(FLUSH, 0, 0, 0, b"").await, Reply::Done);
    assert_eq!(client.ask(CACHE, 0, 0, 4096, b"").await, Reply::Done);
    let extent = Reply::Extent {
        context: 1,
        len: 65536,
        flags: 0,
    };
    assert_eq!(client.ask(BLOCK_STATUS, 0, 0, 65536, b"").await, extent);

    let zeroed = client.ask(WRITE_ZEROES, 0, 1024, 1024, b"").await;
    assert_eq!(zeroed, Reply::Done);
    assert_eq!(
        client.read(1024, 1024).await,
        Reply::Hole {
            offset: 1024,
            len: 1024
        }
    );
    // A hole in data is data.
    let expected = [&data[..512], &[0; 1024], &data[1536..]].concat();
    for flags in [0, DF] {
        let read = client.ask(READ, flags, 512, 8192, b"").await;
        assert_eq!(read.bytes(), expected);
    }
    assert_eq!(client.ask(TRIM, FUA, 512, 8192, b"").await, Reply::Done);
    assert_eq!(client.read(512, 8192).await.bytes(), vec![0; 8192]);
    client.send(crate::client::DISC, 0, 0, 0, b"").await;
    client.is_over().await;
    serving.await.expect("it ends");
}

#[tokio::test]
async fn simple_replies() {
    let namespace = open("mem:?size=1M").await;
    let server = server_of(&namespace, Options::default());
    let (mut client, _serving) = connect(&server);
    client.greet(3).await.expect("greeted");
    client.export_name("disk").await;
    let data = pattern(2, 65536);
    assert_eq!(client.write(0, &data).await, Reply::Done);
    assert_eq!(client.read(0, 65536).await.bytes(), data);
    assert_eq!(client.read(65536, 512).await.bytes(), [0; 512]);
    assert_eq!(client.read(1, 512).await.errno(), EINVAL);
    let status = client.ask(BLOCK_STATUS, 0, 0, 512, b"").await;
    assert_eq!(status.errno(), EINVAL);
}

#[tokio::test]
async fn what_is_refused_changes_nothing() {
    let namespace = open("mem:?size=1M&lba=4096").await;
    let before = pattern(3, 1 << 20);
    namespace.write(0, before.clone()).await.expect("written");
    let server = server_of(&namespace, Options::default());
    let (mut client, _serving) = ready(&server).await;
    let end = 1 << 20;
    for (command, flags, offset, len, errno) in [
        (READ, 0, 512, 4096, EINVAL),
        (READ, 0, 0, 512, EINVAL),
        (READ, 0, end - 4096, 8192, EINVAL),
        (READ, 0, 0, 0, EINVAL),
        (READ, 8, 0, 4096, EINVAL),
        (WRITE, 0, 512, 4096, EINVAL),
        (WRITE, 0, 0, 100, EINVAL),
        (WRITE, 0, end, 4096, ENOSPC),
        (WRITE, 0, u64::MAX - 4095, 8192, ENOSPC),
        (WRITE, 2, 0, 4096, EINVAL),
        (WRITE, 0, 0, 0, EINVAL),
        (TRIM, 0, 0, 512, EINVAL),
        (WRITE_ZEROES, 0, 0, 2 << 20, ENOSPC),
        (WRITE_ZEROES, 16, 0, 4096, EINVAL),
        (FLUSH, 0, 4096, 0, EINVAL),
        (BLOCK_STATUS, 0, 0, 2 << 20, EINVAL),
        (99, 0, 0, 4096, EINVAL),
    ] {
        let payload = if command == WRITE { len } else { 0 };
        let data = vec![0xaa; payload as usize];
        let reply = client.ask(command, flags, offset, len, &data).await;
        let Reply::Error {
            errno: got,
            message,
            ..
        } = reply
        else {
            panic!("{command} {flags} {offset} {len}: {reply:?}");
        };
        assert_eq!(got, errno, "{command} {flags} {offset} {len}");
        assert!(!message.is_empty());
    }
    assert_eq!(client.read(0, 1 << 20).await.bytes(), before);
}

#[tokio::test]
async fn a_part_that_is_read_only() {
    let namespace = open("mem:?size=1M").await;
    let before = pattern(4, 1 << 20);
    namespace.write(0, before.clone()).await.expect("written");
    let export = Export::of_range(namespace.clone(), 4096..8192).expect("inside");
    let exports = vec![("disk".to_owned(), export.read_only())];
    let server = Server::new(exports, Options::default()).expect("fine");
    let (mut client, _serving) = ready(&server).await;
    assert_eq!(client.read(0, 4096).await.bytes(), before[4096..8192]);
    assert_eq!(client.read(4096, 512).await.errno(), EINVAL);
    assert_eq!(client.read(3584, 1024).await.errno(), EINVAL);
    assert_eq!(client.write(0, &[1; 512]).await.errno(), EPERM);
    for command in [TRIM, WRITE_ZEROES] {
        let reply = client.ask(command, 0, 0, 512, b"").await;
        assert_eq!(reply.errno(), EPERM);
    }
    assert_eq!(client.ask(FLUSH, 0, 0, 0, b"").await, Reply::Done);
    assert_eq!(namespace.read(0, 1 << 20).await.expect("read"), before);
}

#[tokio::test]
async fn a_part_that_is_written() {
    let namespace = open("mem:?size=1M").await;
    let mut model = pattern(5, 1 << 20);
    namespace.write(0, model.clone()).await.expect("written");
    let export = Export::of_range(namespace.clone(), 4096..12288).expect("inside");
    let exports = vec![("disk".to_owned(), export)];
    let server = Server::new(exports, Options::default()).expect("fine");
    let (mut client, _serving) = ready(&server).await;
    let data = pattern(6, 4096);
    assert_eq!(client.write(0, &data).await, Reply::Done);
    assert_eq!(client.write(8192, &data).await.errno(), ENOSPC);
    assert_eq!(client.write(4608, &data).await.errno(), ENOSPC);
    let zeroed = client.ask(WRITE_ZEROES, FUA, 7680, 512, b"").await;
    assert_eq!(zeroed, Reply::Done);
    assert_eq!(client.ask(TRIM, 0, 4096, 512, b"").await, Reply::Done);
    model[4096..8192].copy_from_slice(&data);
    model[8192..8704].fill(0);
    model[11776..12288].fill(0);
    assert_eq!(namespace.read(0, 1 << 20).await.expect("read"), model);
}

#[tokio::test]
async fn many_at_a_time() {
    let namespace = open("mem:?size=4M").await;
    let server = server_of(&namespace, Options::default());
    let (mut client, _serving) = ready(&server).await;
    const COUNT: u64 = 64;
    const LEN: usize = 4096;
    // More than fits in between are not sent before others were answered.
    for round in 0..8 {
        let mut under_way = HashMap::new();
        for number in 0..COUNT {
            let offset = (round * COUNT + number) * LEN as u64;
            let data = pattern(offset, LEN);
            let cookie = client.send(WRITE, 0, offset, LEN as u32, &data).await;
            under_way.insert(cookie, offset);
        }
        for _ in 0..COUNT {
            let (cookie, reply) = client.reply().await;
            assert!(under_way.remove(&cookie).is_some());
            assert_eq!(reply, Reply::Done);
        }
        for number in 0..COUNT {
            let offset = (round * COUNT + number) * LEN as u64;
            let cookie = client.send(READ, 0, offset, LEN as u32, b"").await;
            under_way.insert(cookie, offset);
        }
        for _ in 0..COUNT {
            let (cookie, reply) = client.reply().await;
            let offset = under_way.remove(&cookie).expect("it was asked for");
            assert_eq!(reply.bytes(), pattern(offset, LEN));
        }
    }
    let counters = namespace.controller().counters();
    assert_eq!(
        counters.bounced_bytes, 0,
        "nothing is copied for the device"
    );
}

#[tokio::test]
async fn whichever_is_ready_first_is_answered_first() {
    let faults = "[[fault]]\nwhen = { opcode = \"read\" }\nthen = { out-of-order = 1 }\n";
    let (namespace, _directory) = open_with(faults).await;
    let server = server_of(&namespace, Options::default());
    let (mut client, _serving) = ready(&server).await;
    let first = client.send(READ, 0, 0, 512, b"").await;
    let second = client.send(READ, 0, 4096, 512, b"").await;
    assert_eq!(client.reply().await.0, second);
    assert_eq!(client.reply().await.0, first);
}

#[tokio::test]
async fn errors_of_the_media_say_where() {
    let faults = "[[fault]]\n\
        when = { opcode = \"read\", lba = { start = 24, end = 25 }, times = \"always\" }\n\
        then = { status = { sct = 2, sc = 0x81, dnr = true } }\n\
        [[fault]]\n\
        when = { opcode = \"write\", lba = { start = 24, end = 25 }, times = \"always\" }\n\
        then = { status = { sc = 0x81, dnr = true } }\n";
    let (namespace, _directory) = open_with(faults).await;
    let export = Export::of_range(namespace, 4096..1 << 20).expect("inside");
    let exports = vec![("disk".to_owned(), export)];
    let server = Server::new(exports, Options::default()).expect("fine");
    let (mut client, _serving) = ready(&server).await;
    assert_eq!(
        client.read(8192, 4096).await,
        Reply::Error {
            errno: EIO,
            message: "Unrecovered Read Error".to_owned(),
            offset: Some(8192)
        }
    );
    assert_eq!(client.write(8192, &[1; 512]).await.errno(), ENOSPC);
    // The connection goes on.
    assert_eq!(client.read(0, 512).await.bytes(), [0; 512]);
    let (mut client, _serving) = connect(&server);
    client.greet(3).await.expect("greeted");
    client.export_name("").await;
    assert_eq!(client.read(8192, 4096).await.errno(), EIO);
    assert_eq!(client.read(0, 512).await.bytes(), [0; 512]);
}

/// What one connection has written is durable when another one has flushed, and what was written with FUA
/// at once.
#[tokio::test]
async fn a_flush_is_for_all_connections() {
    // The power fails when this block is read.
    let faults = "[[fault]]\n\
        when = { opcode = \"read\", lba = { start = 2000, end = 2001 } }\n\
        then = { power-loss = \"all\" }\n";
    let (namespace, _directory) = open_with(faults).await;
    let server = server_of(&namespace, Options::default());
    let (mut one, _one) = ready(&server).await;
    let (mut other, _other) = ready(&server).await;
    let data = pattern(7, 512);
    assert_eq!(one.write(0, &data).await, Reply::Done);
    assert_eq!(one.write(12288, &data).await, Reply::Done);
    assert_eq!(other.ask(FLUSH, 0, 0, 0, b"").await, Reply::Done);
    let zeroed = one.ask(WRITE_ZEROES, FUA, 12288, 512, b"").await;
    assert_eq!(zeroed, Reply::Done);
    assert_eq!(one.write(4096, &data).await, Reply::Done);
    let fua = one.ask(WRITE, FUA, 8192, 512, &data).await;
    assert_eq!(fua, Reply::Done);
    // The driver resets the controller and reads again.
    assert_eq!(other.read(2000 * 512, 512).await.bytes(), [0; 512]);
    assert_eq!(other.read(0, 512).await.bytes(), data);
    assert_eq!(other.read(8192, 512).await.bytes(), data);
    assert_eq!(other.read(12288, 512).await.bytes(), [0; 512]);
    // That it is lost is what shows that the others would have been.
    assert_eq!(other.read(4096, 512).await.bytes(), [0; 512]);
}
