//! Plans of faults, as a user writes them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nvme_async::nvme_soft::fault::Plan;

fuzz_target!(|text: &str| {
    match text.parse::<Plan>() {
        Ok(plan) => {
            let written = plan.to_string();
            let again: Plan = written.parse().expect("it can read what it writes");
            assert_eq!(again, plan, "{written}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
