//! Whole groups in one thread, on virtual time, over a network and logs that fail.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use cairn_proto::control::Code;
use cairn_proto::ids::ClusterId;
use cairn_proto::time::Time;

use super::*;
use crate::log::memory::MemoryLogStore;
use crate::state::command::{AddMember, Command, InitCluster, RaiseFeatureLevel, RemoveMember, UpdateMember};
use crate::state::{Outcome, Refusal};

/// Numbers that look random and are the same in every run (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

struct World {
    now: Time,
    nodes: BTreeMap<u64, MetaNode<MemoryLogStore>>,
    down: BTreeMap<u64, MemoryLogStore>,
    network: VecDeque<(u64, u64, Vec<u8>)>,
    cut: Vec<u64>,
    /// Of 100 messages this many are lost.
    loss: u64,
    dice: Dice,
    answers: BTreeMap<Ticket, Answer>,
    last_ticket: u64,
    runs: u64,
    /// Levels that were proposed, the highest one known to be applied, and what a read must see at least.
    writes: BTreeMap<Ticket, u32>,
    acknowledged: u32,
    reads: BTreeMap<Ticket, u32>,
    /// Everything that was sent, in order: what two runs with one seed have in common.
    trace: u32,
}

fn member(id: u64) -> Member {
    Member {
        address: format!("meta-{id}:1"),
        directory: 0,
    }
}

fn config(id: u64, run: u64) -> NodeConfig {
    NodeConfig {
        snapshot_entries: 20,
        kept_entries: 5,
        ..NodeConfig::new(id, run)
    }
}

impl World {
    fn new(count: u64, seed: u64) -> World {
        let members: BTreeMap<u64, Member> = (1..=count).map(|id| (id, member(id))).collect();
        let mut world = World {
            now: Time::ZERO,
            nodes: BTreeMap::new(),
            down: BTreeMap::new(),
            network: VecDeque::new(),
            cut: vec![],
            loss: 0,
            dice: Dice(seed * 2 + 1),
            answers: BTreeMap::new(),
            last_ticket: 0,
            runs: 0,
            writes: BTreeMap::new(),
            acknowledged: 0,
            reads: BTreeMap::new(),
            trace: 0,
        };
        for id in 1..=count {
            world.start(id, MemoryLogStore::new(bootstrap(members.clone())));
        }
        world
    }

    fn start(&mut self, id: u64, log: MemoryLogStore) {
        self.runs += 1;
        self.nodes
            .insert(id, MetaNode::new(config(id, self.runs), log).unwrap());
    }

    fn crash(&mut self, id: u64) {
        let mut log = self.nodes.remove(&id).unwrap().into_log();
        let kept = self.dice.below(log.unflushed() as u64 + 1) as usize;
        log.crash(kept);
        self.down.insert(id, log);
    }

    fn restart(&mut self, id: u64) {
        let log = self.down.remove(&id).unwrap();
        self.start(id, log);
    }

    fn collect(&mut self) {
        for (id, node) in &mut self.nodes {
            while node.drive().unwrap() {
                while let Some(action) = node.poll_action() {
                    match action {
                        MetaAction::Send { to, message } => {
                            self.trace = crc32fast::hash(&[&self.trace.to_le_bytes()[..], &message].concat());
                            self.network.push_back((*id, to, message));
                        }
                        MetaAction::Answer(ticket, answer) => {
                            if let (Some(floor), Answer::Readable) = (self.reads.get(&ticket), &answer) {
                                let seen = node.state().feature_level();
                                assert!(seen >= *floor, "a read saw {seen} after {floor} was acknowledged");
                            }
                            if let (Some(level), Answer::Applied(_)) = (self.writes.get(&ticket), &answer) {
                                self.acknowledged = self.acknowledged.max(*level);
                            }
                            assert_eq!(self.answers.insert(ticket, answer), None, "one answer for each request");
                        }
                        MetaAction::Leader { .. } => {}
                    }
                }
            }
        }
    }

    /// One virtual millisecond.
    fn turn(&mut self) {
        self.now += Duration::from_millis(1);
        for node in self.nodes.values_mut() {
            node.tick(self.now);
        }
        self.collect();
        for _ in 0..self.network.len() {
            let (from, to, message) = self.network.pop_front().unwrap();
            let lost = self.dice.below(100) < self.loss || self.cut.contains(&from) || self.cut.contains(&to);
            if self.loss > 0 && !lost && self.dice.below(10) == 0 {
                // Late, and so out of order.
                self.network.push_back((from, to, message));
            } else if let Some(node) = self.nodes.get_mut(&to).filter(|_| !lost) {
                node.step(&message).unwrap();
            }
        }
        self.collect();
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&World) -> bool) {
        for _ in 0..120_000 {
            if done(self) {
                return;
            }
            self.turn();
        }
        panic!("two virtual minutes, and still not: {what}");
    }

    fn leader(&self) -> Option<u64> {
        let mut leaders = self
            .nodes
            .iter()
            .filter(|(id, node)| !self.cut.contains(id) && node.leads());
        let leader = leaders.next().map(|(id, _)| *id);
        leader.filter(|_| leaders.next().is_none())
    }

    fn await_leader(&mut self) -> u64 {
        self.until("a leader", |world| world.leader().is_some());
        self.leader().unwrap()
    }

    fn send(&mut self, to: u64, command: impl Into<Command>) -> Ticket {
        self.last_ticket += 1;
        let ticket = Ticket(self.last_ticket);
        self.nodes.get_mut(&to).unwrap().propose(ticket, 0, command.into());
        ticket
    }

    fn answer(&mut self, ticket: Ticket) -> Answer {
        self.until("an answer", |world| world.answers.contains_key(&ticket));
        self.answers[&ticket].clone()
    }

    /// Proposes until it was applied for certain.
    fn apply(&mut self, command: impl Into<Command>) -> Result<Outcome, Refusal> {
        let command = command.into();
        for _ in 0..1000 {
            let leader = self.await_leader();
            let ticket = self.send(leader, command.clone());
            match self.answer(ticket) {
                Answer::Applied(result) => return *result,
                Answer::Refused(refusal) if refusal.code == Code::InvalidMember => return Err(refusal),
                _ => self.turn(),
            }
        }
        panic!("never applied: {command:?}");
    }

    fn init(&mut self) {
        self.apply(InitCluster {
            cluster: ClusterId([1; 16]),
            feature_level: 1,
        })
        .unwrap();
    }

    /// Something that can be seen in the state.
    fn write(&mut self, level: u32) {
        self.apply(RaiseFeatureLevel { level }).unwrap();
    }

    fn await_equal(&mut self) {
        self.until("equal states everywhere", |world| {
            let mut states = world.nodes.values().map(|node| node.state().encode());
            let first = states.next();
            states.all(|state| Some(&state) == first.as_ref())
        });
    }
}

#[test]
fn a_single_member_leads_and_survives_its_crash() {
    let mut world = World::new(1, 1);
    world.init();
    world.write(7);
    world.crash(1);
    world.restart(1);
    world.until("the state is back", |world| {
        world.nodes[&1].state().feature_level() == 7
    });
}

#[test]
fn three_members_agree_over_a_lossy_network_and_through_crashes() {
    for seed in 1..6 {
        let mut world = World::new(3, seed);
        world.loss = 10;
        world.init();
        for level in 2..40 {
            world.write(level);
            if level % 7 == 0 {
                let victim = 1 + world.dice.below(3);
                world.crash(victim);
                world.write(level);
                world.restart(victim);
            }
        }
        world.loss = 0;
        world.await_equal();
        assert!(world.nodes.values().all(|node| node.state().feature_level() == 39));
    }
}

#[test]
fn everything_applied_survives_a_power_cut_of_all() {
    for seed in 1..8 {
        let mut world = World::new(3, seed);
        world.init();
        for level in 2..30 {
            world.write(level);
            if level % 5 == 0 {
                for id in 1..=3 {
                    world.crash(id);
                }
                world.network.clear();
                for id in 1..=3 {
                    world.restart(id);
                }
                let leader = world.await_leader();
                assert_eq!(world.nodes[&leader].state().feature_level(), level);
            }
        }
    }
}

#[test]
fn a_crash_after_a_snapshot_and_before_the_flush_of_its_commit_index_is_survived() {
    let mut world = World::new(1, 1);
    world.init();
    // A snapshot after each entry: whenever the power fails, the commit index is behind it.
    for round in 0..4 {
        let mut log = world.nodes.remove(&1).unwrap().into_log();
        log.crash(0);
        let every_entry = NodeConfig {
            snapshot_entries: 1,
            kept_entries: 1,
            ..NodeConfig::new(1, 100 + round)
        };
        world.nodes.insert(1, MetaNode::new(every_entry, log).unwrap());
        world.await_leader();
        world.write(1);
    }
}

/// Crashes, cuts and losses at random while every member that believes that it leads is written to and read from.
fn storm(seed: u64) {
    let mut world = World::new(3 + 2 * (seed % 2), seed);
    let count = 3 + 2 * (seed % 2);
    world.init();
    let mut healed_at = 0;
    for step in 2..200 {
        if step >= healed_at {
            world.cut.clear();
        }
        world.loss = [0, 5, 30][world.dice.below(3) as usize];
        let victim = 1 + world.dice.below(count);
        match world.dice.below(8) {
            0 if world.nodes.contains_key(&victim) => world.crash(victim),
            1 | 2 if world.down.contains_key(&victim) => world.restart(victim),
            // Often the leader: for a while it will not know that another one is elected.
            3 if step >= healed_at => {
                world.cut = vec![world.leader().unwrap_or(victim)];
                healed_at = step + 1 + world.dice.below(12) as u32;
            }
            _ => {}
        }
        let leaders: Vec<u64> = world
            .nodes
            .iter()
            .filter(|(_, node)| node.leads())
            .map(|(id, _)| *id)
            .collect();
        for id in leaders {
            let ticket = world.send(id, RaiseFeatureLevel { level: step });
            world.writes.insert(ticket, step);
            world.last_ticket += 1;
            let ticket = Ticket(world.last_ticket);
            world.reads.insert(ticket, world.acknowledged);
            world.nodes.get_mut(&id).unwrap().read_index(ticket);
        }
        for _ in 0..world.dice.below(300) {
            world.turn();
        }
    }
    (world.loss, world.cut) = (0, vec![]);
    for id in world.down.keys().copied().collect::<Vec<_>>() {
        world.restart(id);
    }
    world.write(1000);
    world.await_equal();
    let readable = world
        .reads
        .keys()
        .filter(|ticket| world.answers.get(ticket) == Some(&Answer::Readable))
        .count();
    assert!(world.acknowledged > 0 && readable > 0, "seed {seed}: nothing was done");
}

#[test]
fn reads_see_every_acknowledged_write_through_any_storm() {
    (1..=12).for_each(storm);
}

#[test]
fn one_seed_gives_one_trace() {
    let run = |seed| {
        let mut world = World::new(3, seed);
        world.loss = 5;
        world.init();
        (2..20).for_each(|level| world.write(level));
        (world.trace, world.now)
    };
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}

#[test]
fn a_follower_that_fell_behind_gets_a_snapshot() {
    let mut world = World::new(3, 1);
    world.init();
    let leader = world.await_leader();
    let away = (1..=3).find(|id| *id != leader).unwrap();
    world.crash(away);
    for level in 2..100 {
        world.write(level);
    }
    let now = world.await_leader();
    let log = world.nodes[&now].status().log.0;
    assert!(log < 30, "the log is compacted, it has {log} entries");
    world.restart(away);
    world.loss = 20;
    world.await_equal();
    // And it is as good as the others: with the other follower gone it makes the majority.
    world.loss = 0;
    let other = (1..=3).find(|id| *id != leader && *id != away).unwrap();
    world.crash(other);
    world.write(200);
    world.crash(away);
    world.restart(away);
    world.until("it has kept the snapshot", |world| {
        world.nodes[&away].state().feature_level() == 200
    });
}

#[test]
fn members_come_and_go() {
    let mut world = World::new(3, 1);
    world.init();
    (2..60).for_each(|level| world.write(level));
    world.start(4, MemoryLogStore::default());
    world
        .apply(AddMember {
            id: 4,
            address: "meta-4:1".into(),
            directory: 9,
        })
        .unwrap();
    world.await_equal();
    assert_eq!(world.nodes[&4].state().members().len(), 4);
    // The same again is no error, another one with the id is.
    world
        .apply(AddMember {
            id: 4,
            address: "meta-4:1".into(),
            directory: 9,
        })
        .unwrap();
    let again = world.apply(AddMember {
        id: 4,
        address: "elsewhere:1".into(),
        directory: 9,
    });
    assert_eq!(again.unwrap_err().code, Code::InvalidMember);

    let leader = world.await_leader();
    world.apply(RemoveMember { id: leader }).unwrap();
    world.until("it knows", |world| world.nodes[&leader].is_removed());
    world.crash(leader);
    world.write(100);
    world.crash(4);
    world.restart(4);
    world.await_equal();
    assert!(!world.nodes[&4].state().members().contains_key(&leader));
    let back = world.apply(AddMember {
        id: leader,
        address: "meta-1:1".into(),
        directory: 9,
    });
    assert_eq!(back.unwrap_err().code, Code::InvalidMember, "an id is never used again");
}

#[test]
fn a_member_that_lost_its_directory_is_not_taken_for_the_old_one() {
    let mut world = World::new(3, 1);
    world.init();
    world
        .apply(UpdateMember {
            id: 2,
            address: "meta-2:1".into(),
            directory: 5,
        })
        .unwrap();
    let wiped = world.apply(UpdateMember {
        id: 2,
        address: "meta-2:1".into(),
        directory: 6,
    });
    assert_eq!(wiped.unwrap_err().code, Code::InvalidMember);
}

#[test]
fn a_read_sees_what_was_committed_and_a_deposed_leader_gives_none() {
    let mut world = World::new(3, 1);
    world.init();
    let old = world.await_leader();
    world.write(5);
    world.nodes.get_mut(&old).unwrap().read_index(Ticket(1_000_000));
    assert_eq!(world.answer(Ticket(1_000_000)), Answer::Readable);

    // Cut off, it still believes that it leads; the others have moved on.
    world.cut = vec![old];
    world.nodes.get_mut(&old).unwrap().read_index(Ticket(1_000_001));
    let lost = world.send(old, RaiseFeatureLevel { level: 77 });
    world.write(6);
    let answer = world.answer(Ticket(1_000_001));
    assert!(matches!(answer, Answer::Refused(_)), "{answer:?}");
    let answer = world.answer(lost);
    assert!(matches!(answer, Answer::Unknown(_)), "{answer:?}");
    world.cut.clear();
    world.await_equal();
    assert_eq!(
        world.nodes[&old].state().feature_level(),
        6,
        "what no majority had is gone"
    );
    let follower = (1..=3).find(|id| Some(*id) != world.leader()).unwrap();
    world.nodes.get_mut(&follower).unwrap().read_index(Ticket(1_000_002));
    let Answer::Refused(refusal) = world.answer(Ticket(1_000_002)) else {
        panic!("a follower reads")
    };
    assert_eq!(refusal.code, Code::NotLeader);
}

#[test]
fn a_leader_that_is_to_stop_hands_over_at_once() {
    let mut world = World::new(3, 1);
    world.init();
    let leader = world.await_leader();
    let before = world.now;
    world.nodes.get_mut(&leader).unwrap().hand_over();
    world.until("another leader", |world| {
        world.leader().is_some_and(|now| now != leader)
    });
    assert!(
        world.now - before < Duration::from_millis(100),
        "well below an election timeout"
    );
    world.write(3);
}

#[test]
fn proposals_in_flight_are_bounded_and_share_flushes() {
    let mut world = World::new(3, 1);
    world.init();
    let leader = world.await_leader();
    let before = world.nodes[&leader].log().flushes();
    let count = crate::limits::PROPOSALS_MAX as u64 + 10;
    let tickets: Vec<Ticket> = (0..count)
        .map(|level| world.send(leader, RaiseFeatureLevel { level: level as u32 }))
        .collect();
    let mut busy = 0;
    for ticket in tickets {
        match world.answer(ticket) {
            Answer::Applied(result) => assert_eq!(*result, Ok(Outcome::Done)),
            Answer::Refused(refusal) if refusal.code == Code::Busy => busy += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(busy, 10);
    let flushes = world.nodes[&leader].log().flushes() - before;
    assert!(flushes <= 3, "{flushes} flushes for one batch");
}

#[test]
fn a_failed_flush_stops_the_node_and_no_dependent_message_leaves_it() {
    let mut world = World::new(3, 1);
    world.init();
    let leader = world.await_leader();
    let node = world.nodes.get_mut(&leader).unwrap();
    node.log_mut().fail_flushes();
    node.propose(Ticket(500), 0, RaiseFeatureLevel { level: 9 }.into());
    let mut answers = vec![];
    let error = loop {
        while let Some(action) = node.poll_action() {
            if let MetaAction::Answer(ticket, answer) = action {
                answers.push((ticket, answer));
            }
        }
        match node.drive() {
            Ok(true) => {}
            Ok(false) => panic!("it goes on"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, NodeError::Log(_)), "{error}");
    while let Some(MetaAction::Answer(ticket, answer)) = node.poll_action() {
        answers.push((ticket, answer));
    }
    assert!(
        matches!(&answers[..], [(Ticket(500), Answer::Unknown(_))]),
        "{answers:?}"
    );
    node.propose(Ticket(501), 0, RaiseFeatureLevel { level: 9 }.into());
    assert!(matches!(
        node.poll_action(),
        Some(MetaAction::Answer(Ticket(501), Answer::Refused(_)))
    ));
    world.crash(leader);
    world.write(10);
}

#[test]
fn a_member_that_lost_entries_says_so_instead_of_going_down() {
    let mut world = World::new(3, 1);
    world.init();
    (2..10).for_each(|level| world.write(level));
    world.await_equal();
    let leader = world.await_leader();
    let victim = (1..=3).find(|id| *id != leader).unwrap();
    let members: BTreeMap<u64, Member> = (1..=3).map(|id| (id, member(id))).collect();
    world.crash(victim);
    let fresh = MemoryLogStore::new(bootstrap(members));
    world
        .nodes
        .insert(victim, MetaNode::new(config(victim, 99), fresh).unwrap());
    let found = (0..5000).find_map(|_| {
        world.now += Duration::from_millis(1);
        world.nodes.values_mut().for_each(|node| node.tick(world.now));
        world.collect();
        let messages: Vec<_> = world
            .network
            .drain(..)
            .filter(|(from, to, _)| *from == leader && *to == victim)
            .collect();
        let node = world.nodes.get_mut(&victim).unwrap();
        messages.iter().find_map(|(_, _, message)| node.step(message).err())
    });
    assert!(matches!(found, Some(StepError::LostEntries { .. })), "{found:?}");
}

#[test]
fn nonsense_and_misdirected_messages_change_nothing() {
    let mut world = World::new(3, 1);
    world.init();
    let node = world.nodes.get_mut(&1).unwrap();
    assert!(matches!(node.step(b"nonsense"), Err(StepError::Damaged(_))));
    let mut message = ::raft::eraftpb::Message::default();
    message.set_msg_type(::raft::eraftpb::MessageType::MsgHeartbeat);
    (message.to, message.from) = (2, 3);
    let bytes = message::encode_message(&message).unwrap();
    assert_eq!(node.step(&bytes), Err(StepError::Misdirected { from: 3, to: 2 }));
    world.write(3);
}
