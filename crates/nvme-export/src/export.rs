//! What is served.

use std::ops::Range;

use nvme_async::Namespace;

/// A namespace, or a range of one, that a server serves.
///
/// Offsets in it are translated by [`locate`](Self::locate), the one way to the namespace: what is not
/// inside gets no offset.
#[derive(Clone, Debug)]
pub struct Export {
    namespace: Namespace,
    range: Range<u64>,
    is_read_only: bool,
}

/// Why a range of a namespace can't be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// It is not a range of blocks.
    #[error(
        "bytes {start} to {end} are no whole blocks: namespace {nsid} has blocks of {block_size} bytes"
    )]
    Unaligned {
        /// The namespace.
        nsid: u32,
        /// The first byte.
        start: u64,
        /// The byte after the last one.
        end: u64,
        /// The size of a logical block in bytes.
        block_size: u32,
    },
    /// There are no such bytes.
    #[error("bytes {start} to {end} are not there: namespace {nsid} has {capacity} bytes")]
    OutOfRange {
        /// The namespace.
        nsid: u32,
        /// The first byte.
        start: u64,
        /// The byte after the last one.
        end: u64,
        /// How many bytes the namespace has.
        capacity: u64,
    },
}

/// A request for bytes that an export does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at offset {offset} are not inside of an export of {size} bytes")]
pub struct OutOfExport {
    /// Where the request starts, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub len: u64,
    /// How large the export is, in bytes.
    pub size: u64,
}

impl Export {
    /// All of `namespace`, of the size that it has now.
    ///
    /// # Errors
    ///
    /// [`ExportError::OutOfRange`] if the namespace can't be used at present.
    pub fn new(namespace: Namespace) -> Result<Self, ExportError> {
        let capacity = namespace.capacity();
        Self::of_range(namespace, 0..capacity)
    }

    /// The bytes of `range` of `namespace`, which become offsets from 0 on.
    ///
    /// # Errors
    ///
    /// [`ExportError`]: the range is of whole blocks, not empty, and inside of the namespace.
    pub fn of_range(namespace: Namespace, range: Range<u64>) -> Result<Self, ExportError> {
        let (block_size, capacity) = (namespace.block_size(), namespace.capacity());
        let (nsid, start, end) = (namespace.nsid(), range.start, range.end);
        let block = u64::from(block_size);
        if start % block != 0 || end % block != 0 {
            return Err(ExportError::Unaligned {
                nsid,
                start,
                end,
                block_size,
            });
        }
        if start >= end || end > capacity {
            return Err(ExportError::OutOfRange {
                nsid,
                start,
                end,
                capacity,
            });
        }
        Ok(Self {
            namespace,
            range,
            is_read_only: false,
        })
    }

    /// Refuses what would change data.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.is_read_only = true;
        self
    }

    /// Whether what would change data is refused.
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// How large it is, in bytes; never 0.
    pub fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// The size of a logical block, in bytes.
    pub fn block_size(&self) -> u32 {
        self.namespace.block_size()
    }

    /// The namespace, where [`locate`](Self::locate) says where to.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The same, by a queue pair that the fewest others use; see [`Namespace::pinned`].
    #[must_use]
    pub(crate) fn pinned(&self) -> Self {
        Self {
            namespace: self.namespace.pinned(),
            ..self.clone()
        }
    }

    /// How many commands are outstanding at most so that others on the same queue pair have room for as many.
    pub(crate) fn fair_depth(&self) -> usize {
        self.namespace.fair_depth()
    }

    /// Where in the namespace `len` bytes at `offset` of the export are.
    ///
    /// # Errors
    ///
    /// [`OutOfExport`] if not all of them are in the export.
    pub fn locate(&self, offset: u64, len: u64) -> Result<u64, OutOfExport> {
        let size = self.size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(OutOfExport { offset, len, size });
        }
        Ok(self.range.start + offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn namespace() -> Namespace {
        nvme_async::open("mem:?size=1M&lba=4096")
            .await
            .expect("opens")
    }

    #[tokio::test]
    async fn a_range_lets_nothing_out() {
        let export = Export::of_range(namespace().await, 8192..20480).expect("is inside");
        assert_eq!((export.size(), export.block_size()), (12288, 4096));
        assert_eq!(export.locate(0, 12288), Ok(8192));
        assert_eq!(export.locate(12288, 0), Ok(20480));
        for (offset, len) in [
            (0, 12289),
            (4096, 12288),
            (12289, 0),
            (u64::MAX, 1),
            (1, u64::MAX),
            (u64::MAX - 4095, 8192),
        ] {
            let size = 12288;
            assert_eq!(
                export.locate(offset, len),
                Err(OutOfExport { offset, len, size })
            );
        }
    }

    #[tokio::test]
    async fn ranges_that_are_none() {
        let namespace = namespace().await;
        let refused = |range| Export::of_range(namespace.clone(), range).expect_err("is none");
        for range in [1..4096, 0..4095, 4096..8193] {
            assert!(matches!(refused(range), ExportError::Unaligned { .. }));
        }
        #[expect(clippy::reversed_empty_ranges, reason = "it is what is to be refused")]
        for range in [0..0, 8192..4096, 0..(1 << 20) + 4096, 1 << 40..1 << 41] {
            assert!(matches!(refused(range), ExportError::OutOfRange { .. }));
        }
        assert!(
            Export::new(namespace)
                .expect("is there")
                .read_only()
                .is_read_only()
        );
    }
}
