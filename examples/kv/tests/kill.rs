//! The program as a process: it is killed at random moments under load, or told to end.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::thread::{ScopedJoinHandle, sleep};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Parser;
use rustix::process::{Pid, Signal, kill_process};

use super::full;
use super::history::{self, Contents, History, WRITERS, check};
use crate::store::{Change, Kind};
use crate::{Arguments, run, runtime};

/// In its presence this program is the server, with these arguments.
pub(super) const SERVE: &str = "NVME_ASYNC_KV_ARGUMENTS";

/// For a server that neither serves nor ends.
const PATIENCE: Duration = Duration::from_secs(900);

/// This program and its arguments, which then is the server.
pub(super) fn server() -> [OsString; 4] {
    let program = std::env::current_exe().expect("it runs");
    let serve = "tests::kill::it_serves_until_it_is_told_to_end";
    [
        program.into(),
        "--exact".into(),
        serve.into(),
        "--nocapture".into(),
    ]
}

/// A port of the loopback that nobody has.
pub(super) fn free_port() -> u16 {
    let free = TcpListener::bind("127.0.0.1:0").expect("there are ports");
    free.local_addr().expect("is bound").port()
}

/// A server in a process of its own.
pub(super) struct Process {
    pub(super) child: Child,
    pub(super) port: u16,
}

impl Process {
    pub(super) fn start(device: &str) -> Self {
        let [program, arguments @ ..] = server();
        let port = free_port();
        let child = Command::new(program)
            .args(arguments)
            .env(
                SERVE,
                format!("kv --device {device} --listen 127.0.0.1:{port}"),
            )
            .stdout(Stdio::null())
            .spawn();
        let child = child.expect("this program can be run again");
        Self { child, port }
    }

    pub(super) fn connect(&mut self) -> Client {
        self.try_connect()
            .unwrap_or_else(|status| panic!("the server ended: {status}"))
    }

    /// A client, as soon as one is served.
    ///
    /// # Errors
    ///
    /// What the process ended with before that.
    pub(super) fn try_connect(&mut self) -> Result<Client, ExitStatus> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().expect("is a child") {
                return Err(status);
            }
            if let Ok(client) = Client::connect(self.port) {
                return Ok(client);
            }
            sleep(Duration::from_millis(10));
        }
        panic!("the server does not listen");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) struct Client {
    stream: TcpStream,
    replies: BufReader<TcpStream>,
}

impl Client {
    /// Connects to a server that answers.
    fn connect(port: u16) -> io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        // Who forwards connections may take one before there is a server.
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut client = Self {
            replies: BufReader::new(stream.try_clone()?),
            stream,
        };
        client.send(&[b"PING"])?;
        if client.receive()?.as_deref() != Some(b"+PONG") {
            return Err(io::ErrorKind::InvalidData.into());
        }
        client.stream.set_read_timeout(None)?;
        Ok(client)
    }

    fn send(&mut self, words: &[&[u8]]) -> io::Result<()> {
        let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            bytes.extend(format!("${}\r\n", word.len()).as_bytes());
            bytes.extend_from_slice(word);
            bytes.extend(b"\r\n");
        }
        self.stream.write_all(&bytes)
    }

    /// The next reply: what is in a bulk string, nothing, or the line of anything else.
    fn receive(&mut self) -> io::Result<Option<Bytes>> {
        let mut line = String::new();
        self.replies.read_line(&mut line)?;
        let Some(line) = line.strip_suffix("\r\n") else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let Some(len) = line.strip_prefix('$') else {
            return Ok(Some(line.to_owned().into()));
        };
        let Ok(len) = len.parse::<usize>() else {
            return Ok(None);
        };
        let mut bytes = vec![0; len + 2];
        self.replies.read_exact(&mut bytes)?;
        bytes.truncate(len);
        Ok(Some(bytes.into()))
    }

    fn ask(&mut self, words: &[&[u8]]) -> Option<Bytes> {
        self.send(words).expect("the server reads");
        self.receive().expect("the server replies")
    }

    /// All keys with their values.
    pub(super) fn contents(&mut self) -> Contents {
        let mut contents = Contents::new();
        for writer in 0..WRITERS {
            for number in 0..history::KEYS {
                let key = Bytes::from(format!("{writer}:{number}"));
                if let Some(value) = self.ask(&[b"GET", &key]) {
                    contents.insert(key, (value, 0));
                }
            }
        }
        assert_eq!(
            self.ask(&[b"DBSIZE"]),
            Some(format!(":{}", contents.len()).into())
        );
        contents
    }
}

/// One command for one change.
fn words(changes: &[Change]) -> Vec<&[u8]> {
    match changes {
        [change] if change.kind == Kind::Delete => vec![b"DEL", &change.key],
        sets => {
            let pairs = sets.iter().flat_map(|change| {
                assert_eq!(change.kind, Kind::Set, "is no part of MSET");
                [&*change.key, &*change.value]
            });
            [b"MSET".as_slice()].into_iter().chain(pairs).collect()
        }
    }
}

/// Changes things until the server is gone, as many at a time as `depth` says.
fn write(
    mut client: Client,
    depth: usize,
    histories: &Mutex<Vec<History>>,
    writer: usize,
    seed: u64,
) {
    let mut random = fastrand::Rng::with_seed(seed);
    let with_history = |f: &mut dyn FnMut(&mut History)| {
        f(&mut histories.lock().expect("no one panics with it")[writer]);
    };
    let mut outstanding = 0;
    loop {
        while outstanding < depth {
            let changes = history::random_change(&mut random, writer);
            let has_command = |changes: &[Change]| {
                let is_set = |change: &Change| change.kind == Kind::Set;
                let is_delete = |change: &Change| change.kind == Kind::Delete;
                matches!(changes, [change] if is_delete(change)) || changes.iter().all(is_set)
            };
            if !has_command(&changes) {
                continue;
            }
            with_history(&mut |history| history.asked.push(changes.clone()));
            if client.send(&words(&changes)).is_err() {
                return;
            }
            outstanding += 1;
        }
        let Ok(reply) = client.receive() else {
            return;
        };
        let reply = reply.expect("neither MSET nor DEL replies with null");
        assert!(matches!(reply[0], b'+' | b':'), "{reply:?}");
        outstanding -= 1;
        with_history(&mut |history| history.acknowledged += 1);
    }
}

/// Writers at work.
pub(super) struct Load<'a, 'scope> {
    histories: &'a Mutex<Vec<History>>,
    writers: Vec<ScopedJoinHandle<'scope, ()>>,
}

#[cfg_attr(
    not(feature = "vm"),
    expect(dead_code, reason = "only who kills machines asks")
)]
impl Load<'_, '_> {
    /// How many changes were acknowledged by now.
    pub(super) fn acknowledged(&self) -> usize {
        acknowledged(&self.histories.lock().expect("no one panics with it"))
    }

    /// Whether a client has lost its server.
    pub(super) fn has_ended(&self) -> bool {
        self.writers.iter().any(ScopedJoinHandle::is_finished)
    }
}

fn acknowledged(histories: &[History]) -> usize {
    histories.iter().map(|history| history.acknowledged).sum()
}

/// Lets a writer for each client change things, so many at a time, until all have lost their server, which
/// is for `end` to see to. Returns how many changes were acknowledged.
pub(super) fn under_load(
    clients: Vec<Client>,
    depth: usize,
    histories: &mut Vec<History>,
    random: &mut fastrand::Rng,
    end: impl FnOnce(&Load<'_, '_>),
) -> usize {
    let shared = Mutex::new(std::mem::take(histories));
    std::thread::scope(|scope| {
        let writers = clients.into_iter().enumerate().map(|(writer, client)| {
            let (shared, seed) = (&shared, random.u64(..));
            scope.spawn(move || write(client, depth, shared, writer, seed))
        });
        end(&Load {
            histories: &shared,
            writers: writers.collect(),
        });
    });
    *histories = shared.into_inner().expect("no one panics with it");
    acknowledged(histories)
}

fn url(directory: &Path) -> String {
    format!("file:{}?size=64M", directory.join("kv.img").display())
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9() {
    let rounds = if full() { 200 } else { 10 };
    let directory = tempfile::tempdir().expect("there is room");
    let device = url(directory.path());
    let mut histories = history::fresh();
    let mut acknowledged = 0;
    for seed in 0..=rounds {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut process = Process::start(&device);
        check(&mut histories, process.connect().contents(), seed);
        let delay = Duration::from_micros(random.u64(..100_000));
        let clients: Vec<_> = (0..WRITERS).map(|_| process.connect()).collect();
        acknowledged += under_load(clients, 4, &mut histories, &mut random, |_| {
            sleep(delay);
            process.child.kill().expect("it runs");
            process.child.wait().expect("it is a child");
        });
    }
    assert!(
        acknowledged > 10 * rounds as usize,
        "only {acknowledged}: the test does not do what it should"
    );
}

#[test]
fn it_serves_until_it_is_told_to_end() {
    if let Ok(arguments) = std::env::var(SERVE) {
        let arguments = Arguments::parse_from(arguments.split(' '));
        let runtime = runtime(arguments.threads).expect("starts");
        let end = runtime
            .block_on(run(arguments))
            .map_err(|error| error.to_string());
        return assert_eq!(end, Ok(()));
    }
    let directory = tempfile::tempdir().expect("there is room");
    let device = url(directory.path());
    for (signal, value) in [(Signal::TERM, "1"), (Signal::INT, "2"), (Signal::TERM, "3")] {
        let mut process = Process::start(&device);
        let mut client = process.connect();
        let before = client.ask(&[b"SET", b"key", value.as_bytes(), b"GET"]);
        let expected = value.parse::<u8>().expect("is a number") - 1;
        assert_eq!(before, (expected > 0).then(|| expected.to_string().into()));
        let pid = Pid::from_child(&process.child);
        kill_process(pid, signal).expect("it runs");
        let status = process.child.wait().expect("it is a child");
        assert!(status.success(), "{status}");
    }
}
