//! `nvme-async serve vhost-user-blk`: a namespace, or parts of it, as disks of virtual machines.

use std::path::PathBuf;
use std::thread::available_parallelism;

use clap::Args;
use futures::future::try_join_all;
use nvme_async::Namespace;
use nvme_export::vhost_user_blk::{Device, MAX_QUEUES, Options};
use nvme_export::{Export, ExportError};
use nvme_vfio_user::Socket;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::range::ByteRange;
use crate::failure::Failure;
use crate::target::Target;

/// Serves a namespace to virtual machines, as virtio block devices over vhost-user.
///
/// Each disk has a socket of its own, and one front end at a time; others wait. With QEMU:
///
///   -object memory-backend-memfd,id=ram,size=4G,share=on -machine q35,memory-backend=ram
///   -chardev socket,id=disk,path=PATH,reconnect=1
///   -device vhost-user-blk-pci,chardev=disk
///
/// A server that was killed can be started again: the guest goes on.
#[derive(Args, Clone, Debug)]
#[command(verbatim_doc_comment)]
pub(super) struct Arguments {
    /// The socket to make. Only its owner can connect to it; a socket that nobody serves is replaced.
    #[arg(long, value_name = "PATH", required_unless_present = "disks")]
    socket: Option<PathBuf>,

    /// The namespace: nvme://0000:44:00.0/1, vfio-user:/run/nvme.sock, file:disk.img?size=1G or mem:?size=256M.
    url: String,

    /// The bytes that are the disk, such as 0+10G. Without, all of the namespace.
    #[arg(long, value_name = "OFFSET+SIZE", conflicts_with = "disks")]
    range: Option<ByteRange>,

    /// Refuse what would change data.
    #[arg(long, conflicts_with = "disks")]
    read_only: bool,

    /// One of several disks, in place of --socket, --range and --read-only:
    /// socket=PATH[,range=OFFSET+SIZE][,read-only]. A path with a comma is not possible here.
    #[arg(long = "disk", value_name = "DISK", value_parser = parse_disk, conflicts_with = "socket")]
    disks: Vec<Disk>,

    /// The most queues that a front end may use. QEMU wants one for each of the guest's processors. Each has a queue
    /// pair of the controller for itself; where there are not enough, or more than 64, some share one.
    #[arg(long, value_name = "N", default_value_t = Options::default().queues,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    queues: u16,

    /// Threads of the runtime. [default: one for each two processors]
    ///
    /// Each polls while it has requests, and needs a processor for it, as do the guests that make these.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,

    /// Map memory that front ends can take away, which then ends the server (SIGBUS). Without, guests are refused
    /// whose memory is not sealed (F_SEAL_SHRINK), or of huge pages.
    #[arg(long)]
    trust_client: bool,
}

/// What a socket serves.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Disk {
    socket: PathBuf,
    range: Option<ByteRange>,
    read_only: bool,
}

/// Runs `serve vhost-user-blk`.
pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let one = arguments.socket.clone().map(|socket| Disk {
        socket,
        range: arguments.range.clone(),
        read_only: arguments.read_only,
    });
    let disks: Vec<Disk> = one.into_iter().chain(arguments.disks.clone()).collect();
    // Before files are made, for nothing if there is no socket.
    let sockets = disks
        .iter()
        .map(|disk| Socket::bind(&disk.socket))
        .collect::<Result<Vec<_>, _>>()?;
    let workers = match arguments.workers {
        Some(workers) => workers.into(),
        None => default_workers(available_parallelism()?.get()),
    };
    Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()?
        .block_on(serve(arguments, disks, &sockets))
}

/// Half of the processors: with a worker on each, those that poll take turns with the guests, and pass the tasks
/// that poll to one another.
fn default_workers(processors: usize) -> usize {
    processors.div_ceil(2)
}

async fn serve(arguments: &Arguments, disks: Vec<Disk>, sockets: &[Socket]) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let queues = disks.len() * usize::from(arguments.queues);
    let target = Target::open(&arguments.url, super::options_for(queues)).await?;
    let devices = disks
        .iter()
        .map(|disk| device(arguments, disk, &target.namespace))
        .collect::<Result<Vec<_>, _>>();
    let devices = match devices {
        Ok(devices) => devices,
        Err(error) => {
            target.discard().await;
            return Err(error.into());
        }
    };
    let listeners = sockets
        .iter()
        .map(super::listener)
        .collect::<Result<Vec<_>, _>>()?;
    let (stop, _) = watch::channel(false);
    let serving = listeners
        .into_iter()
        .zip(devices)
        .map(|(listener, device)| {
            let mut stopped = stop.subscribe();
            tokio::spawn(async move {
                let stopped = async move {
                    let _ = stopped.wait_for(|stopped| *stopped).await;
                };
                device.run(listener, stopped).await;
            })
        });
    let mut serving = try_join_all(serving.collect::<Vec<_>>());
    for disk in &disks {
        super::announce(&arguments.url, disk.socket.display())?;
    }
    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = &mut serving => Some(ended),
    };
    stop.send_replace(true);
    let ended = match ended {
        Some(ended) => ended,
        None => serving.await,
    };
    ended.map_err(|error| Failure::operation(format!("the server has ended: {error}")))?;
    target.namespace.controller().shutdown().await?;
    Ok(())
}

fn device(
    arguments: &Arguments,
    disk: &Disk,
    namespace: &Namespace,
) -> Result<Device, ExportError> {
    let mut export = match &disk.range {
        Some(ByteRange(range)) => Export::of_range(namespace.clone(), range.clone())?,
        None => Export::new(namespace.clone())?,
    };
    if disk.read_only {
        export = export.read_only();
    }
    let mut options = Options::default();
    options.queues = arguments.queues;
    options.trust_client = arguments.trust_client;
    Ok(Device::new(export, &options))
}

fn parse_disk(text: &str) -> Result<Disk, String> {
    let (mut socket, mut range, mut read_only) = (None, None, false);
    for part in text.split(',') {
        let known = match part.split_once('=') {
            Some(("socket", path)) if !path.is_empty() => {
                socket.replace(PathBuf::from(path)).is_none()
            }
            Some(("range", given)) => range.replace(given.parse()?).is_none(),
            None if part == "read-only" => !std::mem::replace(&mut read_only, true),
            _ => false,
        };
        if !known {
            return Err(format!(
                "{part:?} is not known or there twice; expected socket=PATH[,range=OFFSET+SIZE][,read-only]"
            ));
        }
    }
    let socket = socket.ok_or_else(|| format!("{text:?} has no socket=PATH"))?;
    Ok(Disk {
        socket,
        range,
        read_only,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_leave_processors_to_guests() {
        let workers = [1, 2, 3, 8].map(default_workers);
        assert_eq!(workers, [1, 1, 2, 4]);
    }

    #[test]
    fn disks() {
        let disk = Disk {
            socket: PathBuf::from("a.sock"),
            range: Some(ByteRange(0..1024)),
            read_only: true,
        };
        assert_eq!(parse_disk("read-only,socket=a.sock,range=0+1K"), Ok(disk));
        for bad in [
            "",
            "socket=",
            "range=0+1K",
            "socket=a,socket=b",
            "socket=a,readonly",
            "socket=a,range=5",
            "socket=a,",
        ] {
            parse_disk(bad).expect_err(bad);
        }
    }
}
