//! Replacing members, and what is written down.

use cairn_proto::control::Code as ErrorCode;
use cairn_proto::ids::*;

use super::command::*;
use super::events::EventKind;
use super::model::*;
use super::tests::{Fixture, GIB, attach, by_name, create, device, node, registration};
use crate::limits::*;

const FIRST: GroupId = GroupId {
    volume: VolumeId(1),
    index: GroupIndex(0),
};

fn replace(epoch: u64, lost: u8, spare: Option<u8>) -> ReplaceMember {
    ReplaceMember {
        volume: FIRST.volume,
        index: FIRST.index,
        epoch: Epoch(epoch),
        lost: device(lost),
        spare: spare.map(device),
        cause: "it was not heard of for 600 s".into(),
    }
}

/// A volume on devices 1 to 3 of so many, held by a client.
fn fixture(nodes: u8) -> Fixture {
    let mut fixture = Fixture::new(nodes);
    fixture.apply(create("v", GIB)).unwrap();
    fixture.apply(attach("v", 1, false)).unwrap();
    assert_eq!(
        fixture.0.groups()[&FIRST].in_sync,
        [device(1), device(2), device(3)],
        "the others are free"
    );
    fixture
}

fn group(fixture: &Fixture) -> Group {
    fixture.0.groups()[&FIRST].clone()
}

fn kinds(fixture: &Fixture) -> Vec<EventKind> {
    fixture.0.events().map(|(_, event)| event.kind).collect()
}

#[test]
fn a_spare_takes_the_place_of_a_lost_member_and_is_filled() {
    let mut fixture = fixture(4);
    assert_eq!(
        fixture.refused(replace(1, 3, Some(4))),
        ErrorCode::InvalidConfiguration,
        "who is in sync may hold the only copy of something: its coordinator must eject it first"
    );
    fixture.configure(1, 1, &[1, 2], &[]).unwrap();
    assert_eq!(fixture.refused(replace(1, 3, Some(4))), ErrorCode::StaleEpoch);
    fixture.apply(replace(2, 3, Some(4))).unwrap();
    let now = group(&fixture);
    assert_eq!((now.epoch, now.in_sync.len()), (Epoch(3), 2));
    assert_eq!(
        (now.stale.clone(), now.rebuilding.clone()),
        (vec![device(4)], vec![device(4)])
    );
    // The holder's change that was on its way when the spare came is told what is now.
    assert_eq!(fixture.configure(1, 2, &[1, 2], &[3]), Ok(Some(ErrorCode::StaleEpoch)));
    assert!(
        !fixture.0.is_unnamed(FIRST, &device(3), Epoch(1)),
        "it may be needed until the group is whole"
    );
    let releases = fixture.0.releases();
    fixture.configure(1, 3, &[1, 2], &[4]).unwrap();
    assert_eq!(group(&fixture).rebuilding, [device(4)]);
    fixture.configure(1, 4, &[1, 2, 4], &[]).unwrap();
    let whole = group(&fixture);
    assert!(whole.stale.is_empty() && whole.rebuilding.is_empty());
    assert!(fixture.0.is_unnamed(FIRST, &device(3), Epoch(1)) && !fixture.0.is_unnamed(FIRST, &device(4), Epoch(1)));
    let last = group(&fixture).epoch;
    assert!(!fixture.0.is_unnamed(FIRST, &device(3), last), "it was named just now");
    assert_eq!(fixture.0.releases(), releases + 1, "inventories are to be looked at");
    let tail = &kinds(&fixture)[kinds(&fixture).len() - 4..];
    use EventKind::*;
    assert_eq!(tail, [Ejected, Replaced, Joining, Admitted]);
}

#[test]
fn a_spare_must_be_sound_new_to_the_group_and_apart_from_the_others() {
    let mut fixture = fixture(5);
    // Another device of node 1, and one that has forgotten something.
    fixture
        .apply(node(
            "n1",
            [""; 3],
            vec![registration(device(1)), registration(device(6))],
        ))
        .unwrap();
    let seq = |seq| DeviceRegistration {
        commit_seq: CommitSeq(seq),
        ..registration(device(5))
    };
    fixture.apply(node("n5", [""; 3], vec![seq(9)])).unwrap();
    fixture.apply(node("n5", [""; 3], vec![seq(8)])).unwrap();
    fixture.configure(1, 1, &[1, 2], &[3]).unwrap();
    for (spare, why) in [
        (1, "in sync"),
        (3, "lost itself"),
        (5, "it has forgotten something"),
        (6, "on the host of device 1"),
    ] {
        assert_eq!(
            fixture.refused(replace(2, 3, Some(spare))),
            ErrorCode::InvalidConfiguration,
            "{why}"
        );
    }
    assert_eq!(fixture.refused(replace(2, 3, Some(77))), ErrorCode::DeviceNotFound);
    assert_eq!(
        fixture.refused(replace(2, 3, None)),
        ErrorCode::InvalidConfiguration,
        "two members are too few"
    );
    assert_eq!(
        fixture.refused(replace(2, 4, Some(5))),
        ErrorCode::InvalidConfiguration,
        "no member"
    );
    let elsewhere = ReplaceMember {
        index: GroupIndex(1),
        ..replace(2, 3, Some(4))
    };
    assert_eq!(fixture.refused(elsewhere), ErrorCode::VolumeNotFound);
    // A joining member can be lost as well; and a device on the host of the lost one is as good as another.
    fixture
        .apply(node(
            "n3",
            [""; 3],
            vec![registration(device(3)), registration(device(7))],
        ))
        .unwrap();
    fixture.apply(replace(2, 3, Some(7))).unwrap();
    let now = group(&fixture);
    assert_eq!((now.joining, now.stale), (vec![], vec![device(7)]));
    fixture.apply(replace(3, 7, Some(4))).unwrap();
    assert_eq!(group(&fixture).rebuilding, [device(4)], "a spare can be lost too");
}

#[test]
fn who_is_of_the_rescue_set_stays_named_until_there_is_a_quorum_again() {
    let mut fixture = Fixture::new(4);
    fixture
        .apply(CreateVolume {
            replicas: 2,
            min_copies_one: true,
            ..create("v", GIB)
        })
        .unwrap();
    fixture.apply(attach("v", 1, false)).unwrap();
    fixture.configure(1, 1, &[1], &[]).unwrap();
    assert_eq!(group(&fixture).rescue, [device(1), device(2)]);
    assert_eq!(fixture.refused(replace(2, 2, None)), ErrorCode::InvalidConfiguration);
    fixture.apply(replace(2, 2, Some(3))).unwrap();
    let now = group(&fixture);
    assert_eq!(now.rescue, [device(1), device(2)]);
    assert_eq!(
        now.stale,
        [device(2), device(3)],
        "device 2 finds itself named if it comes back"
    );
    fixture.configure(1, 3, &[1], &[3]).unwrap();
    fixture.configure(1, 4, &[1, 3], &[]).unwrap();
    let now = group(&fixture);
    assert_eq!((now.rescue.len(), now.stale.clone()), (0, vec![device(2)]));
    // Now it is one too many.
    fixture.apply(replace(now.epoch.0, 2, None)).unwrap();
    assert!(fixture.0.is_unnamed(FIRST, &device(2), Epoch(1)));
    assert_eq!(kinds(&fixture).last(), Some(&EventKind::Released));
}

#[test]
fn a_device_that_was_formatted_anew_can_take_its_own_place() {
    let mut fixture = fixture(3);
    fixture.configure(1, 1, &[1, 2], &[]).unwrap();
    let fresh = DeviceId {
        incarnation: Incarnation(2),
        ..device(3)
    };
    fixture.apply(node("n3", [""; 3], vec![registration(fresh)])).unwrap();
    assert_eq!(kinds(&fixture).last(), Some(&EventKind::DeviceReformatted));
    let own = ReplaceMember {
        spare: Some(fresh),
        ..replace(2, 3, None)
    };
    fixture.apply(own).unwrap();
    assert_eq!(group(&fixture).stale, [fresh]);
}

#[test]
fn silence_and_return_are_written_down_once() {
    let mut fixture = fixture(3);
    let note = |number, silent| DeviceNote {
        id: device(number),
        silent,
        cause: "its node is not heard of".into(),
    };
    let before = fixture.0.last_event();
    let devices = vec![note(1, true), note(2, false), note(77, true)];
    fixture
        .apply(NoteDevices {
            devices: devices.clone(),
        })
        .unwrap();
    fixture.apply(NoteDevices { devices }).unwrap();
    let noted: Vec<_> = fixture.0.events_after(before).collect();
    assert_eq!(noted.len(), 1, "only what has changed, of devices that are known");
    assert_eq!(
        (noted[0].1.kind, noted[0].1.device),
        (EventKind::DeviceSilent, Some(device(1)))
    );
    assert_eq!(noted[0].1.message, "device 01010101 of node `n1` is silent");
    fixture
        .apply(node("n1", [""; 3], vec![registration(device(1))]))
        .unwrap();
    assert!(
        fixture.0.devices()[&device(1)].silent,
        "until it is heard of for a while"
    );
    fixture
        .apply(NoteDevices {
            devices: vec![note(1, false)],
        })
        .unwrap();
    assert_eq!(kinds(&fixture).last(), Some(&EventKind::DeviceBack));
    let many = vec![note(1, true); REPORTS_MAX + 1];
    assert_eq!(
        fixture.refused(NoteDevices { devices: many }),
        ErrorCode::InvalidArgument
    );
}

#[test]
fn what_happens_to_a_volume_is_told_with_its_cause() {
    let mut fixture = fixture(3);
    fixture.apply(attach("v", 2, true)).unwrap();
    let care = Attach {
        caretaker: true,
        displace: Generation::new(2),
        ..attach("v", 3, false)
    };
    fixture.apply(care).unwrap();
    let detach = Detach {
        volume: by_name("v"),
        generation: Generation::new(3).unwrap(),
        settled: true,
    };
    fixture.apply(detach.clone()).unwrap();
    fixture.apply(detach).unwrap();
    let told: Vec<(&str, String)> = fixture
        .0
        .events()
        .filter(|(_, event)| event.name == "v")
        .map(|(_, event)| (event.kind.as_str(), event.cause.clone()))
        .collect();
    let expected = [
        ("volume-created", ""),
        ("attached", ""),
        ("taken-over", "by force"),
        ("caretaker-began", "nothing was heard of the client that held it"),
        ("caretaker-done", ""),
    ];
    assert_eq!(told, expected.map(|(kind, cause)| (kind, cause.to_string())));
}

#[test]
fn a_device_that_leaves_many_groups_of_a_volume_makes_one_event() {
    let mut fixture = Fixture::new(3);
    fixture.apply(create("v", 64 * GIB)).unwrap();
    fixture.apply(attach("v", 1, false)).unwrap();
    let count = fixture.0.volumes()[&VolumeId(1)].group_count.get();
    assert!(count > 2);
    let change = |index| GroupChange {
        index: GroupIndex(index),
        epoch: Epoch(1),
        in_sync: vec![device(1), device(2)],
        joining: vec![],
        cause: "slow".into(),
    };
    let before = fixture.0.last_event();
    let configure = ConfigureGroups {
        volume: by_name("v"),
        generation: Generation::new(1).unwrap(),
        changes: (0..count).map(change).collect(),
    };
    fixture.apply(configure.clone()).unwrap();
    fixture.apply(configure).unwrap();
    let noted: Vec<_> = fixture.0.events_after(before).map(|(_, event)| event).collect();
    assert_eq!(noted.len(), 1, "and the repetition none");
    let words = format!("groups 0-{} of volume `v`", count - 1);
    assert!(noted[0].message.contains(&words), "{}", noted[0].message);
    assert_eq!((noted[0].cause.as_str(), noted[0].group), ("slow", None));
}
