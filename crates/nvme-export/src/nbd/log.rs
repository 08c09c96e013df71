//! What is logged: clients can't fill the log.

use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::connection::Ended;
use super::execute::Fault;

/// One line of each kind in this time.
const PERIOD: Duration = Duration::from_secs(10);

/// Logs each kind of event once in a while, with how many were left out.
#[derive(Debug, Default)]
pub(super) struct Log {
    kinds: Mutex<[Kind; 4]>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Kind {
    last: Option<Instant>,
    left_out: u64,
}

impl Log {
    /// A request has failed.
    pub(super) fn fault(&self, fault: &Fault) {
        match fault {
            Fault::Device(error) => self.say(0, "a request has failed", error),
            Fault::Outside(error) => self.say(0, "a request has failed", error),
        }
    }

    /// A connection has ended in disorder.
    pub(super) fn ended(&self, ended: &Ended) {
        match ended {
            // Clients come and go.
            Ended::Io(error) => tracing::debug!(%error, "a connection has ended"),
            _ => self.say(1, "a connection has ended", ended),
        }
    }

    /// There are as many connections as there may be.
    pub(super) fn turned_away(&self) {
        self.say(2, "a client was turned away", &"all places are taken");
    }

    /// The system does not give a connection.
    pub(super) fn not_accepted(&self, error: &io::Error) {
        self.say(3, "accepting a connection", error);
    }

    fn say(&self, kind: usize, what: &'static str, error: &dyn fmt::Display) {
        if let Some(left_out) = self.pass(kind) {
            tracing::warn!(%error, left_out, "{what}");
        }
    }

    /// How many of this kind were left out before this one, or nothing if it is too.
    fn pass(&self, kind: usize) -> Option<u64> {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = &mut kinds[kind];
        if kind.last.is_some_and(|last| last.elapsed() < PERIOD) {
            kind.left_out += 1;
            return None;
        }
        kind.last = Some(Instant::now());
        Some(std::mem::take(&mut kind.left_out))
    }
}
