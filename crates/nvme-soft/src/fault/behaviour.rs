//! What the controller does when a fault strikes.

use std::fmt;
use std::time::Duration;

use nvme_spec::Status;
use serde::{Deserialize, Serialize};

use super::{FaultError, text};
use crate::NamespaceChange;

/// What the controller does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Behaviour {
    /// The command is served that much later. Until then Abort aborts it.
    Delay(#[serde(with = "text::duration")] Duration),
    /// The command never completes, and Abort does not abort it. It is outstanding until its queue
    /// is deleted, the controller is reset or
    /// [`SoftController::release_stuck`](crate::SoftController::release_stuck).
    Swallow {
        /// Whether its work is done. If not, that is left to `release_stuck`.
        #[serde(default)]
        execute: bool,
    },
    /// The command waits for its Abort, or `release_stuck`. Unlike with
    /// [`SoftController::hold`](crate::SoftController::hold) it was fetched, and others are served.
    Hold,
    /// The command completes, and completes again that much later.
    CompleteTwice(#[serde(with = "text::duration")] Duration),
    /// The command is served after that many later completions of its submission queue, at least 1.
    OutOfOrder(u32),
    /// The command completes successfully, and its data moves that much later. Strikes commands that
    /// have data.
    CompleteEarly(#[serde(with = "text::duration")] Duration),
    /// The command completes with a status.
    Status(FaultStatus),
    /// A field of the completion queue entry is changed.
    CorruptCompletion {
        /// The field.
        field: CompletionField,
        /// What it becomes.
        change: Change,
    },
    /// The completion queue entry is written, its phase taken back, and written again, before the
    /// interrupt.
    FlipPhase,
    /// Bytes of the command's data for the host are replaced. Strikes commands with such data.
    CorruptData {
        /// Of the first byte, from the beginning of the data.
        offset: u64,
        /// What is there instead.
        bytes: Vec<u8>,
    },
    /// Only that many bytes of the command's data are written to the host, and it succeeds. Strikes
    /// commands with such data.
    TruncateData(u64),
    /// The command's completion raises no interrupt. One of another completion that is posted along
    /// with it still does.
    LoseInterrupt,
    /// The interrupt of the command's completion queue is raised when the command is fetched.
    SpuriousInterrupt,
    /// Only some logical blocks are written, and the others keep what they had. Strikes Write, Write
    /// Zeroes and Copy.
    Tear {
        /// Which ones are written.
        blocks: TornBlocks,
        /// What then becomes of the command.
        then: TornEnd,
    },
    /// The power fails and is back at once: see
    /// [`SoftController::power_loss`](crate::SoftController::power_loss).
    PowerLoss(Loss),
    /// CSTS.CFS is set, and the command does not complete, unless the controller goes on serving.
    Fail {
        /// Whether commands are served all the same.
        #[serde(default)]
        serve: bool,
    },
    /// The function is gone: see [`SoftController::vanish`](crate::SoftController::vanish).
    Vanish(Loss),
    /// A namespace is changed before the command is served, as by
    /// [`SoftController::change_namespace`](crate::SoftController::change_namespace). What is not
    /// possible is a `tracing` warning.
    ChangeNamespace(NamespaceChange),
    /// A namespace is added before the command is served, in memory, as by
    /// [`SoftController::add_namespace`](crate::SoftController::add_namespace). What is not possible
    /// is a `tracing` warning.
    AddNamespace {
        /// Its size in bytes.
        bytes: u64,
        /// The size of a logical block in bytes: 512 or 4096.
        #[serde(rename = "lba-size", default = "usual_lba_size")]
        lba_size: u32,
    },
    /// Setting CC.EN does not lead to CSTS.RDY.
    RefuseEnable(EnableRefusal),
    /// CSTS.RDY is set that much after CC.EN.
    SlowReady(#[serde(with = "text::duration")] Duration),
    /// Clearing CC.EN has no effect: CSTS.RDY stays set, commands are served and host memory is
    /// accessed.
    HangDisable,
    /// A function reset has no effect.
    FailReset,
    /// A shutdown does not complete. No more commands are served and nothing is flushed.
    HangShutdown,
}

fn usual_lba_size() -> u32 {
    512
}

/// A status that a command completes with (base specification 2.0, section 3.3.3.2.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultStatus {
    /// Status Code Type, 0 to 7.
    #[serde(default)]
    pub sct: u8,
    /// Status Code. 0 of type 0 is success.
    pub sc: u8,
    /// Do Not Retry.
    #[serde(default)]
    pub dnr: bool,
    /// Command Retry Delay, 0 to 3.
    #[serde(default)]
    pub crd: u8,
    /// More.
    #[serde(default)]
    pub more: bool,
    /// Whether the command's work is done before. Whether that succeeds is not reported.
    #[serde(default)]
    pub execute: bool,
}

impl FaultStatus {
    /// The status of a command whose work is not done.
    pub fn new(status: Status) -> Self {
        Self {
            sct: status.code_type_bits(),
            sc: status.code(),
            dnr: status.dnr(),
            crd: status.crd(),
            more: status.more(),
            execute: false,
        }
    }

    /// The status of a command whose work is done before.
    pub fn after_execution(status: Status) -> Self {
        Self {
            execute: true,
            ..Self::new(status)
        }
    }

    /// As it is on the wire.
    pub fn status(&self) -> Status {
        Status::new(self.sct, self.sc)
            .with_dnr(self.dnr)
            .with_crd(self.crd)
            .with_more(self.more)
    }

    fn check(&self) -> Result<(), FaultError> {
        let (key, allowed) = if self.sct > 7 {
            ("sct", "0..=7")
        } else if self.crd > 3 {
            ("crd", "0..=3")
        } else {
            return Ok(());
        };
        Err(FaultError::OutOfRange { key, allowed })
    }
}

/// A field of a completion queue entry (base specification 2.0, section 3.3.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompletionField {
    /// CID, 16 bits.
    Cid,
    /// SQID, 16 bits.
    SqId,
    /// SQHD, 16 bits.
    SqHead,
    /// The phase tag, 1 bit. The host does not see an entry with the wrong one, nor those after it.
    Phase,
    /// Dword 0, 32 bits.
    Result,
}

/// What becomes of a field. Bits that it does not have are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// These bits are the opposite.
    Xor(u32),
    /// It has this value.
    Set(u32),
}

impl Change {
    pub(crate) fn apply(self, value: u32) -> u32 {
        match self {
            Self::Xor(bits) => value ^ bits,
            Self::Set(value) => value,
        }
    }
}

/// The logical blocks of a torn write that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TornBlocks {
    /// That many from the first one on.
    First(u32),
    /// Each or not by chance, which this seed decides.
    Random(u64),
}

/// What becomes of a command whose write was torn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TornEnd {
    /// It never completes, as with [`Behaviour::Swallow`].
    Swallow,
    /// The power fails.
    PowerLoss(Loss),
    /// It completes with a status. [`FaultStatus::execute`] has no meaning.
    Status(FaultStatus),
}

/// Which of the logical blocks that were written and not made durable are lost with the power.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// None: the cache got to the media in time.
    Nothing,
    /// All: each has again what it had when it was durable last.
    All,
    /// Each or not by chance, which this seed decides.
    Random(u64),
}

/// How an enable is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EnableRefusal {
    /// CSTS.RDY stays clear.
    NeverReady,
    /// CSTS.CFS is set.
    Fail,
}

/// What, other than a command, a fault may strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultEvent {
    /// CC.EN is set.
    Enable,
    /// CC.EN is cleared.
    Disable,
    /// A function reset.
    Reset,
    /// CC.SHN is written.
    Shutdown,
}

macro_rules! kinds {
    ($($kind:ident $name:literal $pattern:pat,)*) => {
        /// A [`Behaviour`] without its parameters.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum FaultKind {
            $(
                #[doc = concat!("[`Behaviour::", stringify!($kind), "`].")]
                $kind,
            )*
        }

        impl FaultKind {
            /// Every kind there is.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$kind),*];

            /// The key in a [`Plan`](super::Plan).
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }
        }

        impl Behaviour {
            /// What kind of behaviour this is.
            pub fn kind(&self) -> FaultKind {
                match self {
                    $($pattern => FaultKind::$kind,)*
                }
            }
        }
    };
}

kinds! {
    Delay "delay" Self::Delay(_),
    Swallow "swallow" Self::Swallow { .. },
    Hold "hold" Self::Hold,
    CompleteTwice "complete-twice" Self::CompleteTwice(_),
    OutOfOrder "out-of-order" Self::OutOfOrder(_),
    CompleteEarly "complete-early" Self::CompleteEarly(_),
    Status "status" Self::Status(_),
    CorruptCompletion "corrupt-completion" Self::CorruptCompletion { .. },
    FlipPhase "flip-phase" Self::FlipPhase,
    CorruptData "corrupt-data" Self::CorruptData { .. },
    TruncateData "truncate-data" Self::TruncateData(_),
    LoseInterrupt "lose-interrupt" Self::LoseInterrupt,
    SpuriousInterrupt "spurious-interrupt" Self::SpuriousInterrupt,
    Tear "tear" Self::Tear { .. },
    PowerLoss "power-loss" Self::PowerLoss(_),
    Fail "fail" Self::Fail { .. },
    Vanish "vanish" Self::Vanish(_),
    ChangeNamespace "change-namespace" Self::ChangeNamespace(_),
    AddNamespace "add-namespace" Self::AddNamespace { .. },
    RefuseEnable "refuse-enable" Self::RefuseEnable(_),
    SlowReady "slow-ready" Self::SlowReady(_),
    HangDisable "hang-disable" Self::HangDisable,
    FailReset "fail-reset" Self::FailReset,
    HangShutdown "hang-shutdown" Self::HangShutdown,
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Behaviour {
    /// The event that it strikes, if it strikes no commands.
    pub(crate) fn event(&self) -> Option<FaultEvent> {
        match self {
            Self::RefuseEnable(_) | Self::SlowReady(_) => Some(FaultEvent::Enable),
            Self::HangDisable => Some(FaultEvent::Disable),
            Self::FailReset => Some(FaultEvent::Reset),
            Self::HangShutdown => Some(FaultEvent::Shutdown),
            _ => None,
        }
    }

    /// Whether it can only be done justice by keeping apart what is not durable.
    pub(crate) fn loses_unflushed(&self) -> bool {
        let loss = match self {
            Self::PowerLoss(loss) | Self::Vanish(loss) => *loss,
            Self::Tear {
                then: TornEnd::PowerLoss(loss),
                ..
            } => *loss,
            _ => Loss::Nothing,
        };
        loss != Loss::Nothing
    }

    pub(super) fn check(&self) -> Result<(), FaultError> {
        match self {
            Self::Status(status)
            | Self::Tear {
                then: TornEnd::Status(status),
                ..
            } => status.check(),
            Self::OutOfOrder(0) => Err(FaultError::OutOfRange {
                key: "out-of-order",
                allowed: "1 and above",
            }),
            Self::CorruptData { bytes, .. } if bytes.is_empty() => Err(FaultError::OutOfRange {
                key: "bytes",
                allowed: "one byte and more",
            }),
            _ => Ok(()),
        }
    }
}
