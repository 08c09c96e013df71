//! What the suite needs of a namespace, by either of its handles.

use std::future::Future;
use std::ops::Range;

use bytes::Bytes;
use nvme_async::{
    Controller, DmaBuf, Error, IoError, LocalNamespace, Namespace, ReadBuffer, WriteBuffer, Zeroes,
};

/// A namespace by either of its handles.
pub(crate) trait Target {
    fn controller(&self) -> Controller;
    fn block_size(&self) -> usize;
    fn atomic_write_limit(&self) -> u64;
    fn allocate(&self, len: usize) -> DmaBuf;
    fn read(&self, offset: u64, len: usize) -> impl Future<Output = Result<Bytes, Error>>;
    fn read_into<B: ReadBuffer>(
        &self,
        offset: u64,
        buffer: B,
    ) -> impl Future<Output = Result<B, IoError<B>>>;
    fn send<B: WriteBuffer>(
        &self,
        offset: u64,
        buffer: B,
        how: How,
    ) -> impl Future<Output = Result<B, IoError<B>>>;
    fn flush(&self) -> impl Future<Output = Result<(), Error>>;
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        zeroes: Zeroes,
    ) -> impl Future<Output = Result<(), Error>>;
    fn discard(&self, ranges: &[Range<u64>]) -> impl Future<Output = Result<(), Error>>;
    fn verify(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), Error>>;
    fn copy(
        &self,
        sources: &[Range<u64>],
        destination_offset: u64,
    ) -> impl Future<Output = Result<(), Error>>;
    fn quiesce(&self) -> impl Future<Output = Result<(), Error>>;
}

/// What to do with a buffer that goes to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Plain,
    Fua,
    Atomic,
    /// Not to write it, but to compare.
    Compare,
}

macro_rules! target {
    ($handle:ty, $self:ident => $shared:expr) => {
        impl Target for $handle {
            fn controller(&$self) -> Controller {
                $shared.controller().clone()
            }

            fn block_size(&$self) -> usize {
                $self.block_size() as usize
            }

            fn atomic_write_limit(&$self) -> u64 {
                $shared.atomic_write_limit()
            }

            fn allocate(&$self, len: usize) -> DmaBuf {
                $self.allocate(len).expect("the pool has room")
            }

            async fn read(&$self, offset: u64, len: usize) -> Result<Bytes, Error> {
                $self.read(offset, len).await
            }

            async fn read_into<B: ReadBuffer>(
                &$self,
                offset: u64,
                buffer: B,
            ) -> Result<B, IoError<B>> {
                $self.read_into(offset, buffer).await
            }

            async fn send<B: WriteBuffer>(
                &$self,
                offset: u64,
                buffer: B,
                how: How,
            ) -> Result<B, IoError<B>> {
                match how {
                    How::Plain => $self.write(offset, buffer).await,
                    How::Fua => $self.write(offset, buffer).fua().await,
                    How::Atomic => $self.write(offset, buffer).atomic().await,
                    How::Compare => $self.compare(offset, buffer).await,
                }
            }

            async fn flush(&$self) -> Result<(), Error> {
                $self.flush().await
            }

            async fn write_zeroes(
                &$self,
                offset: u64,
                len: u64,
                zeroes: Zeroes,
            ) -> Result<(), Error> {
                $self.write_zeroes(offset, len, zeroes).await
            }

            async fn discard(&$self, ranges: &[Range<u64>]) -> Result<(), Error> {
                $self.discard(ranges).await
            }

            async fn verify(&$self, offset: u64, len: u64) -> Result<(), Error> {
                $self.verify(offset, len).await
            }

            async fn copy(
                &$self,
                sources: &[Range<u64>],
                destination_offset: u64,
            ) -> Result<(), Error> {
                $self.copy(sources, destination_offset).await
            }

            async fn quiesce(&$self) -> Result<(), Error> {
                $self.quiesce().await
            }
        }
    };
}

target!(Namespace, self => self);
target!(LocalNamespace, self => self.shared());
