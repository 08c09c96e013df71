use super::option::{
    ABORT, EXPORT_NAME, GO, INFO, LIST, LIST_META_CONTEXT, SET_META_CONTEXT, STARTTLS,
    STRUCTURED_REPLY,
};
use super::*;

fn exports() -> Vec<Description> {
    let export = |name: &str, block_size, is_read_only| Description {
        name: name.to_owned(),
        size: 1 << 20,
        block_size,
        max_request: 128 << 10,
        is_read_only,
        can_trim: true,
    };
    vec![export("a", 512, false), export("bc", 4096, true)]
}

fn flags(bits: u32) -> ClientFlags {
    ClientFlags::decode(bits.to_be_bytes()).expect("known flags")
}

/// The types of the replies to an option, and what comes after them.
fn ask(negotiation: &mut Negotiation<'_>, option: u32, data: &[u8]) -> (Vec<u32>, Next) {
    let len = data.len() as u32;
    let answer = negotiation
        .option(OptionHeader { option, len }, data)
        .expect("an answer");
    let mut kinds = Vec::new();
    let mut rest = answer.reply.as_slice();
    while let Some((header, more)) = rest.split_first_chunk::<20>() {
        assert_eq!(header[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        assert_eq!(header[8..12], option.to_be_bytes());
        let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
        kinds.push(word(12));
        rest = &more[word(16) as usize..];
    }
    assert!(rest.is_empty());
    (kinds, answer.next)
}

const ACK: u32 = 1;
const UNSUPPORTED: u32 = 0x8000_0001;
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const TLS_REQUIRED: u32 = 0x8000_0005;
const UNKNOWN: u32 = 0x8000_0006;
const TOO_BIG: u32 = 0x8000_0009;

fn info(name: &[u8], kinds: &[u8]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&(kinds.len() as u16).to_be_bytes());
    for kind in kinds {
        data.extend_from_slice(&[0, *kind]);
    }
    data
}

fn contexts(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query);
    }
    data
}

#[test]
fn the_greeting() {
    assert_eq!(&greeting(), b"NBDMAGICIHAVEOPT\0\x03");
    for known in 0..4_u32 {
        assert!(ClientFlags::decode(known.to_be_bytes()).is_ok());
    }
    for unknown in [4, 1 << 31, u32::MAX] {
        assert_eq!(
            ClientFlags::decode(unknown.to_be_bytes()),
            Err(Violation::ClientFlags(unknown))
        );
    }
}

#[test]
fn the_old_way_to_an_export() {
    let exports = exports();
    let go = |bits, name: &[u8]| {
        let header = OptionHeader {
            option: EXPORT_NAME,
            len: name.len() as u32,
        };
        Negotiation::new(&exports, flags(bits), false).option(header, name)
    };
    let answer = go(3, b"bc").expect("it is there");
    // Has flags, read-only, flush, FUA, several connections, cache.
    assert_eq!(answer.reply, b"\0\0\0\0\0\x10\0\0\x05\x0f");
    assert!(matches!(answer.next, Next::Transmission { export: 1, .. }));
    let answer = go(0, b"").expect("the default");
    assert_eq!(&answer.reply[..10], b"\0\0\0\0\0\x10\0\0\x05\x6d");
    assert_eq!(answer.reply[10..], [0; 124]);
    assert!(matches!(answer.next, Next::Transmission { export: 0, .. }));
    assert_eq!(go(3, b"b"), Err(Violation::UnknownExport));
}

#[test]
fn every_option() {
    let exports = exports();
    let mut negotiation = Negotiation::new(&exports, flags(1), false);
    let mut ask = |option, data: &[u8]| ask(&mut negotiation, option, data);
    assert_eq!(ask(LIST, b""), (vec![2, 2, ACK], Next::Option));
    assert_eq!(ask(LIST, b"x"), (vec![INVALID], Next::Option));
    assert_eq!(ask(STARTTLS, b""), (vec![POLICY], Next::Option));
    for unknown in [0, 4, 11, 99, u32::MAX] {
        assert_eq!(ask(unknown, b"data"), (vec![UNSUPPORTED], Next::Option));
    }
    assert_eq!(ask(INFO, &info(b"", &[])), (vec![3, 3, ACK], Next::Option));
    let all = info(b"bc", &[0, 1, 2, 3, 77]);
    assert_eq!(ask(INFO, &all), (vec![3, 3, 3, ACK], Next::Option));
    assert_eq!(ask(INFO, &info(b"x", &[])), (vec![UNKNOWN], Next::Option));
    assert_eq!(ask(GO, &info(b"x", &[])), (vec![UNKNOWN], Next::Option));
    assert_eq!(ask(GO, b"\0\0\0\x09"), (vec![INVALID], Next::Option));
    // Contexts are a matter of structured replies.
    let allocation = contexts(b"a", &[b"base:allocation"]);
    assert_eq!(ask(SET_META_CONTEXT, &allocation).0, [INVALID]);
    assert_eq!(ask(LIST_META_CONTEXT, &allocation).0, [INVALID]);
    assert_eq!(ask(STRUCTURED_REPLY, b"x").0, [INVALID]);
    assert_eq!(ask(STRUCTURED_REPLY, b""), (vec![ACK], Next::Option));
    assert_eq!(ask(ABORT, b"ignored"), (vec![ACK], Next::End));
    let (kinds, next) = ask(GO, &info(b"a", &[3]));
    assert_eq!(kinds, [3, 3, ACK]);
    assert!(matches!(next, Next::Transmission { export: 0, .. }));
}

/// Whether block status may be asked for after `options` and GO.
fn has_status(options: &[(u32, Vec<u8>)]) -> bool {
    let exports = exports();
    let mut negotiation = Negotiation::new(&exports, flags(1), false);
    ask(&mut negotiation, STRUCTURED_REPLY, b"");
    for (option, data) in options {
        ask(&mut negotiation, *option, data);
    }
    let (_, next) = ask(&mut negotiation, GO, &info(b"a", &[]));
    let Next::Transmission { session, .. } = next else {
        panic!("no session");
    };
    let status = request(7, 0, 0, 512);
    session.check(&status).expect("no violation").is_ok()
}

#[test]
fn contexts_are_selected_for_an_export() {
    let exports = exports();
    let mut negotiation = Negotiation::new(&exports, flags(1), false);
    ask(&mut negotiation, STRUCTURED_REPLY, b"");
    let mut kinds = |option, name: &[u8], queries: &[&[u8]]| {
        ask(&mut negotiation, option, &contexts(name, queries)).0
    };
    for (queries, listed, set) in [
        (&[][..], true, false),
        (&[&b"base:"[..]][..], true, false),
        (&[b"base:allocation"], true, true),
        (&[b"x-other:", b"base:allocation"], true, true),
        (&[b"base:other", b"qemu:", b""], false, false),
    ] {
        let expected = |found| if found { vec![4, ACK] } else { vec![ACK] };
        assert_eq!(kinds(LIST_META_CONTEXT, b"a", queries), expected(listed));
        assert_eq!(kinds(SET_META_CONTEXT, b"a", queries), expected(set));
    }
    assert_eq!(kinds(SET_META_CONTEXT, b"x", &[]), [UNKNOWN]);
    assert_eq!(kinds(SET_META_CONTEXT, b"a", &[&b"q"[..]; 65]), [TOO_BIG]);

    let set = |name: &[u8], query: &[u8]| (SET_META_CONTEXT, contexts(name, &[query]));
    let chosen = set(b"a", b"base:allocation");
    assert!(has_status(std::slice::from_ref(&chosen)));
    // The default export is the same one.
    assert!(has_status(&[set(b"", b"base:allocation")]));
    assert!(!has_status(&[]));
    assert!(!has_status(&[set(b"bc", b"base:allocation")]));
    assert!(!has_status(&[chosen.clone(), set(b"a", b"base:")]));
    // Also what fails makes the last choice void.
    assert!(!has_status(&[
        chosen.clone(),
        set(b"x", b"base:allocation")
    ]));
    assert!(!has_status(&[chosen, (SET_META_CONTEXT, b"?".to_vec())]));
}

#[test]
fn where_tls_is_required() {
    let exports = exports();
    let mut negotiation = Negotiation::new(&exports, flags(1), true);
    for option in [LIST, INFO, GO, STRUCTURED_REPLY, SET_META_CONTEXT, 99] {
        assert_eq!(
            ask(&mut negotiation, option, &info(b"a", &[])).0,
            [TLS_REQUIRED]
        );
    }
    let export_name = OptionHeader {
        option: EXPORT_NAME,
        len: 0,
    };
    assert_eq!(
        negotiation.option(export_name, b""),
        Err(Violation::TlsRequired)
    );
    assert_eq!(ask(&mut negotiation, STARTTLS, b"x").0, [INVALID]);
    assert_eq!(
        ask(&mut negotiation, STARTTLS, b""),
        (vec![ACK], Next::StartTls)
    );
    negotiation.tls_started();
    assert_eq!(ask(&mut negotiation, STARTTLS, b"").0, [INVALID]);
    assert_eq!(ask(&mut negotiation, LIST, b"").0, [2, 2, ACK]);
    assert!(negotiation.option(export_name, b"").is_ok());

    let mut old = Negotiation::new(&exports, flags(0), true);
    let list = OptionHeader {
        option: LIST,
        len: 0,
    };
    assert_eq!(old.option(list, b""), Err(Violation::TlsRequired));
    let mut leaving = Negotiation::new(&exports, flags(1), true);
    assert_eq!(ask(&mut leaving, ABORT, b""), (vec![ACK], Next::End));
}

#[test]
fn what_was_agreed_before_tls_is_void() {
    let exports = exports();
    let mut negotiation = Negotiation::new(&exports, flags(1), false);
    ask(&mut negotiation, STRUCTURED_REPLY, b"");
    negotiation.tls_started();
    let set = contexts(b"a", &[b"base:allocation"]);
    assert_eq!(ask(&mut negotiation, SET_META_CONTEXT, &set).0, [INVALID]);
}

fn request(command: u16, flags: u16, offset: u64, len: u32) -> Request {
    Request {
        flags,
        command,
        cookie: 7,
        offset,
        len,
    }
}

fn session(export: usize, structured: bool) -> Session {
    Session::new(&exports()[export], structured, structured)
}

#[test]
fn requests_that_are_fine() {
    let session = session(0, true);
    let check = |command, flags, offset, len| {
        let request = request(command, flags, offset, len);
        session.check(&request).expect("no violation")
    };
    let (offset, len) = (512, 1024);
    let fua = true;
    assert_eq!(check(0, 5, 512, 1024), Ok(Action::Read { offset, len }));
    assert_eq!(
        check(0, 0, (1 << 20) - (128 << 10), 128 << 10),
        Ok(Action::Read {
            offset: (1 << 20) - (128 << 10),
            len: 128 << 10
        })
    );
    assert_eq!(
        check(1, 1, 512, 1024),
        Ok(Action::Write { offset, len, fua })
    );
    assert_eq!(check(2, 2, 9, 9), Ok(Action::Disconnect));
    assert_eq!(check(3, 1, 0, 0), Ok(Action::Flush));
    assert_eq!(
        check(4, 1, 512, 1024),
        Ok(Action::Trim { offset, len, fua })
    );
    assert_eq!(check(5, 0, 512, 1024), Ok(Action::Cache));
    assert_eq!(
        check(6, 3, 512, 1024),
        Ok(Action::WriteZeroes {
            offset,
            len,
            may_deallocate: false,
            fua
        })
    );
    // Without data there is no limit but the end.
    assert_eq!(
        check(6, 0, 0, 1 << 20),
        Ok(Action::WriteZeroes {
            offset: 0,
            len: 1 << 20,
            may_deallocate: true,
            fua: false
        })
    );
    assert_eq!(check(7, 8, 512, 1024), Ok(Action::BlockStatus { len }));
}

#[test]
fn requests_that_are_refused() {
    use Errno::{Invalid, NoSpace, Overflow, Permission};
    let errno = |session: &Session, command, flags, offset, len| {
        let request = request(command, flags, offset, len);
        let refusal = session.check(&request).expect("no violation");
        refusal.expect_err("refused").errno
    };
    let structured = session(0, true);
    for (command, flags, offset, len, expected) in [
        (0, 0, 256, 512, Invalid),
        (0, 0, 512, 256, Invalid),
        (0, 0, 512, 0, Invalid),
        (0, 0, 1 << 20, 512, Invalid),
        (0, 0, u64::MAX - 511, 512, Invalid),
        (0, 0, 0, (128 << 10) + 512, Invalid),
        (0, 4, 0, (128 << 10) + 512, Overflow),
        (0, 2, 0, 512, Invalid),
        (1, 0, 100, 512, Invalid),
        (1, 0, 1 << 20, 512, NoSpace),
        (1, 4, 0, 512, Invalid),
        (3, 0, 512, 0, Invalid),
        (3, 0, 0, 512, Invalid),
        (4, 0, 1 << 20, 512, Invalid),
        (5, 0, 1 << 20, 512, Invalid),
        (6, 0, 512, 1 << 20, NoSpace),
        // FAST_ZERO was not offered.
        (6, 16, 0, 512, Invalid),
        (7, 0, 1 << 20, 512, Invalid),
        (7, 0, 0, 0, Invalid),
        (8, 0, 0, 512, Invalid),
        (u16::MAX, 0, 0, 512, Invalid),
    ] {
        let got = errno(&structured, command, flags, offset, len);
        assert_eq!(got, expected, "{command} {flags} {offset} {len}");
    }
    // Unstructured replies can't be fragmented, and have no extents.
    assert_eq!(errno(&session(0, false), 0, 4, 0, 512), Invalid);
    assert_eq!(errno(&session(0, false), 7, 0, 0, 512), Invalid);
    let read_only = session(1, true);
    for command in [1, 4, 6] {
        assert_eq!(errno(&read_only, command, 0, 0, 4096), Permission);
    }
    assert_eq!(errno(&read_only, 0, 0, 512, 4096), Invalid);
    let mut export = exports().remove(0);
    export.can_trim = false;
    let session = Session::new(&export, true, true);
    assert_eq!(session.transmission_flags() & 1 << 5, 0);
    assert_eq!(errno(&session, 4, 0, 0, 512), Invalid);
}

#[test]
fn writes_that_are_too_long_end_the_connection() {
    let check = |len| session(0, true).check(&request(1, 0, 0, len));
    assert!(check(128 << 10).is_ok());
    let len = (128 << 10) + 1;
    assert_eq!(check(len), Err(Violation::WriteLength(len)));
}

#[test]
fn replies_are_structured_if_that_was_agreed_on() {
    let read = request(0, 0, 512, 512);
    let data = [[0; 511].as_slice(), &[1]].concat();
    let reply = |structured, data: &[u8]| {
        let mut bytes = Vec::new();
        let follows = session(0, structured).data(&mut bytes, &read, data);
        (bytes, follows)
    };
    let simple = b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x07".to_vec();
    assert_eq!(reply(false, &data), (simple.clone(), true));
    assert_eq!(reply(false, &[0; 512]), (simple, true));
    let (bytes, follows) = reply(true, &data);
    assert_eq!((bytes[7], bytes.len(), follows), (1, 28, true));
    let (bytes, follows) = reply(true, &[0; 512]);
    assert_eq!((bytes[7], bytes.len(), follows), (2, 32, false));

    let failure = |structured, request: &Request, offset| {
        let mut bytes = Vec::new();
        session(0, structured).failure(&mut bytes, request, Errno::Io, "why", offset);
        bytes
    };
    assert_eq!(
        failure(false, &read, Some(512)),
        b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\0\x07"
    );
    assert_eq!(failure(true, &read, Some(1023))[6..8], [0x80, 2]);
    // An offset that is not the request's says nothing.
    for elsewhere in [None, Some(511), Some(1024)] {
        assert_eq!(failure(true, &read, elsewhere)[6..8], [0x80, 1]);
    }
    let flush = request(3, 0, 0, 0);
    assert_eq!(failure(true, &flush, Some(0))[6..8], [0x80, 1]);
}
