//! The binary as a user meets it: exit statuses, what is printed where, and what is written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// A directory to work in.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("a temporary directory"),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file of bytes that repeat at no power of two.
    fn file(&self, name: &str, len: usize) -> Vec<u8> {
        let contents: Vec<u8> = (0..len).map(|index| (index % 251) as u8).collect();
        std::fs::write(self.path(name), &contents).expect("write a file");
        contents
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("read a file")
    }

    fn run(&self, line: &str) -> Run {
        let output = Command::new(env!("CARGO_BIN_EXE_nvme-async"))
            .args(line.split_whitespace())
            .current_dir(self.dir.path())
            .env("RUST_LOG", "off")
            .output()
            .expect("run nvme-async");
        Run {
            line: line.to_owned(),
            output,
        }
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).expect("read the directory");
        entries
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect()
    }
}

/// A run of the binary that has ended.
struct Run {
    line: String,
    output: Output,
}

impl Run {
    fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    #[track_caller]
    fn exits(self, status: i32) -> Self {
        let Self { line, .. } = &self;
        let (out, err) = (self.stdout(), self.stderr());
        assert_eq!(
            self.output.status.code(),
            Some(status),
            "{line}\n{out}\n{err}"
        );
        self
    }

    /// One JSON object, and nothing else on stdout.
    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout()).expect("one JSON object")
    }

    #[track_caller]
    fn complains(self, about: &str) -> Self {
        let (out, err) = (self.stdout(), self.stderr());
        assert!(
            err.contains(about),
            "{}: {about:?} is not in: {err}",
            self.line
        );
        assert!(
            out.is_empty(),
            "{}: nothing belongs on stdout: {out}",
            self.line
        );
        self
    }
}

fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = File::options()
        .write(true)
        .open(path)
        .expect("open the file");
    file.write_all_at(bytes, offset).expect("write to the file");
}

#[test]
fn bench_prints_one_object() {
    let place = Place::new();
    for flavor in ["current", "multi"] {
        for poll in ["adaptive", "interrupt", "busy"] {
            let run = place.run(&format!(
                "bench mem:?size=4M --rw randread --iodepth 4 --jobs 2 --runtime 0.1 --ramp 0.05 \
                 --flavor {flavor} --poll {poll} --json"
            ));
            let run = run.exits(0);
            let report = run.json();
            assert!(report["iops"].as_f64().expect("a number") > 0.0);
            assert!(report["bandwidth_bytes"].as_f64().expect("a number") > 0.0);
            assert!(report["ios"].as_u64().expect("a count") > 0);
            assert_eq!(report["errors"], 0);
            let latency = &report["latency_ns"];
            let at = |name: &str| latency[name].as_f64().expect("a number");
            assert!(0.0 < at("p50") && at("p50") <= at("p99"), "{latency}");
            assert!(
                at("p99") <= at("p999") && at("p999") <= at("max"),
                "{latency}"
            );
            assert!(at("mean") <= at("max"), "{latency}");
            for name in ["cpu_percent", "controller_cpu_percent"] {
                assert!(report[name].is_f64(), "{name}");
            }
            for name in [
                "interrupts",
                "submission_doorbells",
                "completion_doorbells",
                "unwritten_doorbells",
                "window_hits",
                "window_misses",
                "polling_ns",
                "sleeps",
                "polled_completions",
                "lost_interrupts",
                "bounced_bytes",
            ] {
                assert!(report[name].is_u64(), "{name}");
            }
            assert_eq!(report["bounced_bytes"], 0);
            if poll == "busy" {
                assert_eq!(report["interrupts"], 0);
            }
            assert!(run.stderr().is_empty(), "{}", run.stderr());
        }
    }
}

#[test]
fn bench_for_people() {
    let place = Place::new();
    let run = place
        .run("bench mem:?size=1M --rw write --bs 64k --runtime 0.05 --ramp 0")
        .exits(0);
    for word in [
        "write of 64 KiB",
        "IOPS",
        "latency",
        "p99.9",
        "0 errors",
        "CPU",
    ] {
        assert!(run.stdout().contains(word), "{word}: {}", run.stdout());
    }
    assert!(run.stderr().is_empty(), "{}", run.stderr());
}

#[test]
fn every_workload_verifies() {
    let place = Place::new();
    for rw in ["read", "write", "randread", "randwrite", "randrw"] {
        for (url, bs) in [("mem:?size=1M", "512"), ("mem:?size=1M&lba=4096", "12k")] {
            let run = place.run(&format!(
                "bench {url} --rw {rw} --bs {bs} --iodepth 8 --jobs 2 --runtime 0.1 --ramp 0 \
                 --verify --json"
            ));
            let report = run.exits(0).json();
            assert_eq!(report["errors"], 0);
            assert!(report["verified"].as_u64().expect("a count") > 0, "{rw}");
        }
    }
}

#[test]
fn more_tasks_than_blocks_verify() {
    let place = Place::new();
    let line = "bench mem:?size=16k --rw randrw --iodepth 32 --runtime 0.1 --verify --json";
    assert_eq!(place.run(line).exits(0).json()["errors"], 0);
}

#[test]
fn verify_catches_damage_to_the_file() {
    let place = Place::new();
    let write = "bench file:disk.img?size=64k --rw randrw --fill --verify --runtime 0.1 --ramp 0";
    let read = "bench file:disk.img --rw read --verify --runtime 0.2 --ramp 0 --json";
    place.run(write).exits(0);
    assert_eq!(place.run(read).exits(0).json()["errors"], 0);

    // In each block, so that any read meets one.
    let disk = place.path("disk.img");
    let good = place.read("disk.img");
    for block in 0..16 {
        patch(
            &disk,
            block * 4096 + 3000,
            &[!good[block as usize * 4096 + 3000]],
        );
    }
    let run = place.run(read).exits(1);
    assert!(run.json()["errors"].as_u64().expect("a count") > 0);
    assert!(run.stderr().contains("corrupt"), "{}", run.stderr());

    // Each block in the place of the next one.
    for block in 0..16 {
        let next = (block + 1) % 16;
        patch(&disk, next as u64 * 4096, &good[block * 4096..][..4096]);
    }
    let run = place.run(read).exits(1);
    assert!(run.stderr().contains("misplaced"), "{}", run.stderr());
}

#[test]
fn a_read_never_writes_unasked() {
    let place = Place::new();
    let contents = place.file("disk.img", 1 << 20);
    place
        .run("bench file:disk.img --rw randread --verify --runtime 0.1")
        .exits(2)
        .complains("--fill");
    place
        .run("bench file:disk.img --rw randread --runtime 0.1 --ramp 0")
        .exits(0);
    assert_eq!(place.read("disk.img"), contents);
}

#[test]
fn requests_that_make_no_sense() {
    let place = Place::new();
    let contents = place.file("disk.img", 1 << 20);
    for (line, about) in [
        (
            "bench file:disk.img --rw write --bs 4k --size 2M",
            "past the end",
        ),
        (
            "bench file:disk.img --rw write --bs 4k --offset 1M",
            "past the end",
        ),
        (
            "bench file:disk.img --rw write --bs 4k --size 5k",
            "multiple",
        ),
        ("bench file:disk.img --rw write --bs 1000", "multiple"),
        (
            "bench file:disk.img?lba=4096 --rw write --bs 512",
            "multiple",
        ),
        ("bench file:disk.img --rw write --bs 4X", "size"),
        ("bench file:disk.img --rw append", "append"),
        ("bench file:disk.img --rw write --iodepth 0", "iodepth"),
        ("bench file:disk.img --rw write --runtime 0", "--runtime"),
        ("bench file:disk.img --rw write --fill", "--verify"),
        ("bench file:disk.img", "--rw"),
        (
            "bench file:disk.img?ns=2 --rw write",
            "namespace 2 is not active",
        ),
        ("bench file:disk.img?colour=red --rw write", "colour"),
        ("bench disk.img --rw write", "scheme"),
        ("bench http://disk.img --rw write", "scheme"),
        ("bench nvme://0000:44:00.9/1 --rw write", "PCI address"),
        ("identify mem:", "size"),
        ("smart mem:", "size"),
        ("smart", "URL"),
        ("copy disk.img", "DESTINATION"),
        ("copy disk.img disk.img", "the same"),
        ("copy disk.img ./disk.img", "the same"),
        ("copy disk.img file:disk.img", "the same"),
        ("copy file:disk.img disk.img", "the same"),
        ("copy file:disk.img file:./disk.img", "the same"),
        ("copy disk.img mem:?size=512k", "too small"),
        ("copy disk.img file:new.img?size=512k", "too small"),
        ("copy disk.img copy.img --size 2M", "past the end"),
        ("copy disk.img http:x", "scheme"),
        ("bind 0000:44:00.9", "0000:44:00.9"),
        ("bind ffff:ff:1f.7", "no such PCI function"),
        ("frobnicate", "frobnicate"),
    ] {
        place.run(line).exits(2).complains(about);
    }
    assert_eq!(place.read("disk.img"), contents);
    assert_eq!(place.names(), ["disk.img"]);
}

#[test]
fn a_file_is_not_left_behind_for_nothing() {
    let place = Place::new();
    place
        .run("bench file:a.img?size=1M --rw write --size 2M")
        .exits(2)
        .complains("past the end");
    place
        .run("bench file:b.img?size=1M&ns=2 --rw write")
        .exits(2)
        .complains("namespace 2");
    place
        .run("bench file:c.img?size=1M&namespaces=2 --rw write --bs 3k --size 2M")
        .exits(2);
    assert!(place.names().is_empty(), "{:?}", place.names());
}

#[test]
fn failures_are_not_bad_requests() {
    let place = Place::new();
    place
        .run("bench file:missing.img --rw read")
        .exits(1)
        .complains("missing.img");
    place
        .run("copy missing.img mem:?size=1M")
        .exits(1)
        .complains("missing.img");
    place
        .run("copy mem:?size=1M missing/x.img")
        .exits(1)
        .complains("missing/x.img");
    place
        .run("identify nvme://ffff:ff:1f.7")
        .exits(1)
        .complains("ffff:ff:1f.7");
    place
        .run("smart file:missing.img")
        .exits(1)
        .complains("missing.img");
}

#[test]
fn a_software_controller_fails_as_planned() {
    let place = Place::new();
    let plan = "[[fault]]\nwhen = { opcode = \"read\", nth = 2 }\n\
                then = { status = { sct = 2, sc = 0x81, dnr = true } }\n";
    std::fs::write(place.path("plan.toml"), plan).expect("write a file");
    place
        .run("copy file:a.img?size=4M&faults=plan.toml out.img")
        .exits(1)
        .complains("Unrecovered Read Error");
    place.run("copy file:a.img out.img").exits(0);
    let identified = place.run("identify file:a.img?faults=plan.toml").exits(0);
    assert!(identified.stdout().contains("nvme-soft"));
}

#[test]
fn a_plan_that_makes_no_sense_is_named() {
    let place = Place::new();
    place
        .run("identify file:a.img?size=1M&faults=missing.toml")
        .exits(1)
        .complains("missing.toml");
    std::fs::write(place.path("plan.toml"), "[[fault]]\nthen = \"explode\"\n")
        .expect("write a file");
    let wrong = || place.run("identify file:a.img?size=1M&faults=plan.toml");
    wrong().exits(1).complains("plan.toml");
    wrong().exits(1).complains("line 2");
    wrong().exits(1).complains("explode");
    place
        .run("identify mem:?size=1M&faults=")
        .exits(2)
        .complains("faults=");
    assert_eq!(place.names(), ["plan.toml"]);
}

#[test]
fn identify_in_both_forms() {
    let place = Place::new();
    let url = "mem:?size=1M&namespaces=2&lba=4096";
    let identity = place.run(&format!("identify {url} --json")).exits(0).json();
    let controller = &identity["controller"];
    assert!(!controller["model"].as_str().expect("a text").is_empty());
    assert_eq!(controller["version"], "2.0");
    let namespaces = identity["namespaces"].as_array().expect("a list");
    assert_eq!(namespaces.len(), 2);
    assert_eq!(namespaces[1]["nsid"], 2);
    assert_eq!(namespaces[1]["block_size"], 4096);
    assert_eq!(namespaces[1]["size_bytes"], 1 << 20);
    let run = place.run(&format!("identify {url}")).exits(0);
    let words = ["serial number", "namespace 2", "4096 (in use)"];
    for word in words.into_iter().chain(["Compare", "Verify", "Copy"]) {
        assert!(run.stdout().contains(word), "{word}: {}", run.stdout());
    }
}

#[test]
fn smart_in_both_forms() {
    let place = Place::new();
    let url = "mem:?size=1M";
    let health = place.run(&format!("smart {url} --json")).exits(0).json();
    assert_eq!(health["temperature_celsius"], 37);
    assert_eq!(health["critical_warnings"], serde_json::json!([]));
    assert_eq!(health["available_spare_percent"], 100);
    assert_eq!(health["data_written_bytes"], 0);
    assert_eq!(health["power_cycles"], 1);
    assert_eq!(health["address"], "mem:");
    assert!(health.get("errors").is_none());
    let logged = health["error_log_entries"].as_u64().expect("a count");
    let health = place.run(&format!("smart {url} --errors --json"));
    let errors = health.exits(0).json()["errors"].clone();
    assert_eq!(errors.as_array().expect("a list").len() as u64, logged);
    let run = place.run(&format!("smart {url} --errors")).exits(0);
    for line in [
        "critical warnings  none",
        "temperature        37 °C",
        "available spare    100 %, threshold 10 %",
        "power on           0 hours",
    ] {
        assert!(run.stdout().contains(line), "{line}: {}", run.stdout());
    }
    assert!(run.stderr().is_empty(), "{}", run.stderr());
}

#[test]
fn copies_there_and_back() {
    let place = Place::new();
    let contents = place.file("in.img", (5 << 20) + 512);
    place
        .run("copy in.img file:disk.img?size=8M --verify")
        .exits(0);
    assert_eq!(place.read("disk.img").len(), 8 << 20);
    let back = format!(
        "copy file:disk.img out.img --verify --size {}",
        contents.len()
    );
    let run = place.run(&back).exits(0);
    assert!(run.stdout().contains("verified"), "{}", run.stdout());
    assert!(run.stderr().is_empty(), "{}", run.stderr());
    assert!(place.read("out.img") == contents);
}

#[test]
fn a_partial_block_is_padded_with_zeroes() {
    let place = Place::new();
    let contents = place.file("in.img", 5000);
    place.file("disk.img", 64 << 10);
    let before = place.read("disk.img");
    let run = place
        .run("copy in.img file:disk.img?lba=4096 --verify")
        .exits(0);
    assert!(run.stderr().contains("last 3192 bytes"), "{}", run.stderr());
    let after = place.read("disk.img");
    assert!(after[..5000] == contents);
    assert!(after[5000..8192].iter().all(|&byte| byte == 0));
    assert!(after[8192..] == before[8192..]);
}

#[test]
fn copies_between_block_sizes() {
    let place = Place::new();
    let contents = place.file("a.img", (3 << 20) + 1536);
    place
        .run("copy file:a.img file:b.img?size=4M&lba=4096 --verify")
        .exits(0);
    place
        .run("copy file:b.img?lba=4096 file:c.img?size=4M --size 3147264 --verify")
        .exits(0);
    assert!(place.read("c.img")[..contents.len()] == contents);
}

#[test]
fn copies_between_files_replace_the_destination() {
    let place = Place::new();
    let contents = place.file("a.img", 12_345);
    place.file("b.img", 1 << 20);
    place.run("copy a.img b.img --verify").exits(0);
    assert_eq!(place.read("b.img"), contents);
    place.file("empty", 0);
    place.run("copy empty b.img --verify").exits(0);
    assert!(place.read("b.img").is_empty());
}

#[test]
fn copies_between_namespaces_of_one_controller() {
    let place = Place::new();
    let contents = place.file("a.img", 1 << 20);
    let url = "file:a.img?size=1M&namespaces=2";
    place
        .run(&format!("copy {url}&ns=1 {url}&ns=2 --verify"))
        .exits(0);
    assert_eq!(place.read("a.img.2"), contents);
    place
        .run(&format!("copy a.img.2 {url}&ns=2"))
        .exits(2)
        .complains("the same");
}

#[test]
fn list_works_anywhere() {
    let place = Place::new();
    assert!(place.run("list --json").exits(0).json().is_array());
}
