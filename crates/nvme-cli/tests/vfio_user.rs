//! Two processes: `serve vfio-user`, and this one or another run of the binary as its client.

use std::future::Future;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nvme_async::device::Device;
use nvme_async::device::vfio_user::{VfioUserDevice, VfioUserOptions};
use nvme_async::{ControllerState, Error, Namespace, OpenOptions};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Builder;

#[path = "../../../tests/support/suite/mod.rs"]
mod suite;

const DEPTH: u64 = 32;
const DOORBELLS: [&str; 2] = ["trapped", "mapped"];
/// No test takes nearly as long.
const LIMIT: Duration = Duration::from_secs(120);

/// A directory with a socket in it.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("nvme.sock")
    }

    fn url(&self) -> String {
        format!("vfio-user:{}?ns=1", self.socket().display())
    }

    /// Starts a server, and waits until it listens.
    fn serve(&self, url: &str, doorbells: &str) -> Server {
        let mut child = program(self.0.path())
            .args(["serve", "vfio-user", "--doorbells", doorbells, "--socket"])
            .arg(self.socket())
            .arg(url)
            .stdout(Stdio::piped())
            .spawn()
            .expect("run nvme-async");
        let output = child.stdout.take().expect("it is piped");
        let mut line = String::new();
        let read = BufReader::new(output).read_line(&mut line);
        assert!(read.expect("a line") > 0, "the server says that it listens");
        Server(child)
    }

    fn run(&self, line: &str) -> Output {
        let line = line.replace("URL", &self.url());
        let output = program(self.0.path())
            .args(line.split_whitespace())
            .output();
        let output = output.expect("run nvme-async");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {errors}");
        output
    }
}

fn program(directory: &Path) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_nvme-async"));
    program.current_dir(directory).env("RUST_LOG", "off");
    program
}

/// A process that is killed at the end.
struct Server(Child);

impl Server {
    fn kill(&mut self) {
        self.0.kill().expect("SIGKILL");
        self.0.wait().expect("ends");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// In a runtime of several workers, and with an end.
fn run(test: impl Future<Output = ()>) {
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let ended = runtime.block_on(async { tokio::time::timeout(LIMIT, test).await });
    ended.expect("the test has an end");
}

async fn open(place: &Place) -> Namespace {
    nvme_async::open(&place.url()).await.expect("opens")
}

async fn close(namespace: Namespace) {
    namespace.controller().shutdown().await.expect("shuts down");
}

#[test]
fn the_suite() {
    run(async {
        for doorbells in DOORBELLS {
            let place = Place::new();
            let _server = place.serve("mem:?size=6M", doorbells);
            let namespace = open(&place).await;
            suite::all(&namespace, false).await;
            close(namespace).await;
        }
    });
}

#[test]
fn the_suite_on_a_file_with_blocks_of_4096_bytes() {
    run(async {
        let place = Place::new();
        let _server = place.serve("file:disk.img?size=6M&lba=4096", "trapped");
        let namespace = open(&place).await;
        let handle = namespace.clone();
        let suite = tokio::spawn(async move { suite::all(&handle, false).await });
        suite.await.expect("does not panic");
        close(namespace).await;
    });
}

#[test]
fn faults_of_the_controller() {
    run(async {
        for doorbells in DOORBELLS {
            let place = Place::new();
            let plan = "[[fault]]\nwhen = { opcode = \"read\", nth = 1 }\n\
                        then = { status = { sct = 2, sc = 0x81, dnr = true } }\n";
            std::fs::write(place.0.path().join("plan.toml"), plan).expect("writes a file");
            let _server = place.serve("mem:?size=6M&faults=plan.toml", doorbells);
            let namespace = open(&place).await;
            namespace.write(0, vec![7; 4096]).await.expect("writes");
            let failed = namespace.read(0, 4096).await.expect_err("is to fail");
            assert!(matches!(failed, Error::Command(_)), "{failed}");
            let read = namespace.read(0, 4096).await.expect("reads");
            assert_eq!(read, vec![7; 4096]);
            close(namespace).await;
        }
    });
}

#[test]
fn futures_that_are_dropped() {
    run(async {
        for doorbells in DOORBELLS {
            let place = Place::new();
            let _server = place.serve("mem:?size=6M&latency=1ms", doorbells);
            let namespace = open(&place).await;
            for round in 0..20_u64 {
                let reads = (0..DEPTH).map(|slot| namespace.read(slot * 4096, 4096));
                let reads = futures::future::join_all(reads);
                let patience = Duration::from_micros(100 * round);
                // Whether they were done in time does not matter.
                let _ = tokio::time::timeout(patience, reads).await;
                let written = namespace.write(round * 4096, vec![round as u8; 4096]).await;
                written.expect("writes");
            }
            namespace.quiesce().await.expect("quiesces");
            for round in 0..20 {
                let read = namespace.read(round * 4096, 4096).await.expect("reads");
                assert_eq!(read, vec![round as u8; 4096]);
            }
            close(namespace).await;
        }
    });
}

/// Reads and writes until the device is gone; returns how many times.
async fn work(namespace: &Namespace) -> u64 {
    let workers = (0..DEPTH).map(|worker| async move {
        let mut count = 0;
        loop {
            let buffer = namespace.allocate(8192).expect("allocates");
            let done = if worker % 2 == 0 {
                namespace.read_into(worker * 8192, buffer).await
            } else {
                namespace.write(worker * 8192, buffer).await
            };
            match done {
                Ok(_) => count += 1,
                Err(failed) => {
                    let (error, buffer) = (failed.error, failed.buffer);
                    assert!(matches!(error, Error::Removed { .. }), "{error}");
                    assert!(buffer.is_some(), "the buffer comes back");
                    return count;
                }
            }
        }
    });
    futures::future::join_all(workers).await.into_iter().sum()
}

#[test]
fn a_server_that_is_killed_under_load() {
    run(async {
        for doorbells in DOORBELLS {
            let place = Place::new();
            let mut server = place.serve("file:disk.img?size=6M", doorbells);
            for _ in 0..2 {
                let namespace = open(&place).await;
                let kill = async {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    server.kill();
                };
                let (done, ()) = futures::join!(work(&namespace), kill);
                assert!(done > 0, "there was work");
                let controller = namespace.controller();
                assert_eq!(controller.state(), ControllerState::Removed);
                let ended = controller.shutdown().await;
                assert!(matches!(ended, Err(Error::Removed { .. })));

                // While the old handle lives.
                server = place.serve("file:disk.img", doorbells);
                let again = open(&place).await;
                again.write(0, vec![9; 4096]).await.expect("writes");
                assert_eq!(again.read(0, 4096).await.expect("reads"), vec![9; 4096]);
                close(again).await;
            }
        }
    });
}

#[test]
fn a_client_that_is_killed_under_load() {
    run(async {
        for doorbells in DOORBELLS {
            let place = Place::new();
            let mut server = place.serve("mem:?size=6M", doorbells);
            for _ in 0..2 {
                let mut client = program(place.0.path())
                    .args(["bench", &place.url(), "--rw", "randread", "--iodepth", "32"])
                    .args(["--runtime", "60"])
                    .stdout(Stdio::null())
                    .spawn()
                    .map(Server)
                    .expect("run nvme-async");
                tokio::time::sleep(Duration::from_millis(500)).await;
                assert!(client.0.try_wait().expect("a state").is_none(), "it works");
                client.kill();
                let namespace = open(&place).await;
                namespace.write(0, vec![3; 4096]).await.expect("writes");
                assert_eq!(namespace.read(0, 4096).await.expect("reads"), vec![3; 4096]);
                close(namespace).await;
            }
            assert!(server.0.try_wait().expect("a state").is_none());
        }
    });
}

#[test]
fn the_command_line() {
    for doorbells in DOORBELLS {
        let place = Place::new();
        let _server = place.serve("mem:?size=1M", doorbells);
        let identify = place.run("identify URL --json");
        let identify: Value = serde_json::from_slice(&identify.stdout).expect("JSON");
        assert!(identify.is_object());
        let contents: Vec<u8> = (0..1 << 20).map(|index: u32| (index % 251) as u8).collect();
        std::fs::write(place.0.path().join("in"), &contents).expect("writes a file");
        place.run("copy in URL");
        place.run("copy URL out");
        let copied = std::fs::read(place.0.path().join("out")).expect("reads a file");
        assert!(copied == contents);
        let bench = place.run("bench URL --rw randread --iodepth 8 --runtime 1 --json");
        let bench: Value = serde_json::from_slice(&bench.stdout).expect("JSON");
        assert!(bench.is_object());
    }
}

#[test]
fn queues_that_are_polled() {
    run(async {
        for mode in [
            nvme_async::PollMode::Busy,
            nvme_async::PollMode::Interrupt,
            nvme_async::PollMode::Paired,
        ] {
            let place = Place::new();
            let _server = place.serve("mem:?size=6M", "mapped");
            let options = OpenOptions::new().vfio_user(place.socket()).queues(2);
            let namespace = options.poll_mode(mode).open().await.expect("opens");
            for round in 0..200_u64 {
                let data = vec![round as u8; 4096];
                namespace.write(round * 4096, data).await.expect("writes");
                let read = namespace.read(round * 4096, 4096).await.expect("reads");
                assert_eq!(read, vec![round as u8; 4096]);
            }
            close(namespace).await;
        }
    });
}

/// Between the two the MSI-X table is memory, in which nobody else writes.
#[test]
fn vectors_are_masked_by_stores() {
    for doorbells in DOORBELLS {
        let place = Place::new();
        let _server = place.serve("mem:?size=6M", doorbells);
        let options = VfioUserOptions::default();
        let device = VfioUserDevice::open(&place.socket(), &options).expect("opens");
        for vector in 0..device.vectors().len() as u16 {
            let mask = device.vector_mask(vector).expect("it can be masked");
            assert!(mask.is_exclusive());
            let control = 0x200c + u32::from(vector) * 16;
            let word = || device.read32(control).expect("reads");
            assert_eq!(word(), 0, "it has an eventfd");
            mask.mask();
            assert_eq!(word(), 1);
            mask.unmask();
            assert_eq!(word(), 0);
        }
        let vectors = device.vectors().len() as u16;
        assert!(device.vector_mask(vectors).is_none());
        device.close();
    }
}
