//! Several guests of one controller.

use nvme_async::OpenOptions;
use nvme_soft::fault::{Behaviour, Fault, FaultQueue};

use crate::guest::{DATA, Driver, IN, OK, OUT, Ram, Wishes};
use crate::host::{Host, eventually};

/// How many commands can be outstanding on a queue pair.
const DEPTH: u16 = 8;
/// The first block that a request completes for.
const BEYOND: u64 = 8;
/// What a guest asks for that takes all it can.
const REQUESTS: u16 = 5 * DEPTH;

/// A controller with so many queue pairs. One thread serves all guests, so that none may keep it to itself.
fn host(queues: u16) -> Host {
    let options = OpenOptions::new().queues(queues).local_queues(0);
    Host::opened(1, options.queue_entries(DEPTH + 1), 512, |_| {})
}

/// Asks for more than the device ends, and waits until all that may be sent of it is.
fn ask_for_much(host: &Host, driver: &mut Driver, share: u16) {
    let soft = host.soft.controller();
    let endless = Fault::new(Behaviour::Hold).queue(FaultQueue::Io);
    soft.inject(endless.blocks(0..BEYOND).times(0))
        .expect("makes sense");
    let before = soft.counters().commands;
    for _ in 0..REQUESTS {
        driver.request(IN, 0, &[(DATA, 4096)]);
    }
    eventually("all that may be sent is", || {
        soft.counters().commands - before == u64::from(share)
    });
    assert_eq!(driver.used_index(), 0);
}

/// Lets the device end it all.
fn get_much(host: &Host, driver: &mut Driver) {
    let soft = host.soft.controller();
    soft.clear_faults();
    soft.release_stuck();
    for _ in 0..REQUESTS {
        let (head, _) = driver.wait();
        assert_eq!(driver.status(head), OK);
    }
}

/// However many requests one guest has, and however long they take, there is room for those of another.
#[test]
fn a_guest_that_takes_all_it_can_leaves_room_for_others() {
    // Either has a queue pair, or there is one for both.
    for (queues, share) in [(2, DEPTH), (1, DEPTH / 2)] {
        let host = host(queues);
        let greedy = host.serve_as("greedy", host.export(), &Default::default());
        let modest = host.serve_as("modest", host.export(), &Default::default());
        let rams = [Ram::new(), Ram::new()];
        let mut front_ends = [
            greedy.connect(&rams[0], &Wishes::default()),
            modest.connect(&rams[1], &Wishes::default()),
        ];
        let [mut drivers, mut others] = front_ends.each_mut().map(|front_end| front_end.start());
        ask_for_much(&host, &mut drivers[0], share);
        let before = host.soft.counters().commands;
        for round in 0..100 {
            let kind = if round % 2 == 0 { OUT } else { IN };
            assert_eq!(others[0].run(kind, BEYOND, &[(DATA, 4096)]), OK);
        }
        assert_eq!(host.soft.counters().commands - before, 100);
        get_much(&host, &mut drivers[0]);
        drop(front_ends);
        host.end([greedy, modest]);
    }
}

/// Guests that have left take nothing along.
#[test]
fn who_is_alone_has_the_whole_queue_pair() {
    let host = host(1);
    let served = host.serve();
    let other = host.serve_as("other", host.export(), &Default::default());
    let ram = Ram::new();
    let mut front_end = served.connect(&ram, &Wishes::default());
    let mut drivers = front_end.start();
    let mappings = || host.controller.mappings().fixed_mappings;
    let alone = mappings();
    for guest in 0..3 {
        let ram = Ram::new();
        let mut front_end = other.connect(&ram, &Wishes::default());
        assert_eq!(front_end.start()[0].run(OUT, guest, &[(DATA, 512)]), OK);
        assert!(mappings() > alone);
        drop(front_end);
        eventually("it is forgotten", || mappings() == alone);
    }
    ask_for_much(&host, &mut drivers[0], DEPTH);
    get_much(&host, &mut drivers[0]);
    drop(front_end);
    host.end([served, other]);
}
