use std::io;

use super::Store;

/// A namespace in memory. It is lost with the controller.
pub struct MemoryStore {
    bytes: Vec<u8>,
}

impl MemoryStore {
    /// A store of `size` bytes, all zeros. The operating system provides pages as they are
    /// written.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::OutOfMemory`] when there is no room for `size` bytes.
    pub fn new(size: u64) -> io::Result<Self> {
        let size = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // Reserved first because a failed `vec!` ends the process; then replaced, because only
        // `vec!` asks the operating system for memory that is zeroed when touched.
        Vec::<u8>::new()
            .try_reserve_exact(size)
            .map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            bytes: vec![0; size],
        })
    }

    fn range(&mut self, offset: u64, len: u64) -> io::Result<&mut [u8]> {
        range(offset, len)
            .and_then(|range| self.bytes.get_mut(range))
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Store for MemoryStore {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        out.copy_from_slice(self.range(offset, out.len() as u64)?);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8], _durable: bool) -> io::Result<()> {
        self.range(offset, data.len() as u64)?.copy_from_slice(data);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64, _deallocate: bool) -> io::Result<()> {
        self.range(offset, len)?.fill(0);
        Ok(())
    }

    fn resize(&mut self, size: u64) -> io::Result<()> {
        let size = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let more = size.saturating_sub(self.bytes.len());
        self.bytes
            .try_reserve_exact(more)
            .map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.bytes.resize(size, 0);
        Ok(())
    }

    fn as_slice(&self) -> Option<&[u8]> {
        Some(&self.bytes)
    }
}

fn range(offset: u64, len: u64) -> Option<std::ops::Range<usize>> {
    let end = offset.checked_add(len)?;
    Some(usize::try_from(offset).ok()?..usize::try_from(end).ok()?)
}

impl std::fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryStore")
            .field("size", &self.bytes.len())
            .finish()
    }
}
