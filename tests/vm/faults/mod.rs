//! Controllers whose media fail and stall, that fail themselves, that lose namespaces, and that are
//! pulled out: each while commands are outstanding.

mod drive;
mod failure;
mod load;
mod media;
mod namespaces;
mod registers;
mod removal;
mod slot;
mod stalls;

use nvme_async::Error;

/// Whether an operation may fail so because its command was late or its controller was reset.
fn is_of_recovery(error: &Error) -> bool {
    matches!(error, Error::TimedOut { .. } | Error::Reset { .. })
}
