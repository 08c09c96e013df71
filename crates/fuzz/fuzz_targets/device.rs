//! A controller that breaks the protocol in the ways that the input says, and a program that uses it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nvme_async_fuzz::program;
use nvme_async_fuzz::script::Script;

// Which errors there are is the device's choice; `run` panics at what must not be.
fuzz_target!(|script: Script| drop(program::run(&script)));
