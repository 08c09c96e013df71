//! An NBD server: [`Export`](crate::Export)s as network block devices.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use nvme_export::{Export, nbd};
//!
//! let namespace = nvme_async::open("mem:?size=16M").await?;
//! let exports = vec![("disk".to_owned(), Export::new(namespace.clone())?)];
//! let server = nbd::Server::new(exports, nbd::Options::default())?;
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
//! let serving = tokio::spawn(async move {
//!     let stopped = async { drop(stopped.await) };
//!     server.run(listener.into(), stopped).await
//! });
//! // Clients come and go; then:
//! drop(stop);
//! serving.await??;
//! namespace.controller().shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What there is of the protocol
//!
//! Written from the [protocol's document](https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).
//!
//! | part | |
//! | --- | --- |
//! | handshake | fixed newstyle, `NO_ZEROES` |
//! | options | `EXPORT_NAME`, `ABORT`, `LIST`, `STARTTLS`, `INFO`, `GO`, `STRUCTURED_REPLY`, `LIST_META_CONTEXT`, `SET_META_CONTEXT`; others get `ERR_UNSUP` |
//! | information | `EXPORT`, `NAME`, `BLOCK_SIZE`, which is told also to clients that do not ask |
//! | commands | `READ`, `WRITE`, `DISC`, `FLUSH`, `TRIM` (where the controller has Dataset Management), `CACHE`, `WRITE_ZEROES`, `BLOCK_STATUS` |
//! | flags of commands | `FUA`, `NO_HOLE`, `DF`, `REQ_ONE` |
//! | replies | simple ones, and structured ones of one chunk each: data, a hole for a read of nothing but zeroes, an extent, an error with its offset where that is known |
//!
//! Not there: oldstyle negotiation, extended headers, `RESIZE`, `FAST_ZERO` (it is not offered, and refused).
//!
//! * **Block sizes.** The minimum is the logical block size of the namespace. What is no multiple of it gets
//!   `EINVAL`, whether the client asked for the minimum or not: a partial write would be a read, a change and
//!   a write, during which another connection may write the same block. The maximum is
//!   [`Options::max_request`]; a longer write ends the connection.
//! * **Block status.** `base:allocation` says that everything is allocated. NVMe can tell what is deallocated
//!   only by Get LBA Status, which the driver does not use.
//! * **`CACHE`** succeeds and does nothing: there is no cache but the device's.
//! * **Order and durability.** Requests are executed as they come, many at a time, and answered in the order
//!   in which the device completes them. A flush covers every write of every connection that was answered
//!   before: the device has the only cache, so several connections may be used (`CAN_MULTI_CONN`).
//! * **Copies.** The data of a write is received to where the device reads it, but for its first bytes, of
//!   which up to 4 KiB were received together with the request. A read is sent from where the device put it.
//!   Only when the pool of the driver is used up, and by TLS, which encrypts, data is copied.
//! * **Limits.** [`Options`] bounds connections, and requests and bytes of each; connections that share a queue pair
//!   of the controller have a [fair share](crate#several-at-one-controller) of it. Where a bound is reached
//!   nothing more is received until a reply was sent: a client that takes no replies has only itself waiting.
//! * **Errors** are `EIO`, `ENOSPC`, `EINVAL`, `EPERM`, `ENOMEM`, `ESHUTDOWN` or, for a read with `DF` that
//!   is too long, `EOVERFLOW`. What people are told with them is a status of NVMe, never what files and
//!   devices of the server are called.
//! * **TLS** is required of all clients if there is any. Without it a server listens only where nobody can
//!   listen in on it, if not told [otherwise](Options::allow_plaintext).

mod connection;
mod execute;
mod log;
pub mod protocol;
mod server;
mod tls;

pub use self::server::{Listener, Options, Server, ServerError};
pub use self::tls::{Tls, TlsError};
