//! Bring-up and shutdown, given up at each of their await points.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use nvme_async::device::Device;
use nvme_async::{ControllerState, Error, OpenOptions};
use nvme_soft::fault::{Behaviour, EnableRefusal, Fault, FaultQueue, Loss};

use super::polled;
use crate::support::bounded::{comes_true, on_both_flavours, on_current_thread};
use crate::support::owners::Ledger;
use crate::support::rig::{Rig, Setup, close, open};
use crate::support::slowness;

const SIZE: u64 = 1 << 20;
/// Between two polls of a future that nobody wakes.
const PACE: Duration = Duration::from_millis(40);

/// What a controller does while it is brought up.
fn troubles() -> Vec<Fault> {
    let admin = |then| Fault::new(then).queue(FaultQueue::Admin);
    let swallow = || Behaviour::Swallow { execute: false };
    let slow = || Behaviour::Delay(Duration::from_micros(100));
    vec![
        admin(slow()).times(0),
        Fault::new(Behaviour::SlowReady(Duration::from_millis(3))),
        Fault::new(Behaviour::RefuseEnable(EnableRefusal::NeverReady)),
        Fault::new(Behaviour::RefuseEnable(EnableRefusal::Fail)),
        admin(swallow()),
        admin(swallow()).nth(3),
        admin(swallow()).nth(8),
        admin(Behaviour::PowerLoss(Loss::All)).nth(4),
        admin(Behaviour::Fail { serve: false }).nth(4),
        admin(Behaviour::Vanish(Loss::All)).nth(4),
    ]
}

/// Attaches, and gives up after so many polls; returns whether it was over by then.
async fn attach(trouble: &Fault, polls: usize) -> bool {
    let (device, options) = Setup::memory(SIZE)
        .config(|config| config.ready_timeout = Duration::from_millis(500) * slowness())
        .options(|options| {
            let timeout = Duration::from_millis(200) * slowness();
            options.queues(2).local_queues(1).timeout(Some(timeout))
        })
        .start();
    let soft = device.controller();
    soft.inject(trouble.clone()).expect("makes sense");
    let attach = options.clone().attach(device.clone() as Arc<dyn Device>);
    let over = polled(Box::pin(attach).as_mut(), polls, PACE)
        .await
        .is_some();
    let unmapped = || device.iommu().mappings() == 0;
    comes_true(&format!("{trouble:?}, {polls} polls: unmapped"), unmapped).await;
    assert_eq!(device.stray_accesses(), 0);

    // The next one has it as if nothing had been.
    soft.clear_faults();
    soft.reappear();
    let mut rig = Rig::attach(device, options).await.expect("comes up");
    rig.lost_power = true;
    let namespace = rig.namespace().await;
    namespace.write(0, vec![1; 512]).await.expect("writes");
    drop(namespace);
    rig.close().await;
    over
}

#[test]
fn attach_in_trouble() {
    on_both_flavours(async || {
        let troubles = troubles();
        let sweeps = troubles.iter().map(async |trouble| {
            let mut polls = 0;
            while !attach(trouble, polls).await {
                polls += 1;
            }
        });
        futures::future::join_all(sweeps).await;
    });
}

type Opening = Pin<Box<dyn Future<Output = Result<(), Error>>>>;

/// The ways to open something by its URL.
const OPENINGS: [fn(String) -> Opening; 3] = [
    |url| Box::pin(async move { nvme_async::open(&url).await.map(drop) }),
    |url| Box::pin(async move { OpenOptions::new().url(&url).open().await.map(drop) }),
    |url| {
        Box::pin(async move {
            OpenOptions::new()
                .url(&url)
                .open_controller()
                .await
                .map(drop)
        })
    },
];

#[test]
fn open_by_url() {
    on_both_flavours(async || {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let plan = "[[fault]]\nwhen = { queue = \"admin\", times = \"always\" }\nthen = { delay = \"100us\" }\n";
        std::fs::write(path("plan.toml"), plan).expect("writes the plan");
        let url = |name: &str| format!("file:{}?size=1M", path(name));
        for (number, opening) in OPENINGS.into_iter().enumerate() {
            let url = url(&format!("disk{number}.img"));
            let slow = format!("{url}&faults={}", path("plan.toml"));
            let mut polls = 0;
            while polled(opening(slow.clone()).as_mut(), polls, PACE)
                .await
                .is_none()
            {
                polls += 1;
                // Nobody has it any more.
                let namespace = open(&url).await;
                namespace.write(0, vec![1; 512]).await.expect("writes");
                close(namespace).await;
            }
            assert!(polls > 10, "it has many await points");
        }
    });
}

/// Given up after any number of polls, it is finished by the next one, without an error.
#[test]
fn shutdown() {
    on_both_flavours(async || {
        for polls in 0.. {
            let rig = Setup::memory(SIZE)
                .config(|config| config.latency = Duration::from_micros(300))
                .options(|options| options.queues(2).local_queues(1))
                .open()
                .await;
            let namespace = rig.namespace().await;
            let ledger = Ledger::default();
            let delay = Behaviour::Delay(Duration::from_micros(100));
            let soft = rig.device.controller();
            let delay = Fault::new(delay).queue(FaultQueue::Admin).times(0);
            soft.inject(delay).expect("makes sense");
            for offset in (0..4).map(|n| n * 512) {
                let write = namespace.write(offset, ledger.bytes(512, 1));
                drop(write.now_or_never());
            }
            let shutdown = rig.controller().shutdown();
            let over = polled(Box::pin(shutdown).as_mut(), polls, PACE).await;
            let over = over.map(|done| done.expect("shuts down")).is_some();
            if polls > 0 {
                assert!(namespace.write(0, vec![0; 512]).await.is_err());
            }
            let again = rig.controller().shutdown().await;
            again.unwrap_or_else(|error| panic!("after {polls} polls: {error}"));
            assert_eq!(rig.controller().state(), ControllerState::Closed);
            assert_eq!(ledger.alive(), 0);
            drop(namespace);
            rig.abandon().await;
            if over {
                return;
            }
        }
    });
}

/// The task that deals with an event does not keep a controller that nobody has any more, nor the
/// streams of its events.
#[test]
fn the_last_handle_while_an_event_is_dealt_with() {
    use futures::StreamExt;
    use nvme_soft::fault::FaultKind;
    use nvme_spec::event::{AsyncEvent, Event};
    use nvme_spec::opcode::AdminOpcode;

    on_current_thread(async || {
        let rig = Setup::memory(SIZE).open().await;
        let soft = rig.device.controller();
        let hold = Fault::new(Behaviour::Hold).opcode(AdminOpcode::GET_LOG_PAGE);
        soft.inject(hold).expect("makes sense");
        let mut events = rig.controller().events();
        soft.raise_event(AsyncEvent::report(Event::TransientInternalError));
        comes_true("its log page is asked for", || {
            soft.faults_hit(FaultKind::Hold) == 1
        })
        .await;
        rig.abandon().await;
        assert!(events.next().await.is_none());
    });
}
