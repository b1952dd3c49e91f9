use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::super::control::{self, Control};
use super::*;
use crate::live::wait::wait_until;

/// Longer than anything here takes on the busiest machine.
const BOUND: Duration = Duration::from_secs(30);
/// For so long nothing must arrive where nothing may.
const QUIET: Duration = Duration::from_millis(150);

/// Sends back what it is sent, on any number of connections, until each ends.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..read]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

fn proxy_to(target: SocketAddr) -> Proxy {
    Proxy::start("127.0.0.1:0".parse().unwrap(), target, 1).unwrap()
}

fn connect(proxy: &Proxy) -> TcpStream {
    let stream = TcpStream::connect(proxy.address()).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    stream
}

fn turn(stream: &mut TcpStream, word: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(word)?;
    let mut answer = vec![0; word.len()];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

/// Nothing comes for a while, and no end either.
fn is_quiet(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(QUIET)).unwrap();
    let read = stream.read(&mut [0; 1]);
    stream.set_read_timeout(Some(BOUND)).unwrap();
    matches!(read, Err(error) if error.kind() == ErrorKind::WouldBlock)
}

fn is_reset(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    matches!(stream.read_to_end(&mut rest), Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn without_a_fault_bytes_and_ends_go_through_unchanged() {
    let proxy = proxy_to(echo());
    let mut stream = connect(&proxy);
    let sent: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let mut other = stream.try_clone().unwrap();
    let copy = sent.clone();
    let writer = thread::spawn(move || {
        other.write_all(&copy).unwrap();
        other.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    writer.join().unwrap();
    assert!(received == sent, "{} bytes came back of {}", received.len(), sent.len());
    assert!(wait_until(BOUND, || proxy.counters().open == 0));
    let counters = proxy.counters();
    assert_eq!(
        (counters.accepted, counters.to_target, counters.to_client),
        (1, 3_000_000, 3_000_000)
    );
    assert_eq!((counters.corrupted, counters.delayed, counters.resets), (0, 0, 0));
}

#[test]
fn delayed_bytes_come_late_in_order_and_complete() {
    let proxy = proxy_to(echo());
    let mut stream = connect(&proxy);
    assert_eq!(turn(&mut stream, b"quick").unwrap(), b"quick");
    let fixed = Duration::from_millis(60);
    let jitter = Duration::from_millis(40);
    proxy.set(Fault::Delay { fixed, jitter }).unwrap();
    let start = Instant::now();
    let mut received = Vec::new();
    for word in 0..20u8 {
        stream.write_all(&[word; 10]).unwrap();
    }
    while received.len() < 200 {
        let mut bytes = [0; 200];
        let read = stream.read(&mut bytes).unwrap();
        received.extend_from_slice(&bytes[..read]);
    }
    assert!(
        start.elapsed() >= fixed * 2,
        "both ways are delayed: {:?}",
        start.elapsed()
    );
    assert!(received.is_sorted(), "{received:?}");
    assert!(proxy.counters().delayed >= 400);
}

#[test]
fn a_bandwidth_is_not_exceeded() {
    let proxy = proxy_to(echo());
    let mut stream = connect(&proxy);
    proxy.set(Fault::Bandwidth { bytes_per_s: 100_000 }).unwrap();
    let start = Instant::now();
    turn(&mut stream, &[7; 20_000]).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(190), "{:?}", start.elapsed());
}

#[test]
fn dropped_connections_are_reset_and_new_ones_work() {
    let proxy = proxy_to(echo());
    let mut stream = connect(&proxy);
    turn(&mut stream, b"x").unwrap();
    proxy.set(Fault::Drop).unwrap();
    assert!(is_reset(&mut stream));
    assert_eq!(proxy.counters().dropped, 1);
    assert_eq!(turn(&mut connect(&proxy), b"again").unwrap(), b"again");
}

#[test]
fn a_half_open_connection_stays_silent_after_healing_too() {
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    target.set_nonblocking(true).unwrap();
    let proxy = proxy_to(target.local_addr().unwrap());
    proxy.set(Fault::HalfOpen).unwrap();
    let mut stream = connect(&proxy);
    stream.write_all(b"anybody there?").unwrap();
    assert!(is_quiet(&mut stream));
    proxy.heal().unwrap();
    assert!(is_quiet(&mut stream));
    assert_eq!(proxy.counters().half_open, 1);
    assert_eq!(
        target.accept().unwrap_err().kind(),
        ErrorKind::WouldBlock,
        "the target was never asked"
    );
    drop(stream);
    assert!(
        wait_until(BOUND, || proxy.counters().open == 0),
        "and it is not kept when its client has gone"
    );
}

#[test]
fn what_a_black_hole_swallowed_arrives_when_it_is_healed() {
    let proxy = proxy_to(echo());
    let mut old = connect(&proxy);
    turn(&mut old, b"x").unwrap();
    proxy.set(Fault::BlackHole).unwrap();
    let mut new = connect(&proxy);
    old.write_all(b"old").unwrap();
    new.write_all(b"new").unwrap();
    assert!(is_quiet(&mut old) && is_quiet(&mut new));
    proxy.heal().unwrap();
    let mut answer = [0; 3];
    old.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"old");
    new.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"new");
}

#[test]
fn a_silenced_connection_is_never_heard_of_again_and_new_ones_work() {
    let proxy = proxy_to(echo());
    let mut old = connect(&proxy);
    turn(&mut old, b"x").unwrap();
    proxy.set(Fault::Silence).unwrap();
    assert_eq!(turn(&mut connect(&proxy), b"new").unwrap(), b"new");
    old.write_all(b"old").unwrap();
    proxy.heal().unwrap();
    assert!(is_quiet(&mut old));
    assert_eq!(proxy.counters().silenced, 1);
}

#[test]
fn one_way_lets_only_that_direction_through() {
    for (only, arrives) in [(Direction::ToTarget, 1), (Direction::ToClient, 0)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = proxy_to(listener.local_addr().unwrap());
        let mut client = connect(&proxy);
        let (mut server, _) = listener.accept().unwrap();
        proxy.set(Fault::OneWay(only)).unwrap();
        client.write_all(b"c").unwrap();
        server.write_all(b"s").unwrap();
        let (open, cut) = if arrives == 1 {
            (&mut server, &mut client)
        } else {
            (&mut client, &mut server)
        };
        open.read_exact(&mut [0]).unwrap();
        assert!(is_quiet(cut), "{only:?}");
        proxy.heal().unwrap();
        cut.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn a_connection_is_reset_after_exactly_so_many_bytes() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = proxy_to(listener.local_addr().unwrap());
    let mut client = connect(&proxy);
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(BOUND)).unwrap();
    client.write_all(b"whole frame").unwrap();
    server.read_exact(&mut [0; 11]).unwrap();
    proxy.set(Fault::ResetAfter { bytes: 5 }).unwrap();
    client.write_all(b"torn frame").unwrap();
    let mut received = Vec::new();
    let end = server.read_to_end(&mut received);
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(received, b"torn ");
    assert!(is_reset(&mut client));
    assert_eq!(proxy.counters().resets, 1);
}

#[test]
fn bits_are_flipped_about_as_often_as_was_asked_for_and_by_the_seed() {
    let run = |seed| {
        let proxy = Proxy::start("127.0.0.1:0".parse().unwrap(), echo(), seed).unwrap();
        proxy.set(Fault::Corrupt { one_in: 100 }).unwrap();
        let mut stream = connect(&proxy);
        // One turn after the other: the stream of randomness serves both directions.
        let answers: Vec<Vec<u8>> = (0..40).map(|_| turn(&mut stream, &[0; 500]).unwrap()).collect();
        let flipped: u32 = answers.iter().flatten().map(|byte| byte.count_ones()).sum();
        (answers, flipped, proxy.counters().corrupted)
    };
    let (answers, flipped, counted) = run(7);
    // 40,000 bytes both ways: 400 on average. Two flips of one bit would undo each other.
    assert!((250..=600).contains(&counted), "{counted}");
    assert!(
        u64::from(flipped) <= counted && u64::from(flipped) + 20 > counted,
        "{flipped} of {counted}"
    );
    assert!(answers != run(8).0);
}

#[test]
fn refused_connections_fail_at_once_and_established_ones_go_on() {
    let proxy = proxy_to(echo());
    let mut stream = connect(&proxy);
    turn(&mut stream, b"x").unwrap();
    for _ in 0..3 {
        proxy.set(Fault::Refuse).unwrap();
        let refused = TcpStream::connect(proxy.address()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(turn(&mut stream, b"old").unwrap(), b"old");
        proxy.heal().unwrap();
        assert_eq!(turn(&mut connect(&proxy), b"new").unwrap(), b"new");
    }
}

#[test]
fn a_target_that_does_not_listen_is_a_reset_for_the_client() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let proxy = proxy_to(nobody);
    assert!(is_reset(&mut connect(&proxy)));
    assert_eq!(proxy.counters().unreachable, 1);
}

#[test]
fn a_slow_reader_holds_its_writer_back() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = proxy_to(listener.local_addr().unwrap());
    let mut client = connect(&proxy);
    let (_server, _) = listener.accept().unwrap();
    client.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut taken = 0;
    // The server reads nothing: what is taken is what lies in the kernel's buffers and in the proxy.
    while let Ok(written) = client.write(&[1; 1 << 20]) {
        taken += written;
        assert!(taken < 256 << 20, "nothing holds the writer back");
    }
    assert!(taken > 0);
}

#[test]
fn it_obeys_commands_over_a_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let proxy = Arc::new(proxy_to(echo()));
    let behind = Arc::clone(&proxy);
    let _control = Control::serve(&path, Arc::new(move |line: &str| behind.obey(line))).unwrap();
    control::ask(&path, "refuse").unwrap();
    assert!(TcpStream::connect(proxy.address()).is_err());
    control::ask(&path, "heal").unwrap();
    let mut stream = connect(&proxy);
    turn(&mut stream, b"x").unwrap();
    let status = control::ask(&path, "status").unwrap();
    assert!(status.starts_with("accepted 1 open 1 "), "{status}");
    let error = control::ask(&path, "explode").unwrap_err().to_string();
    assert!(error.contains("no fault is called `explode`"), "{error}");
}
