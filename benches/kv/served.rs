//! Servers, and `redis-benchmark` as their clients.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::{Case, Contender, KEYS};

/// A server, in a process of its own. It ends with this.
pub(crate) struct Served {
    child: Child,
    pub(crate) port: u16,
    /// The size of the values that it has.
    filled: usize,
}

impl Served {
    /// The example, on a file of that size.
    pub(crate) fn kv(program: &Path, directory: &Path, size: &str) -> Self {
        let file = directory.join("kv.img");
        Self::start(|port| {
            let mut command = Command::new(program);
            command
                .arg(format!("--device=file:{}?size={size}", file.display()))
                .arg(format!("--listen=127.0.0.1:{port}"))
                .stderr(Stdio::null());
            command
        })
    }

    pub(crate) fn redis(directory: &Path) -> Self {
        Self::start(|port| {
            // In Debian's package redis-tools the server is there under this name, and looks at the one
            // that it is called by; the package redis-server starts it as a service.
            let mut command = Command::new("redis-check-rdb");
            command
                .arg0("redis-server")
                .args([
                    "--port",
                    &port.to_string(),
                    "--bind",
                    "127.0.0.1",
                    "--save",
                    "",
                ])
                .args(["--appendonly", "yes", "--appendfsync", "always", "--dir"])
                .arg(directory)
                .stdout(Stdio::null());
            command
        })
    }

    fn start(command: impl FnOnce(u16) -> Command) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").expect("there are ports");
        let port = free.local_addr().expect("is bound").port();
        drop(free);
        let mut command = command(port);
        let child = command.spawn();
        let child = child.unwrap_or_else(|error| {
            panic!(
                "{command:?}: {error}; `cargo xtask kv-bench` installs and builds what is needed"
            )
        });
        let mut served = Self {
            child,
            port,
            filled: 0,
        };
        served.wait();
        served
    }

    /// Waits until it serves.
    fn wait(&mut self) {
        loop {
            if let Some(status) = self.child.try_wait().expect("is a child") {
                panic!("the server ended: {status}");
            }
            let mut reply = [0; 7];
            let answers = || -> std::io::Result<()> {
                let mut stream = self.connect()?;
                stream.write_all(b"PING\r\n")?;
                stream.read_exact(&mut reply)
            };
            if { answers }().is_ok() && reply == *b"+PONG\r\n" {
                return;
            }
            sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn connect(&self) -> std::io::Result<TcpStream> {
        TcpStream::connect(("127.0.0.1", self.port))
    }

    /// Ends it, in order or not.
    pub(crate) fn end(mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
        self.child.wait().expect("it is a child");
    }

    /// Runs `redis-benchmark`; returns the requests in a second.
    fn load(&self, operation: &str, case: &Case) -> f64 {
        let numbers = [
            ("-p", self.port.into()),
            ("-n", case.requests),
            ("-c", case.clients),
            ("-P", case.pipeline),
            ("-d", case.bytes as u64),
            ("-r", KEYS),
        ];
        let mut command = Command::new("redis-benchmark");
        command.args(["--csv", "-t", operation]);
        for (option, number) in numbers {
            command.args([option, &number.to_string()]);
        }
        let output = command.output();
        let output = output.unwrap_or_else(|error| panic!("redis-benchmark: {error}"));
        let text = String::from_utf8_lossy(&output.stdout);
        let name = format!("\"{}\",\"", operation.to_uppercase());
        let rate = text.lines().find_map(|line| line.strip_prefix(&name));
        let rate = rate.and_then(|rate| rate.split('"').next()?.parse().ok());
        rate.filter(|_| output.status.success()).unwrap_or_else(|| {
            panic!("{text}{}", String::from_utf8_lossy(&output.stderr));
        })
    }
}

impl Contender for Served {
    fn measure(&mut self, case: &Case) -> Option<f64> {
        if case.is_write {
            return Some(self.load("set", case));
        }
        // Values of that size, so that all read the same.
        if self.filled != case.bytes {
            let fill = Case {
                is_write: true,
                clients: 50,
                pipeline: 16,
                requests: 10 * KEYS,
                ..*case
            };
            self.load("set", &fill);
            self.filled = case.bytes;
        }
        Some(self.load("get", case))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
