//! The command line on a real controller.

use std::fs;

use fastrand::Rng;

use crate::harness::{
    address, assert_says, full, nvme_async, nvme_async_json, program, url, within,
};
use crate::kernel::Kernel;
use crate::memory::assert_same;

#[test]
fn bench_reads() {
    within(120, || {
        let seconds = if full() { "5" } else { "2" };
        let report = nvme_async_json(&[
            "bench",
            &url("plain", 1),
            "--rw",
            "randread",
            "--bs",
            "4k",
            "--iodepth",
            "4",
            "--runtime",
            seconds,
            "--ramp",
            "0",
            "--json",
        ]);
        assert_eq!(report["errors"], 0, "{report:#}");
        assert!(report["iops"].as_f64() > Some(0.0), "{report:#}");
        assert!(report["ios"].as_u64() > Some(0), "{report:#}");
    });
}

#[test]
fn bench_verifies() {
    within(120, || {
        let report = nvme_async_json(&[
            "bench",
            &url("lba4096", 1),
            "--rw",
            "randrw",
            "--bs",
            "8k",
            "--iodepth",
            "16",
            "--jobs",
            "2",
            "--size",
            "4M",
            "--runtime",
            "2",
            "--ramp",
            "0",
            "--verify",
            "--json",
        ]);
        assert_eq!(report["errors"], 0, "{report:#}");
        assert!(report["ios"].as_u64() > Some(0), "{report:#}");
    });
}

/// From a file to the controller, to the kernel's eyes, and back to a file.
#[test]
fn copy_there_and_back() {
    within(120, || {
        let mut data = vec![0; (5 << 20) + 512];
        Rng::with_seed(0xc0).fill(&mut data);
        let (there, back) = ("/run/there.img", "/run/back.img");
        fs::write(there, &data).expect("writes");
        nvme_async(&["copy", there, &url("plain", 1), "--verify"]);
        let size = data.len().to_string();
        nvme_async(&["copy", &url("plain", 1), back, "--size", &size, "--verify"]);
        assert_same(&fs::read(back).expect("reads"), &data, "what came back");
        let kernel = Kernel::take(&address("plain"));
        assert_same(
            &kernel.disk(1).read(data.len()),
            &data,
            "what the kernel reads",
        );
    });
}

/// One that is mounted, or open for anybody alone, stays with the kernel.
#[test]
fn bind_refuses_what_is_in_use() {
    within(120, || {
        let address = address("plain");
        let kernel = Kernel::take(&address);
        let disk = kernel.disk(1);
        let held = disk.hold();
        let ended = program(&["nvme-async", "bind", &address]);
        assert_eq!(ended.status, Some(1), "{ended:#?}");
        assert_says(ended.stderr, &[&*address, "in use"]);
        drop(held);
    });
}
