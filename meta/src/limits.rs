//! Every bound of the metadata service, in one place.

use cairn_proto::limits::{GROUPS_PER_VOLUME_MAX, MEMBERS_MAX, REPLICAS_MAX};

/// Volumes of one cluster at the most.
pub const VOLUMES_MAX: usize = 10_000;
/// Storage nodes of one cluster at the most.
pub const NODES_MAX: usize = 1024;
/// Devices of one cluster at the most, those that were replaced or removed included.
pub const DEVICES_MAX: usize = 4096;
/// Devices of one node at the most.
pub const DEVICES_PER_NODE_MAX: usize = 64;
/// Metadata servers at the most.
pub const META_MEMBERS_MAX: usize = 7;
/// Data-plane addresses of one device at the most.
pub const ADDRESSES_MAX: usize = 4;
/// Ejected members of a group that still hold data, at the most; the oldest are forgotten.
pub const STALE_MAX: usize = 16;
/// Bytes of a name or a level of a failure domain at the most.
pub const NAME_BYTES_MAX: usize = 128;
/// Bytes of an address, or of what somebody says for people, at the most.
pub const TEXT_BYTES_MAX: usize = 256;
/// Group changes in one command at the most.
pub const CHANGES_MAX: usize = GROUPS_PER_VOLUME_MAX as usize;
/// Devices in one report at the most.
pub const REPORTS_MAX: usize = 1024;
/// Items of one page of an answer at the most.
pub const PAGE_MAX: usize = 1000;
/// Groups in one page of an inventory at the most.
pub const INVENTORY_PAGE_MAX: usize = 4096;
/// Distinct replica sets that one device takes part in, as far as placement can choose.
pub const COPYSETS_PER_DEVICE: usize = 8;

/// Bytes of one encoded command at the most.
pub const COMMAND_BYTES_MAX: usize = 512 << 10;
/// Bytes of an encoded state at the most.
pub const STATE_BYTES_MAX: usize = 192 << 20;
/// Bytes of one Raft message at the most: a snapshot and its frame.
pub const RAFT_MESSAGE_BYTES_MAX: usize = STATE_BYTES_MAX + (1 << 20);
/// Bytes of the entries of one append message, as Raft counts them. One entry may be larger.
pub const APPEND_BYTES_MAX: u64 = 256 << 10;
/// Append messages to one follower without an answer at the most.
pub const APPENDS_IN_FLIGHT_MAX: usize = 64;
/// Entries in one message at the most.
pub const MESSAGE_ENTRIES_MAX: usize = 65_536;
/// Bytes of one piece of a Raft message on the wire.
pub const PIECE_BYTES_MAX: usize = 1 << 20;
/// Proposals without an answer at the most.
pub const PROPOSALS_MAX: usize = 256;
/// Linearizable reads without an answer at the most.
pub const READS_MAX: usize = 1024;
/// Bytes of proposals that are not committed yet.
pub const UNCOMMITTED_BYTES_MAX: u64 = 16 << 20;

/// After this many entries since the last snapshot there is a new one.
pub const SNAPSHOT_ENTRIES: u64 = 4096;
/// After this many bytes of entries since the last snapshot there is a new one.
pub const SNAPSHOT_BYTES: u64 = 16 << 20;
/// Entries that are kept behind a snapshot, so that a follower that is a little late needs none.
pub const KEPT_ENTRIES: u64 = 1024;

/// Ticks between two heartbeats of the leader.
pub const HEARTBEAT_TICKS: usize = 2;
/// Ticks without a leader before the quickest member asks for votes.
pub const ELECTION_TICKS: usize = 10;
/// How many distinct election timeouts there are; member ids are spread over them.
pub const ELECTION_SPREAD: u64 = 16;
/// Ticks after which a snapshot that was not acknowledged is sent again.
pub const SNAPSHOT_RETRY_TICKS: u64 = 100;
/// Ticks after which a read or a proposal without an answer is given up.
pub const ANSWER_TICKS: u64 = 30;
/// Ticks that are made up for at the most after the process was held up.
pub const CATCH_UP_TICKS: u64 = 3;

/// How often nodes send heartbeats.
pub const NODE_HEARTBEAT_MS: u32 = 1000;
/// After this long without a heartbeat a node no longer seems alive.
pub const NODE_SILENCE_MS: u64 = 5000;
/// After this long without a message a metadata server no longer seems alive.
pub const MEMBER_SILENCE_MS: u64 = 3000;
/// Entries of the log that a member may lack and still be counted on when another one is removed.
pub const READY_ENTRIES: u64 = 1024;
/// How often changes of usage are written to the log at the most.
pub const REPORT_INTERVAL_MS: u64 = 30_000;
/// Events that are kept; the oldest go.
pub const EVENTS_KEPT: usize = 4096;
/// How long a device may be silent before its copies are rebuilt elsewhere, unless told otherwise, and the shortest that
/// can be told: below it a restart of a node would start copies.
pub const REBUILD_AFTER_MS: (u64, u64) = (600_000, 1000);
/// How often the leader looks what is to be healed.
pub const HEAL_INTERVAL_MS: u64 = 1000;
/// Spares that are being filled at the same time: in the cluster, and on one device. Each begins with reading all of a
/// copy, so more at once would make each of them late, and guests wait.
pub const REBUILDS_MAX: (usize, usize) = (32, 4);
/// Copies that move at the same time because their node is emptied.
pub const DRAINS_MAX: usize = 16;
/// Copies that move at the same time because they stand too close to each other.
pub const SPREADS_MAX: usize = 2;
/// How often it is looked whether copies could stand further apart.
pub const SPREAD_LOOK_MS: u64 = 10_000;
/// For how long all that have a part in it must have been heard of without a pause: a device that goes to and fro between
/// two nodes moves nothing.
pub const SPREAD_SETTLED_MS: u64 = 60_000;
/// Copies for which it is looked whether there is a place, each time that somebody asks how the cluster is, and each time
/// that it is looked which copies are to move.
pub const SPARE_LOOKS_MAX: usize = 256;
/// Volumes that are not well in one answer about the cluster, at the most.
pub const UNHEALTHY_MAX: usize = 100;
/// How often the metrics about the health of volumes are derived anew.
pub const CONDITION_INTERVAL_MS: u64 = 5000;
/// Volumes that one node takes care of at the same time.
pub const CARE_PER_NODE_MAX: usize = 2;
/// After so long without any progress another volume gets the caretaker's place; where copies are compared there is
/// nothing to see for a while.
pub const CARE_STUCK_MS: (u64, u64) = (60_000, 600_000);
/// For how long a volume is left alone then at first, and at the most; each time in vain it is twice as long.
pub const CARE_PAUSE_MS: (u64, u64) = (300_000, 6 * 3_600_000);
/// After this long without a heartbeat that a device is silent is written down, and after this long with heartbeats
/// that it is back. So there is at most one pair of events in the sum of both.
pub const SILENCE_NOTED_MS: (u64, u64) = (10_000, 10_000);
/// Reports of attachments in one request at the most.
pub const ATTACHMENT_REPORTS_MAX: usize = 64;
/// Members of a group in one report at the most.
pub const REPORTED_MEMBERS_MAX: usize = 16;
/// Attachments of which the leader keeps what was reported, at the most.
pub const ATTACHMENTS_HEARD_MAX: usize = VOLUMES_MAX;
/// Attachments in one heartbeat of a node at the most.
pub const HELD_VOLUMES_MAX: usize = 4096;
/// Volumes with damage in one heartbeat of a node at the most.
pub const DAMAGED_VOLUMES_MAX: usize = 64;
/// After this long without any sign of life the holder of a volume is held for dead, so that a caretaker may take over.
/// Nothing of a living client may be silent for so long: it reports every 10 s, and its connections show its generation
/// to the nodes all the time.
pub const HOLDER_SILENCE_MS: u64 = 60_000;
/// After this long without a report another caretaker may take over from a caretaker. It reports every 10 s at the least.
pub const CARETAKER_SILENCE_MS: u64 = 30_000;
/// How long a volume must have been given back with copies that are not equal before a caretaker is asked: whoever gave
/// it back, or somebody else, may attach it at once, and that makes them equal too.
pub const UNSETTLED_PAUSE_MS: u64 = 5000;
/// Over how long the speed of a repair is measured at the least.
pub const RATE_SAMPLE_MS: u64 = 1500;
/// How often a device's inventory is looked at anew at the most because copies somewhere became superfluous.
pub const RELEASE_INTERVAL_MS: u64 = 30_000;
/// Requests to the driver thread that wait at the most.
pub const EVENTS_MAX: usize = 1024;
/// Messages to one member that wait at the most; more are dropped, and Raft sends again.
pub const OUTGOING_MAX: usize = 256;
/// Bytes of messages to one member that wait at the most, a single larger one excepted.
pub const OUTGOING_BYTES_MAX: usize = 16 << 20;
/// Bytes of one request or answer at the most.
pub const RPC_BYTES_MAX: usize = 4 << 20;
/// Requests in work at one gRPC connection at the most.
pub const RPCS_PER_CONNECTION_MAX: usize = 128;
/// How long a request may wait for its outcome.
pub const REQUEST_TIMEOUT_MS: u64 = 4000;

const _: () = assert!(REPLICAS_MAX <= MEMBERS_MAX);
const _: () = assert!(COMMAND_BYTES_MAX as u64 <= UNCOMMITTED_BYTES_MAX);
const _: () = assert!(KEPT_ENTRIES < SNAPSHOT_ENTRIES);
const _: () = assert!(HEARTBEAT_TICKS < ELECTION_TICKS);
const _: () = assert!(NODE_HEARTBEAT_MS as u64 * 3 < NODE_SILENCE_MS);
const _: () = assert!(PIECE_BYTES_MAX < RPC_BYTES_MAX);
const _: () = assert!(REBUILDS_MAX.1 <= REBUILDS_MAX.0 && CARE_PER_NODE_MAX <= 4);
const _: () = assert!(SPREADS_MAX <= DRAINS_MAX && DRAINS_MAX <= REBUILDS_MAX.0);
const _: () = assert!(NODE_SILENCE_MS < SILENCE_NOTED_MS.0);
const _: () = assert!(NODE_SILENCE_MS < CARETAKER_SILENCE_MS && CARETAKER_SILENCE_MS <= HOLDER_SILENCE_MS);
