//! The I/O suite: what each namespace does, whatever is behind it.
//!
//! It knows nothing but the public interface, and checks it against a model in memory. It
//! overwrites the first [`AREA`] bytes.

mod checks;
pub(crate) mod disk;
pub(crate) mod target;

use std::ops::Range;
use std::task::Poll;

use bytes::Bytes;
use nvme_async::{DmaBuf, Error, IoError, Zeroes};

use disk::{Disk, LARGEST, READ_FORMS, ReadForm, WRITE_FORMS, WriteForm, assert_same};
use target::{How, Target};

/// So many bytes from the start of the namespace are used; it must be at least as large.
pub(crate) const AREA: u64 = 5 << 20;

/// Runs all of it on `namespace`: in full, or what takes a moment.
pub(crate) async fn all(namespace: &impl Target, full: bool) {
    let mut disk = Disk::new(namespace, 0x5eed, AREA).await;
    disk.lengths(full).await;
    disk.powers_of_two(full).await;
    disk.seeded(if full { 100 } else { 20 }).await;
    disk.concurrent(if full { 256 } else { 48 }).await;
    disk.durability().await;
    disk.atomic().await;
    disk.zeroes().await;
    disk.discards().await;
    disk.compares().await;
    disk.verifies().await;
    disk.copies(if full { 100 } else { 20 }).await;
    disk.quiesces().await;
    disk.refusals().await;
    disk.check_all().await;
}

impl<N: Target> Disk<'_, N> {
    async fn round_trip(&mut self, write: WriteForm, read: ReadForm, len: usize) {
        let offset = self.place(len);
        self.write(write, How::Plain, offset, len).await;
        self.check(read, offset, len).await;
        // Its neighbours are as they were.
        let block = self.block_size as u64;
        let start = offset.saturating_sub(block);
        let end = (offset + len as u64 + block).min(self.model.len() as u64);
        self.check(ReadForm::Bytes, start, (end - start) as usize)
            .await;
    }

    async fn round_trips(&mut self, full: bool, blocks: usize) {
        let len = blocks * self.block_size;
        if full {
            for form in WRITE_FORMS {
                self.round_trip(form, ReadForm::Bytes, len).await;
            }
            for form in READ_FORMS {
                self.round_trip(WriteForm::Vec, form, len).await;
            }
        } else {
            let write = WRITE_FORMS[blocks % WRITE_FORMS.len()];
            let read = READ_FORMS[blocks % READ_FORMS.len()];
            self.round_trip(write, read, len).await;
        }
    }

    pub(crate) async fn lengths(&mut self, full: bool) {
        for blocks in 1..=64 {
            self.round_trips(full, blocks).await;
        }
    }

    pub(crate) async fn powers_of_two(&mut self, full: bool) {
        let mut blocks = 1;
        while blocks * self.block_size <= LARGEST {
            for blocks in blocks - 1..=blocks + 1 {
                if blocks > 0 {
                    self.round_trips(full, blocks).await;
                }
            }
            blocks *= 2;
        }
    }

    pub(crate) async fn seeded(&mut self, count: usize) {
        for _ in 0..count {
            let largest = 1 << self.random.u32(9..21);
            let blocks = self.random.usize(1..=(largest / self.block_size).max(1));
            let (write, read) = (self.any(&WRITE_FORMS), self.any(&READ_FORMS));
            self.round_trip(write, read, blocks * self.block_size).await;
        }
    }

    /// Writes and then reads `count` ranges all at once.
    pub(crate) async fn concurrent(&mut self, count: usize) {
        let slot = self.model.len() / count / self.block_size * self.block_size;
        let ranges: Vec<Range<usize>> = (0..count)
            .map(|index| {
                let blocks = self.random.usize(1..=(slot / self.block_size).min(40));
                index * slot..index * slot + blocks * self.block_size
            })
            .collect();
        for range in &ranges {
            self.random.fill(&mut self.model[range.clone()]);
        }
        let namespace = self.namespace;
        let writes = ranges.iter().map(|range| {
            let data = Bytes::copy_from_slice(&self.model[range.clone()]);
            namespace.send(range.start as u64, data, How::Plain)
        });
        for written in futures::future::join_all(writes).await {
            written.expect("writes");
        }
        let reads = ranges
            .iter()
            .map(|range| namespace.read(range.start as u64, range.len()));
        let read = futures::future::join_all(reads).await;
        for (range, read) in ranges.into_iter().zip(read) {
            let context = format!("concurrent read of {range:?}");
            assert_same(&read.expect("reads"), &self.model[range], &context);
        }
    }

    async fn durability(&mut self) {
        for form in WRITE_FORMS {
            let len = self.random.usize(1..50) * self.block_size;
            let offset = self.place(len);
            self.write(form, How::Fua, offset, len).await;
            self.namespace.flush().await.expect("flushes");
            self.check(ReadForm::Dma, offset, len).await;
        }
    }

    async fn atomic(&mut self) {
        let limit = self.namespace.atomic_write_limit() as usize;
        assert!(limit >= self.block_size && limit.is_multiple_of(self.block_size));
        if limit <= LARGEST {
            self.write(WriteForm::Dma, How::Atomic, 0, limit).await;
            self.check(ReadForm::Dma, 0, limit).await;
        }
        let too_long = limit + self.block_size;
        if too_long <= LARGEST {
            let refused = self
                .namespace
                .send(0, vec![1; too_long], How::Atomic)
                .await
                .expect_err("more than is promised");
            assert!(matches!(refused.error, Error::NotAtomic { .. }));
            assert_eq!(refused.buffer.map(|buffer| buffer.len()), Some(too_long));
            self.check(ReadForm::Dma, 0, too_long).await;
        }
    }

    async fn zeroes(&mut self) {
        for zeroes in [Zeroes::Allocated, Zeroes::MayDeallocate] {
            for blocks in [1, 9, 700] {
                let len = blocks * self.block_size;
                let len = len.min(LARGEST);
                let offset = self.place(len);
                self.write(WriteForm::Vec, How::Plain, offset, len).await;
                self.write_zeroes(zeroes, offset, len).await;
                self.check(ReadForm::Dma, offset, len).await;
            }
        }
        self.check_all().await;
    }

    /// More ranges than one command takes. Each block has its old data or what the controller
    /// returns in place of them afterwards, and others do not change.
    async fn discards(&mut self) {
        let block = self.block_size as u64;
        let mut ranges: Vec<Range<u64>> = (0..300)
            .map(|index| 2 * index * block..(2 * index + 1) * block)
            .collect();
        self.random.shuffle(&mut ranges);
        match self.namespace.discard(&ranges).await {
            Ok(()) => {}
            Err(Error::Unsupported { .. }) => return,
            Err(error) => panic!("discard: {error}"),
        }
        for range in ranges {
            let range = range.start as usize..range.end as usize;
            let read = self.namespace.read(range.start as u64, range.len()).await;
            let read = read.expect("reads");
            if read != self.model[range.clone()] {
                let fill = read[0];
                assert!(matches!(fill, 0 | 0xff) && read.iter().all(|&byte| byte == fill));
                self.model[range].copy_from_slice(&read);
            }
        }
        self.check_all().await;
    }

    async fn quiesces(&mut self) {
        for polls in 0..20 {
            self.dropped_write(polls, 16 * self.block_size).await;
        }
        self.check_all().await;
    }

    /// Writes, gives up after some polls, and quiesces. Afterwards nothing changes any more, and
    /// each block is as it was or as it would be.
    pub(crate) async fn dropped_write(&mut self, polls: usize, len: usize) {
        let namespace = self.namespace;
        let offset = self.place(len);
        let mut data = vec![0; len];
        self.random.fill(&mut data);
        let mut write = Box::pin(namespace.send(offset, data.clone(), How::Plain));
        for _ in 0..polls {
            if let Poll::Ready(written) = futures::poll!(&mut write) {
                written.expect("writes");
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(write);
        namespace.quiesce().await.expect("quiesces");
        let read = namespace.read(offset, len).await.expect("reads");
        let model = &mut self.model[offset as usize..][..len];
        let blocks = model.chunks_mut(self.block_size);
        let new = data.chunks(self.block_size);
        for ((old, new), read) in blocks.zip(new).zip(read.chunks(self.block_size)) {
            assert!(
                read == old || read == new,
                "neither old nor new after {polls} polls"
            );
            old.copy_from_slice(read);
        }
    }

    pub(crate) async fn write_zeroes(&mut self, zeroes: Zeroes, offset: u64, len: usize) {
        let written = self
            .namespace
            .write_zeroes(offset, len as u64, zeroes)
            .await;
        written.expect("writes zeroes");
        self.model[offset as usize..][..len].fill(0);
    }

    async fn refusals(&mut self) {
        let block = self.block_size;
        for (offset, len) in [
            (0, block - 1),
            (1, block),
            (block as u64 / 2, block),
            (0, 0),
        ] {
            let error = self
                .namespace
                .read(offset, len)
                .await
                .expect_err("unaligned");
            assert!(matches!(error, Error::Unaligned { .. }), "{error:?}");
            let write = self.namespace.send(offset, vec![7; len], How::Plain).await;
            let IoError { error, buffer, .. } = write.expect_err("unaligned");
            assert!(matches!(error, Error::Unaligned { .. }), "{error:?}");
            assert_eq!(buffer, Some(vec![7; len]));
        }
        let aligned = u64::MAX - (block as u64 - 1);
        for offset in [1 << 60, aligned] {
            let read = self.namespace.read_into(offset, DmaBuf::heap(block)).await;
            let IoError { error, buffer, .. } = read.expect_err("past the end");
            assert!(matches!(error, Error::OutOfRange { .. }), "{error:?}");
            assert!(buffer.is_some());
            let zeroed = self
                .namespace
                .write_zeroes(offset, block as u64, Zeroes::Allocated)
                .await;
            assert!(matches!(zeroed, Err(Error::OutOfRange { .. })));
        }
        self.check_all().await;
    }
}
