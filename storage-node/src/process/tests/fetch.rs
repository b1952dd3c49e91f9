//! One device reads from another over real sockets.

use std::net::TcpListener;

use super::*;

/// A node with two devices, and who they are, in the order of their addresses.
struct Pair {
    meta: Meta,
    running: Running<NodeError>,
    addresses: Vec<SocketAddr>,
    whom: Vec<Whom>,
}

impl Pair {
    async fn start(dir: &Path, change: impl FnOnce(&mut NodeConfig)) -> Pair {
        let meta = Meta::start(dir).await;
        let mut config = config(dir, &meta.address);
        config.devices.push(DeviceConfig {
            create_size: Some(ByteSize(256 << 20)),
            ..DeviceConfig::new(dir.join("other"))
        });
        change(&mut config);
        let node = Node::start(config).await.unwrap();
        let addresses = node.addresses().to_vec();
        let running = Running::spawn(|stopped| node.run(until(stopped)));
        let cluster = Whom::of(&meta).await.cluster;
        let devices = wait_devices(&meta, addresses.len()).await;
        let whom = addresses.iter().map(|address| {
            let at = |device: &&v1::Device| device.addresses == [address.to_string()];
            let id = devices.iter().find(at).unwrap().id.clone().unwrap();
            let device = DeviceId {
                uuid: DeviceUuid(id.uuid.try_into().unwrap()),
                incarnation: Incarnation(id.incarnation),
            };
            Whom { cluster, device }
        });
        let whom = whom.collect();
        Pair {
            meta,
            running,
            addresses,
            whom,
        }
    }

    fn attached(&self, index: usize) -> Client {
        Client::attached(self.addresses[index], self.whom[index], 1)
    }

    /// Read from the first device, what the second is asked for.
    fn fetch(&self, recovered: CommitSeq, range: BlockRange) -> Fetch {
        Fetch {
            holder: holder(1),
            group: GroupIndex(0),
            layer: Layer(0),
            range,
            why: CopySource::Resync,
            from: self.whom[0].device,
            recovered,
            commit: recovered,
            capability: self.whom[0].capability(1),
            address: self.addresses[0].to_string(),
        }
    }

    /// What the first device's hello says that it has recovered.
    fn recovered(&self) -> CommitSeq {
        let mut client = Client::connect(self.addresses[0]);
        let answer = client.hello(self.whom[0]);
        let Message::Hello(hello) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(hello.features & features::FETCH, features::FETCH);
        hello.recovered
    }

    async fn stop(self) {
        self.running.stop().await;
        self.meta.running.stop().await;
    }
}

async fn wait_devices(meta: &Meta, count: usize) -> Vec<v1::Device> {
    for _ in 0..200 {
        let answer = meta.client().list_devices(v1::ListDevicesRequest::default()).await;
        if let Ok(answer) = answer
            && answer.devices.len() == count
            && answer.devices.iter().all(|device| device.seems_alive)
        {
            return answer.devices;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{count} devices were not registered within ten seconds");
}

fn kind(message: &Message) -> Option<FailureKind> {
    match message {
        Message::Failed(failed) => Some(failed.kind),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_device_lacks_it_reads_from_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::start(dir.path(), |_| ()).await;
    let mut source = pair.attached(0);
    for (seq, start, fill) in [(1, 0, 1), (2, 256, 2), (3, 700, 3)] {
        assert!(matches!(
            source.write(1, seq, range(start, 256), fill),
            Message::Durable(_)
        ));
    }
    let mut target = pair.attached(1);
    let recovered = pair.recovered();
    // More than go at a time.
    for i in 0..20 {
        target.send(Message::Fetch(pair.fetch(recovered, range(i * 48, 48))));
    }
    for _ in 0..20 {
        let answer = target.receive().message;
        assert!(matches!(answer, Message::Durable(_)), "{answer:?}");
    }
    assert_eq!(target.read(1, range(0, 256)), [1; 256]);
    assert_eq!(target.read(1, range(256, 256)), [2; 256]);
    assert_eq!(
        target.read(1, range(600, 256)),
        [3; 156],
        "what was never written is no data"
    );
    // The holder is superseded at the source: that one gives nothing any more.
    let mut newer = Client::attached(pair.addresses[0], pair.whom[0], 2);
    let answer = target.ask(Message::Fetch(pair.fetch(recovered, range(0, 8))));
    assert_eq!(kind(&answer), Some(FailureKind::NotFetched), "{answer:?}");
    assert_eq!(newer.read(2, range(0, 1)), [1]);
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_not_there_or_says_nothing_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::start(dir.path(), |config| {
        config.limits.host.fetch_connect_timeout = Duration::from_millis(300);
        config.limits.host.fetch_timeout = Duration::from_millis(600);
    })
    .await;
    let mut target = pair.attached(1);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let at = |address: String| {
        Message::Fetch(Fetch {
            address,
            ..pair.fetch(CommitSeq(0), range(0, 8))
        })
    };
    for address in [
        closed.to_string(),
        silent.local_addr().unwrap().to_string(),
        "no address at all".to_string(),
        // A device, and another one than was wanted.
        pair.addresses[1].to_string(),
    ] {
        let answer = target.ask(at(address.clone()));
        assert_eq!(
            kind(&answer),
            Some(FailureKind::PeerUnreachable),
            "{address}: {answer:?}"
        );
    }
    // Whatever it has waited for, it serves on.
    assert!(matches!(target.write(1, 1, range(0, 4), 4), Message::Durable(_)));
    assert_eq!(target.read(1, range(0, 4)), [4; 4]);
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_from_another_device_ends_its_connection_only() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::start(dir.path(), |_| ()).await;
    let mut target = pair.attached(1);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let garbage = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[0x55; 4096]).unwrap();
        // Until the other side has had enough.
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    });
    let fetch = Fetch {
        address,
        ..pair.fetch(CommitSeq(0), range(0, 8))
    };
    let answer = target.ask(Message::Fetch(fetch));
    assert_eq!(kind(&answer), Some(FailureKind::PeerUnreachable), "{answer:?}");
    garbage.join().unwrap();
    assert!(matches!(target.write(1, 1, range(0, 4), 4), Message::Durable(_)));
    pair.stop().await;
}
