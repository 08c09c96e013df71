//! What a key takes of the example's memory, and how long its recovery takes.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::time::Instant;

use rustix::process::Signal;

use crate::served::Served;

/// Requests that are outstanding.
const PIPELINE: u64 = 1000;

pub(crate) fn measure(program: &Path, directory: &Path, keys: u64) {
    // More than twice what the records take.
    let size = format!("{}M", ((keys * 400) >> 20) + 1024);
    let start = || {
        let began = Instant::now();
        (Served::kv(program, directory, &size), began.elapsed())
    };
    let (server, _) = start();
    let before = memory(&server);
    fill(&server, keys);
    let after = memory(&server);
    let each = after.saturating_sub(before) as f64 / keys as f64;
    println!("{keys} keys of 16 bytes with values of 100 bytes: {each:.0} bytes of memory per key");
    let mut running = server;
    for (how, signal) in [("kill -9", Signal::KILL), ("SIGTERM", Signal::TERM)] {
        running.end(signal);
        let (server, time) = start();
        assert_eq!(info(&server, "db0:keys=") as u64, keys);
        let million = time.as_secs_f64() * 1e6 / keys as f64;
        println!("after {how}: it served again after {time:.2?}, {million:.2} s per million keys");
        running = server;
    }
}

/// Sets that many keys.
fn fill(server: &Served, keys: u64) {
    let mut stream = server.connect().expect("it listens");
    let replies = stream.try_clone().expect("there are descriptors");
    let mut replies = BufReader::new(replies).lines();
    let value = "v".repeat(100);
    let mut number = 0;
    while number < keys {
        let end = (number + PIPELINE).min(keys);
        let requests: String = (number..end)
            .map(|key| format!("*3\r\n$3\r\nSET\r\n$16\r\nkey:{key:012}\r\n$100\r\n{value}\r\n"))
            .collect();
        stream.write_all(requests.as_bytes()).expect("it reads");
        for _ in number..end {
            let reply = replies.next().expect("it replies").expect("it replies");
            assert_eq!(reply, "+OK");
        }
        number = end;
    }
}

fn memory(server: &Served) -> usize {
    info(server, "used_memory_rss:")
}

/// The number after that in INFO.
fn info(server: &Served, name: &str) -> usize {
    let mut stream = server.connect().expect("it listens");
    stream.write_all(b"INFO\r\nQUIT\r\n").expect("it reads");
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let text = lines.find_map(|line| line.strip_prefix(name).map(str::to_owned));
    let text = text.unwrap_or_else(|| panic!("INFO does not say {name}"));
    let digits = text
        .split(|character: char| !character.is_ascii_digit())
        .next();
    digits
        .and_then(|digits| digits.parse().ok())
        .expect("is a number")
}
