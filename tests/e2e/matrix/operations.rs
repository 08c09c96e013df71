//! Every kind of command, as an operation on blocks of its own.

use futures::future::LocalBoxFuture;
use nvme_async::{Controller, DmaBuf, Error, LocalNamespace, Namespace, Zeroes};
use nvme_soft::fault::Opcode;
use nvme_spec::opcode::{AdminOpcode, NvmOpcode};
use std::time::Duration;

use super::oracle::{BLOCK, Layout};
use crate::support::owners::Ledger;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    ReadInto,
    Write,
    WriteFua,
    Repeatable,
    Flush,
    WriteZeroes,
    Discard,
    Compare,
    Verify,
    Copy,
    Identify,
    Log,
}

impl Kind {
    pub(super) const ALL: [Self; 13] = [
        Self::Read,
        Self::ReadInto,
        Self::Write,
        Self::WriteFua,
        Self::Repeatable,
        Self::Flush,
        Self::WriteZeroes,
        Self::Discard,
        Self::Compare,
        Self::Verify,
        Self::Copy,
        Self::Identify,
        Self::Log,
    ];

    /// The command that is struck.
    pub(super) fn opcode(self) -> Opcode {
        match self {
            Self::Read | Self::ReadInto => NvmOpcode::READ.into(),
            Self::Write | Self::WriteFua | Self::Repeatable => NvmOpcode::WRITE.into(),
            Self::Flush => NvmOpcode::FLUSH.into(),
            Self::WriteZeroes => NvmOpcode::WRITE_ZEROES.into(),
            Self::Discard => NvmOpcode::DATASET_MANAGEMENT.into(),
            Self::Compare => NvmOpcode::COMPARE.into(),
            Self::Verify => NvmOpcode::VERIFY.into(),
            Self::Copy => NvmOpcode::COPY.into(),
            Self::Identify => AdminOpcode::IDENTIFY.into(),
            Self::Log => AdminOpcode::GET_LOG_PAGE.into(),
        }
    }

    pub(super) fn is_admin(self) -> bool {
        matches!(self, Self::Identify | Self::Log)
    }

    pub(super) fn reads_data(self) -> bool {
        matches!(
            self,
            Self::Read | Self::ReadInto | Self::Identify | Self::Log
        )
    }

    pub(super) fn has_data(self) -> bool {
        !matches!(self, Self::Flush | Self::WriteZeroes | Self::Verify)
    }

    pub(super) fn changes_blocks(self) -> bool {
        matches!(
            self,
            Self::Write
                | Self::WriteFua
                | Self::Repeatable
                | Self::WriteZeroes
                | Self::Discard
                | Self::Copy
        )
    }

    /// Whether what was acknowledged outlasts a loss of power.
    pub(super) fn is_durable(self) -> bool {
        self == Self::WriteFua
    }
}

/// What became of an operation.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) result: Result<(), Error>,
    /// What was read.
    pub(super) data: Option<Vec<u8>>,
}

/// A namespace of either type.
pub(super) trait Disk: Clone + 'static {
    fn controller(&self) -> Controller;

    /// Runs the operation on the blocks that `layout` has for it. Buffers are entered into `ledger`.
    fn run<'a>(
        &'a self,
        kind: Kind,
        layout: Layout,
        timeout: Duration,
        ledger: &'a Ledger,
    ) -> LocalBoxFuture<'a, Done>;

    fn read_all(&self, len: usize) -> LocalBoxFuture<'_, Result<Vec<u8>, Error>>;

    fn write_all(&self, data: Vec<u8>) -> LocalBoxFuture<'_, Result<(), Error>>;
}

fn plain(result: Result<(), Error>) -> Done {
    Done { result, data: None }
}

macro_rules! disk {
    ($type:ty, $controller:expr) => {
        impl Disk for $type {
            fn controller(&self) -> Controller {
                let controller: fn(&Self) -> Controller = $controller;
                controller(self)
            }

            fn run<'a>(
                &'a self,
                kind: Kind,
                layout: Layout,
                timeout: Duration,
                ledger: &'a Ledger,
            ) -> LocalBoxFuture<'a, Done> {
                Box::pin(async move {
                    let (offset, len) = (layout.offset(), layout.len());
                    match kind {
                        Kind::Read => match self.read(offset, len).timeout(timeout).await {
                            Ok(data) => Done {
                                result: Ok(()),
                                data: Some(data.to_vec()),
                            },
                            Err(error) => plain(Err(error)),
                        },
                        Kind::ReadInto => {
                            // From the pool or the heap, which is copied.
                            let buffer = match layout.index % 2 {
                                0 => self.allocate(len).expect("there is memory"),
                                _ => DmaBuf::heap(len),
                            };
                            match self.read_into(offset, buffer).timeout(timeout).await {
                                Ok(data) => Done {
                                    result: Ok(()),
                                    data: Some(data.to_vec()),
                                },
                                Err(failed) => {
                                    assert!(failed.buffer.is_some(), "{failed}: no buffer");
                                    plain(Err(failed.error))
                                }
                            }
                        }
                        Kind::Write | Kind::WriteFua | Kind::Repeatable => {
                            let buffer = ledger.bytes(len, layout.new);
                            let write = self.write(offset, buffer).timeout(timeout);
                            let written = match kind {
                                Kind::WriteFua => write.fua().await,
                                Kind::Repeatable => write.repeatable().await,
                                _ => write.await,
                            };
                            match written {
                                Ok(_) => plain(Ok(())),
                                Err(failed) => {
                                    assert!(failed.buffer.is_some(), "{failed}: no buffer");
                                    plain(Err(failed.error))
                                }
                            }
                        }
                        Kind::Flush => plain(self.flush().await),
                        Kind::WriteZeroes => {
                            let len = len as u64;
                            plain(self.write_zeroes(offset, len, Zeroes::default()).await)
                        }
                        Kind::Discard => {
                            let range = offset..offset + len as u64;
                            plain(self.discard(std::slice::from_ref(&range)).await)
                        }
                        Kind::Compare => {
                            let buffer = ledger.bytes(len, layout.old);
                            match self.compare(offset, buffer).timeout(timeout).await {
                                Ok(_) => plain(Ok(())),
                                Err(failed) => {
                                    assert!(failed.buffer.is_some(), "{failed}: no buffer");
                                    plain(Err(failed.error))
                                }
                            }
                        }
                        Kind::Verify => plain(self.verify(offset, len as u64).await),
                        Kind::Copy => {
                            let source = layout.source()..layout.source() + len as u64;
                            plain(self.copy(std::slice::from_ref(&source), offset).await)
                        }
                        Kind::Identify => plain(self.controller().namespace(1).await.map(drop)),
                        Kind::Log => plain(self.controller().smart_log().await.map(drop)),
                    }
                })
            }

            fn read_all(&self, len: usize) -> LocalBoxFuture<'_, Result<Vec<u8>, Error>> {
                Box::pin(async move { Ok(self.read(0, len).await?.to_vec()) })
            }

            fn write_all(&self, data: Vec<u8>) -> LocalBoxFuture<'_, Result<(), Error>> {
                Box::pin(async move {
                    self.write(0, data).await?;
                    self.flush().await
                })
            }
        }
    };
}

disk!(Namespace, |this| Namespace::controller(this).clone());
disk!(LocalNamespace, |this| this.shared().controller().clone());

/// The blocks of an operation lie apart from those of all others.
pub(super) const SPACING: u64 = 4 * BLOCK as u64;
