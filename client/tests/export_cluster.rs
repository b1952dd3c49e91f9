//! A whole cluster in one process: a metadata server, three nodes, an export, and the clients that people use.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test stops at the first surprise, and waits in real time with a bound"
)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cairn_chaos::live::tools;
use cairn_client::Client;
use cairn_client::export::{ExportConfig, ExportServer, Listen};
use cairn_meta::client::MetaClient;
use cairn_meta::config::{MetaConfig, MetaStart};
use cairn_proto::capability::ClusterKey;
use cairn_proto::control::v1;
use cairn_proto::units::ByteSize;
use cairn_storage_node::config::{DeviceConfig, FailureDomain, NodeConfig, NodeLimits};
use cairn_storage_node::host::BackgroundConfig;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const BOUND: Duration = Duration::from_secs(60);
const KEY: ClusterKey = ClusterKey([7; 32]);
const SIZE: u64 = 64 << 20;

/// Something that runs until it is told to stop.
struct Part {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Part {
    fn spawn<F: Future<Output = ()> + Send + 'static>(run: impl FnOnce(oneshot::Receiver<()>) -> F) -> Part {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(run(stopped));
        Part { stop, task }
    }

    async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.unwrap();
    }
}

struct Cluster {
    dir: tempfile::TempDir,
    meta_address: String,
    meta: Option<Part>,
    nodes: Vec<Option<Part>>,
    ports: Vec<SocketAddr>,
}

impl Cluster {
    async fn start() -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listen = listener.local_addr().unwrap();
        let config = MetaConfig {
            id: 1,
            dir: dir.path().join("meta"),
            listen,
            advertise: String::new(),
            start: MetaStart::Bootstrap(vec![(1, listen.to_string())]),
            cluster_key: KEY,
            metrics_listen: None,
            heal: Default::default(),
        };
        let meta = Some(Part::spawn(|stopped| async move {
            let stopped = async { drop(stopped.await) };
            cairn_meta::run_on(listener, config, stopped).await.unwrap();
        }));
        let meta_address = listen.to_string();
        let (nodes, ports) = (Vec::new(), Vec::new());
        let mut cluster = Cluster {
            dir,
            meta_address,
            meta,
            nodes,
            ports,
        };
        for number in 0..3 {
            cluster.ports.push("127.0.0.1:0".parse().unwrap());
            cluster.nodes.push(None);
            cluster.start_node(number).await;
        }
        let client = MetaClient::new(vec![cluster.meta_address.clone()]);
        let end = Instant::now() + BOUND;
        while client.status().await.is_ok_and(|status| status.devices < 3) {
            assert!(Instant::now() < end, "the devices never registered");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let demo = v1::CreateVolumeRequest {
            name: "demo".to_string(),
            size_bytes: SIZE,
            ..Default::default()
        };
        client.create_volume(demo).await.unwrap();
        cluster
    }

    /// Starts a node, again at the port that it had.
    async fn start_node(&mut self, number: usize) {
        let name = format!("node-{number}");
        let config = NodeConfig {
            devices: vec![DeviceConfig {
                create_size: Some(ByteSize(512 << 20)),
                ..DeviceConfig::new(self.dir.path().join(&name))
            }],
            listen: self.ports[number],
            advertise: String::new(),
            meta: vec![self.meta_address.clone()],
            cluster_key: KEY,
            domain: FailureDomain {
                host: name.clone(),
                ..FailureDomain::default()
            },
            metrics_listen: None,
            background: BackgroundConfig::default(),
            limits: NodeLimits::default(),
            name,
        };
        let node = cairn_storage_node::process::Node::start(config).await.unwrap();
        self.ports[number] = node.addresses()[0];
        self.nodes[number] = Some(Part::spawn(|stopped| async move {
            node.run(async { drop(stopped.await) }).await.unwrap();
        }));
    }

    async fn stop_node(&mut self, number: usize) {
        self.nodes[number].take().unwrap().stop().await;
    }

    async fn export(&self) -> ExportServer {
        let config = ExportConfig {
            meta: vec![self.meta_address.clone()],
            listen: vec![Listen::Unix(self.path("nbd.sock"))],
            words: "a test".to_string(),
            ..Default::default()
        };
        ExportServer::start(config).await.unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///demo?socket={}", self.path("nbd.sock").display())
    }
}

/// Runs a program to its end, which must be a good one.
async fn run(program: &str, args: &[&str]) -> String {
    let (program, args): (String, Vec<String>) = (program.into(), args.iter().map(|arg| arg.to_string()).collect());
    tokio::task::spawn_blocking(move || {
        let output = Command::new("timeout")
            .arg("120")
            .arg(&program)
            .args(&args)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{program} {args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_is_read_by_the_next_holder_and_without_meta() {
    let mut cluster = Cluster::start().await;
    let endpoints = vec![cluster.meta_address.clone()];
    let client = Client::start(endpoints.clone(), "the first").await.unwrap();
    let volume = client.open("demo").await.unwrap();
    let data: Bytes = (0..1 << 20).map(|i| (i % 251) as u8).collect::<Vec<u8>>().into();
    volume.write(0, data.clone()).await.unwrap();
    volume.write(512, Bytes::from(vec![9; 512])).await.unwrap();
    volume.discard(8192, 4096).await.unwrap();
    volume.flush().await.unwrap();
    let mut expected = data.to_vec();
    expected[512..1024].fill(9);
    expected[8192..12288].fill(0);
    assert!(volume.read(0, 1 << 20).await.unwrap() == expected);
    volume.close().await;
    let ended = client.shut_down().await.unwrap();
    assert_eq!((ended.unfinished, ended.unreleased), (0, 0));

    let client = Client::start(endpoints, "the second").await.unwrap();
    let volume = client.open("demo").await.unwrap();
    assert!(volume.read(0, 1 << 20).await.unwrap() == expected);
    cluster.meta.take().unwrap().stop().await;
    volume.write(4096, Bytes::from(vec![1; 4096])).await.unwrap();
    assert_eq!(volume.read(4096, 4096).await.unwrap(), vec![1; 4096]);
    let extents = volume.block_status(0, SIZE).await.unwrap();
    assert!(
        extents[0].data && extents.iter().any(|extent| !extent.data),
        "{extents:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn images_go_in_and_out_over_nbd() {
    if !tools::available(&[
        ("nbdcopy", "libnbd-bin"),
        ("nbdinfo", "libnbd-bin"),
        ("qemu-img", "qemu-utils"),
    ]) {
        return;
    }
    let cluster = Cluster::start().await;
    let server = cluster.export().await;
    let uri = cluster.uri();
    let path = |name: &str| cluster.path(name).display().to_string();
    let mut image = vec![0; SIZE as usize];
    for block in (0..image.len() / 4096).filter(|block| block % 61 == 0 || (3000..5000).contains(block)) {
        image[block * 4096..][..4096].fill((block % 255) as u8 + 1);
    }
    std::fs::write(cluster.path("in"), &image).unwrap();
    run(
        "nbdcopy",
        &["--connections=4", "--destination-is-zero", &path("in"), &uri],
    )
    .await;
    run("nbdcopy", &["--connections=4", &uri, &path("out")]).await;
    assert!(
        std::fs::read(cluster.path("out")).unwrap() == image,
        "nbdcopy gave back another image"
    );
    let map = run("nbdinfo", &["--map", "--totals", &uri]).await;
    assert!(map.contains("hole,zero"), "{map}");
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &path("in"), &uri]).await;
    run(
        "qemu-img",
        &["convert", "-n", "-f", "raw", "-O", "raw", &path("out"), &uri],
    )
    .await;
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &path("in"), &uri]).await;
    let ended = server.shut_down().await.unwrap();
    assert_eq!((ended.unfinished, ended.unreleased), (0, 0));
}

/// Writes and verifies while `trouble` goes on.
async fn verify(uri: &str, dir: &Path, seconds: u32) {
    let (uri, aux) = (format!("--uri={uri}"), format!("--aux-path={}", dir.display()));
    let runtime = format!("--runtime={seconds}");
    let args = [
        "--name=verify",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--iodepth=16",
        "--size=32M",
        "--io_size=1G",
        "--time_based",
        &runtime,
        "--verify=crc32c",
        "--verify_backlog=64",
        "--randseed=11",
        &uri,
        &aux,
    ];
    run("fio", &args).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_may_leave_and_come_back_under_load() {
    if !tools::available(&[("fio", "fio")]) {
        return;
    }
    let mut cluster = Cluster::start().await;
    let server = cluster.export().await;
    let (uri, dir) = (cluster.uri(), cluster.dir.path().to_path_buf());
    let load = tokio::spawn(async move { verify(&uri, &dir, 12).await });
    for number in [0, 1] {
        tokio::time::sleep(Duration::from_secs(2)).await;
        cluster.stop_node(number).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        cluster.start_node(number).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    load.await.unwrap();
    server.shut_down().await.unwrap();
}
