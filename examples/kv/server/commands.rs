//! The commands.

use std::borrow::Cow;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::protocol::{MAX_REQUEST, OK, Reply};
use super::{Server, Session, glob, info};
use crate::store::{Change, Commit, Error, Facts, Found, MAX_KEY, MAX_VALUE, Store, View, now};

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
            Self::Value(found) => found.value().await.map(Reply::from),
            Self::Values(all) => {
                let values = stream::iter(all).then(Found::value).map_ok(Reply::from);
                values.try_collect().await.map(Reply::Array)
            }
        };
        reply.unwrap_or_else(|failure| Reply::Error(failure.into()))
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
            Self::Now(reply) | Self::After(_, reply) => reply.size(),
        }
    }
}

/// What a request is answered with, or the text of an error.
type Outcome = Result<Answer, String>;

impl From<Error> for String {
    fn from(failure: Error) -> Self {
        match failure {
            Error::Full { .. } => format!("OOM {failure}"),
            _ => failure.to_string(),
        }
    }
}

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
    let outcome = dispatch(server, session, request).await;
    outcome.unwrap_or_else(|text| Answer::Now(Reply::Error(text)))
}

async fn dispatch(server: &Server, session: &mut Session, request: &[Bytes]) -> Outcome {
    let (name, arguments) = request.split_first().ok_or("empty request")?;
    let known = COMMANDS.iter().find(|(known, ..)| is_word(name, known));
    let (name, words, [first, last, distance]) = *known.ok_or_else(|| unknown(request))?;
    let wrong_number = || Err(format!("wrong number of arguments for '{name}' command"));
    let count = request.len() as i64;
    if count != words && (words > 0 || count < -words) {
        return wrong_number();
    }
    if first > 0 {
        let end = if last < 0 { request.len() } else { 2 };
        let mut keys = request[1..end].iter().step_by(distance as usize);
        if keys.any(|key| key.len() > MAX_KEY) {
            return Err(format!("key has more than {MAX_KEY} bytes"));
        }
    }
    let store = &server.store;
    match (name, arguments) {
        ("ping", []) => now_reply(Reply::Simple("PONG")),
        ("ping", [message]) | ("echo", [message]) => now_reply(Reply::Bulk(message.clone())),
        ("ping", _) => wrong_number(),
        ("quit", _) => {
            session.quits = true;
            now_reply(OK)
        }
        ("select", [database]) => match integer(database)? {
            0 => now_reply(OK),
            _ => Err("DB index is out of range".to_owned()),
        },
        ("hello", _) => hello(session, arguments),
        ("client", [what, _, _]) if is_word(what, "setinfo") => now_reply(OK),
        ("config", [what, patterns @ ..]) if is_word(what, "get") && !patterns.is_empty() => {
            now_reply(info::config(server, patterns))
        }
        ("command", []) => now_reply(Reply::Array(COMMANDS.iter().map(described).collect())),
        ("command", [what]) if is_word(what, "count") => {
            now_reply(Reply::Number(COMMANDS.len() as i64))
        }
        // It is for people's eyes, and clients get on without.
        ("command", [what, ..]) if is_word(what, "docs") => now_reply(Reply::Map(Vec::new())),
        ("client" | "config" | "command", [what, ..]) => {
            let (what, of) = (brief(what), name.to_ascii_uppercase());
            Err(format!("unknown subcommand '{what}'. Try {of} HELP."))
        }
        ("info", _) => now_reply(Reply::bulk(info::text(server, arguments))),
        ("dbsize", _) => look(store, |view| view.count()),

        ("get", [key]) => Ok(Answer::Value(store.get(key)?)),
        ("mget", keys) => {
            let found = keys.iter().map(|key| store.get(key));
            let answer = Answer::Values(found.collect::<Result<_, _>>()?);
            if answer.size() > MAX_REQUEST {
                return Err(format!(
                    "the reply would have more than {MAX_REQUEST} bytes"
                ));
            }
            Ok(answer)
        }
        ("exists", keys) => look(store, |view| {
            keys.iter().filter(|key| view.get(key).is_some()).count()
        }),
        ("strlen", [key]) => look(store, |view| view.get(key).map_or(0, |facts| facts.len)),
        ("ttl", [key]) => {
            let (facts, commit) = store.look(|view| view.get(key))?;
            let seconds = match facts.map(|facts| facts.expires) {
                None => -2,
                Some(0) => -1,
                Some(expires) => (expires.saturating_sub(now()) as i64 + 500) / 1000,
            };
            Ok(Answer::After(commit, Reply::Number(seconds)))
        }
        ("scan", [cursor, options @ ..]) => scan(store, cursor, options),

        ("set", [key, value, options @ ..]) => set(store, key, value, options).await,
        ("mset", pairs) if pairs.len() % 2 == 0 => {
            let changes = pairs.chunks(2).map(|pair| put(&pair[0], &pair[1], 0));
            let changes: Vec<_> = changes.collect();
            change(store, |_| (changes.clone(), OK)).await
        }
        ("mset", _) => wrong_number(),
        ("del", keys) => {
            let mut keys = keys.to_vec();
            keys.sort_unstable();
            keys.dedup();
            change(store, |view| {
                let present = keys.iter().filter(|key| view.get(key).is_some());
                let changes: Vec<_> = present.map(delete).collect();
                let count = changes.len() as i64;
                (changes, Reply::Number(count))
            })
            .await
        }
        ("getdel", [key]) => {
            modify(store, key, |old, _| {
                Ok((old.is_some().then(|| delete(key)), old.into()))
            })
            .await
        }
        ("incr", [key]) => increment(store, key, 1).await,
        ("incrby", [key, by]) => increment(store, key, integer(by)?).await,
        ("append", [key, more]) => {
            modify(store, key, |old, expires| {
                let old = old.unwrap_or_default();
                let len = old.len() + more.len();
                if len > MAX_VALUE {
                    return Err("string exceeds maximum allowed size (16777216 bytes)");
                }
                let value = Bytes::from([old, more.clone()].concat());
                Ok((Some(put(key, &value, expires)), Reply::Number(len as i64)))
            })
            .await
        }
        ("expire", [key, seconds]) => {
            let expires = deadline(integer(seconds)?, 1000, name)?;
            expire(store, key, expires.max(1)).await
        }
        ("persist", [key]) => expire(store, key, 0).await,
        ("flushall", [] | [_]) => {
            let is_mode = |word: &Bytes| is_word(word, "sync") || is_word(word, "async");
            if !arguments.iter().all(is_mode) {
                return Err(SYNTAX.to_owned());
            }
            change(store, |_| (vec![Change::Clear], OK)).await
        }
        _ => Err(SYNTAX.to_owned()),
    }
}

fn now_reply(reply: Reply) -> Outcome {
    Ok(Answer::Now(reply))
}

fn look(store: &Store, count: impl FnOnce(&View<'_>) -> usize) -> Outcome {
    let (count, commit) = store.look(count)?;
    Ok(Answer::After(commit, Reply::Number(count as i64)))
}

async fn change(store: &Store, decide: impl FnMut(&View<'_>) -> (Vec<Change>, Reply)) -> Outcome {
    let (reply, commit) = store.change(decide).await?;
    Ok(Answer::After(commit, reply))
}

/// Decides by a key's value and when that expires. An error changes nothing.
async fn modify(
    store: &Store,
    key: &[u8],
    mut decide: impl FnMut(Option<Bytes>, u64) -> Result<(Option<Change>, Reply), &'static str>,
) -> Outcome {
    let decide = |found: Option<(Facts, Bytes)>| {
        let (facts, old) = found.unzip();
        let decision = decide(old, facts.map_or(0, |facts| facts.expires));
        let (change, reply) = decision.unwrap_or_else(|text| (None, Reply::Error(text.to_owned())));
        (Vec::from_iter(change), reply)
    };
    let (reply, commit) = store.modify(key, decide).await?;
    Ok(Answer::After(commit, reply))
}

fn put(key: &Bytes, value: &Bytes, expires: u64) -> Change {
    Change::Set {
        key: key.clone(),
        value: value.clone(),
        expires,
    }
}

fn delete(key: &Bytes) -> Change {
    Change::Delete { key: key.clone() }
}

async fn set(store: &Store, key: &Bytes, value: &Bytes, options: &[Bytes]) -> Outcome {
    let (mut is_to_be_present, mut expires, mut wants_old) = (None, 0, false);
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let option = text(option).to_ascii_lowercase();
        match &*option {
            "nx" if is_to_be_present != Some(true) => is_to_be_present = Some(false),
            "xx" if is_to_be_present != Some(false) => is_to_be_present = Some(true),
            "get" => wants_old = true,
            "ex" | "px" if expires == 0 => {
                let time = integer(options.next().ok_or(SYNTAX)?)?;
                if time <= 0 {
                    return Err(invalid_time("set"));
                }
                let unit = if option == "ex" { 1000 } else { 1 };
                expires = deadline(time, unit, "set")?;
            }
            _ => return Err(SYNTAX.to_owned()),
        }
    }
    let change_if = |is_present: bool| {
        let is_met = is_to_be_present.is_none_or(|wanted| wanted == is_present);
        is_met.then(|| put(key, value, expires))
    };
    if wants_old {
        return modify(store, key, |old, _| {
            Ok((change_if(old.is_some()), old.into()))
        })
        .await;
    }
    change(store, |view| {
        let change = change_if(view.get(key).is_some());
        let reply = if change.is_some() { OK } else { Reply::Null };
        (Vec::from_iter(change), reply)
    })
    .await
}

async fn increment(store: &Store, key: &Bytes, by: i64) -> Outcome {
    modify(store, key, |old, expires| {
        let old = old.map_or(Some(0), |old| parse(&old));
        let new = old.ok_or(NOT_AN_INTEGER)?.checked_add(by);
        let new = new.ok_or("increment or decrement would overflow")?;
        let change = put(key, &new.to_string().into(), expires);
        Ok((Some(change), Reply::Number(new)))
    })
    .await
}

async fn expire(store: &Store, key: &Bytes, expires: u64) -> Outcome {
    change(store, |view| {
        let key = key.clone();
        let change = match view.get(&key) {
            Some(_) if expires != 0 && expires <= now() => Change::Delete { key },
            Some(facts) if expires != 0 || facts.expires != 0 => Change::Expire { key, expires },
            _ => return (Vec::new(), Reply::Number(0)),
        };
        (vec![change], Reply::Number(1))
    })
    .await
}

fn scan(store: &Store, cursor: &Bytes, options: &[Bytes]) -> Outcome {
    let cursor = parse(cursor).and_then(|cursor| usize::try_from(cursor).ok());
    let cursor = cursor.ok_or("invalid cursor")?;
    let (mut count, mut pattern) = (10, None);
    for option in options.chunks(2) {
        match option {
            [name, value] if is_word(name, "match") => pattern = Some(value),
            [name, value] if is_word(name, "count") => {
                let least = usize::try_from(integer(value)?).unwrap_or_default();
                count = Some(least).filter(|least| *least > 0).ok_or(SYNTAX)?;
            }
            _ => return Err(SYNTAX.to_owned()),
        }
    }
    let ((next, keys), commit) = store.look(|view| view.scan(cursor, count))?;
    let wanted = |key: &Bytes| pattern.is_none_or(|pattern| glob::matches(pattern, key));
    let keys = keys.into_iter().filter(wanted).map(Reply::Bulk).collect();
    let reply = Reply::Array(vec![Reply::bulk(next.to_string()), Reply::Array(keys)]);
    Ok(Answer::After(commit, reply))
}

fn hello(session: &mut Session, arguments: &[Bytes]) -> Outcome {
    if let Some((version, rest)) = arguments.split_first() {
        let version = parse(version).ok_or("Protocol version is not an integer or out of range")?;
        if !(2..=3).contains(&version) {
            return Err("NOPROTO unsupported protocol version".to_owned());
        }
        // A name is taken and forgotten; there are no passwords.
        match rest {
            [] => {}
            [name, _] if is_word(name, "setname") => {}
            [option, ..] => {
                let option = text(option);
                return Err(format!("Syntax error in HELLO option '{option}'"));
            }
        }
        session.version = version as u8;
    }
    now_reply(Reply::Map(vec![
        ("server", Reply::bulk("redis")),
        ("version", Reply::bulk(info::REDIS_VERSION)),
        ("proto", Reply::Number(session.version.into())),
        ("id", Reply::Number(session.id as i64)),
        ("mode", Reply::bulk("standalone")),
        ("role", Reply::bulk("master")),
        ("modules", Reply::Array(Vec::new())),
    ]))
}

/// A command as COMMAND tells of it.
fn described((name, words, keys): &(&'static str, i64, [i64; 3])) -> Reply {
    let start = [
        Reply::bulk(*name),
        Reply::Number(*words),
        Reply::Array(Vec::new()),
    ];
    Reply::Array(start.into_iter().chain(keys.map(Reply::Number)).collect())
}

fn unknown(request: &[Bytes]) -> String {
    let mut list = String::new();
    for argument in &request[1..] {
        if list.len() < 128 {
            list += &format!("'{}' ", brief(argument));
        }
    }
    let name = brief(&request[0]);
    format!("unknown command '{name}', with args beginning with: {list}")
}

/// The moment that is so many units after now, or Redis's complaint.
fn deadline(time: i64, unit: i64, command: &str) -> Result<u64, String> {
    let later = time.checked_mul(unit);
    let later = later.and_then(|time| time.checked_add(now() as i64));
    let later = later.ok_or_else(|| invalid_time(command))?;
    Ok(later.max(0) as u64)
}

fn invalid_time(command: &str) -> String {
    format!("invalid expire time in '{command}' command")
}

fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// So much of a client's word as a reply repeats.
fn brief(word: &[u8]) -> String {
    text(word).chars().take(128).collect()
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

fn integer(bytes: &[u8]) -> Result<i64, &'static str> {
    parse(bytes).ok_or(NOT_AN_INTEGER)
}
