//! What there is, by the command line and by the library.

use std::fs;
use std::path::Path;

use nvme_async::OpenOptions;
use serde_json::Value;

use crate::harness::{self, address, nvme_async_json, run, url, within};
use crate::kernel::Kernel;

/// The controllers of this machine.
const NAMES: [&str; 8] = [
    "plain",
    "lba4096",
    "two_namespaces",
    "mdts",
    "one_queue",
    "short_queues",
    "group_first",
    "group_second",
];
/// Bytes of each namespace.
const SIZE: u64 = 1 << 30;

fn listed(address: &str) -> Value {
    let list = nvme_async_json(&["list", "--json"]);
    let functions = list.as_array().expect("an array");
    functions
        .iter()
        .find(|function| function["address"] == address)
        .unwrap_or_else(|| panic!("{address} is not in {list:#}"))
        .clone()
}

#[test]
fn list_shows_all_controllers() {
    within(60, || {
        let list = nvme_async_json(&["list", "--json"]);
        assert_eq!(list.as_array().map(Vec::len), Some(NAMES.len()), "{list:#}");
        for name in NAMES {
            let address = address(name);
            let function = listed(&address);
            assert_eq!(function["driver"], "vfio-pci", "{name}");
            // Known to the kernel's driver only.
            assert_eq!(function["model"], Value::Null, "{name}");
            let link = Path::new("/sys/bus/pci/devices").join(&address);
            let group = fs::read_link(link.join("iommu_group")).expect("it has a group");
            let group = group.file_name().and_then(|name| name.to_str());
            assert_eq!(Some(&*function["iommu_group"].to_string()), group, "{name}");
        }
    });
}

#[test]
fn list_knows_more_while_the_kernel_has_it() {
    within(120, || {
        let address = address("two_namespaces");
        let kernel = Kernel::take(&address);
        kernel.disk(1);
        kernel.disk(2);
        let function = listed(&address);
        assert_eq!(function["driver"], "nvme");
        assert_eq!(function["model"], "QEMU NVMe Ctrl");
        assert_eq!(function["size"], 2 * SIZE);
        drop(kernel);
        assert_eq!(listed(&address)["driver"], "vfio-pci");
    });
}

#[test]
fn identify_agrees_with_the_machine_and_the_library() {
    run(120, async || {
        for name in NAMES {
            let url = url(name, 1);
            let identity = nvme_async_json(&["identify", &url, "--json"]);
            let (block_size, namespaces) = match name {
                "lba4096" => (4096, 1),
                "two_namespaces" => (512, 2),
                _ => (512, 1),
            };
            let controller = &identity["controller"];
            assert_eq!(controller["model"], "QEMU NVMe Ctrl", "{name}");
            assert_eq!(controller["serial"], name);
            let listed = identity["namespaces"].as_array().expect("an array");
            assert_eq!(listed.len(), namespaces, "{name}");
            for (namespace, nsid) in listed.iter().zip(1..) {
                assert_eq!(namespace["nsid"], nsid, "{name}");
                assert_eq!(namespace["size_bytes"], SIZE, "{name}");
                assert_eq!(namespace["block_size"], block_size, "{name}");
            }
            if name == "mdts" {
                assert_eq!(controller["max_transfer_bytes"], 8192);
            }
            if name == "short_queues" {
                assert_eq!(controller["max_queue_entries"], 8);
            }

            let opened = OpenOptions::new().url(&url).open_controller().await;
            let opened = opened.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(controller["model"], opened.identify().model_number());
            assert_eq!(controller["serial"], opened.identify().serial_number());
            assert_eq!(controller["version"], opened.version().to_string());
            assert_eq!(
                controller["max_queue_entries"],
                opened.capabilities().max_queue_entries()
            );
            let active = opened.active_namespaces().await.expect("lists namespaces");
            assert!(active.iter().copied().eq(1..=namespaces as u32), "{name}");
            let namespace = opened.namespace(1).await.expect("opens the namespace");
            assert_eq!(namespace.capacity(), SIZE);
            assert_eq!(namespace.block_size(), block_size);
            drop(opened);
            harness::close(namespace).await;
        }
    });
}
