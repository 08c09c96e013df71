//! What a namespace keeps its data in, and how to spoil it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use serde_json::{Value, json};

use crate::monitor::{execute, try_execute};

/// Something between a namespace and its drive, from when it is made until it is dropped.
#[derive(Debug)]
pub(super) struct Layer {
    drive: String,
    node: String,
    group: Option<String>,
}

/// Requests that the drive fails.
#[derive(Clone, Copy, Debug)]
pub(super) enum Failing {
    /// Reads of this sector, of 512 bytes.
    Read(u64),
    /// Writes of this sector, of 512 bytes.
    Write(u64),
    /// Flushes.
    Flush,
}

impl Layer {
    /// Makes some requests to the first namespace of this controller fail with an I/O error, each
    /// time.
    pub(super) fn failing(controller: &str, requests: &[Failing]) -> Self {
        let rules: Vec<Value> = requests
            .iter()
            .map(|request| {
                let mut rule = json!({ "event": "none", "errno": libc::EIO });
                let (kind, sector) = match request {
                    Failing::Read(sector) => ("read", Some(sector)),
                    Failing::Write(sector) => ("write", Some(sector)),
                    Failing::Flush => ("flush", None),
                };
                rule["iotype"] = json!(kind);
                if let Some(sector) = sector {
                    rule["sector"] = json!(sector);
                }
                rule
            })
            .collect();
        let drive = format!("{controller}n1");
        let options = json!({ "driver": "blkdebug", "image": drive, "inject-error": rules });
        Self::insert(drive, options, None)
    }

    /// Limits the first namespace of this controller to so many bytes a second, after one request
    /// of any length.
    pub(super) fn throttled(controller: &str, bytes_per_second: u64) -> Self {
        let drive = format!("{controller}n1");
        let group = unused_name("group");
        let limits = json!({ "bps-total": bytes_per_second });
        let object = json!({ "qom-type": "throttle-group", "id": group, "limits": limits });
        execute("object-add", object);
        let options = json!({ "driver": "throttle", "file": drive, "throttle-group": group });
        Self::insert(drive, options, Some(group))
    }

    fn insert(drive: String, mut options: Value, group: Option<String>) -> Self {
        let node = unused_name("layer");
        options["node-name"] = json!(node);
        execute("blockdev-add", options);
        let layer = Self { drive, node, group };
        execute("qom-set", layer.attaching(&layer.node));
        layer
    }

    /// The namespace's device and its drive have one name.
    fn attaching(&self, node: &str) -> Value {
        let path = format!("/machine/peripheral/{}", self.drive);
        json!({ "path": path, "property": "drive", "value": node })
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        let mut steps = vec![
            ("qom-set", self.attaching(&self.drive)),
            ("blockdev-del", json!({ "node-name": self.node })),
        ];
        if let Some(group) = &self.group {
            steps.push(("object-del", json!({ "id": group })));
        }
        for (command, arguments) in steps {
            let result = try_execute(command, arguments);
            // A second panic would hide the first.
            assert!(
                result.is_ok() || thread::panicking(),
                "{command}: {result:?}"
            );
        }
    }
}

fn unused_name(kind: &str) -> String {
    static USED: AtomicU64 = AtomicU64::new(0);
    format!("{kind}{}", USED.fetch_add(1, Ordering::Relaxed))
}
