//! A durable key-value store on an NVMe namespace: a log, an index of it in memory, and checkpoints
//! of the index.
//!
//! # On the device
//!
//! | where | what |
//! | --- | --- |
//! | blocks 0 and 1 (of 4 KiB) | two *roots*, written in turn; the valid one with the higher generation counts |
//! | from 64 KiB on | *segments* of equal size, each used by the log, by a checkpoint, or free |
//!
//! A *segment* starts with a header block that holds its *epoch*: a number that is given out once, whenever
//! a segment is made ready for use, in ascending order. After it come *batches*, one after the other.
//! A batch is what one device write makes durable: a header with a *sequence number*, which counts the
//! batches of the log, then records, then padding to whole blocks. Records are *set*, *delete*, *expire* and
//! *clear*. A checkpoint is batches too, with a record for each key that says where its value is, and with
//! numbers that no batch of the log has.
//!
//! Every batch and every record has a CRC-32C, which starts from the store's random number and the
//! segment's epoch. So what an earlier life of the segment, or another store, left behind never
//! passes. Segments are overwritten once before they are used, in the background, and so is the header
//! with the epoch: on a file, a durable write then changes no metadata and is one write.
//!
//! A *root* says from which position the log is replayed (epoch, offset, sequence number), and which segments
//! hold the checkpoint of what came before.
//!
//! # Why a crash loses nothing that was acknowledged
//!
//! Assumed of the device: a logical block is written as a whole or not at all; what was written with FUA, or
//! before a flush that succeeded, stays; after a restart no earlier write reaches the media.
//!
//! Recovery loads the checkpoint of the valid root, then replays the log from its position: in the segment with
//! that epoch and in those with higher ones, in their order. In each it takes batches as long as they are
//! whole and have the next sequence number. A segment that does not start with it adds nothing.
//!
//! * **Torn writes, at any block.** The batch's checksum fails: it is not replayed, none of its records
//!   is. It was not acknowledged.
//! * **Batches in flight, out of order.** A batch is acknowledged after all before it. If *n* is lost and
//!   *n+1* is there, neither was; the replay stops before *n*. It does so for ever: after a recovery the log
//!   goes on in another segment, with a higher epoch, so that a new batch *n* never lies before the old *n+1*.
//!   If *n+1* starts a segment of its own, that segment does not have the number that is next, now and
//!   later: *n* is then found in a segment with a higher epoch, after which no lower one is looked at.
//! * **What was replayed stays.** A batch may be whole and not yet durable (the process was killed, the page
//!   cache lives). Recovery flushes before anyone can see what it replayed.
//! * **Recycled segments.** Their batches have another epoch in their checksums. Epochs are never given out
//!   twice: the header with the epoch is durable before the first batch is written, and recovery goes on
//!   after the highest one that it finds, in any header or in the root.
//! * **A torn checkpoint.** The root is written after the checkpoint and everything it refers to are durable.
//!   Until then the old root, which lies in the other block, the old checkpoint and the log after the old
//!   position stay as they are. A torn root fails its checksum.
//! * **A checkpoint is taken while writes go on.** It holds, of each key, some state between its
//!   position and its end. All that changed since the position is in the log, which says what is the case, not
//!   what is to be changed; after its replay the state is that of the end.
//! * **Tombstones.** The log before the position is never replayed, and segments after it are never
//!   freed. So a *delete* in a freed segment has been forgotten together with everything older.
//! * **Compaction.** A segment before the position is read, and the records that the index still refers to
//!   are appended to the log, in one step with the check: what is overwritten before is not copied, what is
//!   overwritten later comes later. It is freed when the copies are durable. The checkpoint
//!   may still refer to it, but whatever it says of such a key is overruled by the log after it.
//!   Readers hold the segment until they have read.
//! * **Expiry.** Records carry the time at which they expire, so nothing is written when that comes; what has
//!   expired is absent in every state. (A clock that is set back may make a key visible again.) The checkpoint
//!   may have keys that had expired, and refer to segments that were freed since: recovery passes over those
//!   that are used for something else by now. What is there lies after the position, and the log has it.
//!
//! Nobody sees what may be lost: a reader of a record that is not durable yet gets it when it is.

mod change;
mod checkpoint;
mod format;
mod index;
mod log;
mod maintenance;
mod read;
mod recovery;

use std::fmt::{Display, Formatter};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use nvme_async::Namespace;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;

pub(crate) use self::change::Change;
#[cfg(test)]
pub(crate) use self::format::Kind;
use self::format::Place;
pub(crate) use self::index::Entry;
pub(crate) use self::log::{Commit, State};
pub(crate) use self::read::{Found, View};

/// Most bytes of a key.
pub(crate) const MAX_KEY: usize = 64 << 10;
/// Most bytes of a value, on devices of 544 MiB and more.
pub(crate) const MAX_VALUE: usize = 16 << 20;

/// How writes become durable where there is a volatile write cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Durability {
    /// Each write by itself (Force Unit Access).
    #[default]
    Fua,
    /// By a flush after each write.
    Flush,
}

/// How a store is opened and works.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How writes become durable where there is a volatile write cache
    #[arg(long, value_enum, default_value_t)]
    pub(crate) durability: Durability,
    /// Makes a new store on the device. EVERYTHING ON IT IS LOST
    #[arg(long)]
    pub(crate) format: bool,
    /// Most bytes in a second that compaction reads, such as 64M, unless writers wait for it
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = nvme_async::parse_size)]
    pub(crate) compaction_rate: u64,
    /// A batch that has grown to this is written although others are on their way.
    #[arg(skip = 64usize << 10)]
    pub(crate) batch_bytes: usize,
    /// Bytes of the log after which a checkpoint is taken; at least four times the checkpoint's.
    #[arg(skip = 64u64 << 20)]
    pub(crate) checkpoint_bytes: u64,
    /// Milliseconds since 1970, by which keys expire.
    #[arg(skip = now as fn() -> u64)]
    pub(crate) clock: fn() -> u64,
}

/// Milliseconds since 1970.
pub(crate) fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or(Duration::ZERO).as_millis() as u64
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the device holds something else; --format makes a store of it, and destroys that")]
    Foreign,
    #[error("the device is damaged: {0}")]
    Damaged(String),
    #[error("the device is too small: {0} bytes, at least {1} are needed")]
    TooSmall(u64, u64),
    #[error("the device has blocks of {0} bytes; at most 4096 can be used")]
    Blocks(u32),
    #[error("the store is full: {used} of {limit} bytes are in use")]
    Full { used: u64, limit: u64 },
    #[error("{0} bytes are more than the store takes at a time, which is {1}")]
    TooLarge(usize, usize),
    #[error("the store has failed, and must be opened again: {0}")]
    Failed(String),
    #[error("the store is being closed")]
    Closed,
    #[error(transparent)]
    Device(#[from] nvme_async::Error),
}

/// What was counted since a store was opened.
#[derive(Default)]
pub(crate) struct Statistics {
    /// Records of each batch.
    pub(crate) batches: Figures,
    /// Microseconds of each batch's write.
    pub(crate) writes: Figures,
    pub(crate) checkpoints: u64,
    pub(crate) compacted: u64,
    pub(crate) moved_bytes: u64,
    pub(crate) expired: u64,
}

/// How microseconds, or other numbers up to 60 million, are distributed.
pub(crate) struct Figures(pub(crate) Histogram<u64>);

impl Default for Figures {
    fn default() -> Self {
        Self(Histogram::new_with_max(60_000_000, 3).expect("the digits are 0 to 5"))
    }
}

impl Figures {
    pub(crate) fn record(&mut self, value: u64, times: u64) {
        // Not even no times: it would count for the maximum.
        if times > 0 {
            self.0.saturating_record_n(value, times);
        }
    }
}

impl Display for Figures {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "mean={:.1}", self.0.mean())?;
        for (name, percent) in [("p50", 50.0), ("p99", 99.0), ("p99.9", 99.9)] {
            write!(f, ",{name}={}", self.0.value_at_percentile(percent))?;
        }
        write!(f, ",max={}", self.0.max())
    }
}

struct Inner {
    namespace: Namespace,
    options: Options,
    segment_size: u32,
    state: Mutex<State>,
    /// There is something to write.
    appended: Notify,
    /// There may be room, or more is durable.
    room: Notify,
    /// Segments are to be made ready.
    wanted: Notify,
    /// Something is to be freed.
    tidy: Notify,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no one panics with it")
    }

    fn fail(&self, error: &Error) {
        self.lock().fail(error);
        self.room.notify_waiters();
    }

    fn now(&self) -> u64 {
        (self.options.clock)()
    }

    /// Where in the namespace something is.
    fn offset(&self, place: Place) -> u64 {
        place.in_namespace(self.segment_size)
    }
}

/// The store; clones are of the same one. Its tasks end with the last.
#[derive(Clone)]
pub(crate) struct Store {
    inner: Arc<Inner>,
    _tasks: Arc<JoinSet<()>>,
}

impl Store {
    /// Opens the store on a namespace; makes one where there are only zeroes, or when told to.
    ///
    /// # Errors
    ///
    /// [`Error::Foreign`], [`Error::Damaged`] and those of the device.
    pub(crate) async fn open(namespace: Namespace, options: Options) -> Result<Self, Error> {
        let state = recovery::open(&namespace, &options).await?;
        let inner = Arc::new(Inner {
            namespace,
            options,
            segment_size: state.root.segment_size,
            state: Mutex::new(state),
            appended: Notify::new(),
            room: Notify::new(),
            wanted: Notify::new(),
            tidy: Notify::new(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(log::write(inner.clone()));
        tasks.spawn(maintenance::run(inner.clone()));
        Ok(Self {
            inner,
            _tasks: Arc::new(tasks),
        })
    }

    /// Finishes what was begun, takes a checkpoint, and stops: all operations fail from now on.
    ///
    /// # Errors
    ///
    /// Those of the device. What was acknowledged is durable all the same.
    pub(crate) async fn close(&self) -> Result<(), Error> {
        let (sender, closed) = oneshot::channel();
        {
            let mut state = self.inner.lock();
            state.check()?;
            (state.is_closing, state.closer) = (true, Some(sender));
        }
        self.inner.room.notify_waiters();
        self.inner.tidy.notify_one();
        closed.await.unwrap_or_else(|_| {
            self.inner.lock().check_failed()?;
            Err(Error::Closed)
        })
    }

    /// What there is, at one moment.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.inner.lock()
    }

    pub(crate) fn namespace(&self) -> &Namespace {
        &self.inner.namespace
    }
}
