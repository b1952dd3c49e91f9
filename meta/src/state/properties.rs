//! What holds for any commands.

use cairn_proto::ids::*;
use proptest::prelude::*;

use super::command::*;
use super::model::*;
use super::tests::{Fixture, GIB, device, node, registration};
use super::{Outcome, Refusal};

fn any_device() -> impl Strategy<Value = DeviceId> {
    (1..8u8, 1..3u64).prop_map(|(number, incarnation)| DeviceId {
        incarnation: Incarnation(incarnation),
        ..device(number)
    })
}

fn any_devices() -> impl Strategy<Value = Vec<DeviceId>> {
    proptest::collection::vec(any_device(), 0..5)
}

fn any_selector() -> impl Strategy<Value = Selector> {
    prop_oneof![
        (0..6u64).prop_map(|id| Selector::Id(VolumeId(id))),
        "[a-c]".prop_map(Selector::Name)
    ]
}

fn any_generation() -> impl Strategy<Value = Generation> {
    (0..4u32).prop_map(|number| Generation::new(number).unwrap())
}

fn any_registration() -> impl Strategy<Value = DeviceRegistration> {
    (
        any_device(),
        any::<u64>(),
        0..20u64,
        any::<bool>(),
        any::<Option<[u8; 16]>>(),
    )
        .prop_map(|(id, capacity_bytes, seq, displace, cluster)| DeviceRegistration {
            capacity_bytes,
            commit_seq: CommitSeq(seq),
            displace,
            cluster: cluster.map(ClusterId).filter(|_| seq == 0),
            ..registration(id)
        })
}

fn any_command() -> impl Strategy<Value = Command> {
    let sizes = prop_oneof![Just(4096u64), Just(GIB), Just(600 * GIB), any::<u64>()];
    let change =
        (0..3u8, 0..5u64, any_devices(), any_devices()).prop_map(|(index, epoch, in_sync, joining)| GroupChange {
            index: GroupIndex(index),
            epoch: Epoch(epoch),
            in_sync,
            joining,
            cause: "slow".into(),
        });
    let report = (any_device(), any::<u64>(), 0..30u64, any::<bool>(), ".{0,10}").prop_map(
        |(id, used_bytes, seq, failed, trouble)| DeviceReport {
            id,
            capacity_bytes: 1 << 40,
            used_bytes,
            commit_seq: CommitSeq(seq),
            failed,
            trouble,
        },
    );
    prop_oneof![
        any::<[u8; 16]>().prop_map(|id| InitCluster {
            cluster: ClusterId(id),
            feature_level: 1
        }
        .into()),
        (
            "[a-f]{1,2}",
            "[xy]?",
            proptest::collection::vec(any_registration(), 0..4)
        )
            .prop_map(|(name, rack, devices)| { node(&name, ["", &rack, ""], devices).into() }),
        proptest::collection::vec(report, 0..4).prop_map(|devices| ReportDevices { devices }.into()),
        ("[a-c]", sizes.clone(), 0..4u8, 0..4u8, any::<bool>(), any_devices()).prop_map(
            |(name, size_bytes, replicas, write_quorum, min_copies_one, silent)| {
                let spread = Spread::Device;
                let name = name.clone();
                CreateVolume {
                    name,
                    size_bytes,
                    replicas,
                    write_quorum,
                    min_copies_one,
                    spread,
                    silent,
                }
                .into()
            }
        ),
        (any_selector(), sizes).prop_map(|(volume, size_bytes)| GrowVolume { volume, size_bytes }.into()),
        (any_selector(), any::<bool>()).prop_map(|(volume, force)| DeleteVolume { volume, force }.into()),
        (any_selector(), 0..3u8, any::<bool>()).prop_map(|(volume, client, force)| {
            Attach {
                volume,
                client: ClientId([client; 16]),
                address: "c".into(),
                force,
                caretaker: client == 2,
                displace: (client == 2 && force).then(|| Generation::new(1).unwrap()),
                after: (client == 1 && force).then(|| Generation::new(1).unwrap()),
            }
            .into()
        }),
        (any_selector(), any_generation(), any::<bool>()).prop_map(|(volume, generation, settled)| {
            Detach {
                volume,
                generation,
                settled,
            }
            .into()
        }),
        (
            any_selector(),
            any_generation(),
            proptest::collection::vec(change, 0..3)
        )
            .prop_map(|(volume, generation, changes)| ConfigureGroups {
                volume,
                generation,
                changes
            }
            .into()),
        (0..3u8, 0..5u64, any_device(), proptest::option::of(any_device())).prop_map(|(index, epoch, lost, spare)| {
            ReplaceMember {
                volume: VolumeId(1),
                index: GroupIndex(index),
                epoch: Epoch(epoch),
                lost,
                spare,
                cause: "lost".into(),
            }
            .into()
        }),
        (0..3u8, 0..5u64, any_device(), any_device()).prop_map(|(index, epoch, from, to)| {
            MoveMember {
                volume: VolumeId(1),
                index: GroupIndex(index),
                epoch: Epoch(epoch),
                from,
                to,
                cause: "elsewhere".into(),
            }
            .into()
        }),
        (0..4u64, any::<bool>(), any_devices()).prop_map(|(node, drain, silent)| {
            let node = NodeId(node);
            DrainNode { node, drain, silent }.into()
        }),
        (any_device(), any::<bool>()).prop_map(|(id, silent)| {
            let cause = String::new();
            let devices = vec![DeviceNote { id, silent, cause }];
            NoteDevices { devices }.into()
        }),
        (0..3u32).prop_map(|level| RaiseFeatureLevel { level }.into()),
        (0..9u64, any::<u64>()).prop_map(|(id, directory)| AddMember {
            id,
            address: "m:1".into(),
            directory
        }
        .into()),
        (0..9u64).prop_map(|id| RemoveMember { id }.into()),
        (0..9u64, 0..3u64).prop_map(|(id, directory)| UpdateMember {
            id,
            address: "m:2".into(),
            directory
        }
        .into()),
    ]
}

/// What replacing a member must never do, whatever was asked for.
fn check_replacement(
    before: &State,
    after: &State,
    outcome: &Result<Outcome, Refusal>,
    command: &Command,
) -> Result<(), TestCaseError> {
    let (Command::ReplaceMember(command), Ok(_)) = (command, outcome) else {
        return Ok(());
    };
    let id = GroupId {
        volume: command.volume,
        index: command.index,
    };
    let (was, is) = (&before.groups()[&id], &after.groups()[&id]);
    prop_assert_eq!((&was.in_sync, &was.rescue), (&is.in_sync, &is.rescue));
    prop_assert_eq!(was.epoch.0 + 1, is.epoch.0);
    prop_assert!(!is.joining.contains(&command.lost));
    prop_assert!(!is.stale.contains(&command.lost) || was.rescue.contains(&command.lost));
    let others = |device: &&DeviceId| Some(**device) != command.spare;
    let was_named = |device: &DeviceId| was.named().any(|named| named == device);
    prop_assert!(is.named().filter(others).all(was_named));
    if let Some(spare) = command.spare {
        prop_assert!(!was_named(&spare) && is.stale.contains(&spare));
        let mut members = is.in_sync.iter().chain(&is.joining);
        prop_assert!(members.all(|member| member.uuid != spare.uuid), "a device twice");
    }
    Ok(())
}

/// A group in the midst of changes, whatever its holder does.
fn any_story() -> impl Strategy<Value = Vec<Command>> {
    let first: Vec<Command> = vec![
        CreateVolume {
            min_copies_one: true,
            ..super::tests::create("a", GIB)
        }
        .into(),
        super::tests::attach("a", 1, false).into(),
    ];
    let numbers = || proptest::collection::vec(1..7u8, 0..4);
    let change = (0..8u64, numbers(), numbers()).prop_map(|(epoch, in_sync, joining)| {
        let devices = |numbers: Vec<u8>| numbers.into_iter().map(device).collect();
        let change = GroupChange {
            index: GroupIndex(0),
            epoch: Epoch(epoch),
            in_sync: devices(in_sync),
            joining: devices(joining),
            cause: String::new(),
        };
        Command::from(ConfigureGroups {
            volume: Selector::Id(VolumeId(1)),
            generation: Generation::new(1).unwrap(),
            changes: vec![change],
        })
    });
    let replace = (0..8u64, 1..7u8, proptest::option::of(1..7u8)).prop_map(|(epoch, lost, spare)| {
        Command::from(ReplaceMember {
            volume: VolumeId(1),
            index: GroupIndex(0),
            epoch: Epoch(epoch),
            lost: device(lost),
            spare: spare.map(device),
            cause: String::new(),
        })
    });
    let rest = proptest::collection::vec(prop_oneof![change, replace], 0..80);
    rest.prop_map(move |rest| first.iter().cloned().chain(rest).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn commands_round_trip(time_ms: u64, command in any_command()) {
        let logged = Logged { time_ms, command };
        let bytes = logged.encode().unwrap();
        prop_assert_eq!(Logged::decode(&bytes), Ok(logged));
        for cut in 0..bytes.len() {
            prop_assert!(Logged::decode(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn nonsense_is_refused_without_a_panic(mut bytes: Vec<u8>, tag in 0..17u8) {
        let _ = Logged::decode(&bytes);
        let _ = State::decode(&bytes);
        if bytes.len() > 2 {
            (bytes[0], bytes[1], bytes[2]) = (1, tag, 0);
            let _ = Logged::decode(&bytes);
        }
    }

    /// Replacing a member touches neither `I` nor the rescue set, whatever holders do in between.
    #[test]
    fn a_replacement_leaves_alone_what_counts(story in any_story()) {
        let mut fixture = Fixture::new(6);
        let mut epoch = Epoch(1);
        for mut command in story {
            // With a number drawn at random hardly any would meet the epoch that is.
            match &mut command {
                Command::ConfigureGroups(configure) if configure.changes[0].epoch.0 > 1 => {
                    configure.changes[0].epoch = epoch;
                }
                Command::ReplaceMember(replace) if replace.epoch.0 > 1 => replace.epoch = epoch,
                _ => {}
            }
            let before = fixture.0.clone();
            let outcome = fixture.apply(command.clone());
            check_replacement(&before, &fixture.0, &outcome, &command)?;
            epoch = fixture.0.groups().values().next().unwrap().epoch;
        }
    }

    /// Equal commands give equal bytes; a snapshot in the middle changes nothing; invariants hold after each; epochs and
    /// generations never go back.
    #[test]
    fn any_commands_give_one_state(commands in proptest::collection::vec(any_command(), 0..60), cut in 0..60usize) {
        let mut direct = Fixture::new(4);
        let mut restored = Fixture::new(4);
        let (mut outcomes, mut again) = (vec![], vec![]);
        for (place, command) in commands.into_iter().enumerate() {
            let before = direct.0.clone();
            outcomes.push(direct.apply(command.clone()));
            for (id, group) in direct.0.groups() {
                if let Some(was) = before.groups().get(id) {
                    prop_assert!(group.epoch >= was.epoch && (group.epoch > was.epoch || group == was));
                    prop_assert!(group.in_sync.iter().all(|device| was.has(device)));
                }
            }
            for (id, volume) in direct.0.volumes() {
                let was = before.volumes().get(id);
                prop_assert!(was.is_none_or(|was| volume.generation >= was.generation));
                prop_assert!(was.is_some() || !before.is_deleted(*id));
            }
            check_replacement(&before, &direct.0, &outcomes[place], &command)?;
            if place == cut {
                restored.0 = State::decode(&restored.0.encode()).unwrap();
            }
            again.push(restored.apply(command));
        }
        prop_assert_eq!(outcomes, again);
        prop_assert_eq!(direct.0.encode(), restored.0.encode());
    }
}
