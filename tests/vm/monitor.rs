//! QEMU's own monitor, through which a test does to its machine what happens to real ones: devices
//! are pulled out and plugged in, media fail and stall.
//!
//! It speaks QMP: lines of JSON, a reply for each command, and events in between.

use std::env;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// No command takes nearly as long, unless QEMU hangs.
const REPLY_LIMIT: Duration = Duration::from_secs(60);

/// Executes a command, which must succeed, and returns what it answers.
pub(crate) fn execute(command: &str, arguments: Value) -> Value {
    let shown = arguments.to_string();
    try_execute(command, arguments).unwrap_or_else(|error| panic!("{command} {shown}: {error}"))
}

/// Executes a command; if it fails, what QEMU says about it.
pub(crate) fn try_execute(command: &str, arguments: Value) -> Result<Value, String> {
    let mut reply = Monitor::connected().ask(command, arguments);
    match reply.get_mut("error") {
        Some(error) => Err(error["desc"].as_str().unwrap_or_default().to_owned()),
        None => Ok(reply["return"].take()),
    }
}

/// Waits until QEMU reports that the device is gone and with it everything that it used. Each such
/// report is waited for once.
pub(crate) fn wait_until_deleted(device: &str, limit: Duration) {
    let deleted = |event: &Value| {
        event["event"] == "DEVICE_DELETED" && event["data"]["device"].as_str() == Some(device)
    };
    Monitor::connected().take_event(&format!("DEVICE_DELETED of {device}"), limit, deleted);
}

struct Monitor {
    port: Mutex<Port>,
    heard: Mutex<Heard>,
    changed: Condvar,
}

struct Port {
    file: File,
    last_id: u64,
}

#[derive(Default)]
struct Heard {
    replies: Vec<Value>,
    events: Vec<Value>,
}

impl Monitor {
    fn connected() -> &'static Self {
        static MONITOR: OnceLock<Monitor> = OnceLock::new();
        static NEGOTIATED: OnceLock<()> = OnceLock::new();
        let monitor = MONITOR.get_or_init(|| {
            let file = open_port();
            let reader = file.try_clone().expect("a second descriptor");
            thread::spawn(move || listen(reader));
            Self {
                port: Mutex::new(Port { file, last_id: 0 }),
                heard: Mutex::default(),
                changed: Condvar::new(),
            }
        });
        NEGOTIATED.get_or_init(|| {
            let reply = monitor.ask("qmp_capabilities", json!({}));
            assert!(reply.get("error").is_none(), "{reply}");
        });
        return monitor;

        /// Keeps what QEMU says. It says nothing before [`MONITOR`] is there: it was not asked.
        fn listen(port: File) {
            for line in BufReader::new(port).lines().map_while(Result::ok) {
                let Ok(message) = serde_json::from_str::<Value>(&line) else {
                    panic!("the monitor says: {line}");
                };
                let monitor = MONITOR.wait();
                let mut heard = monitor.heard();
                if message.get("event").is_some() {
                    heard.events.push(message);
                } else {
                    heard.replies.push(message);
                }
                monitor.changed.notify_all();
            }
        }
    }

    fn ask(&self, command: &str, arguments: Value) -> Value {
        let id = {
            let mut port = self.port.lock().expect("nobody panicked");
            port.last_id += 1;
            let id = port.last_id;
            let line = json!({ "execute": command, "arguments": arguments, "id": id });
            port.file
                .write_all(format!("{line}\n").as_bytes())
                .expect("the port takes a command");
            id
        };
        let find = |heard: &mut Heard| {
            let is_it = |reply: &Value| reply["id"].as_u64() == Some(id);
            let place = heard.replies.iter().position(is_it)?;
            Some(heard.replies.swap_remove(place))
        };
        self.wait(&format!("a reply to {command}"), REPLY_LIMIT, find)
    }

    fn take_event(&self, what: &str, limit: Duration, wanted: impl Fn(&Value) -> bool) {
        self.wait(what, limit, |heard| {
            let place = heard.events.iter().position(&wanted)?;
            Some(heard.events.remove(place))
        });
    }

    fn wait(
        &self,
        what: &str,
        limit: Duration,
        mut find: impl FnMut(&mut Heard) -> Option<Value>,
    ) -> Value {
        let end = Instant::now() + limit;
        let mut heard = self.heard();
        loop {
            if let Some(found) = find(&mut heard) {
                return found;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "the monitor is silent: no {what} within {limit:?}; events: {:?}",
                heard.events
            );
            let waited = self.changed.wait_timeout(heard, left);
            heard = waited.expect("nobody panicked").0;
        }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().expect("nobody panicked")
    }
}

/// Opens the port that leads to the monitor; the kernel may not have found it yet.
fn open_port() -> File {
    let variable = "NVME_ASYNC_MONITOR";
    let path = env::var(variable)
        .unwrap_or_else(|_| panic!("{variable} is not set: this boot has no monitor"));
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => return file,
            Err(error) => assert!(Instant::now() < end, "{path}: {error}"),
        }
        thread::sleep(Duration::from_millis(50));
    }
}
