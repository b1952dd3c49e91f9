//! Exports and the library against a real metadata server, with devices that are not there.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test stops at the first surprise, and waits in real time with a bound"
)]

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cairn_chaos::live::tools;
use cairn_client::Client;
use cairn_client::driver::OpenError;
use cairn_client::export::{ExportConfig, ExportError, ExportServer, Listen, ListenError};
use cairn_meta::client::MetaClient;
use cairn_meta::config::{MetaConfig, MetaStart};
use cairn_proto::capability::ClusterKey;
use cairn_proto::control::v1;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

const BOUND: Duration = Duration::from_secs(20);
const KEY: ClusterKey = ClusterKey([7; 32]);
const SIZE: u64 = 1 << 30;

/// A metadata server with three devices whose addresses nobody listens on, and the volume `demo`.
struct Meta {
    address: String,
    client: MetaClient,
    stop: Option<oneshot::Sender<()>>,
    dir: tempfile::TempDir,
}

impl Meta {
    async fn start() -> Meta {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listen: SocketAddr = listener.local_addr().unwrap();
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
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(cairn_meta::run_on(listener, config, async {
            let _ = stopped.await;
        }));
        let address = listen.to_string();
        let client = MetaClient::new(vec![address.clone()]).with_cluster_key(&KEY);
        for number in 1..=3 {
            client.register_node(node(number)).await.unwrap();
        }
        let demo = v1::CreateVolumeRequest {
            name: "demo".to_string(),
            size_bytes: SIZE,
            ..Default::default()
        };
        client.create_volume(demo).await.unwrap();
        let stop = Some(stop);
        Meta {
            address,
            client,
            stop,
            dir,
        }
    }

    async fn demo(&self) -> v1::Volume {
        let by = Some(v1::volume_selector::By::Name("demo".to_string()));
        let volume = Some(v1::VolumeSelector { by });
        let response = self.client.get_volume(v1::GetVolumeRequest { volume }).await.unwrap();
        response.volume.unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    async fn export(&self) -> ExportServer {
        ExportServer::start(self.export_config()).await.unwrap()
    }

    fn export_config(&self) -> ExportConfig {
        ExportConfig {
            meta: vec![self.address.clone()],
            listen: vec![Listen::Unix(self.socket())],
            words: "a test".to_string(),
            ..Default::default()
        }
    }
}

fn node(number: u8) -> v1::RegisterNodeRequest {
    let id = v1::DeviceId {
        uuid: vec![number; 16],
        incarnation: 1,
    };
    v1::RegisterNodeRequest {
        name: format!("host-{number}"),
        run_id: vec![number; 16],
        domain: Some(v1::FailureDomain {
            host: format!("host-{number}"),
            ..Default::default()
        }),
        devices: vec![v1::RegisterDevice {
            id: Some(id),
            addresses: vec![format!("127.0.0.1:{number}")],
            capacity_bytes: 1 << 40,
            ..Default::default()
        }],
        version: "test".to_string(),
        feature_level: 1,
    }
}

async fn wait<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let end = Instant::now() + BOUND;
    while !done().await {
        assert!(Instant::now() < end, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Chooses an export the old way; its size, if the connection is not closed.
fn size_of(socket: &Path, export: &str) -> Option<(UnixStream, u64)> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    let length = (export.len() as u32).to_be_bytes();
    let option = [b"\0\0\0\x03IHAVEOPT\0\0\0\x01", &length[..], export.as_bytes()].concat();
    stream.write_all(&option).unwrap();
    let mut answer = [0; 10];
    stream.read_exact(&mut answer).ok()?;
    let size = u64::from_be_bytes(*answer.first_chunk().unwrap());
    Some((stream, size))
}

async fn blocking<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(call).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn exports_are_what_meta_says_and_open_ones_outlive_it() {
    let mut meta = Meta::start().await;
    let server = meta.export().await;
    let socket = meta.socket();
    let path = socket.clone();
    let (open, size) = blocking(move || size_of(&path, "demo")).await.unwrap();
    assert_eq!(size, SIZE);
    let path = socket.clone();
    assert!(blocking(move || size_of(&path, "none")).await.is_none());
    assert_eq!(meta.demo().await.generation, 0, "no I/O, no attachment");

    // A volume that grows is larger for those who come later.
    let by = Some(v1::volume_selector::By::Name("demo".to_string()));
    let grow = v1::GrowVolumeRequest {
        volume: Some(v1::VolumeSelector { by }),
        size_bytes: 2 * SIZE,
    };
    meta.client.grow_volume(grow).await.unwrap();
    let path = socket.clone();
    assert_eq!(blocking(move || size_of(&path, "demo")).await.unwrap().1, 2 * SIZE);
    if tools::available(&[("nbdinfo", "libnbd-bin")]) {
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let list = blocking(move || {
            std::process::Command::new("nbdinfo")
                .args(["--list", "--json", &uri])
                .output()
        })
        .await;
        let list = String::from_utf8(list.unwrap().stdout).unwrap();
        assert!(list.contains("\"export-name\": \"demo\""), "{list}");
    }

    meta.stop.take().unwrap().send(()).unwrap();
    let path = socket.clone();
    assert_eq!(blocking(move || size_of(&path, "demo")).await.unwrap().1, 2 * SIZE);
    drop(open);
    server.shut_down().await.unwrap();
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_operation_takes_the_attachment_from_whoever_has_it() {
    let meta = Meta::start().await;
    let client = Client::start(vec![meta.address.clone()], "the first").await.unwrap();
    let volume = client.open("demo").await.unwrap();
    assert_eq!(
        client.open("none").await.unwrap_err(),
        OpenError::NotFound("none".to_string())
    );
    assert_eq!((volume.size().0, meta.demo().await.generation), (SIZE, 0));
    let reading = tokio::spawn(async move { volume.read(0, 4096).await });
    wait("the attachment", || async { meta.demo().await.generation == 1 }).await;
    let holder = meta.demo().await.holder.unwrap();
    assert_eq!((holder.address.as_str(), holder.generation), ("the first", 1));

    let second = Client::start(vec![meta.address.clone()], "the second").await.unwrap();
    let volume = second.open("demo").await.unwrap();
    let writing = tokio::spawn(async move { volume.write_zeroes(0, 4096, true).await });
    wait("the second attachment", || async { meta.demo().await.generation == 2 }).await;
    assert_eq!(meta.demo().await.holder.unwrap().address, "the second");
    // No device is there: both wait.
    assert!(!reading.is_finished() && !writing.is_finished());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_is_taken_is_refused_with_words() {
    let meta = Meta::start().await;
    let server = meta.export().await;
    let second = ExportServer::start(meta.export_config()).await.unwrap_err();
    assert!(matches!(second, ExportError::Listen(ListenError::InUse(_))), "{second}");
    assert!(second.to_string().contains("another process serves there"), "{second}");
    let path = meta.socket();
    assert!(
        blocking(move || size_of(&path, "demo")).await.is_some(),
        "the first goes on"
    );
    server.shut_down().await.unwrap();
}
