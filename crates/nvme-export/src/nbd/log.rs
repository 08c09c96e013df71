//! What is logged: clients can't fill the log.

use std::fmt;
use std::io;

use nvme_soft::LogLimit;

use super::connection::Ended;
use super::execute::Fault;

/// Logs each kind of event once in a while, with how many were left out.
#[derive(Debug, Default)]
pub(super) struct Log {
    faults: LogLimit,
    ended: LogLimit,
    turned_away: LogLimit,
    not_accepted: LogLimit,
}

impl Log {
    /// A request has failed.
    pub(super) fn fault(&self, fault: &Fault) {
        match fault {
            Fault::Device(error) => say(&self.faults, "a request has failed", error),
            Fault::Outside(error) => say(&self.faults, "a request has failed", error),
        }
    }

    /// A connection has ended in disorder.
    pub(super) fn ended(&self, ended: &Ended) {
        match ended {
            // Clients come and go.
            Ended::Io(error) => tracing::debug!(%error, "a connection has ended"),
            _ => say(&self.ended, "a connection has ended", ended),
        }
    }

    /// There are as many connections as there may be.
    pub(super) fn turned_away(&self) {
        say(
            &self.turned_away,
            "a client was turned away",
            &"all places are taken",
        );
    }

    /// The system does not give a connection.
    pub(super) fn not_accepted(&self, error: &io::Error) {
        say(&self.not_accepted, "accepting a connection", error);
    }
}

fn say(limit: &LogLimit, what: &'static str, error: &dyn fmt::Display) {
    if let Some(left_out) = limit.pass() {
        tracing::warn!(%error, left_out, "{what}");
    }
}
