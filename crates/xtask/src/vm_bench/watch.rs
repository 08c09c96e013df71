//! What the guest tells of its runs, as it tells it.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::output::{self, Figures};
use super::plan::Run;

/// How one run ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Verdict {
    Measured(Figures),
    /// It did not end by itself.
    Hung,
    Failed(String),
}

/// A run that is over.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Finished {
    pub(super) run: Run,
    pub(super) verdict: Verdict,
}

/// All that the guest has told so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    /// Versions of what is measured.
    pub(super) notes: Vec<String>,
    pub(super) finished: Vec<Finished>,
}

/// Reads the lines of the guest's script, and prints a line for each run.
#[derive(Debug)]
pub(super) struct Watch<W> {
    sink: W,
    runs: Vec<Run>,
    line: Vec<u8>,
    /// When the run under way began, and what it has written.
    began: Instant,
    output: String,
    errors: String,
    told: Arc<Mutex<Told>>,
}

impl<W: Write> Watch<W> {
    pub(super) fn new(sink: W, runs: &[Run]) -> (Self, Arc<Mutex<Told>>) {
        let told = Arc::default();
        let watch = Self {
            sink,
            runs: runs.to_vec(),
            line: Vec::new(),
            began: Instant::now(),
            output: String::new(),
            errors: String::new(),
            told: Arc::clone(&told),
        };
        (watch, told)
    }

    fn take_line(&mut self) -> io::Result<()> {
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.line.clear();
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        match word {
            "" => {}
            "note" => {
                self.tell(|told| told.notes.push(rest.to_owned()));
                writeln!(self.sink, "{rest}")?;
            }
            "run" => {
                self.began = Instant::now();
                self.output.clear();
                self.errors.clear();
            }
            "out" => {
                self.output += rest;
                self.output.push('\n');
            }
            "err" => {
                self.errors += rest;
                self.errors.push('\n');
            }
            "ended" if let Some((number, status)) = numbers(rest) => self.end(number, status)?,
            _ => writeln!(self.sink, "{line}")?,
        }
        self.sink.flush()
    }

    fn end(&mut self, number: usize, status: i32) -> io::Result<()> {
        // A number that nobody gave leaves a run unfinished, which is noticed.
        let Some(&run) = self.runs.get(number) else {
            return Ok(());
        };
        let verdict = verdict(&run, status, &self.output, &self.errors);
        writeln!(
            self.sink,
            "{:>3} of {}, round {}: {:<13} {:<11} {}",
            number + 1,
            self.runs.len(),
            run.round,
            run.workload.to_string(),
            run.peer.name(),
            in_words(&verdict, self.began.elapsed()),
        )?;
        for line in self.errors.lines() {
            writeln!(self.sink, "    | {line}")?;
        }
        self.tell(|told| told.finished.push(Finished { run, verdict }));
        Ok(())
    }

    fn tell(&self, change: impl FnOnce(&mut Told)) {
        change(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl<W: Write> Write for Watch<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            match byte {
                b'\n' => self.take_line()?,
                _ => self.line.push(byte),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// Reads `NUMBER STATUS`.
fn numbers(text: &str) -> Option<(usize, i32)> {
    let (number, status) = text.split_once(' ')?;
    Some((number.parse().ok()?, status.parse().ok()?))
}

fn verdict(run: &Run, status: i32, output: &str, errors: &str) -> Verdict {
    match status {
        0 => match output::parse(run.peer, output) {
            Ok(figures) => Verdict::Measured(figures),
            Err(error) => Verdict::Failed(format!("{error:#}")),
        },
        // Of timeout(1), for what ended because it had to: by SIGTERM, by SIGKILL.
        124 | 137 => Verdict::Hung,
        _ => {
            let last = errors.lines().last().unwrap_or("it said nothing");
            Verdict::Failed(format!("exit status {status}: {last}"))
        }
    }
}

fn in_words(verdict: &Verdict, time: Duration) -> String {
    match verdict {
        Verdict::Measured(Figures { iops, latency, .. }) => {
            let latency = latency.map(|latency| {
                format!(
                    ", mean {:.0} µs, median {:.0} µs",
                    latency.mean / 1e3,
                    latency.median / 1e3
                )
            });
            format!("{iops:>6.0} IOPS{}", latency.unwrap_or_default())
        }
        Verdict::Hung => format!("HUNG, ended after {:.0} s", time.as_secs_f64()),
        Verdict::Failed(reason) => format!("FAILED: {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Plan;
    use super::*;

    fn told(text: &str) -> (Told, String) {
        let (mut watch, told) = Watch::new(Vec::new(), &Plan::new(3, 1).runs);
        for chunk in text.as_bytes().chunks(5) {
            watch.write_all(chunk).unwrap();
        }
        let told = told.lock().unwrap().clone();
        (told, String::from_utf8(watch.sink).unwrap())
    }

    #[test]
    fn runs_are_told_of_as_they_end() {
        // The first run by qemu-img is the 13th, of read requests one at a time.
        let (told, printed) = told(
            "note Linux 6.12\nrun 12\nout Sending 300 read requests, 4096 bytes each\nerr hm\n\
             out Run completed in 2.000 seconds.\nout \n\nended 12 0\nrun 13\n\nended 13 124\n\
             run 14\nerr first\nerr last\n\nended 14 1\nrun 15\n\nended 15 0\nwhat?\nended 99 0\n",
        );
        assert_eq!(told.notes, ["Linux 6.12"]);
        let verdicts: Vec<&Verdict> = told.finished.iter().map(|run| &run.verdict).collect();
        let [
            Verdict::Measured(figures),
            Verdict::Hung,
            Verdict::Failed(error),
            Verdict::Failed(_),
        ] = verdicts.as_slice()
        else {
            panic!("{verdicts:?}");
        };
        assert_eq!(figures.iops, 150.0);
        assert_eq!(error, "exit status 1: last");
        for expected in [
            " 13 of 22, round 1: randread QD1  qemu-img       150 IOPS\n    | hm\n",
            " 14 of 22, round 1: randread QD1  nvme-async  HUNG, ended after ",
            "FAILED: exit status 1: last\n    | first\n    | last\n",
            "\nwhat?\n",
        ] {
            assert!(printed.contains(expected), "{expected} in {printed}");
        }
    }
}
