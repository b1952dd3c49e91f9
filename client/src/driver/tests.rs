//! The driver with a stand-in for the core: a volume in memory, and whatever a test wants to be done.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command as Process;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes};
use cairn_chaos::live::tools;
use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::frame::FrameHeader;
use cairn_proto::ids::{Correlation, DeviceId, GroupCount, Layer, VolumeId};
use cairn_proto::limits::FRAME_HEADER_BYTES;
use cairn_proto::message::{Empty, Envelope, Message, Purpose};
use cairn_proto::units::ByteSize;

use super::*;
use crate::core::api::{ConnId, MetaError, VolumeDescription, VolumeHandle};
use crate::volume::api::{StatusExtent, VolumeError, VolumeOp, VolumeReply};

const SIZE: usize = 16 << 20;
const BOUND: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Shared {
    /// Everything the core was told, in short.
    told: Vec<String>,
    frames: Vec<(ConnId, Envelope)>,
    actions: VecDeque<Action>,
    handles: BTreeMap<VolumeHandle, VolumeId>,
    content: BTreeMap<VolumeId, Vec<u8>>,
    /// Replies wait until it is lifted.
    hold: bool,
    held: Vec<Action>,
    /// So many operations and no more.
    room: Option<usize>,
    /// Closing takes until it is lifted.
    hold_closing: bool,
    closing: Vec<VolumeHandle>,
    /// No metadata server answers.
    meta_down: bool,
}

impl Shared {
    fn run(&mut self, volume: VolumeHandle, op: VolumeOp) -> Result<VolumeReply, VolumeError> {
        let id = self
            .handles
            .get(&volume)
            .copied()
            .ok_or(VolumeError::Invalid("a volume that is not open"))?;
        let content = self.content.entry(id).or_insert_with(|| vec![0; SIZE]);
        let range = |offset: u64, length: u64| offset as usize..(offset + length) as usize;
        Ok(match op {
            VolumeOp::Read { offset, length } => {
                VolumeReply::Read(vec![Bytes::copy_from_slice(&content[range(offset, length.into())])])
            }
            VolumeOp::Write { offset, data } => {
                content[range(offset, data.len() as u64)].copy_from_slice(&data);
                VolumeReply::Done
            }
            VolumeOp::Discard { offset, length } | VolumeOp::WriteZeroes { offset, length, .. } => {
                content[range(offset, length)].fill(0);
                VolumeReply::Done
            }
            VolumeOp::BlockStatus { length, .. } => VolumeReply::BlockStatus(vec![StatusExtent { length, data: true }]),
            VolumeOp::Flush => VolumeReply::Done,
        })
    }
}

struct TestCore(Arc<Mutex<Shared>>);

impl Core for TestCore {
    fn handle(&mut self, _now: Time, event: Event) {
        let mut shared = self.0.lock().unwrap();
        let told = match event {
            Event::OpenVolume { volume, description } => {
                shared.handles.insert(volume, description.id);
                format!("open {}", description.name)
            }
            Event::CloseVolume { volume } => {
                shared.handles.remove(&volume);
                shared.closing.push(volume);
                "close".to_string()
            }
            Event::Submit { volume, op, request } => {
                let told = match &request {
                    VolumeOp::Write { offset, data } => format!("write {offset}+{}", data.len()),
                    VolumeOp::Read { offset, length } => format!("read {offset}+{length}"),
                    other => format!("{other:?}"),
                };
                let result = shared.run(volume, request);
                shared.held.push(Action::Reply { volume, op, result });
                told
            }
            Event::Connected { conn } => format!("connected {}", conn.0),
            Event::Disconnected { conn, refused } => format!("disconnected {} refused={refused}", conn.0),
            Event::Frame { conn, envelope } => {
                let told = format!("frame {} {}", conn.0, envelope.message.name());
                shared.frames.push((conn, envelope));
                told
            }
            Event::Grown { size, .. } => format!("grown {}", size.0),
            Event::Meta(answer) => format!("meta {}", answer.request.0),
            Event::CareForVolume { description, .. } => format!("care for {}", description.name),
            Event::Advice(advice) => format!("advice on {}", advice.len()),
        };
        shared.told.push(told);
    }

    fn handle_timeout(&mut self, _now: Time) {}

    fn poll_action(&mut self) -> Option<Action> {
        let mut shared = self.0.lock().unwrap();
        if !shared.hold {
            let held = std::mem::take(&mut shared.held);
            shared.actions.extend(held);
        }
        if !shared.hold_closing {
            let closing = std::mem::take(&mut shared.closing);
            shared
                .actions
                .extend(closing.into_iter().map(|volume| Action::Closed { volume }));
        }
        shared.actions.pop_front()
    }

    fn poll_timeout(&self) -> Option<Time> {
        None
    }

    fn has_room(&self, _volume: VolumeHandle) -> bool {
        let shared = self.0.lock().unwrap();
        shared.held.len() < shared.room.unwrap_or(usize::MAX)
    }

    fn device_load(&self) -> DeviceLoad {
        DeviceLoad::default()
    }
}

fn description(name: &str) -> Option<VolumeDescription> {
    let id = match name {
        "disk" => 1,
        "other" => 2,
        _ => return None,
    };
    Some(VolumeDescription {
        id: VolumeId(id),
        name: name.to_string(),
        size: ByteSize(SIZE as u64),
        groups: GroupCount::new(1).unwrap(),
        replicas: 3,
        write_quorum: 2,
        min_copies: 2,
        layer: Layer(0),
        checksum: ChecksumAlgorithm::Crc32,
    })
}

/// A driver with two volumes, a unix socket and a TCP port, and a thread that plays meta.
struct World {
    shared: Arc<Mutex<Shared>>,
    running: Option<Running>,
    port: u16,
    dir: tempfile::TempDir,
}

impl World {
    fn start() -> World {
        World::with(Settings::default())
    }

    fn with(settings: Settings) -> World {
        let dir = tempfile::tempdir().unwrap();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let unix = Listener::bind(&Listen::Unix(dir.path().join("sock"))).unwrap();
        let tcp = Listener::bind(&Listen::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
        let Listen::Tcp(address) = tcp.place().clone() else {
            unreachable!()
        };
        let (running, questions) = start(TestCore(shared.clone()), settings, vec![unix, tcp]).unwrap();
        let meta = shared.clone();
        std::thread::spawn(move || play_meta(questions, &meta));
        let (running, port) = (Some(running), address.port());
        World {
            shared,
            running,
            port,
            dir,
        }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    /// Changes what the core does, and has the driver look.
    fn change(&self, change: impl FnOnce(&mut Shared)) {
        change(&mut self.shared());
        // A command that means nothing.
        let nothing = Command::Resolved {
            conn: ConnId(u64::MAX),
            addresses: Vec::new(),
        };
        self.running.as_ref().unwrap().send(nothing);
    }

    fn act(&self, action: Action) {
        self.change(|shared| shared.actions.push_back(action));
    }

    fn wait_told(&self, what: &str) {
        wait(what, || self.shared().told.iter().any(|told| told == what));
    }

    fn count(&self, what: &str) -> usize {
        self.shared().told.iter().filter(|told| *told == what).count()
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket(), "disk")
    }

    /// Ends the driver on another thread, as the caller has something to do meanwhile.
    fn shut_down(&mut self) -> std::thread::JoinHandle<Result<Ended, Died>> {
        let running = self.running.take().unwrap();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(running.shut_down())
        })
    }
}

fn play_meta(mut questions: Questions, shared: &Mutex<Shared>) {
    while let Some(job) = questions.jobs.blocking_recv() {
        let down = shared.lock().unwrap().meta_down;
        let unreachable = || MetaError::Unreachable("they sleep".to_string());
        let command = match job {
            Job::Describe { ticket, name, .. } => {
                let known = description(&name).ok_or(OpenError::NotFound(name));
                let answer = if down { Err(unreachable().into()) } else { known };
                Command::Described { ticket, answer }
            }
            Job::Catalogue { ticket } => Command::Catalogue {
                ticket,
                answer: if down {
                    Err(unreachable())
                } else {
                    Ok(vec!["disk".to_string(), "other".to_string()])
                },
            },
            Job::Resolve { conn, .. } => Command::Resolved {
                conn,
                addresses: Vec::new(),
            },
            Job::Core(_) | Job::Report(_) => continue,
        };
        questions.mailbox.send(command);
    }
}

#[expect(clippy::disallowed_methods, reason = "a test waits in real time, with a bound")]
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + BOUND;
    while !done() {
        assert!(Instant::now() < end, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A client that speaks simple replies.
struct Client {
    stream: Box<dyn ReadWrite>,
}

trait ReadWrite: Read + Write + Send {}
impl<T: Read + Write + Send> ReadWrite for T {}

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;

impl Client {
    fn connect(socket: &std::path::Path, export: &str) -> Client {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        Client {
            stream: Box::new(stream),
        }
        .go(export)
        .unwrap()
    }

    fn connect_tcp(port: u16) -> Client {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        Client {
            stream: Box::new(stream),
        }
        .go("disk")
        .unwrap()
    }

    /// Chooses an export; the words of the error if it is refused.
    fn go(mut self, export: &str) -> Result<Client, String> {
        self.read(18);
        let mut out = vec![0, 0, 0, 3];
        out.put_slice(b"IHAVEOPT\0\0\0\x07");
        out.put_u32(6 + export.len() as u32);
        out.put_u32(export.len() as u32);
        out.put_slice(export.as_bytes());
        out.put_u16(0);
        self.stream.write_all(&out).unwrap();
        loop {
            let header = self.read(20);
            let (kind, length) = ((&header[12..]).get_u32(), (&header[16..]).get_u32());
            let data = self.read(length as usize);
            match kind {
                1 => return Ok(self),
                3 => {}
                _ => return Err(String::from_utf8(data).unwrap()),
            }
        }
    }

    fn read(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn send(&mut self, command: u16, cookie: u64, offset: u64, length: u32, data: &[u8]) {
        let mut out = Vec::new();
        out.put_u32(0x2560_9513);
        out.put_u16(0);
        out.put_u16(command);
        out.put_u64(cookie);
        out.put_u64(offset);
        out.put_u32(length);
        out.put_slice(data);
        self.stream.write_all(&out).unwrap();
    }

    /// The next reply's error and cookie.
    fn reply(&mut self) -> (u32, u64) {
        let header = self.read(16);
        assert_eq!((&header[..]).get_u32(), 0x6744_6698);
        ((&header[4..]).get_u32(), (&header[8..]).get_u64())
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) {
        self.send(WRITE, 7, offset, data.len() as u32, data);
        assert_eq!(self.reply(), (0, 7));
    }

    fn read_at(&mut self, offset: u64, length: usize) -> Vec<u8> {
        self.send(READ, 8, offset, length as u32, &[]);
        assert_eq!(self.reply(), (0, 8));
        self.read(length)
    }

    /// Whether the other side has closed the connection, having read all of it or not.
    fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0; 1]) {
            Ok(read) => read == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn what_one_connection_writes_another_reads_over_either_kind_of_socket() {
    let world = World::start();
    let (mut unix, mut tcp) = (world.client(), Client::connect_tcp(world.port));
    let data: Vec<u8> = (0..3 << 20).map(|i| (i % 251) as u8).collect();
    unix.write_at(4096, &data);
    assert!(tcp.read_at(4096, data.len()) == data);
    tcp.write_at(512, &[9; 512]);
    assert_eq!(unix.read_at(512, 512), [9; 512]);
    assert_eq!(world.count("open disk"), 1, "one volume for both");
}

#[test]
fn a_volume_is_open_from_the_choice_of_the_export_to_the_last_connections_end() {
    let world = World::start();
    let (mut first, second) = (world.client(), world.client());
    world.wait_told("open disk");
    drop(second);
    first.write_at(0, &[1; 4096]);
    assert_eq!(world.count("close"), 0);
    first.send(DISC, 0, 0, 0, &[]);
    assert!(first.is_closed());
    world.wait_told("close");
    wait("the volume is closed", || world.shared().closing.is_empty());

    // Whoever comes while it is being closed waits until it can be opened again.
    world.change(|shared| shared.hold_closing = true);
    drop(world.client());
    wait("the second close", || world.count("close") == 2);
    let mut early = world.client();
    early.send(READ, 5, 0, 512, &[]);
    let mut other = Client::connect(&world.socket(), "other");
    other.write_at(0, &[2; 512]);
    assert_eq!(world.count("open disk"), 2);
    world.change(|shared| shared.hold_closing = false);
    assert_eq!(early.reply(), (0, 5));
    assert_eq!(early.read(512), [1; 512]);
    assert_eq!(world.count("open disk"), 3);
}

#[test]
fn many_requests_in_flight_are_answered_in_the_volumes_order() {
    let world = World::start();
    let mut client = world.client();
    world.change(|shared| shared.hold = true);
    for cookie in 0..100 {
        client.send(WRITE, cookie, cookie * 4096, 4096, &[cookie as u8; 4096]);
    }
    wait("all are in flight", || world.shared().held.len() == 100);
    world.change(|shared| {
        shared.held.reverse();
        shared.hold = false;
    });
    for cookie in (0..100).rev() {
        assert_eq!(client.reply(), (0, cookie));
    }
    assert_eq!(client.read_at(99 * 4096, 4096), [99; 4096]);
}

#[test]
fn a_volume_without_room_is_given_no_more() {
    let world = World::start();
    let (mut client, mut other) = (world.client(), world.client());
    world.change(|shared| (shared.hold, shared.room) = (true, Some(3)));
    for cookie in 0..50 {
        client.send(WRITE, cookie, cookie * 512, 512, &[cookie as u8; 512]);
    }
    wait("three are in flight", || world.shared().held.len() == 3);
    other.send(FLUSH, 99, 0, 0, &[]);
    world.change(|shared| shared.room = Some(5));
    assert_eq!(world.shared().held.len(), 3, "it waits for a reply");
    world.change(|shared| shared.hold = false);
    for cookie in 0..50 {
        assert_eq!(client.reply(), (0, cookie));
    }
    assert_eq!(other.reply(), (0, 99));
}

#[test]
fn a_client_that_leaves_in_the_middle_leaves_no_trace() {
    let world = World::start();
    world.change(|shared| shared.hold = true);
    let mut gone = world.client();
    gone.send(WRITE, 1, 0, 4096, &[1; 4096]);
    gone.send(WRITE, 2, 0, 8192, &[2; 100]);
    world.wait_told("write 0+4096");
    drop(gone);
    // Its result comes when another connection may have its place.
    let mut next = world.client();
    next.send(FLUSH, 3, 0, 0, &[]);
    wait("the flush", || world.shared().held.len() == 2);
    world.change(|shared| shared.hold = false);
    assert_eq!(next.reply(), (0, 3));
    assert_eq!(next.read_at(0, 512), [1; 512]);
}

#[test]
fn a_client_that_reads_no_answers_is_not_read_any_more() {
    let world = World::start();
    let mut greedy = world.client();
    for cookie in 0..64 {
        greedy.send(READ, cookie, 0, 8 << 20, &[]);
    }
    // 64 MiB of answers are let in, eight of them.
    wait("its first reads", || world.count("read 0+8388608") >= 7);
    let mut other = world.client();
    other.write_at(0, &[3; 4096]);
    assert!(world.count("read 0+8388608") <= 10);
    for _ in 0..64 {
        let (error, _) = greedy.reply();
        assert_eq!(error, 0);
        greedy.read(8 << 20);
    }
}

#[test]
fn unknown_exports_and_sleeping_metadata_servers_are_said_so() {
    let world = World::start();
    let try_go = |export: &str| {
        let stream = Box::new(UnixStream::connect(world.socket()).unwrap());
        Client { stream }.go(export).map(drop)
    };
    assert!(try_go("none").unwrap_err().contains("no such volume"));
    assert!(try_go("").unwrap_err().contains("no such volume"));
    world.change(|shared| shared.meta_down = true);
    assert!(
        try_go("disk")
            .unwrap_err()
            .contains("metadata servers can't be reached: they sleep")
    );

    // One that is open is served all the same.
    world.change(|shared| shared.meta_down = false);
    let _open = world.client();
    world.wait_told("open disk");
    world.change(|shared| shared.meta_down = true);
    try_go("disk").unwrap();
    assert!(try_go("other").is_err());
}

#[test]
fn only_what_is_listed_is_served_and_the_default_needs_no_name() {
    let only = Some(["disk".to_string()].into());
    let default_export = Some("disk".to_string());
    let world = World::with(Settings {
        only,
        default_export,
        read_only: true,
        ..Settings::default()
    });
    let stream = Box::new(UnixStream::connect(world.socket()).unwrap());
    assert!(Client { stream }.go("other").is_err());
    let mut client = Client::connect(&world.socket(), "");
    client.send(WRITE, 1, 0, 512, &[1; 512]);
    assert_eq!(client.reply(), (1, 1), "read-only");
    assert_eq!(client.read_at(0, 512), [0; 512]);
}

#[test]
fn garbage_ends_its_own_connection_only() {
    let world = World::start();
    let mut client = world.client();
    let mut stranger = UnixStream::connect(world.socket()).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stranger.read_to_end(&mut answer).unwrap();
    assert_eq!(answer.len(), 18, "the greeting and no more");
    let mut broken = world.client();
    broken.stream.write_all(&[0x5a; 5000]).unwrap();
    assert!(broken.is_closed());
    client.write_at(0, &[1; 512]);
}

#[test]
fn an_end_in_order_lets_requests_end_and_releases_the_volume() {
    let mut world = World::start();
    let (mut client, mut idle) = (world.client(), world.client());
    world.change(|shared| shared.hold = true);
    client.send(WRITE, 1, 0, 4096, &[6; 4096]);
    world.wait_told("write 0+4096");
    let shared = world.shared.clone();
    let nudge = world.running.as_ref().unwrap().mailbox.clone();
    let ended = world.shut_down();
    assert!(idle.is_closed());
    client.send(WRITE, 2, 4096, 4096, &[6; 4096]);
    shared.lock().unwrap().hold = false;
    nudge.send(Command::Shutdown);
    assert_eq!(client.reply(), (0, 1));
    assert!(client.is_closed(), "what came too late is not answered");
    assert_eq!(
        ended.join().unwrap(),
        Ok(Ended {
            unfinished: 0,
            unreleased: 0
        })
    );
    assert!(shared.lock().unwrap().told.contains(&"close".to_string()));
    assert!(!world.socket().exists(), "the socket's file is gone");
}

fn connect_action(conn: u64, addresses: &[String]) -> Action {
    Action::Connect {
        conn: ConnId(conn),
        device: DeviceId::default(),
        purpose: Purpose::Guest,
        addresses: addresses.to_vec(),
    }
}

fn receive_frame(stream: &mut TcpStream) -> Envelope {
    let mut head = vec![0; FRAME_HEADER_BYTES];
    stream.read_exact(&mut head).unwrap();
    let header = FrameHeader::decode(head.first_chunk().unwrap()).unwrap();
    head.resize(FRAME_HEADER_BYTES + header.control_bytes as usize, 0);
    stream.read_exact(&mut head[FRAME_HEADER_BYTES..]).unwrap();
    let mut data = vec![0; header.data_bytes as usize];
    stream.read_exact(&mut data).unwrap();
    Envelope::decode(&header, &head, data.into()).unwrap()
}

#[test]
fn frames_go_to_every_device_and_come_back() {
    let world = World::start();
    let nodes = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    // An address where nobody listens comes first.
    let dead = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let mut streams = Vec::new();
    for (conn, node) in nodes.iter().enumerate() {
        world.act(connect_action(
            conn as u64,
            &[dead.clone(), node.local_addr().unwrap().to_string()],
        ));
        streams.push(node.accept().unwrap().0);
        world.wait_told(&format!("connected {conn}"));
    }
    let write = super::frames::tests::write(256);
    let to = vec![ConnId(0), ConnId(1)];
    for number in 0..20 {
        let envelope = Envelope::new(Correlation(number), write.clone());
        world.act(Action::Send {
            to: to.clone(),
            envelope,
        });
    }
    for stream in &mut streams {
        for number in 0..20 {
            let envelope = receive_frame(stream);
            assert_eq!(envelope.correlation, Correlation(number));
            assert!(envelope.message == write);
            // Back it goes, frames with data and without in turn.
            let encoded = envelope.encode();
            let pong = Envelope::new(Correlation(number), Message::Pong(Empty)).encode();
            let all = [&[encoded.head][..], &encoded.data, &[pong.head]].concat().concat();
            stream.write_all(&all).unwrap();
        }
    }
    wait("all frames", || world.shared().frames.len() == 80);
    let frames: Vec<_> = world
        .shared()
        .frames
        .iter()
        .filter(|(conn, _)| *conn == ConnId(1))
        .cloned()
        .collect();
    for (index, (_, envelope)) in frames.iter().enumerate() {
        assert_eq!(envelope.correlation, Correlation(index as u64 / 2));
        assert_eq!(envelope.message == write, index % 2 == 0);
    }
    // What the core closes is closed; what the node closes is told.
    world.act(Action::Disconnect { conn: ConnId(0) });
    assert_eq!(streams[0].read(&mut [0; 1]).unwrap(), 0);
    streams.pop();
    world.wait_told("disconnected 1 refused=false");
    // It is reached again, a moment later.
    world.act(connect_action(7, &[nodes[1].local_addr().unwrap().to_string()]));
    world.wait_told("connected 7");
    assert_eq!(world.count("disconnected 0 refused=false"), 0);
}

#[test]
fn a_refused_connection_is_told_at_once_and_garbage_ends_one() {
    let world = World::start();
    let dead = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    world.act(connect_action(1, &[dead]));
    world.wait_told("disconnected 1 refused=true");
    world.act(connect_action(2, &["no-such-host.invalid:1".to_string()]));
    world.wait_told("disconnected 2 refused=true");

    let node = TcpListener::bind("127.0.0.1:0").unwrap();
    world.act(connect_action(3, &[node.local_addr().unwrap().to_string()]));
    let (mut stream, _) = node.accept().unwrap();
    world.wait_told("connected 3");
    stream.write_all(&[0x5a; 100]).unwrap();
    world.wait_told("disconnected 3 refused=false");
}

#[test]
fn the_library_reads_what_it_wrote_and_closes() {
    let mut world = World::start();
    let client = library::Client::from(world.running.take().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        assert_eq!(
            client.open("none").await.unwrap_err(),
            OpenError::NotFound("none".to_string())
        );
        let volume = client.open("disk").await.unwrap();
        assert_eq!(volume.size(), ByteSize(SIZE as u64));
        volume.write(8192, Bytes::from(vec![4; 4096])).await.unwrap();
        volume.flush().await.unwrap();
        assert_eq!(volume.read(8192, 4096).await.unwrap(), vec![4; 4096]);
        volume.discard(8192, 4096).await.unwrap();
        assert_eq!(volume.read(8192, 4096).await.unwrap(), vec![0; 4096]);
        let too_long = Bytes::from(vec![0; 33 << 20]);
        assert!(matches!(volume.write(0, too_long).await, Err(VolumeError::Invalid(_))));
        volume.close().await;
        let again = client.open("disk").await.unwrap();
        drop(again);
        assert_eq!(
            client.shut_down().await,
            Ok(Ended {
                unfinished: 0,
                unreleased: 0
            })
        );
    });
    assert_eq!((world.count("open disk"), world.count("close")), (2, 2));
}

#[test]
fn fio_and_nbdcopy_find_what_they_wrote() {
    if !tools::available(&[("fio", "fio"), ("nbdcopy", "libnbd-bin")]) {
        return;
    }
    let world = World::start();
    let uri = format!("nbd+unix:///disk?socket={}", world.socket().display());
    let run = |program: &str, args: &[&str]| {
        let output = Process::new("timeout")
            .arg("60")
            .arg(program)
            .args(args)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    let aux = format!("--aux-path={}", world.dir.path().display());
    let fio_uri = format!("--uri={uri}");
    run(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            "--rw=randrw",
            "--bsrange=512-256k",
            "--bs_unaligned=0",
            "--blockalign=512",
            "--iodepth=32",
            "--size=16M",
            "--verify=crc32c",
            "--randseed=5",
            &aux,
            &fio_uri,
        ],
    );
    let path = |name: &str| world.dir.path().join(name).display().to_string();
    let image: Vec<u8> = (0..SIZE)
        .map(|i| if i % 50_000 < 20_000 { (i % 249) as u8 } else { 0 })
        .collect();
    std::fs::write(path("in"), &image).unwrap();
    run("nbdcopy", &["--connections=4", &path("in"), &uri]);
    run("nbdcopy", &["--connections=4", &uri, &path("out")]);
    assert!(std::fs::read(path("out")).unwrap() == image);
}
