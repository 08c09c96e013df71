//! Shadow doorbells: a host that writes registers only when EventIdx says so.

use std::time::Duration;

use nvme_soft::Config;
use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::identify::IdentifyController;
use nvme_spec::registers::{DoorbellKind, doorbell_buffer_offset};
use nvme_spec::{Cqe, Sqe, Status, admin, log, nvm};
use zerocopy::FromBytes;

use crate::host::{Host, PAGE, config, usual_configuration, wait_for};

/// How often a sleeping controller is to be woken.
const ROUNDS: u32 = 3_000;

/// A host, and its two buffers.
struct ShadowHost {
    host: Host,
    stride: u8,
    shadow: u64,
    event_index: u64,
    /// Whether registers are written at all.
    writes_registers: bool,
    register_writes: u32,
}

fn with_buffers() -> Config {
    let mut config = config(512);
    config.doorbell_buffers = true;
    config
}

/// A controller that sleeps whenever there is nothing to do.
fn sleepy() -> Config {
    let mut config = with_buffers();
    config.spin = Duration::ZERO;
    config
}

/// A controller that never sleeps.
fn sleepless() -> Config {
    let mut config = with_buffers();
    config.spin = Duration::from_secs(3600);
    config
}

impl ShadowHost {
    /// A host that has set up zeroed buffers and no I/O queue.
    fn new(config: Config) -> Self {
        let stride = config.doorbell_stride;
        let mut this = Self::around(Host::enabled(config), stride);
        this.set_up();
        this
    }

    /// With one I/O queue pair too.
    fn ready(config: Config, entries: u32) -> Self {
        let mut this = Self::new(config);
        this.host.create_pair(1, entries, Some(1));
        this
    }

    fn around(mut host: Host, stride: u8) -> Self {
        let shadow = host.allocate(PAGE);
        let event_index = host.allocate(PAGE);
        Self {
            host,
            stride,
            shadow,
            event_index,
            writes_registers: true,
            register_writes: 0,
        }
    }

    fn set_up(&mut self) {
        let command = admin::doorbell_buffer_config(self.shadow, self.event_index);
        self.host.admin_ok(command);
    }

    fn entry(&self, buffer: u64, id: u16, kind: DoorbellKind) -> u32 {
        let address = buffer + doorbell_buffer_offset(id, kind, self.stride);
        u32::from_le_bytes(self.host.memory.get(address, 4).try_into().unwrap())
    }

    fn set_entry(&self, id: u16, kind: DoorbellKind, value: u32) {
        let address = self.shadow + doorbell_buffer_offset(id, kind, self.stride);
        self.host.memory.set(address, &value.to_le_bytes());
    }

    /// Sets a doorbell to another value, as the Linux driver decides on the register.
    fn set_doorbell(&mut self, id: u16, kind: DoorbellKind, value: u32) {
        let old = self.entry(self.shadow, id, kind);
        self.set_entry(id, kind, value);
        // The lock of the host's memory stands for a fence here.
        let event_index = self.entry(self.event_index, id, kind);
        let passed = value.wrapping_sub(event_index).wrapping_sub(1) as u16;
        if self.writes_registers && passed < value.wrapping_sub(old) as u16 {
            self.register_writes += 1;
            self.host.ring_raw(id, kind, value);
        }
    }

    fn ring(&mut self, id: u16) {
        let tail = self.host.tail(id);
        self.set_doorbell(id, DoorbellKind::SubmissionTail, tail);
    }

    fn ring_head(&mut self, id: u16) {
        let head = self.host.head(id);
        self.set_doorbell(id, DoorbellKind::CompletionHead, head);
    }

    fn submit(&mut self, id: u16, command: Sqe) {
        self.host.place(id, command);
        self.ring(id);
    }

    fn reap(&mut self, id: u16) -> Cqe {
        let entry = wait_for(|| self.host.look(id));
        self.ring_head(id);
        entry
    }

    fn io_ok(&mut self, id: u16) {
        self.submit(id, nvm::flush(1));
        assert!(self.reap(id).status().is_success());
    }

    /// Waits until the controller has asked for the register, on its way to sleep.
    fn wait_until_asked(&self, id: u16, kind: DoorbellKind) {
        let value = self.entry(self.shadow, id, kind);
        wait_for(|| (self.entry(self.event_index, id, kind) == value).then_some(()));
    }

    /// Nothing was amiss so far.
    fn check(&self) {
        let counters = self.host.controller.counters();
        assert_eq!(counters.invalid_doorbells, 0);
        assert_eq!(counters.redundant_completion_heads, 0);
        assert_eq!(counters.refused_accesses, 0);
        assert!(!self.host.status().cfs());
    }
}

#[test]
fn support_is_announced() {
    for supported in [false, true] {
        let mut config = config(512);
        config.doorbell_buffers = supported;
        let mut host = Host::enabled(config);
        let data = host.admin_data(admin::identify_controller(), 4096);
        let data = IdentifyController::read_from_bytes(&data).unwrap();
        let commands = data.optional_admin_commands();
        assert_eq!(commands.doorbell_buffer_config(), supported);
        let (shadow, event_index) = (host.allocate(PAGE), host.allocate(PAGE));
        let command = admin::doorbell_buffer_config(shadow, event_index);
        if supported {
            host.admin_ok(command);
        } else {
            host.admin_refused(command, Status::INVALID_OPCODE);
        }
    }
}

#[test]
fn bad_buffers_are_refused_and_registers_go_on() {
    let mut host = Host::new(with_buffers());
    host.alignment = 2 * PAGE;
    host.enable_with(usual_configuration().with_mps(1));
    wait_for(|| host.status().rdy().then_some(()));
    host.create_pair(1, 16, Some(1));
    let (shadow, event_index) = (host.allocate(2 * PAGE), host.allocate(2 * PAGE));
    let forbidden = host.allocate(2 * PAGE);
    host.memory.forbid(forbidden, 2 * PAGE);
    for (shadow, event_index) in [
        (shadow + 4, event_index),
        (shadow, event_index + 512),
        (shadow + PAGE, event_index),
        (shadow, event_index + PAGE),
        (forbidden, event_index),
        (shadow, forbidden),
        (0, event_index),
        (shadow, u64::MAX << 13),
    ] {
        let command = admin::doorbell_buffer_config(shadow, event_index);
        host.admin_refused(command, Status::INVALID_FIELD);
    }
    host.io_ok(nvm::flush(1));
    let with_sgl = {
        let mut dwords = admin::doorbell_buffer_config(shadow, event_index).dwords();
        dwords[0] |= 1 << 14;
        Sqe::from_dwords(dwords)
    };
    host.admin_refused(with_sgl, Status::INVALID_FIELD);
    host.admin_ok(admin::doorbell_buffer_config(shadow, event_index));
}

#[test]
fn an_awake_controller_needs_no_register() {
    for stride in [0, 3] {
        let mut config = sleepless();
        (config.doorbell_stride, config.io_queue_pairs) = (stride, 8);
        let mut host = ShadowHost::new(config);
        for id in 1..=3 {
            host.host.create_pair(id, 2 + u32::from(id), None);
        }
        host.writes_registers = false;
        for round in 0..300 {
            for id in 1..=3_u16 {
                let count = 1 + round % u32::from(id);
                for _ in 0..count {
                    host.host.place(id, nvm::flush(1));
                }
                host.ring(id);
                for _ in 0..count {
                    assert!(host.reap(id).status().is_success());
                }
            }
        }
        assert_eq!(host.host.controller.counters().sleeps, 0);
        host.check();
    }
}

#[test]
fn a_sleeping_controller_is_woken_as_it_asked() {
    let mut host = ShadowHost::ready(sleepy(), 5);
    let mut asked = 0;
    for round in 0..ROUNDS {
        if round % 64 == 0 {
            host.wait_until_asked(1, DoorbellKind::SubmissionTail);
            asked += 1;
        }
        let before = host.register_writes;
        let count = 1 + round % 4;
        for _ in 0..count {
            host.host.place(1, nvm::flush(1));
            if round % 3 == 0 {
                host.ring(1);
            }
        }
        if round % 3 != 0 {
            host.ring(1);
        }
        if round % 64 == 0 {
            assert!(host.register_writes > before);
        }
        for _ in 0..count {
            assert!(host.reap(1).status().is_success());
        }
    }
    assert!(host.register_writes >= asked);
    assert!(host.host.controller.counters().sleeps > 0);
    host.check();
}

#[test]
fn the_same_head_may_be_written_again_a_lap_later() {
    // EventIdx of the head stays 0 while nothing waits for room, so its step to 1 is written each time.
    let mut host = ShadowHost::ready(sleepless(), 4);
    for _ in 0..3 * 4 {
        host.io_ok(1);
    }
    // Twice for the tail, too, because its EventIdx stays what it was at the start.
    assert_eq!(host.register_writes, 2 * 3);
    host.check();
}

#[test]
fn the_admin_queue_may_be_shadowed_too() {
    let mut host = ShadowHost::new(sleepy());
    // More than a lap, from where the registers have led.
    for _ in 0..100 {
        host.submit(0, admin::get_features(1, admin::FeatureSelect::Current));
        assert!(host.reap(0).status().is_success());
    }
    host.check();
}

#[test]
fn the_admin_queue_may_stay_with_registers() {
    let mut host = ShadowHost::ready(sleepy(), 8);
    for round in 0..100 {
        let get = admin::get_features(1, admin::FeatureSelect::Current);
        host.host.admin_ok(get);
        if round % 4 == 0 {
            host.io_ok(1);
        }
    }
    host.check();
}

#[test]
fn queues_from_before_the_command_go_over() {
    // Whether or not the host copies the values that they have.
    for copies in [false, true] {
        let mut config = sleepy();
        config.io_queue_pairs = 2;
        let mut host = Host::ready(config);
        host.create_pair(2, 64, None);
        for _ in 0..5 {
            host.io_ok(nvm::flush(1));
        }
        let mut host = ShadowHost::around(host, 0);
        if copies {
            for kind in [DoorbellKind::SubmissionTail, DoorbellKind::CompletionHead] {
                host.set_entry(1, kind, 5);
            }
        }
        host.set_up();
        for _ in 0..200 {
            host.io_ok(1);
            host.io_ok(2);
        }
        host.check();
    }
}

#[test]
fn buffers_can_be_moved() {
    let mut host = ShadowHost::ready(sleepless(), 8);
    for round in 0..20 {
        // With most heads not known to the controller, which looks at them with each fetch.
        for _ in 0..1 + round % 7 {
            host.host.place(1, nvm::flush(1));
        }
        host.ring(1);
        for _ in 0..1 + round % 7 {
            assert!(host.reap(1).status().is_success());
        }
        let old = host.shadow;
        host.shadow = host.host.allocate(PAGE);
        host.event_index = host.host.allocate(PAGE);
        if round % 2 == 0 {
            let values = host.host.memory.get(old, PAGE as usize);
            host.host.memory.set(host.shadow, &values);
        }
        host.set_up();
        // What is in the old ones does not matter any more.
        host.host.memory.set(old, &[0xff; PAGE as usize]);
    }
    host.check();
}

#[test]
fn a_queue_that_is_created_again_begins_at_zero() {
    let mut host = ShadowHost::ready(sleepy(), 16);
    for entries in [4, 9, 16] {
        for _ in 0..3 {
            host.io_ok(1);
        }
        host.host.admin_ok(admin::delete_submission_queue(1));
        host.host.admin_ok(admin::delete_completion_queue(1));
        // The entries are stale until the host gets to them, before or after the creation.
        let reset = |host: &ShadowHost| {
            host.set_entry(1, DoorbellKind::SubmissionTail, 0);
            host.set_entry(1, DoorbellKind::CompletionHead, 0);
        };
        if entries == 9 {
            reset(&host);
            host.host.create_pair(1, entries, None);
        } else {
            host.host.create_pair(1, entries, None);
            reset(&host);
        }
        for _ in 0..20 {
            host.io_ok(1);
        }
    }
    host.check();
}

#[test]
fn a_reset_forgets_the_buffers() {
    for function_reset in [false, true] {
        let mut host = ShadowHost::ready(sleepy(), 8);
        host.io_ok(1);
        if function_reset {
            host.host.controller.reset().unwrap();
        } else {
            host.host.disable();
        }
        for buffer in [host.shadow, host.event_index] {
            host.host.memory.forbid(buffer, PAGE);
        }
        host.host.enable();
        host.host.create_pair(1, 8, None);
        host.set_entry(1, DoorbellKind::SubmissionTail, 3);
        for _ in 0..20 {
            host.host.io_ok(nvm::flush(1));
        }
        host.check();
        // A head that is written twice is an error again.
        let head = host.host.head(1);
        host.host.ring_raw(1, DoorbellKind::CompletionHead, head);
        let counters = host.host.controller.counters();
        assert_eq!(counters.redundant_completion_heads, 1);
    }
}

/// The completion of an Asynchronous Event Request; afterwards events are reported again.
fn next_event(host: &mut Host, cid: u16) -> Event {
    let entry = host.wait(0, cid);
    host.admin_data(admin::get_log_page(log::id::ERROR, 0, 64, 0, false), 64);
    AsyncEvent::from_bits(entry.result()).event()
}

#[test]
fn invalid_values_are_reported() {
    let mut host = ShadowHost::ready(sleepless(), 8);
    host.io_ok(1);
    host.io_ok(1);
    // Outside of the queue, and a head of entries that were not posted.
    for (kind, value) in [
        (DoorbellKind::SubmissionTail, 8),
        (DoorbellKind::SubmissionTail, 9),
        (DoorbellKind::SubmissionTail, 0x1_0003),
        (DoorbellKind::SubmissionTail, u32::MAX),
        (DoorbellKind::CompletionHead, 8),
        (DoorbellKind::CompletionHead, u32::MAX),
        (DoorbellKind::CompletionHead, 7),
    ] {
        let request = host.host.submit(0, admin::async_event_request());
        let right = host.entry(host.shadow, 1, kind);
        host.set_entry(1, kind, value);
        if kind == DoorbellKind::CompletionHead {
            // Heads are looked at with a fetch.
            host.submit(1, nvm::flush(1));
        }
        let event = next_event(&mut host.host, request);
        assert_eq!(event, Event::InvalidDoorbellValue, "{kind:?} {value:#x}");
        host.set_entry(1, kind, right);
        if kind == DoorbellKind::CompletionHead {
            host.reap(1);
        }
        host.io_ok(1);
    }
    host.check();
}

#[test]
fn a_head_past_the_end_of_the_queue_does_not_wrap() {
    let mut host = ShadowHost::ready(sleepless(), 8);
    let request = host.host.submit(0, admin::async_event_request());
    for _ in 0..7 {
        host.io_ok(1);
    }
    // The head is 7, and entries up to 2 are posted: 9 stands for none of them.
    for _ in 0..3 {
        host.submit(1, nvm::flush(1));
        wait_for(|| host.host.look(1));
    }
    host.set_entry(1, DoorbellKind::CompletionHead, 9);
    host.submit(1, nvm::flush(1));
    let event = next_event(&mut host.host, request);
    assert_eq!(event, Event::InvalidDoorbellValue);
    host.reap(1);
    host.io_ok(1);
    host.check();
}

#[test]
fn a_tail_that_passes_the_head_is_noticed() {
    let mut host = ShadowHost::new(sleepless());
    host.host.create_unequal_pair(1, 64, 4, None);
    let request = host.host.submit(0, admin::async_event_request());
    for _ in 0..40 {
        host.host.place(1, nvm::flush(1));
    }
    host.ring(1);
    for _ in 0..3 {
        wait_for(|| host.host.look(1));
    }
    // Of the 40 at most 16 were fetched so far, so that 44 more have no room.
    host.set_entry(1, DoorbellKind::SubmissionTail, 20);
    host.ring_head(1);
    for _ in 0..37 {
        assert!(host.reap(1).status().is_success());
    }
    let event = next_event(&mut host.host, request);
    assert_eq!(event, Event::InvalidDoorbellValue);
    host.io_ok(1);
    host.check();
}

#[test]
fn a_full_completion_queue_waits_for_the_head() {
    let mut host = ShadowHost::new(sleepy());
    host.host.create_unequal_pair(1, 32, 4, Some(1));
    for _ in 0..200 {
        for _ in 0..10 {
            host.host.place(1, nvm::flush(1));
        }
        host.ring(1);
        for taken in [3, 3, 3, 1] {
            for _ in 0..taken {
                assert!(wait_for(|| host.host.look(1)).status().is_success());
            }
            let waits = taken == 3;
            if waits {
                host.wait_until_asked(1, DoorbellKind::CompletionHead);
            }
            let before = host.register_writes;
            host.ring_head(1);
            if waits {
                assert_eq!(host.register_writes, before + 1);
            }
        }
    }
    assert_eq!(host.host.controller.counters().commands, 2_000);
    host.check();
}

#[test]
fn buffers_that_are_not_reachable_are_fatal() {
    for unreachable in 0..2 {
        let mut host = ShadowHost::ready(sleepy(), 8);
        host.io_ok(1);
        let buffer = [host.shadow, host.event_index][unreachable];
        host.host.memory.forbid(buffer, PAGE);
        // By the register, so that the controller has to look, and to sleep again.
        host.host.place(1, nvm::flush(1));
        let tail = host.host.tail(1);
        host.set_entry(1, DoorbellKind::SubmissionTail, tail);
        host.host.ring_raw(1, DoorbellKind::SubmissionTail, tail);
        wait_for(|| host.host.status().cfs().then_some(()));
        assert!(host.host.controller.counters().refused_accesses > 0);
        host.host.disable();
        assert!(!host.host.status().cfs());
        host.host.enable();
        host.host.create_pair(1, 8, None);
        host.host.io_ok(nvm::flush(1));
    }
}

#[test]
fn without_bus_mastering_the_buffers_are_left_alone() {
    let mut host = ShadowHost::ready(sleepless(), 8);
    host.io_ok(1);
    host.host.controller.set_bus_master(false);
    let accesses = host.host.memory.accesses();
    host.writes_registers = false;
    host.submit(1, nvm::flush(1));
    host.host.controller.set_bus_master(false);
    assert_eq!(host.host.memory.accesses(), accesses);
    host.host.controller.set_bus_master(true);
    assert!(host.reap(1).status().is_success());
}

#[test]
fn hold_leaves_commands_in_shadowed_queues() {
    let mut host = ShadowHost::ready(sleepy(), 8);
    for _ in 0..20 {
        host.host.controller.hold_io();
        host.submit(1, nvm::flush(1));
        host.host.controller.hold_io();
        assert!(host.host.look(1).is_none());
        host.host.controller.release();
        assert!(host.reap(1).status().is_success());
    }
    host.check();
}
