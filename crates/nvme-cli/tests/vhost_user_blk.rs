//! `nvme-async serve vhost-user-blk` as a front end meets it, and as one whose server is killed.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};

#[expect(dead_code, reason = "the tests of the server itself need more of it")]
#[path = "../../nvme-export/tests/vhost_user_blk/guest.rs"]
mod guest;

use guest::{DATA, Driver, FrontEnd, IN, IOERR, OK, OUT, Ram, Wishes};

fn serve(dir: &Path, line: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_nvme-async"))
        .args(["serve", "vhost-user-blk"])
        .args(line.split_whitespace())
        .current_dir(dir)
        .env("RUST_LOG", "off")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run nvme-async")
}

/// Waits until so many sockets are announced; returns what was said.
fn announced(child: &mut Child, count: usize) -> Vec<String> {
    let stdout = child.stdout.as_mut().expect("it is piped");
    let lines = BufReader::new(stdout).lines().take(count);
    let lines: Vec<String> = lines.map(|line| line.expect("a line")).collect();
    assert_eq!(lines.len(), count, "it says that it listens");
    lines
}

fn end(mut child: Child, signal: Signal) -> ExitStatus {
    kill_process(Pid::from_child(&child), signal).expect("it runs");
    child.wait().expect("it ends")
}

#[test]
fn two_disks_of_one_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let line = "--disk socket=a.sock,range=0+4M --disk socket=b.sock,range=8M+4M \
                --disk socket=c.sock,range=8M+4M,read-only file:disk.img?size=16M";
    let mut child = serve(dir.path(), line);
    let url = "file:disk.img?size=16M";
    let lines = announced(&mut child, 3);
    for (line, socket) in lines.iter().zip(["a.sock", "b.sock", "c.sock"]) {
        assert_eq!(*line, format!("serving {url} at {socket}"));
        let mode = dir.path().join(socket).metadata().expect("there");
        assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    }
    let rams = [Ram::new(), Ram::new(), Ram::new()];
    let mut guests: Vec<(FrontEnd, Driver)> = rams
        .iter()
        .zip(["a.sock", "b.sock", "c.sock"])
        .map(|(ram, socket)| {
            let socket = dir.path().join(socket);
            let mut front_end = FrontEnd::connect(&socket, ram, &Wishes::default());
            let driver = front_end.start().remove(0);
            (front_end, driver)
        })
        .collect();
    for (index, (_, driver)) in guests.iter_mut().enumerate() {
        rams[index].write(DATA, &[index as u8 + 1; 4096]);
        let status = driver.run(OUT, 8, &[(DATA, 4096)]);
        assert_eq!(status, if index == 2 { IOERR } else { OK });
        assert_eq!(driver.run(OUT, 8192, &[(DATA, 4096)]), IOERR, "its end");
    }
    let (_, reader) = &mut guests[2];
    assert_eq!(reader.run(IN, 8, &[(DATA + 4096, 4096)]), OK);
    assert_eq!(rams[2].read(DATA + 4096, 4096), [2; 4096]);
    // With front ends connected.
    assert!(end(child, Signal::TERM).success());
    let file = std::fs::File::open(dir.path().join("disk.img")).expect("there");
    for (offset, expected) in [(4096, 1), ((8 << 20) + 4096, 2), (4 << 20, 0)] {
        let mut found = [0xff; 4096];
        file.read_exact_at(&mut found, offset).expect("there");
        assert_eq!(found, [expected; 4096], "{offset}");
    }
    let left = std::fs::read_dir(dir.path()).expect("read").count();
    assert_eq!(left, 1, "no socket is left");
}

/// A server that is killed in the midst of requests, again and again: the guest sees no error, and what it was told
/// is written is there.
#[test]
fn guests_outlive_their_server() {
    const SLOTS: u64 = 32;
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("disk.sock");
    let line = "--socket disk.sock file:disk.img?size=16M&latency=300us";
    let ram = Ram::new();
    let wishes = Wishes::default();
    let mut child = serve(dir.path(), line);
    announced(&mut child, 1);
    let mut front_end = FrontEnd::connect(&socket, &ram, &wishes);
    let kept = front_end.new_inflight();
    front_end.set_inflight(&kept);
    let mut driver = front_end.start().remove(0);
    let place = |slot: u64| DATA + slot * 8192;
    let mut heads = std::collections::HashMap::new();
    let mut versions = vec![0_u8; SLOTS as usize];
    let mut done = 0_u64;
    for round in 0..8 {
        let until = done + 200 + round * 37;
        while done < until || round == 7 && !heads.is_empty() {
            for slot in 0..SLOTS {
                if done < until && !heads.values().any(|other| *other == slot) {
                    versions[slot as usize] = versions[slot as usize].wrapping_add(1);
                    ram.write(place(slot), &[versions[slot as usize]; 8192]);
                    let head = driver.request(OUT, slot * 16, &[(place(slot), 8192)]);
                    heads.insert(head, slot);
                }
            }
            let (head, _) = driver.wait();
            let slot = heads.remove(&head).expect("it was not done before");
            assert_eq!(driver.status(head), OK, "{round}: {slot}");
            done += 1;
        }
        if round == 7 {
            break;
        }
        assert!(!heads.is_empty(), "something is under way");
        assert!(!end(child, Signal::KILL).success());
        child = serve(dir.path(), line);
        announced(&mut child, 1);
        front_end = FrontEnd::connect(&socket, &ram, &wishes);
        front_end.set_inflight(&kept);
        front_end.start_queue(&driver, driver.used_index());
    }
    for slot in 0..SLOTS {
        assert_eq!(driver.run(IN, slot * 16, &[(DATA + (1 << 20), 8192)]), OK);
        let expected = vec![versions[slot as usize]; 8192];
        assert!(ram.read(DATA + (1 << 20), 8192) == expected, "{slot}");
    }
    assert!(end(child, Signal::TERM).success());
}

#[test]
fn what_can_not_be_served_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    for (line, status) in [
        ("mem:?size=1M", 2),
        ("--socket a.sock", 2),
        ("--socket a.sock mem:", 2),
        ("--socket a.sock file:missing.img", 1),
        ("--socket a.sock --range 0+2M file:new.img?size=1M", 2),
        ("--socket a.sock --range 1+512 mem:?size=1M", 2),
        ("--socket a.sock --queues 0 mem:?size=1M", 2),
        ("--socket a.sock --queues 257 mem:?size=1M", 2),
        ("--socket a.sock --disk socket=b.sock mem:?size=1M", 2),
        ("--disk socket=a.sock --disk socket=a.sock mem:?size=1M", 1),
        ("--disk range=0+512 mem:?size=1M", 2),
    ] {
        let output = serve(dir.path(), line).wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(status), "{line}");
        let left = std::fs::read_dir(dir.path()).expect("read").count();
        assert_eq!(left, 0, "{line}");
    }
}
