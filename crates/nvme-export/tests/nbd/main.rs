//! The NBD server, and a client that was written apart from it.

mod bounds;
mod client;
mod ending;
mod handshake;
mod tls;
mod transmission;

use std::future::pending;

use nvme_async::Namespace;
use nvme_export::Export;
use nvme_export::nbd::{Options, Server};
use tempfile::TempDir;
use tokio::io::DuplexStream;
use tokio::task::JoinHandle;

use client::Client;

/// What a stream holds that nobody has read.
const IN_BETWEEN: usize = 64 << 10;

async fn open(url: &str) -> Namespace {
    nvme_async::open(url).await.expect("opens")
}

/// A server of one export, called "disk".
fn server_of(namespace: &Namespace, options: Options) -> Server {
    let export = Export::new(namespace.clone()).expect("it is usable");
    Server::new(vec![("disk".to_owned(), export)], options).expect("it can be served")
}

/// A client that has connected and said nothing, and what serves it.
fn connect(server: &Server) -> (Client, JoinHandle<()>) {
    let (ours, theirs): (DuplexStream, _) = tokio::io::duplex(IN_BETWEEN);
    let server = server.clone();
    let serving = tokio::spawn(async move { server.serve(theirs, pending()).await });
    (Client::new(ours), serving)
}

/// A client that is ready for requests, and what serves it.
async fn ready(server: &Server) -> (Client, JoinHandle<()>) {
    let (client, serving) = connect(server);
    (client.go("disk").await, serving)
}

/// A software controller with faults.
async fn open_with(faults: &str) -> (Namespace, TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let plan = directory.path().join("plan.toml");
    std::fs::write(&plan, faults).expect("written");
    let url = format!("mem:?size=1M&faults={}", plan.display());
    (open(&url).await, directory)
}

/// Bytes that differ from place to place.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}
