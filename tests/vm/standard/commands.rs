//! The command line, and the commands that a controller need not have, on a real controller.

use std::{fs, slice};

use fastrand::Rng;
use nvme_async::Error;

use crate::harness::{
    self, address, assert_says, full, nvme_async, nvme_async_json, program, run, url, within,
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

/// The suite passes them over where they are missing. Here they are but for Verify, and the kernel
/// sees what was copied.
#[test]
fn compare_verify_and_copy() {
    run(120, async || {
        let mut random = Rng::with_seed(0xc1);
        let mut image = vec![0; 2 << 20];
        random.fill(&mut image[..1 << 20]);
        let namespace = harness::open("plain").await;
        namespace.write(0, image.clone()).await.expect("writes");
        // Whole, which takes several commands, then pieces of it in another order.
        namespace
            .copy(slice::from_ref(&(0..1 << 20)), 1 << 20)
            .await
            .expect("copies");
        image.copy_within(..1 << 20, 1 << 20);
        let pieces: Vec<_> = (0..200u64)
            .rev()
            .map(|piece| piece * 1024..piece * 1024 + 512)
            .collect();
        namespace.copy(&pieces, 3 << 19).await.expect("copies");
        for (index, piece) in pieces.iter().enumerate() {
            let piece = piece.start as usize..piece.end as usize;
            image.copy_within(piece, (3 << 19) + index * 512);
        }
        let verified = namespace.verify(0, image.len() as u64).await;
        let identify = namespace.controller().identify();
        match identify.optional_nvm_commands().verify() {
            true => verified.expect("it can be read"),
            // As with some versions of QEMU.
            false => {
                let error = verified.expect_err("there is no such command");
                assert!(matches!(error, Error::Unsupported { .. }), "{error}");
            }
        }
        let mut back = namespace.compare(0, image.clone()).await.expect("equal");
        back[image.len() - 1] ^= 1;
        let differs = namespace.compare(0, back).await.expect_err("differs");
        assert!(differs.error.is_compare_failure(), "{differs}");
        assert!(differs.buffer.is_some());
        harness::close(namespace).await;
        let kernel = Kernel::take(&address("plain"));
        let read = kernel.disk(1).read(image.len());
        assert_same(&read, &image, "what the kernel reads");
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
