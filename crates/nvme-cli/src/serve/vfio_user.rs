//! `nvme-async serve vfio-user`: a software controller for other processes.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use nvme_async::device::soft;
use nvme_vfio_user::{BindError, Device, Doorbells, Options, Server, StartError};
use tokio::signal::unix::{SignalKind, signal};

use crate::block_on;
use crate::failure::Failure;

/// Serves a software controller as a PCI function, over the vfio-user protocol.
///
/// One client at a time: this project's driver, SPDK's, cloud-hypervisor, or QEMU from 10.1 on. Others wait.
#[derive(Args, Clone, Debug)]
pub(super) struct Arguments {
    /// The socket to make. Only its owner can connect to it; a socket that nobody serves is replaced.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// The software controller: file:disk.img?size=1G or mem:?size=256M.
    url: String,

    /// How clients ring doorbells.
    #[arg(long, value_enum, default_value_t = DoorbellsArgument::Trapped)]
    doorbells: DoorbellsArgument,

    /// Map memory that clients can take away, which then ends the server (SIGBUS). Without, it is read and
    /// written by system calls, which is slower. Sealed memory (F_SEAL_SHRINK) is mapped anyway.
    #[arg(long)]
    trust_client: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DoorbellsArgument {
    /// By messages, most of which Doorbell Buffer Config spares. An idle server takes no CPU time.
    Trapped,
    /// By stores to a page, which any driver can do. An idle server looks at it each millisecond.
    Mapped,
}

/// Runs `serve vfio-user`.
pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut options = Options::default();
    options.trust_client = arguments.trust_client;
    options.doorbells = match arguments.doorbells {
        DoorbellsArgument::Trapped => Doorbells::Trapped,
        DoorbellsArgument::Mapped => Doorbells::Mapped,
    };
    // Before files are made, for nothing if there is no socket.
    let server = Server::bind(&arguments.socket)?;
    let device = Device::new(soft::config(&arguments.url)?, &options)?;
    block_on(serve(server, device, arguments))
}

async fn serve(server: Server, device: Device, arguments: &Arguments) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    super::announce(&arguments.url, arguments.socket.display())?;
    let stopper = server.stopper();
    let mut serving = tokio::task::spawn_blocking(move || server.run(&device));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = &mut serving => return finish(ended),
    }
    stopper.stop();
    finish(serving.await)
}

fn finish(ended: Result<std::io::Result<()>, tokio::task::JoinError>) -> Result<(), Failure> {
    ended
        .map_err(|error| Failure::operation(format!("the server has ended: {error}")))?
        .map_err(Failure::from)
}

impl From<BindError> for Failure {
    fn from(error: BindError) -> Self {
        Self::Operation(error.into())
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        Self::Request(error.into())
    }
}
