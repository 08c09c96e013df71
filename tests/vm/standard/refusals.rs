//! What can't be opened, and what the message says to do.

use std::fs;
use std::process;

use nvme_async::Error;

use crate::harness::{self, Ended, address, assert_says, nvme_async, program, run, url};
use crate::kernel::Kernel;

const PCI: &str = "/sys/bus/pci";

/// Opens the first namespace of a controller, which must fail, and returns the message.
async fn refusal(name: &str) -> String {
    let error = nvme_async::open(&url(name, 1)).await;
    let error = error.expect_err("it can't be opened");
    assert!(matches!(error, Error::Open { .. }), "{error:?}");
    error.to_string()
}

/// Runs a command, which must fail.
fn failure(words: &[&str]) -> Ended {
    let ended = program(words);
    assert_eq!(ended.status, Some(1), "{words:?}: {ended:#?}");
    ended
}

#[test]
fn bound_to_the_kernels_driver() {
    run(120, async || {
        let address = address("plain");
        let kernel = Kernel::take(&address);
        kernel.disk(1);
        let bind = format!("nvme-async bind {address}");
        let says = [&*address, "the driver `nvme`", "not to vfio-pci", &*bind];
        assert_says(refusal("plain").await, &says);
        let ended = failure(&["nvme-async", "identify", &url("plain", 1)]);
        assert_says(ended.stderr, &says);
        drop(kernel);
        harness::close(harness::open("plain").await).await;
    });
}

#[test]
fn bound_to_no_driver() {
    run(120, async || {
        let address = address("plain");
        fs::write(format!("{PCI}/drivers/vfio-pci/unbind"), &address).expect("unbinds");
        let bind = format!("nvme-async bind {address}");
        let says = [&*address, "no driver", "not to vfio-pci", &*bind];
        assert_says(refusal("plain").await, &says);
        let ended = failure(&["nvme-async", "identify", &url("plain", 1)]);
        assert_says(ended.stderr, &says);
        nvme_async(&["bind", &address]);
        harness::close(harness::open("plain").await).await;
    });
}

#[test]
fn in_use_by_another_process() {
    run(120, async || {
        let namespace = harness::open("plain").await;
        let me = process::id().to_string();
        let address = address("plain");
        let ended = failure(&["nvme-async", "identify", &url("plain", 1)]);
        assert_says(ended.stderr, &[&*address, "IOMMU group", "in use by", &*me]);
        let ended = failure(&["nvme-async", "unbind", &address]);
        assert_says(ended.stderr, &[&*address, "in use", &*me]);
        // It is as it was.
        namespace.write(0, vec![5; 4096]).await.expect("writes");
        assert_eq!(namespace.read(0, 4096).await.expect("reads"), vec![5; 4096]);
        harness::close(namespace).await;
        nvme_async(&["identify", &url("plain", 1)]);
    });
}

/// The limit does not hold for root, unless it lacks the capability.
#[test]
fn too_little_memory_may_be_locked() {
    run(120, async || {
        let url = url("plain", 1);
        let limited = [
            "setpriv",
            "--bounding-set=-ipc_lock",
            "prlimit",
            "--memlock=65536:65536",
            "nvme-async",
            "identify",
        ];
        let ended = failure(&[&limited[..], &[&url]].concat());
        assert_says(
            ended.stderr,
            &[
                "can't be locked",
                "RLIMIT_MEMLOCK",
                "ulimit -l",
                "CAP_IPC_LOCK",
            ],
        );
        nvme_async(&["identify", &url]);
    });
}

#[test]
fn the_groups_node_is_not_for_everyone() {
    run(120, async || {
        // Where the user may execute it.
        let which = program(&["sh", "-c", "command -v nvme-async"]).stdout;
        let copy = "/run/nvme-async-for-nobody";
        fs::copy(which.trim(), copy).expect("copies the program");
        let url = url("plain", 1);
        let nobody = [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
        ];
        let ended = failure(&[&nobody[..], &[copy, "identify", &url]].concat());
        assert_says(
            ended.stderr,
            &["no permission to open /dev/vfio/", "root", "chown"],
        );
    });
}

#[test]
fn no_such_function_or_namespace() {
    run(120, async || {
        let error = nvme_async::open("nvme://0000:00:0f.7").await;
        assert_says(
            error.expect_err("nothing is there"),
            &["0000:00:0f.7", "no such PCI function", "nvme-async list"],
        );
        let error = nvme_async::open("nvme://0000:00:00.0").await;
        assert_says(
            error.expect_err("the host bridge"),
            &["0000:00:00.0", "not an NVMe controller"],
        );
        let ended = program(&["nvme-async", "bench", &url("plain", 9), "--rw", "read"]);
        assert_eq!(ended.status, Some(2), "{ended:#?}");
        assert_says(ended.stderr, &["namespace 9 is not active", "[1]"]);
    });
}
