//! Controllers that fail by themselves.

use std::time::Duration;

use nvme_async::OpenOptions;

use super::is_of_recovery;
use super::load::{DEPTH, Load};
use super::registers;
use crate::harness::{self, run, url};

#[test]
fn a_fatal_error_under_load() {
    run(300, async || {
        let options = OpenOptions::new().url(&url("plain", 1));
        let options = options.timeout(Some(Duration::from_secs(2)));
        for _ in 0..3 {
            let namespace = options.clone().open().await.expect("opens");
            let mut load = Load::start(&namespace, |_| false).await;
            load.reaches(5 * DEPTH).await;
            registers::fail();
            load.reaches(2 * DEPTH).await;
            let mut outcome = load.end().await;
            assert!(outcome.errors().all(is_of_recovery), "{outcome:?}");
            drop(namespace);

            let namespace = options.clone().open().await.expect("opens again");
            outcome.verify(&namespace).await;
            harness::close(namespace).await;
        }
    });
}
