//! What a [`Coordinator`](super::Coordinator) is told and what it wants done.

use std::fmt;

use bytes::Bytes;

use super::config::GroupConfig;
use super::pace::Pace;
use crate::block::BlockState;
use crate::checksum::Checksum;
use crate::frame::Class;
use crate::ids::{CommitSeq, DeviceId, Epoch, Generation, GroupIndex, Layer, Version};
use crate::message::Message;
use crate::units::BlockRange;

/// Pairs an answer with its request. Chosen by the coordinator, never reused by it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// An operation of the volume layer. Chosen by it, unique among its operations in flight.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpToken(pub u64);

/// Something to do in one chunk. Two operations that overlap, one of them a write, are never given at the same time:
/// the volume layer orders them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Read at most 256 blocks.
    Read {
        /// Where.
        range: BlockRange,
    },
    /// Write at most 256 blocks.
    Write {
        /// Where.
        range: BlockRange,
        /// As long as the range; never changed from now on.
        bytes: Bytes,
        /// One per block.
        checksums: Vec<Checksum>,
    },
    /// Write zeroes that stay recorded.
    Zero {
        /// Where.
        range: BlockRange,
    },
    /// Write absence.
    Discard {
        /// Where.
        range: BlockRange,
    },
    /// Tell the state of each block, without its content; at most 16384 blocks.
    Status {
        /// Where.
        range: BlockRange,
    },
}

impl Operation {
    /// Where.
    pub fn range(&self) -> BlockRange {
        match self {
            Operation::Read { range }
            | Operation::Write { range, .. }
            | Operation::Zero { range }
            | Operation::Discard { range }
            | Operation::Status { range } => *range,
        }
    }

    /// Whether it changes nothing.
    pub fn is_read(&self) -> bool {
        matches!(self, Operation::Read { .. } | Operation::Status { .. })
    }
}

/// How an operation ended well.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A write is durable on a quorum.
    Written,
    /// What was read.
    Read(ReadOutcome),
    /// Runs that cover the range in order: how many blocks, and whether they hold data.
    Status(Vec<(u32, bool)>),
}

/// What was read. Every checksum has been verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadOutcome {
    /// One per block of the range; never `Damaged`.
    pub blocks: Vec<BlockState>,
    /// The content of the blocks that are `Data`, in order.
    pub bytes: Vec<Bytes>,
}

/// How an operation ended badly. While a quorum is out of reach it does not end at all.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum OpError {
    /// A newer attachment has taken over: every operation ends like this from now on.
    Fenced,
    /// The devices of the group are full. The blocks are as they were before.
    NoSpace,
    /// Every copy of a block is damaged. The rest of the range may be readable.
    Damaged,
}

/// What the coordinator is told.
#[derive(Clone, Debug)]
pub enum Event {
    /// A connection to a device stands: its hello was checked.
    Connected {
        /// Which device.
        device: DeviceId,
        /// Its commit sequence, as it stood in its hello.
        commit: CommitSeq,
        /// The commit sequence that it recovered at its start, as it stood in its hello.
        recovered: CommitSeq,
    },
    /// Where other devices reach a device that is connected, and whether it can read from others what it lacks. As long
    /// as it is not told, copies to and from the device go through the coordinator.
    Located {
        /// Which device.
        device: DeviceId,
        /// As `host:port`.
        address: String,
        /// Whether its hello says so.
        can_fetch: bool,
    },
    /// The connection is over. No answer to what was sent on it will come.
    Disconnected {
        /// Which device.
        device: DeviceId,
    },
    /// An attempt to connect to a device failed at once: nobody is there, or somebody else.
    Unreachable {
        /// Which device.
        device: DeviceId,
    },
    /// A device can't read blocks that it holds. It may be told again and again, also of what is good by now.
    Damaged {
        /// Which device.
        device: DeviceId,
        /// Of which group.
        group: GroupIndex,
        /// Where; a bounded number of runs.
        runs: Vec<(Layer, BlockRange)>,
    },
    /// Copies may be so fast from now on; as fast as they can until it is told.
    Pace(Pace),
    /// Meta has newer configurations than those that the coordinator knows: it is to ask for them.
    Look,
    /// The answer to [`Action::Meta`].
    Meta(MetaTold),
    /// An answer, to a request that was sent on the connection that stands.
    Answer {
        /// From which device.
        device: DeviceId,
        /// To which request.
        request: RequestId,
        /// Whether it comes with a read grant.
        grant: bool,
        /// What.
        message: Message,
    },
    /// Do this. Answered with exactly one [`Action::Done`].
    Submit {
        /// What the volume layer calls it.
        op: OpToken,
        /// What.
        operation: Operation,
    },
    /// Finish what was submitted, then release the members. Nothing may be submitted from now on.
    Release,
}

/// What the coordinator wants done, in this order.
#[derive(Clone, Debug)]
pub enum Action {
    /// Send the same message to each of these devices, each of them connected.
    Send {
        /// To whom; never empty.
        to: Vec<DeviceId>,
        /// Pairs the answers with it.
        request: RequestId,
        /// How it is scheduled.
        class: Class,
        /// What.
        message: Message,
    },
    /// Ask meta. Answered with exactly one [`Event::Meta`]; there is never a second question without an answer.
    Meta(MetaAsk),
    /// The devices that it needs connections to are more than before.
    Devices,
    /// Copies to members of groups that are served have begun: from now on their pace should be set, until
    /// [`take_guest_load`](super::Coordinator::take_guest_load) says that there are none any more.
    Copying,
    /// An operation has ended.
    Done {
        /// Which one.
        op: OpToken,
        /// How.
        result: Result<Outcome, OpError>,
    },
    /// A log should have this.
    Notice(Notice),
    /// Every operation is done and the members that could be reached are released.
    Released,
}

/// A question to meta.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetaAsk {
    /// How are the configurations, and which is the last generation that was granted?
    Look,
    /// Commit these changes. Asking again for the same is harmless.
    Change(Vec<ConfigChange>),
}

/// A change of the configuration of one group (rule 18).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigChange {
    /// Which group.
    pub group: GroupIndex,
    /// The configuration that it replaces.
    pub epoch: Epoch,
    /// `I′`.
    pub in_sync: Vec<DeviceId>,
    /// `J′`.
    pub joining: Vec<DeviceId>,
}

/// What meta said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetaTold {
    /// Nothing: whether something was done is not known.
    Unreachable,
    /// A newer generation than this attachment's was granted: nothing was done, now.
    Superseded(Generation),
    /// To [`MetaAsk::Look`].
    Looked {
        /// The last generation that was granted.
        generation: Generation,
        /// The configuration of each group, in order of the group index.
        groups: Vec<GroupConfig>,
    },
    /// To [`MetaAsk::Change`]: what became of each change, in their order.
    Changed(Vec<ChangeOutcome>),
}

/// What became of a change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ChangeOutcome {
    /// It is committed, by this request or an earlier one.
    Committed(GroupConfig),
    /// It was not done, and no earlier request of the same will be.
    Refused {
        /// The configuration as it is.
        config: GroupConfig,
        /// Why.
        words: String,
    },
}

/// How far a group is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum GroupPhase {
    /// Fewer members are sealed than make the attachment complete (rule 6).
    Sealing,
    /// The attachment is complete, but a member is missing without which the group is not served (rule 11).
    Waiting,
    /// The members are compared and made equal (rules 9 to 11).
    Reconciling,
    /// I/O is served.
    Serving,
    /// A newer attachment has taken over.
    Fenced,
}

/// A group as metrics and logs see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupStatus {
    /// Which group.
    pub group: GroupIndex,
    /// How far it is.
    pub phase: GroupPhase,
    /// Its members.
    pub members: Vec<MemberStatus>,
    /// Writes without a quorum.
    pub writes: usize,
    /// Reads without an answer.
    pub reads: usize,
    /// Operations that wait for the group to be served.
    pub queued: usize,
    /// Everything up to here is durable on every member.
    pub stable: Version,
    /// The number of its configuration.
    pub epoch: Epoch,
    /// Whether another configuration is wanted, or asked of meta.
    pub changing: bool,
    /// Whether a copy is to be elsewhere, and is not yet.
    pub moving: bool,
    /// Blocks that were found damaged on a member since the attachment began.
    pub damage_found: u64,
    /// Those of them that were written anew from another member.
    pub damage_repaired: u64,
}

/// What a device is in a group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum MemberRole {
    /// It holds everything acknowledged, or as much of it as a quorum needs.
    InSync,
    /// It is being filled.
    Joining,
    /// It was ejected, and joins anew when it is well again.
    Stale,
}

/// A member of a group as metrics and logs see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemberStatus {
    /// Which device.
    pub device: DeviceId,
    /// What it is.
    pub role: MemberRole,
    /// Whether it can be spoken to.
    pub connected: bool,
    /// Whether it has made the generation durable and is a member of the group.
    pub joined: bool,
    /// Whether it holds everything that the others hold.
    pub complete: bool,
    /// Blocks that it is known to lack; an upper bound.
    pub lacking_blocks: u64,
    /// Blocks that were copied to it since it began to be compared; for who is joining.
    pub copied_blocks: u64,
    /// Whether it is still being compared, so that more blocks may be found to be lacking.
    pub comparing: bool,
    /// Blocks that it holds and can't read, as far as is known: some of those that it lacks.
    pub damaged_blocks: u64,
    /// Writes without an answer from it.
    pub outstanding: usize,
}

/// Something that a log should have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    /// The right to write was granted.
    Attached(Generation),
    /// A newer attachment has taken over.
    Fenced {
        /// The generation that was seen.
        seen: Generation,
    },
    /// A group is in another phase.
    Phase {
        /// Which group.
        group: GroupIndex,
        /// The phase.
        phase: GroupPhase,
        /// The members it waits for, if it does.
        waits_for: Vec<DeviceId>,
    },
    /// A member has fallen behind: it was lost, or is too slow.
    Behind {
        /// Which group.
        group: GroupIndex,
        /// Which member.
        device: DeviceId,
    },
    /// A member holds up the comparison at attach: it goes on without that one, which will be ejected unless it answers
    /// in time.
    PassedOver {
        /// Which group.
        group: GroupIndex,
        /// Which member.
        device: DeviceId,
    },
    /// A member holds everything again.
    CaughtUp {
        /// Which group.
        group: GroupIndex,
        /// Which member.
        device: DeviceId,
    },
    /// A device came back with less than it had acknowledged; it is compared block by block before it is used.
    Forgot {
        /// Which device.
        device: DeviceId,
        /// What it had acknowledged.
        expected: CommitSeq,
        /// What it has.
        found: CommitSeq,
    },
    /// A block was damaged on a member.
    Damage {
        /// Which group.
        group: GroupIndex,
        /// Which member.
        device: DeviceId,
        /// Where.
        range: BlockRange,
    },
    /// Blocks that were damaged on a member were written anew from another one.
    Repaired {
        /// Which group.
        group: GroupIndex,
        /// Which member.
        device: DeviceId,
        /// How many.
        blocks: u64,
    },
    /// A member can't reach another one, to read from it what it lacks: for a while that is copied through here.
    NotFetched {
        /// Who should have read.
        device: DeviceId,
        /// From whom.
        from: DeviceId,
        /// What it said.
        words: String,
    },
    /// A member refused something that it should not refuse.
    Refused {
        /// Which device.
        device: DeviceId,
        /// What it said.
        words: String,
    },
    /// A configuration is committed.
    Configured {
        /// Of which group.
        group: GroupIndex,
        /// Its number.
        epoch: Epoch,
        /// `I`.
        in_sync: Vec<DeviceId>,
        /// `J`.
        joining: Vec<DeviceId>,
    },
    /// Meta refused a change of the configuration.
    ChangeRefused {
        /// Of which group.
        group: GroupIndex,
        /// What it said.
        words: String,
    },
    /// A member is full.
    Full {
        /// Which group.
        group: GroupIndex,
        /// Which member.
        device: DeviceId,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Notice::Attached(generation) => write!(f, "attached with generation {generation}"),
            Notice::Fenced { seen } => write!(f, "generation {seen} has taken the volume over"),
            Notice::Phase {
                group,
                phase,
                waits_for,
            } => {
                write!(f, "group {group} is {phase:?}")?;
                if !waits_for.is_empty() {
                    f.write_str(", waits for")?;
                    for device in waits_for {
                        write!(f, " {device}")?;
                    }
                }
                Ok(())
            }
            Notice::Behind { group, device } => write!(f, "group {group}: {device} has fallen behind"),
            Notice::PassedOver { group, device } => write!(
                f,
                "group {group}: {device} has not answered while the others have: comparing the others without it"
            ),
            Notice::CaughtUp { group, device } => write!(f, "group {group}: {device} holds everything again"),
            Notice::Forgot {
                device,
                expected,
                found,
            } => write!(
                f,
                "{device} acknowledged up to commit {expected} and came back with {found}: it has forgotten something, \
                 and is compared before it is used"
            ),
            Notice::Damage { group, device, range } => {
                write!(
                    f,
                    "group {group}: {range} is damaged on {device}; it is repaired as soon as another copy can be read"
                )
            }
            Notice::Repaired { group, device, blocks } => write!(
                f,
                "group {group}: {blocks} damaged blocks of {device} were written anew from another copy"
            ),
            Notice::NotFetched { device, from, words } => write!(
                f,
                "{device} can't read from {from} ({words}): copies between them go through this client for a while; check \
                 the network between their nodes"
            ),
            Notice::Refused { device, words } => write!(f, "{device} refused a request: {words}"),
            Notice::Configured {
                group,
                epoch,
                in_sync,
                joining,
            } => {
                write!(f, "group {group} has configuration {epoch}, in sync:")?;
                in_sync.iter().try_for_each(|device| write!(f, " {device}"))?;
                if !joining.is_empty() {
                    f.write_str(", joining:")?;
                    joining.iter().try_for_each(|device| write!(f, " {device}"))?;
                }
                Ok(())
            }
            Notice::ChangeRefused { group, words } => {
                write!(
                    f,
                    "group {group}: the metadata servers refused a change of its members: {words}"
                )
            }
            Notice::Full { group, device } => {
                write!(f, "group {group}: {device} is full: add devices or discard data")
            }
        }
    }
}
