//! Programs that copy, and read and write here and there.

use std::fs;

use rustix::process::Signal;

use crate::SIZE;
use crate::place::{Place, pattern};

/// Both ways of listening, and both sizes of blocks.
const SERVERS: [&str; 2] = [
    "--listen unix:nbd.sock disk=mem:?size=8M",
    "--listen 127.0.0.1:0 disk=mem:?size=8M&lba=4096",
];

#[test]
fn qemu_img_converts_both_ways() {
    for line in SERVERS {
        let place = Place::new();
        let data = pattern(2, SIZE);
        fs::write(place.path("in.img"), &data).expect("written");
        let server = place.serve(line);
        let uri = server.uri("disk");
        place.run("qemu-img convert -n -f raw -O raw in.img", &[&uri]);
        place.run("qemu-img compare -f raw -F raw in.img", &[&uri]);
        place.run("qemu-img convert -f raw -O raw", &[&uri, "out.img"]);
        assert!(fs::read(place.path("out.img")).expect("the image") == data);
        // To another format and back.
        place.run("qemu-img convert -f raw -O qcow2", &[&uri, "out.qcow2"]);
        place.run("qemu-img convert -f qcow2 -O raw out.qcow2", &["back.img"]);
        assert!(fs::read(place.path("back.img")).expect("the image") == data);
        assert!(server.end(Signal::TERM).success());
    }
}

#[test]
fn nbdcopy_copies_both_ways() {
    for line in SERVERS {
        let place = Place::new();
        let data = pattern(3, SIZE);
        fs::write(place.path("in.img"), &data).expect("written");
        let server = place.serve(line);
        let uri = server.uri("disk");
        for options in [
            "nbdcopy --flush",
            "nbdcopy --synchronous",
            "nbdcopy --connections=4 --requests=16",
        ] {
            place.run(options, &["in.img", &uri]);
            place.run(options, &[&uri, "out.img"]);
            assert!(fs::read(place.path("out.img")).expect("the image") == data);
            fs::remove_file(place.path("out.img")).expect("removed");
        }
        // From the server to itself, all of it at once.
        let second = place.serve("--listen unix:second.sock copy=mem:?size=8M");
        place.run("nbdcopy", &[&uri, &second.uri("copy")]);
        place.run("nbdcopy", &[&second.uri("copy"), "out.img"]);
        assert!(fs::read(place.path("out.img")).expect("the image") == data);
        assert!(second.end(Signal::TERM).success());
        assert!(server.end(Signal::TERM).success());
    }
}

#[test]
fn qemu_io_reads_and_writes() {
    for line in SERVERS {
        let place = Place::new();
        let server = place.serve(line);
        let uri = server.uri("disk");
        let io = |commands: &[&str]| {
            let mut words = Vec::new();
            for command in commands {
                words.extend(["-c", command]);
            }
            words.push(&uri);
            place.run("qemu-io -f raw", &words)
        };
        io(&[
            "write -P 1 0 1M",
            "write -f -P 2 64k 64k",
            "write -z 128k 64k",
            "write -z -u 192k 64k",
            "discard 256k 64k",
            "flush",
            "read -P 1 0 64k",
            "read -P 2 64k 64k",
            "read -P 0 128k 192k",
            "read -P 1 320k 704k",
            // Not of whole blocks, which is for the client to see to.
            "write -P 3 1025k 1k",
            "read -P 0 1M 1k",
            "read -P 3 1025k 1k",
            "aio_write -P 4 2M 1M",
            "aio_write -P 5 3M 1M",
            "aio_flush",
            "read -P 4 2M 1M",
            "read -P 5 3M 1M",
        ]);
        // Another connection sees the same.
        io(&["read -P 2 64k 64k", "read -P 5 3M 1M", "map"]);
        let map = place.run("nbdinfo --map", &[&uri]);
        // What is deallocated can't be told, so nothing is said to be.
        assert!(map.contains("data") && !map.contains("hole"), "{map}");
        assert!(server.end(Signal::TERM).success());
    }
}

#[test]
fn nbdinfo_knows_what_there_is() {
    let place = Place::new();
    let server = place.serve("--listen unix:nbd.sock a=mem:?size=8M b=mem:?size=1M");
    let root = server.uri("a").replace(":///a", ":///");
    let told = place.run("nbdinfo --list --json", &[&root]);
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(told["protocol"], "newstyle-fixed");
    assert_eq!(told["structured"], true);
    let exports = told["exports"].as_array().expect("a list");
    let names: Vec<_> = exports
        .iter()
        .map(|export| &export["export-name"])
        .collect();
    assert_eq!(names, ["a", "b"]);
    let export = &exports[0];
    for (what, expected) in [
        ("can_cache", true),
        ("can_df", true),
        ("can_fast_zero", false),
        ("can_flush", true),
        ("can_fua", true),
        ("can_multi_conn", true),
        ("can_trim", true),
        ("can_zero", true),
        ("is_rotational", false),
        ("is_read_only", false),
    ] {
        assert_eq!(export[what], expected, "{what}");
    }
    assert_eq!(export["contexts"][0], "base:allocation");
    assert_eq!(export["block_size_maximum"], 32 << 20);
    // Without a name it is the first one.
    let size = place.run("nbdinfo --size", &[&root]);
    assert_eq!(size.trim(), SIZE.to_string());
    assert!(server.end(Signal::TERM).success());
}

#[test]
fn a_qcow2_image_with_a_snapshot() {
    let place = Place::new();
    let server = place.serve("--listen unix:nbd.sock disk=mem:?size=32M");
    let uri = server.uri("disk");
    place.run("qemu-img create -f qcow2", &[&uri, "16M"]);
    let io = |command: &str| place.run("qemu-io -f qcow2 -c", &[command, &uri]);
    io("write -P 1 0 1M");
    place.run("qemu-img snapshot -c before", &[&uri]);
    io("write -P 2 0 512k");
    io("read -P 2 0 512k");
    io("read -P 1 512k 512k");
    place.run("qemu-img check -f qcow2", &[&uri]);
    place.run("qemu-img snapshot -a before", &[&uri]);
    io("read -P 1 0 1M");
    place.run("qemu-img check -f qcow2", &[&uri]);
    assert!(
        place
            .run("qemu-img snapshot -l", &[&uri])
            .contains("before")
    );
    assert!(server.end(Signal::TERM).success());
}

#[test]
fn tls_with_certificates_for_both() {
    let place = Place::new();
    certificates(&place);
    let server = place.serve(
        "--listen 127.0.0.1:0 --tls-cert server-cert.pem --tls-key server-key.pem \
         --tls-client-ca ca-cert.pem disk=mem:?size=8M",
    );
    let uri = server.uri("disk");
    let (scheme, rest) = uri.split_once("://").expect("a URI");
    assert_eq!(scheme, "nbds");
    let port = rest.split(['/', ':']).nth(1).expect("a port");
    let data = pattern(4, SIZE);
    fs::write(place.path("in.img"), &data).expect("written");
    let object = |directory: &str| {
        let directory = place.path(directory);
        format!(
            "tls-creds-x509,id=tls,endpoint=client,dir={}",
            directory.display()
        )
    };
    let image = format!(
        "driver=nbd,host=127.0.0.1,port={port},export=disk,tls-creds=tls,tls-hostname=localhost"
    );
    let convert = "qemu-img convert -n -f raw --target-image-opts --object";
    place.run(convert, &[&object("."), "in.img", &image]);
    let compare = "qemu-img convert -O raw --image-opts --object";
    place.run(compare, &[&object("."), &image, "out.img"]);
    assert!(fs::read(place.path("out.img")).expect("the image") == data);
    // Without TLS, and without a certificate of the client's.
    let plain = format!("nbd://{rest}");
    let refused = place.fails("nbdinfo", &plain, 1);
    assert!(refused.contains("server replied with error"), "{refused}");
    fs::create_dir(place.path("nobody")).expect("a directory");
    fs::copy(place.path("ca-cert.pem"), place.path("nobody/ca-cert.pem")).expect("copied");
    let nobody = format!("info --object {} --image-opts {image}", object("nobody"));
    place.fails("qemu-img", &nobody, 1);
    assert!(server.end(Signal::TERM).success());
}

/// An authority, and a certificate of it for each side, under the names that qemu looks for.
fn certificates(place: &Place) {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

    let key = || KeyPair::generate().expect("a key");
    let write = |name: &str, pem: String| fs::write(place.path(name), pem).expect("written");
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, key()).expect("signed");
    write("ca-cert.pem", authority.pem());
    for side in ["server", "client"] {
        let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        let key = key();
        let certificate = params.signed_by(&key, &authority).expect("signed");
        write(&format!("{side}-cert.pem"), certificate.pem());
        write(&format!("{side}-key.pem"), key.serialize_pem());
    }
}
