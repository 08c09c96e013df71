//! A store whose medium takes as long as the test wants.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use nvme_soft::store::{ConcurrentStore, Store};

use crate::host::wait_for;

/// What a [`Medium`] was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Write { offset: u64, len: u64 },
    Flush,
    Zero { offset: u64, len: u64 },
}

impl Call {
    fn bytes(self) -> Range<u64> {
        match self {
            Self::Write { offset, len } | Self::Zero { offset, len } => offset..offset + len,
            Self::Flush => 0..0,
        }
    }
}

/// How a call ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    Done,
    Fails(io::ErrorKind),
    Panics,
}

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    /// Calls that take long, in the order in which they began, and how each is to end.
    begun: Vec<(Call, Option<End>)>,
    /// Bytes of calls under way.
    active: Vec<Range<u64>>,
    ended: usize,
    is_open: bool,
    overlaps: usize,
}

/// A disk in memory. Durable writes, flushes and zeroes end when the test says so; reads and other writes
/// take no time.
#[derive(Debug)]
pub(crate) struct Medium {
    state: Mutex<State>,
    changed: Condvar,
}

impl Medium {
    pub(crate) fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                bytes: vec![0; size],
                begun: Vec::new(),
                active: Vec::new(),
                ended: 0,
                is_open: false,
                overlaps: 0,
            }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Returns once so many calls have begun, with all that have.
    pub(crate) fn wait_begun(&self, count: usize) -> Vec<Call> {
        wait_for(|| (self.lock().begun.len() >= count).then_some(()));
        self.lock().begun.iter().map(|(call, _)| *call).collect()
    }

    /// Lets the call with this number end.
    pub(crate) fn end(&self, number: usize, end: End) {
        self.lock().begun[number].1 = Some(end);
        self.changed.notify_all();
    }

    pub(crate) fn begun(&self) -> usize {
        self.lock().begun.len()
    }

    pub(crate) fn ended(&self) -> usize {
        self.lock().ended
    }

    /// Lets all calls end, now and later.
    pub(crate) fn open(&self) {
        self.lock().is_open = true;
        self.changed.notify_all();
    }

    /// Calls that came although another one on the same bytes was under way.
    pub(crate) fn overlaps(&self) -> usize {
        self.lock().overlaps
    }

    fn touch(state: &mut State, bytes: &Range<u64>) {
        let overlaps = |other: &Range<u64>| other.start < bytes.end && bytes.start < other.end;
        if state.active.iter().any(overlaps) {
            state.overlaps += 1;
        }
    }

    fn call(&self, call: Call, data: Option<&[u8]>) -> io::Result<()> {
        let bytes = call.bytes();
        let mut state = self.lock();
        Self::touch(&mut state, &bytes);
        state.active.push(bytes.clone());
        let number = state.begun.len();
        state.begun.push((call, None));
        self.changed.notify_all();
        // In two halves, so that a reader that does not wait sees one of them.
        let half = data.map_or(0, |data| data.len() / 2);
        if let Some(data) = data {
            state.bytes[bytes.start as usize..][..half].copy_from_slice(&data[..half]);
            drop(state);
            thread::yield_now();
            state = self.lock();
        }
        let end = loop {
            match state.begun[number].1 {
                Some(end) => break end,
                None if state.is_open => break End::Done,
                None => state = self.changed.wait(state).unwrap(),
            }
        };
        state.ended += 1;
        let index = state.active.iter().position(|active| *active == bytes);
        state.active.swap_remove(index.unwrap());
        match end {
            End::Fails(kind) => return Err(kind.into()),
            End::Panics => {
                drop(state);
                panic!("on purpose");
            }
            End::Done => {}
        }
        match data {
            Some(data) => {
                let rest = &mut state.bytes[bytes.start as usize + half..bytes.end as usize];
                rest.copy_from_slice(&data[half..]);
            }
            None => state.bytes[bytes.start as usize..bytes.end as usize].fill(0),
        }
        Ok(())
    }
}

impl ConcurrentStore for Medium {
    fn write_durably(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let len = data.len() as u64;
        self.call(Call::Write { offset, len }, Some(data))
    }

    fn flush(&self) -> io::Result<()> {
        self.call(Call::Flush, None)
    }

    fn zero(&self, offset: u64, len: u64, _deallocate: bool) -> io::Result<()> {
        self.call(Call::Zero { offset, len }, None)
    }
}

/// The store over a [`Medium`].
#[derive(Debug)]
pub(crate) struct MediumStore(pub(crate) Arc<Medium>);

impl Store for MediumStore {
    fn size(&self) -> u64 {
        self.0.lock().bytes.len() as u64
    }

    fn read(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut state = self.0.lock();
        Medium::touch(&mut state, &(offset..offset + out.len() as u64));
        out.copy_from_slice(&state.bytes[offset as usize..][..out.len()]);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        if durable {
            return self.0.write_durably(offset, data);
        }
        let mut state = self.0.lock();
        Medium::touch(&mut state, &(offset..offset + data.len() as u64));
        state.bytes[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        ConcurrentStore::flush(&*self.0)
    }

    fn zero(&mut self, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
        // Short ones, which nothing follows, take no time.
        if len >= 1 << 20 {
            return ConcurrentStore::zero(&*self.0, offset, len, deallocate);
        }
        let mut state = self.0.lock();
        Medium::touch(&mut state, &(offset..offset + len));
        state.bytes[offset as usize..][..len as usize].fill(0);
        Ok(())
    }

    fn resize(&mut self, size: u64) -> io::Result<()> {
        let mut state = self.0.lock();
        if !state.active.is_empty() {
            state.overlaps += 1;
        }
        state.bytes.resize(size as usize, 0);
        Ok(())
    }

    fn concurrent(&self) -> Option<Arc<dyn ConcurrentStore>> {
        Some(self.0.clone())
    }
}
