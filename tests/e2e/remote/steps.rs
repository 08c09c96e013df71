//! A server that refuses, lies, hangs or goes at each step of an opening, which the next client then
//! finds as it was left.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nvme_async::device::vfio_user::{VfioUserDevice, VfioUserOptions};
use nvme_async::{Error, Namespace, OpenOptions};

use super::impatient;
use super::peer::{Act, Peer, Traps};
use crate::support::bounded::on_current_thread;

async fn open(peer: &Peer, options: VfioUserOptions) -> Result<Namespace, Error> {
    let path = peer.path().to_owned();
    let opened = tokio::task::spawn_blocking(move || VfioUserDevice::open(&path, &options));
    let opened = opened.await.expect("does not panic");
    let device = opened.map_err(|error| Error::Open {
        address: String::new(),
        reason: Box::new(error),
    })?;
    let options = OpenOptions::new().pool_limit(16 << 20);
    options.attach(Arc::new(device)).await?.namespace(1).await
}

async fn works(peer: &Peer) {
    let namespace = open(peer, VfioUserOptions::default()).await;
    let namespace = namespace.expect("opens");
    namespace.write(0, vec![7; 4096]).await.expect("writes");
    assert_eq!(namespace.read(0, 4096).await.expect("reads"), vec![7; 4096]);
    namespace.controller().shutdown().await.expect("shuts down");
}

/// Has the server do something at each message of an opening in turn, and opens it honestly after that.
async fn at_each_step(act: impl Fn(usize) -> Act + Clone + Send + 'static) {
    let peer = Peer::start(Traps::default());
    let messages = Arc::new(AtomicUsize::new(0));
    let counted = messages.clone();
    peer.hook(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
        None
    });
    let namespace = open(&peer, VfioUserOptions::default()).await;
    let namespace = namespace.expect("opens");
    let steps = messages.load(Ordering::Relaxed);
    assert!(steps > 20, "there are registers to set");
    namespace.controller().shutdown().await.expect("shuts down");
    drop(namespace);

    for step in 0..steps {
        let (act, messages) = (act.clone(), Arc::new(AtomicUsize::new(0)));
        let counted = messages.clone();
        peer.hook(move |_| {
            let message = counted.fetch_add(1, Ordering::Relaxed);
            (message == step).then(|| act(step))
        });
        match open(&peer, impatient()).await {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok(namespace) => {
                // CSTS is read more or less often.
                let messages = messages.load(Ordering::Relaxed);
                assert!(messages <= step, "step {step} does not matter");
                drop(namespace);
            }
        }
        peer.behave();
        works(&peer).await;
    }
}

/// With a header alone, as all errors are reported.
#[test]
fn refusals() {
    on_current_thread(async || at_each_step(|_| Act::Refuse(libc::EIO as u32)).await);
}

#[test]
fn refusals_without_a_reason() {
    on_current_thread(async || at_each_step(|_| Act::Refuse(0)).await);
}

#[test]
fn the_end_of_the_connection() {
    on_current_thread(async || at_each_step(|_| Act::Close).await);
}

#[test]
fn silence() {
    on_current_thread(async || at_each_step(|_| Act::Silence).await);
}

fn edit(edit: impl FnOnce(&mut Vec<u8>) + Send + 'static) -> Act {
    Act::Edit(Box::new(edit))
}

#[test]
fn answers_to_something_else() {
    on_current_thread(async || {
        at_each_step(|step| match step % 5 {
            // The identifier.
            0 => edit(|reply| reply[0] ^= 0x40),
            1 => edit(|reply| reply[1] ^= 0x80),
            // The command.
            2 => edit(|reply| reply[2] ^= 1),
            // No reply but a command.
            3 => edit(|reply| reply[8] &= !0xf),
            _ => edit(|reply| reply[8] |= 0x2),
        })
        .await;
    });
}

#[test]
fn sizes_that_are_wrong() {
    on_current_thread(async || {
        at_each_step(|step| match step % 4 {
            0 => edit(|reply| reply[4..8].copy_from_slice(&u32::MAX.to_ne_bytes())),
            1 => edit(|reply| reply[4..8].copy_from_slice(&15_u32.to_ne_bytes())),
            // A header that is none follows.
            2 => edit(|reply| reply.extend([0xff; 64])),
            // Less than there is to be, whatever it is, or more where there is to be nothing.
            _ => edit(|reply| {
                let len = if reply.len() > 16 { 17 } else { 20 };
                reply.resize(len, 0);
                reply[4..8].copy_from_slice(&(len as u32).to_ne_bytes());
            }),
        })
        .await;
    });
}
