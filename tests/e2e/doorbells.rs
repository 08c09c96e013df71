//! Doorbells that are left in memory, and interrupts that are put off.

use std::time::Duration;

use futures::future::join_all;
use nvme_async::{Namespace, PollMode};
use nvme_soft::fault::{Behaviour, Fault};

use crate::support::bounded::{on_both_flavours, on_current_thread};
use crate::support::full;
use crate::support::rig::Setup;
use crate::support::suite::{self, AREA};

const SIZE: u64 = AREA + (64 << 10);

fn setup(mode: PollMode) -> Setup {
    Setup::memory(SIZE)
        .config(|config| config.doorbell_buffers = true)
        .options(|options| options.poll_mode(mode))
}

async fn reads(namespace: &Namespace, count: u64) {
    let reads = (0..count).map(|number| namespace.read(number % 64 * 4096, 4096));
    for read in join_all(reads).await {
        read.expect("reads");
    }
}

#[test]
fn the_suite_with_shadow_doorbells() {
    for mode in [
        PollMode::Adaptive,
        PollMode::Interrupt,
        PollMode::Busy,
        PollMode::Paired,
    ] {
        on_both_flavours(async move || {
            let rig = setup(mode).open().await;
            let namespace = rig.namespace().await;
            suite::all(&namespace, full()).await;
            // The controller is awake between commands that come at once.
            for _ in 0..200 {
                reads(&namespace, 64).await;
            }
            assert!(rig.controller().counters().unwritten_doorbells > 0);
            drop(namespace);
            rig.close().await;
        });
    }
}

#[test]
fn no_shadow_where_it_is_not_wanted_or_not_offered() {
    on_current_thread(async || {
        for offered in [false, true] {
            let rig = setup(PollMode::Adaptive)
                .config(|config| config.doorbell_buffers = offered)
                .options(|options| options.shadow_doorbells(!offered))
                .open()
                .await;
            let namespace = rig.namespace().await;
            for _ in 0..50 {
                reads(&namespace, 64).await;
            }
            assert_eq!(rig.controller().counters().unwritten_doorbells, 0);
            drop(namespace);
            rig.close().await;
        }
    });
}

#[test]
fn both_are_set_up_again_after_a_reset() {
    on_both_flavours(async || {
        let rig = setup(PollMode::Interrupt)
            .options(|options| options.coalesce_interrupts(4, Duration::from_millis(1)))
            .open()
            .await;
        let namespace = rig.namespace().await;
        for round in 1..=3 {
            for _ in 0..50 {
                reads(&namespace, 64).await;
            }
            let before = rig.controller().counters().unwritten_doorbells;
            rig.device
                .controller()
                .inject(Fault::new(Behaviour::Fail { serve: false }))
                .expect("a fault as any");
            let mut state = rig.controller().watch_state();
            let _ = namespace.read(0, 4096).await;
            let live = state.wait_for(|state| *state == nvme_async::ControllerState::Live);
            live.await.expect("it comes back");
            for _ in 0..50 {
                reads(&namespace, 64).await;
            }
            let after = rig.controller().counters().unwritten_doorbells;
            assert!(after > before, "round {round}");
        }
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn interrupts_are_put_off() {
    on_current_thread(async || {
        let mut raised = Vec::new();
        for completions in [1, 32] {
            let rig = Setup::memory(SIZE)
                .options(|options| {
                    let options = options.poll_mode(PollMode::Interrupt).queues(1);
                    options.coalesce_interrupts(completions, Duration::from_millis(5))
                })
                .open()
                .await;
            let namespace = rig.namespace().await;
            let before = rig.device.counters().interrupts;
            rig.device.controller().hold_io();
            let mut held: Vec<_> = (0..128)
                .map(|_| Box::pin(namespace.read(0, 4096)))
                .collect();
            for read in &mut held {
                assert!(futures::poll!(read).is_pending());
            }
            rig.device.controller().release();
            for read in held {
                read.await.expect("reads");
            }
            raised.push(rig.device.counters().interrupts - before);
            // A single one comes too, when its time is over.
            namespace.read(0, 4096).await.expect("reads");
            assert_eq!(rig.controller().counters().lost_interrupts, 0);
            drop(namespace);
            rig.close().await;
        }
        // The doorbell is rung for 16 at a time, and no batch of the controller's is larger.
        assert!(raised[0] >= 8, "{raised:?}");
        assert!((1..=4).contains(&raised[1]), "{raised:?}");
    });
}
