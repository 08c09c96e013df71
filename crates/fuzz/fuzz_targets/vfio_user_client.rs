//! A vfio-user server that answers what the input says, sends messages of its own, and goes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nvme_async_fuzz::server::{Script, run};

// Which errors there are is the server's choice; `run` panics at what must not be.
fuzz_target!(|script: Script| run(&script));
