//! What all histories together must have had in them.

use std::collections::BTreeSet;

use super::faults::{Fault, FaultSet};
use crate::recovery::action::Place;

/// Every way from one place of the machine to another.
pub(super) const EDGES: &[(Place, Place)] = {
    use Place::*;
    &[
        (Live, Aborting),
        (Live, Disabling),
        (Live, Releasing),
        (Live, Ended),
        (Aborting, Live),
        (Aborting, Deleting),
        (Aborting, Disabling),
        (Aborting, Releasing),
        (Aborting, Ended),
        (Deleting, Creating),
        (Deleting, Disabling),
        (Deleting, Releasing),
        (Deleting, Ended),
        (Creating, Live),
        (Creating, Aborting),
        (Creating, Disabling),
        (Creating, Releasing),
        (Creating, Ended),
        (Disabling, Enabling),
        (Disabling, ResettingFunction),
        (Disabling, Releasing),
        (Disabling, Ended),
        (ResettingFunction, Enabling),
        (ResettingFunction, Ended),
        (Enabling, SettingUp),
        (Enabling, Disabling),
        (Enabling, ResettingFunction),
        (Enabling, Releasing),
        (Enabling, Ended),
        (SettingUp, Live),
        (SettingUp, Aborting),
        (SettingUp, Disabling),
        (SettingUp, ResettingFunction),
        (SettingUp, Releasing),
        (SettingUp, Ended),
        (Releasing, Ended),
    ]
};

/// What histories had in them.
#[derive(Default)]
pub(super) struct Coverage {
    edges: BTreeSet<(Place, Place)>,
    faults: FaultSet,
    pub(super) histories: u64,
    pub(super) operations: u64,
    /// Histories after which the controller worked.
    pub(super) live: u64,
    pub(super) resets: u64,
}

impl Coverage {
    pub(super) fn add(&mut self, trail: &[Place], faults: FaultSet) {
        let steps = trail.windows(2).map(|step| (step[0], step[1]));
        self.edges.extend(steps);
        self.faults |= faults;
        self.histories += 1;
        let resets = trail.iter().filter(|place| **place == Place::Disabling);
        self.resets += resets.count() as u64;
        self.live += u64::from(trail.last() != Some(&Place::Ended));
    }

    /// What is missing, and what there should not have been.
    pub(super) fn gaps(&self) -> Vec<String> {
        let missing = EDGES.iter().filter(|edge| !self.edges.contains(edge));
        let strange = self.edges.iter().filter(|edge| !EDGES.contains(edge));
        let unseen = Fault::ALL
            .iter()
            .filter(|fault| self.faults & fault.bit() == 0);
        missing
            .map(|(from, to)| format!("never from {from:?} to {to:?}"))
            .chain(strange.map(|(from, to)| format!("from {from:?} to {to:?}, which is no way")))
            .chain(unseen.map(|fault| format!("never {fault:?}")))
            .collect()
    }
}
