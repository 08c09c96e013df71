//! Interrupt coalescing.
//!
//! An interrupt that is not put off has been raised when the controller has acted on a change that the
//! embedder made after the completion was seen. Of one that is put off only the earliest time is
//! certain.

use std::time::{Duration, Instant};

use nvme_soft::Config;
use nvme_spec::admin::{self, FeatureSelect};
use nvme_spec::feature::{InterruptCoalescing, InterruptVectorConfiguration, id};
use nvme_spec::nvm;
use nvme_spec::registers::{ShutdownNotification, ShutdownStatus};

use crate::host::{Host, config, usual_configuration, wait_for};

/// The longest Aggregation Time.
const LONGEST: Duration = Duration::from_micros(255 * 100);

fn coalesce(host: &mut Host, thr: u8, time: u8) {
    let value = InterruptCoalescing::new().with_thr(thr).with_time(time);
    host.admin_ok(admin::set_features(
        id::INTERRUPT_COALESCING,
        value.into_bits(),
        false,
    ));
}

fn set_disabled(host: &mut Host, vector: u16, disabled: bool) {
    let value = InterruptVectorConfiguration::new()
        .with_iv(vector)
        .with_cd(disabled);
    host.admin_ok(admin::set_features(
        id::INTERRUPT_VECTOR_CONFIGURATION,
        value.into_bits(),
        false,
    ));
}

/// Completes a command of an I/O queue, and returns how often the vector has been raised by then.
fn complete(host: &mut Host, id: u16, vector: u16) -> u64 {
    let cid = host.submit(id, nvm::flush(1));
    assert!(host.wait(id, cid).status().is_success());
    raised(host, vector)
}

/// How often a vector has been raised, with all that is not put off.
fn raised(host: &Host, vector: u16) -> u64 {
    host.controller.set_bus_master(true);
    host.vectors.raised(vector)
}

fn sleepy() -> Config {
    let mut config = config(512);
    config.spin = Duration::ZERO;
    config
}

#[test]
fn completions_up_to_the_threshold_share_an_interrupt() {
    let mut host = Host::ready(sleepy());
    coalesce(&mut host, 3, 255);
    for _ in 0..20 {
        let start = Instant::now();
        let before = raised(&host, 1);
        for _ in 0..3 {
            let raised = complete(&mut host, 1, 1);
            assert!(raised == before || start.elapsed() >= LONGEST);
        }
        let raised = complete(&mut host, 1, 1);
        // If the time has passed, the last one may be the first of its group.
        assert!(raised == before + 1 || start.elapsed() >= LONGEST);
        wait_for(|| (host.vectors.raised(1) > before).then_some(()));
        // None waits any more.
        coalesce(&mut host, 3, 255);
    }
}

#[test]
fn vectors_are_counted_apart_and_queues_on_one_together() {
    let mut host = Host::enabled(sleepy());
    for (id, vector) in [(1, 1), (2, 1), (3, 2)] {
        host.create_pair(id, 16, Some(vector));
    }
    for _ in 0..20 {
        coalesce(&mut host, 2, 255);
        let start = Instant::now();
        let before = (raised(&host, 1), raised(&host, 2));
        complete(&mut host, 1, 1);
        complete(&mut host, 3, 2);
        complete(&mut host, 2, 1);
        complete(&mut host, 3, 2);
        let after = (raised(&host, 1), raised(&host, 2));
        assert!(after == before || start.elapsed() >= LONGEST);
        complete(&mut host, 2, 1);
        let after = (raised(&host, 1), raised(&host, 2));
        assert!(after == (before.0 + 1, before.1) || start.elapsed() >= LONGEST);
    }
}

#[test]
fn the_time_ends_the_wait() {
    // Whether the controller sleeps until then or not.
    for spin in [Duration::ZERO, Duration::from_secs(3600)] {
        let mut config = config(512);
        config.spin = spin;
        let mut host = Host::ready(config);
        for time in [1, 10, 30] {
            coalesce(&mut host, 255, time);
            let before = host.vectors.raised(1);
            let start = Instant::now();
            complete(&mut host, 1, 1);
            complete(&mut host, 1, 1);
            wait_for(|| (host.vectors.raised(1) > before).then_some(()));
            assert!(start.elapsed() >= Duration::from_micros(100) * time.into());
        }
    }
}

#[test]
fn without_both_values_nothing_waits() {
    let mut host = Host::ready(sleepy());
    for (thr, time) in [(0, 255), (255, 0), (0, 0)] {
        coalesce(&mut host, thr, time);
        let before = raised(&host, 1);
        assert_eq!(complete(&mut host, 1, 1), before + 1);
    }
}

#[test]
fn vectors_can_be_exempt() {
    let mut host = Host::enabled(sleepy());
    host.create_pair(1, 16, Some(1));
    host.create_pair(2, 16, Some(2));
    coalesce(&mut host, 255, 255);
    set_disabled(&mut host, 2, true);
    let before = raised(&host, 2);
    assert_eq!(complete(&mut host, 2, 2), before + 1);
    assert_eq!(complete(&mut host, 2, 2), before + 2);
    let (start, before) = (Instant::now(), raised(&host, 1));
    let raised = complete(&mut host, 1, 1);
    assert!(raised == before || start.elapsed() >= LONGEST);
}

#[test]
fn what_waits_is_raised_when_the_features_change() {
    let mut host = Host::ready(sleepy());
    let changes: [fn(&mut Host); 3] = [
        |host| coalesce(host, 0, 0),
        |host| coalesce(host, 200, 255),
        |host| set_disabled(host, 1, true),
    ];
    for change in changes {
        coalesce(&mut host, 255, 255);
        let before = raised(&host, 1);
        complete(&mut host, 1, 1);
        change(&mut host);
        assert_eq!(raised(&host, 1), before + 1);
    }
}

#[test]
fn the_admin_queue_waits_for_nothing() {
    let mut host = Host::enabled(sleepy());
    host.create_pair(1, 16, Some(0));
    coalesce(&mut host, 255, 255);
    let before = raised(&host, 0);
    let get = admin::get_features(id::ARBITRATION, FeatureSelect::Current);
    host.admin_ok(get);
    assert_eq!(raised(&host, 0), before + 1);
    // What waits on the same vector is raised with it, and not once more.
    let start = Instant::now();
    let waiting = complete(&mut host, 1, 0);
    assert!(waiting == before + 1 || start.elapsed() >= LONGEST);
    host.admin_ok(get);
    let together = raised(&host, 0);
    assert!(together == waiting + 1 || start.elapsed() >= LONGEST);
    std::thread::sleep(2 * LONGEST);
    assert_eq!(raised(&host, 0), together);
}

#[test]
fn a_reset_forgets_it() {
    for function_reset in [false, true] {
        let mut host = Host::ready(sleepy());
        coalesce(&mut host, 255, 255);
        set_disabled(&mut host, 2, true);
        complete(&mut host, 1, 1);
        if function_reset {
            host.controller.reset().unwrap();
        } else {
            host.disable();
        }
        let before = host.vectors.raised(1);
        std::thread::sleep(2 * LONGEST);
        host.enable();
        assert_eq!(raised(&host, 1), before);
        host.create_pair(1, 16, Some(1));
        assert_eq!(complete(&mut host, 1, 1), before + 1);
        let get = admin::get_features(id::INTERRUPT_VECTOR_CONFIGURATION, FeatureSelect::Current);
        assert_eq!(host.admin_ok(get.with_cdw11(2)), 2);
    }
}

#[test]
fn a_shutdown_raises_what_waits() {
    let mut host = Host::ready(sleepy());
    coalesce(&mut host, 255, 255);
    let before = raised(&host, 1);
    complete(&mut host, 1, 1);
    let shutdown = usual_configuration().with_shn(ShutdownNotification::Normal);
    host.write_configuration(shutdown);
    wait_for(|| (host.status().shst() == ShutdownStatus::Complete).then_some(()));
    assert_eq!(host.vectors.raised(1), before + 1);
}

#[test]
fn a_queue_that_is_deleted_leaves_no_interrupt_behind() {
    let mut host = Host::ready(sleepy());
    coalesce(&mut host, 255, 255);
    complete(&mut host, 1, 1);
    host.admin_ok(admin::delete_submission_queue(1));
    host.admin_ok(admin::delete_completion_queue(1));
    let before = raised(&host, 1);
    std::thread::sleep(2 * LONGEST);
    assert_eq!(raised(&host, 1), before);
}
