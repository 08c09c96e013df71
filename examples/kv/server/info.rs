//! What the server says of itself.

use std::fmt::Display;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::commands::is_word;
use super::protocol::Reply;
use super::{Server, glob};

/// The version whose commands these are like.
pub(super) const REDIS_VERSION: &str = "7.0.15";

const SECTIONS: [&str; 7] = [
    "Server", "Clients", "Stats", "Store", "Device", "Engine", "Keyspace",
];

/// The sections that are asked for, all by default.
pub(super) fn text(server: &Server, wanted: &[Bytes]) -> String {
    let Server { store, limits, .. } = server;
    let uptime = server.started.elapsed().as_secs();
    let connected = limits.connections - server.places.available_permits();
    let received = server.connections.load(Ordering::Relaxed);
    let pending = limits.pending - server.memory.available_permits();
    let namespace = store.namespace();
    let controller = namespace.controller();
    let (identify, counters) = (controller.identify(), controller.counters());
    let submissions = counters.submission_doorbells;
    let completions = counters.completion_doorbells;
    let has_cache = u8::from(identify.has_volatile_write_cache());
    let memory = resident();
    let latencies = server.latencies.lock().expect("no one panics with it");
    let commands = latencies.reads.0.len() + latencies.others.0.len();
    let state = store.state();
    let keys = state.index.len();
    let (root, statistics) = (&state.root, &state.statistics);
    let limit = state.limit(state.checkpoint_need());
    let database = format!("keys={keys},expires=0,avg_ttl=0");
    let lines: &[(&str, &str, &dyn Display)] = &[
        ("Server", "redis_version", &REDIS_VERSION),
        ("Server", "nvme_async_example", &"kv"),
        ("Server", "process_id", &std::process::id()),
        ("Server", "uptime_in_seconds", &uptime),
        ("Server", "used_memory_rss", &memory),
        ("Clients", "connected_clients", &connected),
        ("Clients", "maxclients", &limits.connections),
        ("Clients", "pending_request_bytes", &pending),
        ("Clients", "max_pending_request_bytes", &limits.pending),
        ("Stats", "total_connections_received", &received),
        ("Stats", "total_commands_processed", &commands),
        ("Stats", "read_latency_us", &latencies.reads),
        ("Stats", "other_latency_us", &latencies.others),
        ("Store", "used_bytes", &state.used),
        ("Store", "used_bytes_limit", &limit),
        ("Store", "bytes_not_durable", &state.pending_bytes()),
        ("Store", "segments", &state.segments.len()),
        ("Store", "segment_bytes", &root.segment_size),
        ("Store", "segments_available", &state.available()),
        ("Store", "checkpoint_generation", &root.generation),
        ("Store", "log_bytes_written", &state.written),
        ("Store", "batches", &statistics.batches.0.len()),
        ("Store", "batch_records", &statistics.batches),
        ("Store", "batch_write_us", &statistics.writes),
        ("Store", "checkpoints", &statistics.checkpoints),
        ("Store", "segments_compacted", &statistics.compacted),
        ("Store", "compaction_bytes_moved", &statistics.moved_bytes),
        ("Store", "expired_keys", &statistics.expired),
        ("Device", "address", &controller.address()),
        ("Device", "model", &identify.model_number()),
        ("Device", "serial", &identify.serial_number()),
        ("Device", "state", &format!("{:?}", controller.state())),
        ("Device", "namespace", &namespace.nsid()),
        ("Device", "capacity", &namespace.capacity()),
        ("Device", "logical_block_bytes", &namespace.block_size()),
        ("Device", "volatile_write_cache", &has_cache),
        ("Device", "io_queue_pairs", &controller.io_queues().len()),
        ("Engine", "completions", &counters.completions),
        ("Engine", "polled_completions", &counters.polled_completions),
        ("Engine", "reaps", &counters.reaps),
        ("Engine", "submission_doorbells", &submissions),
        ("Engine", "completion_doorbells", &completions),
        ("Engine", "interrupts", &counters.interrupts),
        ("Engine", "sleeps", &counters.sleeps),
        ("Engine", "lost_interrupts", &counters.lost_interrupts),
        ("Engine", "retries", &counters.retries),
        ("Engine", "polling_us", &counters.polling.as_micros()),
        ("Engine", "bounced_bytes", &counters.bounced_bytes),
        ("Keyspace", "db0", &database),
    ];
    // Of an empty database nothing is said.
    let lines = &lines[..lines.len() - usize::from(keys == 0)];
    let is_wanted = |section: &&&str| {
        let mut names = ["all", "default", "everything", section].into_iter();
        wanted.is_empty() || names.any(|name| wanted.iter().any(|word| is_word(word, name)))
    };
    let sections = SECTIONS.iter().filter(is_wanted).map(|section| {
        let lines = lines.iter().filter(|(of, ..)| of == section);
        let lines = lines.map(|(_, name, value)| format!("{name}:{value}\r\n"));
        format!("# {section}\r\n{}", lines.collect::<String>())
    });
    sections.collect::<Vec<_>>().join("\r\n")
}

/// Bytes of memory that the process has; 0 if the kernel does not say.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut lines = status.lines();
    let text = lines.find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix("kB"));
    text.and_then(|text| text.trim().parse::<usize>().ok())
        .map_or(0, |kib| kib << 10)
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
    let is_wanted = |(name, _): &(&str, &str)| {
        let mut patterns = patterns.iter().map(|pattern| pattern.to_ascii_lowercase());
        patterns.any(|pattern| glob::matches(&pattern, name.as_bytes()))
    };
    let wanted = known.into_iter().filter(is_wanted);
    let pairs = wanted.map(|(name, value)| (name, Reply::bulk(value.to_owned())));
    Reply::Map(pairs.collect())
}
