//! The state machine by itself.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::control::Code as ErrorCode;
use cairn_proto::ids::*;
use cairn_proto::limits::VOLUME_BYTES_MAX;

use super::command::*;
use super::model::*;
use super::snapshot::StateError;
use super::*;
use crate::limits::*;

pub(crate) const GIB: u64 = 1 << 30;

pub(crate) fn device(number: u8) -> DeviceId {
    DeviceId {
        uuid: DeviceUuid([number; 16]),
        incarnation: Incarnation(1),
    }
}

pub(crate) fn registration(id: DeviceId) -> DeviceRegistration {
    DeviceRegistration {
        id,
        addresses: vec!["10.0.0.1:7000".into()],
        capacity_bytes: 1 << 40,
        used_bytes: 0,
        commit_seq: CommitSeq(0),
        cluster: None,
        displace: false,
    }
}

pub(crate) fn node(name: &str, domain: [&str; 3], devices: Vec<DeviceRegistration>) -> RegisterNode {
    let [room, rack, host] = domain.map(str::to_string);
    RegisterNode {
        name: name.into(),
        run: [1; 16],
        domain: FailureDomain { room, rack, host },
        version: "1".into(),
        feature_level: 1,
        devices,
    }
}

pub(crate) fn create(name: &str, size_bytes: u64) -> CreateVolume {
    CreateVolume {
        name: name.into(),
        size_bytes,
        replicas: 3,
        write_quorum: 2,
        min_copies_one: false,
        spread: Spread::Host,
        silent: vec![],
    }
}

pub(crate) fn by_name(name: &str) -> Selector {
    Selector::Name(name.into())
}

pub(crate) fn attach(name: &str, client: u8, force: bool) -> Attach {
    Attach {
        volume: by_name(name),
        client: ClientId([client; 16]),
        address: "here".into(),
        force,
        caretaker: false,
        displace: None,
        after: None,
    }
}

pub(crate) struct Fixture(pub(crate) State);

impl Fixture {
    /// A cluster with this many nodes of one device each.
    pub(crate) fn new(nodes: u8) -> Fixture {
        let member = Member {
            address: "meta:1".into(),
            directory: 0,
        };
        let mut fixture = Fixture(State::new(BTreeMap::from([(1, member)])));
        fixture
            .apply(InitCluster {
                cluster: ClusterId([9; 16]),
                feature_level: 1,
            })
            .unwrap();
        for number in 1..=nodes {
            fixture
                .apply(node(&format!("n{number}"), [""; 3], vec![registration(device(number))]))
                .unwrap();
        }
        fixture
    }

    pub(crate) fn apply(&mut self, command: impl Into<Command>) -> Result<Outcome, Refusal> {
        let before = self.0.clone();
        let result = self.0.apply(&Logged {
            time_ms: 5,
            command: command.into(),
        });
        assert_eq!(self.0.check_invariants(), Ok(()));
        if result.is_err() {
            assert_eq!(self.0, before, "what is refused changes nothing");
        }
        result
    }

    pub(crate) fn refused(&mut self, command: impl Into<Command>) -> ErrorCode {
        self.apply(command).unwrap_err().code
    }

    fn registered(&mut self, command: RegisterNode) -> Vec<DeviceOutcome> {
        match self.apply(command).unwrap() {
            Outcome::Registered { devices, .. } => devices,
            other => panic!("{other:?}"),
        }
    }

    fn group(&self, name: &str) -> Group {
        let id = self.0.find(&by_name(name)).unwrap().0;
        self.0.groups_of(id).next().unwrap().1.clone()
    }

    pub(crate) fn configure(
        &mut self,
        generation: u32,
        epoch: u64,
        in_sync: &[u8],
        joining: &[u8],
    ) -> Result<Option<ErrorCode>, Refusal> {
        let devices = |numbers: &[u8]| numbers.iter().map(|number| device(*number)).collect();
        let change = GroupChange {
            index: GroupIndex(0),
            epoch: Epoch(epoch),
            in_sync: devices(in_sync),
            joining: devices(joining),
            cause: String::new(),
        };
        let generation = Generation::new(generation).unwrap();
        let changes = vec![change];
        match self.apply(ConfigureGroups {
            volume: by_name("v"),
            generation,
            changes,
        })? {
            Outcome::Configured(outcomes) => Ok(outcomes[0].2.as_ref().map(|refusal| refusal.code)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn nothing_happens_before_the_cluster_has_its_id() {
    let mut fixture = Fixture(State::new(BTreeMap::new()));
    assert_eq!(fixture.refused(create("v", GIB)), ErrorCode::NotReady);
    fixture
        .apply(InitCluster {
            cluster: ClusterId([1; 16]),
            feature_level: 1,
        })
        .unwrap();
    fixture
        .apply(InitCluster {
            cluster: ClusterId([2; 16]),
            feature_level: 1,
        })
        .unwrap();
    assert_eq!(fixture.0.cluster(), Some(ClusterId([1; 16])), "the first one counts");
}

#[test]
fn the_state_does_not_grow_with_the_size_of_volumes() {
    let bytes = |size| {
        let mut fixture = Fixture::new(3);
        fixture.apply(create("v", size)).unwrap();
        // What has happened is told in words, which are not of one length.
        fixture.0.events.clear();
        fixture.0.encode().len()
    };
    let groups = |size| volumes::group_count(size).get();
    assert_eq!(
        (groups(4096), groups(GIB), groups(16 * GIB), groups(32 * GIB)),
        (1, 1, 1, 2)
    );
    assert_eq!((groups(512 * GIB), groups(VOLUME_BYTES_MAX)), (32, 32));
    assert_eq!(
        bytes(512 * GIB),
        bytes(VOLUME_BYTES_MAX),
        "512 times the size, not a byte more"
    );
    let growth = bytes(VOLUME_BYTES_MAX) - bytes(GIB);
    assert!(growth <= 31 * 128, "31 groups more, and nothing else: {growth} bytes");
    let mut fixture = Fixture::new(3);
    fixture.apply(create("v", GIB)).unwrap();
    fixture.0.events.clear();
    let before = fixture.0.encode().len();
    fixture
        .apply(GrowVolume {
            volume: by_name("v"),
            size_bytes: VOLUME_BYTES_MAX,
        })
        .unwrap();
    fixture.0.events.clear();
    assert_eq!(fixture.0.encode().len(), before);
}

#[test]
fn volumes_are_created_grown_and_deleted_and_ids_are_never_reused() {
    let mut fixture = Fixture::new(3);
    for size in [0, 4095, VOLUME_BYTES_MAX + 4096] {
        assert_eq!(fixture.refused(create("v", size)), ErrorCode::InvalidSize, "{size}");
    }
    for name in ["", ".v", "-", "a b", "a/b", "ä", &"x".repeat(129)] {
        assert_eq!(fixture.refused(create(name, GIB)), ErrorCode::InvalidName, "{name}");
    }
    for (replicas, write_quorum) in [(0, 0), (6, 4), (3, 1), (3, 4), (2, 1)] {
        let command = CreateVolume {
            replicas,
            write_quorum,
            ..create("v", GIB)
        };
        assert_eq!(fixture.refused(command), ErrorCode::InvalidArgument);
    }
    let Outcome::Volume(first, volume) = fixture.apply(create("v", GIB)).unwrap() else {
        panic!()
    };
    assert_eq!(
        (first, volume.generation, volume.layer),
        (VolumeId(1), Generation::NONE, Layer(0))
    );
    assert_eq!(fixture.refused(create("v", GIB)), ErrorCode::NameTaken);
    let shrink = GrowVolume {
        volume: by_name("v"),
        size_bytes: GIB / 2,
    };
    assert_eq!(fixture.refused(shrink), ErrorCode::InvalidSize);
    fixture
        .apply(GrowVolume {
            volume: by_name("v"),
            size_bytes: 2 * GIB,
        })
        .unwrap();

    fixture.apply(attach("v", 1, false)).unwrap();
    let delete = |force| DeleteVolume {
        volume: by_name("v"),
        force,
    };
    assert_eq!(fixture.refused(delete(false)), ErrorCode::VolumeAttached);
    assert!(!fixture.0.is_deleted(first));
    fixture.apply(delete(true)).unwrap();
    assert_eq!(fixture.refused(delete(true)), ErrorCode::VolumeNotFound);
    assert!(
        fixture.0.is_deleted(first) && !fixture.0.is_deleted(VolumeId(2)),
        "what was never there is not deleted"
    );
    assert!(fixture.0.groups().is_empty());
    let Outcome::Volume(second, _) = fixture.apply(create("v", GIB)).unwrap() else {
        panic!()
    };
    assert_eq!(second, VolumeId(2));
}

#[test]
fn generations_only_grow_and_the_last_holder_alone_counts() {
    let mut fixture = Fixture::new(3);
    fixture.apply(create("v", GIB)).unwrap();
    let granted = |outcome| match outcome {
        Outcome::Attached { volume, groups, .. } => {
            assert_eq!(groups.len(), 1);
            volume.generation.get()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(granted(fixture.apply(attach("v", 1, false)).unwrap()), 1);
    assert_eq!(
        granted(fixture.apply(attach("v", 1, false)).unwrap()),
        2,
        "each start takes a new one"
    );
    assert_eq!(fixture.refused(attach("v", 2, false)), ErrorCode::VolumeAttached);
    assert_eq!(granted(fixture.apply(attach("v", 2, true)).unwrap()), 3);
    let detach = |generation| Detach {
        volume: by_name("v"),
        generation: Generation::new(generation).unwrap(),
        settled: true,
    };
    fixture.apply(detach(2)).unwrap();
    assert!(
        fixture.0.find(&by_name("v")).unwrap().1.holder.is_some(),
        "an old grant gives nothing back"
    );
    assert_eq!(fixture.refused(detach(4)), ErrorCode::InvalidArgument);
    fixture.apply(detach(3)).unwrap();
    fixture.apply(detach(3)).unwrap();
    assert_eq!(
        granted(fixture.apply(attach("v", 1, false)).unwrap()),
        4,
        "not even after a release"
    );
}

#[test]
fn a_configuration_changes_by_compare_and_set_on_generation_and_epoch() {
    let mut fixture = Fixture::new(4);
    fixture.apply(create("v", GIB)).unwrap();
    let original = fixture.group("v");
    assert_eq!(original.in_sync.len(), 3);
    assert_eq!(
        fixture.configure(0, 1, &[1, 2], &[]).unwrap_err().code,
        ErrorCode::StaleGeneration
    );
    fixture.apply(attach("v", 1, false)).unwrap();
    fixture.apply(attach("v", 2, true)).unwrap();
    // Rule 18: the older holder comes too late.
    assert_eq!(
        fixture.configure(1, 1, &[1, 2], &[]).unwrap_err().code,
        ErrorCode::StaleGeneration
    );
    assert_eq!(fixture.configure(2, 1, &[2, 1], &[4]), Ok(None));
    assert_eq!(fixture.configure(2, 1, &[2, 1], &[4]), Ok(None), "sent again");
    assert_eq!(fixture.configure(2, 1, &[1, 3], &[]), Ok(Some(ErrorCode::StaleEpoch)));
    let group = fixture.group("v");
    assert_eq!((group.epoch, group.in_sync), (Epoch(2), vec![device(1), device(2)]));
    assert_eq!((group.joining, group.stale), (vec![device(4)], vec![device(3)]));
    assert_eq!(fixture.configure(2, 2, &[1, 2, 4], &[3]), Ok(None));
    assert!(fixture.group("v").stale.is_empty());
}

#[test]
fn a_repetition_of_what_a_newer_holder_has_changed_is_refused() {
    let mut fixture = Fixture::new(4);
    fixture.apply(create("v", GIB)).unwrap();
    fixture.apply(attach("v", 1, false)).unwrap();
    fixture.apply(attach("v", 2, true)).unwrap();
    assert_eq!(fixture.configure(2, 1, &[1, 2], &[]), Ok(None));
    // The older holder wanted the very same, by epoch and sets, and must not take it for its own.
    assert_eq!(
        fixture.configure(1, 1, &[1, 2], &[]).unwrap_err().code,
        ErrorCode::StaleGeneration
    );
    fixture
        .apply(DeleteVolume {
            volume: by_name("v"),
            force: true,
        })
        .unwrap();
    // Devices drop their replicas now: whoever joins one again by a late message is admitted nowhere.
    assert_eq!(
        fixture.configure(2, 2, &[1, 2], &[3]).unwrap_err().code,
        ErrorCode::VolumeNotFound
    );
    assert_eq!(fixture.refused(attach("v", 1, true)), ErrorCode::VolumeNotFound);
}

#[test]
fn a_configuration_that_breaks_a_rule_is_refused() {
    let mut fixture = Fixture::new(4);
    fixture.apply(create("v", GIB)).unwrap();
    fixture.apply(attach("v", 1, false)).unwrap();
    let invalid = Ok(Some(ErrorCode::InvalidConfiguration));
    assert_eq!(fixture.configure(1, 1, &[], &[]), invalid, "nobody in sync");
    assert_eq!(fixture.configure(1, 1, &[1, 2, 4], &[]), invalid, "4 has not joined");
    assert_eq!(fixture.configure(1, 1, &[1, 1, 2], &[]), invalid, "twice");
    assert_eq!(fixture.configure(1, 1, &[1, 2], &[2]), invalid, "in both sets");
    assert_eq!(
        fixture.configure(1, 1, &[1], &[]),
        invalid,
        "rule 20: fewer than the write quorum"
    );
    assert_eq!(
        fixture.configure(1, 1, &[1, 2, 3], &[77]),
        Ok(Some(ErrorCode::DeviceNotFound))
    );
    assert_eq!(fixture.group("v").epoch, Epoch(1));
    let change = GroupChange {
        index: GroupIndex(1),
        epoch: Epoch(1),
        in_sync: vec![device(1)],
        joining: vec![],
        cause: String::new(),
    };
    for changes in [vec![], vec![change.clone()], vec![change.clone(), change]] {
        let generation = Generation::new(1).unwrap();
        let command = ConfigureGroups {
            volume: by_name("v"),
            generation,
            changes,
        };
        assert_eq!(fixture.refused(command), ErrorCode::InvalidArgument);
    }
}

#[test]
fn the_rescue_set_is_the_last_one_with_a_quorum_until_there_is_one_again() {
    let mut fixture = Fixture::new(4);
    fixture
        .apply(CreateVolume {
            min_copies_one: true,
            ..create("v", GIB)
        })
        .unwrap();
    fixture.apply(attach("v", 1, false)).unwrap();
    assert_eq!(fixture.configure(1, 1, &[1, 2], &[]), Ok(None));
    assert!(fixture.group("v").rescue.is_empty());
    assert_eq!(fixture.configure(1, 2, &[1], &[4]), Ok(None));
    assert_eq!(fixture.group("v").rescue, [device(1), device(2)]);
    assert_eq!(fixture.configure(1, 3, &[1], &[]), Ok(None));
    assert_eq!(fixture.group("v").rescue, [device(1), device(2)]);
    assert_eq!(fixture.configure(1, 4, &[1], &[3]), Ok(None));
    assert_eq!(fixture.configure(1, 5, &[1, 3], &[]), Ok(None));
    assert!(fixture.group("v").rescue.is_empty());
}

#[test]
fn a_device_formatted_anew_is_another_member() {
    let mut fixture = Fixture::new(3);
    fixture.apply(create("v", GIB)).unwrap();
    let anew = DeviceId {
        incarnation: Incarnation(2),
        ..device(1)
    };
    assert_eq!(
        fixture.registered(node("n1", [""; 3], vec![registration(anew)]))[0].refusal,
        None
    );
    assert_eq!(fixture.0.devices()[&device(1)].state, DeviceState::Replaced);
    assert!(
        fixture.group("v").in_sync.contains(&device(1)),
        "the configuration is not changed behind the holder's back"
    );
    let old = fixture.registered(node("n1", [""; 3], vec![registration(device(1))]));
    assert_eq!(old[0].refusal.as_ref().unwrap().code, ErrorCode::DeviceSuperseded);
    fixture.apply(attach("v", 1, false)).unwrap();
    assert_eq!(
        fixture.configure(1, 1, &[2, 3], &[1]),
        Ok(Some(ErrorCode::InvalidConfiguration))
    );
}

#[test]
fn one_device_is_served_by_one_node() {
    let mut fixture = Fixture::new(2);
    let copy = fixture.registered(node("other", [""; 3], vec![registration(device(1))]));
    let refusal = copy[0].refusal.clone().unwrap();
    assert_eq!(refusal.code, ErrorCode::DeviceElsewhere);
    assert!(
        refusal.message.contains("`n1`") && refusal.message.contains("can't be served twice"),
        "{refusal}"
    );
    let moved = DeviceRegistration {
        displace: true,
        ..registration(device(1))
    };
    assert_eq!(fixture.registered(node("other", [""; 3], vec![moved]))[0].refusal, None);
    let twice = vec![registration(device(5)), registration(device(5))];
    assert_eq!(fixture.refused(node("n5", [""; 3], twice)), ErrorCode::InvalidArgument);
    let foreign = DeviceRegistration {
        cluster: Some(ClusterId([3; 16])),
        ..registration(device(6))
    };
    let outcome = fixture.registered(node("n6", [""; 3], vec![foreign]));
    assert_eq!(outcome[0].refusal.as_ref().unwrap().code, ErrorCode::ForeignDevice);
    let bad = DeviceRegistration {
        addresses: vec!["nowhere".into()],
        ..registration(device(7))
    };
    assert!(fixture.registered(node("n7", [""; 3], vec![bad]))[0].refusal.is_some());
    let behind = RegisterNode {
        feature_level: 0,
        ..node("n8", [""; 3], vec![])
    };
    assert_eq!(fixture.refused(behind), ErrorCode::FeatureLevel);
}

#[test]
fn a_device_that_says_less_than_it_did_has_forgotten_something() {
    let mut fixture = Fixture::new(3);
    let report = DeviceReport {
        id: device(1),
        capacity_bytes: 10,
        used_bytes: 3,
        commit_seq: CommitSeq(50),
        failed: false,
        trouble: String::new(),
    };
    fixture.apply(ReportDevices { devices: vec![report] }).unwrap();
    let at = |seq| DeviceRegistration {
        commit_seq: CommitSeq(seq),
        ..registration(device(1))
    };
    assert!(!fixture.registered(node("n1", [""; 3], vec![at(50)]))[0].forgot);
    assert!(fixture.registered(node("n1", [""; 3], vec![at(49)]))[0].forgot);
    assert_eq!(
        fixture.0.devices()[&device(1)].commit_seq,
        CommitSeq(50),
        "what was known stays"
    );
    assert!(fixture.0.devices()[&device(1)].forgot);
    assert_eq!(
        fixture.refused(create("v", GIB)),
        ErrorCode::NotEnoughDevices,
        "nothing new is placed there"
    );
}

#[test]
fn too_few_devices_are_counted_in_the_error() {
    let mut fixture = Fixture::new(3);
    let silent = vec![device(2)];
    let refusal = fixture
        .apply(CreateVolume {
            silent,
            ..create("v", GIB)
        })
        .unwrap_err();
    assert_eq!(refusal.code, ErrorCode::NotEnoughDevices);
    for words in ["needs 3", "there are 2", "1 more do not answer"] {
        assert!(refusal.message.contains(words), "{refusal}");
    }
    // Three devices of one host are one place.
    let mut fixture = Fixture::new(0);
    let devices = (1..=3).map(|number| registration(device(number))).collect();
    fixture.apply(node("n", [""; 3], devices)).unwrap();
    assert_eq!(fixture.refused(create("v", GIB)), ErrorCode::NotEnoughDevices);
    fixture
        .apply(CreateVolume {
            spread: Spread::Device,
            ..create("v", GIB)
        })
        .unwrap();
}

#[test]
fn copies_stand_as_far_apart_as_they_can() {
    let mut fixture = Fixture::new(0);
    for number in 1..=6u8 {
        // Two racks of three hosts each, in one room.
        let (rack, host) = (format!("r{}", number % 2), format!("h{number}"));
        fixture
            .apply(node(&host, ["room", &rack, &host], vec![registration(device(number))]))
            .unwrap();
    }
    fixture.apply(create("v", 512 * GIB)).unwrap();
    for group in fixture.0.groups().values() {
        let racks: BTreeSet<u8> = group.in_sync.iter().map(|device| device.uuid.0[0] % 2).collect();
        assert_eq!(racks.len(), 2, "not all copies in one rack: {group:?}");
    }
    let racks = CreateVolume {
        spread: Spread::Rack,
        ..create("w", GIB)
    };
    assert_eq!(fixture.refused(racks), ErrorCode::NotEnoughDevices);
}

#[test]
fn replica_sets_are_few_and_load_is_even() {
    let mut fixture = Fixture::new(30);
    for number in 0..40 {
        fixture.apply(create(&format!("v{number}"), 128 * GIB)).unwrap();
    }
    let mut load: BTreeMap<DeviceId, u32> = BTreeMap::new();
    let mut sets: BTreeMap<DeviceId, BTreeSet<Vec<DeviceId>>> = BTreeMap::new();
    for group in fixture.0.groups().values() {
        for device in &group.in_sync {
            *load.entry(*device).or_default() += 1;
            sets.entry(*device).or_default().insert(group.in_sync.clone());
        }
    }
    let (least, most) = (load.values().min().unwrap(), load.values().max().unwrap());
    assert_eq!(load.len(), 30);
    assert!(most - least <= 2, "320 groups on 30 devices: {least} to {most} each");
    assert!(sets.values().all(|sets| sets.len() <= COPYSETS_PER_DEVICE));
}

#[test]
fn bounds_hold() {
    let mut fixture = Fixture::new(3);
    let addresses = vec!["a:1".to_string(); ADDRESSES_MAX + 1];
    let many = DeviceRegistration {
        addresses,
        ..registration(device(9))
    };
    assert!(fixture.registered(node("n9", [""; 3], vec![many]))[0].refusal.is_some());
    let long = Attach {
        address: "x".repeat(TEXT_BYTES_MAX + 1),
        ..attach("v", 1, false)
    };
    fixture.apply(create("v", GIB)).unwrap();
    assert_eq!(fixture.refused(long), ErrorCode::InvalidArgument);
    let mut oversized = node("n1", [""; 3], vec![]);
    oversized.version = "x".repeat(COMMAND_BYTES_MAX);
    let logged = Logged {
        time_ms: 0,
        command: oversized.into(),
    };
    assert!(matches!(logged.encode(), Err(CommandError::TooLarge(_))));
}

#[test]
fn later_formats_and_unknown_tags_are_refused_with_words() {
    let bytes = Logged {
        time_ms: 1,
        command: RemoveMember { id: 2 }.into(),
    }
    .encode()
    .unwrap();
    let mut unknown = bytes.clone();
    unknown[1..3].copy_from_slice(&999u16.to_le_bytes());
    assert_eq!(
        Logged::decode(&unknown),
        Err(CommandError::Unknown { format: 1, tag: 999 })
    );
    let mut later = bytes.clone();
    later[0] = 2;
    let error = Logged::decode(&later).unwrap_err();
    assert!(error.to_string().contains("run a newer one"), "{error}");
    let mut longer = bytes;
    longer.push(0);
    assert!(matches!(Logged::decode(&longer), Err(CommandError::Damaged(_))));
}

#[test]
fn a_caretaker_gives_way_to_everybody_and_takes_from_nobody_who_may_live() {
    let mut fixture = Fixture::new(3);
    fixture.apply(create("v", GIB)).unwrap();
    let care = |client, displace| Attach {
        caretaker: true,
        displace: Generation::new(displace).filter(|_| displace > 0),
        ..attach("v", client, true)
    };
    let holder = |fixture: &Fixture| fixture.0.volumes()[&VolumeId(1)].holder.clone().unwrap();
    fixture.apply(care(8, 0)).unwrap();
    assert!(holder(&fixture).caretaker);
    assert_eq!(
        fixture.refused(care(9, 0)),
        ErrorCode::VolumeAttached,
        "another one is at work"
    );
    fixture.apply(care(8, 0)).unwrap();
    fixture.apply(care(9, 2)).unwrap();
    fixture.apply(attach("v", 1, false)).unwrap();
    assert!(!holder(&fixture).caretaker, "a guest needs no force");
    assert_eq!(fixture.refused(care(8, 0)), ErrorCode::VolumeAttached);
    assert_eq!(
        fixture.refused(care(8, 3)),
        ErrorCode::VolumeAttached,
        "the holder held for dead was another one"
    );
    assert_eq!(
        fixture.refused(care(1, 0)),
        ErrorCode::VolumeAttached,
        "by the guest's own id"
    );
    fixture.apply(care(8, 4)).unwrap();
    assert_eq!(holder(&fixture).generation, Generation::new(5).unwrap());
    let delete = DeleteVolume {
        volume: by_name("v"),
        force: false,
    };
    fixture.apply(delete).unwrap();
    assert!(fixture.0.is_deleted(VolumeId(1)), "an operator needs no force either");
}

#[test]
fn an_attachment_that_was_asked_for_long_ago_takes_nothing_from_who_came_since() {
    let mut fixture = Fixture::new(3);
    fixture.apply(create("v", GIB)).unwrap();
    let after = |client, generation| Attach {
        after: Generation::new(generation),
        ..attach("v", client, true)
    };
    // Client 1 asks twice, because no answer comes; both are still on their way.
    let late = [after(1, 0), after(1, 0)];
    fixture.apply(late[0].clone()).unwrap();
    assert_eq!(fixture.refused(late[1].clone()), ErrorCode::StaleGeneration);
    // It dies, and client 2 takes over, with force, from what it has seen.
    let ghost = after(1, 1);
    fixture.apply(after(2, 1)).unwrap();
    let before = fixture.0.encode();
    assert_eq!(fixture.refused(ghost), ErrorCode::StaleGeneration);
    assert_eq!(fixture.0.encode(), before, "the living holder has noticed nothing");
}

#[test]
fn the_encoding_of_commands_does_not_change() {
    // One byte more or less here means that older members can't read the log any more: give the command a new tag.
    let attach = Attach {
        volume: Selector::Id(VolumeId(0x0102)),
        client: ClientId([0xcc; 16]),
        address: "ab".into(),
        force: true,
        caretaker: true,
        displace: Generation::new(5),
        after: Generation::new(4),
    };
    let bytes = Logged {
        time_ms: 3,
        command: attach.into(),
    }
    .encode()
    .unwrap();
    let mut expected = vec![1, 7, 0, 3, 0, 0, 0, 0, 0, 0, 0, 1, 2, 1, 0, 0, 0, 0, 0, 0];
    expected.extend([0xcc; 16]);
    expected.extend([2, 0, 0, 0, b'a', b'b', 1, 1, 1, 5, 0, 0, 0, 1, 4, 0, 0, 0]);
    assert_eq!(bytes, expected);
}

#[test]
fn a_damaged_snapshot_is_told_apart_from_a_foreign_one() {
    let mut fixture = Fixture::new(3);
    fixture.apply(create("v", GIB)).unwrap();
    let bytes = fixture.0.encode();
    assert_eq!(State::decode(&bytes).as_ref(), Ok(&fixture.0));
    for place in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0x10;
        assert!(State::decode(&damaged).is_err(), "byte {place}");
        assert!(State::decode(&bytes[..place]).is_err());
    }
    assert_eq!(State::decode(b"something else"), Err(StateError::NotAState));
    let mut later = bytes;
    later[8] = 9;
    assert_eq!(State::decode(&later), Err(StateError::Format(9)));
}
