//! Tests on a controller and a kernel that no one here wrote: QEMU's NVMe controllers behind an
//! IOMMU, reached through Debian's VFIO, as root inside of a virtual machine.
//!
//! `cargo xtask test` boots the machines (`crates/xtask/src/boots.rs`) and runs, in each, the tests
//! of the module that has its name, one at a time: they share the controllers. A test leaves each
//! controller bound to vfio-pci and closed.

#[path = "vm/faults/mod.rs"]
mod faults;
#[path = "vm/harness.rs"]
mod harness;
#[path = "vm/kernel.rs"]
mod kernel;
#[path = "vm/memory.rs"]
mod memory;
#[path = "vm/monitor.rs"]
mod monitor;
#[path = "vm/no_interrupt_remapping.rs"]
mod no_interrupt_remapping;
#[path = "vm/standard/mod.rs"]
mod standard;
#[path = "support/suite/mod.rs"]
mod suite;
