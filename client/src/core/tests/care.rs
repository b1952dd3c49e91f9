//! What meta is told of volumes, and volumes that are only repaired.

use super::*;

const CARED: VolumeHandle = VolumeHandle(2);

/// A bench with nothing but a volume that is taken care of.
fn caring(prepare: impl Fn(&mut Bench)) -> Bench {
    let mut bench = Bench::new();
    prepare(&mut bench);
    bench.tell(Event::CareForVolume {
        volume: CARED,
        description: description(),
    });
    bench
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn told_at(bench: &Bench) -> Vec<u64> {
    let times = bench.reports.iter().map(|(at, _)| at.as_nanos() / 1_000_000_000);
    times.collect()
}

#[test]
fn meta_is_told_every_ten_seconds_of_a_whole_volume_and_every_two_of_one_that_is_not() {
    let mut bench = Bench::new();
    bench.pass(seconds(20));
    assert!(bench.reports.is_empty(), "nothing is held");
    bench.write(1, 0);
    bench.pass(seconds(25));
    // At once, when it has become whole, and then every ten seconds.
    assert_eq!(told_at(&bench), [20, 30, 40]);
    let (_, report) = &bench.reports[0];
    assert_eq!(
        (report.id, report.is_caretaker, report.groups.len()),
        (VolumeId(5), false, 2)
    );
    bench.reports.clear();
    bench.refuse = true;
    bench.lose(device(3));
    bench.pass(seconds(6));
    assert!(bench.reports.len() >= 3, "{:?}", told_at(&bench));
    let (_, report) = bench.reports.last().unwrap();
    let missing = report.groups[0]
        .members
        .iter()
        .find(|member| member.device == device(3));
    assert!(missing.is_some_and(|member| !member.connected && !member.joined));
}

#[test]
fn a_newer_configuration_is_asked_for_when_meta_says_that_there_is_one() {
    let mut bench = Bench::new();
    bench.write(1, 0);
    bench.asked.clear();
    // Meta has put a spare into the place of a lost device.
    bench.nodes.insert(
        device(4),
        Node {
            cluster: CLUSTER,
            ..Node::default()
        },
    );
    bench.configs[1].epoch = Epoch(2);
    bench.configs[1].in_sync = vec![device(1), device(2)];
    bench.configs[1].stale = vec![device(4)];
    let advice = |look| Advice {
        id: VolumeId(5),
        give_way: true,
        look,
    };
    bench.tell(Event::Advice(vec![advice(false)]));
    assert!(bench.asked.is_empty() && !bench.closed, "a guest gives way to nobody");
    bench.tell(Event::Advice(vec![advice(true)]));
    assert_eq!(bench.asked, [MetaQuestion::Refresh]);
    bench.pass(seconds(20));
    assert_eq!(bench.configs[1].in_sync, [device(1), device(2), device(4)]);
    let status = bench.core.status(V).unwrap();
    let named: Vec<_> = status.groups[1].members.iter().map(|member| member.device).collect();
    assert!(
        !named.contains(&device(3)),
        "who was replaced is no member any more: {named:?}"
    );
}

#[test]
fn a_copy_moves_with_one_change_and_all_copies_are_there_all_the_time() {
    let mut bench = caring(|bench| {
        let empty = Node {
            cluster: CLUSTER,
            ..Node::default()
        };
        bench.nodes.insert(device(4), empty);
        bench.configs[1].stale = vec![device(4)];
        bench.configs[1].moving = Some(Move {
            from: device(3),
            to: device(4),
        });
    });
    bench.pass(seconds(30));
    assert_eq!(bench.configs[1].in_sync, [device(1), device(2), device(4)]);
    assert_eq!(
        (bench.configs[1].stale.clone(), bench.configs[1].moving),
        (vec![device(3)], None)
    );
    let changes = bench.asked.iter().filter_map(|question| match question {
        MetaQuestion::Configure { changes, .. } => Some(changes),
        _ => None,
    });
    let counts: Vec<(usize, usize)> = changes
        .flatten()
        .map(|change| (change.in_sync.len(), change.joining.len()))
        .collect();
    assert_eq!(counts, [(3, 1), (3, 0)]);
    assert_eq!(bench.configs[0].epoch, Epoch(1), "the other group stays as it is");
    assert!(bench.closed, "it is whole, and released");
}

#[test]
fn a_volume_is_taken_care_of_until_it_has_been_whole_for_a_while() {
    let mut bench = caring(|bench| {
        bench.configs[0].in_sync.pop();
        bench.configs[0].stale = vec![device(3)];
    });
    assert_eq!(bench.asked[0], MetaQuestion::Care);
    bench.pass(seconds(4));
    assert_eq!(bench.configs[0].in_sync.len(), 3, "the one that was ejected has joined");
    assert!(!bench.closed, "whole, but not for long");
    bench.pass(seconds(8));
    assert!(bench.closed);
    assert!(matches!(bench.asked.last(), Some(MetaQuestion::Detach { .. })));
    assert_eq!(bench.sent["Release"], 3);
    assert!(bench.reports.iter().all(|(_, report)| report.is_caretaker));
    // But for the hello, nothing was sent in the class of guests.
    assert_eq!(bench.classes.iter().copied().collect::<Vec<_>>(), [0, 1]);
    let hellos: u64 = bench.sent["Hello"];
    assert_eq!(hellos, 3);
}

#[test]
fn a_caretaker_gives_way_when_it_is_told_to_and_ends_quietly_when_it_is_fenced_or_refused() {
    let broken = |bench: &mut Bench| {
        bench.configs[0].in_sync.pop();
    };
    let mut bench = caring(broken);
    bench.pass(seconds(30));
    assert!(!bench.closed, "there is nobody to fill, and it waits for one");
    bench.tell(Event::Advice(vec![Advice {
        id: VolumeId(5),
        give_way: true,
        look: false,
    }]));
    assert!(bench.closed);

    let mut bench = caring(broken);
    bench.pass(seconds(3));
    // The guest of the same volume; its attachment is a newer one. The caretaker sees it when it next speaks to a device.
    bench.write(1, 0);
    assert!(matches!(bench.replies[&OpId(1)], Ok(VolumeReply::Done)));
    bench.lose(device(1));
    bench.pass(seconds(10));
    assert!(bench.closed && bench.core.status(CARED).is_none());
    assert!(bench.core.status(V).is_some());

    let mut bench = caring(|bench| bench.held = true);
    assert!(bench.closed && bench.conns.is_empty());
    bench.pass(seconds(60));
    assert_eq!(bench.asked.len(), 1, "whoever wants it asks again");
}
