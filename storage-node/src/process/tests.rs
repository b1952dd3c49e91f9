//! A real node over loopback, with a real metadata server or none.

use std::future::Future;
use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;

use cairn_meta::config::{MetaConfig, MetaStart};
use cairn_proto::buffer::BlockBuf;
use cairn_proto::capability::{Capability, ClusterKey, Rights};
use cairn_proto::checksum::range_checksums;
use cairn_proto::control::v1;
use cairn_proto::frame::FrameHeader;
use cairn_proto::ids::*;
use cairn_proto::limits::{BLOCK_BYTES, FRAME_HEADER_BYTES};
use cairn_proto::message::*;
use cairn_proto::units::{BlockRange, ByteSize};
use tokio::sync::oneshot;

use super::*;
use crate::config::{DeviceConfig, FailureDomain, NodeLimits};
use crate::driver::DeviceError;
use crate::host::BackgroundConfig;
use crate::store::OpenError;

const KEY: ClusterKey = ClusterKey([5; 32]);
const VOLUME: VolumeId = VolumeId(7);

fn config(dir: &Path, meta: &str) -> NodeConfig {
    NodeConfig {
        name: "node-1".to_string(),
        devices: vec![DeviceConfig {
            create_size: Some(ByteSize(256 << 20)),
            ..DeviceConfig::new(dir.join("device"))
        }],
        listen: "127.0.0.1:0".parse().unwrap(),
        advertise: String::new(),
        meta: vec![meta.to_string()],
        cluster_key: KEY,
        domain: FailureDomain {
            host: "node-1".to_string(),
            ..FailureDomain::default()
        },
        metrics_listen: None,
        background: BackgroundConfig::default(),
        limits: NodeLimits::default(),
    }
}

/// Something that runs until it is told to stop.
struct Running<E> {
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<Result<(), E>>,
}

impl<E: std::error::Error + Send + 'static> Running<E> {
    fn spawn<F: Future<Output = Result<(), E>> + Send + 'static>(
        run: impl FnOnce(oneshot::Receiver<()>) -> F,
    ) -> Running<E> {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(run(stopped));
        Running { stop, task }
    }

    async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.unwrap().unwrap();
    }
}

async fn until(stopped: oneshot::Receiver<()>) {
    let _ = stopped.await;
}

struct Meta {
    address: String,
    running: Running<cairn_meta::MetaError>,
}

impl Meta {
    async fn start(dir: &Path) -> Meta {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let config = MetaConfig {
            id: 1,
            dir: dir.join("meta"),
            listen: listener.local_addr().unwrap(),
            advertise: String::new(),
            start: MetaStart::Bootstrap(vec![(1, address.clone())]),
            cluster_key: KEY,
            metrics_listen: None,
        };
        let running = Running::spawn(|stopped| cairn_meta::run_on(listener, config, until(stopped)));
        Meta { address, running }
    }

    fn client(&self) -> MetaClient {
        MetaClient::new(vec![self.address.clone()])
    }

    /// The first device, as soon as it is registered and heard of.
    async fn device(&self) -> v1::Device {
        for _ in 0..200 {
            if let Ok(answer) = self.client().list_devices(v1::ListDevicesRequest::default()).await
                && let Some(device) = answer.devices.into_iter().next()
                && device.seems_alive
            {
                return device;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("no device was registered within ten seconds");
    }
}

struct Served {
    address: SocketAddr,
    running: Running<NodeError>,
}

impl Served {
    async fn start(config: NodeConfig) -> Served {
        let node = Node::start(config).await.unwrap();
        let address = node.addresses()[0];
        let running = Running::spawn(|stopped| node.run(until(stopped)));
        Served { address, running }
    }
}

/// Who the device says to be.
#[derive(Clone, Copy)]
struct Whom {
    cluster: ClusterId,
    device: DeviceId,
}

impl Whom {
    async fn of(meta: &Meta) -> Whom {
        let id = meta.device().await.id.unwrap();
        let status = meta.client().status().await.unwrap();
        Whom {
            cluster: ClusterId(status.cluster_id.try_into().unwrap()),
            device: DeviceId {
                uuid: DeviceUuid(id.uuid.try_into().unwrap()),
                incarnation: Incarnation(id.incarnation),
            },
        }
    }

    fn capability(&self, generation: u32) -> Capability {
        let generation = holder(generation).generation;
        Capability::grant(&KEY, self.cluster, VOLUME, generation, Rights::Write)
    }
}

fn holder(generation: u32) -> Holder {
    Holder {
        volume: VOLUME,
        generation: Generation::new(generation).unwrap(),
    }
}

/// A client that waits for each answer.
struct Client {
    stream: TcpStream,
    correlation: u64,
}

impl Client {
    fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_nodelay(true).unwrap();
        Client { stream, correlation: 0 }
    }

    fn send(&mut self, message: Message) {
        self.correlation += 1;
        let frame = Envelope::new(Correlation(self.correlation), message).encode();
        let mut bytes = frame.head.to_vec();
        frame.data.iter().for_each(|piece| bytes.extend_from_slice(piece));
        self.stream.write_all(&bytes).unwrap();
    }

    fn receive(&mut self) -> Envelope {
        let mut start = [0; FRAME_HEADER_BYTES];
        self.stream.read_exact(&mut start).unwrap();
        let header = FrameHeader::decode(&start).unwrap();
        let mut head = start.to_vec();
        head.resize(FRAME_HEADER_BYTES + header.control_bytes as usize, 0);
        self.stream.read_exact(&mut head[FRAME_HEADER_BYTES..]).unwrap();
        let mut data = vec![0; header.data_bytes as usize];
        self.stream.read_exact(&mut data).unwrap();
        Envelope::decode(&header, &head, data.into()).unwrap()
    }

    fn ask(&mut self, message: Message) -> Message {
        self.send(message);
        let envelope = self.receive();
        assert_eq!(envelope.correlation, Correlation(self.correlation));
        envelope.message
    }

    /// Whether the peer has closed the connection without another word.
    fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        matches!(self.stream.read(&mut byte), Ok(0))
            || self.stream.take_error().ok().flatten().is_some()
            || matches!(self.stream.read(&mut byte), Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset)
    }

    fn hello(&mut self, whom: Whom) -> Message {
        self.ask(Message::Hello(Hello {
            version_min: Hello::VERSION,
            version_max: Hello::VERSION,
            purpose: Purpose::Guest,
            features: 0,
            cluster: whom.cluster,
            device: whom.device,
            recovered: CommitSeq(0),
            commit: CommitSeq(0),
            client: ClientId([1; 16]),
            limits: PeerLimits::default(),
            capability: None,
        }))
    }

    /// Connected, greeted, sealed and joined.
    fn attached(address: SocketAddr, whom: Whom, generation: u32) -> Client {
        let mut client = Client::connect(address);
        assert!(matches!(client.hello(whom), Message::Hello(_)));
        let capability = whom.capability(generation);
        let sealed = client.ask(Message::Seal(Seal { capability }));
        assert!(matches!(sealed, Message::Sealed(_)), "{sealed:?}");
        let joined = client.ask(Message::Join(Join {
            holder: holder(generation),
            group: GroupIndex(0),
            role: ReplicaRole::InSync,
            epoch: Epoch(1),
        }));
        assert!(matches!(joined, Message::Joined(_)), "{joined:?}");
        client
    }

    fn write(&mut self, generation: u32, seq: u64, range: BlockRange, fill: u8) -> Message {
        let bytes = BlockBuf::copied_from(&vec![fill; range.bytes()]).freeze();
        let checksums = range_checksums(VOLUME, range, &bytes);
        self.ask(Message::Write(Write {
            holder: holder(generation),
            group: GroupIndex(0),
            layer: Layer(0),
            range,
            version: Version::new(holder(generation).generation, Seq::new(seq).unwrap()),
            stable: Version::ZERO,
            data: WriteData::Data { bytes, checksums },
        }))
    }

    /// The first byte of each block that is data.
    fn read(&mut self, generation: u32, range: BlockRange) -> Vec<u8> {
        let answer = self.ask(Message::Read(cairn_proto::message::Read {
            holder: holder(generation),
            group: GroupIndex(0),
            layer: Layer(0),
            range,
        }));
        let Message::ReadAnswer(answer) = answer else {
            panic!("{answer:?}")
        };
        let blocks = answer.bytes.iter().flat_map(|bytes| bytes.chunks(BLOCK_BYTES));
        blocks
            .map(|block| {
                assert!(block.iter().all(|byte| *byte == block[0]));
                block[0]
            })
            .collect()
    }
}

fn range(start: u32, count: u32) -> BlockRange {
    BlockRange::new(ChunkIndex(0), start, count).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_stores_what_it_acknowledges_and_has_it_after_a_restart_without_meta() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Meta::start(dir.path()).await;
    let served = Served::start(config(dir.path(), &meta.address)).await;
    let whom = Whom::of(&meta).await;
    let device = meta.device().await;
    assert_eq!(device.addresses, [served.address.to_string()]);
    assert!(device.capacity_bytes > 200 << 20, "{}", device.capacity_bytes);

    let mut client = Client::attached(served.address, whom, 1);
    for (seq, start, count) in [(1, 0, 1), (2, 10, 256), (3, 300, 7)] {
        let answer = client.write(1, seq, range(start, count), seq as u8);
        assert!(matches!(answer, Message::Durable(_)), "{answer:?}");
    }
    assert_eq!(client.read(1, range(0, 1)), [1]);
    assert_eq!(client.read(1, range(10, 256)), [2; 256]);
    served.running.stop().await;
    assert!(client.is_closed());
    meta.running.stop().await;

    let served = Served::start(config(dir.path(), "127.0.0.1:1")).await;
    let mut client = Client::attached(served.address, whom, 1);
    assert_eq!(client.read(1, range(0, 1)), [1]);
    assert_eq!(client.read(1, range(10, 256)), [2; 256]);
    assert_eq!(client.read(1, range(299, 10)), [3; 7]);
    assert!(matches!(client.write(1, 4, range(0, 2), 9), Message::Durable(_)));
    assert_eq!(client.read(1, range(0, 3)), [9, 9]);
    served.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_sends_nonsense_loses_its_connection_and_nobody_else_notices() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Meta::start(dir.path()).await;
    let served = Served::start(config(dir.path(), &meta.address)).await;
    let whom = Whom::of(&meta).await;
    let mut client = Client::attached(served.address, whom, 1);

    let mut garbage = Client::connect(served.address);
    garbage
        .stream
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\nAccept: something long enough\r\n\r\n\r\n")
        .unwrap();
    assert!(garbage.is_closed());

    let mut oversized = Client::connect(served.address);
    assert!(matches!(oversized.hello(whom), Message::Hello(_)));
    let mut head = Envelope::new(Correlation(1), Message::Ping(Empty))
        .encode()
        .head
        .to_vec();
    head[12..16].copy_from_slice(&(1u32 << 30).to_le_bytes());
    oversized.stream.write_all(&head).unwrap();
    assert!(oversized.is_closed());

    let mut damaged = Client::connect(served.address);
    assert!(matches!(damaged.hello(whom), Message::Hello(_)));
    let mut head = Envelope::new(Correlation(1), Message::Ping(Empty))
        .encode()
        .head
        .to_vec();
    head[20] ^= 1;
    damaged.stream.write_all(&head).unwrap();
    assert!(damaged.is_closed());

    let mut impatient = Client::connect(served.address);
    impatient.send(Message::Ping(Empty));
    assert!(impatient.is_closed());

    let mut stranger = Client::connect(served.address);
    let other = Whom {
        cluster: ClusterId([9; 16]),
        ..whom
    };
    let answer = stranger.hello(other);
    assert!(
        matches!(&answer, Message::Failed(failed) if failed.kind == FailureKind::WrongCluster),
        "{answer:?}"
    );
    assert!(stranger.is_closed());

    let mut thief = Client::connect(served.address);
    assert!(matches!(thief.hello(whom), Message::Hello(_)));
    let generation = holder(9).generation;
    let capability = Capability::grant(&ClusterKey([1; 32]), whom.cluster, VOLUME, generation, Rights::Write);
    let answer = thief.ask(Message::Seal(Seal { capability }));
    assert!(
        matches!(&answer, Message::Failed(failed) if failed.kind == FailureKind::Unauthorized),
        "{answer:?}"
    );

    // Cut off in the middle of a frame, and many that only connect.
    let mut torn = Client::connect(served.address);
    assert!(matches!(torn.hello(whom), Message::Hello(_)));
    torn.stream
        .write_all(&Envelope::new(Correlation(1), Message::Ping(Empty)).encode().head[..30])
        .unwrap();
    drop(torn);
    let scan: Vec<_> = (0..200).map(|_| Client::connect(served.address)).collect();
    drop(scan);

    assert!(matches!(client.write(1, 1, range(0, 4), 4), Message::Durable(_)));
    assert_eq!(client.read(1, range(0, 4)), [4; 4]);
    served.running.stop().await;
    meta.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_slow_on_purpose_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Meta::start(dir.path()).await;
    let mut config = config(dir.path(), &meta.address);
    let short = Duration::from_millis(300);
    config.limits.host.hello_timeout = short;
    config.limits.driver.head_timeout = short;
    config.limits.driver.frame_timeout = short;
    config.limits.driver.send_timeout = short;
    let served = Served::start(config).await;
    let whom = Whom::of(&meta).await;

    let mut says_nothing = Client::connect(served.address);
    let mut never_ends_a_head = Client::connect(served.address);
    assert!(matches!(never_ends_a_head.hello(whom), Message::Hello(_)));
    never_ends_a_head.stream.write_all(b"CRNF").unwrap();
    let mut never_ends_a_frame = Client::attached(served.address, whom, 1);
    let bytes = BlockBuf::zeroed(4).freeze();
    let write = Message::Write(Write {
        holder: holder(1),
        group: GroupIndex(0),
        layer: Layer(0),
        range: range(0, 4),
        version: Version::new(holder(1).generation, Seq::new(1).unwrap()),
        stable: Version::ZERO,
        data: WriteData::Data {
            checksums: range_checksums(VOLUME, range(0, 4), &bytes),
            bytes,
        },
    });
    let head = Envelope::new(Correlation(77), write).encode().head;
    never_ends_a_frame.stream.write_all(&head).unwrap();
    for client in [&mut says_nothing, &mut never_ends_a_head, &mut never_ends_a_frame] {
        assert!(client.is_closed());
    }

    // Asks for more than the buffers of both sockets hold, and takes none of it.
    let mut takes_nothing = Client::attached(served.address, whom, 2);
    for seq in 0..8 {
        let at = range(seq as u32 * 256, 256);
        assert!(matches!(takes_nothing.write(2, seq + 1, at, 3), Message::Durable(_)));
    }
    for i in 0..256 {
        takes_nothing.send(Message::Read(cairn_proto::message::Read {
            holder: holder(2),
            group: GroupIndex(0),
            layer: Layer(0),
            range: range(i % 8 * 256, 256),
        }));
    }
    let ping = Envelope::new(Correlation(999), Message::Ping(Empty)).encode().head;
    for _ in 0..100 {
        if takes_nothing.stream.write_all(&ping).is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(takes_nothing.stream.write_all(&[0]).is_err(), "it is still connected");
    served.running.stop().await;
    meta.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_holder_fences_the_older_one() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Meta::start(dir.path()).await;
    let served = Served::start(config(dir.path(), &meta.address)).await;
    let whom = Whom::of(&meta).await;
    let mut old = Client::attached(served.address, whom, 1);
    assert!(matches!(old.write(1, 1, range(0, 1), 1), Message::Durable(_)));
    let mut new = Client::attached(served.address, whom, 2);
    let answer = old.write(1, 2, range(0, 1), 2);
    assert!(
        matches!(&answer, Message::Failed(failed) if failed.seen == holder(2).generation),
        "{answer:?}"
    );
    assert_eq!(new.read(2, range(0, 1)), [1]);
    served.running.stop().await;
    meta.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_are_all_answered_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Meta::start(dir.path()).await;
    let mut config = config(dir.path(), &meta.address);
    config.metrics_listen = Some("127.0.0.1:0".parse().unwrap());
    let node = Node::start(config).await.unwrap();
    let (address, metrics) = (node.addresses()[0], node.metrics_address().unwrap());
    let running = Running::spawn(|stopped| node.run(until(stopped)));
    let served = Served { address, running };
    let whom = Whom::of(&meta).await;
    let mut client = Client::attached(served.address, whom, 1);
    let bytes = BlockBuf::copied_from(&[7; 64 * BLOCK_BYTES]).freeze();
    let count = 200u64;
    let mut writer = client.stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        for seq in 1..=count {
            let at = range((seq as u32 % 200) * 64, 64);
            let write = Write {
                holder: holder(1),
                group: GroupIndex(0),
                layer: Layer(0),
                range: at,
                version: Version::new(holder(1).generation, Seq::new(seq).unwrap()),
                stable: Version::ZERO,
                data: WriteData::Data {
                    bytes: bytes.clone(),
                    checksums: range_checksums(VOLUME, at, &bytes),
                },
            };
            let frame = Envelope::new(Correlation(1000 + seq), Message::Write(write)).encode();
            writer.write_all(&frame.head).unwrap();
            frame.data.iter().for_each(|piece| writer.write_all(piece).unwrap());
        }
    });
    let mut answers: Vec<_> = (0..count)
        .map(|_| {
            let envelope = client.receive();
            assert!(
                matches!(envelope.message, Message::Durable(_)),
                "{:?}",
                envelope.message
            );
            envelope.correlation.0 - 1000
        })
        .collect();
    sender.join().unwrap();
    answers.sort_unstable();
    assert_eq!(answers, (1..=count).collect::<Vec<_>>());
    assert_eq!(client.read(1, range(64, 64)), [7; 64]);
    let mut scrape = TcpStream::connect(metrics).unwrap();
    scrape.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut text = String::new();
    scrape.read_to_string(&mut text).unwrap();
    let device = whom.device.uuid;
    let written = format!("cairn_node_write_bytes_total{{device=\"{device}\",class=\"guest\"}} 52428800");
    assert!(text.contains(&written), "{text}");
    let cache = format!("cairn_node_volatile_write_cache{{device=\"{device}\",by=\"detection\"}} 1");
    assert!(text.contains(&cache), "{text}");
    for name in [
        "cairn_node_request_seconds_bucket",
        "cairn_node_requests_in_flight",
        "cairn_node_connections",
    ] {
        assert!(text.contains(name), "{name} is not in {text}");
    }
    served.running.stop().await;
    meta.running.stop().await;
}

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

async fn refusal(config: NodeConfig) -> NodeError {
    match Node::start(config).await {
        Ok(_) => panic!("it started"),
        Err(error) => error,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_cannot_be_used_are_refused_with_words() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Meta::start(dir.path()).await;
    let served = Served::start(config(dir.path(), &meta.address)).await;
    meta.device().await;
    let error = refusal(config(dir.path(), &meta.address)).await;
    assert!(
        matches!(
            error,
            NodeError::Device {
                error: DeviceError::InUse,
                ..
            }
        ),
        "{error}"
    );
    served.running.stop().await;

    let path = dir.path().join("device");
    std::fs::copy(&path, dir.path().join("copy")).unwrap();
    let mut twice = config(dir.path(), &meta.address);
    twice.devices.push(DeviceConfig::new(dir.path().join("copy")));
    let error = refusal(twice).await;
    assert!(error.to_string().contains("one is a copy of the other"), "{error}");

    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(100 << 20).unwrap();
    let error = refusal(config(dir.path(), &meta.address)).await;
    assert!(
        matches!(
            error,
            NodeError::Store {
                error: OpenError::Truncated { .. },
                ..
            }
        ),
        "{error}"
    );
    file.write_all_at(&[0xab; 1 << 20], 0).unwrap();
    let error = refusal(config(dir.path(), &meta.address)).await;
    assert!(
        matches!(
            error,
            NodeError::Store {
                error: OpenError::Foreign { .. },
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    meta.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_of_another_cluster_is_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Meta::start(dir.path()).await;
    let served = Served::start(config(dir.path(), &meta.address)).await;
    meta.device().await;
    served.running.stop().await;
    meta.running.stop().await;

    let other = tempfile::tempdir().unwrap();
    let meta = Meta::start(other.path()).await;
    let node = Node::start(config(dir.path(), &meta.address)).await.unwrap();
    let outcome = tokio::time::timeout(Duration::from_secs(30), node.run(std::future::pending())).await;
    let error = outcome.expect("it ends").unwrap_err();
    assert!(matches!(error, NodeError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("another cluster"), "{error}");
    meta.running.stop().await;
}

#[tokio::test]
async fn configurations_that_make_no_sense_are_refused_with_words() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(dir.path(), "127.0.0.1:1");
    let cases = [
        (
            NodeConfig {
                name: "a b".to_string(),
                ..good.clone()
            },
            "no name for a node",
        ),
        (
            NodeConfig {
                devices: Vec::new(),
                ..good.clone()
            },
            "1 to 64 devices",
        ),
        (
            NodeConfig {
                meta: Vec::new(),
                ..good.clone()
            },
            "no metadata server",
        ),
        (
            NodeConfig {
                listen: "0.0.0.0:0".parse().unwrap(),
                ..good.clone()
            },
            "every address",
        ),
        (
            NodeConfig {
                advertise: "host".to_string(),
                ..good.clone()
            },
            "host:port",
        ),
    ];
    for (config, expected) in cases {
        let error = refusal(config).await;
        assert!(error.to_string().contains(expected), "{error}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    let error = refusal(NodeConfig { listen, ..good }).await;
    assert!(matches!(error, NodeError::Listen { .. }), "{error}");
}
