//! `nvme-async serve`: what this process has, for other processes.

mod nbd;
mod range;
mod vfio_user;
mod vhost_user_blk;

use std::fmt;
use std::io::{self, Write as _};

use clap::{Args, Subcommand};
use nvme_async::OpenOptions;
use nvme_export::ExportError;
use nvme_vfio_user::Socket;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::net::UnixListener;

use crate::failure::Failure;

/// Most queue pairs that are asked for. Each has some memory and an interrupt.
const MAX_QUEUE_PAIRS: u16 = 64;

/// Serves to other processes, until SIGTERM or SIGINT.
#[derive(Args, Clone, Debug)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    protocol: Protocol,
}

#[derive(Clone, Debug, Subcommand)]
enum Protocol {
    Nbd(nbd::Arguments),
    VfioUser(vfio_user::Arguments),
    VhostUserBlk(vhost_user_blk::Arguments),
}

/// Runs `serve`.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    allow_many_files();
    match &arguments.protocol {
        Protocol::Nbd(arguments) => nbd::run(arguments),
        Protocol::VfioUser(arguments) => vfio_user::run(arguments),
        Protocol::VhostUserBlk(arguments) => vhost_user_blk::run(arguments),
    }
}

/// How a controller is opened that so many clients share, each with a queue pair of its own as far as there are
/// enough.
fn options_for(clients: usize) -> OpenOptions {
    let queues = clients.min(MAX_QUEUE_PAIRS.into()) as u16;
    OpenOptions::new().queues(queues).local_queues(0)
}

/// Says where it can be reached from now on.
fn announce(url: &str, at: impl fmt::Display) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "serving {url} at {at}")?;
    stdout.flush()?;
    Ok(())
}

/// What accepts connections to a socket, by the runtime that this is called in.
fn listener(socket: &Socket) -> io::Result<UnixListener> {
    let listener = socket.listener().try_clone()?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// A client's memory may be many files, each of which is open here.
fn allow_many_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the number of open files stays as it is");
    }
}

impl From<ExportError> for Failure {
    fn from(error: ExportError) -> Self {
        Self::Request(error.into())
    }
}
