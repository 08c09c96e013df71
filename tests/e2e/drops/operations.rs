//! Every operation of the public interface that is awaited.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use nvme_async::{CommandData, Completion, DmaBuf, Error, IoError, Namespace, QueuePair, Zeroes};
use nvme_soft::fault::FaultQueue;
use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::log::id;
use nvme_spec::{Sqe, admin, nvm};

use super::bed::{BLOCK, CHANGED, Case, Handle, NEW, OLD, SOURCE};
use crate::support::suite::target::How;

pub(super) type Started<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + 'a>>;

/// Something that can be awaited.
pub(super) struct Operation<T> {
    pub(super) name: &'static str,
    /// The queue of its commands.
    pub(super) queue: FaultQueue,
    /// What it may put into [`CHANGED`].
    pub(super) new: Option<u8>,
    pub(super) start: for<'a> fn(&'a Case<T>) -> Started<'a>,
}

fn io<T>(
    name: &'static str,
    new: Option<u8>,
    start: for<'a> fn(&'a Case<T>) -> Started<'a>,
) -> Operation<T> {
    Operation {
        name,
        queue: FaultQueue::Io,
        new,
        start,
    }
}

fn admin<T>(name: &'static str, start: for<'a> fn(&'a Case<T>) -> Started<'a>) -> Operation<T> {
    Operation {
        name,
        queue: FaultQueue::Admin,
        new: None,
        start,
    }
}

/// Pages that are mapped for one command, and blocks that take several commands.
const LARGE: usize = 64 << 10;
const ALL: usize = CHANGED.end as usize;

/// Those of a namespace.
pub(super) fn of_a_namespace<T: Handle>() -> Vec<Operation<T>> {
    vec![
        io("read", None, |case| {
            Box::pin(async { case.target.read(0, 4096).await.map(drop) })
        }),
        io("read, split", None, |case| {
            Box::pin(async { case.target.read(0, ALL).await.map(drop) })
        }),
        io("read_into", None, |case| {
            Box::pin(async {
                let buffer = case.target.allocate(4096);
                done(case.target.read_into(0, buffer).await)
            })
        }),
        io("read_into, registered", None, |case| {
            Box::pin(async {
                let memory = case.ledger.registered(8192);
                let registration = case.rig.controller().register(memory).await?;
                let slice = registration.slice(512, 4096).expect("fits");
                done(case.target.read_into(0, slice).await)
            })
        }),
        io("write", Some(NEW), |case| {
            Box::pin(async {
                let buffer = case.ledger.bytes(4096, NEW);
                done(case.target.send(0, buffer, How::Plain).await)
            })
        }),
        io("write, mapped", Some(NEW), |case| {
            Box::pin(async {
                let buffer = case.ledger.bytes(LARGE, NEW);
                done(case.target.send(0, buffer, How::Fua).await)
            })
        }),
        io("write, split", Some(NEW), |case| {
            Box::pin(async {
                let buffer = case.ledger.bytes(ALL, NEW);
                done(case.target.send(0, buffer, How::Plain).await)
            })
        }),
        io("write, in pieces", Some(NEW), |case| {
            Box::pin(async {
                let piece = || case.ledger.bytes(1000, NEW);
                let pieces = vec![piece(), piece(), piece().slice(..560)];
                done(case.target.send(0, pieces, How::Plain).await)
            })
        }),
        io("compare", None, |case| {
            Box::pin(async {
                let buffer = case.ledger.bytes(4096, OLD);
                done(case.target.send(0, buffer, How::Compare).await)
            })
        }),
        io("compare, split", None, |case| {
            Box::pin(async {
                let buffer = case.ledger.bytes(ALL, OLD);
                done(case.target.send(0, buffer, How::Compare).await)
            })
        }),
        io("verify", None, |case| {
            Box::pin(async { case.target.verify(0, CHANGED.end).await })
        }),
        io("copy", Some(SOURCE), |case| {
            Box::pin(async {
                let end = CHANGED.end + 32 * BLOCK as u64;
                let sources = [CHANGED.end..end, CHANGED.end..end];
                case.target.copy(&sources, 0).await
            })
        }),
        io("flush", Some(NEW), |case| {
            Box::pin(async {
                let buffer = case.ledger.bytes(512, NEW);
                drop(case.target.send(0, buffer, How::Plain).now_or_never());
                case.target.flush().await
            })
        }),
        io("write_zeroes", Some(0), |case| {
            Box::pin(async { case.target.write_zeroes(0, 8192, Zeroes::Allocated).await })
        }),
        io("discard", Some(0), |case| {
            Box::pin(async {
                let ranges: Vec<_> = (0..300)
                    .map(|n| n * 1024..n * 1024 + 512)
                    .take(200)
                    .collect();
                case.target.discard(&ranges).await
            })
        }),
        io("quiesce", Some(NEW), |case| {
            Box::pin(async {
                for offset in (0..8).map(|n| n * 512) {
                    let buffer = case.ledger.bytes(512, NEW);
                    drop(case.target.send(offset, buffer, How::Plain).now_or_never());
                }
                case.target.quiesce().await
            })
        }),
    ]
}

/// Those of a controller and its queue pairs.
pub(super) fn of_a_controller() -> Vec<Operation<Namespace>> {
    vec![
        admin("active_namespaces", |case| {
            Box::pin(async { case.rig.controller().active_namespaces().await.map(drop) })
        }),
        admin("namespace", |case| {
            Box::pin(async { case.rig.controller().namespace(1).await.map(drop) })
        }),
        admin("rescan", |case| {
            Box::pin(async { case.rig.controller().rescan().await })
        }),
        admin("smart_log", |case| {
            Box::pin(async { case.rig.controller().smart_log().await.map(drop) })
        }),
        admin("error_log", |case| {
            Box::pin(async { case.rig.controller().error_log().await.map(drop) })
        }),
        admin("firmware_log", |case| {
            Box::pin(async { case.rig.controller().firmware_log().await.map(drop) })
        }),
        admin("log_page", |case| {
            Box::pin(async {
                let controller = case.rig.controller();
                let page = controller.log_page(id::ERROR, admin::ALL_NAMESPACES, 100, 2000);
                page.await.map(drop)
            })
        }),
        admin("events", |case| {
            Box::pin(async {
                let mut events = case.rig.controller().events();
                let event = AsyncEvent::report(Event::PersistentInternalError);
                // One is lost with its log page if the controller is reset; and none comes any more
                // if it dies.
                loop {
                    case.rig.device.controller().raise_event(event);
                    let next = tokio::time::timeout(Duration::from_secs(1), events.next());
                    if next.await.is_ok() || case.is_over() {
                        return Ok(());
                    }
                }
            })
        }),
        io("register", None, |case| {
            Box::pin(async {
                let memory = case.ledger.registered(8192);
                case.rig.controller().register(memory).await.map(drop)
            })
        }),
        admin("submit, to the admin queue", |case| {
            Box::pin(async {
                let buffer = case.namespace.allocate(4096)?;
                let data = CommandData::FromDevice(buffer);
                let queue = case.rig.controller().admin_queue();
                submit(&queue, admin::identify_controller(), data).await?;
                Ok(())
            })
        }),
        io("submit, without data", None, |case| {
            Box::pin(async {
                submit(&io_queue(case), nvm::flush(1), CommandData::None).await?;
                Ok(())
            })
        }),
        io("submit, a read", None, |case| {
            Box::pin(async {
                let data = CommandData::FromDevice(case.namespace.allocate(4096)?);
                submit(&io_queue(case), nvm::read(1, 0, 8, false), data).await?;
                Ok(())
            })
        }),
        io("submit, a write", Some(NEW), |case| {
            Box::pin(async {
                let mut buffer = case.namespace.allocate(4096)?;
                buffer.fill(NEW);
                let data = CommandData::ToDevice(buffer);
                submit(&io_queue(case), nvm::write(1, 0, 8, false), data).await?;
                Ok(())
            })
        }),
    ]
}

fn done<B>(result: Result<B, IoError<B>>) -> Result<(), Error> {
    result.map(drop).map_err(Error::from)
}

fn io_queue(case: &Case<Namespace>) -> QueuePair {
    let first = case.rig.controller().io_queues().next();
    first.expect("there is one")
}

async fn submit(
    queue: &QueuePair,
    command: Sqe,
    data: CommandData,
) -> Result<Completion, IoError<DmaBuf>> {
    // SAFETY: the commands above transfer 4096 bytes in the direction that they say, or none, and
    // are no commands about queues or events.
    unsafe { queue.submit(command, data) }.await
}
