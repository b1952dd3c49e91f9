//! The frame: a fixed 64-byte header, a control part, data. Byte by byte in DESIGN.md, "Frame".
//!
//! A receiver reads the header, checks it with [`FrameHeader::decode`] (which bounds both lengths before anything is
//! allocated), reads the control part, reads the data into block-aligned memory, and gives all three to
//! [`Envelope::decode`](crate::message::Envelope::decode).

use std::fmt;

use bytes::Bytes;

use crate::codec::{DecodeError, Put, Reader};
use crate::ids::Correlation;
use crate::limits::{BLOCK_BYTES, FRAME_CONTROL_BYTES_MAX, FRAME_DATA_BYTES_MAX, FRAME_HEADER_BYTES};

/// The first four bytes of every frame.
pub const FRAME_MAGIC: [u8; 4] = *b"CRNF";
/// The version of the frame's layout. What messages mean is versioned by the hello.
pub const FRAME_VERSION: u8 = 1;

/// What a frame is scheduled as.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(u8)]
pub enum Class {
    /// Guest I/O and what it waits for.
    #[default]
    Guest = 0,
    /// Copies between replicas.
    Repair = 1,
    /// Verification in the background.
    Scrub = 2,
}

/// The bits of a frame that are about its answer or its handling.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flags {
    /// Every process that handles it logs what it does, under the trace id.
    pub trace: bool,
    /// On an answer: the member grants the holder of the volume a time `T` to read by itself (rule 8).
    pub grant: bool,
}

/// The header of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// The type of the message.
    pub kind: u8,
    /// What it is scheduled as.
    pub class: Class,
    /// About its answer and handling.
    pub flags: Flags,
    /// Bytes of the control part.
    pub control_bytes: u32,
    /// Bytes of the data part: whole blocks.
    pub data_bytes: u32,
    /// Pairs an answer with its request.
    pub correlation: Correlation,
    /// What logs call it; zero without the trace bit.
    pub trace_id: u64,
    /// Over the first 60 bytes of the header and the control part.
    pub crc: u32,
}

/// Bytes that are no frame of this protocol. The connection they came from is of no use any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameError {
    /// They do not start as a frame does.
    Magic([u8; 4]),
    /// A frame of a version that is not known here.
    Version(u8),
    /// The header's CRC does not match.
    Crc {
        /// As it stands in the header.
        stored: u32,
        /// As it was computed.
        computed: u32,
    },
    /// A type of message that is not known here.
    Kind(u8),
    /// A part is longer than allowed.
    TooLong {
        /// Which part.
        part: &'static str,
        /// Its length.
        bytes: u32,
        /// The most that is allowed.
        limit: u32,
    },
    /// The data part is not whole blocks, or not what the control part says.
    DataLength(u32),
    /// The control part can't be decoded.
    Control {
        /// Of which type of message.
        kind: u8,
        /// Why.
        error: DecodeError,
    },
    /// A field of the header is not allowed.
    Header(DecodeError),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameError::Magic(bytes) => write!(f, "not a Cairn peer: the frame starts with {bytes:02x?}"),
            FrameError::Version(version) => {
                write!(
                    f,
                    "frame version {version} is not known here, only {FRAME_VERSION}: upgrade the older side"
                )
            }
            FrameError::Crc { stored, computed } => {
                write!(f, "damaged on the way: CRC is {stored:08x}, content has {computed:08x}")
            }
            FrameError::Kind(kind) => write!(f, "message type 0x{kind:02x} is not known here"),
            FrameError::TooLong { part, bytes, limit } => {
                write!(f, "the {part} part is {bytes} bytes long, at most {limit} are allowed")
            }
            FrameError::DataLength(bytes) => write!(f, "{bytes} bytes of data do not fit the message"),
            FrameError::Control { kind, error } => write!(f, "message type 0x{kind:02x}: {error}"),
            FrameError::Header(error) => write!(f, "frame header: {error}"),
        }
    }
}

impl std::error::Error for FrameError {}

/// A frame ready to be sent: header and control in one piece, then the data as it lies in memory.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    /// Header and control part.
    pub head: Bytes,
    /// The data part, in pieces of whole blocks.
    pub data: Vec<Bytes>,
}

impl EncodedFrame {
    /// Bytes of all of it.
    pub fn len(&self) -> usize {
        self.head.len() + self.data.iter().map(Bytes::len).sum::<usize>()
    }

    /// A frame is never empty.
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl FrameHeader {
    /// Reads a header and checks everything but the CRC, which needs the control part too.
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<FrameHeader, FrameError> {
        let header = FrameHeader::decode_fields(bytes)?;
        let too_long = |part, bytes, limit| Err(FrameError::TooLong { part, bytes, limit });
        if header.control_bytes > FRAME_CONTROL_BYTES_MAX as u32 {
            return too_long("control", header.control_bytes, FRAME_CONTROL_BYTES_MAX as u32);
        }
        if header.data_bytes > FRAME_DATA_BYTES_MAX as u32 {
            return too_long("data", header.data_bytes, FRAME_DATA_BYTES_MAX as u32);
        }
        if !(header.data_bytes as usize).is_multiple_of(BLOCK_BYTES) {
            return Err(FrameError::DataLength(header.data_bytes));
        }
        Ok(header)
    }

    fn decode_fields(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<FrameHeader, FrameError> {
        let mut reader = Reader::new(bytes);
        let magic = reader.array().map_err(FrameError::Header)?;
        if magic != FRAME_MAGIC {
            return Err(FrameError::Magic(magic));
        }
        // The version stands before everything that a later version may lay out anew.
        let version = reader.u8().map_err(FrameError::Header)?;
        if version != FRAME_VERSION {
            return Err(FrameError::Version(version));
        }
        FrameHeader::decode_version_1(&mut reader).map_err(FrameError::Header)
    }

    fn decode_version_1(reader: &mut Reader<'_>) -> Result<FrameHeader, DecodeError> {
        let kind = reader.u8()?;
        let class = match reader.u8()? {
            0 => Class::Guest,
            1 => Class::Repair,
            2 => Class::Scrub,
            _ => return Err(DecodeError::Invalid("class")),
        };
        let flags = match reader.u8()? {
            bits @ 0..=3 => Flags {
                trace: bits & 1 != 0,
                grant: bits & 2 != 0,
            },
            _ => return Err(DecodeError::Invalid("flags")),
        };
        let (control_bytes, data_bytes) = (reader.u32()?, reader.u32()?);
        let (correlation, trace_id) = (Correlation(reader.u64()?), reader.u64()?);
        reader.zeroes(28)?;
        Ok(FrameHeader {
            kind,
            class,
            flags,
            control_bytes,
            data_bytes,
            correlation,
            trace_id,
            crc: reader.u32()?,
        })
    }

    /// Appends the header, with the CRC over itself and `control`.
    pub(crate) fn encode_with_control(mut self, control: &[u8]) -> Vec<u8> {
        self.control_bytes = u32::try_from(control.len()).expect("a control part is bounded");
        assert!(
            control.len() <= FRAME_CONTROL_BYTES_MAX,
            "control part of {} bytes",
            control.len()
        );
        assert!(
            self.data_bytes as usize <= FRAME_DATA_BYTES_MAX,
            "data part of {} bytes",
            self.data_bytes
        );
        let mut head = Vec::with_capacity(FRAME_HEADER_BYTES + control.len());
        head.put_bytes(&FRAME_MAGIC);
        head.put_u8(FRAME_VERSION);
        head.put_u8(self.kind);
        head.put_u8(self.class as u8);
        head.put_u8(u8::from(self.flags.trace) | u8::from(self.flags.grant) << 1);
        head.put_u32(self.control_bytes);
        head.put_u32(self.data_bytes);
        head.put_u64(self.correlation.0);
        head.put_u64(self.trace_id);
        head.put_bytes(&[0; 28]);
        head.put_u32(frame_crc(&head, control));
        assert_eq!(head.len(), FRAME_HEADER_BYTES, "a header has a fixed length");
        head.put_bytes(control);
        head
    }

    /// Checks the CRC over the header as it came and its control part.
    pub(crate) fn check_crc(&self, head: &[u8; FRAME_HEADER_BYTES], control: &[u8]) -> Result<(), FrameError> {
        let computed = frame_crc(&head[..FRAME_HEADER_BYTES - 4], control);
        if computed == self.crc {
            Ok(())
        } else {
            Err(FrameError::Crc {
                stored: self.crc,
                computed,
            })
        }
    }
}

fn frame_crc(header_start: &[u8], control: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header_start);
    hasher.update(control);
    hasher.finalize()
}
