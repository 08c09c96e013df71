//! The vhost-user-blk server, by a front end and a guest of the tests' own.

mod guest;
mod host;
mod hostile;
mod requests;
mod sessions;
mod sharing;
mod uml;
