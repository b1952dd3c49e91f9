//! What an operator says and asks, and what becomes of the space of deleted volumes.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn what_the_operator_says_of_a_write_cache_is_told_to_meta() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Meta::start(dir.path()).await;
    let mut config = config(dir.path(), &meta.address);
    config.devices[0].volatile_cache = Some(false);
    let served = Served::start(config).await;
    let heard = async {
        // It is registered with the first report, and says this with the next.
        while meta.device().await.write_cache() != v1::WriteCache::NoneByOperator {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let heard = tokio::time::timeout(Duration::from_secs(20), heard).await;
    heard.expect("a heartbeat says it");
    served.running.stop().await;
    meta.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_has_a_device_verified_and_learns_of_its_damage() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Meta::start(dir.path()).await;
    let config = config(dir.path(), &meta.address);
    let path = config.devices[0].path.clone();
    let served = Served::start(config).await;
    let whom = Whom::of(&meta).await;
    let mut client = Client::attached(served.address, whom, 1);
    let answer = client.write(1, 1, range(10, 200), 0x5a);
    assert!(matches!(answer, Message::Durable(_)), "{answer:?}");
    // One bit of one of the blocks rots on the disk.
    let content = std::fs::read(&path).unwrap();
    let mut blocks = content.chunks_exact(BLOCK_BYTES);
    let rotten = blocks.position(|block| block.iter().all(|byte| *byte == 0x5a)).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0x5b], (rotten * BLOCK_BYTES + 77) as u64).unwrap();
    file.sync_all().unwrap();

    let devices = vec![meta.device().await.id.unwrap()];
    let request = v1::ScrubDevicesRequest { devices };
    meta.client().scrub_devices(request).await.unwrap();
    let finished = async {
        loop {
            if let Some(scrub) = meta.device().await.scrub.filter(|scrub| scrub.finished_pass > 0) {
                return scrub;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let scrub = tokio::time::timeout(Duration::from_secs(20), finished).await;
    let scrub = scrub.expect("the pass is over soon");
    assert_eq!((scrub.pass, scrub.under_way, scrub.checked_blocks), (1, false, 200));
    assert_eq!(
        (scrub.damaged_blocks, scrub.damaged_metadata, scrub.data_blocks),
        (1, 0, 200)
    );
    assert!(scrub.begun_s > 0 && scrub.finished_s >= scrub.begun_s);
    let problems = meta.client().status().await.unwrap().problems;
    assert!(
        problems.iter().any(|problem| problem.code == "device-damaged"),
        "{problems:?}"
    );
    served.running.stop().await;
    meta.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_space_of_a_deleted_volume_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Meta::start(dir.path()).await;
    let mut config = config(dir.path(), &meta.address);
    config.devices.push(DeviceConfig {
        path: dir.path().join("second"),
        ..config.devices[0].clone()
    });
    let node = Node::start(config).await.unwrap();
    let addresses = node.addresses();
    let running = Running::spawn(|stopped| node.run(until(stopped)));
    let whom = Whom::of(&meta).await;
    let control = meta.client();
    let create = v1::CreateVolumeRequest {
        name: "short-lived".to_string(),
        size_bytes: 1 << 30,
        replicas: 1,
        ..Default::default()
    };
    let volume = control.create_volume(create).await.unwrap().volume.unwrap();
    let holder = Holder {
        volume: VolumeId(volume.id),
        ..holder(1)
    };
    let devices = control
        .list_devices(v1::ListDevicesRequest::default())
        .await
        .unwrap()
        .devices;
    let mine = devices
        .iter()
        .find(|device| device.id.as_ref().unwrap().uuid == whom.device.uuid.0)
        .unwrap();
    let address = *addresses
        .iter()
        .find(|address| address.to_string() == mine.addresses[0])
        .unwrap();

    let mut client = Client::connect(address);
    assert!(matches!(client.hello(whom), Message::Hello(_)));
    let capability = Capability::grant(&KEY, whom.cluster, holder.volume, holder.generation, Rights::Write);
    assert!(matches!(
        client.ask(Message::Seal(Seal { capability })),
        Message::Sealed(_)
    ));
    let join = Message::Join(Join {
        holder,
        group: GroupIndex(0),
        role: ReplicaRole::InSync,
        epoch: Epoch(1),
    });
    assert!(matches!(client.ask(join), Message::Joined(joined) if joined.created));
    let selector = v1::VolumeSelector {
        by: Some(v1::volume_selector::By::Id(volume.id)),
    };
    let delete = v1::DeleteVolumeRequest {
        volume: Some(selector),
        force: true,
    };
    control.delete_volume(delete).await.unwrap();

    let look = Message::Read(cairn_proto::message::Read {
        holder,
        group: GroupIndex(0),
        layer: Layer(0),
        range: range(0, 1),
    });
    let mut is_dropped = false;
    for _ in 0..200 {
        let answer = client.ask(look.clone());
        is_dropped = matches!(&answer, Message::Failed(failed) if failed.kind == FailureKind::NoReplica);
        if is_dropped {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(is_dropped, "the replica is still there after ten seconds");
    running.stop().await;
    meta.running.stop().await;
}
