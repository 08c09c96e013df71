//! What a user types: URLs, PCI addresses and sizes.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use nvme_async::{OpenOptions, parse_size};

/// The defaults ask the system for the number of its processors.
static DEFAULTS: LazyLock<OpenOptions> = LazyLock::new(OpenOptions::new);

fuzz_target!(|text: &str| {
    // Nothing is opened. What was understood, or not, is in the options.
    for options in [DEFAULTS.clone().url(text), DEFAULTS.clone().device(text)] {
        assert!(format!("{options:?}").starts_with("OpenOptions"));
    }
    if let Ok(size) = parse_size(text) {
        assert_eq!(parse_size(&size.to_string()), Ok(size));
        assert!(text.starts_with(|first: char| first.is_ascii_digit() || first == '+'));
    }
});
