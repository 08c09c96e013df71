//! Live lines on a terminal, and nothing of them elsewhere.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const TRANSFER: &str = "{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
const LINE: &str = "{msg}";

/// A line that says how far a transfer of `bytes` is.
pub(crate) fn transfer(what: &'static str, bytes: u64) -> ProgressBar {
    bar(Some(bytes), TRANSFER).with_message(what)
}

/// A line of free text.
pub(crate) fn line() -> ProgressBar {
    bar(None, LINE)
}

fn bar(length: Option<u64>, template: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(length, ProgressDrawTarget::stderr());
    // The templates are constants of this file, and valid: there is a test.
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_valid() {
        for template in [
            "{spinner} {msg}",
            "{msg} {wide_bar} {bytes}/{total_bytes} {eta}",
        ] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }
}
