//! Stores in this process, with threads as their clients.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use fastrand::Rng;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use redb::{ReadableDatabase, TableDefinition};

use crate::{Case, Contender, KEYS};

/// Threads that make requests of a store; returns requests in a second.
fn load(case: &Case, request: impl Fn(&str, &[u8]) + Sync) -> f64 {
    let left = AtomicU64::new(0);
    let start = Instant::now();
    thread::scope(|scope| {
        for seed in 0..case.clients {
            let (left, request) = (&left, &request);
            scope.spawn(move || {
                let mut random = Rng::with_seed(seed);
                let mut value = vec![0; case.bytes];
                random.fill(&mut value);
                while left.fetch_add(1, Ordering::Relaxed) < case.requests {
                    request(&key(random.u64(..KEYS)), &value);
                }
            });
        }
    });
    case.requests as f64 / start.elapsed().as_secs_f64()
}

fn key(number: u64) -> String {
    format!("key:{number:012}")
}

/// The same case with fewer requests, where each waits for a sync of its own. Nothing is pipelined.
fn suited(case: &Case) -> Option<Case> {
    let requests = match case.is_write {
        true => case.requests.min(4000),
        false => case.requests,
    };
    (case.pipeline == 1).then_some(Case { requests, ..*case })
}

pub(crate) struct Fjall {
    database: Database,
    keyspace: Keyspace,
    filled: usize,
}

impl Fjall {
    pub(crate) fn open(directory: &Path) -> Self {
        let database = Database::builder(directory).open().expect("opens");
        let keyspace = database.keyspace("kv", KeyspaceCreateOptions::default);
        Self {
            database,
            keyspace: keyspace.expect("opens"),
            filled: 0,
        }
    }
}

impl Contender for Fjall {
    fn measure(&mut self, case: &Case) -> Option<f64> {
        let case = suited(case)?;
        if case.is_write {
            return Some(load(&case, |key, value| {
                self.keyspace.insert(key, value).expect("writes");
                self.database.persist(PersistMode::SyncData).expect("syncs");
            }));
        }
        if self.filled != case.bytes {
            for number in 0..KEYS {
                let value = vec![number as u8; case.bytes];
                self.keyspace.insert(key(number), value).expect("writes");
            }
            self.filled = case.bytes;
        }
        Some(load(&case, |key, value| {
            let found = self.keyspace.get(key).expect("reads");
            assert_eq!(found.map(|found| found.len()), Some(value.len()));
        }))
    }
}

const TABLE: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("kv");

pub(crate) struct Redb {
    database: redb::Database,
    filled: usize,
}

impl Redb {
    pub(crate) fn open(directory: &Path) -> Self {
        let database = redb::Database::create(directory.join("redb"));
        Self {
            database: database.expect("opens"),
            filled: 0,
        }
    }

    /// One transaction, which is durable when it is committed.
    fn set<'a>(&self, pairs: impl IntoIterator<Item = (&'a str, &'a [u8])>) {
        let transaction = self.database.begin_write().expect("begins");
        {
            let mut table = transaction.open_table(TABLE).expect("opens");
            for (key, value) in pairs {
                table.insert(key, value).expect("writes");
            }
        }
        transaction.commit().expect("commits");
    }
}

impl Contender for Redb {
    fn measure(&mut self, case: &Case) -> Option<f64> {
        let case = suited(case)?;
        if case.is_write {
            return Some(load(&case, |key, value| self.set([(key, value)])));
        }
        if self.filled != case.bytes {
            let (keys, value) = ((0..KEYS).map(key), vec![1; case.bytes]);
            let keys: Vec<_> = keys.collect();
            self.set(keys.iter().map(|key| (key.as_str(), value.as_slice())));
            self.filled = case.bytes;
        }
        Some(load(&case, |key, value| {
            let transaction = self.database.begin_read().expect("begins");
            let table = transaction.open_table(TABLE).expect("is there");
            let found = table.get(key).expect("reads");
            assert_eq!(found.map(|found| found.value().len()), Some(value.len()));
        }))
    }
}
