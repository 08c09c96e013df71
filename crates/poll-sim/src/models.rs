//! Policies of others, as far as this simulator can tell them apart.
//!
//! Those of QEMU are written after descriptions of their rules, not after their text. They learn from
//! every wait, whatever ended it. An iteration that finds something at once is a wait of no length,
//! which matters to that of 2026 only.

mod fixed;
mod hybrid;
mod kvm;
mod qemu_2016;
mod qemu_2025;
mod qemu_2026;

pub(crate) use self::fixed::{Fixed, Interrupt, Oracle, Polling};
pub(crate) use self::hybrid::Hybrid;
pub(crate) use self::kvm::Kvm;
pub(crate) use self::qemu_2016::Qemu2016;
pub(crate) use self::qemu_2025::Qemu2025;
pub(crate) use self::qemu_2026::Qemu2026;

/// What the tests of all models tell them.
#[cfg(test)]
mod events {
    use crate::policy::{Kind, Nanos, Situation, Waited};

    /// Any time but zero, which a model might take for the beginning.
    const NOW: Nanos = 7_000_000;

    pub(crate) fn situation(outstanding: usize) -> Situation {
        Situation {
            now: NOW,
            outstanding,
            kind: Kind::Read,
            last_progress: NOW,
            next_completion: None,
        }
    }

    /// The device ends a sleep that has taken so long, with the poll before it.
    pub(crate) fn device(block: Nanos) -> Waited {
        Waited {
            began: NOW,
            ended: NOW + block,
            polled: false,
            device: true,
            other: false,
        }
    }

    /// Something else does.
    pub(crate) fn other(block: Nanos) -> Waited {
        Waited {
            device: false,
            other: true,
            ..device(block)
        }
    }

    /// Both are there.
    pub(crate) fn both(block: Nanos) -> Waited {
        Waited {
            other: true,
            ..device(block)
        }
    }

    /// It is found by polling.
    pub(crate) fn polled(wait: Waited) -> Waited {
        Waited {
            polled: true,
            ..wait
        }
    }
}
