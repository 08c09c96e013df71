//! What clients leave behind in the server. A process of its own, whose descriptors and mappings are counted.

#[path = "serving/client.rs"]
#[expect(dead_code, reason = "other tests use more of it")]
mod client;
#[path = "serving/queues.rs"]
mod queues;

use std::fs;
use std::os::unix::net::UnixStream;

use nvme_spec::nvm;
use nvme_vfio_user::{Device, Doorbells, Options, ServeError};
use rustix::process::{Resource, getrlimit, setrlimit};
use vfio_user::Request;

use crate::client::{Client, MEMORIES, device, with};
use crate::queues::{DATA, prp};

/// Open descriptors, and mappings of memfds.
fn held() -> (usize, usize) {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mapped = maps.lines().filter(|line| line.contains("/memfd:"));
    (descriptors, mapped.count())
}

/// A client of each kind that leaves in the middle of everything.
fn come_and_go(device: &Device) {
    for memory in MEMORIES {
        with(device, |stream| {
            let mut client = Client::up(stream, memory);
            client.create_queues();
            client.io_ok(nvm::flush(1));
            for lba in 0..8 {
                client.submit(1, nvm::read(1, lba * 8, 8, false).with_data(prp(DATA)));
            }
            client.send_raw(&Request::DeviceReset.encode(1, false), &[]);
        });
    }
}

#[test]
fn clients_under_load_leave_nothing_behind() {
    for doorbells in [Doorbells::Trapped, Doorbells::Mapped] {
        let mut options = Options::default();
        options.doorbells = doorbells;
        let device = device(&options);
        come_and_go(&device);
        let before = held();
        for _ in 0..30 {
            come_and_go(&device);
        }
        assert_eq!(held(), before);
    }

    // Without descriptors for doorbells of its own a client is not served, and once there are some it is.
    let mut options = Options::default();
    options.doorbells = Doorbells::Mapped;
    let device = device(&options);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let before = getrlimit(Resource::Nofile);
    let mut none = before;
    none.current = Some(3);
    setrlimit(Resource::Nofile, none).unwrap();
    let served = device.serve(theirs);
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(matches!(served, Err(ServeError::Io(_))), "{served:?}");
    drop(ours);
    come_and_go(&device);
}
