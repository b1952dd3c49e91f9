//! Replies, simple and structured.

use bytes::{BufMut, Bytes};
use cairn_proto::limits::BLOCK_BYTES;

use super::wire::{
    BASE_ALLOCATION_ID, Errno, SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO, STRUCTURED_REPLY_MAGIC, chunk,
};
use crate::outbox::Outbox;
use crate::volume::api::{StatusExtent, VolumeError, VolumeReply};

/// What is kept of a request to shape its reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ReplyShape {
    Read {
        cookie: u64,
        offset: u64,
        length: u32,
        whole: bool,
    },
    BlockStatus {
        cookie: u64,
        length: u32,
        one: bool,
    },
    Done {
        cookie: u64,
    },
}

impl ReplyShape {
    pub(super) fn cookie(&self) -> u64 {
        match self {
            ReplyShape::Read { cookie, .. } | ReplyShape::BlockStatus { cookie, .. } | ReplyShape::Done { cookie } => {
                *cookie
            }
        }
    }
}

/// Writes replies in the form that was negotiated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Replier {
    pub(super) structured: bool,
}

impl Replier {
    /// Queues the reply. A result that does not answer the request is a bug of the volume, and panics.
    pub(super) fn reply(self, out: &mut Outbox, shape: ReplyShape, result: Result<VolumeReply, VolumeError>) {
        match (shape, result) {
            (_, Err(error)) => self.error(out, shape.cookie(), errno(&error), &error.to_string()),
            (ReplyShape::Done { cookie }, Ok(VolumeReply::Done)) => self.done(out, cookie),
            (
                ReplyShape::Read {
                    cookie,
                    offset,
                    length,
                    whole,
                },
                Ok(VolumeReply::Read(pieces)),
            ) => {
                let got: usize = pieces.iter().map(Bytes::len).sum();
                assert_eq!(got, length as usize, "a read of {length} bytes at {offset} gave {got}");
                if self.structured {
                    read_chunks(out, cookie, offset, pieces, whole);
                } else {
                    put_simple(out, 0, cookie);
                    pieces.into_iter().for_each(|piece| out.push(piece));
                }
            }
            (ReplyShape::BlockStatus { cookie, length, one }, Ok(VolumeReply::BlockStatus(extents))) => {
                block_status(out, cookie, length, &extents, one);
            }
            (shape, Ok(result)) => panic!("{shape:?} was answered with {result:?}"),
        }
    }

    /// Success without data.
    pub(super) fn done(self, out: &mut Outbox, cookie: u64) {
        if self.structured {
            put_chunk(out, chunk::FLAG_DONE, chunk::NONE, cookie, 0, &[]);
        } else {
            put_simple(out, 0, cookie);
        }
    }

    pub(super) fn error(self, out: &mut Outbox, cookie: u64, errno: Errno, words: &str) {
        if !self.structured {
            return put_simple(out, errno as u32, cookie);
        }
        let words = words.as_bytes();
        let words = &words[..words.len().min(super::limits::STRING_BYTES_MAX)];
        let mut head = Vec::with_capacity(6 + words.len());
        head.put_u32(errno as u32);
        head.put_u16(words.len() as u16);
        head.put_slice(words);
        put_chunk(out, chunk::FLAG_DONE, chunk::ERROR, cookie, head.len(), &head);
    }
}

fn errno(error: &VolumeError) -> Errno {
    match error {
        VolumeError::Invalid(_) => Errno::Invalid,
        VolumeError::NoSpace => Errno::NoSpace,
        // The client must not come back by itself to take the volume from its new holder, as it may after a shutdown.
        VolumeError::Fenced | VolumeError::Gone(_) | VolumeError::Damaged => Errno::Io,
        VolumeError::Shutdown => Errno::Shutdown,
    }
}

fn put_simple(out: &mut Outbox, errno: u32, cookie: u64) {
    let mut head = [0; 16];
    head[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    head[4..8].copy_from_slice(&errno.to_be_bytes());
    head[8..].copy_from_slice(&cookie.to_be_bytes());
    out.push_small(&head);
}

/// A chunk whose payload starts with `head`; the rest of its `length` bytes is to be queued behind it.
fn put_chunk(out: &mut Outbox, flags: u16, kind: u16, cookie: u64, length: usize, head: &[u8]) {
    let mut header = [0; 20];
    header[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..].copy_from_slice(&(length as u32).to_be_bytes());
    out.push_small(&header);
    out.push_small(head);
}

/// Pieces of zeroes become holes, unless one chunk must carry everything. Looking is cheap beside sending: it ends at the
/// first block that is not zero.
fn read_chunks(out: &mut Outbox, cookie: u64, mut offset: u64, pieces: Vec<Bytes>, whole: bool) {
    let mut runs: Vec<(bool, usize, Vec<Bytes>)> = Vec::with_capacity(1);
    for piece in pieces.into_iter().filter(|piece| !piece.is_empty()) {
        let hole = !whole && piece.len() >= BLOCK_BYTES && is_zero(&piece);
        match runs.last_mut() {
            Some((last, length, run)) if *last == hole => {
                *length += piece.len();
                run.push(piece);
            }
            _ => runs.push((hole, piece.len(), vec![piece])),
        }
    }
    let last = runs.len() - 1;
    for (index, (hole, length, run)) in runs.into_iter().enumerate() {
        let flags = if index == last { chunk::FLAG_DONE } else { 0 };
        if hole {
            let mut head = [0; 12];
            head[..8].copy_from_slice(&offset.to_be_bytes());
            head[8..].copy_from_slice(&(length as u32).to_be_bytes());
            put_chunk(out, flags, chunk::OFFSET_HOLE, cookie, head.len(), &head);
        } else {
            put_chunk(
                out,
                flags,
                chunk::OFFSET_DATA,
                cookie,
                8 + length,
                &offset.to_be_bytes(),
            );
            run.into_iter().for_each(|piece| out.push(piece));
        }
        offset += length as u64;
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    const ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    bytes.chunks(BLOCK_BYTES).all(|block| *block == ZEROES[..block.len()])
}

/// Neighbours of one kind are one extent; nothing is told beyond the end of the request.
fn block_status(out: &mut Outbox, cookie: u64, length: u32, extents: &[StatusExtent], one: bool) {
    let mut merged: Vec<(u32, bool)> = Vec::new();
    let mut left = length;
    for extent in extents {
        assert!(extent.length > 0, "an empty extent in {extents:?}");
        let length = u32::try_from(extent.length).unwrap_or(u32::MAX).min(left);
        if length == 0 {
            break;
        }
        left -= length;
        match merged.last_mut() {
            Some((run, data)) if *data == extent.data => *run += length,
            Some(_) if one => break,
            _ => merged.push((length, extent.data)),
        }
    }
    assert!(!merged.is_empty(), "a block status of {length} bytes without an extent");
    let mut payload = Vec::with_capacity(4 + merged.len() * 8);
    payload.put_u32(BASE_ALLOCATION_ID);
    for (length, data) in merged {
        payload.put_u32(length);
        payload.put_u32(if data { 0 } else { STATE_HOLE | STATE_ZERO });
    }
    put_chunk(
        out,
        chunk::FLAG_DONE,
        chunk::BLOCK_STATUS,
        cookie,
        payload.len(),
        &payload,
    );
}
