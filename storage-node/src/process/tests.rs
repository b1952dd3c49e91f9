//! A real node over loopback, with a real metadata server or none.

mod fetch;
mod operators;
mod refusals;
mod wire;

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
            heal: Default::default(),
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
