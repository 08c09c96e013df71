//! Counts the tests that test programs say they ran.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// Sums of the lines `test result: ...`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
}

impl Tally {
    fn add(&mut self, line: &str) {
        let Some((_, result)) = line.split_once("test result: ") else {
            return;
        };
        for count in result.split([';', '.']) {
            match count.trim().split_once(' ') {
                Some((number, "passed")) => self.passed += number.parse().unwrap_or(0),
                Some((number, "failed")) => self.failed += number.parse().unwrap_or(0),
                Some((number, "ignored")) => self.ignored += number.parse().unwrap_or(0),
                _ => {}
            }
        }
    }
}

/// Passes output on and counts the results in it.
#[derive(Debug)]
pub(crate) struct Counting<W> {
    sink: W,
    line: Vec<u8>,
    tally: Arc<Mutex<Tally>>,
}

impl<W: Write> Counting<W> {
    pub(crate) fn new(sink: W) -> (Self, Arc<Mutex<Tally>>) {
        let tally = Arc::default();
        (
            Self {
                sink,
                line: Vec::new(),
                tally: Arc::clone(&tally),
            },
            tally,
        )
    }
}

/// The counts so far.
pub(crate) fn counts(tally: &Mutex<Tally>) -> Tally {
    *tally.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&self.line).into_owned();
                self.tally
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .add(&line);
                self.line.clear();
            } else {
                self.line.push(byte);
            }
        }
        self.sink.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_summed_over_programs() {
        let (mut counting, tally) = Counting::new(Vec::new());
        let output = "running 3 tests\ntest a ... ok\n\ntest result: ok. 2 passed; 0 failed; \
                      1 ignored; 0 measured; 4 filtered out; finished in 0.00s\n\
                      test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered \
                      out; finished in 1.50s\n";
        for chunk in output.as_bytes().chunks(7) {
            counting.write_all(chunk).unwrap();
        }
        assert_eq!(
            counts(&tally),
            Tally {
                passed: 5,
                failed: 2,
                ignored: 1
            }
        );
        assert_eq!(counting.sink, output.as_bytes());
    }
}
