//! The messages of the data plane: one file per exchange. Byte by byte in DESIGN.md, "Messages".

mod collect;
mod copy;
mod copy_hole;
mod damaged;
mod failed;
mod fetch;
mod hello;
mod membership;
mod read;
mod write;

use bytes::Bytes;

pub use collect::{Collect, Collected};
pub use copy::{Copy, CopySource};
pub use copy_hole::CopyHole;
pub use damaged::Damaged;
pub use failed::{Failed, FailureKind};
pub use fetch::Fetch;
pub use hello::{Hello, PeerLimits, Purpose, features};
pub use membership::{Confirm, Join, Joined, Release, ReplicaRole, Seal, Sealed};
pub use read::{Read, ReadAnswer};
pub use write::{Durable, Write, WriteData};

use crate::codec::{DecodeError, Put, Reader};
use crate::frame::{Class, EncodedFrame, Flags, FrameError, FrameHeader};
use crate::ids::{Correlation, Generation, GroupId, GroupIndex, Layer, VolumeId};
use crate::limits::{BLOCK_BYTES, FRAME_BLOCKS_MAX, FRAME_HEADER_BYTES};
use crate::units::BlockRange;

/// A message with what its frame says of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Envelope {
    /// Pairs an answer with its request. Chosen by the side that asks, unique among its requests without an answer.
    pub correlation: Correlation,
    /// What it is scheduled as.
    pub class: Class,
    /// About its answer and handling.
    pub flags: Flags,
    /// What logs call it; zero without the trace bit.
    pub trace_id: u64,
    /// The message.
    pub message: Message,
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident($inner:ty) = $kind:literal,)*) => {
        /// Every message of the data plane. The numbers are final and never reused.
        #[derive(Clone, PartialEq, Eq, Debug)]
        pub enum Message {
            $($(#[$doc])* $name($inner),)*
        }

        impl Message {
            /// The type number in the frame's header.
            pub fn kind(&self) -> u8 {
                match self {
                    $(Message::$name(_) => $kind,)*
                }
            }

            /// What logs and metrics call this type.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Message::$name(_) => stringify!($name),)*
                }
            }

            fn encode(&self, control: &mut Vec<u8>) -> Vec<Bytes> {
                match self {
                    $(Message::$name(message) => message.encode(control),)*
                }
            }

            fn decode(kind: u8, control: &mut Reader<'_>, data: Bytes) -> Result<Option<Message>, DecodeError> {
                Ok(Some(match kind {
                    $($kind => Message::$name(<$inner>::decode(control, data)?),)*
                    _ => return Ok(None),
                }))
            }
        }
    };
}

messages! {
    /// The first message both ways: who speaks, and what it can do.
    Hello(Hello) = 0x01,
    /// Are you there?
    Ping(Empty) = 0x02,
    /// Yes.
    Pong(Empty) = 0x03,
    /// Make a generation durable, and refuse every lower one from then on.
    Seal(Seal) = 0x10,
    /// The generation is durable.
    Sealed(Sealed) = 0x11,
    /// Be a member of a group: create the replica if it is not there.
    Join(Join) = 0x12,
    /// It is a member.
    Joined(Joined) = 0x13,
    /// Are you exactly at this generation?
    Confirm(Confirm) = 0x14,
    /// Yes, since the question was asked.
    Confirmed(Confirm) = 0x15,
    /// The holder is done with the volume: its read grants end at once.
    Release(Release) = 0x16,
    /// The grants have ended.
    Released(Release) = 0x17,
    /// Write a range under one version.
    Write(Write) = 0x20,
    /// A write or copy is durable, or what superseded it is.
    Durable(Durable) = 0x21,
    /// Write blocks as another replica has them.
    Copy(Copy) = 0x22,
    /// Make a range the hole that it is on another replica.
    CopyHole(CopyHole) = 0x23,
    /// Read a range.
    Read(Read) = 0x24,
    /// What was read.
    ReadAnswer(ReadAnswer) = 0x25,
    /// List the versions that a replica holds.
    Collect(Collect) = 0x26,
    /// The list.
    Collected(Collected) = 0x27,
    /// Blocks that the device can't read any more. Nobody has asked, and nobody answers.
    Damaged(Damaged) = 0x28,
    /// Read blocks from another device, and write them as it has them.
    Fetch(Fetch) = 0x29,
    /// A request was not done, and why.
    Failed(Failed) = 0x3f,
}

/// A message without content.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Empty;

impl Empty {
    fn encode(&self, _control: &mut Vec<u8>) -> Vec<Bytes> {
        Vec::new()
    }

    fn decode(_control: &mut Reader<'_>, data: Bytes) -> Result<Empty, DecodeError> {
        no_data(&data)?;
        Ok(Empty)
    }
}

impl Message {
    /// Whether it asks for an answer.
    pub fn is_request(&self) -> bool {
        use Message as M;
        match self {
            M::Ping(_) | M::Seal(_) | M::Join(_) | M::Confirm(_) | M::Release(_) => true,
            M::Write(_) | M::Copy(_) | M::CopyHole(_) | M::Fetch(_) | M::Read(_) | M::Collect(_) => true,
            M::Hello(_) | M::Pong(_) | M::Sealed(_) | M::Joined(_) | M::Confirmed(_) | M::Released(_) => false,
            M::Durable(_) | M::ReadAnswer(_) | M::Collected(_) | M::Damaged(_) | M::Failed(_) => false,
        }
    }
}

impl Envelope {
    /// A message of guest class without trace.
    pub fn new(correlation: Correlation, message: Message) -> Envelope {
        Envelope {
            correlation,
            class: Class::Guest,
            flags: Flags::default(),
            trace_id: 0,
            message,
        }
    }

    /// Its wire form. Panics when a bound of the protocol is broken: that is a bug of the sender.
    pub fn encode(&self) -> EncodedFrame {
        let mut control = Vec::new();
        let data = self.message.encode(&mut control);
        let data_bytes = data.iter().map(Bytes::len).sum::<usize>();
        let header = FrameHeader {
            kind: self.message.kind(),
            class: self.class,
            flags: self.flags,
            control_bytes: 0,
            data_bytes: u32::try_from(data_bytes).expect("a data part is bounded"),
            correlation: self.correlation,
            trace_id: self.trace_id,
            crc: 0,
        };
        EncodedFrame {
            head: header.encode_with_control(&control).into(),
            data,
        }
    }

    /// Reads a whole frame: `head` is the header and the control part, `data` the data part, which stays as it lies in
    /// memory. The checksums of data blocks are not verified here: whoever stores or uses them does that.
    pub fn decode(header: &FrameHeader, head: &[u8], data: Bytes) -> Result<Envelope, FrameError> {
        let kind = header.kind;
        let (start, control) = head
            .split_first_chunk::<FRAME_HEADER_BYTES>()
            .ok_or(FrameError::Header(DecodeError::Truncated))?;
        assert_eq!(
            control.len(),
            header.control_bytes as usize,
            "the caller reads as much as the header says"
        );
        assert_eq!(
            data.len(),
            header.data_bytes as usize,
            "the caller reads as much as the header says"
        );
        header.check_crc(start, control)?;
        let mut reader = Reader::new(control);
        let message = Message::decode(kind, &mut reader, data)
            .and_then(|message| reader.finish().map(|()| message))
            .map_err(|error| FrameError::Control { kind, error })?
            .ok_or(FrameError::Kind(kind))?;
        let (correlation, class, flags, trace_id) = (header.correlation, header.class, header.flags, header.trace_id);
        Ok(Envelope {
            correlation,
            class,
            flags,
            trace_id,
            message,
        })
    }
}

/// What every message about a volume starts with: a device refuses it unless the generation is the highest it has seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Holder {
    /// Which volume.
    pub volume: VolumeId,
    /// The sender's attachment.
    pub generation: Generation,
}

impl Holder {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.volume.0);
        out.put_u32(self.generation.get());
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Holder, DecodeError> {
        let volume = VolumeId(reader.u64()?);
        Ok(Holder {
            volume,
            generation: get_generation(reader)?,
        })
    }

    /// A group of the volume.
    pub fn group(&self, index: GroupIndex) -> GroupId {
        GroupId {
            volume: self.volume,
            index,
        }
    }
}

fn get_generation(reader: &mut Reader<'_>) -> Result<Generation, DecodeError> {
    let number = reader.u32()?;
    Generation::new(number)
        .filter(|g| *g > Generation::NONE)
        .ok_or(DecodeError::Invalid("generation"))
}

/// A place in a group: group, layer and range as `u8`, three zero bytes, and four `u32`.
fn put_place(out: &mut Vec<u8>, index: GroupIndex, layer: Layer, range: BlockRange) {
    out.put_u8(index.0);
    out.put_bytes(&[0; 3]);
    out.put_u32(layer.0);
    out.put_u32(range.chunk().0);
    out.put_u32(range.start());
    out.put_u32(range.count());
}

fn get_place(reader: &mut Reader<'_>) -> Result<(GroupIndex, Layer, BlockRange), DecodeError> {
    let index = get_group_index(reader)?;
    let layer = Layer(reader.u32()?);
    let chunk = crate::ids::ChunkIndex(reader.u32()?);
    let range = BlockRange::new(chunk, reader.u32()?, reader.u32()?).ok_or(DecodeError::Invalid("range"))?;
    Ok((index, layer, range))
}

fn get_group_index(reader: &mut Reader<'_>) -> Result<GroupIndex, DecodeError> {
    let index = reader.u8()?;
    if index >= crate::limits::GROUPS_PER_VOLUME_MAX {
        return Err(DecodeError::Invalid("group"));
    }
    reader.zeroes(3)?;
    Ok(GroupIndex(index))
}

/// A range that carries a block of data, or a state, for each of its blocks.
fn check_blocks_bounded(range: BlockRange) -> Result<(), DecodeError> {
    if range.count() > FRAME_BLOCKS_MAX {
        let (value, limit) = (range.count().into(), FRAME_BLOCKS_MAX.into());
        return Err(DecodeError::TooLarge {
            field: "blocks",
            value,
            limit,
        });
    }
    Ok(())
}

fn no_data(data: &Bytes) -> Result<(), DecodeError> {
    if data.is_empty() {
        Ok(())
    } else {
        Err(DecodeError::Invalid("data length"))
    }
}

fn data_of_blocks(data: &Bytes, blocks: usize) -> Result<(), DecodeError> {
    if data.len() == blocks * BLOCK_BYTES {
        Ok(())
    } else {
        Err(DecodeError::Invalid("data length"))
    }
}

#[cfg(test)]
mod tests;
