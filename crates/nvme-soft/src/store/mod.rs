//! What a namespace keeps its blocks in.

mod cache;
mod file;
mod memory;

use std::fmt;
use std::io;
use std::sync::Arc;

pub(crate) use cache::CachedStore;
pub use file::FileStore;
pub use memory::MemoryStore;

/// Keeps the contents of one namespace. Offsets and lengths are in bytes; the controller has
/// checked them against [`Store::size`] before.
///
/// All calls come from the controller's one thread, which serves nothing else meanwhile. A store that
/// waits for a medium has a [`ConcurrentStore`] besides, for what takes long.
pub trait Store: fmt::Debug + Send {
    /// The size in bytes. Only [`Store::resize`] changes it.
    fn size(&self) -> u64;

    /// Fills `out` with the bytes from `offset` on. Bytes never written read as zeros.
    fn read(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()>;

    /// Stores `data` from `offset` on. With `durable` it returns only when a loss of power no
    /// longer loses these bytes.
    fn write(&mut self, offset: u64, data: &[u8], durable: bool) -> io::Result<()>;

    /// Returns when a loss of power no longer loses anything that was written before.
    fn flush(&mut self) -> io::Result<()>;

    /// Makes a range read as zeros; with `deallocate` it also gives back the space behind it.
    fn zero(&mut self, offset: u64, len: u64, deallocate: bool) -> io::Result<()>;

    /// Changes the size in bytes. What is cut off is lost; what is added reads as zeros.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] for a store that has one size for ever, which is what a store
    /// without this function has; otherwise what went wrong. The size is as it was then.
    fn resize(&mut self, size: u64) -> io::Result<()> {
        let _ = size;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The bytes that have space behind them, for the namespace's utilization.
    fn allocated(&self) -> u64 {
        self.size()
    }

    /// The whole contents, where they are memory: reads then need no copy in between.
    fn as_slice(&self) -> Option<&[u8]> {
        None
    }

    /// The same contents for what takes long, so that it may be done by other threads. Asked for once,
    /// when the namespace is made. Without one, which is what a store without this function has, the
    /// controller's thread does everything.
    fn concurrent(&self) -> Option<Arc<dyn ConcurrentStore>> {
        None
    }
}

/// The part of a [`Store`] that waits for the medium, for several threads at a time, which meanwhile
/// may use the store itself too.
///
/// Calls on ranges that overlap do not come at the same time, nor does a call on a range while the
/// store reads or writes a part of it. [`Store::resize`] comes while no call is under way. A call
/// that panics counts as one that failed.
pub trait ConcurrentStore: fmt::Debug + Send + Sync {
    /// As [`Store::write`] with `durable`.
    fn write_durably(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// As [`Store::flush`]: covers what was written before the call, by whatever thread.
    fn flush(&self) -> io::Result<()>;

    /// As [`Store::zero`].
    fn zero(&self, offset: u64, len: u64, deallocate: bool) -> io::Result<()>;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Write {
            offset: u64,
            len: usize,
            fill: u8,
            durable: bool,
        },
        Zero {
            offset: u64,
            len: u64,
            deallocate: bool,
        },
        Flush,
    }

    const SIZE: u64 = 64 * 1024;

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..SIZE, 1..=SIZE).prop_map(|(offset, len)| (offset, len.min(SIZE - offset)));
        prop_oneof![
            (range.clone(), any::<u8>(), any::<bool>()).prop_map(
                |((offset, len), fill, durable)| Step::Write {
                    offset,
                    len: len as usize,
                    fill,
                    durable
                }
            ),
            (range, any::<bool>()).prop_map(|((offset, len), deallocate)| Step::Zero {
                offset,
                len,
                deallocate
            }),
            Just(Step::Flush),
        ]
    }

    fn follows_model(store: &mut dyn Store, steps: &[Step]) {
        let mut model = vec![0; SIZE as usize];
        for step in steps {
            match *step {
                Step::Write {
                    offset,
                    len,
                    fill,
                    durable,
                } => {
                    let data = vec![fill; len];
                    store.write(offset, &data, durable).expect("in range");
                    model[offset as usize..][..len].copy_from_slice(&data);
                }
                Step::Zero {
                    offset,
                    len,
                    deallocate,
                } => {
                    store.zero(offset, len, deallocate).expect("in range");
                    model[offset as usize..][..len as usize].fill(0);
                }
                Step::Flush => store.flush().expect("flushes"),
            }
        }
        let mut contents = vec![0xff; SIZE as usize];
        store.read(0, &mut contents).expect("in range");
        assert!(contents == model);
    }

    proptest! {
        #![proptest_config(ProptestConfig {
        cases: 32,
        rng_seed: RngSeed::Fixed(0x5eed),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

        #[test]
        fn stores_keep_what_was_written(steps in prop::collection::vec(step(), 1..16)) {
            follows_model(&mut MemoryStore::new(SIZE).expect("small"), &steps);
            let directory = tempfile::tempdir().expect("temporary directory");
            let path = directory.path().join("disk.img");
            follows_model(&mut FileStore::create(&path, SIZE).expect("creates"), &steps);
        }
    }
}
