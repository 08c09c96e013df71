//! Front ends that come and go, and servers that do.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::guest::{
    DATA, Driver, F_EVENT_IDX, FrontEnd, IN, IOERR, NO_STATUS, OK, OUT, Ram, Wishes, memfd, region,
};
use crate::host::{Host, eventually};

const PLUGGED: u64 = 4 << 30;

#[test]
fn memory_comes_and_goes() {
    let host = Host::new();
    host.write(0, &[4; 8192]);
    let bounced = host.bounced();
    let served = host.serve();
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    let kept = front_end.new_inflight();
    front_end.set_inflight(&kept);
    let driver = &mut front_end.start()[0];
    let before = host.controller.mappings().fixed_mappings;
    for round in 0..3 {
        // Two regions of one file that lie side by side.
        let file = memfd(2 << 20, true);
        let part = |index: u64| {
            let (start, user) = (PLUGGED + (index << 20), (1 << 40) + (index << 30));
            region(start, 1 << 20, user, index << 20, &file)
        };
        for index in [0, 1] {
            front_end
                .messages
                .add_mem_region(&part(index))
                .expect("taken");
        }
        // A request may reach from one into the other.
        let across = PLUGGED + (1 << 20) - 4096;
        assert_eq!(driver.run(IN, 0, &[(across, 8192)]), OK);
        let mut read = [0; 8192];
        file.read_exact_at(&mut read, (1 << 20) - 4096)
            .expect("there");
        assert_eq!(read, [4; 8192]);
        // Taken away while a request uses it: what is waited for is the request.
        host.soft.controller().hold_io();
        let head = driver.request(IN, 0, &[(PLUGGED, 4096)]);
        let other = driver.request(IN, 0, &[(DATA, 4096)]);
        eventually("they are under way", || kept.count() == 2);
        std::thread::scope(|scope| {
            let removed = scope.spawn(|| front_end.messages.remove_mem_region(&part(0)));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!removed.is_finished(), "{round}");
            host.soft.controller().release();
            removed.join().expect("no panic").expect("removed");
        });
        for _ in 0..2 {
            let (used, _) = driver.wait();
            assert!([head, other].contains(&used));
            assert_eq!(driver.status(used), OK);
        }
        assert_eq!(driver.run(IN, 0, &[(PLUGGED, 4096)]), IOERR);
        front_end
            .messages
            .remove_mem_region(&part(1))
            .expect("removed");
        assert_eq!(host.controller.mappings().fixed_mappings, before);
        // All of it anew.
        front_end
            .messages
            .set_mem_table(&[ram.region(), part(1)])
            .expect("taken");
        assert_eq!(driver.run(IN, 0, &[(PLUGGED + (1 << 20), 4096)]), OK);
        front_end
            .messages
            .set_mem_table(&[ram.region()])
            .expect("taken");
        assert_eq!(host.controller.mappings().fixed_mappings, before);
        assert_eq!(driver.run(IN, 0, &[(DATA, 4096)]), OK);
    }
    assert_eq!(host.bounced(), bounced);
    drop(front_end);
    host.end([served]);
}

/// A queue that looks at its ring all the time finds the memory of a request that comes right after it.
#[test]
fn memory_is_there_once_it_was_taken() {
    let host = Host::new();
    let served = host.serve();
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    let driver = &mut front_end.start()[0];
    let file = memfd(1 << 20, true);
    let plugged = region(PLUGGED, 1 << 20, 1 << 40, 0, &file);
    for _ in 0..300 {
        front_end.messages.add_mem_region(&plugged).expect("taken");
        assert_eq!(driver.run(IN, 0, &[(PLUGGED, 4096)]), OK);
        front_end
            .messages
            .remove_mem_region(&plugged)
            .expect("removed");
        assert_eq!(driver.run(IN, 0, &[(DATA, 4096)]), OK);
    }
    drop(front_end);
    host.end([served]);
}

#[test]
fn guests_come_and_go() {
    let host = Host::new();
    let served = host.serve();
    let ram = Ram::new();
    for round in 0..10 {
        let mut front_end = served.connect(&ram, &Wishes::default());
        let driver = &mut front_end.start()[0];
        ram.write(DATA, &[round; 512]);
        assert_eq!(driver.run(OUT, round.into(), &[(DATA, 512)]), OK);
        match round % 3 {
            // In order; with a reset; and in the middle of something.
            0 => {
                let base = front_end.messages.get_vring_base(0).expect("stops");
                assert_eq!(base, 1);
            }
            1 => {
                front_end.messages.reset_device().expect("reset");
                front_end
                    .messages
                    .set_features(front_end.features)
                    .expect("agreed");
                let driver = &mut front_end.start()[0];
                assert_eq!(driver.run(IN, 0, &[(DATA, 512)]), OK);
            }
            _ => {
                driver.request(IN, 0, &[(DATA, 1 << 20)]);
            }
        }
    }
    for round in 0..10 {
        assert_eq!(host.read(u64::from(round) * 512, 512), [round; 512]);
    }
    host.end([served]);
}

/// One at a time, while others wait.
#[test]
fn a_second_front_end_waits() {
    let host = Host::new();
    let served = host.serve();
    let ram = Ram::new();
    let mut first = served.connect(&ram, &Wishes::default());
    let driver = &mut first.start()[0];
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            let ram = Ram::new();
            let mut second = served.connect(&ram, &Wishes::default());
            second.start()[0].run(IN, 0, &[(DATA, 512)])
        });
        for _ in 0..10 {
            assert_eq!(driver.run(IN, 0, &[(DATA, 512)]), OK);
        }
        assert!(!second.is_finished());
        drop(first);
        assert_eq!(second.join().expect("no panic"), OK);
    });
    host.end([served]);
}

#[test]
fn a_queue_stops_and_goes_on() {
    let host = Host::new();
    let served = host.serve();
    for without in [vec![], vec![F_EVENT_IDX]] {
        let ram = Ram::new();
        let wishes = Wishes {
            without,
            ..Wishes::default()
        };
        let mut front_end = served.connect(&ram, &wishes);
        let driver = &mut front_end.start()[0];
        for round in 1..=5 {
            assert_eq!(driver.run(IN, 0, &[(DATA, 512)]), OK);
            // What is under way is done before it stops, what comes later waits.
            let first = driver.request(IN, 0, &[(DATA, 4096)]);
            let base = front_end.messages.get_vring_base(0).expect("stops");
            assert_eq!(base, u32::from(driver.used_index()), "{round}");
            let second = driver.request(IN, 0, &[(DATA, 4096)]);
            front_end.start_queue(driver, base as u16);
            for head in [first, second] {
                assert_eq!(driver.finish(head).0, OK);
            }
            // Disabled in between.
            front_end
                .messages
                .set_vring_enable(0, false)
                .expect("stops");
            let head = driver.request(IN, 0, &[(DATA, 512)]);
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(driver.status(head), NO_STATUS);
            front_end
                .messages
                .set_vring_enable(0, true)
                .expect("goes on");
            assert_eq!(driver.finish(head).0, OK);
        }
        drop(front_end);
    }
    host.end([served]);
}

/// Connects as a front end does whose server has ended: with queues that are in use.
fn resume(front_end: &mut FrontEnd, driver: &Driver) {
    // What QEMU says that it begins with: what was given back last.
    front_end.start_queue(driver, driver.used_index());
}

/// The first server ends as one that is killed does: it has taken requests, and is not heard of any more.
#[test]
fn what_was_in_flight_is_done_by_the_next_server() {
    for without in [vec![], vec![F_EVENT_IDX]] {
        for is_indirect in [false, true] {
            let wishes = Wishes {
                without: without.clone(),
                ..Wishes::default()
            };
            let ram = Ram::new();
            let stuck = Host::new();
            let first = stuck.serve();
            let mut front_end = first.connect(&ram, &wishes);
            let kept = front_end.new_inflight();
            front_end.set_inflight(&kept);
            let mut driver = front_end.start().remove(0);
            driver.is_indirect = is_indirect;
            for _ in 0..200 {
                assert_eq!(driver.run(IN, 0, &[(DATA, 512)]), OK);
            }
            stuck.soft.controller().hold_io();
            let mut heads = Vec::new();
            for index in 0..20_u64 {
                let place = DATA + (index << 16);
                ram.write(place, &[index as u8 + 1; 4096]);
                heads.push(driver.request(OUT, index * 8, &[(place, 4096)]));
            }
            eventually("it has taken them", || kept.count() == heads.len());
            drop(front_end);
            stuck.kill();

            let host = Host::new();
            let second = host.serve();
            let mut front_end_again = second.connect(&ram, &wishes);
            front_end_again.set_inflight(&kept);
            resume(&mut front_end_again, &driver);
            // Of the next server's own taking.
            heads.push(driver.request(IN, 0, &[(DATA + (8 << 20), 4096)]));
            let mut left = heads;
            while !left.is_empty() {
                let (head, _) = driver.wait();
                let before = left.len();
                left.retain(|&other| other != head);
                assert_eq!(left.len() + 1, before, "{head} of {left:?}");
                assert_eq!(driver.status(head), OK);
            }
            for index in 0..20 {
                assert_eq!(host.read(index * 4096, 4096), [index as u8 + 1; 4096]);
            }
            for _ in 0..200 {
                assert_eq!(driver.run(IN, 0, &[(DATA, 512)]), OK);
            }
            drop(front_end_again);
            host.end([second]);
        }
    }
}

/// A server may be killed after it has given a request back and before it says so.
#[test]
fn the_next_server_interrupts_for_the_last_one() {
    let host = Host::new();
    let served = host.serve();
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    let kept = front_end.new_inflight();
    front_end.set_inflight(&kept);
    let mut driver = front_end.start().remove(0);
    let head = driver.request(IN, 0, &[(DATA, 512)]);
    eventually("it is given back", || driver.used_index() == 1);
    drop(front_end);
    host.wait_for_memory();
    // What the guest was not told.
    let _ = driver.call.read();
    let mut front_end = served.connect(&ram, &Wishes::default());
    front_end.set_inflight(&kept);
    resume(&mut front_end, &driver);
    driver.wait_interrupt();
    assert_eq!(driver.finish(head).0, OK);
    drop(front_end);
    host.end([served]);
}

/// A server that is told to end gives everything back, and the next one goes on.
#[test]
fn a_server_that_ends_in_order_leaves_nothing() {
    let host = Host::new();
    let ram = Ram::new();
    let mut served = host.serve();
    let mut front_end = served.connect(&ram, &Wishes::default());
    let kept = front_end.new_inflight();
    front_end.set_inflight(&kept);
    let mut driver = front_end.start().remove(0);
    for round in 0..10_u64 {
        let heads: Vec<_> = (0..10)
            .map(|index| driver.request(IN, index * 8, &[(DATA + index * 4096, 4096)]))
            .collect();
        host.stop(served);
        host.wait_for_memory();
        served = host.serve();
        front_end = served.connect(&ram, &Wishes::default());
        front_end.set_inflight(&kept);
        resume(&mut front_end, &driver);
        let mut left = heads;
        while !left.is_empty() {
            let (head, _) = driver.wait();
            assert_eq!(driver.status(head), OK, "{round}");
            left.retain(|&other| other != head);
        }
    }
    drop(front_end);
    host.end([served]);
}

/// While requests come fast they are seen without kicks; a rare one is kicked for.
#[test]
fn kicks_are_for_queues_that_sleep() {
    let host = Host::new();
    let served = host.serve();
    for without in [vec![], vec![F_EVENT_IDX]] {
        let ram = Ram::new();
        let wishes = Wishes {
            without,
            ..Wishes::default()
        };
        let mut front_end = served.connect(&ram, &wishes);
        let driver = &mut front_end.start()[0];
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(5));
            let before = driver.kicks;
            assert_eq!(driver.run(IN, 0, &[(DATA, 512)]), OK);
            assert_eq!(driver.kicks, before + 1, "it slept");
        }
        drop(front_end);
    }
    host.end([served]);
}

/// A driver that looks at its ring itself is not interrupted.
#[test]
fn interrupts_are_for_drivers_that_want_them() {
    let host = Host::new();
    let served = host.serve();
    for without in [vec![], vec![F_EVENT_IDX]] {
        let ram = Ram::new();
        let wishes = Wishes {
            without,
            ..Wishes::default()
        };
        let mut front_end = served.connect(&ram, &wishes);
        let driver = &mut front_end.start()[0];
        // The one that each server begins with.
        driver.wait_interrupt();
        for wants in [false, true, false] {
            driver.want_interrupts(wants);
            let before = driver.used_index();
            for _ in 0..3 {
                driver.request(IN, 0, &[(DATA, 512)]);
            }
            eventually("they are given back", || {
                driver.used_index() == before.wrapping_add(3)
            });
            while driver.next_used().is_some() {}
            if wants {
                driver.wait_interrupt();
            }
            // All that it does for a request is done when it has stopped.
            let base = front_end.messages.get_vring_base(0).expect("stops");
            assert!(wants || driver.call.read().is_err(), "not wanted");
            front_end.start_queue(driver, base as u16);
            driver.wait_interrupt();
        }
        drop(front_end);
    }
    host.end([served]);
}
