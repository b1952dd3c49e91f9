//! What the leader decides, without a leader.

mod moving;
mod settling;

use std::time::Duration;

use cairn_proto::ids::*;
use cairn_proto::time::Time;

use super::view::{AttachmentReport, GroupReport, Phase, Progress, View};
use super::{HealSettings, decide};
use crate::limits::*;
use crate::state::command::*;
use crate::state::events::EventKind;
use crate::state::model::*;
use crate::state::tests::{Fixture, GIB, by_name, create, device, node, registration};

const NODES: u8 = 5;

/// A cluster with its leader, and a clock.
struct Story {
    fixture: Fixture,
    view: View,
    now: Time,
    settings: HealSettings,
    /// Nodes that send heartbeats.
    alive: Vec<u8>,
    proposed: Vec<Command>,
}

impl Story {
    /// Nodes 1 to 5 with a device each; volume `v` on 1, 2 and 3.
    fn new() -> Story {
        let mut fixture = Fixture::new(NODES);
        fixture.apply(create("v", GIB)).unwrap();
        let mut view = View::default();
        view.reset(Time::ZERO);
        let mut story = Story {
            fixture,
            view,
            now: Time::ZERO,
            settings: HealSettings {
                rebuild_after: Duration::from_secs(60),
            },
            alive: (1..=NODES).collect(),
            proposed: vec![],
        };
        story.pass(2);
        assert_eq!(story.group().in_sync, [device(1), device(2), device(3)]);
        assert!(story.proposed.is_empty(), "all is well");
        story
    }

    /// So many seconds go by; what is proposed is applied.
    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            for number in self.alive.clone() {
                self.view.heard_node(NodeId(number.into()), self.now);
                let serves = |(_, found): &(&DeviceId, &Device)| found.node == NodeId(number.into());
                let devices = self.fixture.0.devices().iter().filter(serves);
                for id in devices.map(|(id, _)| *id).collect::<Vec<_>>() {
                    self.view.heard_device(id, self.now);
                }
            }
            for command in decide(&self.fixture.0, &mut self.view, self.now, &self.settings) {
                self.proposed.push(command.clone());
                self.fixture.apply(command).unwrap();
            }
        }
    }

    fn dies(&mut self, number: u8) {
        self.alive.retain(|alive| *alive != number);
    }

    fn group(&self) -> Group {
        let id = self.fixture.0.find(&by_name("v")).unwrap().0;
        self.fixture.0.groups_of(id).next().unwrap().1.clone()
    }

    fn attach(&mut self, client: u8, caretaker: bool) -> Generation {
        let volume = VolumeId(1);
        self.fixture
            .apply(Attach {
                volume: Selector::Id(volume),
                client: ClientId([client; 16]),
                address: "c".into(),
                force: false,
                caretaker,
                displace: self.view.displaceable(volume, &self.fixture.0, self.now),
                after: None,
            })
            .unwrap();
        self.fixture.0.volumes()[&volume].generation
    }

    /// The holder gives the volume back.
    fn detach(&mut self, settled: bool) {
        let generation = self.fixture.0.volumes()[&VolumeId(1)].generation;
        let detach = Detach {
            volume: by_name("v"),
            generation,
            settled,
        };
        self.fixture.apply(detach).unwrap();
    }

    /// The holder changes the configuration.
    fn configure(&mut self, in_sync: &[u8], joining: &[u8]) {
        let devices = |numbers: &[u8]| numbers.iter().map(|number| device(*number)).collect();
        let change = GroupChange {
            index: GroupIndex(0),
            epoch: self.group().epoch,
            in_sync: devices(in_sync),
            joining: devices(joining),
            cause: String::new(),
        };
        let generation = self.fixture.0.volumes()[&VolumeId(1)].generation;
        let configured = self.fixture.apply(ConfigureGroups {
            volume: by_name("v"),
            generation,
            changes: vec![change],
        });
        let crate::state::Outcome::Configured(outcomes) = configured.unwrap() else {
            panic!("not a configuration")
        };
        assert_eq!(outcomes[0].2, None);
    }

    fn report(&mut self, caretaker: Option<u8>, copied: u64) {
        let progress = Progress {
            connected: true,
            copied_blocks: copied,
            lacking_blocks: 10,
            ..Progress::default()
        };
        let members = self.group().stale.iter().map(|device| (*device, progress)).collect();
        let report = GroupReport {
            epoch: self.group().epoch,
            phase: Phase::Serving,
            members,
        };
        let report = AttachmentReport {
            generation: self.fixture.0.volumes()[&VolumeId(1)].generation,
            caretaker: caretaker.map(|number| NodeId(number.into())),
            groups: [(GroupIndex(0), report)].into(),
            damaged_blocks: 0,
            repaired_blocks: 0,
        };
        self.view
            .heard_attachment(VolumeId(1), report, &self.fixture.0, self.now);
    }

    /// So many seconds with a holder that reports each second.
    fn pass_with(&mut self, caretaker: Option<u8>, seconds: u64) {
        for _ in 0..seconds {
            self.report(caretaker, 0);
            self.pass(1);
        }
    }

    fn keeper(&self) -> Option<NodeId> {
        self.view.tasks.get(&VolumeId(1)).map(|task| task.node)
    }

    fn count(&self, kind: EventKind) -> usize {
        let events = self.fixture.0.events();
        events.filter(|(_, event)| event.kind == kind).count()
    }
}

#[test]
fn a_device_that_is_lost_is_replaced_after_the_set_time_and_not_before() {
    let mut story = Story::new();
    story.attach(1, false);
    story.dies(3);
    story.pass_with(None, 12);
    assert_eq!(story.count(EventKind::DeviceSilent), 1);
    story.configure(&[1, 2], &[]);
    story.pass_with(None, 46);
    assert_eq!(story.group().stale, [device(3)], "it has time to come back");
    story.pass_with(None, 3);
    assert_eq!(story.group().stale, [device(4)], "the fewest promises, the lowest id");
    story.pass_with(None, 20);
    assert_eq!(story.count(EventKind::Replaced), 1);
    assert_eq!(story.keeper(), None, "the client does it");
}

#[test]
fn a_device_that_comes_back_in_time_is_not_replaced() {
    let mut story = Story::new();
    story.attach(1, false);
    story.dies(3);
    story.pass_with(None, 30);
    story.configure(&[1, 2], &[]);
    story.pass_with(None, 25);
    story.alive.push(3);
    story.pass_with(None, 100);
    assert_eq!(story.group().stale, [device(3)]);
    assert_eq!(
        (story.count(EventKind::DeviceSilent), story.count(EventKind::DeviceBack)),
        (1, 1)
    );
}

#[test]
fn a_device_that_flaps_makes_no_more_events_than_the_hysteresis_allows() {
    let mut story = Story::new();
    for round in 0..20 {
        story.alive.retain(|number| *number != 3);
        story.pass(8);
        if round % 2 == 0 {
            story.alive.push(3);
            story.pass(3);
        }
    }
    let events = story.count(EventKind::DeviceSilent) + story.count(EventKind::DeviceBack);
    assert_eq!(events, 1, "it was silent once, and never back for long enough");
}

#[test]
fn a_new_leader_counts_silence_from_its_own_beginning() {
    let mut story = Story::new();
    story.attach(1, false);
    story.dies(3);
    story.pass_with(None, 50);
    story.configure(&[1, 2], &[]);
    story.view.reset(story.now);
    story.pass_with(None, 58);
    assert_eq!(story.group().stale, [device(3)]);
    story.pass_with(None, 4);
    assert_eq!(story.group().stale, [device(4)]);
}

#[test]
fn a_device_that_has_failed_is_not_waited_for() {
    let mut story = Story::new();
    story.attach(1, false);
    story.configure(&[1, 2], &[]);
    let report = DeviceReport {
        id: device(3),
        capacity_bytes: 1 << 40,
        used_bytes: 0,
        commit_seq: CommitSeq(0),
        failed: true,
        trouble: "a write failed".into(),
    };
    story.fixture.apply(ReportDevices { devices: vec![report] }).unwrap();
    story.pass_with(None, 1);
    assert_eq!(story.group().stale, [device(4)]);
}

#[test]
fn without_a_device_that_stands_apart_there_is_rather_a_copy_less() {
    let mut story = Story::new();
    // Devices 4 and 5 are gone for good; device 6 stands beside device 1.
    story.dies(4);
    story.dies(5);
    let devices = vec![registration(device(1)), registration(device(6))];
    story.fixture.apply(node("n1", [""; 3], devices)).unwrap();
    story.attach(1, false);
    story.dies(3);
    story.configure(&[1, 2], &[]);
    story.pass_with(None, 100);
    assert_eq!(story.group().stale, [device(3)]);
    story.alive.push(5);
    story.pass_with(None, 2);
    assert_eq!(story.group().stale, [device(5)], "as soon as there is one");
}

#[test]
fn groups_with_the_fewest_copies_come_first_and_no_more_than_the_limits_at_once() {
    let mut story = Story::new();
    for number in 0..12 {
        story.fixture.apply(create(&format!("w{number}"), GIB)).unwrap();
    }
    let mut lost_one = vec![];
    for (id, group) in story.fixture.0.groups().clone() {
        let volume = Selector::Id(id.volume);
        let attach = Attach {
            volume: volume.clone(),
            client: ClientId([9; 16]),
            address: "c".into(),
            force: false,
            caretaker: false,
            displace: None,
            after: None,
        };
        story.fixture.apply(attach).unwrap();
        if group.in_sync.contains(&device(3)) {
            let mut in_sync = group.in_sync.clone();
            in_sync.retain(|member| *member != device(3));
            let change = GroupChange {
                index: id.index,
                epoch: group.epoch,
                in_sync,
                joining: vec![],
                cause: String::new(),
            };
            let generation = Generation::new(1).unwrap();
            let configure = ConfigureGroups {
                volume,
                generation,
                changes: vec![change],
            };
            story.fixture.apply(configure).unwrap();
            lost_one.push(id);
        }
    }
    assert!(lost_one.len() > 4, "{lost_one:?}");
    story.dies(3);
    // Device 2 is away, not lost: its groups have one copy within reach.
    story.pass(50);
    story.dies(2);
    story.pass(18);
    let mut targets = std::collections::BTreeMap::<DeviceId, usize>::new();
    for group in story.fixture.0.groups().values() {
        for device in &group.rebuilding {
            *targets.entry(*device).or_default() += 1;
        }
    }
    assert!(targets.values().all(|count| *count <= REBUILDS_MAX.1), "{targets:?}");
    let replaced = story.proposed.iter().filter_map(|command| match command {
        Command::ReplaceMember(replace) => Some(GroupId {
            volume: replace.volume,
            index: replace.index,
        }),
        _ => None,
    });
    let copies = |id: &GroupId| {
        let group = &story.fixture.0.groups()[id];
        group.in_sync.iter().filter(|member| **member != device(2)).count()
    };
    let order: Vec<usize> = replaced.map(|id| copies(&id)).collect();
    assert!(!order.is_empty() && order.is_sorted(), "{order:?}");
}

#[test]
fn a_volume_that_nobody_holds_gets_a_caretaker_when_something_can_be_done() {
    let mut story = Story::new();
    story.dies(3);
    story.pass(50);
    assert_eq!(story.keeper(), None, "it may come back by itself");
    story.pass(15);
    assert_eq!(story.keeper(), Some(NodeId(1)), "a member is lost, and must be ejected");
    story.attach(8, true);
    story.pass_with(Some(1), 3);
    assert_eq!(story.keeper(), Some(NodeId(1)));
    story.configure(&[1, 2], &[]);
    story.pass_with(Some(1), 2);
    assert_eq!(story.group().stale, [device(4)]);
    story.configure(&[1, 2], &[4]);
    story.configure(&[1, 2, 4], &[]);
    story.pass_with(Some(1), 2);
    story.detach(true);
    story.pass(1);
    assert_eq!(story.keeper(), None, "nothing is left to do");
}

#[test]
fn a_caretaker_whose_node_dies_is_followed_by_another() {
    let mut story = Story::new();
    story.dies(3);
    story.pass(65);
    let generation = story.attach(8, true);
    story.pass_with(Some(1), 3);
    story.dies(1);
    story.pass(8);
    assert_eq!(
        story.keeper(),
        None,
        "the first one is known no longer, and not yet for dead"
    );
    story.pass(30);
    assert_eq!(story.keeper(), Some(NodeId(2)));
    assert_eq!(
        story.view.displaceable(VolumeId(1), &story.fixture.0, story.now),
        Some(generation)
    );
    story.attach(9, true);
}

#[test]
fn a_living_guest_is_left_alone_however_it_is_seen_to_live() {
    let mut story = Story::new();
    let generation = story.attach(1, false);
    story.dies(3);
    let displaceable = |story: &Story| story.view.displaceable(VolumeId(1), &story.fixture.0, story.now);
    // It says nothing itself, but its connections live.
    for _ in 0..120 {
        let held = [(VolumeId(1), generation)];
        story
            .view
            .heard_volumes(NodeId(2), held, [], &story.fixture.0, story.now);
        story.pass(1);
    }
    assert_eq!((displaceable(&story), story.keeper()), (None, None));
    story.pass(50);
    story.report(None, 0);
    story.pass(50);
    assert_eq!(displaceable(&story), None, "it has said something itself");
    // A new leader knows nothing of that, and must not conclude from it.
    story.view.reset(story.now);
    story.pass(HOLDER_SILENCE_MS / 1000 - 1);
    assert_eq!((displaceable(&story), story.keeper()), (None, None));
    story.pass(3);
    assert_eq!(displaceable(&story), Some(generation));
    assert_eq!(story.keeper(), Some(NodeId(1)));
    // Whoever was granted it just now has had no time to say anything.
    story.attach(1, false);
    assert_eq!(displaceable(&story), None, "not even before the leader has looked");
    story.pass(HOLDER_SILENCE_MS / 1000);
    assert_eq!(displaceable(&story), None);
}

#[test]
fn a_guest_that_comes_back_ends_the_task() {
    let mut story = Story::new();
    story.dies(3);
    story.pass(65);
    story.attach(8, true);
    story.pass_with(Some(1), 3);
    let generation = story.attach(1, false);
    assert_eq!(generation, Generation::new(2).unwrap());
    story.pass(1);
    assert_eq!(story.keeper(), None);
}

#[test]
fn a_guest_that_comes_and_goes_between_two_looks_leaves_the_volume_to_its_caretaker() {
    let mut story = Story::new();
    story.dies(3);
    story.pass(65);
    let seen = |story: &Story| story.view.tasks_of(NodeId(1))[0].1;
    let first = seen(&story);
    story.attach(8, true);
    let generation = story.attach(1, false);
    story
        .fixture
        .apply(Detach {
            volume: Selector::Id(VolumeId(1)),
            generation,
            settled: true,
        })
        .unwrap();
    story.pass(1);
    assert!(seen(&story) >= generation && generation > first, "it is told anew");
    // Of its own grant, which it has let go, it need not be told.
    let generation = story.attach(8, true);
    story
        .fixture
        .apply(Detach {
            volume: Selector::Id(VolumeId(1)),
            generation,
            settled: true,
        })
        .unwrap();
    story.pass(1);
    assert!(seen(&story) < generation);
}

#[test]
fn a_caretaker_that_gets_nowhere_makes_room_for_others_and_is_tried_again_later() {
    let mut story = Story::new();
    story
        .view
        .heard_volumes(NodeId(2), [], [VolumeId(1)], &story.fixture.0, story.now);
    story.pass(1);
    assert_eq!(story.keeper(), Some(NodeId(1)), "of damage it takes care at once");
    story.attach(8, true);
    story.pass_with(Some(1), CARE_STUCK_MS.0 / 1000 + 2);
    assert_eq!(story.keeper(), None);
    story.detach(true);
    story.pass(CARE_PAUSE_MS.0 / 1000 - 10);
    assert_eq!(story.keeper(), None);
    story.pass(20);
    assert!(story.keeper().is_some());
    story.pass(CARE_STUCK_MS.0 / 1000 + 2);
    story.pass(CARE_PAUSE_MS.0 / 1000 + 10);
    assert_eq!(story.keeper(), None, "twice as long now");
    story.view.heard_volumes(NodeId(2), [], [], &story.fixture.0, story.now);
    story.pass(1);
    assert!(story.view.paused.is_empty(), "it is well");
}

#[test]
fn no_node_gets_more_volumes_than_it_can_take_care_of() {
    let mut story = Story::new();
    let volumes: Vec<VolumeId> = (0..30)
        .map(|number| match story.fixture.apply(create(&format!("w{number}"), GIB)) {
            Ok(crate::state::Outcome::Volume(id, _)) => id,
            other => panic!("{other:?}"),
        })
        .collect();
    story
        .view
        .heard_volumes(NodeId(2), [], volumes, &story.fixture.0, story.now);
    story.pass(1);
    for number in 1..=NODES {
        let tasks = story.view.tasks_of(NodeId(number.into()));
        assert_eq!(tasks.len(), CARE_PER_NODE_MAX, "node {number}");
    }
}
