//! What holders report, what becomes of devices that are gone, and how it is told.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_reports_hears_what_has_changed() {
    let mut cluster = Cluster::start(1).await;
    let client = cluster.client();
    for number in 1..=3 {
        client.register_node(registration(number)).await.unwrap();
    }
    client.create_volume(create("a")).await.unwrap();
    let granted = client.attach(attach("a", 1, false)).await.unwrap();
    let volume_id = granted.volume.unwrap().id;
    let report = |generation, epoch, caretaker| AttachmentReport {
        volume_id,
        generation,
        caretaker,
        groups: vec![GroupReport {
            index: 0,
            epoch,
            phase: GroupPhase::Serving.into(),
            members: vec![],
        }],
        ..AttachmentReport::default()
    };
    let advice = async |report| {
        let reports = vec![report];
        let answer = client.report_attachments(ReportAttachmentsRequest { reports }).await;
        answer.unwrap().advice.remove(0)
    };
    let quiet = AttachmentAdvice {
        volume_id,
        generation: 1,
        ..AttachmentAdvice::default()
    };
    assert_eq!(advice(report(1, 1, false)).await, quiet);
    let look = AttachmentAdvice {
        look: vec![0],
        ..quiet.clone()
    };
    assert_eq!(advice(report(1, 0, false)).await, look);
    assert!(
        advice(report(1, 1, true)).await.give_way,
        "nobody has asked for a caretaker"
    );
    let care = AttachRequest {
        caretaker: true,
        ..attach("a", 2, true)
    };
    assert_eq!(
        code(client.attach(care).await),
        Code::VolumeAttached,
        "the client lives"
    );
    let odd = AttachmentReport {
        groups: vec![GroupReport::default()],
        ..report(1, 1, false)
    };
    let odd = ReportAttachmentsRequest { reports: vec![odd] };
    assert_eq!(code(client.report_attachments(odd).await), Code::InvalidArgument);
    cluster.stop(1).await.unwrap();
}

/// Nodes that send heartbeats until it is dropped.
fn heartbeats(client: &MetaClient, nodes: Vec<(u8, u64)>) -> tokio::task::JoinSet<()> {
    let mut tasks = tokio::task::JoinSet::new();
    for (number, node_id) in nodes {
        let client = client.clone();
        tasks.spawn(async move {
            loop {
                let heartbeat = HeartbeatRequest {
                    node_id,
                    run_id: vec![number; 16],
                    devices: vec![DeviceHeartbeat {
                        id: device(number).id,
                        capacity_bytes: 1 << 40,
                        ..DeviceHeartbeat::default()
                    }],
                    ..HeartbeatRequest::default()
                };
                client.heartbeat(heartbeat).await.unwrap();
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
    }
    tasks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_gone_is_replaced_and_all_of_it_is_told() {
    let heal = HealSettings {
        rebuild_after: Duration::from_secs(1),
    };
    let mut cluster = Cluster::start_with(1, heal).await;
    let client = cluster.client();
    let mut nodes = vec![];
    for number in 1..=3 {
        let id = client.register_node(registration(number)).await.unwrap().node_id;
        nodes.push((number, id));
    }
    client.create_volume(create("a")).await.unwrap();
    let node_id = client.register_node(registration(4)).await.unwrap().node_id;
    nodes.push((4, node_id));
    nodes.retain(|(number, _)| *number != 3);
    let beating = heartbeats(&client, nodes);
    let granted = client.attach(attach("a", 1, false)).await.unwrap();
    let volume_id = granted.volume.unwrap().id;
    let id = |number: u8| device(number).id.unwrap();
    let configure = ConfigureGroupsRequest {
        volume: by_name("a"),
        generation: 1,
        changes: vec![GroupChange {
            index: 0,
            epoch: 1,
            in_sync: vec![id(1), id(2)],
            joining: vec![],
            cause: "it takes too long to answer".into(),
        }],
    };
    let outcome = client.configure_groups(configure).await.unwrap().outcomes.remove(0);
    assert_eq!(outcome.code, "");
    let groups = || client.get_groups(GetGroupsRequest { volume: by_name("a") });
    let replaced = async {
        loop {
            let answer = groups().await.unwrap();
            if answer.groups[0].stale == [id(4)] {
                break answer;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let bound = Duration::from_secs(60);
    let answer = tokio::time::timeout(bound, replaced).await.expect("device 3 is silent");
    assert_eq!(
        (answer.groups[0].epoch, answer.groups[0].rebuilding.clone()),
        (3, vec![id(4)])
    );

    // The client hears of it, and reports how it fills the spare.
    let report = |copied_blocks| AttachmentReport {
        volume_id,
        generation: 1,
        groups: vec![GroupReport {
            index: 0,
            epoch: 2,
            phase: GroupPhase::Serving.into(),
            members: vec![MemberReport {
                device: Some(id(4)),
                role: MemberRole::Joining.into(),
                connected: true,
                lacking_blocks: 100,
                copied_blocks,
                comparing: true,
                ..MemberReport::default()
            }],
        }],
        ..AttachmentReport::default()
    };
    let reports = vec![report(50)];
    let advice = client.report_attachments(ReportAttachmentsRequest { reports }).await;
    assert_eq!(advice.unwrap().advice[0].look, [0]);
    let health = groups().await.unwrap().health.unwrap();
    let (group, repair) = (&health.groups[0], &health.repairs[0]);
    assert_eq!((group.copies_wanted, group.copies_reachable, group.stale), (3, 2, 1));
    assert_eq!((health.groups_degraded, health.groups_below_quorum), (1, 0));
    assert_eq!((repair.state(), repair.rebuild), (RepairState::Comparing, true));
    assert_eq!(
        (repair.copied_blocks, repair.remaining_ms, repair.node.as_str()),
        (50, None, "node-4")
    );

    let status = client.status().await.unwrap();
    assert_eq!((status.groups, status.groups_degraded, status.repairs), (1, 1, 1));
    assert_eq!((status.volumes_unhealthy, status.rebuild_after_ms), (1, 1000));
    assert_eq!(status.unhealthy[0].volume, "a");
    assert!(status.problems.iter().any(|problem| problem.code == "groups-degraded"));

    let list = async |request| client.list_events(request).await.unwrap();
    let all = list(ListEventsRequest::default()).await;
    let told: Vec<&str> = all.events.iter().map(|event| event.kind.as_str()).collect();
    let order = ["volume-created", "attached", "ejected", "replaced"];
    let places: Vec<usize> = order
        .iter()
        .map(|kind| told.iter().position(|told| told == kind).expect(kind))
        .collect();
    assert!(places.is_sorted(), "{told:?}");
    assert_eq!(all.events[places[2]].cause, "it takes too long to answer");
    assert!(all.events[places[3]].cause.contains("was not heard of"), "{all:?}");
    assert_eq!(all.last_id, all.events.len() as u64);
    let newest = ListEventsRequest {
        limit: 1,
        newest: true,
        volume: "a".into(),
        ..ListEventsRequest::default()
    };
    let newest = list(newest).await;
    assert_eq!((newest.events.len(), newest.events[0].kind.as_str()), (1, "replaced"));
    let page = ListEventsRequest {
        after: 1,
        limit: 2,
        ..ListEventsRequest::default()
    };
    let page = list(page).await;
    assert_eq!((page.events[0].id, page.events.len(), page.more), (2, 2, true));
    drop(beating);
    cluster.stop(1).await.unwrap();
}

/// The codes of the problems that status tells.
async fn problems(client: &MetaClient) -> Vec<String> {
    let status = client.status().await.unwrap();
    status.problems.into_iter().map(|problem| problem.code).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_device_in_the_place_of_another_is_told_at_once_and_the_damage_of_the_former_no_more() {
    let mut cluster = Cluster::start(1).await;
    let client = cluster.client();
    let mut node_id = 0;
    for number in 1..=3 {
        node_id = client.register_node(registration(number)).await.unwrap().node_id;
    }
    client.create_volume(create("a")).await.unwrap();
    let beat = |damaged_blocks| HeartbeatRequest {
        node_id,
        run_id: vec![3; 16],
        devices: vec![DeviceHeartbeat {
            id: device(3).id,
            capacity_bytes: 1 << 40,
            scrub: Some(DeviceScrub {
                pass: 1,
                damaged_blocks,
                ..DeviceScrub::default()
            }),
            ..DeviceHeartbeat::default()
        }],
        ..HeartbeatRequest::default()
    };
    client.heartbeat(beat(0)).await.unwrap();
    assert_eq!(problems(&client).await, Vec::<String>::new());
    client.heartbeat(beat(7)).await.unwrap();
    assert_eq!(problems(&client).await, ["device-damaged"]);

    // Another disk, within the time after which a device counts as silent.
    let mut other = registration(3);
    other.devices = vec![device(9)];
    client.register_node(other).await.unwrap();
    assert_eq!(problems(&client).await, ["groups-degraded"], "a copy is missing");
    // The former one comes back, and is formatted anew.
    client.register_node(registration(3)).await.unwrap();
    assert_eq!(problems(&client).await, ["device-damaged"]);
    let mut anew = registration(3);
    anew.devices[0].id.as_mut().unwrap().incarnation = 2;
    client.register_node(anew).await.unwrap();
    assert_eq!(problems(&client).await, ["groups-degraded"]);
    cluster.stop(1).await.unwrap();
}
