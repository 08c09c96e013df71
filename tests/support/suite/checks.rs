//! Compare, Verify and Copy, where the controller has them.

use std::iter;
use std::ops::Range;

use nvme_async::Error;

use super::disk::{Disk, LARGEST, ReadForm, WRITE_FORMS, WriteForm, assert_same};
use super::target::{How, Target};

impl<N: Target> Disk<'_, N> {
    /// What is there is equal, from each kind of memory, and one other bit is not.
    pub(super) async fn compares(&mut self) {
        for form in WRITE_FORMS {
            let blocks = self.random.usize(1..50);
            for len in [blocks * self.block_size, LARGEST] {
                let offset = self.place(len);
                if !self.compare(form, offset, len).await {
                    return;
                }
                let mut data = self.model[offset as usize..][..len].to_vec();
                let bit = self.random.usize(0..len * 8);
                data[bit / 8] ^= 1 << (bit % 8);
                let compared = self.send(form, How::Compare, offset, &data).await;
                let error = compared.expect_err("they differ");
                assert!(error.is_compare_failure(), "{form:?}: {error}");
            }
        }
        let past = self.namespace.send(1 << 60, vec![0; 4096], How::Compare);
        let error = past.await.expect_err("past the end").error;
        assert!(matches!(error, Error::OutOfRange { .. }), "{error:?}");
        self.check_all().await;
    }

    /// Compares what is there with the model. Whether the controller can.
    pub(crate) async fn compare(&mut self, form: WriteForm, offset: u64, len: usize) -> bool {
        let data = self.model[offset as usize..][..len].to_vec();
        let context = format!("compare of {len} bytes at {offset} with {form:?}");
        match self.send(form, How::Compare, offset, &data).await {
            Ok(back) => assert_same(&back, &data, &format!("what came back from a {context}")),
            Err(Error::Unsupported { .. }) => return false,
            Err(error) => panic!("{context}: {error}"),
        }
        true
    }

    pub(super) async fn verifies(&mut self) {
        let (block, area) = (self.block_size as u64, self.model.len() as u64);
        match self.namespace.verify(0, block).await {
            Ok(()) => {}
            Err(Error::Unsupported { .. }) => return,
            Err(error) => panic!("verify: {error}"),
        }
        self.namespace
            .verify(block, area - block)
            .await
            .expect("it can be read");
        let refused = self.namespace.verify(1, block).await;
        assert!(matches!(refused, Err(Error::Unaligned { .. })));
        let refused = self.namespace.verify(1 << 60, block).await;
        assert!(matches!(refused, Err(Error::OutOfRange { .. })));
        self.check_all().await;
    }

    /// Copies of a few ranges, of one that is longer than controllers take at a time, and of more
    /// ranges than one command has.
    pub(super) async fn copies(&mut self, count: usize) {
        let middle = self.model.len() / self.block_size / 2;
        for round in 0..count {
            let done = match round {
                0 => {
                    self.copy_to_other_half(iter::once(0..middle).collect())
                        .await
                }
                1 => {
                    let every_other = (0..300).map(|index| index * 2..index * 2 + 1);
                    self.copy_to_other_half(every_other.collect()).await
                }
                _ => self.copy_anything().await,
            };
            if !done {
                return;
            }
        }
        self.check_all().await;
        let block = self.block_size as u64;
        for (source, destination) in [(0, 0), (0, 3), (3, 0)] {
            let source = source * block..(source + 4) * block;
            let refused = self.namespace.copy(&[source], destination * block).await;
            assert!(matches!(refused, Err(Error::Overlap { .. })), "{refused:?}");
        }
        let none = 5 * block..5 * block;
        for (source, to) in [(0..block, 1), (1..block, block), (none, 0)] {
            let refused = self.namespace.copy(&[source], to).await;
            assert!(
                matches!(refused, Err(Error::Unaligned { .. })),
                "{refused:?}"
            );
        }
        let far = (1 << 60)..(1 << 60) + block;
        for (source, to) in [(far, 0), (0..block, 1 << 60)] {
            let refused = self.namespace.copy(&[source], to).await;
            assert!(
                matches!(refused, Err(Error::OutOfRange { .. })),
                "{refused:?}"
            );
        }
        self.namespace.copy(&[], 0).await.expect("nothing to do");
        self.check_all().await;
    }

    /// Copies a few ranges. Whether the controller can.
    pub(crate) async fn copy_anything(&mut self) -> bool {
        let middle = self.model.len() / self.block_size / 2;
        let longest = (middle / 6).min(100);
        let sources = (0..self.random.usize(1..6))
            .map(|_| {
                let start = self.random.usize(0..middle - longest);
                start..start + self.random.usize(1..longest)
            })
            .collect();
        self.copy_to_other_half(sources).await
    }

    /// Copies blocks of the first half to anywhere in the second one, or the other way around.
    async fn copy_to_other_half(&mut self, sources: Vec<Range<usize>>) -> bool {
        let block = self.block_size;
        let middle = self.model.len() / block / 2;
        let total: usize = sources.iter().map(ExactSizeIterator::len).sum();
        let place = self.random.usize(0..=middle - total);
        let (from, to) = match self.random.bool() {
            true => (0, middle + place),
            false => (middle, place),
        };
        let sources: Vec<Range<usize>> = sources
            .into_iter()
            .map(|source| (from + source.start) * block..(from + source.end) * block)
            .collect();
        self.copy(&sources, to * block).await
    }

    /// Whether the controller can.
    async fn copy(&mut self, sources: &[Range<usize>], to: usize) -> bool {
        let bytes: Vec<_> = sources
            .iter()
            .map(|source| source.start as u64..source.end as u64)
            .collect();
        match self.namespace.copy(&bytes, to as u64).await {
            Ok(()) => {}
            Err(Error::Unsupported { .. }) => return false,
            Err(error) => panic!("copy of {sources:?} to {to}: {error}"),
        }
        let data: Vec<u8> = sources
            .iter()
            .flat_map(|source| &self.model[source.clone()])
            .copied()
            .collect();
        self.model[to..to + data.len()].copy_from_slice(&data);
        let len = (data.len() + self.block_size).min(self.model.len() - to);
        self.check(ReadForm::Bytes, to as u64, len).await;
        true
    }
}
