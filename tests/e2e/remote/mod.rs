//! Controllers in another process: the client of vfio-user, against servers with traps and lies.

mod blocking;
mod ends;
mod hostile;
mod io;
mod peer;
mod steps;
mod traps;

use std::time::Duration;

use nvme_async::device::vfio_user::VfioUserOptions;

/// Little patience, for servers that do not answer.
fn impatient() -> VfioUserOptions {
    let mut options = VfioUserOptions::default();
    options.connect_timeout = Duration::from_millis(100);
    options.reply_timeout = Duration::from_millis(100);
    options
}
