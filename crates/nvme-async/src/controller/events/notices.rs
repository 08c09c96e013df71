//! What is to be dealt with, and when.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use nvme_spec::event::AsyncEvent;

use super::pace::Pace;

/// After this what could not be dealt with is tried again.
const RETRY: Duration = Duration::from_millis(250);
/// How often that is done where the controller does not answer.
const MAX_UNANSWERED: u32 = 3;

/// What is to be dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The controller has reported an event.
    Event(AsyncEvent),
    /// All open namespaces may have changed, as after a reset of the controller.
    Rescan,
}

#[derive(Default)]
pub(super) struct State {
    /// Each with the epoch in which it came. The first one stays until it was dealt with.
    notices: VecDeque<(Notice, u64)>,
    /// Requests end with a reset of the controller, so none is due for an event from before.
    epoch: u64,
    /// Events that were dealt with, for which no new request was made yet.
    owed: u8,
    pub(super) pace: Pace,
    /// In a storm of events, not before this is more done for them.
    pause_until: Option<Instant>,
    /// Not before this is the first notice dealt with again.
    retry_at: Option<Instant>,
    /// Attempts to deal with the first notice that the controller did not answer.
    unanswered: u32,
    /// There is a task for all this.
    pub(super) is_worked_on: bool,
    /// It is at work on the first notice.
    is_dealing: bool,
}

/// How an attempt to deal with a notice has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    /// It was dealt with, or never will be.
    Done,
    /// There was no memory.
    NoMemory,
    /// The controller did not answer in time. Without another attempt it would never report an
    /// event of this type again; with ever more, others would wait for ever.
    NoAnswer,
}

/// What is to be done next.
pub(super) enum Step {
    DealWith(Notice, u64),
    Request(u8),
    Wait(Duration),
    Rest,
}

impl State {
    pub(super) fn begin_epoch(&mut self) {
        self.epoch += 1;
        self.owed = 0;
        self.pace = Pace::default();
        self.pause_until = None;
    }

    pub(super) fn note(&mut self, notice: Notice, now: Instant) {
        match notice {
            Notice::Event(_) => {
                self.pace.came(now);
                self.notices.push_back((notice, self.epoch));
            }
            Notice::Rescan => {
                // Before all others but the one that is being dealt with. If that is a rescan too,
                // it may have begun before the reason for this one.
                let place = usize::from(self.is_dealing);
                if self.notices.get(place).map(|waiting| waiting.0) != Some(notice) {
                    self.notices.insert(place, (notice, self.epoch));
                }
            }
        }
    }

    pub(super) fn has_work(&self) -> bool {
        !self.notices.is_empty() || self.owed > 0
    }

    /// The task is gone, maybe in the middle.
    pub(super) fn leave(&mut self) {
        self.is_worked_on = false;
        self.is_dealing = false;
    }

    /// The end of an attempt to deal with the first notice.
    pub(super) fn end(&mut self, epoch: u64, attempt: Attempt) {
        self.is_dealing = false;
        self.unanswered += u32::from(attempt == Attempt::NoAnswer);
        let again = match attempt {
            Attempt::Done => false,
            Attempt::NoMemory => true,
            Attempt::NoAnswer => self.unanswered < MAX_UNANSWERED,
        };
        if again {
            self.retry_at = Some(Instant::now() + RETRY);
            return;
        }
        self.unanswered = 0;
        let Some((notice, _)) = self.notices.pop_front() else {
            return;
        };
        if matches!(notice, Notice::Event(_)) && epoch == self.epoch {
            self.owed = self.owed.saturating_add(1);
            self.begin_pause();
        }
    }

    fn begin_pause(&mut self) {
        let pause = self.pace.pause();
        self.pause_until = (!pause.is_zero()).then(|| Instant::now() + pause);
    }

    pub(super) fn next(&mut self) -> Step {
        let first = self.notices.front().copied();
        let wait_for = match first {
            Some((Notice::Rescan, _)) => self.retry_at,
            _ => self.retry_at.max(self.pause_until),
        };
        let now = Instant::now();
        if let Some(until) = wait_for
            && until > now
        {
            return Step::Wait(until - now);
        }
        if let Some((notice, epoch)) = first {
            self.retry_at = None;
            self.is_dealing = true;
            return Step::DealWith(notice, epoch);
        }
        if self.owed == 0 {
            self.is_worked_on = false;
            return Step::Rest;
        }
        // In a storm one at a time, so that there is a pause for each.
        self.begin_pause();
        let count = match self.pause_until {
            None => self.owed,
            Some(_) => 1,
        };
        self.owed -= count;
        Step::Request(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: Notice = Notice::Event(AsyncEvent::new());

    fn deal_with(state: &mut State) -> Notice {
        let Step::DealWith(notice, epoch) = state.next() else {
            panic!("nothing to deal with");
        };
        state.end(epoch, Attempt::Done);
        notice
    }

    #[test]
    fn each_event_is_followed_by_one_request() {
        let mut state = State::default();
        let now = Instant::now();
        state.note(EVENT, now);
        state.note(EVENT, now);
        assert_eq!(deal_with(&mut state), EVENT);
        assert_eq!(deal_with(&mut state), EVENT);
        assert!(matches!(state.next(), Step::Request(2)));
        assert!(matches!(state.next(), Step::Rest));
    }

    #[test]
    fn a_reset_in_the_middle_takes_the_requests_with_it() {
        let mut state = State::default();
        let now = Instant::now();
        state.note(EVENT, now);
        state.note(EVENT, now);
        let Step::DealWith(_, epoch) = state.next() else {
            panic!("nothing to deal with");
        };
        state.begin_epoch();
        state.end(epoch, Attempt::Done);
        state.note(EVENT, now);
        assert_eq!(deal_with(&mut state), EVENT);
        assert_eq!(deal_with(&mut state), EVENT);
        // For the one that came after the reset.
        assert!(matches!(state.next(), Step::Request(1)));
    }

    #[test]
    fn a_rescan_overtakes_a_storm_and_is_made_once() {
        let mut state = State::default();
        let now = Instant::now();
        state.pace.asked(now);
        for _ in 0..100 {
            state.note(EVENT, now);
        }
        assert_eq!(deal_with(&mut state), EVENT);
        assert!(matches!(state.next(), Step::Wait(_)));
        state.note(Notice::Rescan, now);
        state.note(Notice::Rescan, now);
        assert_eq!(deal_with(&mut state), Notice::Rescan);
        assert!(matches!(state.next(), Step::Wait(_)));
        assert_eq!(state.notices.len(), 99);
    }

    #[test]
    fn a_rescan_that_has_begun_does_not_count_for_a_later_reason() {
        let mut state = State::default();
        let now = Instant::now();
        state.note(Notice::Rescan, now);
        let Step::DealWith(Notice::Rescan, epoch) = state.next() else {
            panic!("nothing to deal with");
        };
        state.note(Notice::Rescan, now);
        state.end(epoch, Attempt::Done);
        assert_eq!(deal_with(&mut state), Notice::Rescan);
        assert!(matches!(state.next(), Step::Rest));
    }

    #[test]
    fn what_could_not_be_dealt_with_is_tried_again_later() {
        let mut state = State::default();
        state.note(EVENT, Instant::now());
        let Step::DealWith(_, epoch) = state.next() else {
            panic!("nothing to deal with");
        };
        state.end(epoch, Attempt::NoMemory);
        assert!(matches!(state.next(), Step::Wait(wait) if wait <= RETRY));
        state.retry_at = Some(Instant::now());
        assert_eq!(deal_with(&mut state), EVENT);
    }

    #[test]
    fn a_controller_that_does_not_answer_is_asked_a_few_times() {
        let mut state = State::default();
        state.note(EVENT, Instant::now());
        state.note(EVENT, Instant::now());
        for _ in 0..2 {
            for attempt in 1..=MAX_UNANSWERED {
                let Step::DealWith(_, epoch) = state.next() else {
                    panic!("attempt {attempt}");
                };
                state.end(epoch, Attempt::NoAnswer);
                if attempt < MAX_UNANSWERED {
                    assert!(matches!(state.next(), Step::Wait(wait) if wait <= RETRY));
                    state.retry_at = Some(Instant::now());
                }
            }
        }
        assert!(matches!(state.next(), Step::Request(2)));
    }
}
