//! Faults as data: which commands or events they strike, and what the controller then does.
//!
//! A [`Fault`] is a match ([`Fault::when`]) and a behaviour ([`Fault::then`]). Faults are given to a
//! controller in [`Config::faults`](crate::Config::faults), at run time by
//! [`SoftController::inject`](crate::SoftController::inject), or in a file, which is a [`Plan`] in
//! TOML. How often each kind struck is counted
//! ([`SoftController::faults_hit`](crate::SoftController::faults_hit)), and each strike is a
//! `tracing` event of level debug.
//!
//! A command is struck by at most one fault: the first of those injected that matches and has
//! strikes left. In everything else the controller stays an honest one: a command that never
//! completes is outstanding until its queue is deleted or the controller reset, Abort finds commands
//! that wait, and a controller that is disabled, reset or forbidden to be bus master does not access
//! host memory.
//!
//! # Plans
//!
//! ```toml
#![doc = include_str!("../../examples/faults.toml")]
//! ```
//!
//! Each `[[fault]]` has the tables `when` (may be left out) and `then`. Keys of `when`, all optional:
//!
//! | key | value | matches |
//! | --- | --- | --- |
//! | `queue` | `"admin"`, `"io"` or an identifier | commands of that submission queue |
//! | `opcode` | a name of the specification in lower case with hyphens, such as `"write-zeroes"` or `"get-log-page"`, or a number | commands with that opcode; a name also says which kind of queue |
//! | `nsid` | a namespace identifier | commands for that namespace |
//! | `lba` | `{ start = 8, end = 16 }`, the end not included | reads, writes, compares, verifies and write zeroes that overlap these logical blocks, and copies whose first destination block is one of them |
//! | `nth` | a number from 1, default 1 | the nth command (or event) of those that the other keys select, and those after it |
//! | `times` | a number, default 1; 0 or `"always"` for ever | this many |
//! | `probability` | 0.0 to 1.0 | each only with that probability |
//! | `seed` | a number, default 0 | with `probability`, which ones |
//!
//! Times are texts such as `"80us"`, `"5ms"` or `"2s"`. `then` has one of these keys; one
//! without a value is a text: `then = "hold"`.
//!
//! | key | value | what happens to the command |
//! | --- | --- | --- |
//! | `delay` | a time | it is served that much later |
//! | `swallow` | `{ execute = false }` | it never completes, its work is done or not; an Abort does not abort it |
//! | `hold` | | it waits for an Abort, which aborts it |
//! | `complete-twice` | a time | it completes, and again that much later |
//! | `out-of-order` | a number from 1 | it is served after that many later completions of its queue |
//! | `complete-early` | a time | it completes, and its data moves that much later |
//! | `status` | `{ sct, sc, dnr, crd, more, execute }`, numbers and booleans, all but `sc` may be left out | it completes with that status, and its work is done before or not at all |
//! | `corrupt-completion` | `{ field = "cid", change = { xor = 1 } }`; fields `cid`, `sq-id`, `sq-head`, `phase`, `result`; changes `xor` and `set` | its completion queue entry has another value in that field |
//! | `flip-phase` | | its entry is written, taken back by its phase, and written again |
//! | `corrupt-data` | `{ offset = 0, bytes = [0xff] }` | these bytes of its data for the host are others |
//! | `truncate-data` | a number of bytes | no more than that of its data reaches the host, and it succeeds |
//! | `lose-interrupt` | | its completion raises no interrupt |
//! | `spurious-interrupt` | | its completion queue's interrupt is raised when it is fetched |
//! | `tear` | `{ blocks = { first = 3 }, then = "swallow" }`; blocks `first` and `random` (a seed); then `"swallow"`, `{ power-loss = … }` and `{ status = … }` | of a write, write zeroes or copy only some logical blocks are written, each as a whole |
//! | `power-loss` | what is lost: `"all"`, `"nothing"` or `{ random = 7 }` (a seed) | it vanishes with all others in flight; what is acknowledged and not durable is lost; the controller is disabled (CC and CSTS are 0) |
//! | `fail` | `{ serve = false }` | CSTS.CFS is set; the controller may go on serving |
//! | `vanish` | as for `power-loss` | the function is gone: registers read as all ones, and nothing has an effect |
//! | `change-namespace` | `{ resize = { nsid, bytes } }`, `{ format = { nsid, lba-size } }`, `{ detach = { nsid } }` or `{ attach = { nsid } }` | it is served after that change |
//! | `add-namespace` | `{ bytes, lba-size = 512 }` | it is served after a namespace in memory was added; [`Config::max_namespaces`](crate::Config::max_namespaces) must allow that |
//!
//! These strike without a command, so that of `when` only `nth`, `times`, `probability` and `seed` are
//! allowed:
//!
//! | key | value | what happens |
//! | --- | --- | --- |
//! | `refuse-enable` | `"never-ready"` or `"fail"` | setting CC.EN leads to nothing, or to CSTS.CFS |
//! | `slow-ready` | a time | CSTS.RDY is set that much after CC.EN |
//! | `hang-disable` | | clearing CC.EN has no effect: the controller goes on |
//! | `fail-reset` | | a function reset has no effect, and an error says so |
//! | `hang-shutdown` | | CSTS.SHST stays "occurring", nothing is flushed and no more served |

mod behaviour;
mod matching;
mod plan;
pub(crate) mod strike;
mod text;

use serde::{Deserialize, Serialize};

pub(crate) use behaviour::FaultEvent;
pub use behaviour::{
    Behaviour, Change, CompletionField, EnableRefusal, FaultKind, FaultStatus, Loss, TornBlocks,
    TornEnd,
};
pub use matching::{FaultQueue, Match, Opcode, Times};
pub use plan::{Plan, PlanError};
pub use text::parse_duration;

/// What is struck, and what then happens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The commands or events that it strikes.
    #[serde(default, skip_serializing_if = "Match::is_default")]
    pub when: Match,
    /// What the controller does.
    pub then: Behaviour,
}

/// A fault that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// The behaviour strikes without a command, and the match asks for one.
    #[error("{kind} strikes no command, so {key} matches nothing")]
    NoCommand {
        /// What strikes.
        kind: FaultKind,
        /// The key of the match.
        key: &'static str,
    },
    /// A number is out of its range.
    #[error("{key}: not within {allowed}")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// What would be accepted.
        allowed: &'static str,
    },
}

impl Fault {
    /// A fault that strikes the first command or event that it can; the methods below narrow that
    /// down.
    pub fn new(then: Behaviour) -> Self {
        Self {
            when: Match::default(),
            then,
        }
    }

    /// Strikes only commands of this submission queue.
    pub fn queue(mut self, queue: FaultQueue) -> Self {
        self.when.queue = Some(queue);
        self
    }

    /// Strikes only commands with this opcode.
    pub fn opcode(mut self, opcode: impl Into<Opcode>) -> Self {
        self.when.opcode = Some(opcode.into());
        self
    }

    /// Strikes only commands for this namespace.
    pub fn namespace(mut self, nsid: u32) -> Self {
        self.when.nsid = Some(nsid);
        self
    }

    /// Strikes only commands whose range of logical blocks overlaps this one.
    pub fn blocks(mut self, blocks: std::ops::Range<u64>) -> Self {
        self.when.lba = Some(blocks);
        self
    }

    /// Strikes from the nth of the matching commands or events on, counted from 1.
    pub fn nth(mut self, nth: u64) -> Self {
        self.when.nth = nth;
        self
    }

    /// Strikes that often; 0 stands for always.
    pub fn times(mut self, times: u64) -> Self {
        self.when.times = Times::from(times);
        self
    }

    /// Strikes each matching command or event with this probability; `seed` says which ones.
    pub fn probability(mut self, probability: f64, seed: u64) -> Self {
        self.when.probability = Some(probability);
        self.when.seed = seed;
        self
    }

    /// Whether it makes sense. [`SoftController::inject`](crate::SoftController::inject) and
    /// [`Plan`] check it too.
    ///
    /// # Errors
    ///
    /// [`FaultError`] that names the key.
    pub fn check(&self) -> Result<(), FaultError> {
        let out_of_range = |key, allowed| Err(FaultError::OutOfRange { key, allowed });
        if self.then.event().is_some()
            && let Some(key) = self.when.command_key()
        {
            return Err(FaultError::NoCommand {
                kind: self.then.kind(),
                key,
            });
        }
        if self.when.nth == 0 {
            return out_of_range("nth", "1 and above");
        }
        if self
            .when
            .probability
            .is_some_and(|probability| !(0.0..=1.0).contains(&probability))
        {
            return out_of_range("probability", "0.0..=1.0");
        }
        if self
            .when
            .lba
            .as_ref()
            .is_some_and(std::ops::Range::is_empty)
        {
            return out_of_range("lba", "start < end");
        }
        self.then.check()
    }
}
