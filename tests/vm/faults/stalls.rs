//! Commands that take longer than they may.
//!
//! What stalls here goes on by itself after seconds at most: while a command is outstanding, QEMU
//! does not finish the deletion of its submission queue, and the whole machine stands still
//! meanwhile.

use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::join;
use nvme_async::{Error, Namespace, OpenOptions};

use super::drive::Layer;
use super::is_of_recovery;
use super::load::{DEPTH, LEN, Load};
use crate::harness::{self, run, url};

/// How long a command may take. Nothing that does not stall takes nearly as long.
const DEADLINE: Duration = Duration::from_secs(2);

async fn open() -> Namespace {
    let options = OpenOptions::new().url(&url("plain", 1));
    let namespace = options.timeout(Some(DEADLINE)).open().await;
    namespace.expect("opens")
}

/// Makes what comes next wait for about so long: a throttled drive does the first request at once,
/// and has to make up for it. Nothing may be outstanding.
async fn stall(namespace: &Namespace, time: Duration) -> Layer {
    const BYTES_PER_SECOND: u64 = 64 << 10;
    let layer = Layer::throttled("plain", BYTES_PER_SECOND);
    let len = (BYTES_PER_SECOND * time.as_secs()) as usize;
    namespace.read(0, len).await.expect("the first is done");
    layer
}

/// A read or write that is suspended past its deadline and done later.
#[test]
fn one_late_command() {
    run(120, async || {
        let namespace = open().await;
        let len = LEN as u64;
        let old = namespace.write(0, vec![0x0d; LEN]).await.expect("writes");
        let old = namespace.write(len, old).await.expect("writes");
        let new = vec![0x0e; LEN];

        let layer = stall(&namespace, 3 * DEADLINE).await;
        let start = Instant::now();
        let (read, written) = join(namespace.read(0, LEN), namespace.write(len, new.clone())).await;
        let elapsed = start.elapsed();
        match read {
            Ok(read) => assert_eq!(read, old),
            Err(error) => assert!(is_of_recovery(&error), "{error:?}"),
        }
        let in_doubt = match written {
            Ok(_) => false,
            Err(failed) => {
                assert!(is_of_recovery(&failed.error), "{failed:?}");
                if let Error::TimedOut { command, after, .. } = &failed.error {
                    assert_eq!(command.name, "Write");
                    assert_eq!(command.blocks, Some(8..16));
                    assert!(*after >= DEADLINE, "{failed}");
                }
                assert!(failed.buffer.is_none_or(|buffer| buffer == new));
                true
            }
        };
        assert!(elapsed >= DEADLINE, "{elapsed:?}");

        // When the stall is over, all is as if it had not been.
        drop(layer);
        namespace.quiesce().await.expect("quiesces");
        assert_eq!(namespace.read(0, LEN).await.expect("reads"), old);
        let read = namespace.read(len, LEN).await.expect("reads");
        assert!(read == new || in_doubt && read == old, "what was written");
        let new = namespace.write(len, new).await.expect("writes");
        assert_eq!(namespace.read(len, LEN).await.expect("reads"), new);
        harness::close(namespace).await;
    });
}

/// Of what is asked of it, the drive can do about half before the deadline.
#[test]
fn a_drive_that_is_too_slow() {
    run(300, async || {
        let namespace = open().await;
        let mut load = Load::start(&namespace, |_| false).await;
        // All that is outstanding at one time takes two deadlines.
        let rate = DEPTH * LEN as u64 / 2 / DEADLINE.as_secs();
        let layer = Layer::throttled("plain", rate);
        load.reaches(5 * DEPTH).await;
        drop(layer);
        namespace.quiesce().await.expect("quiesces");
        load.reaches(20 * DEPTH).await;
        let mut outcome = load.end().await;
        outcome.assert_errors(is_of_recovery);
        assert!(outcome.errors().next().is_some(), "nothing was late");
        assert!(outcome.succeeded() > 0, "nothing was done");
        namespace.quiesce().await.expect("quiesces");
        outcome.verify(&namespace).await;
        harness::close(namespace).await;
    });
}

/// A namespace of another controller does not notice.
#[test]
fn others_go_on() {
    run(120, async || {
        let slow = open().await;
        let other = harness::open("attachable").await;
        let mut load = Load::start(&other, |_| false).await;
        let layer = stall(&slow, 2 * DEADLINE).await;
        let (late, ()) = join(slow.read(0, LEN), load.reaches(10 * DEPTH)).await;
        if let Err(error) = late {
            assert!(is_of_recovery(&error), "{error:?}");
        }
        let mut outcome = load.end().await;
        assert_eq!(outcome.errors().count(), 0);
        outcome.verify(&other).await;
        drop(layer);
        harness::close(other).await;
        harness::close(slow).await;
    });
}

/// Neither a shutdown nor the end of the last handle waits for ever, and the next one finds the
/// controller as it should be.
#[test]
fn closing_meanwhile() {
    run(300, async || {
        let is_closed = |error: &Error| matches!(error, Error::Closed { .. });
        let rate = DEPTH * LEN as u64 / 3 / DEADLINE.as_secs();
        let namespace = open().await;
        let mut load = Load::start(&namespace, is_closed).await;
        let layer = Layer::throttled("plain", rate);
        load.reaches(DEPTH / 2).await;
        // It says so if commands were outstanding to the end.
        let ended = namespace.controller().shutdown().await;
        println!("shut down: {ended:?}");
        let mut outcome = load.join().await;

        outcome.assert_errors(|error| is_closed(error) || is_of_recovery(error));
        drop((namespace, layer));
        let namespace = open().await;
        outcome.verify(&namespace).await;

        let layer = Layer::throttled("plain", rate);
        for place in 0..DEPTH {
            let read = namespace.read(place * LEN as u64, LEN);
            drop(read.now_or_never());
        }
        drop(namespace);
        let namespace = open().await;
        drop(layer);
        outcome.verify(&namespace).await;
        harness::close(namespace).await;
    });
}
