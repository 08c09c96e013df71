//! The commands.

use bytes::Bytes;
use redis_protocol::resp3::types::Resp3Frame;

use super::protocol::{
    MAX_REQUEST, Reply, array, bulk, bulk_or_null, error, map, number_reply, simple,
};
use super::{Server, Session, glob, info};
use crate::store::{Change, Commit, Error, Facts, Found, MAX_KEY, View, now};

/// What becomes a reply once all that it depends on is durable.
pub(super) enum Answer {
    Now(Reply),
    After(Commit, Reply),
    Value(Found),
    Values(Vec<Found>),
}

impl Answer {
    pub(super) async fn reply(self) -> Reply {
        let reply = match self {
            Self::Now(reply) => Ok(reply),
            Self::After(commit, reply) => commit.durable().await.map(|()| reply),
            Self::Value(found) => found.value().await.map(bulk_or_null),
            Self::Values(all) => values(all).await,
        };
        reply.unwrap_or_else(|failure| Failure::from(failure).0)
    }

    /// Whether values are to be read, whose places in the store are held until then.
    pub(super) fn is_read(&self) -> bool {
        matches!(self, Self::Value(_) | Self::Values(_))
    }

    /// Bytes that it holds, or will.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Value(found) => found.size(),
            Self::Values(all) => all.iter().map(Found::size).sum(),
            Self::Now(reply) | Self::After(_, reply) => reply.encode_len(false),
        }
    }
}

async fn values(all: Vec<Found>) -> Result<Reply, Error> {
    let mut replies = Vec::with_capacity(all.len());
    for found in all {
        replies.push(bulk_or_null(found.value().await?));
    }
    Ok(array(replies))
}

/// An error as a reply.
pub(super) struct Failure(Reply);

impl From<Error> for Failure {
    fn from(failure: Error) -> Self {
        Self(match failure {
            Error::Full { .. } => error(format!("OOM {failure}")),
            _ => error(failure.to_string()),
        })
    }
}

impl From<&str> for Failure {
    fn from(text: &str) -> Self {
        Self(error(text))
    }
}

type Outcome = Result<Answer, Failure>;

const SYNTAX: &str = "syntax error";
const NOT_AN_INTEGER: &str = "value is not an integer or out of range";

/// Name, number of words (if negative, at least that many), first and last key, and distance of keys.
const COMMANDS: [(&str, i64, [i64; 3]); 26] = [
    ("append", 3, [1, 1, 1]),
    ("client", -2, [0, 0, 0]),
    ("command", -1, [0, 0, 0]),
    ("config", -2, [0, 0, 0]),
    ("dbsize", 1, [0, 0, 0]),
    ("del", -2, [1, -1, 1]),
    ("echo", 2, [0, 0, 0]),
    ("exists", -2, [1, -1, 1]),
    ("expire", 3, [1, 1, 1]),
    ("flushall", -1, [0, 0, 0]),
    ("get", 2, [1, 1, 1]),
    ("getdel", 2, [1, 1, 1]),
    ("hello", -1, [0, 0, 0]),
    ("incr", 2, [1, 1, 1]),
    ("incrby", 3, [1, 1, 1]),
    ("info", -1, [0, 0, 0]),
    ("mget", -2, [1, -1, 1]),
    ("mset", -3, [1, -1, 2]),
    ("persist", 2, [1, 1, 1]),
    ("ping", -1, [0, 0, 0]),
    ("quit", -1, [0, 0, 0]),
    ("scan", -2, [0, 0, 0]),
    ("select", 2, [0, 0, 0]),
    ("set", -3, [1, 1, 1]),
    ("strlen", 2, [1, 1, 1]),
    ("ttl", 2, [1, 1, 1]),
];

/// Begins a request. What it changes has its place in the order of all changes when this resolves.
pub(super) async fn execute(server: &Server, session: &mut Session, request: &[Bytes]) -> Answer {
    match dispatch(server, session, request).await {
        Ok(answer) => answer,
        Err(Failure(reply)) => Answer::Now(reply),
    }
}

async fn dispatch(server: &Server, session: &mut Session, request: &[Bytes]) -> Outcome {
    let (name, arguments) = request.split_first().ok_or("empty request")?;
    let known = COMMANDS.iter().find(|(known, ..)| is_word(name, known));
    let Some((name, words, [first, last, distance])) = known else {
        return unknown(&request[0], arguments);
    };
    let count = request.len() as i64;
    if count != *words && (*words > 0 || count < -words) {
        let text = format!("wrong number of arguments for '{name}' command");
        return Err(Failure(error(text)));
    }
    if *first > 0 {
        let end = if *last < 0 { request.len() } else { 2 };
        let mut keys = request[1..end].iter().step_by(*distance as usize);
        if keys.any(|key| key.len() > MAX_KEY) {
            return Err(Failure(error(format!("key has more than {MAX_KEY} bytes"))));
        }
    }
    let store = &server.store;
    match (*name, arguments) {
        ("ping", []) => now_reply(simple("PONG")),
        ("ping", [message]) | ("echo", [message]) => now_reply(bulk(message.clone())),
        ("ping", _) => Err("wrong number of arguments for 'ping' command".into()),
        ("quit", _) => {
            session.quits = true;
            now_reply(simple("OK"))
        }
        ("select", [database]) => match integer(database)? {
            0 => now_reply(simple("OK")),
            _ => Err("DB index is out of range".into()),
        },
        ("hello", _) => hello(session, arguments),
        ("client", [what, ..]) => match text(what).to_ascii_lowercase().as_str() {
            "setinfo" if arguments.len() == 3 => now_reply(simple("OK")),
            _ => Err(unknown_subcommand(what, "CLIENT")),
        },
        ("config", [what, patterns @ ..]) => match text(what).to_ascii_lowercase().as_str() {
            "get" if !patterns.is_empty() => now_reply(info::config(server, patterns)),
            _ => Err(unknown_subcommand(what, "CONFIG")),
        },
        ("command", _) => command(arguments),
        ("info", _) => now_reply(bulk(info::text(server, arguments))),
        ("dbsize", _) => look(server, |view| view.count() as i64),

        ("get", [key]) => Ok(Answer::Value(store.get(key)?)),
        ("mget", keys) => {
            let found = keys.iter().map(|key| store.get(key));
            let answer = Answer::Values(found.collect::<Result<_, _>>()?);
            match answer.size() > MAX_REQUEST {
                true => {
                    let text = format!("the reply would have more than {MAX_REQUEST} bytes");
                    Err(Failure(error(text)))
                }
                false => Ok(answer),
            }
        }
        ("exists", keys) => look(server, |view| {
            keys.iter().filter(|key| view.get(key).is_some()).count() as i64
        }),
        ("strlen", [key]) => look(server, |view| {
            view.get(key).map_or(0, |facts| facts.len as i64)
        }),
        ("ttl", [key]) => look(server, |view| match view.get(key) {
            None => -2,
            Some(Facts { expires: 0, .. }) => -1,
            Some(Facts { expires, .. }) => (expires.saturating_sub(now()) as i64 + 500) / 1000,
        }),
        ("scan", [cursor, options @ ..]) => scan(server, cursor, options),

        ("set", [key, value, options @ ..]) => set(server, key, value, options).await,
        ("mset", pairs) if pairs.len() % 2 == 0 => {
            let changes = pairs.chunks_exact(2).map(|pair| Change::Set {
                key: pair[0].clone(),
                value: pair[1].clone(),
                expires: 0,
            });
            let changes: Vec<_> = changes.collect();
            change(server, |_| (changes.clone(), simple("OK"))).await
        }
        ("mset", _) => Err("wrong number of arguments for 'mset' command".into()),
        ("del", keys) => delete(server, keys).await,
        ("getdel", [key]) => {
            modify(server, key, |found| match found {
                None => (Vec::new(), Ok(Reply::Null)),
                Some((_, value)) => {
                    let key = key.clone();
                    (vec![Change::Delete { key }], Ok(bulk(value)))
                }
            })
            .await
        }
        ("incr", [key]) => increment(server, key, 1).await,
        ("incrby", [key, by]) => increment(server, key, integer(by)?).await,
        ("append", [key, more]) => append(server, key, more).await,
        ("expire", [key, seconds]) => {
            let expires = deadline(integer(seconds)?, 1000, "expire")?;
            expire(server, key, expires.max(1)).await
        }
        ("persist", [key]) => expire(server, key, 0).await,
        ("flushall", [] | [_]) => {
            let is_mode = |word: &Bytes| is_word(word, "sync") || is_word(word, "async");
            if !arguments.iter().all(is_mode) {
                return Err(SYNTAX.into());
            }
            change(server, |_| (vec![Change::Clear], simple("OK"))).await
        }
        _ => Err(SYNTAX.into()),
    }
}

fn now_reply(reply: Reply) -> Outcome {
    Ok(Answer::Now(reply))
}

fn look(server: &Server, look: impl FnOnce(&View<'_>) -> i64) -> Outcome {
    let (number, commit) = server.store.look(look)?;
    Ok(Answer::After(commit, number_reply(number)))
}

async fn change(server: &Server, decide: impl FnMut(&View<'_>) -> (Vec<Change>, Reply)) -> Outcome {
    let (reply, commit) = server.store.change(decide).await?;
    Ok(Answer::After(commit, reply))
}

async fn modify(
    server: &Server,
    key: &[u8],
    decide: impl FnMut(Option<(Facts, Bytes)>) -> (Vec<Change>, Result<Reply, &'static str>),
) -> Outcome {
    let (reply, commit) = server.store.modify(key, decide).await?;
    Ok(Answer::After(commit, reply.unwrap_or_else(error)))
}

#[derive(Clone, Copy, PartialEq)]
enum Condition {
    Always,
    Absent,
    Present,
}

async fn set(server: &Server, key: &Bytes, value: &Bytes, options: &[Bytes]) -> Outcome {
    let (mut condition, mut expires, mut wants_old) = (Condition::Always, 0, false);
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let option = text(option).to_ascii_lowercase();
        match option.as_str() {
            "nx" if condition != Condition::Present => condition = Condition::Absent,
            "xx" if condition != Condition::Absent => condition = Condition::Present,
            "get" => wants_old = true,
            "ex" | "px" if expires == 0 => {
                let time = integer(options.next().ok_or(SYNTAX)?)?;
                if time <= 0 {
                    return Err("invalid expire time in 'set' command".into());
                }
                let unit = if option == "ex" { 1000 } else { 1 };
                expires = deadline(time, unit, "set")?;
            }
            _ => return Err(SYNTAX.into()),
        }
    }
    let changes = |is_present: bool| {
        let is_met = match condition {
            Condition::Always => true,
            Condition::Absent => !is_present,
            Condition::Present => is_present,
        };
        let change = is_met.then(|| Change::Set {
            key: key.clone(),
            value: value.clone(),
            expires,
        });
        change.into_iter().collect::<Vec<_>>()
    };
    if wants_old {
        return modify(server, key, |found| {
            let changes = changes(found.is_some());
            (changes, Ok(bulk_or_null(found.map(|(_, value)| value))))
        })
        .await;
    }
    change(server, |view| {
        let changes = changes(view.get(key).is_some());
        let is_set = !changes.is_empty();
        (changes, if is_set { simple("OK") } else { Reply::Null })
    })
    .await
}

async fn delete(server: &Server, keys: &[Bytes]) -> Outcome {
    let mut keys = keys.to_vec();
    keys.sort_unstable();
    keys.dedup();
    change(server, |view| {
        let present = keys.iter().filter(|key| view.get(key).is_some());
        let changes: Vec<_> = present
            .map(|key| Change::Delete { key: key.clone() })
            .collect();
        let count = changes.len() as i64;
        (changes, number_reply(count))
    })
    .await
}

async fn increment(server: &Server, key: &Bytes, by: i64) -> Outcome {
    modify(server, key, |found| {
        let (expires, old) = match found {
            None => (0, Ok(0)),
            Some((facts, value)) => (facts.expires, parse(&value).ok_or(NOT_AN_INTEGER)),
        };
        let overflow = "increment or decrement would overflow";
        match old.and_then(|old| old.checked_add(by).ok_or(overflow)) {
            Err(failure) => (Vec::new(), Err(failure)),
            Ok(new) => {
                let change = Change::Set {
                    key: key.clone(),
                    value: new.to_string().into(),
                    expires,
                };
                (vec![change], Ok(number_reply(new)))
            }
        }
    })
    .await
}

async fn append(server: &Server, key: &Bytes, more: &Bytes) -> Outcome {
    modify(server, key, |found| {
        let (expires, old) = found.map_or((0, Bytes::new()), |(facts, old)| (facts.expires, old));
        if old.len() + more.len() > crate::store::MAX_VALUE {
            return (
                Vec::new(),
                Err("string exceeds maximum allowed size (16777216 bytes)"),
            );
        }
        let value = Bytes::from([old, more.clone()].concat());
        let len = value.len() as i64;
        let change = Change::Set {
            key: key.clone(),
            value,
            expires,
        };
        (vec![change], Ok(number_reply(len)))
    })
    .await
}

async fn expire(server: &Server, key: &Bytes, expires: u64) -> Outcome {
    change(server, |view| {
        let key = key.clone();
        let change = match view.get(&key) {
            Some(_) if expires != 0 && expires <= now() => Change::Delete { key },
            Some(facts) if expires != 0 || facts.expires != 0 => Change::Expire { key, expires },
            _ => return (Vec::new(), number_reply(0)),
        };
        (vec![change], number_reply(1))
    })
    .await
}

fn scan(server: &Server, cursor: &Bytes, options: &[Bytes]) -> Outcome {
    let cursor = parse(cursor).and_then(|cursor| usize::try_from(cursor).ok());
    let cursor = cursor.ok_or("invalid cursor")?;
    let (mut count, mut pattern) = (10, None);
    for option in options.chunks(2) {
        match option {
            [name, value] if is_word(name, "count") => match integer(value)? {
                least @ 1.. => count = least as usize,
                _ => return Err(SYNTAX.into()),
            },
            [name, value] if is_word(name, "match") => pattern = Some(value),
            _ => return Err(SYNTAX.into()),
        }
    }
    let ((next, keys), commit) = server.store.look(|view| view.scan(cursor, count))?;
    let wanted = |key: &Bytes| pattern.is_none_or(|pattern| glob::matches(pattern, key));
    let keys = keys.into_iter().filter(wanted).map(bulk).collect();
    let reply = array(vec![bulk(next.to_string()), array(keys)]);
    Ok(Answer::After(commit, reply))
}

fn hello(session: &mut Session, arguments: &[Bytes]) -> Outcome {
    if let Some((version, rest)) = arguments.split_first() {
        let version = match parse(version) {
            Some(2) => 2,
            Some(3) => 3,
            Some(_) => return Err("NOPROTO unsupported protocol version".into()),
            None => {
                let text = "Protocol version is not an integer or out of range";
                return Err(text.into());
            }
        };
        // A name is taken and forgotten; there are no passwords.
        match rest {
            [] => {}
            [name, _] if is_word(name, "setname") => {}
            [option, ..] => {
                let option = text(option);
                let text = format!("Syntax error in HELLO option '{option}'");
                return Err(Failure(error(text)));
            }
        }
        session.version = version;
    }
    now_reply(map([
        ("server", bulk("redis")),
        ("version", bulk(info::REDIS_VERSION)),
        ("proto", number_reply(session.version.into())),
        ("id", number_reply(session.id as i64)),
        ("mode", bulk("standalone")),
        ("role", bulk("master")),
        ("modules", array(Vec::new())),
    ]))
}

fn command(arguments: &[Bytes]) -> Outcome {
    let Some((what, names)) = arguments.split_first() else {
        let commands = COMMANDS
            .iter()
            .map(|(name, words, [first, last, distance])| {
                let keys = [first, last, distance].map(|number| number_reply(*number));
                let mut command = vec![bulk(*name), number_reply(*words), array(Vec::new())];
                command.extend(keys);
                array(command)
            });
        return now_reply(array(commands.collect()));
    };
    match text(what).to_ascii_lowercase().as_str() {
        "count" if names.is_empty() => now_reply(number_reply(COMMANDS.len() as i64)),
        // It is for people's eyes, and clients get on without.
        "docs" => now_reply(map([])),
        _ => Err(unknown_subcommand(what, "COMMAND")),
    }
}

fn unknown(name: &Bytes, arguments: &[Bytes]) -> Outcome {
    let mut list = String::new();
    for argument in arguments {
        if list.len() >= 128 {
            break;
        }
        let argument: String = text(argument).chars().take(128).collect();
        list += &format!("'{argument}' ");
    }
    let name: String = text(name).chars().take(128).collect();
    let text = format!("unknown command '{name}', with args beginning with: {list}");
    Err(Failure(error(text)))
}

fn unknown_subcommand(name: &Bytes, of: &str) -> Failure {
    let name: String = text(name).chars().take(128).collect();
    Failure(error(format!(
        "unknown subcommand '{name}'. Try {of} HELP."
    )))
}

/// The moment that is so many units after now, or Redis's complaint.
fn deadline(time: i64, unit: i64, command: &str) -> Result<u64, Failure> {
    let later = time
        .checked_mul(unit)
        .and_then(|time| time.checked_add(now() as i64));
    match later {
        Some(later) => Ok(later.max(0) as u64),
        None => {
            let text = format!("invalid expire time in '{command}' command");
            Err(Failure(error(text)))
        }
    }
}

fn text(bytes: &Bytes) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

pub(super) fn is_word(bytes: &[u8], word: &str) -> bool {
    bytes.eq_ignore_ascii_case(word.as_bytes())
}

/// A number as Redis writes it: no plus, no zeroes or spaces before it.
fn parse(bytes: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(bytes).ok()?;
    let number: i64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

fn integer(bytes: &Bytes) -> Result<i64, Failure> {
    parse(bytes).ok_or_else(|| NOT_AN_INTEGER.into())
}
