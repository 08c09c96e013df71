//! Nobody sees what may yet be lost.

use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use nvme_soft::fault::{Behaviour, Fault};
use nvme_spec::opcode::NvmOpcode;
use tokio::time::{sleep, timeout};

use super::clients::Running;
use super::{Disk, change, get, usage};
use crate::server::Limits;
use crate::store::{Change, Options, Store};

const MIB: usize = 1 << 20;
/// How long something is watched that is not to happen.
const WHILE: Duration = Duration::from_millis(200);

/// Writes, none of which comes to its end.
fn stuck() -> Fault {
    let stuck = Fault::new(Behaviour::Hold).opcode(NvmOpcode::WRITE);
    stuck.times(0)
}

#[tokio::test]
async fn a_key_that_expires_or_does_not_because_of_a_write_that_may_be_lost() {
    static CLOCK: AtomicU64 = AtomicU64::new(0);
    let key = Bytes::from("a");
    let set = |value: &'static str, expires| Change::set(&key, &value.into(), expires);
    let expire = |expires| Change::expire(&key, expires);
    for (before, later, after) in [
        (set("old", 0), set("new", 2000), None),
        (set("old", 0), expire(2000), None),
        (set("old", 2000), expire(0), Some("old")),
    ] {
        CLOCK.store(1000, Ordering::Relaxed);
        let (device, namespace) = Disk::new(4 * MIB).attach(|_| {}).await;
        let options = Options {
            clock: || CLOCK.load(Ordering::Relaxed),
            ..Options::default()
        };
        let store = Store::open(namespace, options).await.expect("formats");
        change(&store, vec![before]).await.expect("fits");
        device.controller().inject(stuck()).expect("makes sense");
        let (_, commit) = store
            .change(|_| (vec![later.clone()], ()))
            .await
            .expect("fits");
        CLOCK.store(3000, Ordering::Relaxed);
        let found = store.get(&key).expect("works");
        let seen = timeout(WHILE, found.value()).await;
        assert!(seen.is_err(), "{later:?}: {seen:?}");
        device.controller().clear_faults();
        device.controller().release_stuck();
        commit.durable().await.expect("works");
        assert_eq!(get(&store, "a").await, after.map(Bytes::from));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_counted_and_listed_once_they_are_durable() {
    let (device, namespace) = Disk::new(4 * MIB).attach(|_| {}).await;
    let store = Store::open(namespace, Options::default())
        .await
        .expect("formats");
    // Then there is a segment for what is to come.
    change(&store, vec![Change::clear()]).await.expect("works");
    let server = Running::serve(store, Limits::default()).await;
    device.controller().inject(stuck()).expect("makes sense");
    let mut writer = server.connect();
    writer.write_all(b"SET a 1\r\n").expect("is open");
    while usage(&server.store).keys == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    let mut questions: [(_, &[u8], _); 2] = [
        (server.connect(), b"DBSIZE\r\n", ":1\r\n"),
        (
            server.connect(),
            b"SCAN 0\r\n",
            "*2\r\n$1\r\n0\r\n*1\r\n$1\r\na\r\n",
        ),
    ];
    for (stream, question, _) in &mut questions {
        stream.write_all(question).expect("is open");
        stream.set_read_timeout(Some(WHILE)).expect("is a socket");
        let early = stream.read(&mut [0]).expect_err("nothing is durable");
        assert_eq!(early.kind(), ErrorKind::WouldBlock);
        stream.set_read_timeout(None).expect("is a socket");
    }
    device.controller().clear_faults();
    device.controller().release_stuck();
    for (stream, _, answer) in &mut questions {
        let mut found = vec![0; answer.len()];
        stream.read_exact(&mut found).expect("is served");
        assert_eq!(found, answer.as_bytes());
    }
    drop((writer, questions));
    server.end().await;
}
