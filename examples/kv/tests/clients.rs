//! The server and the clients that people have.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{Disk, busy, change, full, set, usage};
use crate::server::{Limits, serve};
use crate::store::{Options, Store};

/// A server in this process.
pub(super) struct Running {
    pub(super) store: Store,
    port: u16,
    stop: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<()>>,
}

impl Running {
    async fn start(size: usize, options: Options, limits: Limits) -> Self {
        let store = Disk::new(size).open(options).await.expect("formats");
        Self::serve(store, limits).await
    }

    pub(super) async fn serve(store: Store, limits: Limits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let port = listener.local_addr().expect("is bound").port();
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(serve(store.clone(), listener, limits, stopped));
        Self {
            store,
            port,
            stop,
            task,
        }
    }

    pub(super) async fn end(self) {
        self.stop.send(()).expect("it serves");
        self.task.await.expect("no panic").expect("no error");
        self.store.close().await.expect("closes");
    }

    /// Runs one of Redis's programs.
    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let output = Command::new(program)
            .args(["-p", &self.port.to_string()])
            .args(arguments)
            .output();
        output.unwrap_or_else(|error| {
            panic!(
                "{program}: {error}. Debian has it in the package redis-tools; `cargo xtask test` \
                 installs that"
            )
        })
    }

    #[track_caller]
    fn check(&self, version: &str, command: &[&str], expected: &str) {
        let output = self.run("redis-cli", &[&["--no-raw", version], command].concat());
        let found = String::from_utf8_lossy(&output.stdout);
        assert_eq!(found.trim_end(), expected, "{version} {command:?}");
    }

    pub(super) fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).expect("it listens")
    }
}

const MIB: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_cli_and_the_whole_table() {
    let server = Running::start(4 * MIB, busy(), Limits::default()).await;
    let long = "k".repeat(65_537);
    let table: &[(&[&str], &str)] = &[
        (&["PING"], "PONG"),
        (&["ping", "hi"], "\"hi\""),
        (
            &["PING", "a", "b"],
            "(error) ERR wrong number of arguments for 'ping' command",
        ),
        (&["ECHO", "hey"], "\"hey\""),
        (&["SELECT", "0"], "OK"),
        (&["SELECT", "1"], "(error) ERR DB index is out of range"),
        (
            &["SELECT", "x"],
            "(error) ERR value is not an integer or out of range",
        ),
        (&["QUIT"], "OK"),
        (&["GET", "a"], "(nil)"),
        (&["SET", "a", "1"], "OK"),
        (&["GET", "a"], "\"1\""),
        (&["SET", "a", "2", "NX"], "(nil)"),
        (&["SET", "a", "2", "XX"], "OK"),
        (&["SET", "b", "2", "XX"], "(nil)"),
        (&["SET", "b", "2", "NX"], "OK"),
        (&["SET", "b", "3", "GET"], "\"2\""),
        (&["SET", "c", "4", "GET"], "(nil)"),
        (&["SET", "b", "9", "NX", "GET"], "\"3\""),
        (&["SET", "b", "4", "NX", "XX"], "(error) ERR syntax error"),
        (
            &["SET", "b", "4", "EX", "1", "PX", "1"],
            "(error) ERR syntax error",
        ),
        (&["SET", "b", "4", "EX"], "(error) ERR syntax error"),
        (
            &["SET", "b", "4", "EX", "0"],
            "(error) ERR invalid expire time in 'set' command",
        ),
        (
            &["SET", "b", "4", "EX", "9223372036854775807"],
            "(error) ERR invalid expire time in 'set' command",
        ),
        (
            &["SET", "b", "4", "EX", "x"],
            "(error) ERR value is not an integer or out of range",
        ),
        (
            &["SET", "b"],
            "(error) ERR wrong number of arguments for 'set' command",
        ),
        (&["MGET", "a", "none", "b"], "1) \"2\"\n2) (nil)\n3) \"3\""),
        (&["MSET", "x", "1", "y", "2"], "OK"),
        (
            &["MSET", "x", "1", "y"],
            "(error) ERR wrong number of arguments for 'mset' command",
        ),
        (&["MGET", "x", "y"], "1) \"1\"\n2) \"2\""),
        (&["EXISTS", "x", "x", "none"], "(integer) 2"),
        (&["DEL", "x", "x", "y", "none"], "(integer) 2"),
        (&["EXISTS", "x"], "(integer) 0"),
        (&["INCR", "n"], "(integer) 1"),
        (&["INCRBY", "n", "41"], "(integer) 42"),
        (&["INCRBY", "n", "-2"], "(integer) 40"),
        (
            &["INCRBY", "n", "1.5"],
            "(error) ERR value is not an integer or out of range",
        ),
        (
            &["INCRBY", "n", "9223372036854775807"],
            "(error) ERR increment or decrement would overflow",
        ),
        (&["GET", "n"], "\"40\""),
        (&["SET", "text", " 1"], "OK"),
        (
            &["INCR", "text"],
            "(error) ERR value is not an integer or out of range",
        ),
        (&["APPEND", "text", "23"], "(integer) 4"),
        (&["APPEND", "new", "12"], "(integer) 2"),
        (&["STRLEN", "text"], "(integer) 4"),
        (&["STRLEN", "none"], "(integer) 0"),
        (&["GETDEL", "text"], "\" 123\""),
        (&["GETDEL", "text"], "(nil)"),
        (&["TTL", "none"], "(integer) -2"),
        (&["TTL", "n"], "(integer) -1"),
        (&["EXPIRE", "n", "100"], "(integer) 1"),
        (&["TTL", "n"], "(integer) 100"),
        (&["INCR", "n"], "(integer) 41"),
        (&["TTL", "n"], "(integer) 100"),
        (&["PERSIST", "n"], "(integer) 1"),
        (&["PERSIST", "n"], "(integer) 0"),
        (&["TTL", "n"], "(integer) -1"),
        (&["EXPIRE", "none", "100"], "(integer) 0"),
        (
            &["EXPIRE", "n", "x"],
            "(error) ERR value is not an integer or out of range",
        ),
        (
            &["EXPIRE", "n", "9223372036854775807"],
            "(error) ERR invalid expire time in 'expire' command",
        ),
        (&["EXPIRE", "n", "-1"], "(integer) 1"),
        (&["GET", "n"], "(nil)"),
        (&["SET", "e", "1", "PX", "100000"], "OK"),
        (&["TTL", "e"], "(integer) 100"),
        (&["SET", "e", "1"], "OK"),
        (&["TTL", "e"], "(integer) -1"),
        (&["DBSIZE"], "(integer) 5"),
        (
            &["SCAN", "0", "MATCH", "ne*", "COUNT", "100"],
            "1) \"0\"\n2) 1) \"new\"",
        ),
        (
            &["SCAN", "0", "MATCH", "zz", "COUNT", "100"],
            "1) \"0\"\n2) (empty array)",
        ),
        (&["SCAN", "x"], "(error) ERR invalid cursor"),
        (&["SCAN", "0", "COUNT", "0"], "(error) ERR syntax error"),
        (&["SCAN", "0", "COUNT"], "(error) ERR syntax error"),
        (&["FLUSHALL", "LATER"], "(error) ERR syntax error"),
        (&["COMMAND", "COUNT"], "(integer) 26"),
        (&["CONFIG", "GET", "save"], "1) \"save\"\n2) \"\""),
        (
            &["CONFIG", "SET", "save", "1"],
            "(error) ERR unknown subcommand 'SET'. Try CONFIG HELP.",
        ),
        (&["CLIENT", "SETINFO", "LIB-NAME", "x"], "OK"),
        (
            &["CLIENT", "NOPE"],
            "(error) ERR unknown subcommand 'NOPE'. Try CLIENT HELP.",
        ),
        (
            &["HELLO", "4"],
            "(error) NOPROTO unsupported protocol version",
        ),
        (
            &["HELLO", "x"],
            "(error) ERR Protocol version is not an integer or out of range",
        ),
        (
            &["HELLO", "2", "AUTH", "a", "b"],
            "(error) ERR Syntax error in HELLO option 'AUTH'",
        ),
        (
            &["LPUSH", "a", "b c"],
            "(error) ERR unknown command 'LPUSH', with args beginning with: 'a' 'b c' ",
        ),
        (&["GET", &long], "(error) ERR key has more than 65536 bytes"),
        (
            &["MSET", "a", "1", &long, "1"],
            "(error) ERR key has more than 65536 bytes",
        ),
        (&["FLUSHALL"], "OK"),
        (&["DBSIZE"], "(integer) 0"),
        (&["SCAN", "0"], "1) \"0\"\n2) (empty array)"),
    ];
    for version in ["-2", "-3"] {
        for (command, expected) in table {
            let expected = match (version, &command[..]) {
                // Version 3 has maps.
                ("-3", ["CONFIG", "GET", _]) => "1# \"save\" => \"\"",
                _ => expected.trim_end(),
            };
            server.check(version, command, expected);
        }
    }
    for section in ["Server", "Clients", "Stats", "Store", "Device", "Engine"] {
        let output = server.run("redis-cli", &["INFO", section]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.starts_with(&format!("# {section}\r\n")), "{text}");
        assert!(text.lines().count() > 3, "{text}");
    }
    let scanned = |arguments: &[&str]| {
        let output = server.run("redis-cli", arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut keys: Vec<_> = text.lines().map(str::to_owned).collect();
        keys.sort();
        keys
    };
    let mut keys: Vec<_> = (0..200).map(|number| format!("key:{number}")).collect();
    let pairs: Vec<&str> = keys.iter().flat_map(|key| [&**key, "v"]).collect();
    server.check("-2", &[&["MSET"], &pairs[..]].concat(), "OK");
    keys.sort();
    assert_eq!(scanned(&["--scan"]), keys);
    assert_eq!(scanned(&["--scan", "--pattern", "key:1?9"]).len(), 10);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_benchmark_has_no_errors() {
    let server = Running::start(64 * MIB, Options::default(), Limits::default()).await;
    let requests = if full() { "100000" } else { "5000" };
    for pipeline in ["1", "16"] {
        let arguments = [
            "-t", "set,get", "-n", requests, "-c", "50", "-P", pipeline, "-q",
        ];
        let output = server.run("redis-benchmark", &arguments);
        let text = String::from_utf8_lossy(&output.stdout);
        let complaints = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}{complaints}");
        assert!(complaints.is_empty(), "{complaints}");
        for test in ["SET: ", "GET: "] {
            assert!(
                text.contains(test) && text.contains("requests per second"),
                "{text}"
            );
        }
        assert!(!text.to_lowercase().contains("err"), "{text}");
    }
    // Those that came together became durable together.
    let batches = server.store.state().statistics.batches.0.mean();
    assert!(batches > 2.0, "{batches} records in a batch");
    server.end().await;
}

/// Sends bytes; returns what comes until the server ends the connection, or seems to hang.
fn talk(server: &Running, bytes: &[u8]) -> String {
    let mut stream = server.connect();
    let long = Some(Duration::from_secs(30));
    stream.set_read_timeout(long).expect("is a socket");
    stream.write_all(bytes).expect("is read");
    stream.shutdown(std::net::Shutdown::Write).expect("is open");
    let mut reply = String::new();
    let _ = stream.read_to_string(&mut reply);
    reply
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelines_are_answered_in_order_and_see_what_came_before() {
    let server = Running::start(4 * MIB, busy(), Limits::default()).await;
    let pipeline =
        b"SET a 1\r\nGET a\r\nINCR a\r\nGET a\r\nAPPEND a 0\r\nDEL a\r\nGET a\r\nEXISTS a\r\n\
        HELLO 3\r\nGET a\r\nQUIT\r\nPING\r\n";
    let reply = talk(&server, pipeline);
    let start = "+OK\r\n$1\r\n1\r\n:2\r\n$1\r\n2\r\n:2\r\n:1\r\n$-1\r\n:0\r\n%7\r\n";
    assert!(reply.starts_with(start), "{reply}");
    assert!(reply.ends_with("_\r\n+OK\r\n"), "{reply}");
    // Many at once.
    let many: String = (0..5000)
        .map(|number| format!("INCRBY n 1\r\nECHO {number}\r\n"))
        .collect();
    let expected: String = (0..5000)
        .map(|number| {
            let text = number.to_string();
            format!(":{}\r\n${}\r\n{text}\r\n", number + 1, text.len())
        })
        .collect();
    assert_eq!(talk(&server, many.as_bytes()), expected);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_do_not_keep_later_writes_of_a_pipeline_from_room() {
    let server = Running::start(4 * MIB, busy(), Limits::default()).await;
    let mut keys = 0;
    while change(
        &server.store,
        vec![set(format!("{keys:03}"), vec![1; 3000])],
    )
    .await
    .is_ok()
    {
        keys += 1;
    }
    // There are readers in all segments, and more is written than there is room for.
    let gets = (0..keys).step_by(16).map(|key| format!("GET {key:03}\r\n"));
    let writes = (0..400).map(|key| format!("*3\r\n$6\r\nAPPEND\r\n$3\r\n{key:03}\r\n$0\r\n\r\n"));
    let pipeline: String = gets.chain(writes).collect();
    let replies = talk(&server, pipeline.as_bytes());
    assert_eq!(replies.matches(":3000\r\n").count(), 400);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_makes_no_heap_of_replies() {
    const KEYS: usize = 100;
    const LEN: usize = 400_000;
    let server = Running::start(128 * MIB, Options::default(), Limits::default()).await;
    for key in 0..KEYS {
        let large = set(format!("{key}"), vec![1; LEN]);
        change(&server.store, vec![large]).await.expect("fits");
    }
    let mut client = server.connect();
    let pipeline: String = (0..KEYS).map(|key| format!("GETDEL {key}\r\n")).collect();
    client.write_all(pipeline.as_bytes()).expect("is open");
    let left = async |wanted: usize| {
        while usage(&server.store).keys > wanted {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    // The first ones' replies are as much as there may be, and more than the connection takes.
    left(KEYS - 40).await;
    let more = tokio::time::timeout(Duration::from_millis(500), left(0)).await;
    assert!(more.is_err(), "all replies are held");
    std::io::copy(&mut client.take((KEYS * LEN) as u64), &mut std::io::sink()).expect("is served");
    left(0).await;
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hello_that_fails_changes_nothing() {
    let server = Running::start(4 * MIB, busy(), Limits::default()).await;
    assert_eq!(
        talk(&server, b"HELLO 3 FOO\r\nGET none\r\n"),
        "-ERR Syntax error in HELLO option 'FOO'\r\n$-1\r\n"
    );
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_end_in_clear_errors() {
    let limits = Limits {
        connections: 2,
        pending: MIB,
    };
    let server = Running::start(4 * MIB, busy(), limits).await;
    let broken = talk(&server, b"PING\r\n*1\r\n*1\r\n$4\r\nPING\r\n");
    assert_eq!(
        broken,
        "+PONG\r\n-ERR Protocol error: expected '$', got '*'\r\n"
    );
    let large = talk(&server, b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$2000000\r\n");
    assert!(large.starts_with("-OOM too much memory"), "{large}");
    // More than a segment takes.
    let value = format!(
        "*3\r\n$3\r\nSET\r\n$1\r\na\r\n$200000\r\n{}\r\n",
        "v".repeat(200_000)
    );
    let large = talk(&server, value.as_bytes());
    assert!(
        large.starts_with("-ERR 200025 bytes are more than the store takes"),
        "{large}"
    );
    // Of one value, many times.
    let value = format!("SET a {}\r\n", "v".repeat(50_000));
    let many = format!("MGET{}\r\n", " a".repeat(700));
    let replies = talk(&server, (value + &many).as_bytes());
    assert_eq!(
        replies,
        "+OK\r\n-ERR the reply would have more than 33619968 bytes\r\n"
    );
    let held = [server.connect(), server.connect()];
    for mut stream in &held {
        stream.write_all(b"PING\r\n").expect("is open");
        let mut reply = [0; 7];
        stream.read_exact(&mut reply).expect("is served");
    }
    let refused = talk(&server, b"");
    assert_eq!(refused, "-ERR max number of clients reached\r\n");
    drop(held);
    server.end().await;
}
