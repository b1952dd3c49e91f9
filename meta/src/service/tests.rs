//! Real servers on loopback, as real clients see them.

mod healing;

use std::collections::BTreeMap;
use std::path::Path;

use cairn_proto::capability::{Capability, ClusterKey, Rights};
use cairn_proto::codec::Reader;
use cairn_proto::control::v1::control_client::ControlClient;
use cairn_proto::control::v1::nodes_client::NodesClient;
use cairn_proto::control::v1::*;
use cairn_proto::control::{CODE_KEY, LEADER_KEY};
use tokio::task::JoinHandle;

use super::*;
use crate::client::ClientError;
use crate::heal::HealSettings;

const KEY: ClusterKey = ClusterKey([7; 32]);

struct Server {
    shutdown: oneshot::Sender<()>,
    task: JoinHandle<Result<(), MetaError>>,
}

struct Cluster {
    heal: HealSettings,
    dir: tempfile::TempDir,
    addresses: BTreeMap<u64, SocketAddr>,
    servers: BTreeMap<u64, Server>,
}

fn config(dir: &Path, id: u64, listen: SocketAddr, start: MetaStart) -> MetaConfig {
    MetaConfig {
        id,
        dir: dir.join(format!("meta-{id}")),
        listen,
        advertise: String::new(),
        start,
        cluster_key: KEY,
        metrics_listen: None,
        heal: HealSettings::default(),
    }
}

impl Cluster {
    async fn start(count: u64) -> Cluster {
        Cluster::start_with(count, HealSettings::default()).await
    }

    async fn start_with(count: u64, heal: HealSettings) -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let mut listeners = BTreeMap::new();
        for id in 1..=count {
            listeners.insert(id, TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let addresses = listeners
            .iter()
            .map(|(id, listener)| (*id, listener.local_addr().unwrap()))
            .collect();
        let mut cluster = Cluster {
            heal,
            dir,
            addresses,
            servers: BTreeMap::new(),
        };
        for (id, listener) in listeners {
            let start = cluster.first_members();
            cluster.run(id, listener, start);
        }
        cluster
    }

    fn first_members(&self) -> MetaStart {
        MetaStart::Bootstrap(
            self.addresses
                .iter()
                .map(|(id, address)| (*id, address.to_string()))
                .collect(),
        )
    }

    fn run(&mut self, id: u64, listener: TcpListener, start: MetaStart) {
        let config = MetaConfig {
            heal: self.heal,
            ..config(self.dir.path(), id, listener.local_addr().unwrap(), start)
        };
        let (shutdown, stopped) = oneshot::channel();
        let task = tokio::spawn(run_on(listener, config, async {
            let _ = stopped.await;
        }));
        self.servers.insert(id, Server { shutdown, task });
    }

    async fn stop(&mut self, id: u64) -> Result<(), MetaError> {
        let server = self.servers.remove(&id).unwrap();
        let _ = server.shutdown.send(());
        server.task.await.unwrap()
    }

    async fn restart(&mut self, id: u64) {
        let listener = TcpListener::bind(self.addresses[&id]).await.unwrap();
        let start = self.first_members();
        self.run(id, listener, start);
    }

    fn client(&self) -> MetaClient {
        let addresses = self.addresses.values().map(SocketAddr::to_string).collect();
        MetaClient::new(addresses)
            .with_cluster_key(&KEY)
            .with_deadline(Duration::from_secs(30))
    }

    async fn leader(&self) -> u64 {
        let client = self.client();
        for _ in 0..1000 {
            if let Ok(status) = client.status().await
                && status.leader_id == status.member_id
                && self.servers.contains_key(&status.leader_id)
            {
                return status.leader_id;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("no leader within 20 seconds");
    }
}

fn device(number: u8) -> RegisterDevice {
    RegisterDevice {
        id: Some(DeviceId {
            uuid: vec![number; 16],
            incarnation: 1,
        }),
        addresses: vec![format!("127.0.0.1:{}", 7000 + u16::from(number))],
        capacity_bytes: 1 << 40,
        used_bytes: 0,
        commit_seq: 0,
        cluster_id: vec![],
    }
}

fn registration(number: u8) -> RegisterNodeRequest {
    RegisterNodeRequest {
        name: format!("node-{number}"),
        run_id: vec![number; 16],
        domain: None,
        devices: vec![device(number)],
        version: "1".into(),
        feature_level: 1,
    }
}

fn by_name(name: &str) -> Option<VolumeSelector> {
    Some(VolumeSelector {
        by: Some(volume_selector::By::Name(name.into())),
    })
}

fn create(name: &str) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.into(),
        size_bytes: 10 << 30,
        ..CreateVolumeRequest::default()
    }
}

fn attach(name: &str, client: u8, force: bool) -> AttachRequest {
    AttachRequest {
        volume: by_name(name),
        client_id: vec![client; 16],
        address: "here".into(),
        force,
        caretaker: false,
        after: None,
    }
}

fn code<T: fmt::Debug>(result: Result<T, ClientError>) -> Code {
    result.unwrap_err().code
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_server_does_all_that_clients_and_nodes_ask() {
    let mut cluster = Cluster::start(1).await;
    let client = cluster.client();
    assert_eq!(code(client.create_volume(create("a")).await), Code::NotEnoughDevices);
    let mut ids = vec![];
    for number in 1..=3 {
        let answer = client.register_node(registration(number)).await.unwrap();
        assert_eq!(answer.devices[0].code, "");
        ids.push(answer.node_id);
    }
    // Sent again it is the same node.
    assert_eq!(client.register_node(registration(1)).await.unwrap().node_id, ids[0]);
    let volume = client.create_volume(create("a")).await.unwrap().volume.unwrap();
    assert_eq!((volume.group_count, volume.replicas, volume.write_quorum), (1, 3, 2));
    assert_eq!(code(client.create_volume(create("a")).await), Code::NameTaken);
    assert_eq!(code(client.create_volume(create("no/slash")).await), Code::InvalidName);
    let odd = CreateVolumeRequest {
        size_bytes: 4097,
        ..create("b")
    };
    assert_eq!(code(client.create_volume(odd).await), Code::InvalidSize);

    let first = client.attach(attach("a", 1, false)).await.unwrap();
    let capability = Capability::decode(&mut Reader::new(&first.capability)).unwrap();
    let cluster_id = ClusterId(first.cluster_id.clone().try_into().unwrap());
    assert!(capability.is_valid(&KEY, cluster_id));
    assert_eq!((capability.generation.get(), capability.rights), (1, Rights::Write));
    assert_eq!(
        (first.groups.len(), first.groups[0].in_sync.len(), first.devices.len()),
        (1, 3, 3)
    );
    assert!(
        first
            .devices
            .iter()
            .all(|device| device.seems_alive && !device.addresses.is_empty())
    );
    assert_eq!(code(client.attach(attach("a", 2, false)).await), Code::VolumeAttached);
    let second = client.attach(attach("a", 2, true)).await.unwrap();
    assert_eq!(second.generation, 2);

    let members = first.groups[0].in_sync.clone();
    let change = |epoch, in_sync: &[DeviceId]| GroupChange {
        index: 0,
        epoch,
        in_sync: in_sync.to_vec(),
        joining: vec![],
        cause: String::new(),
    };
    let configure = |generation, change| ConfigureGroupsRequest {
        volume: by_name("a"),
        generation,
        changes: vec![change],
    };
    let stale = client.configure_groups(configure(1, change(1, &members[..2]))).await;
    assert_eq!(code(stale), Code::StaleGeneration);
    for _ in 0..2 {
        // The second is the first sent again.
        let done = client
            .configure_groups(configure(2, change(1, &members[..2])))
            .await
            .unwrap();
        assert_eq!(
            (
                done.outcomes[0].code.as_str(),
                done.outcomes[0].config.as_ref().unwrap().epoch
            ),
            ("", 2)
        );
    }
    let done = client
        .configure_groups(configure(2, change(1, &members)))
        .await
        .unwrap();
    assert_eq!(done.outcomes[0].code, "stale-epoch");
    let groups = client
        .get_groups(GetGroupsRequest { volume: by_name("a") })
        .await
        .unwrap();
    assert_eq!(groups.groups[0].stale, members[2..]);

    client
        .detach(DetachRequest {
            volume: by_name("a"),
            generation: 2,
            settled: true,
        })
        .await
        .unwrap();
    let grown = GrowVolumeRequest {
        volume: by_name("a"),
        size_bytes: 20 << 30,
    };
    assert_eq!(client.grow_volume(grown).await.unwrap().volume.unwrap().group_count, 1);
    let listed = client.list_volumes(ListVolumesRequest::default()).await.unwrap();
    assert_eq!((listed.volumes.len(), listed.more), (1, false));
    let nodes = client.list_nodes(ListNodesRequest::default()).await.unwrap().nodes;
    assert_eq!((nodes.len(), nodes[0].devices[0].groups), (3, 1));

    inventory_of_a_deleted_volume(&client, ids[0], volume.id).await;
    assert_eq!(
        code(client.get_volume(GetVolumeRequest { volume: by_name("a") }).await),
        Code::VolumeNotFound
    );
    cluster.stop(1).await.unwrap();
    cluster.restart(1).await;
    let devices = client
        .list_devices(ListDevicesRequest::default())
        .await
        .unwrap()
        .devices;
    assert_eq!(devices.len(), 3, "the state is back after a restart");
    cluster.stop(1).await.unwrap();
}

async fn inventory_of_a_deleted_volume(client: &MetaClient, node_id: u64, volume_id: u64) {
    let scrub = DeviceScrub {
        pass: 3,
        under_way: true,
        damaged_blocks: 2,
        ..DeviceScrub::default()
    };
    let heartbeat = |digest| HeartbeatRequest {
        node_id,
        run_id: vec![1; 16],
        devices: vec![DeviceHeartbeat {
            id: device(1).id,
            capacity_bytes: 1 << 40,
            used_bytes: 5,
            commit_seq: 9,
            inventory_digest: digest,
            write_cache: WriteCache::NoneByOperator.into(),
            scrub: Some(scrub),
            ..DeviceHeartbeat::default()
        }],
        ..HeartbeatRequest::default()
    };
    let inventory = |digest| InventoryRequest {
        node_id,
        run_id: vec![1; 16],
        device: device(1).id,
        groups: vec![
            HeldGroup {
                volume_id,
                index: 0,
                epoch: 1,
            },
            HeldGroup {
                volume_id: 999,
                index: 0,
                epoch: 1,
            },
        ],
        page: 0,
        last: true,
        inventory_digest: digest,
    };
    assert_eq!(client.heartbeat(heartbeat(1)).await.unwrap().send_inventory.len(), 1);
    let devices = client
        .list_devices(ListDevicesRequest::default())
        .await
        .unwrap()
        .devices;
    let found = devices.iter().find(|found| found.id == device(1).id).unwrap();
    assert_eq!(
        found.write_cache(),
        WriteCache::NoneByOperator,
        "what a node says is shown"
    );
    assert_eq!(found.scrub, Some(scrub));
    let problems = client.status().await.unwrap().problems;
    let damaged: Vec<_> = problems
        .iter()
        .filter(|problem| problem.code == "device-damaged")
        .collect();
    assert!(
        damaged.len() == 1 && damaged[0].message.contains("holds 2 blocks"),
        "{problems:?}"
    );
    assert_eq!(client.report_inventory(inventory(1)).await.unwrap().drop, []);
    assert_eq!(client.heartbeat(heartbeat(1)).await.unwrap().send_inventory.len(), 0);
    client
        .delete_volume(DeleteVolumeRequest {
            volume: by_name("a"),
            force: false,
        })
        .await
        .unwrap();
    assert_eq!(
        client.heartbeat(heartbeat(1)).await.unwrap().send_inventory.len(),
        1,
        "something was deleted"
    );
    let drop = client.report_inventory(inventory(1)).await.unwrap().drop;
    assert_eq!(
        drop,
        [HeldGroup {
            volume_id,
            index: 0,
            epoch: 1
        }],
        "an id that was never drawn is not taken for deleted"
    );
    let old_run = HeartbeatRequest {
        run_id: vec![9; 16],
        ..heartbeat(1)
    };
    assert_eq!(code(client.heartbeat(old_run).await), Code::NodeSuperseded);
    let unknown = HeartbeatRequest {
        node_id: 77,
        ..heartbeat(1)
    };
    assert_eq!(code(client.heartbeat(unknown).await), Code::NodeNotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_servers_go_on_without_their_leader_and_take_it_back() {
    let mut cluster = Cluster::start(3).await;
    let client = cluster.client();
    for number in 1..=3 {
        client.register_node(registration(number)).await.unwrap();
    }
    client.create_volume(create("a")).await.unwrap();
    let leader = cluster.leader().await;
    let follower = (1..=3).find(|id| *id != leader).unwrap();

    // A follower says who leads, and a client that knows only the follower finds its way.
    let mut direct = ControlClient::connect(format!("http://{}", cluster.addresses[&follower]))
        .await
        .unwrap();
    let refused = direct
        .get_volume(GetVolumeRequest { volume: by_name("a") })
        .await
        .unwrap_err();
    assert_eq!(refused.metadata().get(CODE_KEY).unwrap(), "not-leader");
    let pointed = refused.metadata().get(LEADER_KEY).unwrap().to_str().unwrap();
    assert_eq!(pointed, cluster.addresses[&leader].to_string());
    let narrow = MetaClient::new(vec![cluster.addresses[&follower].to_string()]);
    narrow
        .get_volume(GetVolumeRequest { volume: by_name("a") })
        .await
        .unwrap();

    cluster.stop(leader).await.unwrap();
    // Nodes are heard of by who leads now. Both know only addresses; one of them is dead.
    for number in 1..=3 {
        client.register_node(registration(number)).await.unwrap();
    }
    client.create_volume(create("b")).await.unwrap();
    let granted = client.attach(attach("b", 1, false)).await.unwrap();
    assert_eq!(granted.generation, 1);
    let next = cluster.leader().await;
    assert_ne!(next, leader);
    cluster.restart(leader).await;
    let address = cluster.addresses[&leader].to_string();
    for attempt in 0.. {
        assert!(attempt < 1000, "the old leader does not catch up");
        let caught_up = client.status_of(&address).await.is_ok_and(|status| status.volumes == 2);
        if caught_up {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for id in 1..=3 {
        cluster.stop(id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_joins_and_another_is_removed() {
    let mut cluster = Cluster::start(3).await;
    let client = cluster.client();
    client.register_node(registration(1)).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let start = MetaStart::Join(client.endpoints());
    cluster.run(4, listener, start);
    for attempt in 0.. {
        assert!(attempt < 1000, "the new member does not get the state");
        if client
            .status_of(&address.to_string())
            .await
            .is_ok_and(|status| status.nodes == 1)
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let follower = {
        let leader = cluster.leader().await;
        (1..=3).find(|id| *id != leader).unwrap()
    };
    let left = client
        .remove_member(RemoveMemberRequest { id: follower })
        .await
        .unwrap()
        .members;
    assert_eq!(left.len(), 3);
    let server = cluster.servers.remove(&follower).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), server.task)
        .await
        .expect("it hears of it")
        .unwrap();
    assert!(
        matches!(ended, Err(MetaError::Removed(_) | MetaError::Rejected(_))),
        "{ended:?}"
    );
    client.register_node(registration(2)).await.unwrap();
}

/// A member that is needed to decide anything is not removed; one that is gone is, and then the other may go, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_which_nothing_could_be_decided_is_not_removed() {
    let mut cluster = Cluster::start(3).await;
    let client = cluster.client();
    client.register_node(registration(1)).await.unwrap();
    let leader = cluster.leader().await;
    let others: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
    cluster.stop(others[0]).await.unwrap();
    let is_alive = |status: &StatusResponse, id| {
        status
            .members
            .iter()
            .any(|member| member.id == id && member.seems_alive)
    };
    for attempt in 0.. {
        assert!(attempt < 1000, "nobody notices that a server is gone");
        if client.status().await.is_ok_and(|status| !is_alive(&status, others[0])) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for needed in [others[1], leader] {
        let refused = client
            .remove_member(RemoveMemberRequest { id: needed })
            .await
            .unwrap_err();
        assert_eq!(refused.code, Code::MemberNeeded);
        assert!(
            refused.message.contains(&format!("({})", others[0])),
            "{}",
            refused.message
        );
    }
    let remove = |id| client.remove_member(RemoveMemberRequest { id });
    assert_eq!(remove(others[0]).await.unwrap().members.len(), 2);
    assert_eq!(remove(others[1]).await.unwrap().members.len(), 1);
    let alone = remove(leader).await.unwrap_err();
    assert_eq!(alone.code, Code::InvalidMember, "{alone}");
    client.register_node(registration(2)).await.unwrap();
}

/// A new leader takes all devices for served for a moment. A volume that it placed on one that is gone would have no copy there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_leader_places_no_volume_on_a_device_of_which_it_has_not_heard() {
    let mut cluster = Cluster::start(3).await;
    let client = cluster.client();
    for number in 1..=3 {
        client.register_node(registration(number)).await.unwrap();
    }
    let leader = cluster.leader().await;
    cluster.stop(leader).await.unwrap();
    for number in 1..=2 {
        client.register_node(registration(number)).await.unwrap();
    }
    let refused = client.create_volume(create("v")).await.unwrap_err();
    assert_eq!(refused.code, Code::NotEnoughDevices, "{refused}");
    for number in 1..=3 {
        client.register_node(registration(number)).await.unwrap();
    }
    client.create_volume(create("v")).await.unwrap();
}

/// Who holds a volume hears which servers there are, as nodes do with their heartbeats.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_reports_is_told_where_the_servers_are() {
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    cluster.leader().await;
    let told = client
        .report_attachments(ReportAttachmentsRequest::default())
        .await
        .unwrap();
    let mut addresses: Vec<String> = cluster.addresses.values().map(SocketAddr::to_string).collect();
    let mut members = told.members;
    addresses.sort();
    members.sort();
    assert_eq!(members, addresses);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_lost_its_directory_is_turned_away() {
    let mut cluster = Cluster::start(3).await;
    let client = cluster.client();
    client.register_node(registration(1)).await.unwrap();
    let leader = cluster.leader().await;
    let victim = (1..=3).find(|id| *id != leader).unwrap();
    for attempt in 0.. {
        assert!(attempt < 1000, "the leader does not learn whose directory is which");
        let status = client.status().await.unwrap();
        if status.members.iter().all(|member| member.directory != 0) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cluster.stop(victim).await.unwrap();
    std::fs::remove_dir_all(cluster.dir.path().join(format!("meta-{victim}"))).unwrap();
    cluster.restart(victim).await;
    let server = cluster.servers.remove(&victim).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), server.task)
        .await
        .expect("it hears of it")
        .unwrap();
    let Err(MetaError::Rejected(words)) = ended else {
        panic!("{ended:?}")
    };
    assert!(words.contains("lost its log"), "{words}");
    client.register_node(registration(2)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_garbage_get_nothing_and_take_nothing_down() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let cluster = Cluster::start(1).await;
    let client = cluster.client();
    let address = cluster.addresses[&1];
    let stranger = MetaClient::new(vec![address.to_string()]).with_cluster_key(&ClusterKey([8; 32]));
    assert_eq!(
        code(stranger.register_node(registration(1)).await),
        Code::Unauthenticated
    );
    let join = AddMemberRequest {
        id: 9,
        address: "127.0.0.1:1".into(),
        directory: 1,
    };
    assert_eq!(code(stranger.add_member(join).await), Code::Unauthenticated);
    let mut bare = NodesClient::connect(format!("http://{address}")).await.unwrap();
    let refused = bare.heartbeat(HeartbeatRequest::default()).await.unwrap_err();
    assert_eq!(refused.metadata().get(CODE_KEY).unwrap(), "unauthenticated");

    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    socket.write_all(&[0xff; 4096]).await.unwrap();
    let mut rest = vec![];
    let _ = socket.read_to_end(&mut rest).await;
    let huge = CreateVolumeRequest {
        name: "x".repeat(8 << 20),
        ..create("x")
    };
    assert!(client.create_volume(huge).await.is_err());
    let selectorless = client.get_volume(GetVolumeRequest { volume: None }).await;
    assert_eq!(code(selectorless), Code::InvalidArgument);
    let short = AttachRequest {
        client_id: vec![1],
        ..attach("a", 1, false)
    };
    assert_eq!(code(client.attach(short).await), Code::InvalidArgument);
    client.register_node(registration(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_start_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = listener.local_addr().unwrap();
    let alone = |id| MetaStart::Bootstrap(vec![(id, taken.to_string())]);
    let words = |result: Result<(), MetaError>| result.unwrap_err().to_string();
    let forever = std::future::pending::<()>;
    let error = words(run(config(dir.path(), 1, taken, alone(1)), forever()).await);
    assert!(
        error.contains("can't listen on") && error.contains("another address"),
        "{error}"
    );
    let other = || TcpListener::bind("127.0.0.1:0");
    let error = words(
        run_on(
            other().await.unwrap(),
            config(dir.path(), 0, taken, alone(0)),
            forever(),
        )
        .await,
    );
    assert!(error.contains("above 0"), "{error}");
    let error = words(
        run_on(
            other().await.unwrap(),
            config(dir.path(), 2, taken, alone(1)),
            forever(),
        )
        .await,
    );
    assert!(error.contains("one of them"), "{error}");

    // Two processes on one directory, and a directory of another member.
    let first = tokio::spawn(run_on(listener, config(dir.path(), 1, taken, alone(1)), forever()));
    let client = MetaClient::new(vec![taken.to_string()]);
    client.list_volumes(ListVolumesRequest::default()).await.unwrap();
    let error = words(
        run_on(
            other().await.unwrap(),
            config(dir.path(), 1, taken, alone(1)),
            forever(),
        )
        .await,
    );
    assert!(error.contains("in use"), "{error}");
    drop(first);
}
