//! The queue core against a device that behaves, and one that does not.

mod behaviour;
mod data_pointer;
pub(crate) mod device;
mod lies;
mod pair;
mod random;
