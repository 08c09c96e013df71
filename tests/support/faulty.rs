//! A store that fails where it is told to.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use nvme_soft::store::{MemoryStore, Store};

/// What a [`FaultyStore`] does, and was asked to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Script(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    bad: Vec<Range<u64>>,
    log: Vec<Call>,
}

/// A change that a store was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Write {
        offset: u64,
        len: usize,
        durable: bool,
    },
    Flush,
}

impl Script {
    /// From now on these bytes can neither be read nor written.
    pub(crate) fn fail_at(&self, bytes: Range<u64>) {
        self.0.lock().expect("no panics").bad.push(bytes);
    }

    /// From now on all bytes can be read and written.
    pub(crate) fn heal(&self) {
        self.0.lock().expect("no panics").bad.clear();
    }

    /// The changes since the last call.
    pub(crate) fn take_log(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.lock().expect("no panics").log)
    }

    fn note(&self, call: Call) {
        self.0.lock().expect("no panics").log.push(call);
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let state = self.0.lock().expect("no panics");
        let hit = |bad: &Range<u64>| bad.start < offset + len && offset < bad.end;
        if state.bad.iter().any(hit) {
            return Err(io::Error::other("a planted fault"));
        }
        Ok(())
    }
}

/// Memory with bad places.
#[derive(Debug)]
pub(crate) struct FaultyStore {
    memory: MemoryStore,
    script: Script,
}

impl FaultyStore {
    pub(crate) fn new(size: u64, script: &Script) -> Self {
        Self {
            memory: MemoryStore::new(size).expect("a little memory"),
            script: script.clone(),
        }
    }
}

impl Store for FaultyStore {
    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn read(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.script.check(offset, out.len() as u64)?;
        self.memory.read(offset, out)
    }

    fn write(&mut self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        self.script.check(offset, data.len() as u64)?;
        self.memory.write(offset, data, durable)?;
        self.script.note(Call::Write {
            offset,
            len: data.len(),
            durable,
        });
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.script.note(Call::Flush);
        self.memory.flush()
    }

    fn zero(&mut self, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
        self.script.check(offset, len)?;
        self.memory.zero(offset, len, deallocate)
    }
}
