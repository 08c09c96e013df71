//! Memory that nobody registered, where the kernel allows little: few mappings, or little locked
//! memory.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use fastrand::Rng;
use nvme_async::{DmaBuf, Namespace, OpenOptions};
use tokio::runtime::Builder;
use tokio::task::JoinSet;

use crate::harness::{self, full, in_time, run, url};

/// Where the kernel has the number of mappings that a container may have.
const ENTRY_LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// Tasks, each with one request outstanding: more than there can be mappings.
const TASKS: u64 = 96;
/// The area of a task, and the longest request.
const LONGEST: usize = 192 << 10;
/// The shortest that is mapped rather than copied.
const SHORTEST: usize = 64 << 10;

/// The limit on mappings, until this is dropped.
struct EntryLimit(String);

impl EntryLimit {
    fn set(limit: u32) -> Self {
        let before = fs::read_to_string(ENTRY_LIMIT).expect("the module's parameter");
        fs::write(ENTRY_LIMIT, limit.to_string()).expect("root may change it");
        Self(before)
    }
}

impl Drop for EntryLimit {
    fn drop(&mut self) {
        fs::write(ENTRY_LIMIT, &self.0).expect("root may change it back");
    }
}

/// `count` writes and reads, half each, of memory of all lengths that was never registered, all
/// verified.
async fn write_and_verify(namespace: &Namespace, count: u64) {
    let left = Arc::new(AtomicU64::new(count / 2));
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (namespace, left) = (namespace.clone(), left.clone());
        tasks.spawn(async move {
            let mut random = Rng::with_seed(task);
            // Some of it is used again, with its owner; most is allocated anew each time, often at
            // an address that was used before.
            let mut again = random_bytes(&mut random);
            let take = || {
                left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    left.checked_sub(1)
                })
            };
            while take().is_ok() {
                let offset = task * LONGEST as u64;
                let written: Bytes = match random.u8(0..4) {
                    0 => namespace
                        .write(offset, again.clone())
                        .await
                        .expect("writes"),
                    1 => {
                        again = random_bytes(&mut random);
                        namespace
                            .write(offset, again.clone())
                            .await
                            .expect("writes")
                    }
                    _ => {
                        let data = random_bytes(&mut random).to_vec();
                        namespace.write(offset, data).await.expect("writes").into()
                    }
                };
                let buffer = DmaBuf::heap(written.len());
                let read = namespace.read_into(offset, buffer).await.expect("reads");
                assert!(written == read[..], "task {task} at {offset}: wrong data");
            }
        });
    }
    tasks.join_all().await;
}

fn random_bytes(random: &mut Rng) -> Bytes {
    let len = random.usize(SHORTEST / 512..=LONGEST / 512) * 512;
    // Not all of it is random, which would take longer than writing it.
    let mut data = vec![random.u8(..); len];
    for chunk in data.chunks_mut(4096) {
        chunk[..8].copy_from_slice(&random.u64(..).to_ne_bytes());
    }
    data.into()
}

#[test]
fn buffers_that_were_never_registered_through_66_mappings() {
    run(1200, async || {
        let _limit = EntryLimit::set(66);
        let options = OpenOptions::new().retained_bytes(64 << 20);
        let namespace = options.url(&url("plain", 1)).open().await.expect("opens");
        let usage = namespace.controller().mappings();
        assert_eq!(usage.max_mappings, Some(66), "the kernel says so");
        let before = namespace.controller().counters();
        let count = if full() { 100_000 } else { 4_000 };
        write_and_verify(&namespace, count).await;
        let after = namespace.controller().counters();
        let usage = namespace.controller().mappings();
        println!("{count} reads and writes: {usage:?}");
        assert!(after.completions - before.completions >= count);
        // On a busy machine, the turn of some may not come in time.
        let most = after.completions * SHORTEST as u64 / 10;
        println!("copied: {} bytes", after.bounced_bytes);
        assert!(after.bounced_bytes < most, "they waited instead of copying");
        assert!(usage.recycled_mappings > 0, "the limit was reached");
        assert_eq!((usage.leaked_mappings, usage.waiting), (0, 0));
        harness::close(namespace).await;
    });
}

/// The variable by which this program knows that it is the user's.
const AS_USER: &str = "NVME_ASYNC_TEST_AS_USER";
/// What of memory may be locked: less than the tasks have in flight, more than one request needs.
const MEMLOCK: u64 = 14 << 20;

/// A user without CAP_IPC_LOCK, who has been given the group's node, and may lock memory into which
/// only a part of what is in flight fits.
#[test]
fn as_a_user_with_little_locked_memory() {
    if std::env::var_os(AS_USER).is_some() {
        return in_time(1200, as_user);
    }
    in_time(1300, || {
        let _owner = Owner::give(group_node(&harness::address("plain")), 65534);
        // Where the user may read it, whatever the permissions on the way to where it was built.
        let program = Path::new("/run/vm-tests-as-user");
        fs::copy(std::env::current_exe().expect("this program"), program).expect("a copy");
        fs::set_permissions(program, fs::Permissions::from_mode(0o755)).expect("readable");
        let user = Command::new("prlimit")
            .arg(format!("--memlock={MEMLOCK}:{MEMLOCK}"))
            .args([
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
            ])
            .args(["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"])
            .arg(program)
            .args(["--exact", "--nocapture"])
            .arg("standard::mappings::as_a_user_with_little_locked_memory")
            .current_dir("/")
            .env(AS_USER, "1")
            // Its results are not to be counted among those of the tests here.
            .output()
            .expect("prlimit and setpriv are there");
        fs::remove_file(program).expect("removes the copy");
        let [out, err] =
            [user.stdout, user.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(
            user.status.success(),
            "the user's part failed:\n{out}\n{err}"
        );
        let said = out.lines().filter(|line| line.contains("reads and writes"));
        said.for_each(|line| println!("{line}"));
    });
}

/// A file that is another user's until this is dropped.
struct Owner(PathBuf);

impl Owner {
    fn give(file: PathBuf, user: u32) -> Self {
        chown(&file, Some(user), Some(user)).expect("root may give it away");
        Self(file)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        chown(&self.0, Some(0), Some(0)).expect("root may take it back");
    }
}

fn as_user() {
    let status = fs::read_to_string("/proc/self/status").expect("readable");
    let capabilities = status.lines().find(|line| line.starts_with("CapEff:"));
    assert_eq!(capabilities, Some("CapEff:\t0000000000000000"));
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        let options = OpenOptions::new()
            .retained_bytes(64 << 20)
            .pool_limit(4 << 20)
            .max_transfer(256 << 10);
        let namespace = options.url(&url("plain", 1)).open().await.expect("opens");
        let count = if full() { 20_000 } else { 2_000 };
        write_and_verify(&namespace, count).await;
        let usage = namespace.controller().mappings();
        println!("{count} reads and writes as a user: {usage:?}");
        assert!(usage.recycled_mappings > 0, "the limit was reached");
        assert_eq!((usage.leaked_mappings, usage.waiting), (0, 0));
        harness::close(namespace).await;
    });
}

/// The node of a function's IOMMU group.
fn group_node(address: &str) -> PathBuf {
    let link = format!("/sys/bus/pci/devices/{address}/iommu_group");
    let group = fs::read_link(link).expect("it has a group");
    Path::new("/dev/vfio").join(group.file_name().expect("a number"))
}
