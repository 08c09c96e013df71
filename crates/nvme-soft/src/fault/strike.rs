//! Faults that are injected and wait for what they strike.

use std::sync::Arc;

use nvme_spec::Sqe;
use nvme_spec::opcode::NvmOpcode;

use super::behaviour::FaultEvent;
use super::{Behaviour, Fault, Match};

/// All faults of a controller, those that have no strikes left included.
#[derive(Debug, Default)]
pub(crate) struct Armory(Vec<Armed>);

#[derive(Debug)]
struct Armed {
    when: Match,
    then: Arc<Behaviour>,
    /// Commands or events that matched so far.
    seen: u64,
    hits: u64,
    random: fastrand::Rng,
}

impl Armory {
    pub(crate) fn add(&mut self, fault: Fault) {
        self.0.push(Armed {
            random: fastrand::Rng::with_seed(fault.when.seed),
            when: fault.when,
            then: Arc::new(fault.then),
            seen: 0,
            hits: 0,
        });
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// What strikes this command.
    pub(crate) fn strike_command(
        &mut self,
        submission_queue: u16,
        command: &Sqe,
    ) -> Option<Arc<Behaviour>> {
        self.strike(|armed| {
            armed.then.can_strike(submission_queue, command)
                && armed.when.selects(submission_queue, command)
        })
    }

    /// What strikes this event.
    pub(crate) fn strike_event(&mut self, event: FaultEvent) -> Option<Arc<Behaviour>> {
        self.strike(|armed| armed.then.event() == Some(event))
    }

    /// All that match count it; the first that has its turn strikes.
    fn strike(&mut self, matches: impl Fn(&Armed) -> bool) -> Option<Arc<Behaviour>> {
        let mut strikes = None;
        for armed in self.0.iter_mut().filter(|armed| matches(armed)) {
            armed.seen += 1;
            if strikes.is_none() && armed.takes_its_turn() {
                armed.hits += 1;
                strikes = Some(armed.then.clone());
            }
        }
        strikes
    }
}

impl Armed {
    fn takes_its_turn(&mut self) -> bool {
        self.seen >= self.when.nth
            && self.when.times.is_left_after(self.hits)
            && self
                .when
                .probability
                .is_none_or(|probability| self.random.f64() < probability)
    }
}

impl Behaviour {
    /// Whether the command is of the kind that this can happen to.
    fn can_strike(&self, submission_queue: u16, command: &Sqe) -> bool {
        /// Bits 1:0 of an opcode say which ways its data goes (base specification 2.0, figure
        /// "Opcodes for Admin Commands").
        const FROM_HOST: u8 = 0b01;
        const TO_HOST: u8 = 0b10;
        match self {
            Self::CompleteEarly(_) => command.opcode() & (FROM_HOST | TO_HOST) != 0,
            Self::CorruptData { .. } | Self::TruncateData(_) => command.opcode() & TO_HOST != 0,
            Self::Tear { .. } => {
                let opcode = NvmOpcode(command.opcode());
                let writes = [NvmOpcode::WRITE, NvmOpcode::WRITE_ZEROES, NvmOpcode::COPY];
                submission_queue != 0 && writes.contains(&opcode)
            }
            _ => self.event().is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use nvme_spec::{admin, nvm};

    use super::*;
    use crate::fault::{FaultQueue, Loss, TornBlocks, TornEnd};

    /// Which of ten commands are struck.
    fn struck(fault: Fault, command: impl Fn(u64) -> (u16, Sqe)) -> Vec<u64> {
        let mut armory = Armory::default();
        armory.add(fault);
        (0..10)
            .filter(|&index| {
                let (queue, command) = command(index);
                armory.strike_command(queue, &command).is_some()
            })
            .collect()
    }

    fn read(index: u64) -> (u16, Sqe) {
        (1, nvm::read(1, index * 8, 8, false))
    }

    #[test]
    fn nth_and_times_choose_among_those_that_match() {
        let fault = || Fault::new(Behaviour::Hold);
        assert_eq!(struck(fault(), read), [0]);
        assert_eq!(struck(fault().nth(3), read), [2]);
        assert_eq!(struck(fault().nth(3).times(2), read), [2, 3]);
        assert_eq!(struck(fault().nth(9).times(0), read), [8, 9]);
        assert_eq!(struck(fault().blocks(15..17).times(0), read), [1, 2]);
        assert_eq!(struck(fault().blocks(16..17).times(0), read), [2]);
        let all = (0..10).collect::<Vec<_>>();
        assert_eq!(struck(fault().times(0), read), all);
        let few = struck(fault().times(0).probability(0.3, 1), read);
        assert!(!few.is_empty() && few.len() < 10, "{few:?}");
        assert_eq!(few, struck(fault().times(0).probability(0.3, 1), read));
    }

    #[test]
    fn commands_are_selected_by_each_key() {
        let mixed = |index: u64| match index {
            0 => (0, admin::identify_controller()),
            1 => (1, nvm::flush(1)),
            2 => (2, nvm::flush(2)),
            3 => (0, admin::delete_submission_queue(1)),
            _ => (3, nvm::write(1, 0, 1, false)),
        };
        let fault = || Fault::new(Behaviour::Hold).times(0);
        assert_eq!(struck(fault().queue(FaultQueue::Admin), mixed), [0, 3]);
        assert_eq!(struck(fault().queue(FaultQueue::Id(2)), mixed), [2]);
        assert_eq!(
            struck(fault().queue(FaultQueue::Io).times(2), mixed),
            [1, 2]
        );
        assert_eq!(struck(fault().opcode(NvmOpcode::FLUSH), mixed), [1, 2]);
        assert_eq!(struck(fault().namespace(2), mixed), [2]);
        assert_eq!(struck(fault().blocks(0..1), mixed), [4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn a_behaviour_strikes_only_what_it_can_happen_to() {
        let mixed = |index: u64| match index {
            0 => (0, admin::identify_controller()),
            1 => (1, nvm::flush(1)),
            2 => (1, nvm::write(1, 0, 1, false)),
            // The admin command with the opcode of Write.
            3 => (0, Sqe::new(1)),
            _ => (1, nvm::read(1, 0, 1, false)),
        };
        let tear = Behaviour::Tear {
            blocks: TornBlocks::First(1),
            then: TornEnd::PowerLoss(Loss::All),
        };
        assert_eq!(struck(Fault::new(tear).times(0), mixed), [2]);
        let truncate = Fault::new(Behaviour::TruncateData(0)).times(3);
        assert_eq!(struck(truncate, mixed), [0, 4, 5]);
        let early = Fault::new(Behaviour::CompleteEarly(Default::default())).times(4);
        assert_eq!(struck(early, mixed), [0, 2, 3, 4]);
        assert!(struck(Fault::new(Behaviour::FailReset), mixed).is_empty());
    }

    #[test]
    fn the_first_fault_strikes_and_the_next_has_its_turn_later() {
        let mut armory = Armory::default();
        armory.add(Fault::new(Behaviour::Hold));
        armory.add(Fault::new(Behaviour::FlipPhase));
        let kinds: Vec<_> = (0..3)
            .map(|index| {
                let (queue, command) = read(index);
                armory
                    .strike_command(queue, &command)
                    .map(|then| then.kind())
            })
            .collect();
        use crate::fault::FaultKind;
        assert_eq!(
            kinds,
            [Some(FaultKind::Hold), Some(FaultKind::FlipPhase), None]
        );
    }
}
