//! A durable key-value service on an NVMe namespace, for clients of Redis.
//!
//! ```text
//! cargo run --release --example kv -- [--device URL] [--listen 127.0.0.1:6380]
//! redis-cli -p 6380 set greeting hello
//! ```
//!
//! `README.md` beside this file says what it does and how fast. `store` is the storage engine, with the
//! format on the device and why a crash loses nothing; `server` speaks to clients.

mod server;
mod store;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Parser;
use nvme_async::OpenOptions;
use tokio::net::TcpListener;
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};

use crate::store::{Options, Store};

/// Serves keys and values from an NVMe namespace, durably, to clients of Redis.
#[derive(Debug, Parser)]
#[command(name = "kv")]
struct Arguments {
    /// The device: nvme://0000:44:00.0/1, file:PATH?size=1G (created if need be) or mem:?size=256M
    #[arg(long, value_name = "URL", default_value = "file:kv.img?size=1G")]
    device: String,
    /// Where to listen
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:6380")]
    listen: SocketAddr,
    #[command(flatten)]
    store: Options,
    /// Threads that serve; one polls the device when it has nothing else to do
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    threads: u16,
    #[command(flatten)]
    limits: server::Limits,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
    let arguments = Arguments::parse();
    let end = runtime(arguments.threads)
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(run(arguments)));
    match end {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What so many threads serve in.
fn runtime(threads: u16) -> io::Result<runtime::Runtime> {
    match threads {
        1 => nvme_async::runtime::Builder::new().build(),
        threads => runtime::Builder::new_multi_thread()
            .worker_threads(threads.into())
            .enable_all()
            .build(),
    }
}

/// Serves until SIGTERM or SIGINT, then finishes what was begun and takes a checkpoint.
async fn run(arguments: Arguments) -> Result<(), Box<dyn Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut stop = std::pin::pin!(async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    });
    let listener = TcpListener::bind(arguments.listen)
        .await
        .map_err(|error| format!("{}: {error}", arguments.listen))?;
    let open = async {
        let namespace = OpenOptions::new().url(&arguments.device).open().await?;
        Store::open(namespace, arguments.store).await
    };
    let store = tokio::select! {
        store = open => store.map_err(|error| format!("{}: {error}", arguments.device))?,
        // Recovery changes nothing that the next one would miss.
        () = &mut stop => return Ok(()),
    };
    let address = listener.local_addr()?;
    tracing::info!(
        device = arguments.device,
        "ready to accept connections on {address}"
    );

    server::serve(store.clone(), listener, arguments.limits, stop).await?;
    store.close().await?;
    store.namespace().controller().shutdown().await?;
    tracing::info!("closed");
    Ok(())
}
