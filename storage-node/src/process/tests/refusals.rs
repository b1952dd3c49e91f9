//! What a node does not start with.

use super::*;

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
