//! A virtio block device for virtual machines, over vhost-user: a guest's disk that is an [`Export`].
//!
//! The front end, a VMM, shares the guest's memory and its virtqueues with a [`Device`], which is then what the guest's
//! requests reach: no VMM is on their way. The guest's memory is registered with the NVMe controller as a whole, so
//! that data goes between it and the device without a copy.
//!
//! With QEMU, whose guest memory is to be a sealed memfd (that it is shared is what vhost-user needs, sealed what this
//! server asks for, and memory-backend-memfd does by itself):
//!
//! ```text
//! nvme-async serve vhost-user-blk --socket /run/disk.sock nvme://0000:44:00.0/1
//!
//! qemu-system-x86_64 -m 4G -smp 4 \
//!     -object memory-backend-memfd,id=ram,size=4G,share=on -machine q35,memory-backend=ram \
//!     -chardev socket,id=disk,path=/run/disk.sock,reconnect=1 \
//!     -device vhost-user-blk-pci,chardev=disk,num-queues=4 ...
//! ```
//!
//! `reconnect=1` (`reconnect-ms=1000` from QEMU 9.2 on) lets the guest go on when the server was restarted, or killed:
//! what was in flight is done again. QEMU's own complaints meanwhile ("ring restore failed", "Unexpected end-of-file")
//! are about the connection that it has lost. Several disks of one namespace are `--disk
//! socket=PATH,range=OFFSET+SIZE`, as often as wanted.
//!
//! # User-mode Linux
//!
//! Its virtio_uml, for which a disk is device 2, shares memory in a file that is not sealed, so it has to be trusted:
//!
//! ```text
//! nvme-async serve vhost-user-blk --trust-client --socket /run/disk.sock file:disk.img
//!
//! linux.uml mem=1G virtio_uml.device=/run/disk.sock:2 ...
//! ```
//!
//! It has one processor, and so uses one queue. It does not connect again: when the server ends, what is in flight never
//! completes, and the guest hangs. Tried with Debian's package of Linux 6.1, where virtio_blk is a module. It needs what
//! QEMU does not: interrupts by a socket, a socket for requests of this side's even if there are none, and a table of
//! memory that may be longer than what is in it.
//!
//! # What is offered
//!
//! Virtio 1.2, section 5.2: reads, writes, flushes, Discard, Write Zeroes and the identifier, with several queues, indirect
//! descriptors, event indices, a write cache that the driver can switch off, and a read-only mode. Of the vhost-user
//! protocol: configuration, several queues, regions of memory that come and go, a reset of the device, acknowledgements,
//! and the tracking of requests in flight; a socket for requests of the back end is taken, and none are made. Not there:
//! a vIOMMU (VIRTIO_F_ACCESS_PLATFORM), packed virtqueues, live migration, and the status messages, which the crate
//! `vhost` does not know: a guest that resets its device stops its queues, which is enough.
//!
//! # What a guest can do
//!
//! Whatever it likes with its own disk. Every descriptor is checked: a request that makes no sense gets an error, and a
//! queue that is broken stops, with a reason in the log, and nobody else notices. How many requests are in flight is
//! bounded by the queues, and where guests share a queue pair of the controller by a [fair share](crate#several-at-one-controller).
//!
//! # What a front end can do
//!
//! Its messages and files are checked too; one that can't be followed ends the connection, with a reason in the log.
//! Memory that it could take away by making its file shorter, which would end
//! this process by SIGBUS, is refused unless [`Options::trust_client`] is set: a file has to be sealed (F_SEAL_SHRINK),
//! and not be of huge pages. An eventfd that it makes blocking again and fills holds up a worker of the runtime until the
//! connection ends. Since a VMM has the same owner as the socket, it could as well kill the server.
//!
//! # Durability
//!
//! A flush of the guest's is one of the namespace. Where the guest has switched the write cache off (VIRTIO_BLK_F_CONFIG_WCE),
//! or knows no flushes, each write is durable when it is done. A server that starts anew has the cache switched on, and
//! relies on the guest to say so again.
//!
//! A write may be repeated: after a reset of the controller, or when it was in flight as the server ended. To the guest it
//! is under way until it is told that it is done.

mod chain;
mod config;
mod device;
mod eventfd;
mod inflight;
mod mapping;
mod memory;
mod padded;
mod queue;
mod request;
mod ring;
mod server;
mod session;
mod vring;
mod window;

#[cfg(doc)]
use crate::Export;

pub use self::device::{Device, Options};

/// The most queues that a front end may have.
pub const MAX_QUEUES: u16 = 256;
/// The most descriptors of a queue, which bounds the requests in flight.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// The most regions of guest memory.
pub const MAX_REGIONS: usize = 256;
