use super::super::handshake::ExportInfo;
use super::super::wire::{Errno, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};
use super::*;
use crate::volume::api::StatusExtent;

use bytes::{Buf, BufMut, Bytes};
use cairn_proto::buffer::is_aligned;
use proptest::prelude::*;

const SIZE: u64 = 64 << 20;

fn start(structured: bool, limits: TransmissionLimits) -> Transmission {
    let info = ExportInfo {
        size: SIZE,
        read_only: false,
    };
    let negotiated = Negotiated {
        export: "disk".to_string(),
        info,
        structured,
        base_allocation: structured,
    };
    Transmission::new(negotiated, &[], limits)
}

fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u32(REQUEST_MAGIC);
    out.put_u16(flags);
    out.put_u16(command);
    out.put_u64(cookie);
    out.put_u64(offset);
    out.put_u32(length);
    out
}

/// Feeds as much of `input` as is taken, at most `step` bytes at a time, and gives what came out.
fn feed(transmission: &mut Transmission, input: &mut &[u8], step: usize) -> Vec<Input> {
    let mut out = Vec::new();
    loop {
        while let Some(next) = transmission.next_input() {
            out.push(next);
        }
        let Some((payload, ahead)) = transmission.read_target() else {
            return out;
        };
        let mut count = 0;
        for target in [payload, ahead] {
            let n = target.len().min(input.len()).min(step - count);
            target[..n].copy_from_slice(&input[..n]);
            input.advance(n);
            count += n;
        }
        if count == 0 {
            return out;
        }
        transmission.received(count);
    }
}

fn written(transmission: &mut Transmission) -> Vec<u8> {
    let outbox = transmission.outbox();
    let mut all = Vec::new();
    while !outbox.is_empty() {
        let mut slices = [std::io::IoSlice::new(&[]); 4];
        let used = outbox.slices(&mut slices);
        let bytes: Vec<u8> = slices[..used].iter().flat_map(|slice| slice.to_vec()).collect();
        outbox.advance(bytes.len());
        all.extend(bytes);
    }
    all
}

fn only_op(inputs: &[Input]) -> (RequestToken, VolumeOp) {
    match inputs {
        [Input::Request { token, op }] => (*token, op.clone()),
        other => panic!("{other:?}"),
    }
}

/// Feeds one request, answers it, and gives the reply's bytes.
fn exchange(transmission: &mut Transmission, input: &[u8], result: Result<VolumeReply, VolumeError>) -> Vec<u8> {
    let inputs = feed(transmission, &mut &input[..], usize::MAX);
    let (token, _) = only_op(&inputs);
    transmission.complete(token, result);
    written(transmission)
}

/// The error number of a lone simple or structured reply, 0 for success.
fn errno(mut reply: &[u8]) -> u32 {
    match reply.get_u32() {
        SIMPLE_REPLY_MAGIC => reply.get_u32(),
        STRUCTURED_REPLY_MAGIC => {
            assert_eq!(reply.get_u16(), chunk::FLAG_DONE);
            let kind = reply.get_u16();
            reply.advance(8);
            assert_eq!(reply.get_u32() as usize, reply.len());
            if kind == chunk::ERROR { reply.get_u32() } else { 0 }
        }
        magic => panic!("{magic:#x}"),
    }
}

/// Every number of it is written out from the protocol's description.
#[test]
fn a_session_with_simple_replies_byte_for_byte() {
    let mut t = start(false, TransmissionLimits::default());
    let mut write = b"\x25\x60\x95\x13\0\x01\0\x01cookie-1\0\0\0\0\0\0\x02\0\0\0\x02\0".to_vec();
    write.extend([7; 512]);
    let inputs = feed(&mut t, &mut &write[..], usize::MAX);
    let (token, op) = only_op(&inputs);
    let VolumeOp::Write { offset: 512, data } = op else {
        panic!("{op:?}")
    };
    assert_eq!(data, [7; 512].as_slice());
    t.complete(token, Ok(VolumeReply::Done));
    assert_eq!(written(&mut t), b"\x67\x44\x66\x98\0\0\0\0cookie-1");

    let read = b"\x25\x60\x95\x13\0\0\0\0cookie-2\0\0\0\0\0\0\x02\0\0\0\x02\0";
    let reply = exchange(&mut t, read, Ok(VolumeReply::Read(vec![data])));
    assert_eq!(reply, [&b"\x67\x44\x66\x98\0\0\0\0cookie-2"[..], &[7; 512]].concat());

    let flush = b"\x25\x60\x95\x13\0\0\0\x03cookie-3\0\0\0\0\0\0\0\0\0\0\0\0";
    assert_eq!(
        exchange(&mut t, flush, Err(VolumeError::NoSpace)),
        b"\x67\x44\x66\x98\0\0\0\x1ccookie-3"
    );

    let disconnect = b"\x25\x60\x95\x13\0\0\0\x02cookie-4\0\0\0\0\0\0\0\0\0\0\0\0";
    let inputs = feed(&mut t, &mut &disconnect[..], usize::MAX);
    assert!(matches!(inputs[..], [Input::End(CloseReason::Finished)]), "{inputs:?}");
    assert!(t.is_finished() && t.read_target().is_none());
}

#[test]
fn a_session_with_structured_replies_byte_for_byte() {
    let mut t = start(true, TransmissionLimits::default());
    let read = b"\x25\x60\x95\x13\0\0\0\0cookie-1\0\0\0\0\0\0\x10\0\0\0\x30\0";
    let (data, zero) = (Bytes::from(vec![5; 4096]), Bytes::from(vec![0; 4096]));
    let pieces = VolumeReply::Read(vec![data.clone(), zero.clone(), zero]);
    let mut expected = b"\x66\x8e\x33\xef\0\0\0\x01cookie-1\0\0\x10\x08\0\0\0\0\0\0\x10\0".to_vec();
    expected.extend(&data);
    expected.extend(b"\x66\x8e\x33\xef\0\x01\0\x02cookie-1\0\0\0\x0c\0\0\0\0\0\0\x20\0\0\0\x20\0");
    assert_eq!(exchange(&mut t, read, Ok(pieces.clone())), expected);

    let unfragmented = b"\x25\x60\x95\x13\0\x04\0\0cookie-2\0\0\0\0\0\0\x10\0\0\0\x30\0";
    let mut expected = b"\x66\x8e\x33\xef\0\x01\0\x01cookie-2\0\0\x30\x08\0\0\0\0\0\0\x10\0".to_vec();
    expected.extend([[5; 4096], [0; 4096], [0; 4096]].concat());
    assert_eq!(exchange(&mut t, unfragmented, Ok(pieces)), expected);

    let status = |flags| {
        [
            b"\x25\x60\x95\x13\0",
            &[flags][..],
            b"\0\x07cookie-3\0\0\0\0\0\0\0\0\0\0\x40\0",
        ]
        .concat()
    };
    let extent = |length, data| StatusExtent { length, data };
    let extents = vec![
        extent(4096, true),
        extent(4096, true),
        extent(4096, false),
        extent(1 << 40, true),
    ];
    let reply = exchange(&mut t, &status(0), Ok(VolumeReply::BlockStatus(extents.clone())));
    let mut expected = b"\x66\x8e\x33\xef\0\x01\0\x05cookie-3\0\0\0\x1c\0\0\0\x01".to_vec();
    expected.extend(b"\0\0\x20\0\0\0\0\0\0\0\x10\0\0\0\0\x03\0\0\x10\0\0\0\0\0");
    assert_eq!(reply, expected);
    let reply = exchange(&mut t, &status(8), Ok(VolumeReply::BlockStatus(extents)));
    assert_eq!(
        reply,
        b"\x66\x8e\x33\xef\0\x01\0\x05cookie-3\0\0\0\x0c\0\0\0\x01\0\0\x20\0\0\0\0\0"
    );

    let trim = b"\x25\x60\x95\x13\0\0\0\x04cookie-4\0\0\0\0\0\0\0\0\0\0\x10\0";
    assert_eq!(
        exchange(&mut t, trim, Ok(VolumeReply::Done)),
        b"\x66\x8e\x33\xef\0\x01\0\0cookie-4\0\0\0\0"
    );
    let reply = exchange(&mut t, trim, Err(VolumeError::Shutdown));
    let head = b"\x66\x8e\x33\xef\0\x01\x80\x01cookie-4\0\0\0\x22\0\0\0\x6c\0\x1cthe client is shutting down";
    assert_eq!(reply.len(), 20 + 6 + VolumeError::Shutdown.to_string().len());
    assert_eq!(
        reply[..20],
        [&head[..16], &[0, 0, 0, (reply.len() - 20) as u8]].concat()
    );
    assert_eq!(
        reply[20..26],
        [&[0, 0, 0, 108, 0][..], &[(reply.len() - 26) as u8]].concat()
    );
}

#[test]
fn looking_for_one_extent_costs_what_is_found() {
    let mut t = start(true, TransmissionLimits::default());
    let mut asked = |found: u64| {
        let request = request(command_flag::REQ_ONE, command::BLOCK_STATUS, 1, 0, SIZE as u32);
        let inputs = feed(&mut t, &mut &request[..], usize::MAX);
        let (token, op) = only_op(&inputs);
        let VolumeOp::BlockStatus { length, .. } = op else {
            panic!("{op:?}")
        };
        let extent = |length, data| StatusExtent { length, data };
        let rest = length.saturating_sub(found);
        let extents = [extent(found.min(length), true), extent(rest, false)];
        let extents = extents.into_iter().filter(|extent| extent.length > 0).collect();
        t.complete(token, Ok(VolumeReply::BlockStatus(extents)));
        length
    };
    // In one large extent it soon looks as far as it is asked to, and among small ones it does not.
    let steps: Vec<u64> = (0..6).map(|_| asked(u64::MAX)).collect();
    assert_eq!(steps, [256 << 10, 1 << 20, 4 << 20, 16 << 20, SIZE, SIZE]);
    let steps: Vec<u64> = (0..2).map(|_| asked(4096)).collect();
    assert_eq!(steps, [SIZE, 256 << 10]);
}

#[test]
fn bad_requests_get_their_error_and_the_next_request_is_understood() {
    use Errno::{Invalid, NoSpace, NotSupported, Overflow};
    let over = PAYLOAD_BYTES_MAX + 512;
    let cases: [(&str, u16, u16, u64, u32, Errno); 20] = [
        ("unknown command", 0, 5, 0, 512, Invalid),
        ("unknown command", 0, 999, 0, 0, Invalid),
        ("unknown flag", 1 << 9, command::READ, 0, 512, Invalid),
        (
            "flag of another command",
            command_flag::NO_HOLE,
            command::TRIM,
            0,
            512,
            Invalid,
        ),
        (
            "flag of another command",
            command_flag::DF,
            command::WRITE,
            0,
            512,
            Invalid,
        ),
        ("flush with a place", 0, command::FLUSH, 512, 0, Invalid),
        ("unaligned offset", 0, command::READ, 1, 512, Invalid),
        ("unaligned length", 0, command::WRITE, 0, 100, Invalid),
        ("past the end", 0, command::READ, SIZE, 512, Invalid),
        ("past the end", 0, command::TRIM, SIZE - 512, 1024, Invalid),
        ("past the end", 0, command::WRITE, SIZE, 512, NoSpace),
        ("past the end", 0, command::WRITE_ZEROES, SIZE - 512, 1024, NoSpace),
        ("past the end", 0, command::BLOCK_STATUS, SIZE, 512, Invalid),
        ("offset overflows", 0, command::WRITE, u64::MAX - 511, 512, NoSpace),
        ("status of nothing", 0, command::BLOCK_STATUS, 0, 0, Invalid),
        ("read too long", 0, command::READ, 0, over, Overflow),
        ("write too long", 0, command::WRITE, 0, over, Invalid),
        (
            "partial block, fast",
            command_flag::FAST_ZERO,
            command::WRITE_ZEROES,
            512,
            4096,
            NotSupported,
        ),
        (
            "partial block, fast",
            command_flag::FAST_ZERO,
            command::WRITE_ZEROES,
            0,
            4608,
            NotSupported,
        ),
        (
            "not aligned, fast",
            command_flag::FAST_ZERO,
            command::WRITE_ZEROES,
            100,
            4096,
            Invalid,
        ),
    ];
    for structured in [true, false] {
        let mut t = start(structured, TransmissionLimits::default());
        for (what, flags, kind, offset, length, expected) in cases {
            let mut input = request(flags, kind, 9, offset, length);
            if kind == command::WRITE {
                input.resize(input.len() + length as usize, 0x25);
            }
            let inputs = feed(&mut t, &mut &input[..], 100_000);
            assert!(inputs.is_empty(), "{what}: {inputs:?}");
            let expected = match expected {
                Overflow if !structured => Invalid,
                errno => errno,
            };
            assert_eq!(errno(&written(&mut t)), expected as u32, "{what}");
        }
        let flush = request(command_flag::FUA, command::FLUSH, 1, 0, 0);
        assert_eq!(errno(&exchange(&mut t, &flush, Ok(VolumeReply::Done))), 0);
    }
}

#[test]
fn zeroes_and_trims_reach_the_volume_as_they_were_meant() {
    let mut t = start(true, TransmissionLimits::default());
    let op = |t: &mut Transmission, flags, kind, offset, length| {
        let inputs = feed(t, &mut &request(flags, kind, 3, offset, length)[..], 28);
        let (token, op) = only_op(&inputs);
        t.complete(token, Ok(VolumeReply::Done));
        op
    };
    use command_flag::{FAST_ZERO, FUA, NO_HOLE};
    let zeroes = command::WRITE_ZEROES;
    let done = op(&mut t, 0, zeroes, 512, 512);
    assert!(matches!(
        done,
        VolumeOp::WriteZeroes {
            offset: 512,
            length: 512,
            may_discard: true
        }
    ));
    let done = op(&mut t, NO_HOLE | FUA, zeroes, 512, 512);
    assert!(matches!(done, VolumeOp::WriteZeroes { may_discard: false, .. }));
    let done = op(&mut t, FAST_ZERO | NO_HOLE, zeroes, 4096, (SIZE - 4096) as u32);
    assert!(matches!(done, VolumeOp::WriteZeroes { may_discard: false, .. }));
    let done = op(&mut t, 0, command::TRIM, 0, SIZE as u32);
    assert!(matches!(
        done,
        VolumeOp::Discard {
            offset: 0,
            length: SIZE
        }
    ));

    // On a volume that is large enough, up to the largest length that there is.
    let info = ExportInfo {
        size: 1 << 40,
        read_only: false,
    };
    let negotiated = Negotiated {
        info,
        ..t.negotiated().clone()
    };
    let mut t = Transmission::new(negotiated, &[], TransmissionLimits::default());
    let done = op(&mut t, 0, command::TRIM, 4096, u32::MAX - 511);
    assert!(matches!(
        done,
        VolumeOp::Discard {
            offset: 4096,
            length: 0xffff_fe00
        }
    ));
}

#[test]
fn writes_to_a_read_only_export_are_refused() {
    let info = ExportInfo {
        size: SIZE,
        read_only: true,
    };
    let negotiated = Negotiated {
        export: String::new(),
        info,
        structured: false,
        base_allocation: false,
    };
    let mut t = Transmission::new(negotiated, &[], TransmissionLimits::default());
    for kind in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
        let mut input = request(0, kind, 3, 0, 512);
        input.resize(28 + if kind == command::WRITE { 512 } else { 0 }, 1);
        assert!(feed(&mut t, &mut &input[..], 77).is_empty());
        assert_eq!(errno(&written(&mut t)), Errno::Perm as u32);
    }
}

#[test]
fn payloads_land_aligned_and_large_ones_without_a_copy() {
    let mut t = start(false, TransmissionLimits::default());
    let header = request(0, command::WRITE, 1, 0, 1 << 20);
    assert!(feed(&mut t, &mut &header[..], usize::MAX).is_empty());
    let (payload, ahead) = t.read_target().unwrap();
    assert_eq!((payload.len(), ahead.len()), (1 << 20, READ_AHEAD_BYTES));
    let place = payload.as_ptr();
    payload.fill(3);
    t.received(1 << 20);
    let inputs: Vec<Input> = std::iter::from_fn(|| t.next_input()).collect();
    let (_, VolumeOp::Write { data, .. }) = only_op(&inputs) else {
        panic!("{inputs:?}")
    };
    assert_eq!(data.as_ptr(), place);
    assert!(is_aligned(&data));
}

#[test]
fn a_stranger_and_an_endless_payload_end_the_connection() {
    let mut t = start(true, TransmissionLimits::default());
    let inputs = feed(&mut t, &mut &[0x5a; 28][..], usize::MAX);
    assert!(
        matches!(inputs[..], [Input::End(CloseReason::BadMagic { .. })]),
        "{inputs:?}"
    );
    let mut t = start(true, TransmissionLimits::default());
    let inputs = feed(&mut t, &mut &request(0, command::WRITE, 0, 0, u32::MAX)[..], usize::MAX);
    assert!(
        matches!(inputs[..], [Input::End(CloseReason::TooLong { length: u32::MAX, .. })]),
        "{inputs:?}"
    );
    assert!(written(&mut t).is_empty());
}

#[test]
fn a_disconnect_waits_for_what_is_in_flight() {
    let mut t = start(false, TransmissionLimits::default());
    let input = [request(0, command::FLUSH, 1, 0, 0), request(0, command::DISC, 2, 0, 0)].concat();
    let inputs = feed(&mut t, &mut &input[..], usize::MAX);
    let [Input::Request { token, .. }, Input::End(CloseReason::Finished)] = inputs[..] else {
        panic!("{inputs:?}")
    };
    assert!(!t.is_finished() && t.in_flight() == 1);
    t.complete(token, Ok(VolumeReply::Done));
    assert!(!t.is_finished());
    assert_eq!(written(&mut t).len(), 16);
    assert!(t.is_finished());
}

#[test]
fn an_exhausted_connection_is_not_read_until_answers_are_written() {
    let limits = TransmissionLimits {
        requests: 2,
        bytes: 8192,
        queued_pieces: 100,
    };
    let read = |cookie, length| request(0, command::READ, cookie, 0, length);
    let mut t = start(false, limits);
    let all = [read(1, 4096), read(2, 4096), read(3, 512)].concat();
    let mut input = &all[..];
    let inputs = feed(&mut t, &mut input, usize::MAX);
    let [Input::Request { token, .. }, Input::Request { .. }] = inputs[..] else {
        panic!("{inputs:?}")
    };
    assert!(t.read_target().is_none(), "two of two requests are in flight");

    t.complete(token, Ok(VolumeReply::Read(vec![Bytes::from(vec![1; 4096])])));
    assert!(t.next_input().is_none(), "its answer still holds the memory");
    assert!(t.read_target().is_none());
    written(&mut t);
    assert!(matches!(t.next_input(), Some(Input::Request { .. })));
    assert!(t.read_target().is_some());

    // A request above the limit is let in alone.
    let mut t = start(false, limits);
    let inputs = feed(&mut t, &mut &[read(1, 1 << 20), read(2, 512)].concat()[..], usize::MAX);
    assert_eq!(inputs.len(), 1);

    // A client that does not read its answers gets no more of them.
    let mut t = start(
        false,
        TransmissionLimits {
            queued_pieces: 10,
            ..limits
        },
    );
    let flood = request(0, command::FLUSH, 1, 1, 0).repeat(10_000);
    let mut input = &flood[..];
    assert!(feed(&mut t, &mut input, usize::MAX).is_empty());
    assert!(input.len() > flood.len() / 2 && t.outbox().bytes() < 1000);
}

#[test]
fn cookies_may_repeat() {
    let mut t = start(false, TransmissionLimits::default());
    let input = request(0, command::FLUSH, 7, 0, 0).repeat(2);
    let inputs = feed(&mut t, &mut &input[..], usize::MAX);
    let [Input::Request { token: a, .. }, Input::Request { token: b, .. }] = inputs[..] else {
        panic!("{inputs:?}")
    };
    assert_ne!(a, b);
    assert_eq!(t.tokens().collect::<Vec<_>>(), [a, b]);
}

#[derive(Clone, Debug)]
struct Step {
    command: u16,
    flags: u16,
    offset: u64,
    length: u32,
    fill: u8,
}

fn step() -> impl Strategy<Value = Step> {
    let offset = prop_oneof![4 => (0..SIZE / 512).prop_map(|s| s * 512), 1 => any::<u64>()];
    let length = prop_oneof![6 => (0u32..40).prop_map(|s| s * 512), 1 => 0u32..70_000];
    (
        0u16..9,
        prop_oneof![3 => Just(0u16), 1 => 0u16..32],
        offset,
        length,
        any::<u8>(),
    )
        .prop_map(|(command, flags, offset, length, fill)| Step {
            command,
            flags,
            offset,
            length,
            fill,
        })
}

proptest! {
    /// However the bytes are cut, the same operations come out, with their payloads, and every request gets one reply.
    #[test]
    fn requests_survive_any_cut(
        steps in prop::collection::vec(step(), 1..12), cut in 1usize..30_000, structured in any::<bool>(),
        requests in 1usize..5, bytes in 0u64..50_000,
    ) {
        let mut stream = Vec::new();
        let mut replies = 0;
        for (cookie, step) in steps.iter().enumerate() {
            stream.extend(request(step.flags, step.command, cookie as u64, step.offset, step.length));
            if step.command == command::WRITE {
                stream.resize(stream.len() + step.length as usize, step.fill);
            }
            if step.command == command::DISC {
                break;
            }
            replies += 1;
        }
        let mut t = start(structured, TransmissionLimits { requests, bytes, queued_pieces: 4 });
        let mut input = &stream[..];
        let mut out = Vec::new();
        loop {
            let inputs = feed(&mut t, &mut input, cut);
            let stuck = inputs.is_empty() && t.outbox().is_empty();
            for next in inputs {
                let Input::Request { token, op } = next else { continue };
                let result = match op {
                    VolumeOp::Read { length, .. } => VolumeReply::Read(vec![Bytes::from(vec![1; length as usize])]),
                    VolumeOp::BlockStatus { length, .. } => {
                        VolumeReply::BlockStatus(vec![StatusExtent { length, data: true }])
                    }
                    VolumeOp::Write { offset, data } => {
                        let written = steps.iter().any(|step| {
                            step.offset == offset && step.length as usize == data.len()
                                && data.iter().all(|byte| *byte == step.fill)
                        });
                        prop_assert!(written, "a write at {} was not sent", offset);
                        VolumeReply::Done
                    }
                    _ => VolumeReply::Done,
                };
                t.complete(token, Ok(result));
            }
            out.extend(written(&mut t));
            if stuck {
                break;
            }
        }
        prop_assert_eq!(t.in_flight(), 0);
        prop_assert!(input.is_empty());
        if structured {
            let mut rest = &out[..];
            let mut done = 0;
            while !rest.is_empty() {
                prop_assert_eq!(rest.get_u32(), STRUCTURED_REPLY_MAGIC);
                done += usize::from(rest.get_u16() & chunk::FLAG_DONE != 0);
                rest.advance(10);
                let length = rest.get_u32() as usize;
                rest.advance(length);
            }
            prop_assert_eq!(done, replies);
        } else {
            prop_assert!(out.len() >= replies * 16);
        }
    }

    #[test]
    fn garbage_neither_panics_nor_allocates(
        mut bytes in prop::collection::vec(any::<u8>(), 0..400), magic in any::<bool>(), cut in 1usize..64,
    ) {
        if magic && bytes.len() >= 8 {
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        }
        let mut t = start(true, TransmissionLimits::default());
        for next in feed(&mut t, &mut &bytes[..], cut) {
            if let Input::Request { token, .. } = next {
                t.complete(token, Err(VolumeError::Damaged));
            }
        }
        prop_assert!(t.outbox().bytes() < 10_000);
        if let Some((payload, _)) = t.read_target() {
            prop_assert!(payload.len() <= PAYLOAD_BYTES_MAX as usize);
        }
    }
}
