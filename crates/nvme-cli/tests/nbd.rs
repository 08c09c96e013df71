//! `serve nbd` and its clients: qemu's tools and libnbd's.
//!
//! They are in Debian's packages qemu-utils and libnbd-bin, which `cargo xtask test` installs.

#[path = "nbd/clients.rs"]
mod clients;
#[path = "nbd/monitor.rs"]
mod monitor;
#[path = "nbd/place.rs"]
mod place;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use rustix::process::Signal;

use place::{Place, pattern, program};

const SIZE: usize = 8 << 20;

#[test]
fn it_serves_until_it_is_told_to_end() {
    let place = Place::new();
    for (line, signal) in [
        (
            "--listen unix:nbd.sock a=file:disk.img?size=8M",
            Signal::TERM,
        ),
        ("--listen unix:nbd.sock a=file:disk.img", Signal::INT),
    ] {
        let server = place.serve(line);
        assert_eq!(
            server.lines,
            [format!(
                "serving {} at nbd+unix:///a?socket=nbd.sock",
                line.rsplit_once("a=").expect("a name").1
            )]
        );
        let socket = place.path("nbd.sock");
        let mode = fs::metadata(&socket).expect("a socket").permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        // Another server finds the socket in use, and makes no file.
        let other = "serve nbd --listen unix:nbd.sock file:other.img?size=1M";
        let refused = place.fails(&program(), other, 1);
        assert!(refused.contains("another process serves this socket"));
        assert!(!place.path("other.img").exists());
        place.run(
            "qemu-io -f raw -c",
            &["write -P 7 1M 64k", &server.uri("a")],
        );
        assert!(server.end(signal).success());
        assert!(!socket.exists());
    }
    let image = fs::read(place.path("disk.img")).expect("the image");
    assert_eq!(image[1 << 20..(1 << 20) + 65536], [7; 65536]);
}

#[test]
fn one_that_was_killed_leaves_nothing_in_the_way() {
    let place = Place::new();
    let line = "--listen unix:nbd.sock mem:?size=1M";
    assert!(!place.serve(line).end(Signal::KILL).success());
    assert!(place.path("nbd.sock").exists());
    let server = place.serve(line);
    place.run("nbdinfo", &[&server.uri("1")]);
    assert!(server.end(Signal::TERM).success());
}

#[test]
fn what_can_not_be_served_is_refused() {
    let place = Place::new();
    fs::write(place.path("rubbish.pem"), "rubbish").expect("written");
    for (line, status) in [
        ("", 2),
        ("--listen 127.0.0.1:0", 2),
        ("--listen 127.0.0.1 mem:?size=1M", 2),
        ("--listen 0.0.0.0:0 file:new.img?size=1M", 2),
        ("--listen unix:a.sock nvme://0000:44:00.0/1", 1),
        ("--listen unix:a.sock file:missing.img", 1),
        ("--listen unix:a.sock b=mem:?size=1M b=mem:?size=1M", 2),
        ("--listen unix:a.sock b@1M=mem:?size=1M", 2),
        ("--listen unix:a.sock b@512K+1M=file:new.img?size=1M", 2),
        ("--listen unix:a.sock @1+512=file:new.img?size=1M", 2),
        ("--listen unix:a.sock mem:?size=1M file:missing.img", 1),
        ("--listen unix:a.sock --max-connections 0 mem:?size=1M", 2),
        (
            "--listen unix:a.sock --tls-cert rubbish.pem mem:?size=1M",
            2,
        ),
        (
            "--listen unix:a.sock --tls-cert rubbish.pem --tls-key rubbish.pem mem:?size=1M",
            2,
        ),
        (
            "--listen unix:a.sock --tls-cert no.pem --tls-key rubbish.pem mem:?size=1M",
            1,
        ),
    ] {
        let line = format!("serve nbd {line}");
        place.fails(&program(), &line, status);
        let left = fs::read_dir(place.path(".")).expect("read").count();
        assert_eq!(left, 1, "{line}");
    }
}

#[test]
fn several_exports_and_parts() {
    let place = Place::new();
    let server = place.serve(
        "--listen 127.0.0.1:0 whole=file:disk.img?size=8M part@1M+2M=file:disk.img mem:?size=1M&lba=4096",
    );
    assert_eq!(server.lines.len(), 3);
    place.run(
        "qemu-io -f raw -c",
        &["write -P 5 0 64k", &server.uri("part")],
    );
    let whole = server.uri("whole");
    place.run("qemu-io -f raw -c", &["read -P 5 1M 64k", &whole]);
    place.run("qemu-io -f raw -c", &["read -P 0 0 1M", &whole]);
    let told = place.run("nbdinfo --json", &[&server.uri("part")]);
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    let export = &told["exports"][0];
    assert_eq!(export["export-size"], 2 << 20);
    assert_eq!(export["block_size_minimum"], 512);
    assert_eq!(export["is_read_only"], false);
    let told = place.run("nbdinfo --json", &[&server.uri("3")]);
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(told["exports"][0]["block_size_minimum"], 4096);
    assert!(server.end(Signal::TERM).success());
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    let place = Place::new();
    let data = pattern(1, SIZE);
    fs::write(place.path("disk.img"), &data).expect("written");
    let server = place.serve("--listen unix:nbd.sock --read-only a=file:disk.img");
    let uri = server.uri("a");
    let told = place.run("nbdinfo", &[&uri]);
    assert!(told.contains("is_read_only: true"), "{told}");
    fs::write(place.path("zeroes"), vec![0; SIZE]).expect("written");
    place.fails("nbdcopy", &format!("zeroes {uri}"), 1);
    place.run("nbdcopy", &[&uri, "copy.img"]);
    assert!(fs::read(place.path("copy.img")).expect("the copy") == data);
    assert!(server.end(Signal::TERM).success());
    assert!(fs::read(place.path("disk.img")).expect("the image") == data);
}
