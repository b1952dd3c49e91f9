//! The whole state as bytes: what a Raft snapshot carries and a snapshot file holds.
//!
//! `b"CAIRNMET"`, `u16` format (1), the fields in the order below, and a `u32` CRC-32 over all of that.

use cairn_proto::codec::{DecodeError, Put, Reader};

use crate::limits::STATE_BYTES_MAX;
use crate::state::codec::Code;
use crate::state::model::State;

const MAGIC: &[u8; 8] = b"CAIRNMET";
/// The format that this program writes.
pub const STATE_FORMAT: u16 = 1;

/// Why bytes are no state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StateError {
    /// They are something else.
    NotAState,
    /// A later version wrote them.
    Format(u16),
    /// Their checksum does not match.
    Checksum,
    /// Their checksum matches, and still they can't be read.
    Damaged(DecodeError),
    /// What they say contradicts itself.
    Inconsistent(String),
}

impl std::fmt::Display for StateError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StateError::NotAState => f.write_str("this is not the state of a metadata server"),
            StateError::Format(format) => write!(
                f,
                "the state has format {format}, this version reads {STATE_FORMAT}: run the version that wrote it"
            ),
            StateError::Checksum => f.write_str("the state is damaged: its checksum does not match"),
            StateError::Damaged(error) => write!(f, "the state can't be read: {error}"),
            StateError::Inconsistent(what) => write!(f, "the state contradicts itself: {what}"),
        }
    }
}

impl std::error::Error for StateError {}

impl From<DecodeError> for StateError {
    fn from(error: DecodeError) -> StateError {
        StateError::Damaged(error)
    }
}

impl State {
    /// Equal states give equal bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.put_u16(STATE_FORMAT);
        self.cluster.encode(&mut out);
        self.feature_level.encode(&mut out);
        self.last_volume.encode(&mut out);
        self.last_node.encode(&mut out);
        self.deletions.encode(&mut out);
        self.releases.encode(&mut out);
        self.last_member.encode(&mut out);
        self.volumes.encode(&mut out);
        self.groups.encode(&mut out);
        self.devices.encode(&mut out);
        self.nodes.encode(&mut out);
        self.members.encode(&mut out);
        self.last_event.encode(&mut out);
        self.events.encode(&mut out);
        out.put_u32(crc32fast::hash(&out));
        assert!(
            out.len() <= STATE_BYTES_MAX,
            "a state of {} bytes: the bounds of its parts are wrong",
            out.len()
        );
        out
    }

    /// # Errors
    /// The bytes are not what [`Self::encode`] of this or an earlier version wrote.
    pub fn decode(bytes: &[u8]) -> Result<State, StateError> {
        if !bytes.starts_with(MAGIC) {
            return Err(StateError::NotAState);
        }
        let (body, checksum) = bytes.split_last_chunk::<4>().ok_or(DecodeError::Truncated)?;
        let mut reader = Reader::new(body.get(MAGIC.len()..).ok_or(DecodeError::Truncated)?);
        let format = reader.u16()?;
        if format != STATE_FORMAT {
            return Err(StateError::Format(format));
        }
        if crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
            return Err(StateError::Checksum);
        }
        let mut state = State {
            cluster: Code::decode(&mut reader)?,
            feature_level: Code::decode(&mut reader)?,
            last_volume: Code::decode(&mut reader)?,
            last_node: Code::decode(&mut reader)?,
            deletions: Code::decode(&mut reader)?,
            releases: Code::decode(&mut reader)?,
            last_member: Code::decode(&mut reader)?,
            volumes: Code::decode(&mut reader)?,
            groups: Code::decode(&mut reader)?,
            devices: Code::decode(&mut reader)?,
            nodes: Code::decode(&mut reader)?,
            members: Code::decode(&mut reader)?,
            last_event: Code::decode(&mut reader)?,
            events: Code::decode(&mut reader)?,
            names: Default::default(),
        };
        reader.finish()?;
        state.names = state
            .volumes
            .iter()
            .map(|(id, volume)| (volume.name.clone(), *id))
            .collect();
        if let Some(id) = state.groups.keys().find(|id| !state.volumes.contains_key(&id.volume)) {
            return Err(StateError::Inconsistent(format!("group {id} has no volume")));
        }
        state.check_invariants().map_err(StateError::Inconsistent)?;
        Ok(state)
    }
}
