//! Drives the controller as a host does: registers, queues in plain memory, doorbells.

mod admin_commands;
mod background;
mod checks;
mod coalescing;
mod copies;
mod data;
mod doorbell_buffers;
mod events;
mod faults;
mod host;
mod io;
mod lifecycle;
mod medium;
mod model;
mod namespaces;
mod plans;
mod polled;
mod power;
mod queues;
