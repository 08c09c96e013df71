//! Requests on a namespace, and what the protocol has to say of its errors.

use bytes::Bytes;
use nvme_async::nvme_spec::Status;
use nvme_async::{DmaBuf, Error, Zeroes};

use super::protocol::{Action, Errno};
use crate::{Export, OutOfExport};

/// Memory for `len` bytes to be written: of the driver's pool, so that the device finds them where they were
/// received, or of the heap where that is used up.
pub(super) fn buffer(export: &Export, len: u32) -> Result<DmaBuf, Error> {
    match export.namespace().allocate(len as usize) {
        Err(Error::Memory(_)) => Ok(DmaBuf::heap(len as usize)),
        result => result,
    }
}

/// Does what a client asks for. What it reads is returned; it is empty for other actions. `data` is for a
/// write.
pub(super) async fn execute(
    export: &Export,
    action: Action,
    data: Option<DmaBuf>,
) -> Result<Bytes, Fault> {
    let namespace = export.namespace();
    match action {
        Action::Read { offset, len } => {
            let offset = export.locate(offset, len.into())?;
            return Ok(namespace.read(offset, len as usize).await?);
        }
        Action::Write { offset, len, fua } => {
            let offset = export.locate(offset, len.into())?;
            // The driver refuses a write of nothing.
            let data = data.unwrap_or_else(|| DmaBuf::heap(0));
            let write = namespace.write(offset, data);
            let written = if fua { write.fua() } else { write };
            written.await.map_err(Error::from)?;
        }
        Action::Flush => namespace.flush().await?,
        Action::Trim { offset, len, fua } => {
            let start = export.locate(offset, len.into())?;
            let range = start..start + u64::from(len);
            namespace.discard(std::slice::from_ref(&range)).await?;
            if fua {
                namespace.flush().await?;
            }
        }
        Action::WriteZeroes {
            offset,
            len,
            may_deallocate,
            fua,
        } => {
            let offset = export.locate(offset, len.into())?;
            let zeroes = match may_deallocate {
                true => Zeroes::MayDeallocate,
                false => Zeroes::Allocated,
            };
            namespace.write_zeroes(offset, len.into(), zeroes).await?;
            if fua {
                namespace.flush().await?;
            }
        }
        Action::Cache | Action::BlockStatus { .. } | Action::Disconnect => {}
    }
    Ok(Bytes::new())
}

/// Why a request has failed.
#[derive(Debug)]
pub(super) enum Fault {
    Device(Error),
    Outside(OutOfExport),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Device(error)
    }
}

impl From<OutOfExport> for Fault {
    fn from(error: OutOfExport) -> Self {
        Self::Outside(error)
    }
}

impl Fault {
    /// What the client gets.
    pub(super) fn errno(&self) -> Errno {
        match self {
            Self::Device(error) => errno(error),
            Self::Outside(_) => Errno::Invalid,
        }
    }

    /// What people at the client are told: not what this machine's devices and files are called.
    pub(super) fn message(&self) -> &'static str {
        match self {
            Self::Device(error) => match status(error) {
                Some(status) => status.name(),
                None => match self.errno() {
                    Errno::Shutdown => "the server is about to end",
                    Errno::NoMemory => "the server has no memory for it",
                    _ => "the device has failed",
                },
            },
            Self::Outside(_) => "this is not inside of the export",
        }
    }

    /// Where in `export` it happened, in bytes, if that is known.
    pub(super) fn offset(&self, export: &Export) -> Option<u64> {
        let Self::Device(error) = self else {
            return None;
        };
        let first = match error {
            Error::Split(split) => split.failures().next()?.0.start,
            Error::Command(error) => error.command.blocks.as_ref()?.start,
            _ => return None,
        };
        let start = export.locate(0, 0).ok()?;
        first
            .checked_mul(export.block_size().into())?
            .checked_sub(start)
    }
}

/// The status of the command that failed, or of the first one that did.
fn status(error: &Error) -> Option<Status> {
    match error {
        Error::Command(error) => Some(error.status),
        Error::Split(split) => split.failures().find_map(|(_, error)| status(error)),
        _ => None,
    }
}

fn errno(error: &Error) -> Errno {
    match error {
        Error::Command(error) => errno_of_status(error.status),
        Error::Split(split) => split
            .failures()
            .next()
            .map_or(Errno::Io, |(_, error)| errno(error)),
        Error::Closed { .. } => Errno::Shutdown,
        // The namespace is smaller than when it was opened.
        Error::OutOfRange { .. } | Error::Unaligned { .. } | Error::Unsupported { .. } => {
            Errno::Invalid
        }
        Error::Memory(_) => Errno::NoMemory,
        _ => Errno::Io,
    }
}

fn errno_of_status(status: Status) -> Errno {
    match status.without_modifiers() {
        Status::CAPACITY_EXCEEDED => Errno::NoSpace,
        Status::WRITE_PROTECTED | Status::READ_ONLY_RANGE | Status::ACCESS_DENIED => {
            Errno::Permission
        }
        Status::INVALID_FIELD | Status::LBA_OUT_OF_RANGE | Status::INVALID_OPCODE => Errno::Invalid,
        _ => Errno::Io,
    }
}

#[cfg(test)]
mod tests {
    use nvme_async::Fate;

    use super::*;

    #[test]
    fn statuses() {
        for (status, errno) in [
            (Status::UNRECOVERED_READ_ERROR, Errno::Io),
            (Status::INTERNAL_ERROR, Errno::Io),
            (Status::CAPACITY_EXCEEDED, Errno::NoSpace),
            (Status::WRITE_PROTECTED, Errno::Permission),
            (Status::READ_ONLY_RANGE, Errno::Permission),
            (Status::LBA_OUT_OF_RANGE, Errno::Invalid),
        ] {
            let do_not_retry = Status::from_bits(status.to_bits() | 1 << 14);
            assert_eq!(errno_of_status(do_not_retry), errno);
        }
    }

    #[tokio::test]
    async fn errors_without_a_status() {
        let namespace = nvme_async::open("mem:?size=1M").await.expect("opens");
        let export = Export::new(namespace).expect("it is there");
        let fault = Fault::from(Error::Closed {
            address: "file:secret".to_owned(),
            fate: Fate::NotExecuted,
        });
        assert_eq!(
            (fault.errno(), fault.offset(&export)),
            (Errno::Shutdown, None)
        );
        assert_eq!(fault.message(), "the server is about to end");
        let outside = export.locate(1 << 20, 1).expect_err("outside");
        assert_eq!(Fault::from(outside).errno(), Errno::Invalid);
        let write = Action::Write {
            offset: 0,
            len: 512,
            fua: false,
        };
        let refused = execute(&export, write, None).await.expect_err("no data");
        assert_eq!(refused.errno(), Errno::Invalid);
    }
}
