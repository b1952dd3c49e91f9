//! The header of a batch's record, and its pages.

use std::fmt;

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::{DeviceId, DeviceUuid, Incarnation};
use cairn_proto::limits::BLOCK_BYTES;

use super::{LogAhead, Record};
use crate::store::crc;
use crate::store::entry::check_place;
use crate::store::limits::RECORD_PAGES_MAX;

const MAGIC: [u8; 8] = *b"CAIRNREC";
const FORMAT: u16 = 1;
const CRC_FIELD: usize = 12;
/// The CRC of the header alone, with both CRC fields taken as zero: the header is in one sector, so it is whole where a
/// record of several sectors is torn.
const HEAD_CRC_FIELD: usize = 188;

/// Bytes of the first page before the records.
pub(in crate::store) const HEADER_BYTES: usize = 192;

/// Bytes of records that fit so many pages.
pub(in crate::store) const fn body_capacity(pages: usize) -> usize {
    pages * BLOCK_BYTES - HEADER_BYTES
}

/// What stands before the records of a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::store) struct BatchHeader {
    /// The device that wrote it.
    pub(in crate::store) device: DeviceId,
    /// The commit.
    pub(in crate::store) seq: u64,
    /// The checkpoint that was durable when it was written.
    pub(in crate::store) checkpoint: u64,
    /// The CRC of the record before it.
    pub(in crate::store) previous_crc: u32,
    /// Where the log goes on.
    pub(in crate::store) ahead: LogAhead,
    /// Where its pages are; the first is its own place.
    pub(in crate::store) places: Vec<u32>,
}

/// What the first page of a record says about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::store) struct Peek {
    /// The commit.
    pub(in crate::store) seq: u64,
    /// Where its pages are.
    pub(in crate::store) places: Vec<u32>,
}

/// Why a block is not the record that was expected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store) enum HeaderError {
    /// It is something else: the log ends before it.
    NotARecord,
    /// Its CRC is right, but its content is not understood.
    NotUnderstood(DecodeError),
}

impl From<DecodeError> for HeaderError {
    fn from(error: DecodeError) -> HeaderError {
        HeaderError::NotUnderstood(error)
    }
}

impl fmt::Display for HeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HeaderError::NotARecord => f.write_str("it is not a record of this log"),
            HeaderError::NotUnderstood(error) => write!(f, "a record is not understood: {error}"),
        }
    }
}

impl BatchHeader {
    /// The record's pages and its CRC. `body` is the encoded records.
    pub(in crate::store) fn encode(&self, body: &[u8], records: usize) -> (Bytes, u32) {
        let pages = self.places.len();
        assert!((1..=RECORD_PAGES_MAX).contains(&pages) && body.len() <= body_capacity(pages));
        let mut head = Vec::with_capacity(HEADER_BYTES);
        head.put_bytes(&MAGIC);
        head.put_u16(FORMAT);
        head.put_u8(pages as u8);
        head.put_u8(0);
        head.put_u32(0);
        head.put_bytes(&self.device.uuid.0);
        head.put_u64(self.device.incarnation.0);
        head.put_u64(self.seq);
        head.put_u64(self.checkpoint);
        head.put_u32(self.previous_crc);
        head.put_u32(body.len() as u32);
        head.put_u32(records as u32);
        head.put_u32(self.ahead.next);
        self.places.iter().for_each(|place| head.put_u32(*place));
        head.resize(AHEAD_FIELD, 0);
        head.put_u32(self.ahead.next_run);
        head.put_u32(self.ahead.run_left);
        head.resize(HEADER_BYTES, 0);
        crc::put(&mut head, HEAD_CRC_FIELD);
        let mut block = BlockBuf::zeroed(pages);
        block[..HEADER_BYTES].copy_from_slice(&head);
        block[HEADER_BYTES..HEADER_BYTES + body.len()].copy_from_slice(body);
        let crc = crc::put(&mut block, CRC_FIELD);
        (block.freeze(), crc)
    }

    /// From the first page alone: the commit and the places of the pages, if it is the first page of a record that this
    /// device wrote. The first of the places is where it should stand. The rest of the record may be torn: see
    /// [`BatchHeader::decode`].
    pub(in crate::store) fn peek(page: &[u8], device: DeviceId, end: u32) -> Option<Peek> {
        let head = page.get(..HEADER_BYTES)?;
        if !head.starts_with(&MAGIC) || !head_crc_matches(head) {
            return None;
        }
        let mut reader = Reader::new(&head[MAGIC.len()..]);
        let format = reader.u16().ok()?;
        let pages = usize::from(reader.u8().ok()?);
        reader.bytes(5).ok()?;
        let written_by = DeviceId {
            uuid: DeviceUuid(reader.array().ok()?),
            incarnation: Incarnation(reader.u64().ok()?),
        };
        let seq = reader.u64().ok()?;
        reader.bytes(24).ok()?;
        if format != FORMAT || written_by != device || !(1..=RECORD_PAGES_MAX).contains(&pages) {
            return None;
        }
        let places = (0..pages).map(|_| reader.u32().ok()).collect::<Option<Vec<_>>>()?;
        let valid = places.iter().all(|place| check_place(*place, end).is_ok());
        valid.then_some(Peek { seq, places })
    }

    /// Reads a whole record. Returns its CRC too. `end` is the first block after the space.
    pub(in crate::store) fn decode(pages: &[u8], end: u32) -> Result<(BatchHeader, u32, Vec<Record>), HeaderError> {
        let valid = pages.len().is_multiple_of(BLOCK_BYTES)
            && (1..=RECORD_PAGES_MAX).contains(&(pages.len() / BLOCK_BYTES))
            && pages.starts_with(&MAGIC)
            && crc::matches(pages, CRC_FIELD)
            && head_crc_matches(&pages[..HEADER_BYTES]);
        if !valid {
            return Err(HeaderError::NotARecord);
        }
        let mut reader = Reader::new(pages);
        reader.array::<8>()?;
        if reader.u16()? != FORMAT {
            return Err(DecodeError::Invalid("format").into());
        }
        let count = usize::from(reader.u8()?);
        reader.zeroes(1)?;
        let crc = reader.u32()?;
        let device = DeviceId {
            uuid: DeviceUuid(reader.array()?),
            incarnation: Incarnation(reader.u64()?),
        };
        let (seq, checkpoint, previous_crc) = (reader.u64()?, reader.u64()?, reader.u32()?);
        let body = reader.count("body", body_capacity(count.clamp(1, RECORD_PAGES_MAX)))?;
        let records = reader.u32()?;
        let next = reader.u32()?;
        if count * BLOCK_BYTES != pages.len() {
            return Err(DecodeError::Invalid("pages").into());
        }
        let places: Vec<u32> = (0..count).map(|_| reader.u32()).collect::<Result<_, _>>()?;
        places.iter().try_for_each(|place| check_place(*place, end))?;
        reader.zeroes(AHEAD_FIELD - PLACES_FIELD - count * 4)?;
        let (next_run, run_left) = (reader.u32()?, reader.u32()?);
        let ahead = LogAhead {
            next,
            run_left,
            next_run,
        };
        ahead.check(end)?;
        reader.zeroes(HEAD_CRC_FIELD - AHEAD_FIELD - 8)?;
        reader.u32()?;
        let records = decode_records(reader.bytes(body)?, records, end)?;
        reader.zeroes(reader.remaining())?;
        let header = BatchHeader {
            device,
            seq,
            checkpoint,
            previous_crc,
            ahead,
            places,
        };
        Ok((header, crc, records))
    }
}

fn decode_records(body: &[u8], count: u32, end: u32) -> Result<Vec<Record>, DecodeError> {
    let mut reader = Reader::new(body);
    let mut records = Vec::new();
    while reader.remaining() > 0 {
        records.push(Record::decode(&mut reader, end)?);
    }
    if records.len() != count as usize {
        return Err(DecodeError::Invalid("number of records"));
    }
    Ok(records)
}

/// The CRC of all pages is put last and covers the header's; so the header's takes it for zero.
fn head_crc_matches(head: &[u8]) -> bool {
    let mut head: [u8; HEADER_BYTES] = head.try_into().expect("a whole header");
    head[CRC_FIELD..CRC_FIELD + 4].fill(0);
    crc::matches(&head, HEAD_CRC_FIELD)
}

const PLACES_FIELD: usize = 72;
const AHEAD_FIELD: usize = PLACES_FIELD + RECORD_PAGES_MAX * 4;
const _: () = assert!(AHEAD_FIELD + 8 <= HEAD_CRC_FIELD && HEAD_CRC_FIELD + 4 == HEADER_BYTES);
