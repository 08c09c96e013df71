//! Serves clients that speak in messages, well or badly.

mod bad;
mod client;
mod good;
mod queues;
mod sockets;
mod stuck;
