//! The commands.

use std::borrow::Cow;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::protocol::{MAX_REQUEST, OK, Reply};
use super::{Server, Session, glob, info};
use crate::store::{Change, Commit, Entry, Error, Found, MAX_KEY, MAX_VALUE, Store, View, now};

/// What becomes a reply once all that it depends on is durable.
pub(super) enum Answer {
    Reply(Reply, Commit),
    Value(Found),
    Values(Vec<Found>),
}

impl<R: Into<Reply>> From<(R, Commit)> for Answer {
    fn from((reply, commit): (R, Commit)) -> Self {
        Self::Reply(reply.into(), commit)
    }
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self::Reply(reply, Commit::default())
    }
}

impl Answer {
    pub(super) async fn reply(self) -> Reply {
        let reply = match self {
            Self::Reply(reply, commit) => commit.durable().await.map(|()| reply),
            Self::Value(found) => found.value().await.map(Reply::from),
            Self::Values(all) => {
                let values = stream::iter(all).map(Found::value).buffered(READS);
                let values = values.map_ok(Reply::from);
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
            Self::Reply(reply, _) => reply.size(),
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

/// Values of one request that are read at a time.
const READS: usize = 32;
const SYNTAX: &str = "syntax error";
const NOT_AN_INTEGER: &str = "value is not an integer or out of range";

/// Names, number of words (if negative, at least that many), and first and last key and distance of keys.
const COMMANDS: [(&str, i64, [i64; 3]); 9] = [
    ("set", -3, [1, 1, 1]),
    ("get getdel incr persist strlen ttl", 2, [1, 1, 1]),
    ("append expire incrby", 3, [1, 1, 1]),
    ("del exists mget", -2, [1, -1, 1]),
    ("mset", -3, [1, -1, 2]),
    ("client config scan", -2, [0, 0, 0]),
    ("command flushall hello info ping quit", -1, [0, 0, 0]),
    ("echo select", 2, [0, 0, 0]),
    ("dbsize", 1, [0, 0, 0]),
];

/// Begins a request. What it changes has its place in the order of all changes when this resolves.
pub(super) async fn execute(server: &Server, session: &mut Session, request: &[Bytes]) -> Answer {
    let outcome = dispatch(server, session, request).await;
    outcome.unwrap_or_else(|text| Reply::Error(text).into())
}

async fn dispatch(server: &Server, session: &mut Session, request: &[Bytes]) -> Outcome {
    let (name, arguments) = request.split_first().ok_or("empty request")?;
    let known = COMMANDS.iter().find_map(|(names, words, keys)| {
        let name = names.split(' ').find(|known| is_word(name, known))?;
        Some((name, *words, *keys))
    });
    let (name, words, [first, last, distance]) = known.ok_or_else(|| unknown(request))?;
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
        ("command", []) => now_reply(Reply::Array(described())),
        ("command", [what]) if is_word(what, "count") => now_reply(described().len().into()),
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
        ("strlen", [key]) => look(store, |view| {
            view.get(key).map_or(0, |entry| entry.value_len as usize)
        }),
        ("ttl", [key]) => look(store, |view| match view.get(key) {
            None => -2,
            Some(Entry { expires: 0, .. }) => -1,
            Some(Entry { expires, .. }) => (expires.saturating_sub(now()) as i64 + 500) / 1000,
        }),
        ("scan", [cursor, options @ ..]) => scan(store, cursor, options),

        ("set", [key, value, options @ ..]) => set(store, key, value, options).await,
        ("mset", pairs) if pairs.len() % 2 == 0 => {
            let pairs = pairs.chunks(2);
            let changes: Vec<_> = pairs
                .map(|pair| Change::set(&pair[0], &pair[1], 0))
                .collect();
            change(store, |_| (changes.clone(), OK)).await
        }
        ("mset", _) => wrong_number(),
        ("del", keys) => {
            let mut keys = keys.to_vec();
            keys.sort_unstable();
            keys.dedup();
            change(store, |view| {
                let present = keys.iter().filter(|key| view.get(key).is_some());
                let changes: Vec<_> = present.map(Change::delete).collect();
                let count = changes.len().into();
                (changes, count)
            })
            .await
        }
        ("getdel", [key]) => {
            modify(store, key, |old, _| {
                Ok((old.is_some().then(|| Change::delete(key)), old.into()))
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
                Ok((Some(Change::set(key, &value, expires)), len.into()))
            })
            .await
        }
        ("expire", [key, seconds]) => {
            let expires = deadline(integer(seconds)?, i64::MIN, 1000, name)?;
            expire(store, key, expires.max(1)).await
        }
        ("persist", [key]) => expire(store, key, 0).await,
        ("flushall", [] | [_]) => {
            let is_mode = |word: &Bytes| is_word(word, "sync") || is_word(word, "async");
            if !arguments.iter().all(is_mode) {
                return Err(SYNTAX.to_owned());
            }
            change(store, |_| (vec![Change::clear()], OK)).await
        }
        _ => Err(SYNTAX.to_owned()),
    }
}

fn now_reply(reply: Reply) -> Outcome {
    Ok(reply.into())
}

fn look<R: Into<Reply>>(store: &Store, look: impl FnOnce(&View<'_>) -> R) -> Outcome {
    Ok(store.look(look)?.into())
}

async fn change(store: &Store, decide: impl FnMut(&View<'_>) -> (Vec<Change>, Reply)) -> Outcome {
    Ok(store.change(decide).await?.into())
}

/// Decides by a key's value and when that expires. An error changes nothing.
async fn modify(
    store: &Store,
    key: &Bytes,
    mut decide: impl FnMut(Option<Bytes>, u64) -> Result<(Option<Change>, Reply), &'static str>,
) -> Outcome {
    let decide = |found: Option<(Entry, Bytes)>| {
        let (entry, old) = found.unzip();
        let decision = decide(old, entry.map_or(0, |entry| entry.expires));
        let (change, reply) = decision.unwrap_or_else(|text| (None, Reply::Error(text.to_owned())));
        (Vec::from_iter(change), reply)
    };
    Ok(store.modify(key, decide).await?.into())
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
                let unit = if option == "ex" { 1000 } else { 1 };
                expires = deadline(time, 1, unit, "set")?;
            }
            _ => return Err(SYNTAX.to_owned()),
        }
    }
    let change_if = |is_present: bool| {
        let is_met = is_to_be_present.is_none_or(|wanted| wanted == is_present);
        is_met.then(|| Change::set(key, value, expires))
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
        let change = Change::set(key, &new.to_string().into(), expires);
        Ok((Some(change), new.into()))
    })
    .await
}

async fn expire(store: &Store, key: &Bytes, expires: u64) -> Outcome {
    change(store, |view| {
        let change = match view.get(key) {
            Some(_) if expires != 0 && expires <= now() => Change::delete(key),
            Some(entry) if expires != 0 || entry.expires != 0 => Change::expire(key, expires),
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
    Ok((reply, commit).into())
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

/// The commands as COMMAND tells of them.
fn described() -> Vec<Reply> {
    let groups = COMMANDS.iter().flat_map(|(names, words, keys)| {
        names.split(' ').map(|name| {
            let flags = Reply::Array(Vec::new());
            let start = [Reply::bulk(name), Reply::Number(*words), flags];
            Reply::Array(start.into_iter().chain(keys.map(Reply::Number)).collect())
        })
    });
    groups.collect()
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
fn deadline(time: i64, least: i64, unit: i64, command: &str) -> Result<u64, String> {
    let later = time.checked_mul(unit).filter(|_| time >= least);
    let later = later.and_then(|time| time.checked_add(now() as i64));
    let later = later.map(|later| later.max(0) as u64);
    later.ok_or_else(|| format!("invalid expire time in '{command}' command"))
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
