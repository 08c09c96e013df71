//! Reads of 4 KiB on a model device: the program whose instructions `cargo xtask instructions` counts.
//!
//! It is what a user would write, one task for each read that is outstanding, in a Tokio runtime of
//! one thread. `instructions HANDLE DEPTH READS` makes so many reads in each task, by a
//! `LocalNamespace` (`local`) or a `Namespace` (`shared`). Without arguments, as cargo runs it, it only
//! shows that all cases work.

#[path = "instructions/admin.rs"]
mod admin;
#[path = "instructions/device.rs"]
mod device;
#[path = "instructions/memory.rs"]
mod memory;

use std::env;
use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use std::task::{Context, Poll};

use nvme_async::{Controller, LocalNamespace, Namespace, OpenOptions};
use tokio::runtime::{Builder, LocalOptions};

use crate::device::{BLOCK_SHIFT, BLOCKS, ModelDevice};

/// The size of a read.
const SIZE: usize = 4096;
/// The reads that there are room for.
const PLACES: u64 = (BLOCKS << BLOCK_SHIFT) / SIZE as u64;

fn main() -> ExitCode {
    // cargo has options of its own.
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments = arguments.iter().filter(|it| !it.starts_with("--"));
    let arguments: Vec<&str> = arguments.map(String::as_str).collect();
    match (&*arguments, numbers(&arguments)) {
        (["local", ..], Some((depth, reads))) => local(depth, reads),
        (["shared", ..], Some((depth, reads))) => shared(depth, reads),
        ([], _) => {
            for depth in [1, 32] {
                local(depth, 100);
                shared(depth, 100);
            }
        }
        _ => {
            eprintln!("usage: instructions [local|shared DEPTH READS]");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn numbers(arguments: &[&str]) -> Option<(usize, u64)> {
    match arguments {
        [_, depth, reads] => Some((depth.parse().ok()?, reads.parse().ok()?)),
        _ => None,
    }
}

fn local(depth: usize, reads: u64) {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())
        .expect("a runtime");
    runtime.block_on(async {
        let controller = open(depth).await;
        let namespace = controller.namespace(1).await.expect("there is one");
        let namespace = namespace.local().expect("there is a queue pair");
        let tasks: Vec<_> = (0..depth as u64)
            .map(|task| tokio::task::spawn_local(read_locally(namespace.clone(), task, reads)))
            .collect();
        for task in tasks {
            task.await.expect("the reads succeed");
        }
        drop(namespace);
        controller.shutdown().await.expect("shuts down");
    });
}

fn shared(depth: usize, reads: u64) {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let controller = open(depth).await;
        let namespace = controller.namespace(1).await.expect("there is one");
        let tasks: Vec<_> = (0..depth as u64)
            .map(|task| tokio::spawn(read(namespace.clone(), task, reads)))
            .collect();
        for task in tasks {
            task.await.expect("the reads succeed");
        }
        drop(namespace);
        controller.shutdown().await.expect("shuts down");
    });
}

async fn open(depth: usize) -> Controller {
    let device = ModelDevice::new(depth, 3).expect("eventfds");
    let options = OpenOptions::new().queues(1).local_queues(1);
    options.attach(device).await.expect("comes up")
}

async fn read_locally(namespace: LocalNamespace, task: u64, reads: u64) {
    let mut buffer = namespace.allocate(SIZE).expect("a buffer");
    for index in 0..reads {
        let read = Read::new(namespace.read_into(offset(task, index), buffer));
        buffer = read.await.expect("the read succeeds");
    }
}

async fn read(namespace: Namespace, task: u64, reads: u64) {
    let mut buffer = namespace.allocate(SIZE).expect("a buffer");
    for index in 0..reads {
        let read = Read::new(namespace.read_into(offset(task, index), buffer));
        buffer = read.await.expect("the read succeeds");
    }
}

/// Where a task's read is.
fn offset(task: u64, index: u64) -> u64 {
    (task * 1000 + index) % PLACES * SIZE as u64
}

/// A read whose first poll can be told from later ones in a profile: each is a function of its own.
struct Read<F> {
    future: F,
    was_polled: bool,
}

impl<F> Read<F> {
    fn new(future: F) -> Self {
        Self {
            future,
            was_polled: false,
        }
    }
}

impl<F: Future + Unpin> Future for Read<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.get_mut();
        match this.was_polled {
            false => submit(this, cx),
            true => resume(this, cx),
        }
    }
}

#[inline(never)]
fn submit<F: Future + Unpin>(read: &mut Read<F>, cx: &mut Context<'_>) -> Poll<F::Output> {
    // Also what keeps the two functions from being made one.
    read.was_polled = true;
    Pin::new(&mut read.future).poll(cx)
}

#[inline(never)]
fn resume<F: Future + Unpin>(read: &mut Read<F>, cx: &mut Context<'_>) -> Poll<F::Output> {
    Pin::new(&mut read.future).poll(cx)
}
