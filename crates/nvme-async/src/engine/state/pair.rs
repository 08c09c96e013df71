//! Two queue pairs in the place of one: the one without an interrupt takes the commands that will be
//! polled for.
//!
//! Each is a queue pair for itself, to submissions, reapers and recovery. They share what waits depend
//! on: how many commands both have outstanding, and when one of both last completed one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use poll_window::{Kind, Situation};

use super::State;

/// One command of so many goes to a queue that would not be polled for it, to find out.
const PROBE: u32 = 64;

/// What two queue pairs know of each other. It may be a moment old.
struct Joint {
    in_flight: [AtomicUsize; 2],
    /// In nanoseconds since `base`.
    progress: AtomicU64,
    base: Instant,
}

/// A queue pair's part in a pair.
pub(super) struct Partner {
    joint: Arc<Joint>,
    /// Which one it is.
    side: usize,
    /// Commands in a row that were left to the other one.
    declined: u32,
}

impl Partner {
    fn others(&self) -> usize {
        self.joint.in_flight[1 - self.side].load(Ordering::Relaxed)
    }
}

impl State {
    /// Makes a pair of two queue pairs.
    pub(crate) fn pair(&mut self, polled: &mut Self) {
        let joint = Arc::new(Joint {
            in_flight: Default::default(),
            progress: AtomicU64::new(0),
            base: Instant::now(),
        });
        for (side, state) in [self, polled].into_iter().enumerate() {
            state.partner = Some(Partner {
                joint: joint.clone(),
                side,
                declined: 0,
            });
        }
    }

    /// Whether a command of this kind would be polled for, if it was submitted now to this queue, which
    /// has no interrupt. Now and then it is to be found out.
    pub(crate) fn expects(&mut self, kind: Kind) -> bool {
        let situation = Situation::new(self.in_flight() + self.others() + 1, kind);
        let polls = self.window.expects_poll(situation);
        let Some(partner) = &mut self.partner else {
            return polls;
        };
        if polls {
            partner.declined = 0;
            return true;
        }
        partner.declined = (partner.declined + 1) % PROBE;
        let probes = partner.declined == 0;
        if probes {
            self.window.probe();
        }
        probes
    }

    /// What those who wait for completions wait for.
    pub(super) fn situation(&self) -> Situation {
        self.core.situation(self.others())
    }

    /// How many commands the other one has outstanding.
    pub(super) fn others(&self) -> usize {
        self.partner.as_ref().map_or(0, Partner::others)
    }

    /// When a command was last completed, or submitted while none was outstanding.
    pub(super) fn progress(&self) -> Instant {
        self.partner.as_ref().map_or(self.last_progress, |partner| {
            let progress = partner.joint.progress.load(Ordering::Relaxed);
            partner.joint.base + Duration::from_nanos(progress)
        })
    }

    /// Tells the other one of a submission at `now`, the first one if this queue `was_idle`.
    #[inline]
    pub(super) fn tell_of_submission(&self, was_idle: bool, now: Instant) {
        if let Some(partner) = &self.partner {
            self.tell(partner, was_idle && partner.others() == 0, now);
        }
    }

    /// Tells the other one of completions at `now`.
    #[inline]
    pub(super) fn tell_of_completions(&self, now: Instant) {
        if let Some(partner) = &self.partner {
            self.tell(partner, true, now);
        }
    }

    #[inline(never)]
    fn tell(&self, Partner { joint, side, .. }: &Partner, progress: bool, now: Instant) {
        joint.in_flight[*side].store(self.in_flight(), Ordering::Relaxed);
        if progress {
            let since = now.saturating_duration_since(joint.base);
            let progress = since.as_nanos().min(u64::MAX.into()) as u64;
            joint.progress.fetch_max(progress, Ordering::Relaxed);
        }
    }
}
