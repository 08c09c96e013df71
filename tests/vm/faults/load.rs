//! Tasks that write and read back while something happens to the controller, and who know
//! afterwards what may be on the medium.

use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fastrand::Rng;
use nvme_async::{Error, Namespace};
use tokio::task::{JoinError, JoinSet};

/// How many tasks there are, each with one command outstanding.
pub(super) const DEPTH: u64 = 32;
/// Bytes of each operation: one command, so it is done whole or not at all.
pub(super) const LEN: usize = 4096;

/// Tasks at work on a namespace.
pub(super) struct Load {
    tasks: JoinSet<Task>,
    finished: Vec<Task>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    end: AtomicBool,
    /// Operations that have ended, in success or not.
    ended: AtomicU64,
}

/// What became of the load.
#[derive(Debug)]
pub(super) struct Outcome {
    tasks: Vec<Task>,
}

/// One task, the only one that writes its place.
#[derive(Debug)]
struct Task {
    place: u64,
    /// The last write that is known to be done, or, when nothing is known, the first one.
    certain: u64,
    /// Writes that failed in a way that may yet bring them to the medium, at any time.
    doubtful: Vec<u64>,
    last: u64,
    succeeded: u64,
    errors: Vec<Error>,
}

impl Load {
    /// Starts the tasks. They go on until they are told to end, or until they meet an error that
    /// `is_last` finds to be their last one.
    pub(super) async fn start(
        namespace: &Namespace,
        is_last: impl Fn(&Error) -> bool + Copy + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let mut tasks = JoinSet::new();
        for place in 0..DEPTH {
            let (namespace, shared) = (namespace.clone(), shared.clone());
            let mut task = Task::new(place);
            task.write_anew(&namespace).await;
            tasks.spawn(async move {
                while !shared.end.load(Ordering::Relaxed) {
                    let result = task.step(&namespace).await;
                    shared.ended.fetch_add(1, Ordering::Relaxed);
                    let Err(error) = result else {
                        task.succeeded += 1;
                        continue;
                    };
                    let last = is_last(&error);
                    task.errors.push(error);
                    if last {
                        break;
                    }
                    // What fails at once must not keep others from running.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                task
            });
        }
        Self {
            tasks,
            finished: Vec::new(),
            shared,
        }
    }

    /// Waits until so many more operations have ended, in success or not.
    pub(super) async fn reaches(&mut self, operations: u64) {
        let wanted = self.shared.ended.load(Ordering::Relaxed) + operations;
        while self.shared.ended.load(Ordering::Relaxed) < wanted {
            while let Some(joined) = self.tasks.try_join_next() {
                self.finished.push(task_of(joined));
            }
            assert!(!self.tasks.is_empty(), "every task has met its last error");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends the tasks.
    pub(super) async fn end(self) -> Outcome {
        self.shared.end.store(true, Ordering::Relaxed);
        self.join().await
    }

    /// Waits until each task has met its last error.
    pub(super) async fn join(mut self) -> Outcome {
        let mut tasks = self.finished;
        while let Some(joined) = self.tasks.join_next().await {
            tasks.push(task_of(joined));
        }
        tasks.sort_by_key(|task| task.place);
        Outcome { tasks }
    }
}

/// The task, unless it panicked: then so does the test.
fn task_of(joined: Result<Task, JoinError>) -> Task {
    joined.unwrap_or_else(|error| panic::resume_unwind(error.into_panic()))
}

impl Outcome {
    /// Everything that failed.
    pub(super) fn errors(&self) -> impl Iterator<Item = &Error> {
        self.tasks.iter().flat_map(|task| &task.errors)
    }

    /// What failed of one task.
    pub(super) fn errors_of(&self, task: u64) -> impl Iterator<Item = &Error> {
        let tasks = self.tasks.iter().filter(move |each| each.place == task);
        tasks.flat_map(|task| &task.errors)
    }

    /// Checks that nothing failed otherwise than so.
    pub(super) fn assert_errors(&self, are_expected: impl Fn(&Error) -> bool) {
        let others: Vec<&Error> = self.errors().filter(|error| !are_expected(error)).collect();
        assert!(others.is_empty(), "{others:#?}");
    }

    /// How many operations succeeded.
    pub(super) fn succeeded(&self) -> u64 {
        self.tasks.iter().map(|task| task.succeeded).sum()
    }

    /// Checks that the medium has what it must have, and that everything works again. Nothing of
    /// before may be outstanding any more.
    pub(super) async fn verify(&mut self, namespace: &Namespace) {
        for task in &mut self.tasks {
            let read = namespace.read(task.place * LEN as u64, LEN).await;
            task.check(&read.expect("reads again"));
        }
        for task in &mut self.tasks {
            task.write_anew(namespace).await;
        }
        for task in &mut self.tasks {
            let read = namespace.read(task.place * LEN as u64, LEN).await;
            task.check(&read.expect("reads again"));
        }
    }
}

impl Task {
    fn new(place: u64) -> Self {
        Self {
            place,
            certain: 0,
            doubtful: Vec::new(),
            last: 0,
            succeeded: 0,
            errors: Vec::new(),
        }
    }

    /// One operation, a write or a read whose data is checked.
    async fn step(&mut self, namespace: &Namespace) -> Result<(), Error> {
        let offset = self.place * LEN as u64;
        if fastrand::bool() {
            let read = namespace.read(offset, LEN).await?;
            self.check(&read);
            return Ok(());
        }
        self.last += 1;
        let data = self.data(self.last);
        match namespace.write(offset, data).await {
            Ok(_) => self.certain = self.last,
            Err(error) => {
                self.doubtful.push(self.last);
                if let Some(buffer) = error.buffer {
                    assert_eq!(buffer, self.data(self.last), "the buffer of a failed write");
                }
                return Err(error.error);
            }
        }
        Ok(())
    }

    /// A write that must succeed, after which nothing is in doubt.
    async fn write_anew(&mut self, namespace: &Namespace) {
        self.last += 1;
        let data = self.data(self.last);
        let written = namespace.write(self.place * LEN as u64, data).await;
        written.expect("writes");
        self.certain = self.last;
        self.doubtful.clear();
    }

    fn check(&self, read: &[u8]) {
        let possible = || self.doubtful.iter().chain([&self.certain]);
        assert!(
            possible().any(|&write| read == self.data(write)),
            "at place {} is none of the writes {:?}; the last one was {}",
            self.place,
            possible().collect::<Vec<_>>(),
            self.last
        );
    }

    fn data(&self, write: u64) -> Vec<u8> {
        let mut data = vec![0; LEN];
        Rng::with_seed(self.place << 32 | write).fill(&mut data);
        data
    }
}
