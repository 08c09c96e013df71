//! What the fuzz targets share: a controller that misbehaves as its input says, a program that uses
//! it, and a clock that nobody waits for.

pub mod clock;
pub mod device;
pub mod program;
pub mod script;
