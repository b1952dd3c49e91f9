//! The processes: each links one production state machine to the simulated bus, disk and clock. What is specific to a
//! component's interface stands in its file here and nowhere else.

pub mod caretaker;
pub mod client;
pub mod healing;
pub mod meta;
pub mod node;
pub mod operator;

use cairn_client::core::api::VolumeHandle;
use cairn_client::volume::api::{OpId, VolumeError, VolumeReply};
use cairn_proto::disk::{DiskDone, DiskOp};
use cairn_proto::ids::{Generation, VolumeId};
use cairn_proto::time::Time;

use super::msg::Msg;
use super::network::{Delivery, Network};
use super::process::Process;
use super::trace::Trace;

/// Where a process acts on its world.
pub struct Ctx<'a> {
    /// World time.
    pub world: Time,
    /// Time by the process's own clock.
    pub now: Time,
    /// Who it is.
    pub me: Process,
    /// The network.
    pub net: &'a mut Network<Msg>,
    /// What else it wants.
    pub out: &'a mut Vec<Output>,
    /// What is noted.
    pub trace: &'a mut Trace,
}

impl Ctx<'_> {
    /// Sends messages to metadata servers.
    pub fn send_calls(&mut self, calls: Vec<(u8, Msg)>) {
        for (member, msg) in calls {
            self.net
                .message(self.world, (self.me, Process::Meta(member)), msg, false);
        }
    }

    /// Notes something, where the trace is text.
    pub fn note(&mut self, words: std::fmt::Arguments<'_>) {
        let me = self.me;
        self.trace.note(self.world, format_args!("{me} {words}"));
    }
}

/// What happens to a process.
#[derive(Clone, Debug)]
pub enum Input {
    /// The network brings something.
    Net(Delivery<Msg>),
    /// The device has finished something.
    Disk(DiskDone),
    /// A guest, or who runs it, wants something of a client.
    Guest(client::Wish),
    /// The operator is told to do something.
    Operator(operator::Wish),
}

/// What a process wants besides sending.
#[derive(Debug)]
pub enum Output {
    /// For its device.
    Disk(DiskOp),
    /// A volume can be used; nothing is attached yet.
    Opened(VolumeHandle),
    /// A volume's attachment has this generation.
    Attached(VolumeHandle, Generation),
    /// A volume is closed.
    Closed(VolumeHandle),
    /// An operation has ended.
    Reply {
        /// On which volume.
        volume: VolumeHandle,
        /// Which one.
        op: OpId,
        /// How.
        result: Result<VolumeReply, VolumeError>,
        /// Under which attachment, if there is one.
        generation: Option<Generation>,
    },
    /// The operator has done all it was told.
    SetUp(Vec<operator::Created>),
    /// A volume has this size from now on.
    Grown(VolumeId, u64),
    /// A node can't use its device: its process ends.
    Unusable(String),
    /// Something that must not be.
    Broken(String),
}

/// A process that runs.
pub enum Actor {
    /// A client.
    Client(Box<client::ClientActor>),
    /// The caretaker of a node.
    Caretaker(Box<caretaker::CaretakerActor>),
    /// A storage node.
    Node(Box<node::NodeActor>),
    /// A metadata server.
    Meta(Box<meta::MetaActor>),
    /// Who sets the cluster up.
    Operator(Box<operator::OperatorActor>),
}

impl Actor {
    /// It has just been started.
    pub fn start(&mut self, ctx: &mut Ctx<'_>) {
        match self {
            Actor::Node(actor) => actor.start(ctx),
            Actor::Meta(actor) => actor.start(ctx),
            Actor::Caretaker(actor) => actor.start(ctx),
            Actor::Client(_) | Actor::Operator(_) => {}
        }
    }

    /// Something happens to it.
    pub fn handle(&mut self, ctx: &mut Ctx<'_>, input: Input) {
        match self {
            Actor::Client(actor) => actor.handle(ctx, input),
            Actor::Caretaker(actor) => actor.handle(ctx, input),
            Actor::Node(actor) => actor.handle(ctx, input),
            Actor::Meta(actor) => actor.handle(ctx, input),
            Actor::Operator(actor) => actor.handle(ctx, input),
        }
    }

    /// The time it waits for has come.
    pub fn handle_timeout(&mut self, ctx: &mut Ctx<'_>) {
        match self {
            Actor::Client(actor) => actor.handle_timeout(ctx),
            Actor::Caretaker(actor) => actor.handle_timeout(ctx),
            Actor::Node(actor) => actor.handle_timeout(ctx),
            Actor::Meta(actor) => actor.handle_timeout(ctx),
            Actor::Operator(actor) => actor.handle_timeout(ctx),
        }
    }

    /// When it wants to be woken, by its own clock.
    pub fn timeout(&self) -> Option<Time> {
        match self {
            Actor::Client(actor) => actor.timeout(),
            Actor::Caretaker(actor) => actor.timeout(),
            Actor::Node(actor) => actor.timeout(),
            Actor::Meta(actor) => actor.timeout(),
            Actor::Operator(actor) => actor.timeout(),
        }
    }
}

/// The earlier of two times, either of which may be none.
pub(crate) fn earliest(a: Option<Time>, b: Option<Time>) -> Option<Time> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// The address under which a process registers.
pub(crate) fn address_of(process: Process) -> String {
    format!("{process}:1")
}

/// The node behind an address.
pub(crate) fn node_at(address: &str) -> Option<Process> {
    let number = address.strip_prefix("node-")?.strip_suffix(":1")?;
    number.parse().ok().map(Process::Node)
}
