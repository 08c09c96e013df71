//! Recovery in virtual time: the machine by itself, and the real queue pairs, engine and supervisor
//! against a model of a controller, over many histories that a seed decides.

mod coverage;
mod disk;
mod faults;
mod host;
mod machine;
mod memory;
mod model;
mod runs;
mod sim;
