//! For how long polling pays: what `poll-window` says of ages, on a clock.

use std::time::{Duration, Instant};

use poll_window::{Costs, End, Plan, Policy, Situation};

use super::state::Look;

/// A completion that is found by polling came at most so long before, or what it says of the device is
/// not believed: other tasks ran meanwhile.
const GAP: u64 = 2_000;
/// For long waits it may be this part of them.
const GAP_SHIFT: u32 = 4;

/// After so many polls in a row that ended because they may not be longer, none is begun that would be.
const CUTS: u8 = 3;
/// But every so many waits one is.
const RETRY: u8 = 64;

/// How to wait for the next completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Look again and again, and ask again.
    Poll,
    /// Sleep until then if no interrupt comes before, and ask again.
    Pause { until: Instant },
    /// Sleep until the interrupt.
    Sleep,
}

/// What became of the times that a queue was polled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WindowCounters {
    /// Those that ended with a completion.
    pub(crate) hits: u64,
    /// Those after which the queue went to sleep.
    pub(crate) misses: u64,
    /// How long nothing else was done.
    pub(crate) spun: Duration,
}

/// Learns how long the commands of one queue pair take, and says how to wait for them.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    policy: Policy,
    /// The longest time without a completion for which it is polled, in nanoseconds.
    max: u64,
    watch: Option<Watch>,
    /// By situation.
    cuts: [Cuts; Situation::COUNT],
    /// By situation, the age at which the last wait began: of what comes before nothing is known.
    begins: [u64; Situation::COUNT],
    /// Whether it is polled until the next completion, to find out when that comes.
    probes: bool,
    pub(crate) counters: WindowCounters,
}

/// A wait that is under way. Its times are ages: nanoseconds since the last completion, or since the
/// first submission to an idle queue.
#[derive(Clone, Copy, Debug)]
struct Watch {
    situation: Situation,
    /// What its ages are counted from.
    progress: Instant,
    began: u64,
    /// When it was last seen that nothing had completed.
    looked: u64,
    /// Since when the queue is polled; nothing while somebody sleeps.
    polled_from: Option<u64>,
}

/// Polls that ended because they may not be longer.
#[derive(Clone, Copy, Debug, Default)]
struct Cuts {
    in_a_row: u8,
    /// How many were not begun because of that.
    avoided: u8,
}

impl Cuts {
    /// Whether a poll is begun that will be cut short if nothing completes.
    fn allow(&mut self) -> bool {
        if self.in_a_row < CUTS {
            return true;
        }
        self.avoided = (self.avoided + 1) % RETRY;
        self.avoided == 0
    }
}

impl Watch {
    fn is_of(&self, situation: Situation, progress: Instant) -> bool {
        self.situation == situation && self.progress == progress
    }

    /// What the device did then is not known.
    fn break_off(self, policy: &mut Policy) {
        let end = End::BrokenOff;
        policy.observe(self.situation, self.began, self.looked, end);
    }
}

impl Window {
    /// A policy that never polls for longer than `max` without a completion, and not at all if that is
    /// zero.
    pub(crate) fn new(costs: Costs, max: Duration) -> Self {
        Self {
            policy: Policy::new(costs),
            max: nanoseconds(max),
            watch: None,
            cuts: Default::default(),
            begins: Default::default(),
            probes: false,
            counters: WindowCounters::default(),
        }
    }

    /// How to wait in this situation at `now`, when nothing has completed since `progress`.
    pub(crate) fn wait(&mut self, situation: Situation, progress: Instant, now: Instant) -> Wait {
        let age = nanoseconds(now.saturating_duration_since(progress));
        let mut watch = match self.watch {
            Some(watch) if watch.is_of(situation, progress) => watch,
            _ => self.begin_watch(situation, progress, age),
        };
        watch.looked = age.max(watch.looked);
        let plan = self.policy.plan(situation, age);
        let polled = watch.polled_from;
        let may_go_on = age - polled.unwrap_or(age) < self.max;
        self.probes &= may_go_on;
        let polls = match (plan, polled) {
            _ if self.probes => true,
            (Plan::Poll { .. }, Some(_)) if may_go_on => true,
            (Plan::Poll { .. }, Some(_)) => {
                let cuts = &mut self.cuts[situation.index()];
                cuts.in_a_row = (cuts.in_a_row + 1).min(CUTS);
                false
            }
            (Plan::Poll { until }, None) => {
                let is_short = until - age <= self.max;
                self.max > 0 && (is_short || self.cuts[situation.index()].allow())
            }
            (Plan::Pause { .. } | Plan::Sleep, _) => false,
        };
        watch.polled_from = polls.then(|| polled.unwrap_or(age));
        self.counters.misses += u64::from(polled.is_some() && !polls);
        self.watch = Some(watch);
        match plan {
            _ if polls => Wait::Poll,
            Plan::Pause { until } => Wait::Pause {
                until: progress + Duration::from_nanos(until),
            },
            Plan::Poll { .. } | Plan::Sleep => Wait::Sleep,
        }
    }

    /// Records that nothing was outstanding for so long, until now.
    pub(crate) fn rested(&mut self, time: Duration) {
        self.policy.rested(nanoseconds(time));
    }

    /// Whether somebody who sleeps would better be awake in this situation. Otherwise the wait goes on,
    /// or begins, asleep.
    pub(crate) fn wakes(&mut self, situation: Situation, progress: Instant, now: Instant) -> bool {
        if self
            .watch
            .is_some_and(|watch| watch.is_of(situation, progress))
        {
            // That was decided when it went to sleep.
            return false;
        }
        let age = nanoseconds(now.saturating_duration_since(progress));
        let plan = self.policy.plan(situation, age);
        let wakes = self.max > 0 && !matches!(plan, Plan::Sleep);
        if !wakes {
            let watch = self.begin_watch(situation, progress, age);
            self.watch = Some(Watch {
                polled_from: None,
                ..watch
            });
        }
        wakes
    }

    /// A wait that begins, after the one that is under way is broken off.
    fn begin_watch(&mut self, situation: Situation, progress: Instant, age: u64) -> Watch {
        let earlier = self.watch.take();
        if let Some(watch) = earlier {
            watch.break_off(&mut self.policy);
        }
        self.begins[situation.index()] = age;
        Watch {
            situation,
            progress,
            began: age,
            looked: age,
            // Ages that are counted from another time can't be compared.
            polled_from: earlier
                .filter(|watch| watch.progress == progress)
                .and_then(|watch| watch.polled_from),
        }
    }

    /// Has it polled until the next completion, but not for longer than it may be.
    pub(crate) fn probe(&mut self) {
        self.probes = true;
    }

    /// Whether a wait that begins now will probably end with a poll.
    pub(crate) fn expects_poll(&self, situation: Situation) -> bool {
        let began = self.begins[situation.index()];
        let expects = match situation.is_alone() {
            true => self.policy.expects_poll(situation, began),
            // A poll in vain is not for one of them alone: it looks for all that are outstanding.
            false => matches!(self.policy.plan(situation, began), Plan::Poll { .. }),
        };
        self.max > 0 && expects
    }

    /// Records that so many completions were found at `now`, the first ones since `progress`.
    pub(crate) fn completed(&mut self, look: Look, taken: usize, progress: Instant, now: Instant) {
        let Some(watch) = self.watch.take() else {
            return;
        };
        self.probes = false;
        if progress != watch.progress {
            return watch.break_off(&mut self.policy);
        }
        let age = nanoseconds(now.saturating_duration_since(progress));
        let polled = watch.polled_from.is_some();
        let slept = age.saturating_sub(watch.looked);
        let seen = slept <= GAP + (age >> GAP_SHIFT);
        let (to, end) = match look {
            _ if polled && seen => (age, End::Polled),
            // Somewhere in between, which is near enough.
            Look::Polled if !polled && slept <= age / 2 => (age - slept / 2, End::Polled),
            Look::Interrupted if !polled => (age, End::Interrupted { completions: taken }),
            _ => (watch.looked, End::BrokenOff),
        };
        if polled {
            self.counters.hits += 1;
            self.cuts[watch.situation.index()].in_a_row = 0;
        }
        self.policy.observe(watch.situation, watch.began, to, end);
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use poll_window::Kind;

    use super::*;

    const MAX: Duration = Duration::from_micros(50);
    const ONE: Duration = Duration::from_micros(1);

    fn one() -> Situation {
        Situation::new(1, Kind::Read)
    }

    /// Waits for a completion as the reaper does, in steps of a microsecond; returns for how long it
    /// was polled.
    fn wait(window: &mut Window, latency: Duration) -> Duration {
        let start = Instant::now();
        let (mut now, mut polled) = (start, Duration::ZERO);
        while now < start + latency {
            match window.wait(one(), start, now) {
                Wait::Poll => {
                    polled += ONE;
                    now += ONE;
                }
                Wait::Pause { until } if until < start + latency => now = until,
                Wait::Pause { .. } | Wait::Sleep => {
                    let woken = start + latency + Duration::from_micros(15);
                    window.completed(Look::Interrupted, 1, start, woken);
                    return polled;
                }
            }
        }
        window.completed(Look::Polled, 1, start, now);
        polled
    }

    /// One time in fifty it takes 2 ms.
    fn learned(latency: Duration) -> Window {
        let mut window = Window::new(Costs::default(), MAX);
        for number in 0..300 {
            let late = number % 50 == 0;
            wait(&mut window, if late { 2000 * ONE } else { latency });
        }
        window
    }

    #[test]
    fn polls_for_a_fast_device() {
        let mut window = learned(10 * ONE);
        let before = window.counters;
        assert_eq!(wait(&mut window, 10 * ONE), 10 * ONE);
        assert_eq!(window.counters.hits, before.hits + 1);
        // One that is late is left to its interrupt soon.
        let polled = wait(&mut window, 2000 * ONE);
        assert!(polled < 15 * ONE, "{polled:?}");
        assert_eq!(window.counters.misses, before.misses + 1);
    }

    #[test]
    fn never_polls_for_long() {
        for latency in [60, 100, 200, 1000, 10_000] {
            let mut window = Window::new(Costs::default(), MAX);
            for _ in 0..300 {
                let polled = wait(&mut window, latency * ONE);
                assert!(polled <= MAX, "{latency}: {polled:?}");
            }
        }
        // Where even the wait for the interrupt costs more than to poll.
        let costs = Costs {
            wake_cpu: 1_000_000,
            ..Costs::default()
        };
        let mut window = Window::new(costs, MAX);
        for _ in 0..300 {
            let polled = wait(&mut window, 100 * ONE);
            assert!(polled <= MAX, "{polled:?}");
        }
    }

    #[test]
    fn sleeps_through_most_of_a_long_wait() {
        let mut window = learned(90 * ONE);
        let start = Instant::now();
        let Wait::Pause { until } = window.wait(one(), start, start) else {
            panic!("not a pause");
        };
        let pause = until - start;
        assert!(pause > 50 * ONE && pause < 90 * ONE, "{pause:?}");
        assert!(matches!(
            window.wait(one(), start, start + 85 * ONE),
            Wait::Poll
        ));
    }

    #[test]
    fn it_is_awake_for_the_end_of_a_long_wait_if_one_follows_another() {
        let taught = |rest: Duration| {
            let mut window = Window::new(Costs::default(), MAX);
            for _ in 0..300 {
                window.rested(rest);
                wait(&mut window, 200 * ONE);
            }
            window
        };
        let start = Instant::now();
        let pauses =
            |mut window: Window| matches!(window.wait(one(), start, start), Wait::Pause { .. });
        assert!(pauses(taught(5 * ONE)));
        assert!(!pauses(taught(2000 * ONE)));
    }

    #[test]
    fn a_sleeper_is_woken_when_it_pays() {
        let mut window = learned(10 * ONE);
        let start = Instant::now();
        assert!(window.wakes(one(), start, start));
        // It knows of this one.
        assert_eq!(window.wait(one(), start, start + 40 * ONE), Wait::Sleep);
        assert!(!window.wakes(one(), start, start + 40 * ONE));
        let mut slow = learned(10_000 * ONE);
        assert!(!slow.wakes(one(), start, start));
        assert_eq!(slow.wait(one(), start, start), Wait::Sleep);
    }

    /// Nobody is awake to begin such waits, but they are learned from.
    #[test]
    fn a_sleeper_notices_that_the_device_has_become_faster() {
        let mut window = learned(10_000 * ONE);
        let mut waits = 0;
        loop {
            let start = Instant::now();
            if window.wakes(one(), start, start) {
                break;
            }
            window.completed(Look::Interrupted, 1, start, start + 20 * ONE);
            waits += 1;
            assert!(waits < 2000, "it sleeps for ever");
        }
        assert_eq!(wait(&mut window, 5 * ONE), 5 * ONE);
    }

    #[test]
    fn a_probe_is_polled_for_once() {
        let mut window = learned(10_000 * ONE);
        let start = Instant::now();
        window.probe();
        assert_eq!(window.wait(one(), start, start), Wait::Poll);
        assert_eq!(window.wait(one(), start, start + MAX - ONE), Wait::Poll);
        for late in [MAX, MAX + 30 * ONE, 10 * MAX] {
            assert_eq!(window.wait(one(), start, start + late), Wait::Sleep);
        }
    }

    /// It looks for a moment at what it has never seen.
    #[test]
    fn a_look_in_vain_is_not_expected_to_find_a_command() {
        let mut window = Window::new(Costs::default(), MAX);
        let start = Instant::now();
        for _ in 0..300 {
            let mut awake = start + Duration::from_nanos(3500);
            while window.wait(one(), start, awake) == Wait::Poll {
                awake += ONE;
            }
            window.completed(Look::Interrupted, 1, start, start + 3000 * ONE);
        }
        let early = start + Duration::from_nanos(3300);
        assert_eq!(window.wait(one(), start, early), Wait::Poll);
        assert!(!window.expects_poll(one()));
        assert!(learned(10 * ONE).expects_poll(one()));
    }

    /// As when recovery has taken commands back, or the other queue of a pair has completed one.
    #[test]
    fn a_poll_that_counts_from_another_time_begins_anew() {
        let mut window = learned(10 * ONE);
        let start = Instant::now();
        assert_eq!(window.wait(one(), start, start + 5 * ONE), Wait::Poll);
        assert_eq!(window.wait(one(), start, start + 10 * ONE), Wait::Poll);
        let later = start + 20 * ONE;
        assert_eq!(window.wait(one(), later, later + ONE), Wait::Poll);
        window.completed(Look::Polled, 1, later, later + 2 * ONE);
    }

    #[test]
    fn what_was_not_watched_says_nothing() {
        let mut window = learned(10 * ONE);
        for _ in 0..1000 {
            let start = Instant::now();
            window.wait(one(), start, start);
            // Another task ran for long, and the completion may have come at any time.
            window.completed(Look::Polled, 1, start, start + 500 * ONE);
        }
        let start = Instant::now();
        assert!(matches!(
            window.wait(one(), start, start + 9 * ONE),
            Wait::Poll
        ));
        assert_eq!(window.wait(one(), start, start + 40 * ONE), Wait::Sleep);
    }
}
