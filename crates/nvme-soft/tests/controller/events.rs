//! Asynchronous events, and the doorbell writes that cause them.

use nvme_spec::admin;
use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::feature::{AsyncEventConfiguration, TemperatureThreshold, id};
use nvme_spec::log::{self, CriticalWarning, SmartHealth};
use nvme_spec::registers::DoorbellKind;
use nvme_spec::{Status, nvm};
use zerocopy::FromBytes;

use crate::host::{Host, config, wait_for};

fn event(host: &mut Host, cid: u16) -> Event {
    let entry = host.wait(0, cid);
    assert!(entry.status().is_success());
    AsyncEvent::from_bits(entry.result()).event()
}

fn read_log(host: &mut Host, page: u8, retain: bool) {
    host.admin_data(admin::get_log_page(page, 0, 64, 0, retain), 64);
}

#[test]
fn invalid_doorbells_raise_an_event_once_until_the_log_is_read() {
    let mut host = Host::ready(config(512));
    let first = host.submit(0, admin::async_event_request());
    let second = host.submit(0, admin::async_event_request());
    // No such queue.
    host.ring_raw(2, DoorbellKind::SubmissionTail, 1);
    assert_eq!(event(&mut host, first), Event::InvalidDoorbellRegister);
    // Past the end of the queue.
    host.ring_raw(1, DoorbellKind::SubmissionTail, 64);
    host.io_ok(nvm::flush(1));
    read_log(&mut host, log::id::ERROR, true);
    assert!(host.look(0).is_none());
    read_log(&mut host, log::id::ERROR, false);
    assert_eq!(event(&mut host, second), Event::InvalidDoorbellValue);
    assert_eq!(host.controller.counters().invalid_doorbells, 2);
}

#[test]
fn bad_heads_are_noticed() {
    // Past the end of the queue, and the same as before.
    for (value, redundant) in [(200, 0), (1, 1)] {
        let mut host = Host::ready(config(512));
        host.io_ok(nvm::flush(1));
        let request = host.submit(0, admin::async_event_request());
        host.ring_raw(1, DoorbellKind::CompletionHead, value);
        assert_eq!(event(&mut host, request), Event::InvalidDoorbellValue);
        let counters = host.controller.counters();
        assert_eq!(counters.redundant_completion_heads, redundant);
        host.io_ok(nvm::flush(1));
    }
}

#[test]
fn a_head_beyond_the_tail_is_noticed() {
    let mut host = Host::ready(config(512));
    let request = host.submit(0, admin::async_event_request());
    for _ in 0..2 {
        host.submit(1, nvm::flush(1));
        wait_for(|| host.look(1));
    }
    host.ring_raw(1, DoorbellKind::CompletionHead, 9);
    host.submit(1, nvm::flush(1));
    assert_eq!(event(&mut host, request), Event::InvalidDoorbellValue);
    wait_for(|| host.look(1));
    host.ring_head(1);
    host.io_ok(nvm::flush(1));
}

#[test]
fn a_tail_that_passes_the_head_is_noticed() {
    let mut host = Host::enabled(config(512));
    host.create_unequal_pair(1, 64, 4, None);
    let request = host.submit(0, admin::async_event_request());
    for _ in 0..40 {
        host.place(1, nvm::flush(1));
    }
    host.ring(1);
    for _ in 0..3 {
        wait_for(|| host.look(1));
    }
    // Of the 40 at most 16 were fetched so far, so that 44 more have no room.
    host.ring_raw(1, DoorbellKind::SubmissionTail, 20);
    host.ring_head(1);
    for _ in 0..37 {
        assert!(host.reap(1).status().is_success());
    }
    assert_eq!(event(&mut host, request), Event::InvalidDoorbellValue);
    host.io_ok(nvm::flush(1));
}

#[test]
fn requests_beyond_the_limit_are_refused_and_can_be_aborted() {
    let mut host = Host::enabled(config(512));
    let requests: Vec<_> = (0..4)
        .map(|_| host.submit(0, admin::async_event_request()))
        .collect();
    host.admin_refused(
        admin::async_event_request(),
        Status::ASYNC_EVENT_LIMIT_EXCEEDED,
    );
    assert_eq!(host.admin_ok(admin::abort(0, requests[2])), 0);
    assert!(
        host.wait(0, requests[2])
            .status()
            .is(Status::ABORT_REQUESTED)
    );
    assert_eq!(host.admin_ok(admin::abort(0, requests[2])), 1);
    let again = host.submit(0, admin::async_event_request());
    host.ring_raw(9, DoorbellKind::SubmissionTail, 1);
    assert_eq!(
        event(&mut host, requests[0]),
        Event::InvalidDoorbellRegister
    );
    assert_ne!(again, requests[0]);
}

#[test]
fn a_threshold_below_the_temperature_is_reported_if_asked_for() {
    let mut host = Host::enabled(config(512));
    let request = host.submit(0, admin::async_event_request());
    let threshold = TemperatureThreshold::new().with_tmpth(300).into_bits();
    host.admin_ok(admin::set_features(
        id::TEMPERATURE_THRESHOLD,
        threshold,
        false,
    ));
    assert!(host.look(0).is_none());
    let warnings = CriticalWarning::new().with_temperature(true).into_bits();
    let events = AsyncEventConfiguration::new().with_smart_critical_warnings(warnings);
    host.admin_ok(admin::set_features(
        id::ASYNC_EVENT_CONFIGURATION,
        events.into_bits(),
        false,
    ));
    assert_eq!(event(&mut host, request), Event::TemperatureThreshold);
    let data = host.admin_data(
        admin::get_log_page(log::id::SMART_HEALTH, 0, 512, 0, false),
        512,
    );
    assert!(CriticalWarning::from_bits(data[0]).temperature());
}

fn smart_health(host: &mut Host) -> SmartHealth {
    let command = admin::get_log_page(log::id::SMART_HEALTH, 0, 512, 0, false);
    SmartHealth::read_from_bytes(&host.admin_data(command, 512)).unwrap()
}

#[test]
fn a_warning_that_was_asked_for_is_reported_when_it_is_new() {
    let mut host = Host::enabled(config(512));
    let requests: Vec<_> = (0..4)
        .map(|_| host.submit(0, admin::async_event_request()))
        .collect();
    // Spare and temperature, but not reliability.
    let wanted = CriticalWarning::new()
        .with_spare(true)
        .with_temperature(true);
    let events = AsyncEventConfiguration::new().with_smart_critical_warnings(wanted.into_bits());
    host.admin_ok(admin::set_features(
        id::ASYNC_EVENT_CONFIGURATION,
        events.into_bits(),
        false,
    ));
    host.controller
        .set_critical_warning(CriticalWarning::new().with_reliability(true));
    assert!(smart_health(&mut host).warnings().reliability());
    assert!(host.look(0).is_none());
    host.controller.set_temperature(350);
    assert_eq!(event(&mut host, requests[0]), Event::TemperatureThreshold);
    let health = smart_health(&mut host);
    assert_eq!(health.composite_temperature.get(), 350);
    assert!(health.warnings().temperature() && health.warnings().reliability());
    // Not new any more.
    host.controller.set_temperature(351);
    assert!(!smart_health(&mut host).warnings().spare());
    assert!(host.look(0).is_none());
    // Over, and again.
    host.controller.set_temperature(300);
    assert!(!smart_health(&mut host).warnings().temperature());
    host.controller.set_temperature(350);
    assert_eq!(event(&mut host, requests[1]), Event::TemperatureThreshold);
    host.controller
        .set_critical_warning(CriticalWarning::new().with_spare(true));
    assert!(host.look(0).is_none(), "SMART events are masked");
    smart_health(&mut host);
    assert_eq!(event(&mut host, requests[2]), Event::SpareBelowThreshold);
}

#[test]
fn any_event_can_be_raised() {
    let mut host = Host::enabled(config(512));
    let requests: Vec<_> = (0..4)
        .map(|_| host.submit(0, admin::async_event_request()))
        .collect();
    let firmware = AsyncEvent::report(Event::FirmwareActivationStarting);
    host.controller.raise_event(firmware);
    host.controller.raise_event(firmware);
    let first = event(&mut host, requests[0]);
    assert_eq!(first, Event::FirmwareActivationStarting);
    // Another log page of that type does not count.
    read_log(&mut host, log::id::CHANGED_NAMESPACES, false);
    assert!(host.look(0).is_none());
    read_log(&mut host, log::id::FIRMWARE_SLOT, false);
    let second = event(&mut host, requests[1]);
    assert_eq!(second, Event::FirmwareActivationStarting);
    // Without a log page of this controller's there is nothing to wait for.
    let vendor = AsyncEvent::from_bits(0x00c0_1207);
    for request in &requests[2..] {
        host.controller.raise_event(vendor);
        assert_eq!(host.wait(0, *request).result(), 0x00c0_1207);
    }
}
