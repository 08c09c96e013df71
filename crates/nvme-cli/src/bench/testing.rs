//! What the tests of this module share.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use tempfile::TempDir;

use super::Workload;
use super::ledger::Ledger;
use super::plan::Plan;
use super::worker::{PhaseCell, Shared, Verification};

/// A run with `--verify` over all of a namespace.
pub(super) async fn shared(url: &str, bs: usize, workload: Workload) -> Arc<Shared> {
    let namespace = nvme_async::open(url).await.expect("a software controller");
    let blocks = namespace.capacity() / bs as u64;
    let plan = Plan {
        workload,
        bs,
        block_size: namespace.block_size() as usize,
        offset: 0,
        blocks,
        jobs: 1,
        iodepth: 1,
        read_percent: 50,
        fua: false,
        seed: 1,
    };
    let verification = Verification {
        run: 7,
        ledger: Ledger::new(blocks),
        earlier_run: false,
    };
    Arc::new(Shared {
        plan,
        namespace,
        verification: Some(verification),
        phase: PhaseCell::new(),
        first_error: OnceLock::new(),
    })
}

pub(super) async fn close(shared: &Shared) {
    shared
        .namespace
        .controller()
        .shutdown()
        .await
        .expect("shutdown");
}

/// A backing file that can be changed behind the controller's back.
pub(super) struct Disk {
    dir: TempDir,
}

impl Disk {
    pub(super) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("a temporary directory"),
        }
    }

    pub(super) fn url(&self, size: &str) -> String {
        format!("file:{}?size={size}", self.path().display())
    }

    pub(super) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.open()
            .read_exact_at(&mut data, offset)
            .expect("read the file");
        data
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        self.open()
            .write_all_at(data, offset)
            .expect("write the file");
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk.img")
    }

    fn open(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(self.path())
            .expect("open the file")
    }
}
