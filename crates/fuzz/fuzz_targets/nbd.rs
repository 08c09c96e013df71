//! What an NBD client says, byte by byte, from its flags to its requests. Replies are read by what the
//! protocol's document says of them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nvme_export::nbd::protocol::{
    Action, ClientFlags, Description, Errno, Negotiation, Next, OptionHeader, Request, Session,
    Violation,
};

const MAX_REQUEST: u32 = 64 << 10;

const EXPORT_NAME: u32 = 1;
const LIST: u32 = 3;
const STARTTLS: u32 = 5;
const INFO: u32 = 6;
const GO: u32 = 7;
const CONTEXTS: [u32; 2] = [9, 10];

fuzz_target!(|input: &[u8]| {
    let mut input = Input(input);
    let Some([setup]) = input.take() else { return };
    let exports = exports(setup);
    let requires_tls = setup & 1 != 0;
    let Some(flags) = input.take().map(ClientFlags::decode) else {
        return;
    };
    let Ok(flags) = flags else { return };
    let negotiation = Negotiation::new(&exports, flags, requires_tls);
    if let Some((export, session)) = negotiate(negotiation, &exports, requires_tls, &mut input) {
        transmit(&exports[export], &session, &mut input);
    }
});

fn exports(setup: u8) -> [Description; 2] {
    let export = |name: &str, size, block_size| Description {
        name: name.to_owned(),
        size,
        block_size,
        max_request: MAX_REQUEST,
        is_read_only: setup & 2 != 0,
        can_trim: setup & 4 != 0,
    };
    [
        export("a", 1 << 20, 512),
        export("b", u64::MAX - 65535, 65536),
    ]
}

/// What is left of the client's words.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn slice(&mut self, len: u32) -> Option<&'a [u8]> {
        let (first, rest) = self.0.split_at_checked(len as usize)?;
        self.0 = rest;
        Some(first)
    }
}

fn negotiate(
    mut negotiation: Negotiation<'_>,
    exports: &[Description],
    requires_tls: bool,
    input: &mut Input<'_>,
) -> Option<(usize, Session)> {
    let mut has_tls = false;
    loop {
        let header = OptionHeader::decode(&input.take()?).ok()?;
        let data = input.slice(header.len)?;
        let answer = match negotiation.option(header, data) {
            Ok(answer) => answer,
            Err(Violation::UnknownExport) => {
                assert_eq!(header.option, EXPORT_NAME);
                return None;
            }
            Err(Violation::TlsRequired) => {
                assert!(requires_tls && !has_tls);
                return None;
            }
            Err(other) => panic!("{other} is none of an option"),
        };
        let is_open = !requires_tls || has_tls;
        match answer.next {
            Next::Transmission { export, session } => {
                assert!(
                    is_open,
                    "nothing is served without TLS where it is required"
                );
                let size = exports[export].size.to_be_bytes();
                if header.option == EXPORT_NAME {
                    assert_eq!(answer.reply[..8], size);
                    let flags = session.transmission_flags().to_be_bytes();
                    assert_eq!(answer.reply[8..10], flags);
                    assert!([10, 134].contains(&answer.reply.len()));
                } else {
                    assert_eq!(header.option, GO);
                    assert_eq!(replies(header.option, &answer.reply), 1);
                }
                return Some((export, session));
            }
            Next::StartTls => {
                assert_eq!((header.option, is_open), (STARTTLS, false));
                assert_eq!(replies(header.option, &answer.reply), 1);
                negotiation.tls_started();
                has_tls = true;
            }
            Next::Option => {
                let outcome = replies(header.option, &answer.reply);
                assert!(is_open || outcome >= 1 << 31);
            }
            Next::End => {
                assert_eq!(replies(header.option, &answer.reply), 1);
                return None;
            }
        }
    }
}

/// Reads the replies to an option, of which only the last ends them. Returns its type.
fn replies(option: u32, bytes: &[u8]) -> u32 {
    let mut rest = Input(bytes);
    loop {
        let magic = rest.take().map(u64::from_be_bytes);
        assert_eq!(magic, Some(0x0003_e889_0455_65a9));
        let mut word = || u32::from_be_bytes(rest.take().expect("a word"));
        let (of, kind, len) = (word(), word(), word());
        assert_eq!(of, option);
        let data = rest.slice(len).expect("as long as it says");
        match kind {
            1 => assert!(data.is_empty()),
            2 => {
                assert_eq!(option, LIST);
                let len = data.len() as u32 - 4;
                assert_eq!(data[..4], len.to_be_bytes());
            }
            3 => {
                assert!([INFO, GO].contains(&option));
                let expected = match data[..2] {
                    [0, 0] => 12,
                    [0, 1] => 3,
                    [0, 3] => 14,
                    _ => panic!("unknown information"),
                };
                assert_eq!(data.len(), expected);
            }
            4 => {
                assert!(CONTEXTS.contains(&option));
                assert_eq!(&data[4..], b"base:allocation");
            }
            _ => assert!(kind >= 1 << 31 && std::str::from_utf8(data).is_ok()),
        }
        if kind == 1 || kind >= 1 << 31 {
            assert!(rest.0.is_empty());
            return kind;
        }
    }
}

fn transmit(export: &Description, session: &Session, input: &mut Input<'_>) {
    let is_structured = session.transmission_flags() & 1 << 7 != 0;
    loop {
        let Some(Ok(request)) = input.take().map(|bytes| Request::decode(&bytes)) else {
            return;
        };
        let outcome = match session.check(&request) {
            Ok(outcome) => outcome,
            Err(violation) => {
                assert_eq!(violation, Violation::WriteLength(request.len));
                assert!(request.len > MAX_REQUEST);
                return;
            }
        };
        if input.slice(request.payload()).is_none() {
            return;
        }
        let mut reply = Vec::new();
        match outcome {
            Ok(Action::Disconnect) => return,
            Ok(action) => {
                is_possible(export, &request, action);
                match action {
                    Action::Read { len, .. } => {
                        let byte = request.cookie as u8 & 1;
                        let data = vec![byte; len as usize];
                        if session.data(&mut reply, &request, &data) {
                            assert!(byte != 0 || !is_structured);
                            reply.extend_from_slice(&data);
                        }
                    }
                    Action::BlockStatus { .. } => session.block_status(&mut reply, &request),
                    _ => session.success(&mut reply, &request),
                }
                assert_eq!(answer(&request, is_structured, &reply), 0);
                // Devices fail.
                let offset = Some(request.cookie);
                reply.clear();
                session.failure(&mut reply, &request, Errno::Io, "it failed", offset);
                assert_eq!(answer(&request, is_structured, &reply), Errno::Io as u32);
            }
            Err(refusal) => {
                let (errno, message) = (refusal.errno, refusal.message);
                session.failure(&mut reply, &request, errno, message, None);
                let got = answer(&request, is_structured, &reply);
                assert_eq!(got, errno as u32);
            }
        }
    }
}

/// What is to be done can be.
fn is_possible(export: &Description, request: &Request, action: Action) {
    let (offset, len) = match action {
        Action::Flush | Action::Disconnect => return,
        Action::Read { offset, len } | Action::Write { offset, len, .. } => {
            assert!(len <= MAX_REQUEST);
            (offset, len)
        }
        Action::Trim { offset, len, .. } => {
            assert!(export.can_trim);
            (offset, len)
        }
        Action::WriteZeroes { offset, len, .. } => (offset, len),
        Action::Cache => (request.offset, request.len),
        Action::BlockStatus { len } => (request.offset, len),
    };
    let is_change = matches!(
        action,
        Action::Write { .. } | Action::Trim { .. } | Action::WriteZeroes { .. }
    );
    assert!(!(is_change && export.is_read_only));
    assert_eq!((offset, len), (request.offset, request.len));
    let block_size = u64::from(export.block_size);
    assert!(len > 0 && offset % block_size == 0 && u64::from(len) % block_size == 0);
    let end = offset.checked_add(len.into());
    assert!(end.is_some_and(|end| end <= export.size));
}

/// Reads the one reply to a request; returns its error.
fn answer(request: &Request, is_structured: bool, bytes: &[u8]) -> u32 {
    const READ: u16 = 0;
    const BLOCK_STATUS: u16 = 7;
    let mut rest = Input(bytes);
    let magic = rest.take().map(u32::from_be_bytes);
    if magic == Some(0x6744_6698) {
        assert!(!is_structured || request.command != READ);
        let error = rest.take().map(u32::from_be_bytes).expect("an error");
        assert_eq!(rest.take(), Some(request.cookie.to_be_bytes()));
        let is_read = request.command == READ && error == 0;
        assert_eq!(rest.0.len() as u32, if is_read { request.len } else { 0 });
        return error;
    }
    assert_eq!((magic, is_structured), (Some(0x668e_33ef), true));
    // Done.
    assert_eq!(rest.take(), Some([0, 1]));
    let kind = rest.take().map(u16::from_be_bytes);
    assert_eq!(rest.take(), Some(request.cookie.to_be_bytes()));
    let len = rest.take().map(u32::from_be_bytes);
    assert_eq!(len, Some(rest.0.len() as u32));
    let mut word = || u32::from_be_bytes(rest.take().expect("a word"));
    match kind {
        Some(kind @ (1 | 2)) => {
            assert_eq!(request.command, READ);
            assert_eq!(rest.take(), Some(request.offset.to_be_bytes()));
            match kind {
                1 => assert_eq!(rest.0.len(), request.len as usize),
                _ => assert_eq!(rest.0, request.len.to_be_bytes()),
            }
            0
        }
        Some(5) => {
            assert_eq!(request.command, BLOCK_STATUS);
            assert_eq!((word(), word(), word()), (1, request.len, 0));
            0
        }
        Some(kind @ (0x8001 | 0x8002)) => {
            let error = word();
            assert_ne!(error, 0);
            let len = rest.take().map(u16::from_be_bytes).expect("a length");
            let message = rest.slice(len.into()).expect("as long as it says");
            assert!(!message.is_empty() && std::str::from_utf8(message).is_ok());
            if kind == 0x8002 {
                let offset = rest.take().map(u64::from_be_bytes).expect("an offset");
                let past = offset.checked_sub(request.offset);
                assert!(past.is_some_and(|past| past < request.len.into()));
            }
            assert!(rest.0.is_empty());
            error
        }
        other => panic!("a chunk of type {other:?}"),
    }
}
