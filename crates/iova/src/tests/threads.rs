//! Look-ups in several threads while others register and unregister the same memory.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const WRITERS: usize = 2;
const READERS: usize = 3;
const ROUNDS: usize = 1500;
const SLOTS: usize = 12;

#[test]
fn a_guard_is_mapped_whatever_others_do() {
    let (space, mapper) = space();
    let done = AtomicBool::new(false);
    let owner = Arc::new(());
    let direction = Direction::Bidirectional;
    // Holds all of the others, so that every look-up has something to find; of another direction,
    // so that they don't share its mapping.
    let all = register(
        &space,
        0x10_0000,
        (SLOTS + 1) * PAGE,
        Direction::FromDevice,
        owner.clone(),
    );

    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (space, owner) = (space.clone(), &owner);
                scope.spawn(move || {
                    // Both use the same host memory, in different steps.
                    let mut slots: [Option<FixedMapping>; SLOTS] = Default::default();
                    for round in 0..ROUNDS {
                        let slot = (round * (2 * writer + 5)) % SLOTS;
                        let addr = 0x10_0000 + slot * PAGE;
                        let fixed = register(&space, addr, 2 * PAGE, direction, owner.clone());
                        slots[slot] = Some(fixed.expect("room"));
                        let unregistered = (slot + SLOTS / 2) % SLOTS;
                        slots[unregistered] = None;
                    }
                })
            })
            .collect();
        for reader in 0..READERS {
            let (space, mapper, done) = (space.clone(), &mapper, &done);
            scope.spawn(move || {
                for round in reader.. {
                    if round > ROUNDS && done.load(Ordering::Relaxed) {
                        break;
                    }
                    let addr = 0x10_0000 + (round % SLOTS) * PAGE + 0x800;
                    let guard = look_up(&space, addr, PAGE, Direction::FromDevice);
                    let guard = guard.expect("always registered at least once");
                    let reached = mapper.translate(guard.iova(), PAGE, Direction::FromDevice);
                    assert_eq!(reached, Some(addr), "mapped as long as the guard lives");
                }
            });
        }
        let ended: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        // Or the readers would never end.
        done.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok));
    });

    assert_eq!(mapper.live().len(), 1);
    drop(all);
    assert_eq!(mapper.live(), []);
    assert_eq!(mapper.violations(), [""; 0]);
    assert_eq!(Arc::strong_count(&owner), 1);
    // Fewer than registrations, where the writers met.
    assert!(mapper.map_calls() <= (WRITERS * ROUNDS + 1) as u64);
    assert_eq!(mapper.unmap_calls(), mapper.map_calls());
}
