//! Random histories of a queue pair, against a plain list of commands.

use std::time::{Duration, Instant};

use poll_window::{Kind, Situation};
use proptest::prelude::*;

use super::pair::Pair;
use crate::queue::Class;

#[derive(Clone, Copy, Debug)]
enum Step {
    Submit {
        background: bool,
        timeout: Option<u8>,
    },
    Ring,
    Fetch(u8),
    /// The device completes one of those that it has fetched.
    Complete(prop::sample::Index),
    /// The host takes at most so many completions and acknowledges them.
    Reap(u8),
    /// Time passes, in milliseconds, and what is late is given up.
    Pass(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (prop::bool::weighted(0.05), prop::option::of(0u8..40))
            .prop_map(|(background, timeout)| Step::Submit { background, timeout }),
        2 => Just(Step::Ring),
        2 => (1u8..20).prop_map(Step::Fetch),
        5 => any::<prop::sample::Index>().prop_map(Step::Complete),
        3 => (1u8..10).prop_map(Step::Reap),
        1 => (0u8..20).prop_map(Step::Pass),
    ]
}

/// What the driver knows of one outstanding command.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Known {
    number: u32,
    slot: u16,
    class: Class,
    deadline: Option<Instant>,
    lost: bool,
}

struct Model {
    pair: Pair,
    entries: u16,
    outstanding: Vec<Known>,
    /// Numbers in the order in which the device completed them.
    completed: Vec<u32>,
    fetched: u32,
}

impl Model {
    fn new(entries: u16) -> Self {
        Self {
            pair: Pair::new(entries),
            entries,
            outstanding: Vec::new(),
            completed: Vec::new(),
            fetched: 0,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Submit {
                background,
                timeout,
            } => self.submit(background, timeout),
            Step::Ring => {
                let deferred = self.pair.host.has_deferred();
                assert_eq!(self.pair.host.ring_deferred(), deferred);
                assert!(!self.pair.host.has_deferred());
            }
            Step::Fetch(limit) => {
                let before = self.pair.device.fetched.len();
                self.pair.device.fetch(limit.into());
                for sqe in self.pair.device.fetched.iter().skip(before) {
                    let expected = Pair::command(self.fetched).with_cid(sqe.cid());
                    assert_eq!(*sqe, expected, "commands arrive in order and unharmed");
                    self.fetched += 1;
                }
            }
            Step::Complete(index) => {
                let count = self.pair.device.fetched.len();
                if count > 0
                    && let Some(sqe) = self.pair.device.complete(index.index(count))
                {
                    self.completed.push(sqe.cdw10());
                }
            }
            Step::Reap(limit) => self.reap(limit.into()),
            Step::Pass(milliseconds) => {
                self.pair.now += Duration::from_millis(milliseconds.into());
                self.expire();
            }
        }
        self.check();
    }

    fn submit(&mut self, background: bool, timeout: Option<u8>) {
        let kinds = [Kind::Read, Kind::Write, Kind::Other];
        let class = if background {
            Class::Background
        } else {
            Class::Foreground(kinds[self.fetched as usize % 3])
        };
        let timeout = timeout.map(|timeout| Duration::from_millis(timeout.into()));
        let alone = self.in_flight() == 0;
        let rung = self.pair.device.submission_tail.writes().len();
        let submitted = self.pair.submit(class, timeout);
        let has_room = self.outstanding.len() < usize::from(self.entries) - 1;
        assert_eq!(submitted.is_some(), has_room);
        let Some((number, slot)) = submitted else {
            return;
        };
        assert!(self.outstanding.iter().all(|known| known.slot != slot));
        if alone {
            assert!(!self.pair.host.has_deferred(), "nobody would ring for it");
            assert_eq!(self.pair.device.submission_tail.writes().len(), rung + 1);
        }
        self.outstanding.push(Known {
            number,
            slot,
            class,
            deadline: timeout
                .filter(|_| !background)
                .map(|timeout| self.pair.now + timeout),
            lost: false,
        });
    }

    fn reap(&mut self, limit: usize) {
        let mut taken = 0;
        while taken < limit
            && let Some(finished) = self.pair.next()
        {
            let finished = finished.expect("the device is honest");
            taken += 1;
            let number = self.completed.remove(0);
            let index = self
                .outstanding
                .iter()
                .position(|known| known.number == number);
            let known = self.outstanding.remove(index.expect("it is outstanding"));
            assert_eq!(finished.token.number, number);
            assert_eq!(finished.overdue, known.lost);
            assert!(finished.cqe.status().is_success());
        }
        assert!(
            taken == limit || self.completed.is_empty(),
            "a completion was overlooked"
        );
        assert_eq!(self.pair.host.acknowledge(), taken > 0);
    }

    fn expire(&mut self) {
        let mut expired = self.pair.give_up_late(self.pair.now);
        let mut expected = Vec::new();
        for known in &mut self.outstanding {
            if !known.lost
                && known
                    .deadline
                    .is_some_and(|deadline| deadline <= self.pair.now)
            {
                known.lost = true;
                expected.push(known.number);
            }
        }
        expired.sort_unstable();
        expected.sort_unstable();
        assert_eq!(expired, expected);
    }

    /// The kinds of the commands that count as work.
    fn kinds(&self) -> impl Iterator<Item = Kind> {
        let counted = self.outstanding.iter().filter(|known| !known.lost);
        counted.filter_map(|known| match known.class {
            Class::Foreground(kind) => Some(kind),
            Class::Background => None,
        })
    }

    fn in_flight(&self) -> usize {
        self.kinds().count()
    }

    fn check(&self) {
        let host = &self.pair.host;
        assert_eq!(host.in_flight(), self.in_flight());
        if let Some(kind) = self.kinds().next() {
            let situation = Situation::new(self.in_flight(), kind);
            assert_eq!(host.situation(0), situation);
        }
        assert_eq!(
            host.lost(),
            self.outstanding.iter().filter(|known| known.lost).count()
        );
        assert_eq!(host.completion_ready(), !self.completed.is_empty());
        let alive: Vec<u32> = self.pair.alive.borrow().iter().copied().collect();
        let mut numbers: Vec<u32> = self.outstanding.iter().map(|known| known.number).collect();
        numbers.sort_unstable();
        assert_eq!(
            alive, numbers,
            "a token stays exactly as long as its command"
        );

        let live = self.outstanding.iter().filter(|known| !known.lost);
        if let Some(earliest) = live.filter_map(|known| known.deadline).min() {
            let told = host.earliest_deadline().expect("there is a deadline");
            assert!(told <= earliest, "a deadline would be missed");
        }
        let mut held: Vec<u32> = host.tokens().map(|token| token.number).collect();
        held.sort_unstable();
        assert_eq!(held, numbers);
    }

    /// The device completes all; afterwards every slot is free.
    fn finish(mut self) {
        self.pair.host.ring_deferred();
        while !self.outstanding.is_empty() {
            self.step(Step::Fetch(u8::MAX));
            while !self.pair.device.fetched.is_empty()
                && let Some(sqe) = self.pair.device.complete(0)
            {
                self.completed.push(sqe.cdw10());
            }
            self.reap(usize::MAX);
        }
        self.check();
        for _ in 0..usize::from(self.entries) - 1 {
            assert!(
                self.pair
                    .submit(Class::Foreground(Kind::Read), None)
                    .is_some()
            );
        }
        assert!(
            self.pair
                .submit(Class::Foreground(Kind::Read), None)
                .is_none()
        );
    }
}

fn run(entries: u16, steps: Vec<Step>) {
    let mut model = Model::new(entries);
    for step in steps {
        model.step(step);
    }
    model.finish();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn small_rings(
        entries in prop::sample::select(vec![2u16, 3, 4, 5, 8]),
        steps in prop::collection::vec(step(), 0..400),
    ) {
        run(entries, steps);
    }

    #[test]
    fn larger_rings(
        entries in prop::sample::select(vec![31u16, 255]),
        steps in prop::collection::vec(step(), 0..600),
    ) {
        run(entries, steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]

    #[test]
    fn the_largest_rings(
        entries in prop::sample::select(vec![4096u16, 65535]),
        steps in prop::collection::vec(step(), 0..200),
    ) {
        run(entries, steps);
    }
}
