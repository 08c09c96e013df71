//! A job of qemu-storage-daemon, which is told what to do by QMP.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::SIZE;
use crate::place::{Place, missing, pattern};

/// qemu-storage-daemon, with its monitor at standard input and output.
struct Daemon {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    events: Vec<Value>,
}

impl Daemon {
    fn start(place: &Place) -> Self {
        const PROGRAM: &str = "qemu-storage-daemon";
        let mut child = place
            .command(PROGRAM)
            .args(["--chardev", "stdio,id=monitor", "--monitor", "monitor"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{PROGRAM}: {error}; {}", missing(PROGRAM)));
        let mut daemon = Self {
            input: child.stdin.take().expect("it is piped"),
            output: BufReader::new(child.stdout.take().expect("it is piped")),
            child,
            events: Vec::new(),
        };
        assert!(daemon.next().get("QMP").is_some());
        daemon.execute("qmp_capabilities", json!({}));
        daemon
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        let len = self.output.read_line(&mut line).expect("a line");
        assert!(len > 0, "it has ended");
        serde_json::from_str(&line).expect("JSON")
    }

    fn execute(&mut self, command: &str, arguments: Value) {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.input, "{request}").expect("sent");
        loop {
            let said = self.next();
            if said.get("event").is_some() {
                self.events.push(said);
            } else {
                assert!(said.get("return").is_some(), "{command}: {said}");
                return;
            }
        }
    }

    /// Waits for an event.
    fn event(&mut self, name: &str) -> Value {
        loop {
            let found = self.events.iter().position(|event| event["event"] == name);
            if let Some(found) = found {
                return self.events.remove(found);
            }
            let said = self.next();
            self.events.push(said);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended already if the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_disk_is_mirrored_while_it_is_written() {
    let place = Place::new();
    let data = pattern(5, SIZE);
    fs::write(place.path("source.img"), &data).expect("written");
    let server = place.serve("--listen unix:nbd.sock target=mem:?size=8M");
    let mut daemon = Daemon::start(&place);
    let source = json!({ "driver": "file", "filename": "source.img" });
    daemon.execute(
        "blockdev-add",
        json!({ "driver": "raw", "node-name": "source", "file": source }),
    );
    daemon.execute(
        "blockdev-add",
        json!({
            "driver": "nbd", "node-name": "target", "export": "target",
            "server": { "type": "unix", "path": "nbd.sock" },
        }),
    );
    // Who writes meanwhile writes by another server, of the daemon's.
    daemon.execute(
        "nbd-server-start",
        json!({ "addr": { "type": "unix", "data": { "path": "daemon.sock" } } }),
    );
    daemon.execute(
        "block-export-add",
        json!({ "type": "nbd", "id": "export", "node-name": "source", "writable": true }),
    );
    daemon.execute(
        "blockdev-mirror",
        json!({ "job-id": "mirror", "device": "source", "target": "target", "sync": "full" }),
    );
    daemon.event("BLOCK_JOB_READY");
    let writer = format!(
        "nbd+unix:///source?socket={}",
        place.path("daemon.sock").display()
    );
    place.run("qemu-io -f raw -c", &["write -P 9 3M 128k", &writer]);
    daemon.execute("job-complete", json!({ "id": "mirror" }));
    let completed = daemon.event("BLOCK_JOB_COMPLETED");
    assert_eq!(completed["data"].get("error"), None, "{completed}");
    daemon.execute("quit", json!({}));
    assert!(daemon.child.wait().expect("it ends").success());
    drop(daemon);

    let mut expected = data;
    expected[3 << 20..(3 << 20) + (128 << 10)].fill(9);
    place.run("nbdcopy", &[&server.uri("target"), "copy.img"]);
    assert!(fs::read(place.path("copy.img")).expect("the copy") == expected);
    assert!(server.end(Signal::TERM).success());
}
