//! What clients of every kind meet at the data plane.

use super::*;

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
