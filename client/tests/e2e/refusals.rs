//! Bad input: each gets its clear error, and none takes a process down or loses data.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use cairn_chaos::live::dev::Dev;
use cairn_chaos::live::nbd;
use cairn_chaos::live::process;
use cairn_chaos::live::wait::{wait_for, wait_until};
use cairn_proto::capability::{Capability, ClusterKey, Rights};
use cairn_proto::frame::{FRAME_MAGIC, FRAME_VERSION, FrameHeader};
use cairn_proto::ids::{ClientId, ClusterId, CommitSeq, Correlation, DeviceId, Generation, Incarnation, VolumeId};
use cairn_proto::limits::FRAME_HEADER_BYTES;
use cairn_proto::message::{Envelope, FailureKind, Hello, Message, PeerLimits, Purpose, Seal, features};

use crate::support::nbd::{ANSWER_BOUND, Nbd};
use crate::support::{Ran, Random, run, start};

const BOUND: Duration = Duration::from_secs(60);

/// A failed command: its exit code, and words that its message must have.
#[track_caller]
fn refused(ran: &Ran, code: i32, words: &[&str]) {
    assert_eq!(ran.status.code(), Some(code), "{ran:?}");
    for words in words {
        assert!(ran.err.contains(words), "should mention `{words}`: {}", ran.err);
    }
}

/// What runs, and that it runs.
fn running(dev: &Dev) -> BTreeMap<String, i32> {
    let pids = dev.pids();
    for (part, pid) in &pids {
        assert!(process::is_running(*pid), "{part} has died");
    }
    pids
}

#[test]
fn wrong_volumes_are_refused_with_words() {
    let dev = start(&["demo:64M"]);
    let cairn = |args: &[&str]| run(&mut dev.cairn(args));
    refused(&cairn(&["volume", "show", "nothing"]), 3, &["nothing"]);
    refused(&cairn(&["volume", "grow", "nothing", "1G"]), 3, &["nothing"]);
    refused(&cairn(&["volume", "delete", "nothing", "--yes"]), 3, &["nothing"]);
    refused(&cairn(&["volume", "create", "demo", "64M"]), 4, &["demo"]);
    let zero = cairn(&["volume", "create", "empty", "0"]);
    assert!(!zero.status.success() && zero.err.contains("size"), "{zero:?}");
    let huge = cairn(&["volume", "create", "huge", "257TiB"]);
    assert!(!huge.status.success() && huge.err.contains("256 TiB"), "{huge:?}");
    let shrunk = cairn(&["volume", "grow", "demo", "32M"]);
    assert!(!shrunk.status.success() && shrunk.err.contains("smaller"), "{shrunk:?}");
    let long = "x".repeat(129);
    for name in ["", "a/b", "a b", long.as_str()] {
        let ran = cairn(&["volume", "create", name, "64M"]);
        assert!(!ran.status.success() && !ran.err.is_empty(), "name `{name}`: {ran:?}");
    }
    let list = cairn(&["volume", "list", "--json"]).expect_success();
    assert_eq!(
        list.out.matches("\"name\"").count(),
        1,
        "nothing was made by the way: {}",
        list.out
    );

    // Unknown to the export too, which goes on.
    let unknown = Nbd::connect(&dev.socket(), "nothing")
        .err()
        .expect("an unknown export is refused");
    assert!(unknown.to_string().contains("no such volume"), "{unknown}");
    assert_eq!(Nbd::connect(&dev.socket(), "demo").unwrap().size, 64 << 20);
    running(&dev);
}

/// A node of a stopped cluster, started by itself with what the test did to its device.
fn node_after(change: impl Fn(&fs::File)) -> Ran {
    let mut dev = start(&["demo:64M"]);
    let mut nbd = Nbd::connect(&dev.socket(), "demo").unwrap();
    nbd.write(0, &[3; 65536]);
    let line = dev.kill("node-1");
    let device = only_device(&dev);
    change(&fs::OpenOptions::new().read(true).write(true).open(&device).unwrap());
    let log = dev.path().join("refusal.log");
    let mut child = process::Guarded::new(line.start(&log).unwrap());
    let status = child
        .wait(BOUND)
        .expect("a node without a usable device ends by itself");
    // The volume does not care: two copies are left.
    assert_eq!(nbd.read(0, 65536), [3; 65536]);
    nbd.write(0, &[4; 4096]);
    let mut err = fs::read_to_string(&log).unwrap();
    err.push_str(&fs::read_to_string(dev.path().join("log/node-1.log")).unwrap_or_default());
    Ran {
        status,
        out: String::new(),
        err,
    }
}

fn only_device(dev: &Dev) -> PathBuf {
    let entries = fs::read_dir(dev.path().join("node-1")).unwrap().flatten();
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    files.sort_by_key(|path| fs::metadata(path).unwrap().len());
    files.pop().expect("node 1 has a device")
}

#[test]
fn a_foreign_a_truncated_and_a_damaged_device_are_refused_and_left_as_they_are() {
    let foreign = node_after(|device| {
        let mut bytes = vec![0; 1 << 20];
        Random::new(77).fill(&mut bytes);
        device.set_len(0).unwrap();
        device.set_len(1 << 30).unwrap();
        device.write_all_at(&bytes, 0).unwrap();
    });
    assert!(!foreign.status.success());
    assert!(foreign.err.contains("device"), "{}", foreign.err);
    let truncated = node_after(|device| device.set_len(512 << 20).unwrap());
    assert!(!truncated.status.success());
    assert!(truncated.err.contains("its end is missing"), "{}", truncated.err);
}

#[test]
fn a_port_that_is_taken_is_named() {
    let mut dev = start(&["demo:64M"]);
    let node = dev.pid("node-1");
    let address = process::listening(node)[0];
    let line = dev.kill("node-1");
    // The kernel may still be busy with what the dead process had in flight.
    let taken = wait_for(BOUND, || TcpListener::bind(address).ok()).expect("the port of a dead process becomes free");
    let log = dev.path().join("refusal.log");
    let mut child = process::Guarded::new(line.start(&log).unwrap());
    let status = child.wait(BOUND).expect("a node that can't listen ends by itself");
    assert_eq!(status.code(), Some(7));
    let logs = fs::read_to_string(&log).unwrap() + &fs::read_to_string(dev.path().join("log/node-1.log")).unwrap();
    assert!(logs.contains(&address.to_string()), "{logs}");
    drop(taken);
}

/// What a port scanner, a broken client or an attacker sends.
fn nonsense() -> Vec<(&'static str, Vec<u8>)> {
    let mut random = vec![0; 100_000];
    Random::new(5).fill(&mut random);
    let header = |control: u32, data: u32| {
        let mut bytes = Vec::from(FRAME_MAGIC);
        bytes.extend([FRAME_VERSION, 0x20, 0, 0]);
        bytes.extend(control.to_le_bytes());
        bytes.extend(data.to_le_bytes());
        bytes.resize(FRAME_HEADER_BYTES, 0);
        bytes
    };
    let hello = hello(DeviceId::default(), ClusterId::default()).encode().head.to_vec();
    let mut damaged = hello.clone();
    damaged[70] ^= 0x40;
    vec![
        ("nothing", Vec::new()),
        ("random bytes", random),
        ("zeroes", vec![0; 100_000]),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        (
            "an HTTP/2 preface and nonsense",
            [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &[0xff; 4000]].concat(),
        ),
        ("a frame with 4 GiB of control", header(u32::MAX, 0)),
        ("a frame with 4 GiB of data", header(0, u32::MAX)),
        ("a frame cut short", hello[..80].to_vec()),
        ("a damaged hello", damaged),
        ("a hello of another cluster", hello.clone()),
        ("a hello three times", hello.repeat(3)),
        (
            "an NBD option of 4 GiB",
            [&[0, 0, 0, 3][..], b"IHAVEOPT", &7u32.to_be_bytes(), &[0xff; 4]].concat(),
        ),
        (
            "NBD requests at once",
            [&[0, 0, 0, 3][..], &0x2560_9513u32.to_be_bytes().repeat(5000)].concat(),
        ),
    ]
}

fn hello(device: DeviceId, cluster: ClusterId) -> Envelope {
    let hello = Hello {
        version_min: Hello::VERSION,
        version_max: Hello::VERSION,
        purpose: Purpose::Guest,
        features: features::NONE,
        cluster,
        device,
        recovered: CommitSeq(0),
        commit: CommitSeq(0),
        client: ClientId([9; 16]),
        limits: PeerLimits::default(),
        capability: None,
    };
    Envelope::new(Correlation(1), Message::Hello(hello))
}

#[test]
fn nonsense_on_every_socket_takes_nothing_down() {
    let dev = start(&["demo:64M"]);
    let mut nbd = Nbd::connect(&dev.socket(), "demo").unwrap();
    nbd.write(0, &[6; 65536]);
    let before = running(&dev);
    let mut held = Vec::new();
    for (part, pid) in &before {
        for address in process::listening(*pid) {
            for (what, bytes) in nonsense() {
                let mut stream =
                    TcpStream::connect(address).unwrap_or_else(|error| panic!("{part} {address}: {error}"));
                // The other side may close in the middle: that is an answer too.
                let _ = stream.write_all(&bytes);
                stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
                let _ = stream.read(&mut [0; 4096]);
                assert!(process::is_running(*pid), "{part} died of {what}");
                held.push(stream);
            }
        }
    }
    for (what, bytes) in nonsense() {
        let mut stream = std::os::unix::net::UnixStream::connect(dev.socket()).unwrap();
        let _ = stream.write_all(&bytes);
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let _ = stream.read(&mut [0; 4096]);
        assert!(process::is_running(before["export"]), "the export died of {what}");
    }
    let mut options = nbd::hello(&dev.socket(), ANSWER_BOUND).unwrap();
    nbd::send_option(&mut options, 0xdead, &[1; 1000]).unwrap();
    let (kind, _) = nbd::read_option_reply(&mut options).unwrap();
    assert_eq!(
        kind, 0x8000_0001,
        "an unknown option is unsupported, and the connection goes on"
    );

    // While all those connections still hang there, everything goes on.
    assert!(wait_until(BOUND, || run(&mut dev.cairn(&["status", "--check"]))
        .status
        .success()));
    assert_eq!(nbd.read(0, 65536), [6; 65536]);
    nbd.write(4096, &[7; 4096]);
    assert_eq!(Nbd::connect(&dev.socket(), "demo").unwrap().read(4096, 4096), [7; 4096]);
    assert_eq!(running(&dev), before);
}

/// Reads one frame.
fn read_frame(stream: &mut TcpStream) -> Option<Message> {
    let mut head = vec![0; FRAME_HEADER_BYTES];
    stream.read_exact(&mut head).ok()?;
    let header = FrameHeader::decode(head.first_chunk()?).ok()?;
    let mut rest = vec![0; (header.control_bytes + header.data_bytes) as usize];
    stream.read_exact(&mut rest).ok()?;
    let data = rest.split_off(header.control_bytes as usize);
    head.extend(rest);
    Envelope::decode(&header, &head, data.into())
        .ok()
        .map(|envelope| envelope.message)
}

fn send(stream: &mut TcpStream, envelope: &Envelope) {
    stream.write_all(&envelope.encode().head).unwrap();
}

/// The cluster, and each of its devices with the address where it answers.
fn devices(dev: &Dev) -> (ClusterId, Vec<(DeviceId, String)>) {
    let json = |args: &[&str]| -> serde_json::Value {
        serde_json::from_str(&run(&mut dev.cairn(args)).expect_success().out).unwrap()
    };
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_string();
    let cluster: ClusterId = text(&json(&["status", "--json"])["cluster_id"]).parse().unwrap();
    let nodes = json(&["node", "list", "--json"]);
    let devices = nodes["nodes"].as_array().unwrap().iter().map(|node| {
        let device = &node["devices"][0];
        let id = DeviceId {
            uuid: text(&device["uuid"]).parse().unwrap(),
            incarnation: Incarnation(text(&device["incarnation"]).parse().unwrap()),
        };
        (id, text(&device["addresses"][0]))
    });
    (cluster, devices.collect())
}

/// Connects to a device and says hello; what it answers.
fn greet(address: &str, device: DeviceId, cluster: ClusterId) -> (TcpStream, Option<Message>) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    send(&mut stream, &hello(device, cluster));
    let answer = read_frame(&mut stream);
    (stream, answer)
}

#[test]
fn a_seal_without_a_valid_capability_fences_nobody() {
    let dev = start(&["demo:64M"]);
    let mut nbd = Nbd::connect(&dev.socket(), "demo").unwrap();
    nbd.write(0, &[8; 4096]);
    let (cluster, devices) = devices(&dev);
    assert_eq!(devices.len(), 3);
    for (device, address) in devices {
        let (mut stream, answer) = greet(&address, device, cluster);
        assert!(matches!(answer, Some(Message::Hello(_))), "{answer:?}");
        let generation = Generation::new(1_000_000).unwrap();
        for volume in 0..4 {
            let key = ClusterKey([0x55; 32]);
            let capability = Capability::grant(&key, cluster, VolumeId(volume), generation, Rights::Write);
            let seal = Message::Seal(Seal { capability });
            send(&mut stream, &Envelope::new(Correlation(2 + volume), seal));
            match read_frame(&mut stream) {
                Some(Message::Failed(failed)) => assert_eq!(failed.kind, FailureKind::Unauthorized, "{failed}"),
                other => panic!("{device} answered a forged seal with {other:?}"),
            }
        }
        let (_, answer) = greet(&address, device, ClusterId([7; 16]));
        assert!(
            matches!(&answer, Some(Message::Failed(failed)) if failed.kind == FailureKind::WrongCluster),
            "{answer:?}"
        );
    }
    nbd.write(0, &[9; 4096]);
    assert_eq!(nbd.read(0, 4096), [9; 4096]);
    running(&dev);
}
