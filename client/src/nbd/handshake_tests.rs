use super::*;

use proptest::prelude::*;

const INFO: ExportInfo = ExportInfo {
    size: 1 << 30,
    read_only: false,
};

/// Runs a handshake on `input`, cut into pieces of `step` bytes, with one export `disk`. Gives what was sent, and how it
/// ended.
fn run(input: &[u8], step: usize) -> (Vec<u8>, Option<HandshakeAction>) {
    let mut handshake = Handshake::new();
    let mut input = input.chunks(step);
    let mut sent = Vec::new();
    loop {
        while let Some(action) = handshake.poll_action() {
            match action {
                HandshakeAction::Send(bytes) => sent.extend(bytes),
                HandshakeAction::ListExports => handshake.catalogue(Ok(vec!["disk".to_string(), "other".to_string()])),
                HandshakeAction::Describe(name) if name == "disk" => handshake.description(Ok(INFO)),
                HandshakeAction::Describe(_) => handshake.description(Err(Refusal::Unknown)),
                end => return (sent, Some(end)),
            }
        }
        assert!(handshake.inbox.len() <= step + OPTION_HEADER_BYTES + OPTION_BYTES_MAX as usize);
        match input.next() {
            Some(bytes) if handshake.wants_input() => handshake.receive(bytes),
            _ => return (sent, None),
        }
    }
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u64(IHAVEOPT);
    out.put_u32(option);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out
}

fn reply(option: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_reply(&mut out, option, reply, data);
    out
}

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
const FLAGS: &[u8] = b"\0\0\0\x03";

/// The types of the replies in what was sent after the greeting.
fn reply_types(sent: &[u8]) -> Vec<u32> {
    let mut rest = &sent[GREETING.len()..];
    let mut types = Vec::new();
    while !rest.is_empty() {
        assert_eq!(rest.get_u64(), OPTION_REPLY_MAGIC);
        rest.advance(4);
        types.push(rest.get_u32());
        let length = rest.get_u32() as usize;
        rest.advance(length);
    }
    types
}

/// Every number of it is written out from the protocol's description.
#[test]
fn a_modern_client_byte_for_byte() {
    let mut input = Vec::new();
    input.extend(b"\0\0\0\x03");
    input.extend(b"IHAVEOPT\0\0\0\x08\0\0\0\0");
    input.extend(b"IHAVEOPT\0\0\0\x0a\0\0\0\x1f\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation");
    input.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x0c\0\0\0\x04disk\0\x01\0\x03");
    input.extend(b"rest");
    let mut expected: Vec<u8> = Vec::new();
    expected.extend(b"NBDMAGICIHAVEOPT\0\x03");
    expected.extend(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\0\0\0\0");
    expected.extend(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x04\0\0\0\x13\0\0\0\x01base:allocation");
    expected.extend(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x01\0\0\0\0");
    // Flags: has-flags, flush, FUA, trim, write-zeroes, DF, multi-conn, fast zero.
    expected.extend(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\0\0\x40\0\0\0\x09\xed");
    expected
        .extend(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0e\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0");
    expected.extend(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0");

    for step in [1, 7, 10_000] {
        let (sent, end) = run(&input, step);
        assert_eq!(sent, expected);
        let negotiated = Negotiated {
            export: "disk".to_string(),
            info: INFO,
            structured: true,
            base_allocation: true,
        };
        assert_eq!(end, Some(HandshakeAction::Transmission(negotiated)));
    }
}

#[test]
fn bytes_behind_the_handshake_are_kept_for_the_transmission() {
    let mut handshake = Handshake::new();
    let input = [FLAGS, &option(option::EXPORT_NAME, b"disk"), b"rest"].concat();
    handshake.receive(&input);
    assert!(!handshake.wants_input(), "it waits for the description");
    while let Some(action) = handshake.poll_action() {
        if action == HandshakeAction::Describe("disk".to_string()) {
            handshake.description(Ok(INFO));
        }
    }
    assert_eq!(handshake.into_rest(), b"rest");
}

#[test]
fn an_old_client_gets_size_flags_and_its_zeroes() {
    let answer = |flags: &[u8]| run(&[flags, &option(option::EXPORT_NAME, b"disk")].concat(), 3).0;
    let short = [GREETING, b"\0\0\0\0\x40\0\0\0\x09\x6d"].concat();
    assert_eq!(answer(b"\0\0\0\x03"), short);
    assert_eq!(answer(b"\0\0\0\x01"), [&short[..], &[0; 124]].concat());

    let (sent, end) = run(&[FLAGS, &option(option::EXPORT_NAME, b"none")].concat(), 64);
    assert_eq!(sent, GREETING);
    assert!(
        matches!(end, Some(HandshakeAction::Close(CloseReason::Refused(_)))),
        "{end:?}"
    );
}

#[test]
fn a_read_only_export_offers_no_writes() {
    let mut handshake = Handshake::new();
    handshake.receive(&[FLAGS, &option(option::EXPORT_NAME, b"disk")].concat());
    handshake.description(Ok(ExportInfo {
        size: 512,
        read_only: true,
    }));
    let sent: Vec<HandshakeAction> = std::iter::from_fn(|| handshake.poll_action()).collect();
    assert_eq!(sent[2], HandshakeAction::Send(b"\0\0\0\0\0\0\x02\0\x01\x0f".to_vec()));
}

#[test]
fn exports_are_listed_and_info_does_not_end_the_handshake() {
    let info = option(option::INFO, b"\0\0\0\x04disk\0\x01\0\x01");
    let input = [FLAGS, &option(option::LIST, b""), &info, &option(option::ABORT, b"bye")].concat();
    let (sent, end) = run(&input, 5);
    use option_reply::{ACK, INFO, SERVER};
    assert_eq!(reply_types(&sent), [SERVER, SERVER, ACK, INFO, INFO, INFO, ACK, ACK]);
    let first = reply(option::LIST, SERVER, b"\0\0\0\x04disk");
    assert!(sent[GREETING.len()..].starts_with(&first));
    assert_eq!(end, Some(HandshakeAction::Close(CloseReason::Finished)));
}

#[test]
fn what_can_not_be_done_is_refused_and_the_client_may_go_on() {
    use option_reply::{ACK, ERR_INVALID, ERR_TOO_BIG, ERR_UNKNOWN, ERR_UNSUP, META_CONTEXT};
    let cases: [(u32, &[u8], &[u32]); 15] = [
        (99, b"data", &[ERR_UNSUP]),
        (option::STARTTLS, b"", &[ERR_UNSUP]),
        (option::STARTTLS, b"x", &[ERR_INVALID]),
        (option::LIST, b"x", &[ERR_INVALID]),
        (option::GO, b"", &[ERR_INVALID]),
        (option::GO, b"\0\0\0\x04none\0\0", &[ERR_UNKNOWN]),
        (option::GO, b"\0\0\0\x04none\0\x01", &[ERR_INVALID]),
        (
            option::GO,
            &[&b"\0\0\x08\0"[..], &[b'a'; 2048], &[0, 0]].concat(),
            &[ERR_UNKNOWN],
        ),
        (77, &[0; 20_000], &[ERR_TOO_BIG]),
        (option::SET_META_CONTEXT, b"\0\0\0\x04disk\0\0\0\0", &[ERR_INVALID]),
        (option::STRUCTURED_REPLY, b"x", &[ERR_INVALID]),
        (option::STRUCTURED_REPLY, b"", &[ACK]),
        (
            option::LIST_META_CONTEXT,
            b"\0\0\0\x04disk\0\0\0\0",
            &[META_CONTEXT, ACK],
        ),
        (
            option::LIST_META_CONTEXT,
            b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x05base:",
            &[META_CONTEXT, ACK],
        ),
        (
            option::SET_META_CONTEXT,
            b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x05base:\0\0\0\x05x-y:z",
            &[ACK],
        ),
    ];
    let input: Vec<u8> = cases
        .iter()
        .flat_map(|(number, data, _)| option(*number, data))
        .collect();
    let expected: Vec<u32> = cases
        .iter()
        .flat_map(|(_, _, replies)| replies.iter().copied())
        .collect();
    for step in [1, 100, 4096] {
        let (sent, end) = run(&[FLAGS, &input].concat(), step);
        assert_eq!(reply_types(&sent), expected);
        assert_eq!(end, None);
    }
}

#[test]
fn a_context_selected_for_another_export_is_not_active() {
    let set = option(
        option::SET_META_CONTEXT,
        b"\0\0\0\x05other\0\0\0\x01\0\0\0\x0fbase:allocation",
    );
    let go = option(option::GO, b"\0\0\0\x04disk\0\0");
    let (_, end) = run(&[FLAGS, &option(option::STRUCTURED_REPLY, b""), &set, &go].concat(), 64);
    let Some(HandshakeAction::Transmission(negotiated)) = end else {
        panic!("{end:?}")
    };
    assert!(negotiated.structured && !negotiated.base_allocation);
}

#[test]
fn strangers_are_disconnected_with_a_reason() {
    let (_, end) = run(b"GET / HTTP/1.1\r\n\r\n", 64);
    assert_eq!(
        end,
        Some(HandshakeAction::Close(CloseReason::BadClientFlags(0x4745_5420)))
    );
    let (_, end) = run(&[FLAGS, b"GET / HTTP/1.1\r\n\r\n"].concat(), 64);
    let Some(HandshakeAction::Close(CloseReason::BadMagic { place: "option", .. })) = end else {
        panic!("{end:?}")
    };
    let (_, end) = run(&[FLAGS, b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"].concat(), 64);
    assert_eq!(
        end,
        Some(HandshakeAction::Close(CloseReason::TooLong {
            what: "an option",
            length: u32::MAX
        }))
    );
    let endless = [FLAGS, &option(99, b"").repeat(OPTIONS_MAX as usize + 1)].concat();
    assert_eq!(
        run(&endless, 4096).1,
        Some(HandshakeAction::Close(CloseReason::TooManyOptions))
    );
}

proptest! {
    #[test]
    fn garbage_neither_panics_nor_piles_up(
        flags in prop::bool::ANY,
        options in prop::collection::vec(
            (0u32..12, prop::collection::vec(any::<u8>(), 0..40), prop::option::weighted(0.1, any::<u32>())), 0..12),
        tail in prop::collection::vec(any::<u8>(), 0..64),
        step in 1usize..64,
    ) {
        let mut input = if flags { FLAGS.to_vec() } else { Vec::new() };
        for (number, data, length) in options {
            let mut bytes = option(number, &data);
            if let Some(length) = length {
                bytes[12..16].copy_from_slice(&length.to_be_bytes());
            }
            input.extend(bytes);
        }
        input.extend(tail);
        let (sent, _) = run(&input, step);
        prop_assert!(sent.starts_with(GREETING));
    }
}
