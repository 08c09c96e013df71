//! Reads into and writes from memory of the pool allocate nothing, and reads that make their memory
//! one thing: the `Bytes`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use nvme_async::{Controller, DmaBuf, OpenOptions};
use tokio::runtime::{Builder, LocalOptions};

struct Counting;

thread_local! {
    /// Of this thread: the software controller has threads of its own.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is left to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const REQUESTS: u64 = 200;
/// Without a PRP list, and with one.
const SIZES: [usize; 2] = [4096, 64 << 10];

async fn open() -> Controller {
    let options = OpenOptions::new().url("mem:?size=1M");
    let controller = options.queues(1).local_queues(1).open_controller();
    controller.await.expect("the software controller comes up")
}

/// How many allocations this thread makes for each of some requests, once there were some.
async fn allocations(mut request: impl AsyncFnMut()) -> f64 {
    for _ in 0..REQUESTS {
        request().await;
    }
    let before = ALLOCATIONS.get();
    for _ in 0..REQUESTS {
        request().await;
    }
    (ALLOCATIONS.get() - before) as f64 / REQUESTS as f64
}

macro_rules! check {
    ($namespace:expr) => {
        let namespace = $namespace;
        for size in SIZES {
            let mut buffer = namespace.allocate(size).expect("a buffer");
            let reads = allocations(async || {
                let read = namespace.read_into(0, take(&mut buffer)).await;
                buffer = read.expect("the read succeeds");
            });
            assert_eq!(reads.await, 0.0, "reads into a buffer of {size} bytes");
            let writes = allocations(async || {
                let write = namespace.write(0, take(&mut buffer)).await;
                buffer = write.expect("the write succeeds");
            });
            assert_eq!(writes.await, 0.0, "writes of a buffer of {size} bytes");
            let reads = allocations(async || {
                let bytes = namespace.read(0, size).await.expect("the read succeeds");
                assert_eq!(bytes.len(), size);
            });
            assert_eq!(reads.await, 1.0, "reads of {size} bytes");
        }
    };
}

fn take(buffer: &mut DmaBuf) -> DmaBuf {
    std::mem::replace(buffer, DmaBuf::heap(0))
}

#[test]
fn of_a_namespace() {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let controller = open().await;
        check!(controller.namespace(1).await.expect("there is one"));
    });
}

#[test]
fn of_a_local_namespace() {
    let mut builder = Builder::new_current_thread();
    let runtime = builder.enable_all().build_local(LocalOptions::default());
    runtime.expect("a runtime").block_on(async {
        let controller = open().await;
        let namespace = controller.namespace(1).await.expect("there is one");
        check!(namespace.local().expect("there is a queue pair"));
    });
}
