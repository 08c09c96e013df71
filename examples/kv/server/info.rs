//! What the server says of itself.

use std::fmt::Write;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use hdrhistogram::Histogram;

use super::commands::is_word;
use super::protocol::{Reply, bulk};
use super::{Server, glob};

/// The version whose commands these are like.
pub(super) const REDIS_VERSION: &str = "7.0.15";

type Section = fn(&Server, &mut String) -> std::fmt::Result;

const SECTIONS: [(&str, Section); 7] = [
    ("Server", server),
    ("Clients", clients),
    ("Stats", stats),
    ("Store", store),
    ("Device", device),
    ("Engine", engine),
    ("Keyspace", keyspace),
];

/// The sections that are asked for, all by default.
pub(super) fn text(server: &Server, wanted: &[Bytes]) -> String {
    let is_all = |word: &Bytes| {
        ["all", "default", "everything"]
            .iter()
            .any(|all| is_word(word, all))
    };
    let mut text = String::new();
    for (name, section) in SECTIONS {
        let is_wanted = |word: &Bytes| is_all(word) || is_word(word, name);
        if wanted.is_empty() || wanted.iter().any(is_wanted) {
            let separator = if text.is_empty() { "" } else { "\r\n" };
            let written = write!(text, "{separator}# {name}\r\n");
            written
                .and_then(|()| section(server, &mut text))
                .expect("a string takes everything");
        }
    }
    text
}

/// `CONFIG GET`: what `redis-benchmark` and some clients ask for.
pub(super) fn config(server: &Server, patterns: &[Bytes]) -> Reply {
    let connections = server.limits.connections.to_string();
    let known = [
        ("appendfsync", "always"),
        ("appendonly", "yes"),
        ("databases", "1"),
        ("maxclients", &connections),
        ("save", ""),
    ];
    let is_wanted = |name: &str| {
        let name = name.as_bytes();
        patterns
            .iter()
            .any(|pattern| glob::matches(&pattern.to_ascii_lowercase(), name))
    };
    let wanted = known.into_iter().filter(|(name, _)| is_wanted(name));
    Reply::Map {
        data: wanted
            .map(|(name, value)| (bulk(name.to_owned()), bulk(value.to_owned())))
            .collect(),
        attributes: None,
    }
}

fn server(server: &Server, out: &mut String) -> std::fmt::Result {
    write!(out, "redis_version:{REDIS_VERSION}\r\n")?;
    write!(out, "nvme_async_example:kv\r\n")?;
    write!(out, "process_id:{}\r\n", std::process::id())?;
    write!(
        out,
        "uptime_in_seconds:{}\r\n",
        server.started.elapsed().as_secs()
    )?;
    write!(out, "used_memory_rss:{}\r\n", resident())
}

/// Bytes of memory that the process has; 0 if the kernel does not say.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut lines = status.lines();
    let text = lines.find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix("kB"));
    text.and_then(|text| text.trim().parse::<usize>().ok())
        .map_or(0, |kib| kib << 10)
}

fn clients(server: &Server, out: &mut String) -> std::fmt::Result {
    let connected = server.limits.connections - server.places.available_permits();
    write!(out, "connected_clients:{connected}\r\n")?;
    write!(out, "maxclients:{}\r\n", server.limits.connections)?;
    let pending = server.limits.pending - server.memory.available_permits();
    write!(out, "pending_request_bytes:{pending}\r\n")?;
    write!(
        out,
        "max_pending_request_bytes:{}\r\n",
        server.limits.pending
    )
}

fn stats(server: &Server, out: &mut String) -> std::fmt::Result {
    let connections = server.connections.load(Ordering::Relaxed);
    write!(out, "total_connections_received:{connections}\r\n")?;
    let latencies = server.latencies();
    write!(
        out,
        "total_commands_processed:{}\r\n",
        latencies.reads.len() + latencies.others.len()
    )?;
    histogram(out, "read_latency_us", &latencies.reads)?;
    histogram(out, "other_latency_us", &latencies.others)
}

fn store(server: &Server, out: &mut String) -> std::fmt::Result {
    let usage = server.store.usage();
    write!(out, "used_bytes:{}\r\n", usage.used)?;
    write!(out, "used_bytes_limit:{}\r\n", usage.limit)?;
    write!(out, "bytes_not_durable:{}\r\n", usage.pending)?;
    write!(out, "segments:{}\r\n", usage.segments)?;
    write!(out, "segment_bytes:{}\r\n", usage.segment_size)?;
    write!(out, "segments_available:{}\r\n", usage.available)?;
    write!(out, "checkpoint_generation:{}\r\n", usage.generation)?;
    write!(out, "log_bytes_written:{}\r\n", usage.written)?;
    let statistics = server.store.statistics();
    write!(out, "batches:{}\r\n", statistics.batches.len())?;
    histogram(out, "batch_records", &statistics.batches)?;
    histogram(out, "batch_write_us", &statistics.writes)?;
    write!(out, "checkpoints:{}\r\n", statistics.checkpoints)?;
    write!(out, "segments_compacted:{}\r\n", statistics.compacted)?;
    write!(out, "compaction_bytes_moved:{}\r\n", statistics.moved_bytes)?;
    write!(out, "expired_keys:{}\r\n", statistics.expired)
}

fn histogram(out: &mut String, name: &str, values: &Histogram<u64>) -> std::fmt::Result {
    let percentile = |percent| values.value_at_percentile(percent);
    write!(
        out,
        "{name}:mean={:.1},p50={},p99={},p99.9={},max={}\r\n",
        values.mean(),
        percentile(50.0),
        percentile(99.0),
        percentile(99.9),
        values.max(),
    )
}

fn device(server: &Server, out: &mut String) -> std::fmt::Result {
    let namespace = server.store.namespace();
    let controller = namespace.controller();
    write!(out, "address:{}\r\n", controller.address())?;
    write!(out, "model:{}\r\n", controller.identify().model_number())?;
    write!(out, "serial:{}\r\n", controller.identify().serial_number())?;
    write!(out, "state:{:?}\r\n", controller.state())?;
    write!(out, "namespace:{}\r\n", namespace.nsid())?;
    write!(out, "capacity:{}\r\n", namespace.capacity())?;
    write!(out, "logical_block_bytes:{}\r\n", namespace.block_size())?;
    let has_cache = controller.identify().has_volatile_write_cache();
    write!(out, "volatile_write_cache:{}\r\n", u8::from(has_cache))?;
    write!(out, "io_queue_pairs:{}\r\n", controller.io_queues().len())
}

fn engine(server: &Server, out: &mut String) -> std::fmt::Result {
    let counters = server.store.namespace().controller().counters();
    write!(out, "completions:{}\r\n", counters.completions)?;
    write!(
        out,
        "polled_completions:{}\r\n",
        counters.polled_completions
    )?;
    write!(out, "reaps:{}\r\n", counters.reaps)?;
    write!(
        out,
        "submission_doorbells:{}\r\n",
        counters.submission_doorbells
    )?;
    write!(
        out,
        "completion_doorbells:{}\r\n",
        counters.completion_doorbells
    )?;
    write!(out, "interrupts:{}\r\n", counters.interrupts)?;
    write!(out, "sleeps:{}\r\n", counters.sleeps)?;
    write!(out, "lost_interrupts:{}\r\n", counters.lost_interrupts)?;
    write!(out, "retries:{}\r\n", counters.retries)?;
    write!(out, "polling_us:{}\r\n", counters.polling.as_micros())?;
    write!(out, "bounced_bytes:{}\r\n", counters.bounced_bytes)
}

fn keyspace(server: &Server, out: &mut String) -> std::fmt::Result {
    match server.store.usage().keys {
        0 => Ok(()),
        keys => write!(out, "db0:keys={keys},expires=0,avg_ttl=0\r\n"),
    }
}
