//! The socket file, and clients one after the other.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use nvme_spec::nvm;
use nvme_vfio_user::{BindError, Options, Server};

use crate::client::{Client, Memory, device, is_readable};

#[test]
fn the_file_is_made_for_its_owner_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nvme.sock");
    let server = Server::bind(&path).unwrap();
    let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Another server finds it in use.
    assert!(matches!(Server::bind(&path), Err(BindError::InUse(_))));
    drop(server);
    assert!(!path.exists());
}

#[test]
fn only_a_socket_that_nobody_serves_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nvme.sock");
    // As a server leaves it behind that is killed.
    drop(UnixListener::bind(&path).unwrap());
    drop(Server::bind(&path).unwrap());
    fs::write(&path, "precious").unwrap();
    assert!(matches!(Server::bind(&path), Err(BindError::NotASocket(_))));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(matches!(Server::bind(&link), Err(BindError::NotASocket(_))));
    let missing = dir.path().join("none").join("nvme.sock");
    assert!(matches!(Server::bind(missing), Err(BindError::Io { .. })));
    // What is there by the end is not the server's any more.
    fs::remove_file(&path).unwrap();
    let server = Server::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    drop(server);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn of_servers_that_start_at_once_one_has_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nvme.sock");
    for _ in 0..200 {
        drop(UnixListener::bind(&path).unwrap());
        let barrier = Barrier::new(4);
        let bind = || {
            barrier.wait();
            Server::bind(&path)
        };
        let servers: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(bind)).collect();
            threads.into_iter().map(|it| it.join().unwrap()).collect()
        });
        let mut bound = 0;
        for server in &servers {
            match server {
                Ok(_) => bound += 1,
                Err(error) => assert!(matches!(error, BindError::InUse(_)), "{error}"),
            }
        }
        assert_eq!(bound, 1);
        // And it is that one's.
        drop(UnixStream::connect(&path).unwrap());
        drop(servers);
        assert!(!path.exists());
    }
}

#[test]
fn a_socket_where_many_wait_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nvme.sock");
    let server = Server::bind(&path).unwrap();
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    let mut waiting = Vec::new();
    loop {
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        match rustix::net::connect(&socket, &address) {
            Ok(()) => waiting.push(socket),
            Err(error) => {
                assert_eq!(error, rustix::io::Errno::AGAIN);
                break;
            }
        }
    }
    assert!(matches!(Server::bind(&path), Err(BindError::InUse(_))));
    drop(server);
}

#[test]
fn clients_take_turns_and_the_server_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nvme.sock");
    let device = device(&Options::default());
    let server = Server::bind(&path).unwrap();
    let stopper = server.stopper();
    thread::scope(|scope| {
        let running = scope.spawn(|| server.run(&device));
        let connect = || UnixStream::connect(&path).unwrap();
        let mut first = Client::up(connect(), Memory::Sealed);
        first.create_queues();
        let waiting = connect();
        let mut second = Client::silent(waiting.try_clone().unwrap(), Memory::Sealed);
        let version = vfio_user::Request::Version(vfio_user::Version {
            major: 0,
            minor: 0,
            capabilities: Default::default(),
        });
        second.send_raw(&version.encode(1, false), &[]);
        for _ in 0..20 {
            first.io_ok(nvm::flush(1));
        }
        assert!(!is_readable(&waiting, Duration::ZERO), "two at a time");
        drop(first);
        let answer = second.receive();
        let Ok(vfio_user::Reply::Version(version)) = answer.reply(&Default::default()) else {
            panic!("{answer:?}");
        };
        assert_eq!(version.minor, 0, "not more than was asked for");
        drop((second, waiting));
        // While there is a client, whose memory is asked for.
        let mut third = Client::up(connect(), Memory::Messages);
        third.submit(0, nvme_spec::admin::identify_controller());
        stopper.stop();
        running.join().unwrap().unwrap();
        assert!(third.is_over());
        // Stopped for good.
        server.run(&device).unwrap();
    });
}
