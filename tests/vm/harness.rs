//! What all tests need: the machine's controllers, the command line, and an end to every test.

use std::env;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::panic;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use nvme_async::Namespace;
use tokio::runtime::Builder;

/// The PCI address of the controller that the machine has under this name.
pub(crate) fn address(name: &str) -> String {
    let variable = format!("NVME_{}", name.to_ascii_uppercase());
    env::var(&variable)
        .unwrap_or_else(|_| panic!("{variable} is not set; `cargo xtask test` runs these tests"))
}

/// The URL of a namespace of that controller.
pub(crate) fn url(name: &str, nsid: u32) -> String {
    format!("nvme://{}/{nsid}", address(name))
}

/// Opens the first namespace of that controller with default options.
pub(crate) async fn open(name: &str) -> Namespace {
    let url = url(name, 1);
    nvme_async::open(&url)
        .await
        .unwrap_or_else(|error| panic!("{url}: {error}"))
}

/// Shuts the controller down and drops the handle.
pub(crate) async fn close(namespace: Namespace) {
    let controller = namespace.controller();
    controller.shutdown().await.expect("shuts down in order");
}

/// Whether the counts that take long are wanted.
pub(crate) fn full() -> bool {
    env::var_os("NVME_ASYNC_FULL").is_some()
}

/// Runs `test` in a runtime with as many workers as the machine has processors.
pub(crate) fn run<F>(seconds: u64, test: impl FnOnce() -> F + Send + 'static)
where
    F: Future<Output = ()>,
{
    run_on(2, seconds, test);
}

/// Runs `test` in a runtime with so many workers.
pub(crate) fn run_on<F>(workers: usize, seconds: u64, test: impl FnOnce() -> F + Send + 'static)
where
    F: Future<Output = ()>,
{
    within(seconds, move || {
        let runtime = Builder::new_multi_thread()
            .worker_threads(workers)
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(test());
    });
}

/// Runs `test`, which fails if it has not ended by then, or if a device accessed memory that it
/// may not access.
pub(crate) fn within(seconds: u64, test: impl FnOnce() + Send + 'static) {
    let earlier = new_dma_faults();
    assert!(earlier.is_empty(), "before this test: {earlier:#?}");
    in_time(seconds, test);
    let faults = new_dma_faults();
    assert!(faults.is_empty(), "stray accesses: {faults:#?}");
}

/// Runs `test`, which fails if it has not ended by then.
pub(crate) fn in_time(seconds: u64, test: impl FnOnce() + Send + 'static) {
    static HANGS: AtomicBool = AtomicBool::new(false);
    assert!(
        !HANGS.load(Ordering::Relaxed),
        "not run: an earlier test hangs and may still have the controllers"
    );
    let (ended, end) = mpsc::channel();
    let thread = thread::spawn(move || {
        test();
        // Nobody listens any more if this is too late.
        let _ = ended.send(());
    });
    if end.recv_timeout(Duration::from_secs(seconds)) == Err(RecvTimeoutError::Timeout) {
        HANGS.store(true, Ordering::Relaxed);
        panic!("the test hangs: it did not end within {seconds} s");
    }
    if let Err(cause) = thread.join() {
        panic::resume_unwind(cause);
    }
}

/// What the IOMMU refused since this was last asked.
pub(crate) fn new_dma_faults() -> Vec<String> {
    static KNOWN: AtomicUsize = AtomicUsize::new(0);
    let mut faults = dma_faults();
    let known = KNOWN.swap(faults.len(), Ordering::Relaxed);
    faults.split_off(known.min(faults.len()))
}

/// What the IOMMU refused since the machine was booted, as the kernel reports it.
fn dma_faults() -> Vec<String> {
    let mut log = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .expect("root may read the kernel's log");
    let mut faults = Vec::new();
    // One read is one record.
    let mut record = [0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(len) => {
                let text = String::from_utf8_lossy(&record[..len]);
                if text.contains("DMAR") && text.contains("fault addr") {
                    faults.push(text.into_owned());
                }
            }
            // Records were overwritten before they were read.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return faults,
            Err(error) => panic!("/dev/kmsg: {error}"),
        }
    }
}

/// What a program left behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a program to its end.
pub(crate) fn program(words: &[&str]) -> Ended {
    let output = Command::new(words[0])
        .args(&words[1..])
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", words[0]));
    Ended {
        status: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs the command line, which must succeed, and returns what it printed.
pub(crate) fn nvme_async(words: &[&str]) -> String {
    let ended = program(&[&["nvme-async"], words].concat());
    assert_eq!(ended.status, Some(0), "nvme-async {words:?}: {ended:#?}");
    ended.stdout
}

/// Runs the command line, which must print one value of JSON.
pub(crate) fn nvme_async_json(words: &[&str]) -> serde_json::Value {
    let text = nvme_async(words);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{words:?}: {error}: {text}"))
}

/// Checks that a message says all of this.
pub(crate) fn assert_says(message: impl ToString, parts: &[&str]) {
    let message = message.to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}
