//! Everything that does not belong on a socket, on every socket that the cluster listens on, while guests work: garbage,
//! the beginning of something, headers that promise more than is allowed, connections that say nothing or very little.
//! Memory of every process is watched, and nobody may notice.

use std::io::{self, Read as _, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::cluster::Part;
use super::process;
use super::report::{Failure, FailureKind};
use super::run::Run;
use crate::rng::Rng;

/// How long one injection lasts.
const SPAN: Duration = Duration::from_secs(8);
/// How much the resident memory of a process may grow meanwhile: what its own load needs, caches too, and some for
/// connections with bounded buffers.
const GROWTH_MAX: u64 = 96 << 20;
/// Silent or slow connections that are held open to each socket.
const HELD: usize = 24;
/// Connections that are made to each socket one after another, by each thread.
const THREADS: u64 = 2;
const CONNECT_BOUND: Duration = Duration::from_secs(1);
const IO_BOUND: Duration = Duration::from_millis(50);
/// Bytes of one message of garbage at the most.
const GARBAGE_MAX: u64 = 64 << 10;

#[derive(Clone, Debug)]
enum Socket {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

trait Stream: io::Read + Write + Send {}
impl Stream for TcpStream {}
impl Stream for UnixStream {}

impl Socket {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Socket::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, CONNECT_BOUND)?;
                stream.set_read_timeout(Some(IO_BOUND))?;
                stream.set_write_timeout(Some(IO_BOUND))?;
                Ok(Box::new(stream))
            }
            Socket::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(IO_BOUND))?;
                stream.set_write_timeout(Some(IO_BOUND))?;
                Ok(Box::new(stream))
            }
        }
    }
}

/// Sends what does not belong there to a socket, once. What is answered, and whether, is of no interest.
fn attack(socket: &Socket, rng: &mut Rng) -> io::Result<()> {
    let mut stream = socket.connect()?;
    let mut bytes: Vec<u8> = Vec::new();
    let prefixes: [&[u8]; 6] = [
        b"",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0\0\0\x03IHAVEOPT",
        b"SSH-2.0-scan\r\n",
    ];
    bytes.extend(*rng.pick(&prefixes));
    match rng.below(5) {
        // Nothing more: a scan of ports.
        0 => {}
        // The same octet over and over: lengths become as large as they can.
        1 => bytes.resize(rng.within(1, GARBAGE_MAX) as usize, *rng.pick(&[0, 0xff, 0x7f, 1])),
        // As much as is taken.
        2 => {
            for _ in 0..256 {
                let chunk: Vec<u8> = (0..2048).flat_map(|_| rng.word().to_le_bytes()).collect();
                stream.write_all(&chunk)?;
            }
        }
        _ => {
            let words = rng.within(1, GARBAGE_MAX / 8);
            bytes.extend((0..words).flat_map(|_| rng.word().to_le_bytes()));
        }
    }
    stream.write_all(&bytes)?;
    if rng.permille(500) {
        let mut answer = [0; 4096];
        let _ = stream.read(&mut answer)?;
    }
    Ok(())
}

/// Connections that are held open; each says an octet now and then, or nothing.
fn hold(sockets: &[Socket], stop: &AtomicBool, rng: &mut Rng) {
    let mut held: Vec<Box<dyn Stream>> = sockets
        .iter()
        .flat_map(|socket| (0..HELD).filter_map(|_| socket.connect().ok()))
        .collect();
    while !stop.load(Ordering::Acquire) {
        for stream in &mut held {
            if rng.permille(300) {
                // It may be refused by now, which is right.
                let _ = stream.write_all(&[rng.word() as u8]);
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// All sockets on which the processes of the cluster listen.
fn sockets(run: &Run) -> Vec<Socket> {
    let running = run.cluster.running();
    let tcp = running
        .iter()
        .flat_map(|part| process::listening(run.cluster.pid(*part)));
    let exports = running.iter().filter_map(|part| match part {
        Part::Export(k) => Some(Socket::Unix(run.cluster.socket(*k))),
        _ => None,
    });
    tcp.map(Socket::Tcp).chain(exports).collect()
}

/// The step.
pub(super) fn foreign(run: &mut Run) -> Result<(), Failure> {
    run.load(Duration::from_secs(1))?;
    let sockets = sockets(run);
    let running = run.cluster.running();
    let memory = |run: &Run, part: &Part| process::resident(run.cluster.pid(*part)).map_or(0, |resident| resident.now);
    let before: Vec<u64> = running.iter().map(|part| memory(run, part)).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let sent = Arc::new(AtomicU64::new(0));
    let seed = run.rng.word();
    let mut threads = Vec::new();
    for k in 0..THREADS {
        let (sockets, stop, sent) = (sockets.clone(), Arc::clone(&stop), Arc::clone(&sent));
        threads.push(std::thread::spawn(move || {
            let mut rng = Rng::new(seed + k);
            while !stop.load(Ordering::Acquire) {
                let socket = rng.index(sockets.len());
                // Refusals, resets and full buffers are all as they should be.
                let _ = attack(&sockets[socket], &mut rng);
                sent.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        }));
    }
    let (held_sockets, held_stop) = (sockets.clone(), Arc::clone(&stop));
    threads.push(std::thread::spawn(move || {
        hold(&held_sockets, &held_stop, &mut Rng::new(!seed))
    }));
    let result = watch_memory(run, &running, &before);
    stop.store(true, Ordering::Release);
    for thread in threads {
        // It ends by the flag; a panic was printed.
        let _ = thread.join();
    }
    run.timeline.note(format!(
        "{} foreign connections to {} sockets",
        sent.load(Ordering::Relaxed),
        sockets.len()
    ));
    result
}

fn watch_memory(run: &mut Run, running: &[Part], before: &[u64]) -> Result<(), Failure> {
    let end = Instant::now() + SPAN;
    let mut grown = vec![0; running.len()];
    while Instant::now() < end {
        run.load(Duration::from_millis(200))?;
        for ((part, before), grown) in running.iter().zip(before).zip(&mut grown) {
            let now = process::resident(run.cluster.pid(*part)).map_or(0, |resident| resident.now);
            *grown = now.saturating_sub(*before).max(*grown);
            if *grown > GROWTH_MAX {
                let words = format!("{part} had {before} bytes in memory and has {now} with foreign connections");
                return Err(Failure::new(FailureKind::Memory, words));
            }
        }
    }
    let most = running.iter().zip(&grown).max_by_key(|(_, grown)| **grown);
    if let Some((part, grown)) = most {
        run.timeline
            .note(format!("memory grew most in {part}: by {} KiB", grown >> 10));
    }
    Ok(())
}
