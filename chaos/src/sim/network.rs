//! The network: connections that keep the order of their frames, and messages that do not even arrive for certain.
//!
//! A connection is a byte stream between two processes. Frames of one direction arrive in order, each after a delay of
//! its own; nothing is lost but by the end of the connection, which takes along whatever was under way. While the way is
//! blocked, frames wait as a kernel's retransmission would have them wait, and so does the news of the end: a connection
//! whose peer has vanished is half-open until somebody gives up. Messages (those of Raft and of the control plane, whose
//! transport keeps no promise that the receiver may build on) are lost, doubled and reordered.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use cairn_proto::frame::EncodedFrame;
use cairn_proto::time::Time;

use super::process::Process;
use crate::rng::Rng;

/// Where a frame says what it is, and what those are that are counted.
const KIND_AT: usize = 5;
const COPY: u8 = 0x22;
const READ_ANSWER: u8 = 0x25;

/// A connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Link(pub u64);

/// The two ends of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Side {
    /// Who connected.
    Caller = 0,
    /// Who was connected to.
    Callee = 1,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Caller => Side::Callee,
            Side::Callee => Side::Caller,
        }
    }
}

/// How bad the network is.
#[derive(Clone, Copy, Debug)]
pub struct NetworkOptions {
    /// Usual time on the way.
    pub delay: Duration,
    /// Connections of which a frame is cut off in the middle: per million frames.
    pub reset_ppm: u32,
    /// Frames of which a bit flips: per million.
    pub flip_ppm: u32,
    /// Messages lost: per thousand.
    pub loss_permille: u32,
    /// Messages that come twice: per thousand.
    pub double_permille: u32,
    /// Messages that take far longer than usual: per thousand.
    pub late_permille: u32,
}

/// An entry of the schedule that belongs to the network.
#[derive(Clone, Debug)]
pub enum NetEvent<M> {
    /// The next thing of a direction of a connection has arrived.
    Arrive {
        /// Of which connection.
        link: Link,
        /// At which end.
        at: Side,
    },
    /// A message has arrived.
    Message {
        /// From whom.
        from: Process,
        /// To whom.
        to: Process,
        /// What.
        message: M,
    },
}

/// What the network hands to a process.
#[derive(Clone, Debug)]
pub enum Delivery<M> {
    /// Somebody has connected.
    Accepted {
        /// The connection.
        link: Link,
        /// Who.
        from: Process,
    },
    /// The connection stands.
    Connected {
        /// The connection.
        link: Link,
    },
    /// A frame.
    Frame {
        /// On which connection.
        link: Link,
        /// Its bytes.
        frame: EncodedFrame,
    },
    /// The connection is over, or never stood.
    Closed {
        /// Which.
        link: Link,
        /// Whether it never stood.
        refused: bool,
    },
    /// A message.
    Message {
        /// From whom.
        from: Process,
        /// What.
        message: M,
    },
}

enum Item {
    /// The request to connect.
    Call,
    /// The connection stands.
    Answer,
    Frame(EncodedFrame),
    End,
    Refusal,
}

#[derive(Default)]
struct Direction {
    queue: VecDeque<Item>,
    /// Arrivals that came while the way was blocked.
    waiting: usize,
    last_arrival: Time,
    bytes: usize,
}

struct Connection {
    ends: [Process; 2],
    /// Whether the process at this end still has it.
    open: [bool; 2],
    /// What travels towards this end.
    towards: [Direction; 2],
    /// Nothing arrives any more, and nobody is told.
    silent: bool,
}

/// The network of one world.
pub struct Network<M> {
    options: NetworkOptions,
    rng: Rng,
    next_link: u64,
    links: BTreeMap<Link, Connection>,
    /// Directed ways that are blocked, with how many faults block each.
    blocked: BTreeMap<(Process, Process), u32>,
    /// Extra delay of everything to or from a process.
    slow: BTreeMap<Process, Duration>,
    up: BTreeSet<Process>,
    outbox: Vec<(Time, NetEvent<M>)>,
    /// The most bytes that ever waited in one direction of one connection.
    pub bytes_max: usize,
    /// What was done to messages and connections, for the report.
    pub counts: NetworkCounts,
}

/// What the network did.
#[derive(Clone, Copy, Default, Debug)]
pub struct NetworkCounts {
    /// Frames that arrived.
    pub frames: u64,
    /// Copies among them, that a coordinator has sent.
    pub copies: u64,
    /// Answers to reads among them that came to a node: what it has fetched from another one.
    pub fetched: u64,
    /// Messages that arrived.
    pub messages: u64,
    /// Messages that were lost.
    pub lost: u64,
    /// Connections that were cut.
    pub resets: u64,
    /// Frames with a flipped bit.
    pub flips: u64,
}

impl<M: Clone> Network<M> {
    /// An empty network.
    pub fn new(options: NetworkOptions, rng: Rng) -> Network<M> {
        Network {
            options,
            rng,
            next_link: 0,
            links: BTreeMap::new(),
            blocked: BTreeMap::new(),
            slow: BTreeMap::new(),
            up: BTreeSet::new(),
            outbox: Vec::new(),
            bytes_max: 0,
            counts: NetworkCounts::default(),
        }
    }

    /// What the schedule has to get.
    pub fn take_events(&mut self) -> std::vec::Drain<'_, (Time, NetEvent<M>)> {
        self.outbox.drain(..)
    }

    /// A process listens from now on.
    pub fn process_up(&mut self, process: Process) {
        self.up.insert(process);
    }

    /// A process is gone. Its kernel ends its connections, unless the power of its host is gone as well.
    pub fn process_down(&mut self, now: Time, process: Process, power_too: bool) {
        self.up.remove(&process);
        let links: Vec<(Link, Side)> = self.ends_of(process).collect();
        for (link, side) in links {
            if power_too {
                let connection = self.links.get_mut(&link).expect("listed above");
                connection.open[side as usize] = false;
                // Whoever sends to it once it is back hears that there is no such connection; until then, nothing.
                connection.silent = true;
            } else {
                self.close(now, link, side);
            }
        }
        if power_too {
            self.forget_closed();
        }
    }

    /// A process that is back answers old connections with a reset.
    pub fn process_back(&mut self, now: Time, process: Process) {
        self.up.insert(process);
        let stale: Vec<Link> = self
            .links
            .iter()
            .filter(|(_, c)| c.silent && c.ends.contains(&process))
            .map(|(link, _)| *link)
            .collect();
        for link in stale {
            let connection = self.links.get_mut(&link).expect("listed above");
            if connection.open == [true, true] {
                continue;
            }
            connection.silent = false;
            for side in [Side::Caller, Side::Callee] {
                if self.links[&link].open[side as usize] {
                    self.push(now, link, side, Item::End);
                }
            }
        }
    }

    fn ends_of(&self, process: Process) -> impl Iterator<Item = (Link, Side)> + '_ {
        self.links.iter().flat_map(move |(link, connection)| {
            [Side::Caller, Side::Callee]
                .into_iter()
                .filter(move |side| connection.ends[*side as usize] == process && connection.open[*side as usize])
                .map(|side| (*link, side))
        })
    }

    /// Starts to connect.
    pub fn connect(&mut self, now: Time, from: Process, to: Process) -> Link {
        self.next_link += 1;
        let link = Link(self.next_link);
        let connection = Connection {
            ends: [from, to],
            open: [true, false],
            towards: [Direction::default(), Direction::default()],
            silent: false,
        };
        self.links.insert(link, connection);
        self.push(now, link, Side::Callee, Item::Call);
        link
    }

    /// Sends a frame from one end. Nothing happens when that end is closed.
    pub fn send(&mut self, now: Time, link: Link, from: Side, frame: EncodedFrame) {
        let open = self.links.get(&link).is_some_and(|c| c.open[from as usize]);
        if !open {
            return;
        }
        if self.rng.chance(self.options.reset_ppm.into(), 1_000_000) {
            self.counts.resets += 1;
            self.reset(now, link);
            return;
        }
        let frame = if self.rng.chance(self.options.flip_ppm.into(), 1_000_000) {
            self.counts.flips += 1;
            super::wire::flip_bit(&frame, self.rng.word())
        } else {
            frame
        };
        self.push(now, link, from.other(), Item::Frame(frame));
    }

    /// One end closes the connection; the other hears of it after all that was sent before.
    pub fn close(&mut self, now: Time, link: Link, from: Side) {
        let Some(connection) = self.links.get_mut(&link) else {
            return;
        };
        if !std::mem::replace(&mut connection.open[from as usize], false) {
            return;
        }
        // What was on the way here will not be read.
        let here = &mut connection.towards[from as usize];
        here.queue.clear();
        here.bytes = 0;
        self.push(now, link, from.other(), Item::End);
        self.forget_closed();
    }

    /// Both ends lose the connection, in the middle of whatever was on the way.
    pub fn reset(&mut self, now: Time, link: Link) {
        for side in [Side::Caller, Side::Callee] {
            let Some(connection) = self.links.get_mut(&link) else {
                return;
            };
            let direction = &mut connection.towards[side as usize];
            let established = direction
                .queue
                .iter()
                .all(|item| !matches!(item, Item::Call | Item::Answer));
            if !established {
                return;
            }
            // Some of what is under way arrives first.
            let kept = self.rng.index(direction.queue.len() + 1);
            direction.queue.truncate(kept);
            direction.bytes = direction.queue.iter().map(item_bytes).sum();
            self.push(now, link, side, Item::End);
        }
    }

    /// A connection falls silent both ways; nobody is told.
    pub fn silence(&mut self, link: Link) {
        if let Some(connection) = self.links.get_mut(&link) {
            connection.silent = true;
        }
    }

    /// The connections that stand, in order.
    pub fn established(&self) -> Vec<Link> {
        let standing = self.links.iter().filter(|(_, c)| c.open == [true, true] && !c.silent);
        standing.map(|(link, _)| *link).collect()
    }

    /// All connections that fell silent are cut, so that healing does not wait for timeouts alone.
    pub fn end_silence(&mut self, now: Time) {
        let silent: Vec<Link> = self.links.iter().filter(|(_, c)| c.silent).map(|(l, _)| *l).collect();
        for link in silent {
            self.links.get_mut(&link).expect("listed above").silent = false;
            for side in [Side::Caller, Side::Callee] {
                self.push(now, link, side, Item::End);
            }
        }
    }

    /// Sends a message that may be lost or late, and doubled if its transport may do that.
    pub fn message(&mut self, now: Time, (from, to): (Process, Process), message: M, may_double: bool) {
        if self.rng.permille(self.options.loss_permille) {
            self.counts.lost += 1;
            return;
        }
        let copies = 1 + u32::from(may_double && self.rng.permille(self.options.double_permille));
        for _ in 0..copies {
            let mut delay = self.delay(from, to);
            if self.rng.permille(self.options.late_permille) {
                delay += self.rng.span(Duration::from_millis(5), Duration::from_millis(300));
            }
            let message = message.clone();
            self.outbox.push((now + delay, NetEvent::Message { from, to, message }));
        }
    }

    fn delay(&mut self, from: Process, to: Process) -> Duration {
        let extra = self
            .slow
            .get(&from)
            .max(self.slow.get(&to))
            .copied()
            .unwrap_or_default();
        self.rng.spread(self.options.delay) + extra
    }

    /// Blocks or opens a way, one direction. Several faults may block the same way.
    pub fn block(&mut self, now: Time, from: Process, to: Process, blocked: bool) {
        let count = self.blocked.entry((from, to)).or_default();
        if blocked {
            *count += 1;
            return;
        }
        *count = count.checked_sub(1).expect("opened as often as blocked");
        if *count == 0 {
            self.blocked.remove(&(from, to));
            self.release(now, from, to);
        }
    }

    /// Opens all ways and lets everything be as quick as it should.
    pub fn heal(&mut self, now: Time) {
        let blocked: Vec<(Process, Process)> = std::mem::take(&mut self.blocked).into_keys().collect();
        for (from, to) in blocked {
            self.release(now, from, to);
        }
        self.slow.clear();
        let options = &mut self.options;
        (options.reset_ppm, options.flip_ppm, options.loss_permille) = (0, 0, 0);
        (options.double_permille, options.late_permille) = (0, 0);
        self.end_silence(now);
    }

    /// Everything to and from a process takes longer; zero ends that.
    pub fn slow(&mut self, process: Process, extra: Duration) {
        if extra.is_zero() {
            self.slow.remove(&process);
        } else {
            self.slow.insert(process, extra);
        }
    }

    fn is_blocked(&self, from: Process, to: Process) -> bool {
        self.blocked.contains_key(&(from, to))
    }

    /// What waited on a way that is open again arrives soon, in its order.
    fn release(&mut self, now: Time, from: Process, to: Process) {
        let mut due = Vec::new();
        for (link, connection) in &mut self.links {
            for side in [Side::Caller, Side::Callee] {
                let at = connection.ends[side as usize];
                let sender = connection.ends[side.other() as usize];
                let direction = &mut connection.towards[side as usize];
                if (sender, at) == (from, to) && direction.waiting > 0 {
                    due.push((*link, side, std::mem::take(&mut direction.waiting)));
                }
            }
        }
        for (link, side, count) in due {
            for _ in 0..count {
                self.schedule(now, link, side);
            }
        }
    }

    fn push(&mut self, now: Time, link: Link, towards: Side, item: Item) {
        let Some(connection) = self.links.get_mut(&link) else {
            return;
        };
        let direction = &mut connection.towards[towards as usize];
        direction.bytes += item_bytes(&item);
        direction.queue.push_back(item);
        self.bytes_max = self.bytes_max.max(direction.bytes);
        self.schedule(now, link, towards);
    }

    fn schedule(&mut self, now: Time, link: Link, at: Side) {
        let ends = self.links[&link].ends;
        let delay = self.delay(ends[at.other() as usize], ends[at as usize]);
        let direction = &mut self.links.get_mut(&link).expect("looked up above").towards[at as usize];
        let arrival = (now + delay).max(direction.last_arrival);
        direction.last_arrival = arrival;
        self.outbox.push((arrival, NetEvent::Arrive { link, at }));
    }

    /// An entry of the schedule is due: what is to be handed to whom, if anything.
    pub fn handle(&mut self, now: Time, event: NetEvent<M>) -> Option<(Process, Delivery<M>)> {
        match event {
            NetEvent::Message { from, to, message } => {
                if self.is_blocked(from, to) || !self.up.contains(&to) {
                    self.counts.lost += 1;
                    return None;
                }
                self.counts.messages += 1;
                Some((to, Delivery::Message { from, message }))
            }
            NetEvent::Arrive { link, at } => self.arrive(now, link, at),
        }
    }

    fn arrive(&mut self, now: Time, link: Link, at: Side) -> Option<(Process, Delivery<M>)> {
        let connection = self.links.get(&link)?;
        let (to, from) = (connection.ends[at as usize], connection.ends[at.other() as usize]);
        let blocked = self.is_blocked(from, to);
        let listening = self.up.contains(&to);
        let connection = self.links.get_mut(&link).expect("looked up above");
        let direction = &mut connection.towards[at as usize];
        if blocked {
            direction.waiting += 1;
            return None;
        }
        if connection.silent {
            direction.queue.pop_front();
            return None;
        }
        let item = direction.queue.pop_front()?;
        direction.bytes -= item_bytes(&item).min(direction.bytes);
        match item {
            Item::Call if listening => {
                connection.open[at as usize] = true;
                self.push(now, link, at.other(), Item::Answer);
                Some((to, Delivery::Accepted { link, from }))
            }
            Item::Call => {
                self.push(now, link, at.other(), Item::Refusal);
                None
            }
            _ if !connection.open[at as usize] => {
                self.forget_closed();
                None
            }
            Item::Answer => Some((to, Delivery::Connected { link })),
            Item::Frame(frame) => {
                self.counts.frames += 1;
                let kind = frame.head.get(KIND_AT).copied();
                self.counts.copies += u64::from(kind == Some(COPY));
                self.counts.fetched += u64::from(kind == Some(READ_ANSWER) && matches!(to, Process::Node(_)));
                Some((to, Delivery::Frame { link, frame }))
            }
            Item::End | Item::Refusal => {
                let refused = matches!(item, Item::Refusal);
                connection.open[at as usize] = false;
                self.forget_closed();
                Some((to, Delivery::Closed { link, refused }))
            }
        }
    }

    fn forget_closed(&mut self) {
        self.links.retain(|_, c| {
            let news = c.towards.iter().any(|direction| !direction.queue.is_empty());
            c.open != [false, false] || (news && !c.silent)
        });
    }
}

fn item_bytes(item: &Item) -> usize {
    match item {
        Item::Frame(frame) => frame.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use cairn_proto::ids::Correlation;
    use cairn_proto::message::{Empty, Envelope, Message};

    use super::*;
    use crate::sim::schedule::Schedule;

    const A: Process = Process::Client(0);
    const B: Process = Process::Node(0);

    struct Bench {
        net: Network<u32>,
        schedule: Schedule<NetEvent<u32>>,
    }

    impl Bench {
        fn new() -> Bench {
            let options = NetworkOptions {
                delay: Duration::from_micros(100),
                reset_ppm: 0,
                flip_ppm: 0,
                loss_permille: 0,
                double_permille: 0,
                late_permille: 0,
            };
            let mut net = Network::new(options, Rng::new(1));
            net.process_back(Time::ZERO, A);
            net.process_back(Time::ZERO, B);
            Bench {
                net,
                schedule: Schedule::default(),
            }
        }

        fn now(&self) -> Time {
            self.schedule.now()
        }

        /// Everything that arrives until nothing is under way.
        fn settle(&mut self) -> Vec<(Process, String)> {
            let mut seen = Vec::new();
            loop {
                for (at, event) in self.net.take_events() {
                    self.schedule.at(at, event);
                }
                let Some(event) = self.schedule.next_event() else {
                    return seen;
                };
                if let Some((to, delivery)) = self.net.handle(self.schedule.now(), event) {
                    let words = match delivery {
                        Delivery::Frame { frame, .. } => {
                            let envelope = crate::sim::wire::decode(&frame).unwrap();
                            format!("frame {}", envelope.correlation)
                        }
                        Delivery::Accepted { .. } => "accepted".to_string(),
                        Delivery::Connected { .. } => "connected".to_string(),
                        Delivery::Closed { refused, .. } => format!("closed {refused}"),
                        Delivery::Message { message, .. } => format!("message {message}"),
                    };
                    seen.push((to, words));
                }
            }
        }

        fn send(&mut self, link: Link, from: Side, number: u64) {
            let frame = Envelope::new(Correlation(number), Message::Ping(Empty)).encode();
            self.net.send(self.now(), link, from, frame);
        }

        fn connected(&mut self) -> Link {
            let link = self.net.connect(self.now(), A, B);
            assert_eq!(
                self.settle(),
                [(B, "accepted".to_string()), (A, "connected".to_string())]
            );
            link
        }
    }

    fn words(seen: &[(Process, String)]) -> Vec<&str> {
        seen.iter().map(|(_, words)| &words[..]).collect()
    }

    #[test]
    fn frames_of_one_direction_keep_their_order_also_through_a_block() {
        let mut bench = Bench::new();
        let link = bench.connected();
        for number in 0..20 {
            bench.send(link, Side::Caller, number);
        }
        bench.net.block(bench.now(), A, B, true);
        bench.send(link, Side::Callee, 99);
        assert_eq!(words(&bench.settle()), ["frame 99"], "the other direction is open");
        bench.net.block(bench.now(), A, B, false);
        bench.send(link, Side::Caller, 20);
        let expected: Vec<String> = (0..=20).map(|number| format!("frame {number}")).collect();
        assert_eq!(words(&bench.settle()), expected);
    }

    #[test]
    fn who_is_killed_is_heard_of_and_whose_power_fails_is_not_until_it_is_back() {
        let mut bench = Bench::new();
        let link = bench.connected();
        bench.net.process_down(bench.now(), B, false);
        assert_eq!(bench.settle(), [(A, "closed false".to_string())]);
        bench.send(link, Side::Caller, 1);
        assert!(bench.settle().is_empty());

        bench.net.process_back(bench.now(), B);
        let link = bench.connected();
        bench.net.process_down(bench.now(), B, true);
        bench.send(link, Side::Caller, 1);
        assert!(bench.settle().is_empty(), "half-open");
        bench.net.process_back(bench.now(), B);
        assert_eq!(bench.settle(), [(A, "closed false".to_string())]);
    }

    #[test]
    fn nobody_listens_where_no_process_is() {
        let mut bench = Bench::new();
        bench.net.process_down(bench.now(), B, false);
        bench.net.connect(bench.now(), A, B);
        assert_eq!(bench.settle(), [(A, "closed true".to_string())]);
        bench.net.message(bench.now(), (A, B), 7, true);
        assert!(bench.settle().is_empty());
    }

    #[test]
    fn a_reset_takes_along_what_was_under_way() {
        let mut bench = Bench::new();
        let link = bench.connected();
        for number in 0..20 {
            bench.send(link, Side::Caller, number);
        }
        bench.net.reset(bench.now(), link);
        bench.send(link, Side::Caller, 20);
        let seen = bench.settle();
        let frames = seen.iter().filter(|(_, words)| words.starts_with("frame")).count();
        let closed = seen.iter().filter(|(_, words)| words == "closed false").count();
        assert!(frames < 20, "{seen:?}");
        assert_eq!(closed, 2, "{seen:?}");
        assert!(bench.net.links.is_empty());
    }

    #[test]
    fn what_falls_silent_stays_so_until_somebody_closes_it() {
        let mut bench = Bench::new();
        let link = bench.connected();
        bench.net.silence(link);
        bench.send(link, Side::Caller, 1);
        bench.send(link, Side::Callee, 2);
        bench.net.close(bench.now(), link, Side::Caller);
        assert!(bench.settle().is_empty());
        bench.net.end_silence(bench.now());
        assert_eq!(bench.settle(), [(B, "closed false".to_string())]);
    }
}
