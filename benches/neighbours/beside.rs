//! A TCP echo and a timer.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::{MissedTickBehavior, interval};

use crate::load::histogram;

/// The bytes of a message.
const MESSAGE: usize = 64;
/// How long the client pauses between two messages.
const PAUSE: Duration = Duration::from_micros(300);
const TICK: Duration = Duration::from_millis(1);

/// What was measured, in nanoseconds.
pub(crate) struct Neighbours {
    /// From when a message is sent to when it is back.
    pub(crate) echo: Histogram<u64>,
    /// How late ticks of the timer were.
    pub(crate) timer: Histogram<u64>,
}

/// Runs both for some time, in tasks of the current runtime; only the echo's client is a thread.
pub(crate) async fn beside(time: Duration) -> Neighbours {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
    let listener = listener.expect("there is a port");
    let address = listener.local_addr().expect("it is bound");
    let over = Arc::new(AtomicBool::new(false));
    let server = tokio::spawn(serve(listener));
    let ticks = tokio::spawn(tick(over.clone()));
    let client = thread::spawn({
        let over = over.clone();
        move || call(address, &over)
    });
    tokio::time::sleep(time).await;
    over.store(true, Ordering::Relaxed);
    // It ends when the client has, which it must answer until then.
    server.await.expect("the server does not panic");
    Neighbours {
        echo: client.join().expect("the client does not panic"),
        timer: ticks.await.expect("the timer does not panic"),
    }
}

/// Answers one client until it closes the connection.
async fn serve(listener: TcpListener) {
    let (mut stream, _) = listener.accept().await.expect("a client connects");
    stream.set_nodelay(true).expect("it is a TCP socket");
    let mut message = [0; MESSAGE];
    while stream.read_exact(&mut message).await.is_ok() {
        let sent = stream.write_all(&message).await;
        sent.expect("the client waits for it");
    }
}

fn call(address: SocketAddr, over: &AtomicBool) -> Histogram<u64> {
    let mut stream = TcpStream::connect(address).expect("the server listens");
    stream.set_nodelay(true).expect("it is a TCP socket");
    let mut times = histogram();
    let mut message = [7; MESSAGE];
    loop {
        thread::sleep(PAUSE);
        let began = Instant::now();
        stream.write_all(&message).expect("the server is there");
        stream.read_exact(&mut message).expect("the server answers");
        // A histogram that resizes itself has room for every number.
        let _ = times.record(began.elapsed().as_nanos() as u64);
        if over.load(Ordering::Relaxed) {
            return times;
        }
    }
}

async fn tick(over: Arc<AtomicBool>) -> Histogram<u64> {
    let mut ticks = interval(TICK);
    // A tick that is late changes no later one.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut late = Vec::new();
    // The first one is at once.
    ticks.tick().await;
    while !over.load(Ordering::Relaxed) {
        let due = ticks.tick().await;
        late.push(Instant::now().saturating_duration_since(due.into()));
    }
    let earliest = late.iter().min().copied().unwrap_or_default();
    let mut times = histogram();
    for late in late {
        // As above.
        let _ = times.record((late - earliest).as_nanos() as u64);
    }
    times
}
