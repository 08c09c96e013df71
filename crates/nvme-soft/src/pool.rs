//! Threads for what waits for a medium, so that the controller's thread need not.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::doorbells::Doorbells;
use crate::store::ConcurrentStore;
use crate::wake::Urgency;

/// What is under way at most, and so threads at most. As many as commands are fetched at a time.
pub(crate) const MAX_JOBS: usize = 16;
/// After so long without work a thread ends.
const IDLE: Duration = Duration::from_secs(5);

/// Work of a command for a thread of the pool.
#[derive(Debug)]
pub(crate) enum Work {
    /// Makes all that was written durable.
    Flush(Vec<Arc<dyn ConcurrentStore>>),
    /// Writes durably.
    Write {
        store: Arc<dyn ConcurrentStore>,
        offset: u64,
        data: Vec<u8>,
    },
    /// Zeroes ranges, each an offset and a length in bytes, and then flushes if that is wanted.
    Zero {
        store: Arc<dyn ConcurrentStore>,
        ranges: Vec<(u64, u64)>,
        deallocate: bool,
        flush: bool,
    },
}

impl Work {
    /// From the first to the last byte that it writes, if it writes some.
    pub(crate) fn bytes(&self) -> Option<Range<u64>> {
        match self {
            Self::Flush(_) => None,
            Self::Write { offset, data, .. } => Some(*offset..*offset + data.len() as u64),
            Self::Zero { ranges, .. } => {
                let start = ranges.iter().map(|&(offset, _)| offset).min()?;
                let end = ranges.iter().map(|&(offset, len)| offset + len).max()?;
                Some(start..end)
            }
        }
    }

    fn run(&self) -> io::Result<()> {
        match self {
            // All are flushed even if one fails.
            Self::Flush(stores) => stores
                .iter()
                .map(|store| store.flush())
                .fold(Ok(()), Result::and),
            Self::Write {
                store,
                offset,
                data,
            } => store.write_durably(*offset, data),
            Self::Zero {
                store,
                ranges,
                deallocate,
                flush,
            } => {
                for &(offset, len) in ranges {
                    store.zero(offset, len, *deallocate)?;
                }
                if *flush { store.flush() } else { Ok(()) }
            }
        }
    }
}

/// Work that is done.
pub(crate) struct Done {
    /// As it was submitted with.
    pub(crate) key: usize,
    pub(crate) result: io::Result<()>,
    /// The data of a write; empty otherwise.
    pub(crate) data: Vec<u8>,
}

struct Job {
    key: usize,
    work: Box<Work>,
}

impl Job {
    fn run(self) -> Done {
        let result = panic::catch_unwind(AssertUnwindSafe(|| self.work.run()))
            .unwrap_or_else(|_| Err(io::Error::other("the store panicked")));
        let data = match *self.work {
            Work::Write { data, .. } => data,
            Work::Flush(_) | Work::Zero { .. } => Vec::new(),
        };
        Done {
            key: self.key,
            result,
            data,
        }
    }
}

/// The threads. There are none until there is work, and they end when there is none for long, or with
/// the pool.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// There is a job, or the pool ends.
    work: Condvar,
    /// No job is left.
    quiet: Condvar,
    has_finished: AtomicBool,
    doorbells: Arc<Doorbells>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    finished: Vec<Done>,
    /// Jobs that are not finished.
    left: usize,
    threads: usize,
    /// Threads that wait for work.
    idle: usize,
    ends: bool,
}

impl Pool {
    /// A pool that wakes the controller's thread when work is done.
    pub(crate) fn new(doorbells: Arc<Doorbells>) -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                work: Condvar::new(),
                quiet: Condvar::new(),
                has_finished: AtomicBool::new(false),
                doorbells,
            }),
            threads: Vec::new(),
        }
    }

    /// Hands over work, of which there are at most [`MAX_JOBS`] at a time.
    pub(crate) fn submit(&mut self, key: usize, work: Box<Work>) {
        let mut state = self.shared.lock();
        state.jobs.push_back(Job { key, work });
        state.left += 1;
        if state.jobs.len() <= state.idle {
            drop(state);
            return self.shared.work.notify_one();
        }
        if state.threads == MAX_JOBS {
            // One of them is about to look for more.
            return;
        }
        state.threads += 1;
        drop(state);
        self.threads.retain(|thread| !thread.is_finished());
        let shared = self.shared.clone();
        let thread = thread::Builder::new()
            .name("nvme-soft-io".into())
            .spawn(move || shared.run());
        match thread {
            Ok(thread) => self.threads.push(thread),
            Err(error) => self.go_without(&error),
        }
    }

    /// A thread could not be started. If there is no other one, this one does the work.
    #[cold]
    fn go_without(&mut self, error: &io::Error) {
        tracing::warn!(%error, "a thread for a store could not be started");
        let mut state = self.shared.lock();
        state.threads -= 1;
        if state.threads == 0
            && let Some(job) = state.jobs.pop_front()
        {
            drop(state);
            self.shared.finish(job.run());
        }
    }

    /// Whether there is something to [take](Pool::take_finished). The sleeper's last look, so that
    /// no wake-up is lost.
    pub(crate) fn has_finished(&self) -> bool {
        self.shared.has_finished.load(Ordering::Relaxed)
    }

    /// Takes what is done, and leaves `into`, which is empty, to be filled.
    pub(crate) fn take_finished(&self, into: &mut Vec<Done>) {
        let mut state = self.shared.lock();
        self.shared.has_finished.store(false, Ordering::Relaxed);
        std::mem::swap(&mut state.finished, into);
    }

    /// Returns when all is done that was submitted.
    pub(crate) fn wait(&self) {
        let mut state = self.shared.lock();
        while state.left > 0 {
            state = self
                .shared
                .quiet
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pool {
    /// What is under way is finished, and what is not begun never is.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ends = true;
        state.jobs.clear();
        drop(state);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // Stores that panic are caught before.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No panic can come between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, done: Done) {
        let mut state = self.lock();
        state.finished.push(done);
        state.left -= 1;
        self.has_finished.store(true, Ordering::Relaxed);
        if state.left == 0 {
            self.quiet.notify_all();
        }
        drop(state);
        self.doorbells.wake().notify(Urgency::High);
    }

    /// What a thread of the pool does.
    fn run(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                self.finish(job.run());
                state = self.lock();
                continue;
            }
            if state.ends {
                break;
            }
            state.idle += 1;
            let (guard, wait) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if wait.timed_out() && state.jobs.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    /// A store whose flushes wait for each other.
    #[derive(Debug)]
    struct Together(Barrier);

    impl ConcurrentStore for Together {
        fn write_durably(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            self.0.wait();
            Ok(())
        }

        fn zero(&self, _offset: u64, _len: u64, _deallocate: bool) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    fn pool() -> Pool {
        Pool::new(Arc::new(Doorbells::new(1, 0, None)))
    }

    fn take(pool: &Pool) -> Vec<Done> {
        pool.wait();
        assert!(pool.has_finished());
        let mut finished = Vec::new();
        pool.take_finished(&mut finished);
        assert!(!pool.has_finished());
        finished.sort_by_key(|done| done.key);
        finished
    }

    #[test]
    fn there_is_a_thread_for_each_job_and_none_after_the_pool() {
        let mut pool = pool();
        let store = Arc::new(Together(Barrier::new(MAX_JOBS)));
        for _ in 0..50 {
            for key in 0..MAX_JOBS {
                let stores: Vec<Arc<dyn ConcurrentStore>> = vec![store.clone()];
                pool.submit(key, Box::new(Work::Flush(stores)));
            }
            let finished = take(&pool);
            assert_eq!(finished.len(), MAX_JOBS);
            assert!(finished.iter().all(|done| done.result.is_ok()));
        }
        assert!(pool.threads.len() <= MAX_JOBS);
        let shared = Arc::downgrade(&pool.shared);
        drop(pool);
        assert!(shared.upgrade().is_none());
        assert_eq!(Arc::strong_count(&store), 1);
    }

    #[test]
    fn data_come_back_and_so_do_errors() {
        let mut pool = pool();
        let store = Arc::new(Together(Barrier::new(1)));
        let write = Work::Write {
            store: store.clone(),
            offset: 512,
            data: vec![1; 512],
        };
        assert_eq!(write.bytes(), Some(512..1024));
        pool.submit(3, Box::new(write));
        let zero = Work::Zero {
            store,
            ranges: vec![(4096, 512), (512, 512)],
            deallocate: true,
            flush: false,
        };
        assert_eq!(zero.bytes(), Some(512..4608));
        pool.submit(5, Box::new(zero));
        let finished = take(&pool);
        assert_eq!((finished[0].key, finished[1].key), (3, 5));
        assert_eq!(finished[0].data, [1; 512]);
        assert!(finished[0].result.is_ok());
        assert!(finished[1].result.is_err());
    }
}
