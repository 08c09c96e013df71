//! The program that uses the device: what the script says, with an end to everything.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use nvme_async::{
    Controller, DmaBuf, Error, LocalNamespace, Namespace, OpenOptions, PollMode, Zeroes,
};
use tokio::runtime::Builder;
use tokio::task::LocalSet;
use tokio::time::timeout;

use crate::clock;
use crate::device::FuzzDevice;
use crate::script::{Ending, Memory, Opening, Operation, Script, Step};

/// How long a command may take, in virtual time like all of them.
const COMMAND: Duration = Duration::from_millis(20);
/// Nothing takes as long: operations wait for recoveries, and those, several times, and shutting down
/// for what CAP.TO, CRTO and RTD3E say, up to nine hours.
const PATIENCE: Duration = Duration::from_secs(1000 * 3600);
/// Operations of one program.
const MOST_STEPS: usize = 64;

/// Runs the script to its end; returns what became of the operations that were waited for, or why there
/// are none.
///
/// # Panics
///
/// If the driver does what it must not do: it panics, a future does not resolve, memory is still mapped
/// when the controller is closed, or the device is pointed to memory that is not mapped.
pub fn run(script: &Script) -> Outcome {
    // There is one clock.
    static RUNNING: Mutex<()> = Mutex::new(());
    let _running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    clock::start();
    let (device, remains) = FuzzDevice::new(script);
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let set = LocalSet::new();
    let opening = script.opening.clone();
    let (controller, outcome) = set.block_on(&runtime, use_it(script, device));
    match opening.ending {
        Ending::DropRuntime => {
            clock::leave_to_others();
            drop((set, runtime));
        }
        Ending::Shutdown | Ending::Drop => {
            set.block_on(&runtime, async {
                if let (Some(controller), Ending::Shutdown) = (&controller, opening.ending) {
                    // Whether it succeeds is the device's choice.
                    let _ = resolves("shutdown", PATIENCE, controller.shutdown()).await;
                }
            });
            clock::leave_to_others();
            drop((set, runtime));
        }
    }
    clock::leave_to_others();
    drop(controller);
    // A controller that was dropped is stopped by a thread. If it does not end, the run does not.
    assert_eq!(remains.wait(), 0, "memory is still mapped");
    outcome
}

/// What became of each operation, or why there was no namespace.
pub type Outcome = Result<Vec<Result<(), Error>>, Error>;

async fn use_it(script: &Script, device: Arc<FuzzDevice>) -> (Option<Controller>, Outcome) {
    let opened = options(&script.opening).attach(device);
    let controller = match resolves("open", PATIENCE, opened).await {
        Ok(controller) => controller,
        Err(error) => return (None, Err(error)),
    };
    let namespace = resolves("namespace", PATIENCE, controller.namespace(1)).await;
    let outcome = match namespace {
        Ok(namespace) => {
            derive(&controller, &namespace);
            Ok(take_all(script, &namespace).await)
        }
        Err(error) => Err(error),
    };
    (Some(controller), outcome)
}

async fn take_all(script: &Script, namespace: &Namespace) -> Vec<Result<(), Error>> {
    let local = match script.opening.local {
        true => namespace.local().ok(),
        false => None,
    };
    let mut left = MOST_STEPS;
    let mut results = Vec::new();
    for group in &script.program {
        let steps = &group[..group.len().min(left)];
        left -= steps.len();
        let steps = steps
            .iter()
            .map(|step| take(step, namespace, local.as_ref()));
        results.extend(join_all(steps).await.into_iter().flatten());
    }
    results
}

fn options(opening: &Opening) -> OpenOptions {
    OpenOptions::new()
        .isolate(!opening.shared_memory)
        .queues(u16::from(opening.queues % 3) + 1)
        .local_queues(opening.local.into())
        .queue_entries(u16::from(opening.entries % 15) + 2)
        .max_transfer(4096 << (opening.pages % 6))
        .pool_limit(8 << 20)
        .timeout(Some(COMMAND))
        .poll_mode(match opening.poll_mode % 3 {
            0 => PollMode::Interrupt,
            1 => PollMode::Adaptive,
            _ => PollMode::Busy,
        })
}

/// What the driver makes of what the device says.
fn derive(controller: &Controller, namespace: &Namespace) {
    let block = u64::from(namespace.block_size());
    assert!(block.is_power_of_two() && namespace.capacity().is_multiple_of(block));
    let limit = namespace.atomic_write_limit();
    assert!(limit >= block && limit.is_multiple_of(block));
    let _ = (controller.version(), controller.capabilities());
    assert!(!format!("{namespace:?}").is_empty());
}

async fn resolves<T>(what: &str, patience: Duration, future: impl Future<Output = T>) -> T {
    match timeout(patience, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what} does not resolve"),
    }
}

/// Takes a step. Its future is dropped after so many polls, or else resolves, to what is returned.
async fn take(
    step: &Step,
    namespace: &Namespace,
    local: Option<&LocalNamespace>,
) -> Option<Result<(), Error>> {
    let name = format!("{:?}", step.operation);
    let mut operation = pin!(async {
        let handle = local.map_or(Handle::Shared(namespace), Handle::Local);
        operate(&step.operation, namespace, &handle).await
    });
    let mut polls = step.polls;
    let steps = poll_fn(|cx| match &mut polls {
        Some(0) => Poll::Ready(None),
        Some(left) => {
            *left -= 1;
            operation.as_mut().poll(cx).map(Some)
        }
        None => operation.as_mut().poll(cx).map(Some),
    });
    resolves(&name, PATIENCE, steps).await
}

/// A namespace, by one of its handles.
enum Handle<'a> {
    Shared(&'a Namespace),
    Local(&'a LocalNamespace),
}

/// Does the same by either handle.
macro_rules! by {
    ($handle:expr, |$namespace:ident| $operation:expr) => {
        match $handle {
            Handle::Shared($namespace) => $operation,
            Handle::Local($namespace) => $operation,
        }
    };
}

/// Does the same with the kind of memory that is wanted, and checks that it comes back.
macro_rules! with {
    ($memory:expr, $shared:expr, $len:expr, |$buffer:ident| $operation:expr) => {{
        let len: usize = $len;
        let of_pool = |len| $shared.allocate(len).unwrap_or_else(|_| DmaBuf::heap(len));
        match $memory {
            Memory::Pool => {
                let $buffer = of_pool(len);
                assert_eq!($operation.await?.len(), len);
            }
            Memory::Heap => {
                let $buffer = DmaBuf::heap(len);
                assert_eq!($operation.await?.len(), len);
            }
            Memory::Many => {
                let $buffer = vec![of_pool(len - len / 2), of_pool(len / 2)];
                assert_eq!($operation.await?.len(), 2);
            }
        }
    }};
}

/// Does what the step says. Which errors there are is the device's choice.
async fn operate(
    operation: &Operation,
    shared: &Namespace,
    handle: &Handle<'_>,
) -> Result<(), Error> {
    let block = u64::from(shared.block_size());
    let at = |block_number: u8| u64::from(block_number) * block;
    let len = |blocks: u8| (u64::from(blocks % 16) + 1) * block;
    let range = |&(start, blocks): &(u8, u8)| at(start)..at(start) + len(blocks);
    match *operation {
        Operation::Read(start, blocks) => {
            let len = len(blocks) as usize;
            let read = by!(handle, |namespace| namespace.read(at(start), len).await?);
            assert_eq!(read.len(), len);
        }
        Operation::ReadInto(memory, start, blocks) => {
            let len = len(blocks) as usize;
            by!(handle, |namespace| with!(memory, shared, len, |buffer| {
                namespace.read_into(at(start), buffer)
            }));
        }
        Operation::Write(memory, fua, start, blocks) => {
            let len = len(blocks) as usize;
            by!(handle, |namespace| with!(memory, shared, len, |buffer| {
                let write = namespace.write(at(start), buffer);
                if fua { write.fua() } else { write }
            }));
        }
        Operation::WriteBytes(start, blocks) => {
            // As much as is mapped where it is, if the device may see it.
            let bytes = Bytes::from(vec![0x5a; (usize::from(blocks) + 1) * block as usize]);
            by!(handle, |namespace| namespace
                .write(at(start), bytes)
                .await?);
        }
        Operation::Compare(memory, start, blocks) => {
            let len = len(blocks) as usize;
            by!(handle, |namespace| with!(memory, shared, len, |buffer| {
                namespace.compare(at(start), buffer)
            }));
        }
        Operation::Flush => by!(handle, |namespace| namespace.flush().await?),
        Operation::WriteZeroes(start, blocks) => {
            let (start, len) = (at(start), len(blocks));
            let zeroes = Zeroes::MayDeallocate;
            by!(handle, |namespace| namespace
                .write_zeroes(start, len, zeroes)
                .await?);
        }
        Operation::Discard(ref ranges) => {
            let ranges: Vec<_> = ranges.iter().map(range).collect();
            by!(handle, |namespace| namespace.discard(&ranges).await?);
        }
        Operation::Verify(start, blocks) => {
            let (start, len) = (at(start), len(blocks));
            by!(handle, |namespace| namespace.verify(start, len).await?);
        }
        Operation::Copy(ref sources, to) => {
            let sources: Vec<_> = sources.iter().map(range).collect();
            by!(handle, |namespace| namespace.copy(&sources, at(to)).await?);
        }
        Operation::Quiesce => by!(handle, |namespace| namespace.quiesce().await?),
        Operation::Active => drop(shared.controller().active_namespaces().await?),
        Operation::Open(nsid) => drop(shared.controller().namespace(nsid).await?),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::slice;

    use super::*;
    use crate::script::{Completion, Move};

    /// One of each operation, by itself or all together.
    fn everything(together: bool) -> Vec<Vec<Step>> {
        let operations = [
            Operation::Write(Memory::Many, true, 0, 15),
            Operation::Write(Memory::Pool, false, 20, 3),
            Operation::WriteBytes(40, 255),
            Operation::Flush,
            Operation::Read(0, 15),
            Operation::ReadInto(Memory::Pool, 0, 0),
            Operation::ReadInto(Memory::Heap, 0, 5),
            Operation::ReadInto(Memory::Many, 100, 5),
            Operation::Compare(Memory::Heap, 0, 15),
            Operation::WriteZeroes(0, 15),
            Operation::Discard(vec![(0, 1), (9, 3)]),
            Operation::Verify(0, 15),
            Operation::Copy(vec![(0, 15), (100, 2), (60, 15)], 200),
            Operation::Quiesce,
            Operation::Active,
            Operation::Open(1),
        ];
        let steps = operations.map(|operation| Step {
            polls: None,
            operation,
        });
        if together {
            vec![steps.to_vec()]
        } else {
            steps
                .iter()
                .map(slice::from_ref)
                .map(<[_]>::to_vec)
                .collect()
        }
    }

    fn sound(opening: Opening, together: bool) -> Script {
        Script {
            opening,
            program: everything(together),
            ..Script::default()
        }
    }

    /// Else most of what is fuzzed would be how the driver gives up.
    #[test]
    fn a_device_without_moves_serves_everything() {
        for variant in 0..24 {
            let opening = Opening {
                shared_memory: variant & 1 != 0,
                local: variant & 2 != 0,
                poll_mode: variant >> 2,
                entries: variant,
                queues: variant,
                pages: variant,
                ending: [Ending::Shutdown, Ending::Drop, Ending::DropRuntime]
                    [usize::from(variant % 3)],
            };
            for together in [false, true] {
                let outcome = run(&sound(opening.clone(), together)).expect("comes up");
                assert_eq!(outcome.len(), 16);
                for (result, step) in outcome.iter().zip(everything(false).iter().flatten()) {
                    assert!(result.is_ok(), "{opening:?}, {step:?}: {result:?}");
                }
            }
        }
    }

    fn with_move(after: u8, scripted: Move) -> Outcome {
        // With one slot, which a lost command takes for good, nothing would follow it.
        let opening = Opening {
            entries: 8,
            ..Opening::default()
        };
        run(&Script {
            moves: vec![(after, scripted)],
            ..sound(opening, false)
        })
    }

    /// Commands of a bring-up up to the first one of the program.
    const BRING_UP: u8 = 14;

    #[test]
    fn moves_are_noticed() {
        let results = with_move(BRING_UP, Move::Withhold).expect("comes up");
        let timed_out = |result: &&Result<(), Error>| {
            matches!(result, Err(Error::TimedOut { .. } | Error::Split(_)))
        };
        // Others may be late too, where the driver's threads get little time.
        assert!(
            results.iter().any(|result| timed_out(&result)),
            "{results:?}"
        );

        let wrong = Completion {
            cid: 0x55,
            sq_id: 0,
            sq_head: 0,
            status: 0,
            result: 0,
            stale: false,
            times: 1,
            interrupt: true,
        };
        let results = with_move(BRING_UP, Move::Complete(wrong)).expect("comes up");
        assert!(results.iter().any(Result::is_err), "{results:?}");

        let outcome = with_move(0, Move::Status(0b10));
        assert!(outcome.is_ok(), "it is ready already: {outcome:?}");
        let outcome = with_move(3, Move::Vanish);
        assert!(outcome.is_err(), "{outcome:?}");
    }
}
