//! The commands of the state machine and their encoding, final since format 1.
//!
//! `u8` format (1), `u16` tag, `u64` the proposer's Unix time in milliseconds, then the fields of the record. A command
//! that needs other fields gets a new tag; tags are never used again. A tag that is not known is refused: at the
//! proposer as an error, in the log as a reason to stop, since skipping it would let members differ.

use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::*;

use crate::limits::COMMAND_BYTES_MAX;
use crate::state::codec::{Code, record};
use crate::state::model::{FailureDomain, Spread};

/// The format of every command so far.
pub const COMMAND_FORMAT: u8 = 1;

/// A volume, by id or by name. Encoded as a byte 1 or 2 and the one or the other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Selector {
    /// By id.
    Id(VolumeId),
    /// By name.
    Name(String),
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Selector::Id(id) => write!(f, "with id {id}"),
            Selector::Name(name) => write!(f, "`{name}`"),
        }
    }
}

impl Code for Selector {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Selector::Id(id) => {
                out.push(1);
                id.encode(out);
            }
            Selector::Name(name) => {
                out.push(2);
                name.encode(out);
            }
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match reader.u8()? {
            1 => Code::decode(reader).map(Selector::Id),
            2 => Code::decode(reader).map(Selector::Name),
            _ => Err(DecodeError::Invalid("selector")),
        }
    }
}

record! {
    /// Gives the cluster its id. The second one changes nothing.
    pub struct InitCluster {
        /// Drawn at random by the proposer.
        pub cluster: ClusterId,
        /// Where the cluster begins.
        pub feature_level: u32,
    }
}

record! {
    /// A device as its node registers it.
    pub struct DeviceRegistration {
        /// Which one.
        pub id: DeviceId,
        /// `host:port`, best first.
        pub addresses: Vec<String>,
        /// Bytes that it can hold.
        pub capacity_bytes: u64,
        /// Bytes that are taken.
        pub used_bytes: u64,
        /// As recovered.
        pub commit_seq: CommitSeq,
        /// What cluster it belongs to, if any yet.
        pub cluster: Option<ClusterId>,
        /// The proposer holds the node that it was registered from for dead, so it may be taken over.
        pub displace: bool,
    }
}

record! {
    /// Makes a node and its devices known.
    pub struct RegisterNode {
        /// As the operator names hosts apart.
        pub name: String,
        /// This run of its process.
        pub run: [u8; 16],
        /// Where its devices stand.
        pub domain: FailureDomain,
        /// The version of its program.
        pub version: String,
        /// The highest feature level that it understands.
        pub feature_level: u32,
        /// Its devices.
        pub devices: Vec<DeviceRegistration>,
    }
}

record! {
    /// How a device is, in passing.
    pub struct DeviceReport {
        /// Which one.
        pub id: DeviceId,
        /// Bytes that it can hold.
        pub capacity_bytes: u64,
        /// Bytes that are taken.
        pub used_bytes: u64,
        /// The highest that was durable.
        pub commit_seq: CommitSeq,
        /// It can't acknowledge writes.
        pub failed: bool,
        /// What is wrong, for people.
        pub trouble: String,
    }
}

record! {
    /// What the leader has gathered from heartbeats, now and then.
    pub struct ReportDevices {
        /// Those that have changed.
        pub devices: Vec<DeviceReport>,
    }
}

record! {
    /// Creates a volume and places its groups.
    pub struct CreateVolume {
        /// Its name.
        pub name: String,
        /// A multiple of 4096.
        pub size_bytes: u64,
        /// `R`.
        pub replicas: u8,
        /// `W`.
        pub write_quorum: u8,
        /// Whether writes go on with a single in-sync copy.
        pub min_copies_one: bool,
        /// How far apart the copies stand at least.
        pub spread: Spread,
        /// Devices that the proposer holds for dead: nothing is placed there.
        pub silent: Vec<DeviceId>,
    }
}

record! {
    /// Makes a volume larger.
    pub struct GrowVolume {
        /// Which one.
        pub volume: Selector,
        /// Not below what it is.
        pub size_bytes: u64,
    }
}

record! {
    /// Deletes a volume.
    pub struct DeleteVolume {
        /// Which one.
        pub volume: Selector,
        /// Even when a client holds it.
        pub force: bool,
    }
}

record! {
    /// Grants the right to write under the next generation.
    pub struct Attach {
        /// To which volume.
        pub volume: Selector,
        /// To whom.
        pub client: ClientId,
        /// What it says of itself.
        pub address: String,
        /// Even when another client holds it. Of no meaning for a caretaker.
        pub force: bool,
        /// Only to repair it: a guest takes over from it without force.
        pub caretaker: bool,
        /// The generation that a caretaker may take over from: the proposer holds its holder for dead.
        pub displace: Option<Generation>,
        /// The last generation that was granted when the client decided to ask; refused when another was granted since.
        /// Without it a request that comes late takes the volume from whoever has it by then.
        pub after: Option<Generation>,
    }
}

record! {
    /// Gives the right to write back.
    pub struct Detach {
        /// Of which volume.
        pub volume: Selector,
        /// Which was granted.
        pub generation: Generation,
        /// Every in-sync copy of every group holds all that was written.
        pub settled: bool,
    }
}

record! {
    /// A change of one group.
    pub struct GroupChange {
        /// Which group.
        pub index: GroupIndex,
        /// What it is to replace.
        pub epoch: Epoch,
        /// `I′`.
        pub in_sync: Vec<DeviceId>,
        /// `J′`.
        pub joining: Vec<DeviceId>,
        /// Why, for people; may be empty.
        pub cause: String,
    }
}

record! {
    /// Changes configurations of groups, each by compare-and-set on (generation, epoch).
    pub struct ConfigureGroups {
        /// Of which volume.
        pub volume: Selector,
        /// The proposer's grant.
        pub generation: Generation,
        /// Each of another group.
        pub changes: Vec<GroupChange>,
    }
}

record! {
    /// Raises what all members understand.
    pub struct RaiseFeatureLevel {
        /// To what; lower than now changes nothing.
        pub level: u32,
    }
}

record! {
    /// Adds a metadata server. Travels as a Raft configuration change.
    pub struct AddMember {
        /// Above every id that was ever used.
        pub id: u64,
        /// `host:port`.
        pub address: String,
        /// Of its directory; 0 while not known.
        pub directory: u64,
    }
}

record! {
    /// Removes a metadata server. Travels as a Raft configuration change.
    pub struct RemoveMember {
        /// Which one.
        pub id: u64,
    }
}

record! {
    /// Learns where a metadata server is and what directory it has.
    pub struct UpdateMember {
        /// Which one.
        pub id: u64,
        /// `host:port`.
        pub address: String,
        /// Of its directory. Once known it never changes.
        pub directory: u64,
    }
}

record! {
    /// Takes a member of a group out that is lost, and puts another device in its place, to be filled.
    pub struct ReplaceMember {
        /// Of which volume.
        pub volume: VolumeId,
        /// Which group.
        pub index: GroupIndex,
        /// Of the configuration that is to be replaced.
        pub epoch: Epoch,
        /// Who is lost: joining or stale, never in sync.
        pub lost: DeviceId,
        /// Who takes its place; nobody where enough others are left.
        pub spare: Option<DeviceId>,
        /// Why, for people.
        pub cause: String,
    }
}

record! {
    /// Whether a device is heard of.
    pub struct DeviceNote {
        /// Which one.
        pub id: DeviceId,
        /// It is not.
        pub silent: bool,
        /// Why that is thought, for people.
        pub cause: String,
    }
}

record! {
    /// Which devices have fallen silent, and which are back.
    pub struct NoteDevices {
        /// Those that have changed.
        pub devices: Vec<DeviceNote>,
    }
}

record! {
    /// Has another device take the place of a member that is in sync, without a moment in which a copy is missing.
    pub struct MoveMember {
        /// Of which volume.
        pub volume: VolumeId,
        /// Which group.
        pub index: GroupIndex,
        /// Of the configuration that is to be replaced.
        pub epoch: Epoch,
        /// Who is to leave.
        pub from: DeviceId,
        /// Who takes its place.
        pub to: DeviceId,
        /// Why, for people.
        pub cause: String,
    }
}

record! {
    /// Empties a node, or ends that.
    pub struct DrainNode {
        /// Which one.
        pub node: NodeId,
        /// Whether it is to hold nothing.
        pub drain: bool,
        /// Devices that the proposer holds for dead: they can't take anything.
        pub silent: Vec<DeviceId>,
    }
}

macro_rules! commands {
    ($($(#[$doc:meta])* $name:ident = $tag:literal,)*) => {
        /// A change of the state.
        #[derive(Clone, PartialEq, Eq, Debug)]
        pub enum Command {
            $($(#[$doc])* $name($name),)*
        }

        impl Command {
            /// Its number in the log, and what it is called in metrics.
            pub fn tag(&self) -> (u16, &'static str) {
                match self { $(Command::$name(_) => ($tag, stringify!($name)),)* }
            }

            fn encode_body(&self, out: &mut Vec<u8>) {
                match self { $(Command::$name(body) => body.encode(out),)* }
            }

            fn decode_body(tag: u16, reader: &mut Reader<'_>) -> Result<Command, CommandError> {
                match tag {
                    $($tag => Ok(Command::$name(Code::decode(reader)?)),)*
                    tag => Err(CommandError::Unknown { format: COMMAND_FORMAT, tag }),
                }
            }
        }

        $(impl From<$name> for Command {
            fn from(body: $name) -> Command {
                Command::$name(body)
            }
        })*
    };
}

commands! {
    /// Gives the cluster its id.
    InitCluster = 1,
    /// Makes a node and its devices known.
    RegisterNode = 2,
    /// How devices are.
    ReportDevices = 3,
    /// Creates a volume.
    CreateVolume = 4,
    /// Makes a volume larger.
    GrowVolume = 5,
    /// Deletes a volume.
    DeleteVolume = 6,
    /// Grants the right to write.
    Attach = 7,
    /// Gives it back.
    Detach = 8,
    /// Changes configurations of groups.
    ConfigureGroups = 9,
    /// Raises what all members understand.
    RaiseFeatureLevel = 10,
    /// Adds a metadata server.
    AddMember = 11,
    /// Removes a metadata server.
    RemoveMember = 12,
    /// Learns of a metadata server.
    UpdateMember = 13,
    /// Puts a spare in the place of a member that is lost.
    ReplaceMember = 14,
    /// Writes down who is silent, and who is back.
    NoteDevices = 15,
    /// Has another device take the place of a member in sync.
    MoveMember = 16,
    /// Empties a node, or ends that.
    DrainNode = 17,
}

/// Why bytes are no command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CommandError {
    /// They are damaged.
    Damaged(DecodeError),
    /// A later version wrote it.
    Unknown {
        /// Of the command.
        format: u8,
        /// Of the command.
        tag: u16,
    },
    /// It is larger than a command may be.
    TooLarge(usize),
}

impl From<DecodeError> for CommandError {
    fn from(error: DecodeError) -> CommandError {
        CommandError::Damaged(error)
    }
}

impl std::fmt::Display for CommandError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CommandError::Damaged(error) => write!(f, "the command is damaged: {error}"),
            CommandError::Unknown { format, tag } => write!(
                f,
                "the command has format {format} and tag {tag}, which this version does not know: run a newer one"
            ),
            CommandError::TooLarge(bytes) => {
                write!(
                    f,
                    "the command has {bytes} bytes, at most {COMMAND_BYTES_MAX} are allowed"
                )
            }
        }
    }
}

impl std::error::Error for CommandError {}

/// A command as it stands in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Logged {
    /// The proposer's Unix time in milliseconds: the only time the state machine knows.
    pub time_ms: u64,
    /// What to do.
    pub command: Command,
}

impl Logged {
    /// # Errors
    /// It would be too large for the log.
    pub fn encode(&self) -> Result<Vec<u8>, CommandError> {
        let mut out = vec![COMMAND_FORMAT];
        out.put_u16(self.command.tag().0);
        out.put_u64(self.time_ms);
        self.command.encode_body(&mut out);
        if out.len() > COMMAND_BYTES_MAX {
            return Err(CommandError::TooLarge(out.len()));
        }
        Ok(out)
    }

    /// # Errors
    /// The bytes are damaged, or of a later version.
    pub fn decode(bytes: &[u8]) -> Result<Logged, CommandError> {
        if bytes.len() > COMMAND_BYTES_MAX {
            return Err(CommandError::TooLarge(bytes.len()));
        }
        let mut reader = Reader::new(bytes);
        let (format, tag) = (reader.u8()?, reader.u16()?);
        if format != COMMAND_FORMAT {
            return Err(CommandError::Unknown { format, tag });
        }
        let time_ms = reader.u64()?;
        let command = Command::decode_body(tag, &mut reader)?;
        reader.finish()?;
        Ok(Logged { time_ms, command })
    }
}
