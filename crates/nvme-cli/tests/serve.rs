//! `nvme-async serve` as a user meets it.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use vfio_user::socket::{MessageReader, Received, send};
use vfio_user::{Capabilities, Limits, RegionAccess, Reply, Request, Version, region};

fn serve(dir: &Path, line: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_nvme-async"))
        .args(["serve", "vfio-user", "--socket", "nvme.sock"])
        .args(line.split_whitespace())
        .current_dir(dir)
        .env("RUST_LOG", "off")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run nvme-async")
}

/// What is printed once clients can connect.
fn first_line(child: &mut Child) -> String {
    let mut line = String::new();
    let stdout = child.stdout.as_mut().expect("it is piped");
    BufReader::new(stdout).read_line(&mut line).expect("a line");
    line
}

fn end(mut child: Child, signal: Signal) -> ExitStatus {
    kill_process(Pid::from_child(&child), signal).expect("it runs");
    child.wait().expect("it ends")
}

/// Says hello, and reads the version register of the controller.
fn version(stream: &UnixStream) -> u32 {
    let limits = Limits::default();
    let mut reader = MessageReader::new(limits);
    let access = RegionAccess {
        region: region::BAR0,
        offset: 8,
        count: 4,
    };
    let hello = Request::Version(Version {
        major: 0,
        minor: 1,
        capabilities: Capabilities::default(),
    });
    for (id, request) in [(0, hello), (1, Request::RegionRead(access))] {
        send(stream, &request.encode(id, false), &[]).expect("sent");
        let Received::Message(message) = reader.read(stream).expect("received") else {
            panic!("no answer");
        };
        let reply = message.reply(&limits).expect("a reply");
        assert!(reply.answers(&request), "{reply:?}");
        if let Reply::RegionRead { data, .. } = reply {
            return u32::from_le_bytes(data.try_into().expect("four bytes"));
        }
    }
    panic!("not read");
}

#[test]
fn it_serves_until_it_is_told_to_end() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("nvme.sock");
    for (line, signal) in [
        ("file:disk.img?size=1M", Signal::TERM),
        ("file:disk.img --trust-client", Signal::INT),
        ("mem:?size=1M&lba=4096 --doorbells mapped", Signal::TERM),
    ] {
        let mut child = serve(dir.path(), line);
        let url = line.split(' ').next().expect("a word");
        assert_eq!(
            first_line(&mut child),
            format!("serving {url} at nvme.sock\n")
        );
        let mode = socket.metadata().expect("a socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // Another server finds the socket in use.
        let other = serve(dir.path(), "mem:?size=1M")
            .wait_with_output()
            .expect("it ends");
        assert_eq!(other.status.code(), Some(1));
        let said = String::from_utf8_lossy(&other.stderr).into_owned();
        assert!(
            said.contains("another process serves this socket"),
            "{said}"
        );
        let client = UnixStream::connect(&socket).expect("connected");
        assert_eq!(version(&client), 0x0002_0000);
        assert!(end(child, signal).success());
        assert!(!socket.exists());
    }
    assert_eq!(
        dir.path()
            .join("disk.img")
            .metadata()
            .expect("a file")
            .len(),
        1 << 20
    );
}

#[test]
fn one_that_was_killed_leaves_nothing_in_the_way() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("nvme.sock");
    let mut child = serve(dir.path(), "mem:?size=1M");
    first_line(&mut child);
    assert!(!end(child, Signal::KILL).success());
    assert!(socket.exists());
    let mut child = serve(dir.path(), "mem:?size=1M");
    first_line(&mut child);
    version(&UnixStream::connect(&socket).expect("connected"));
    assert!(end(child, Signal::TERM).success());
}

#[test]
fn what_can_not_be_served_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    for (line, status) in [
        ("nvme://0000:44:00.0/1", 2),
        ("mem:", 2),
        ("file:missing.img", 1),
        ("mem:?size=1M --doorbells none", 2),
    ] {
        let output = serve(dir.path(), line).wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(status), "{line}");
        let left = std::fs::read_dir(dir.path()).expect("read").count();
        assert_eq!(left, 0, "{line}");
    }
    // What is no socket is left alone, and no file is made.
    std::fs::write(dir.path().join("nvme.sock"), "precious").expect("written");
    let output = serve(dir.path(), "file:new.img?size=1M")
        .wait_with_output()
        .expect("it ends");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        std::fs::read(dir.path().join("nvme.sock")).expect("read"),
        b"precious"
    );
    assert!(!dir.path().join("new.img").exists());
}
