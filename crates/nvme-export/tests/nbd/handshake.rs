//! From the greeting to the first request.

use std::time::Duration;

use nvme_export::Export;
use nvme_export::nbd::{Options, Server, ServerError};
use tokio::io::AsyncWriteExt;

use crate::client::{
    ABORT, ACK, Client, ERR_POLICY, ERR_UNKNOWN, ERR_UNSUP, GO, INFO, LIST, READ, REP_INFO, SERVER,
    STARTTLS, info, string,
};
use crate::{connect, open, ready, server_of};

#[tokio::test]
async fn the_old_way() {
    let server = server_of(&open("mem:?size=1M").await, Options::default());
    for (flags, name, zeroes) in [(0, "", 124), (1, "disk", 124), (3, "", 0)] {
        let (mut client, serving) = connect(&server);
        client.greet(flags).await.expect("greeted");
        // Flags, flush, FUA, trim, write zeroes, several connections, cache.
        assert_eq!(client.export_name(name).await, (1 << 20, 0x056d));
        assert_eq!(client.take(zeroes).await, vec![0; zeroes]);
        assert_eq!(client.read(0, 512).await.bytes(), [0; 512]);
        drop(client);
        serving.await.expect("it ends");
    }
}

#[tokio::test]
async fn options_and_what_they_tell() {
    let namespace = open("mem:?size=1M&lba=4096").await;
    let all = Export::new(namespace.clone()).expect("it is usable");
    let part = Export::of_range(namespace, 4096..12288).expect("inside");
    let exports = vec![
        ("all".to_owned(), all),
        ("a part".to_owned(), part.read_only()),
    ];
    let server = Server::new(exports, Options::default()).expect("fine");
    let (mut client, serving) = connect(&server);
    client.greet(3).await.expect("greeted");
    assert_eq!(
        client.option(LIST, b"").await,
        [
            (SERVER, string("all")),
            (SERVER, string("a part")),
            (ACK, Vec::new())
        ]
    );
    assert_eq!(
        client.option(INFO, &info("a part")).await,
        [
            (REP_INFO, b"\0\0\0\0\0\0\0\0\x20\0\x05\x0f".to_vec()),
            (REP_INFO, b"\0\x01a part".to_vec()),
            (REP_INFO, b"\0\x03\0\0\x10\0\0\0\x10\0\x02\0\0\0".to_vec()),
            (ACK, Vec::new())
        ]
    );
    assert_eq!(client.outcome(77, b"what").await, ERR_UNSUP);
    assert_eq!(client.outcome(STARTTLS, b"").await, ERR_POLICY);
    assert_eq!(client.outcome(GO, &info("b")).await, ERR_UNKNOWN);
    assert_eq!(client.outcome(ABORT, b"").await, ACK);
    client.is_over().await;
    serving.await.expect("it ends");
}

#[tokio::test]
async fn nonsense_ends_the_connection() {
    let server = server_of(&open("mem:?size=1M").await, Options::default());
    let start = |option: u32, len: u32| {
        let mut bytes = b"\0\0\0\x03IHAVEOPT".to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes
    };
    for nonsense in [
        b"\x80\0\0\x03".to_vec(),
        b"\0\0\0\x03IHAVEOPS\0\0\0\x01\0\0\0\0".to_vec(),
        // There is no such export, and no other answer.
        [start(1, 2), b"no".to_vec()].concat(),
        // No option has so much data.
        start(GO, 64 << 10 | 1),
        start(99, u32::MAX),
    ] {
        let (mut client, serving) = connect(&server);
        let greeting = client.take(18).await;
        assert_eq!(&greeting[..8], b"NBDMAGIC");
        client.stream.write_all(&nonsense).await.expect("sent");
        client.is_over().await;
        serving.await.expect("it ends");
    }
    // Requests too.
    for nonsense in [[0x25; 28], [0; 28]] {
        let (mut client, serving) = ready(&server).await;
        client.stream.write_all(&nonsense).await.expect("sent");
        client.is_over().await;
        serving.await.expect("it ends");
    }
    // Nobody else has noticed.
    let (mut client, _serving) = ready(&server).await;
    assert_eq!(client.read(0, 512).await.bytes(), [0; 512]);
}

#[tokio::test]
async fn a_client_that_dawdles_is_sent_away() {
    let mut options = Options::default();
    options.handshake_timeout = Duration::from_millis(20);
    let server = server_of(&open("mem:?size=1M").await, options);
    for said in [
        &b""[..],
        b"\0\0",
        b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x20half",
    ] {
        let (mut client, serving) = connect(&server);
        client.take(18).await;
        client.stream.write_all(said).await.expect("sent");
        client.is_over().await;
        serving.await.expect("it ends");
    }
}

#[tokio::test]
async fn a_client_that_is_ready_may_dawdle() {
    let mut options = Options::default();
    options.handshake_timeout = Duration::from_secs(3600);
    let server = server_of(&open("mem:?size=1M").await, options);
    let (mut client, _serving) = ready(&server).await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(7200)).await;
    tokio::time::resume();
    assert_eq!(client.ask(READ, 0, 0, 512, b"").await.bytes(), [0; 512]);
}

#[tokio::test]
async fn what_can_not_be_a_server() {
    let namespace = open("mem:?size=1M").await;
    let new = |names: &[&str], options: Options| {
        let export = |name: &&str| {
            let export = Export::new(namespace.clone()).expect("it is usable");
            ((*name).to_owned(), export)
        };
        let exports = names.iter().map(export).collect();
        Server::new(exports, options).expect_err("it can't be")
    };
    assert_eq!(new(&[], Options::default()), ServerError::NoExports);
    assert_eq!(
        new(&["a", "b", "a"], Options::default()),
        ServerError::SameName("a".to_owned())
    );
    for len in [0, 4097] {
        let name = "n".repeat(len);
        let error = new(&[&name], Options::default());
        assert_eq!(error, ServerError::NameLength(len));
    }
    let mut small = Options::default();
    small.max_request = 65_535;
    assert!(matches!(new(&["a"], small), ServerError::Limit(_)));
    let mut none = Options::default();
    none.max_connections = 0;
    assert!(matches!(new(&["a"], none), ServerError::Limit(_)));
}

#[tokio::test]
async fn names_of_any_kind() {
    let export = Export::new(open("mem:?size=1M").await).expect("it is usable");
    let name = "ö".repeat(2048);
    let exports = vec![(name.clone(), export)];
    let server = Server::new(exports, Options::default()).expect("fine");
    let (client, _serving) = connect(&server);
    let mut client: Client = client.go(&name).await;
    assert_eq!(client.read(0, 512).await.bytes(), [0; 512]);
}
