//! Messages over real sockets.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_getfd};
use vfio_user::socket::{MessageReader, Outgoing, ReceiveError, Received, send};
use vfio_user::{Limits, Message, RegionWrite, Request};

fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().expect("a pair of sockets")
}

fn next(reader: &mut MessageReader, socket: &UnixStream) -> Message {
    match reader.read(socket).expect("received") {
        Received::Message(message) => message,
        other => panic!("{other:?}"),
    }
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile();
    file.write_all(content).expect("written");
    file
}

fn tempfile() -> File {
    let name = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC);
    File::from(name.expect("a memfd"))
}

fn content(file: &OwnedFd) -> Vec<u8> {
    let file = File::from(file.try_clone().expect("cloned"));
    let mut content = vec![0; 16];
    let count = std::os::unix::fs::FileExt::read_at(&file, &mut content, 0).expect("read");
    content.truncate(count);
    content
}

#[test]
fn descriptors_stay_with_their_messages() {
    let (ours, theirs) = pair();
    let reset = |id| Request::DeviceReset.encode(id, false);
    let (first, second) = (file(b"first"), file(b"second"));
    send(&theirs, &reset(0), &[]).expect("sent");
    send(&theirs, &reset(1), &[first.as_fd(), second.as_fd()]).expect("sent");
    send(&theirs, &reset(2), &[]).expect("sent");
    send(&theirs, &reset(3), &[second.as_fd()]).expect("sent");
    drop(theirs);
    let mut reader = MessageReader::new(Limits::default());
    for (id, contents) in [
        (0, &[] as &[&[u8]]),
        (1, &[b"first", b"second"]),
        (2, &[]),
        (3, &[b"second"]),
    ] {
        let message = next(&mut reader, &ours);
        assert_eq!(message.header.id(), id);
        let found: Vec<_> = message.fds.iter().map(content).collect();
        assert_eq!(found, contents, "message {id}");
        for fd in &message.fds {
            assert!(fcntl_getfd(fd).expect("open").contains(FdFlags::CLOEXEC));
        }
    }
    assert!(matches!(reader.read(&ours), Ok(Received::Closed)));
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let (ours, mut theirs) = pair();
    ours.set_nonblocking(true).expect("nonblocking");
    let data: Vec<u8> = (0..=255).collect();
    let request = Request::RegionWrite(RegionWrite {
        region: 0,
        offset: 0x40,
        data: &data,
    });
    let bytes = request.encode(1, false);
    let mut reader = MessageReader::new(Limits::default());
    for (index, byte) in bytes.iter().enumerate() {
        assert!(
            matches!(reader.read(&ours), Ok(Received::Pending)),
            "{index}"
        );
        theirs.write_all(&[*byte]).expect("sent");
    }
    let message = next(&mut reader, &ours);
    assert_eq!(message.request(&Limits::default()), Ok(request));
    assert!(matches!(reader.read(&ours), Ok(Received::Pending)));
}

#[test]
fn a_large_message_passes_a_small_socket() {
    let (ours, theirs) = pair();
    theirs.set_nonblocking(true).expect("nonblocking");
    let data = vec![0x5a; 1 << 20];
    let request = Request::DmaWrite {
        address: 0,
        data: &data,
    };
    let bytes = request.encode(1, false);
    let beside = file(b"beside");
    let (message, other) = thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut reader = MessageReader::new(Limits::default());
            (next(&mut reader, &ours), next(&mut reader, &ours))
        });
        send(&theirs, &bytes, &[beside.as_fd()]).expect("sent");
        let mut outgoing = Outgoing::new(bytes.clone(), vec![beside.into()]);
        while !outgoing.write(&theirs).expect("sent") {
            thread::yield_now();
        }
        receiver.join().expect("no panic")
    });
    for message in [message, other] {
        assert_eq!(
            (message.fds.len(), message.payload.len()),
            (1, 16 + (1 << 20))
        );
        assert_eq!(content(&message.fds[0]), b"beside");
    }
    // More than is accepted is refused by the header alone.
    let small = Limits {
        max_transfer: 4096,
        ..Limits::default()
    };
    thread::scope(|scope| {
        scope.spawn(|| send(&theirs, &bytes, &[]));
        let refused = MessageReader::new(small).read(&ours);
        assert!(matches!(refused, Err(ReceiveError::Header(_))));
        // So that the sender does not wait for ever.
        let _ = ours.shutdown(std::net::Shutdown::Both);
    });
}

#[test]
fn too_many_descriptors_end_the_connection() {
    let (ours, theirs) = pair();
    let some = file(b"");
    let beside = vec![some.as_fd(); 17];
    send(&theirs, &Request::DeviceReset.encode(0, false), &beside).expect("sent");
    assert!(matches!(
        MessageReader::new(Limits::default()).read(&ours),
        Err(ReceiveError::TooManyDescriptors)
    ));
}

#[test]
fn an_end_inside_of_a_message_is_an_error() {
    let bytes = Request::RegionWrite(RegionWrite {
        region: 0,
        offset: 0,
        data: &[0; 4],
    })
    .encode(0, false);
    for count in 1..bytes.len() {
        let (ours, mut theirs) = pair();
        theirs.write_all(&bytes[..count]).expect("sent");
        drop(theirs);
        let end = MessageReader::new(Limits::default()).read(&ours);
        assert!(
            matches!(end, Err(ReceiveError::Truncated)),
            "{count}: {end:?}"
        );
    }
}

#[test]
fn a_closed_peer_is_an_error_and_no_signal() {
    let (mut ours, theirs) = pair();
    drop(theirs);
    let error = send(&ours, &[0; 16], &[]).expect_err("closed");
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    assert_eq!(ours.read(&mut [0; 1]).expect("the end"), 0);
}

#[test]
fn a_message_is_waited_for_in_limited_time() {
    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);
    let request = Request::RegionWrite(RegionWrite {
        region: 0,
        offset: 0x40,
        data: &[1; 200],
    });
    let bytes = request.encode(0, false);
    let (ours, mut theirs) = pair();
    let mut reader = MessageReader::new(Limits::default());
    // None begins.
    let until = Some(Instant::now() + SHORT);
    let received = reader.read_in_time(&ours, until, LONG);
    assert!(matches!(received, Ok(Received::Pending)));
    // One is there, without a limit and after it.
    for until in [None, Some(Instant::now() + LONG), Some(Instant::now())] {
        theirs.write_all(&bytes).expect("sent");
        let received = reader.read_in_time(&ours, until, LONG);
        assert!(matches!(received, Ok(Received::Message(_))), "{until:?}");
    }
    // Its end does not come: nothing of the payload, or not all of it.
    for there in [16, 17] {
        let (ours, mut theirs) = pair();
        let mut reader = MessageReader::new(Limits::default());
        theirs.write_all(&bytes[..there]).expect("sent");
        let received = reader.read_in_time(&ours, None, SHORT);
        assert!(matches!(received, Ok(Received::Pending)), "{there}");
        // What is there is kept.
        theirs.write_all(&bytes[there..]).expect("sent");
        let received = reader.read_in_time(&ours, None, LONG);
        assert!(matches!(received, Ok(Received::Message(_))), "{there}");
    }
    // It comes, but too slowly: each byte within the time, all of them not.
    let (ours, mut theirs) = pair();
    let mut reader = MessageReader::new(Limits::default());
    let received = thread::scope(|scope| {
        let ours = ours;
        scope.spawn(move || {
            for byte in &bytes {
                if theirs.write_all(&[*byte]).is_err() {
                    return;
                }
                thread::sleep(SHORT / 4);
            }
        });
        reader.read_in_time(&ours, None, SHORT)
    });
    assert!(matches!(received, Ok(Received::Pending)));
    // The peer goes.
    let (ours, theirs) = pair();
    drop(theirs);
    let mut reader = MessageReader::new(Limits::default());
    let received = reader.read_in_time(&ours, Some(Instant::now() + LONG), LONG);
    assert!(matches!(received, Ok(Received::Closed)));
}
