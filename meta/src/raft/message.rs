//! How Raft's own records travel and lie: entries, hard states, snapshots, messages. Little-endian, through the
//! project's codec, so that neither wire nor disk depends on the format of a library.
//!
//! - entry: `u8` kind (0 normal, 1 change of members), `u64` term, `u64` index, `u32` count and bytes of data, `u32` count
//!   and bytes of context;
//! - snapshot: `u64` index, `u64` term, `u32` count and `u64` ids of voters, the same of learners, `u32` count and bytes of
//!   the state;
//! - message: `u8` format (1), `u8` kind, `u64` to, from, term, log term, index, commit, commit term, request snapshot,
//!   reject hint, `u8` reject, `i64` priority, context (as above), `u32` count of entries and those, `u8` whether there is
//!   a snapshot, and that.

use bytes::Bytes;
use cairn_proto::codec::{DecodeError, Put, Reader};
use raft::eraftpb::{Entry, EntryType, HardState, Message, MessageType, Snapshot};

use crate::limits::{
    COMMAND_BYTES_MAX, MESSAGE_ENTRIES_MAX, META_MEMBERS_MAX, RAFT_MESSAGE_BYTES_MAX, STATE_BYTES_MAX,
};

/// The format of messages.
pub const MESSAGE_FORMAT: u8 = 1;
/// Bytes of an entry's context at the most: a ticket, or a command that changes the members.
const CONTEXT_BYTES_MAX: usize = 4096;

/// Kinds of messages that travel, by number. What Raft only tells itself has no number, so nobody can send it.
const KINDS: [(u8, MessageType); 13] = [
    (1, MessageType::MsgAppend),
    (2, MessageType::MsgAppendResponse),
    (3, MessageType::MsgRequestVote),
    (4, MessageType::MsgRequestVoteResponse),
    (5, MessageType::MsgSnapshot),
    (6, MessageType::MsgHeartbeat),
    (7, MessageType::MsgHeartbeatResponse),
    (8, MessageType::MsgTransferLeader),
    (9, MessageType::MsgTimeoutNow),
    (10, MessageType::MsgReadIndex),
    (11, MessageType::MsgReadIndexResp),
    (12, MessageType::MsgRequestPreVote),
    (13, MessageType::MsgRequestPreVoteResponse),
];

fn put_block(out: &mut Vec<u8>, bytes: &[u8]) {
    out.put_u32(bytes.len() as u32);
    out.put_bytes(bytes);
}

fn block(reader: &mut Reader<'_>, field: &'static str, limit: usize) -> Result<Bytes, DecodeError> {
    let count = reader.count(field, limit)?;
    Ok(Bytes::copy_from_slice(reader.bytes(count)?))
}

/// Appends an entry.
pub fn encode_entry(out: &mut Vec<u8>, entry: &Entry) {
    out.put_u8(match entry.get_entry_type() {
        EntryType::EntryNormal => 0,
        EntryType::EntryConfChange => 1,
        EntryType::EntryConfChangeV2 => 2,
    });
    out.put_u64(entry.term);
    out.put_u64(entry.index);
    put_block(out, &entry.data);
    put_block(out, &entry.context);
}

/// Reads an entry.
///
/// # Errors
/// It is damaged.
pub fn decode_entry(reader: &mut Reader<'_>) -> Result<Entry, DecodeError> {
    let mut entry = Entry::default();
    entry.set_entry_type(match reader.u8()? {
        0 => EntryType::EntryNormal,
        1 => EntryType::EntryConfChange,
        2 => EntryType::EntryConfChangeV2,
        _ => return Err(DecodeError::Invalid("kind of entry")),
    });
    entry.term = reader.u64()?;
    entry.index = reader.u64()?;
    entry.data = block(reader, "data", COMMAND_BYTES_MAX)?;
    entry.context = block(reader, "context", CONTEXT_BYTES_MAX)?;
    Ok(entry)
}

/// Appends a hard state: `u64` term, `u64` vote, `u64` commit.
pub fn encode_hard_state(out: &mut Vec<u8>, hard_state: &HardState) {
    out.put_u64(hard_state.term);
    out.put_u64(hard_state.vote);
    out.put_u64(hard_state.commit);
}

/// Reads a hard state.
///
/// # Errors
/// It ends too early.
pub fn decode_hard_state(reader: &mut Reader<'_>) -> Result<HardState, DecodeError> {
    Ok(HardState {
        term: reader.u64()?,
        vote: reader.u64()?,
        commit: reader.u64()?,
        ..HardState::default()
    })
}

/// Appends a snapshot.
pub fn encode_snapshot(out: &mut Vec<u8>, snapshot: &Snapshot) {
    let metadata = snapshot.get_metadata();
    out.put_u64(metadata.index);
    out.put_u64(metadata.term);
    let conf_state = metadata.get_conf_state();
    for ids in [conf_state.get_voters(), conf_state.get_learners()] {
        out.put_u32(ids.len() as u32);
        for id in ids {
            out.put_u64(*id);
        }
    }
    put_block(out, &snapshot.data);
}

/// Reads a snapshot.
///
/// # Errors
/// It is damaged.
pub fn decode_snapshot(reader: &mut Reader<'_>) -> Result<Snapshot, DecodeError> {
    let mut snapshot = Snapshot::default();
    let metadata = snapshot.mut_metadata();
    metadata.index = reader.u64()?;
    metadata.term = reader.u64()?;
    let conf_state = metadata.mut_conf_state();
    for ids in [&mut conf_state.voters, &mut conf_state.learners] {
        // A member may be on its way in while another is on its way out.
        for _ in 0..reader.count("members", META_MEMBERS_MAX + 1)? {
            ids.push(reader.u64()?);
        }
    }
    snapshot.data = block(reader, "state", STATE_BYTES_MAX)?;
    Ok(snapshot)
}

/// A message as it travels. `None` for what Raft only tells itself.
pub fn encode_message(message: &Message) -> Option<Vec<u8>> {
    let (kind, _) = KINDS.iter().find(|(_, kind)| *kind == message.get_msg_type())?;
    let mut out = vec![MESSAGE_FORMAT, *kind];
    for number in [
        message.to,
        message.from,
        message.term,
        message.log_term,
        message.index,
        message.commit,
        message.commit_term,
        message.request_snapshot,
        message.reject_hint,
    ] {
        out.put_u64(number);
    }
    out.put_u8(u8::from(message.reject));
    out.put_bytes(&message.priority.to_le_bytes());
    put_block(&mut out, &message.context);
    out.put_u32(message.entries.len() as u32);
    for entry in message.get_entries() {
        encode_entry(&mut out, entry);
    }
    let snapshot = message.get_snapshot();
    out.put_u8(u8::from(!snapshot.is_empty()));
    if !snapshot.is_empty() {
        encode_snapshot(&mut out, snapshot);
    }
    Some(out)
}

/// Reads a message.
///
/// # Errors
/// It is damaged, of a later version, or of a kind that does not travel.
pub fn decode_message(bytes: &[u8]) -> Result<Message, DecodeError> {
    if bytes.len() > RAFT_MESSAGE_BYTES_MAX {
        let (value, limit) = (bytes.len() as u64, RAFT_MESSAGE_BYTES_MAX as u64);
        return Err(DecodeError::TooLarge {
            field: "message",
            value,
            limit,
        });
    }
    let mut reader = Reader::new(bytes);
    if reader.u8()? != MESSAGE_FORMAT {
        return Err(DecodeError::Invalid("format of message"));
    }
    let number = reader.u8()?;
    let kind = KINDS.iter().find(|(kind, _)| *kind == number);
    let (_, kind) = kind.ok_or(DecodeError::Invalid("kind of message"))?;
    let mut message = Message::default();
    message.set_msg_type(*kind);
    message.to = reader.u64()?;
    message.from = reader.u64()?;
    message.term = reader.u64()?;
    message.log_term = reader.u64()?;
    message.index = reader.u64()?;
    message.commit = reader.u64()?;
    message.commit_term = reader.u64()?;
    message.request_snapshot = reader.u64()?;
    message.reject_hint = reader.u64()?;
    message.reject = reader.bool("reject")?;
    message.priority = i64::from_le_bytes(reader.array()?);
    message.context = block(&mut reader, "context", CONTEXT_BYTES_MAX)?;
    let mut entries = Vec::new();
    for _ in 0..reader.count("entries", MESSAGE_ENTRIES_MAX)? {
        entries.push(decode_entry(&mut reader)?);
    }
    let in_order = entries
        .windows(2)
        .all(|pair| pair[0].index.checked_add(1) == Some(pair[1].index));
    if !in_order {
        return Err(DecodeError::Invalid("order of entries"));
    }
    message.set_entries(entries.into());
    if reader.bool("presence of a snapshot")? {
        message.set_snapshot(decode_snapshot(&mut reader)?);
    }
    reader.finish()?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(kind: bool, term: u64, index: u64, data: Vec<u8>) -> Entry {
        let mut entry = Entry::default();
        entry.set_entry_type(if kind {
            EntryType::EntryConfChange
        } else {
            EntryType::EntryNormal
        });
        entry.term = term;
        entry.index = index;
        entry.context = Bytes::copy_from_slice(&data[..data.len() / 2]);
        entry.data = data.into();
        entry
    }

    proptest! {
        #[test]
        fn messages_round_trip(
            kind in 0..KINDS.len(), numbers in any::<[u64; 9]>(), reject: bool, priority: i64, context: Vec<u8>,
            entries in proptest::collection::vec((any::<bool>(), any::<u64>(), any::<Vec<u8>>()), 0..5),
            first in 1..1000u64, state: Vec<u8>, index in 0..3u64,
        ) {
            let mut message = Message::default();
            message.set_msg_type(KINDS[kind].1);
            [
                message.to, message.from, message.term, message.log_term, message.index, message.commit,
                message.commit_term, message.request_snapshot, message.reject_hint,
            ] = numbers;
            message.reject = reject;
            message.priority = priority;
            message.context = context.into();
            let entries = entries.into_iter().zip(first..);
            let entries: Vec<Entry> = entries.map(|((kind, term, data), index)| entry(kind, term, index, data)).collect();
            message.set_entries(entries.into());
            if index > 0 {
                let snapshot = message.mut_snapshot();
                snapshot.data = state.into();
                snapshot.mut_metadata().index = index;
                snapshot.mut_metadata().mut_conf_state().set_voters(vec![1, 2, 3]);
            }
            let bytes = encode_message(&message).unwrap();
            prop_assert_eq!(decode_message(&bytes), Ok(message));
            for cut in 0..bytes.len() {
                prop_assert!(decode_message(&bytes[..cut]).is_err());
            }
        }

        #[test]
        fn nonsense_is_refused_without_a_panic(mut bytes: Vec<u8>) {
            let _ = decode_message(&bytes);
            if bytes.len() > 2 {
                (bytes[0], bytes[1]) = (MESSAGE_FORMAT, 1);
                let _ = decode_message(&bytes);
            }
        }
    }

    #[test]
    fn what_raft_tells_itself_does_not_travel() {
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgHup);
        assert_eq!(encode_message(&message), None);
    }
}
