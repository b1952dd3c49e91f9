//! Strangers at every door: seeded garbage, wrong protocols, oversized and truncated frames, connections that trickle or do
//! nothing, and port scans, at listening TCP and Unix sockets, while the memory of their owners is watched.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::limits::{GARBAGE_ANSWER_BOUND, GARBAGE_BYTES_MAX, GARBAGE_CONNECTIONS_MAX, GARBAGE_SAMPLES_MAX};
use crate::live::{process, stop};
use crate::rng::Rng;

/// How often memory is looked at.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);
/// A trickling connection sends a byte this often.
const TRICKLE_INTERVAL: Duration = Duration::from_millis(200);

/// A listening socket.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Door {
    /// By its address.
    Tcp(SocketAddr),
    /// By its path.
    Unix(PathBuf),
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Door::Tcp(address) => write!(f, "{address}"),
            Door::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl FromStr for Door {
    type Err = String;

    fn from_str(text: &str) -> Result<Door, String> {
        if text.starts_with('/') {
            return Ok(Door::Unix(text.into()));
        }
        let address = text.parse();
        address.map(Door::Tcp).map_err(|_| {
            format!("`{text}` is neither an address, as in 127.0.0.1:7402, nor the absolute path of a socket")
        })
    }
}

/// What a stranger does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Manner {
    /// Connects and goes away at once.
    Scan,
    /// Random bytes.
    Garbage,
    /// Random bytes without end, as long as they are taken.
    Flood,
    /// The beginning of another protocol: HTTP, TLS, SSH, an NBD client's words, HTTP/2.
    OtherProtocol,
    /// Headers that announce far more than comes, in both byte orders.
    Oversized,
    /// The right beginning of a protocol of Cairn's, and then garbage or nothing.
    Truncated,
    /// One byte now and then.
    Trickle,
    /// Nothing, for as long as it is let.
    Silent,
    /// Sends, reads nothing, and half-closes.
    HalfClose,
}

impl Manner {
    /// All of them.
    pub const ALL: [Manner; 9] = [
        Manner::Scan,
        Manner::Garbage,
        Manner::Flood,
        Manner::OtherProtocol,
        Manner::Oversized,
        Manner::Truncated,
        Manner::Trickle,
        Manner::Silent,
        Manner::HalfClose,
    ];
}

impl fmt::Display for Manner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Manner::Scan => "scan",
            Manner::Garbage => "garbage",
            Manner::Flood => "flood",
            Manner::OtherProtocol => "other-protocol",
            Manner::Oversized => "oversized",
            Manner::Truncated => "truncated",
            Manner::Trickle => "trickle",
            Manner::Silent => "silent",
            Manner::HalfClose => "half-close",
        })
    }
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where.
    pub doors: Vec<Door>,
    /// Processes whose resident memory is watched.
    pub pids: Vec<i32>,
    /// For how long.
    pub span: Duration,
    /// Chooses everything.
    pub seed: u64,
    /// Connections kept open at a time that trickle or say nothing, for all doors together.
    pub lingering: usize,
    /// Beginnings of the protocols that the doors speak, to be broken off or followed by nonsense: a valid message, for instance.
    pub beginnings: Vec<Vec<u8>>,
}

/// What one process's memory did meanwhile.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Memory {
    /// Its process id.
    pub pid: i32,
    /// Bytes before.
    pub before: u64,
    /// Bytes over time, twice a second at first, evenly thinned out when there are many.
    pub samples: Vec<u64>,
    /// Bytes when all strangers had gone; `None` when it had ended, which no stranger may bring about.
    pub after: Option<u64>,
}

impl Memory {
    /// The most it had at any look.
    pub fn most(&self) -> u64 {
        self.samples
            .iter()
            .copied()
            .chain([self.before])
            .chain(self.after)
            .max()
            .unwrap_or(0)
    }

    /// The most of the last half against the most of the first half of the time: what grows without end is
    /// well above zero, what is bounded is not.
    pub fn late_growth(&self) -> u64 {
        let (early, late) = self.samples.split_at(self.samples.len() / 2);
        let most = |samples: &[u64]| samples.iter().copied().max().unwrap_or(0);
        most(late).saturating_sub(most(early))
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Connections by manner.
    pub connections: BTreeMap<Manner, u64>,
    /// Bytes that were taken.
    pub bytes_sent: u64,
    /// Bytes that came back.
    pub bytes_received: u64,
    /// Connections that failed at once, by door.
    pub refused: BTreeMap<Door, u64>,
    /// The memory of each process.
    pub memory: Vec<Memory>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (manner, count) in &self.connections {
            writeln!(f, "{manner:<15} {count:>8} connections")?;
        }
        writeln!(f, "{} bytes sent, {} received", self.bytes_sent, self.bytes_received)?;
        for (door, count) in &self.refused {
            writeln!(f, "{count} connections refused at {door}")?;
        }
        for memory in &self.memory {
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            let after = memory
                .after
                .map_or("ended".to_string(), |after| format!("{:.1} MiB", mib(after)));
            writeln!(
                f,
                "process {}: {:.1} MiB before, {:.1} MiB at the most, {after} after; late growth {:.1} MiB",
                memory.pid,
                mib(memory.before),
                mib(memory.most()),
                mib(memory.late_growth())
            )?;
        }
        Ok(())
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn connect(door: &Door) -> io::Result<Stream> {
        let stream = match door {
            Door::Tcp(address) => Stream::Tcp(TcpStream::connect_timeout(address, GARBAGE_ANSWER_BOUND)?),
            Door::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
        };
        let bound = Some(GARBAGE_ANSWER_BOUND);
        match &stream {
            Stream::Tcp(tcp) => tcp.set_read_timeout(bound).and(tcp.set_write_timeout(bound)),
            Stream::Unix(unix) => unix.set_read_timeout(bound).and(unix.set_write_timeout(bound)),
        }?;
        Ok(stream)
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(tcp) => tcp.set_nonblocking(true),
            Stream::Unix(unix) => unix.set_nonblocking(true),
        }
    }

    fn half_close(&self) -> io::Result<()> {
        let how = std::net::Shutdown::Write;
        match self {
            Stream::Tcp(tcp) => tcp.shutdown(how),
            Stream::Unix(unix) => unix.shutdown(how),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(tcp) => tcp.read(into),
            Stream::Unix(unix) => unix.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(tcp) => tcp.write(from),
            Stream::Unix(unix) => unix.write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection that trickles or says nothing.
struct Lingering {
    stream: Stream,
    trickles: bool,
    next: Instant,
    until: Instant,
}

struct Run<'a> {
    plan: &'a Plan,
    rng: Rng,
    lingering: Vec<Lingering>,
    visits: usize,
    outcome: Outcome,
}

/// Annoys the doors for as long as planned, in each manner at least once, then goes away and lets the processes come to rest for a moment.
pub fn run(plan: &Plan) -> Outcome {
    let resident = |pid: &i32| process::resident(*pid).map(|resident| resident.now);
    let memory = plan.pids.iter().map(|pid| Memory {
        pid: *pid,
        before: resident(pid).unwrap_or(0),
        samples: Vec::new(),
        after: None,
    });
    let mut run = Run {
        plan,
        rng: Rng::stream(plan.seed, "garbage"),
        lingering: Vec::new(),
        visits: 0,
        outcome: Outcome {
            connections: BTreeMap::new(),
            bytes_sent: 0,
            bytes_received: 0,
            refused: BTreeMap::new(),
            memory: memory.collect(),
        },
    };
    let end = Instant::now() + plan.span;
    let mut next_sample = Instant::now();
    let mut interval = SAMPLE_INTERVAL;
    let is_over = |visits: usize| {
        let has_ended = Instant::now() >= end && visits >= Manner::ALL.len();
        has_ended || plan.doors.is_empty() || stop::asked().is_some()
    };
    while !is_over(run.visits) {
        run.visit();
        run.linger();
        if Instant::now() >= next_sample {
            next_sample = Instant::now() + interval;
            interval = run.sample(interval);
        }
    }
    run.lingering.clear();
    // Those who are left alone give back what they held for strangers.
    std::thread::sleep(SAMPLE_INTERVAL);
    for memory in &mut run.outcome.memory {
        memory.after = resident(&memory.pid);
    }
    run.outcome
}

impl Run<'_> {
    /// Looks at the memory; gives when the next look is due.
    fn sample(&mut self, interval: Duration) -> Duration {
        let mut many = false;
        for memory in &mut self.outcome.memory {
            if let Some(resident) = process::resident(memory.pid) {
                memory.samples.push(resident.now);
            }
            many |= memory.samples.len() >= GARBAGE_SAMPLES_MAX;
        }
        if !many {
            return interval;
        }
        for memory in &mut self.outcome.memory {
            let mut odd = false;
            memory.samples.retain(|_| {
                odd = !odd;
                odd
            });
        }
        interval * 2
    }

    fn visit(&mut self) {
        let door = self.rng.pick(&self.plan.doors).clone();
        let manner = Manner::ALL[self.visits % Manner::ALL.len()];
        self.visits += 1;
        let stream = match Stream::connect(&door) {
            Ok(stream) => stream,
            Err(_) => {
                *self.outcome.refused.entry(door).or_default() += 1;
                return;
            }
        };
        *self.outcome.connections.entry(manner).or_default() += 1;
        // That the other end hangs up on a stranger is as it should be.
        let _ = self.behave(stream, manner);
    }

    fn behave(&mut self, mut stream: Stream, manner: Manner) -> io::Result<()> {
        match manner {
            Manner::Scan => {}
            Manner::Garbage => {
                let length = self.rng.within(1, 4096) as usize;
                self.send(&mut stream, length)?;
                self.hear(&mut stream)?;
            }
            Manner::Flood => {
                let mut left = GARBAGE_BYTES_MAX;
                while left > 0 {
                    let portion = left.min(64 << 10);
                    self.send(&mut stream, portion)?;
                    left -= portion;
                }
            }
            Manner::OtherProtocol => {
                let words: [&[u8]; 6] = [
                    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                    b"SSH-2.0-OpenSSH_9.2p1\r\n",
                    b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07\xff\xff\xff\xff",
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
                    b"EHLO stranger\r\n",
                ];
                let words = *self.rng.pick(&words);
                self.put(&mut stream, words)?;
                self.hear(&mut stream)?;
            }
            Manner::Oversized => {
                let huge = *self
                    .rng
                    .pick(&[u64::MAX, u64::from(u32::MAX), 1 << 31, 1 << 40, 1 << 24]);
                let mut header = Vec::new();
                for _ in 0..self.rng.within(1, 8) {
                    match self.rng.below(4) {
                        0 => header.extend(huge.to_le_bytes()),
                        1 => header.extend(huge.to_be_bytes()),
                        2 => header.extend((huge as u32).to_le_bytes()),
                        _ => header.extend((huge as u32).to_be_bytes()),
                    }
                }
                let beginning = self.beginning();
                self.put(&mut stream, &[beginning, header].concat())?;
                let length = self.rng.within(1, 64 << 10) as usize;
                self.send(&mut stream, length)?;
                self.hear(&mut stream)?;
            }
            Manner::Truncated => {
                let mut beginning = self.beginning();
                beginning.truncate(self.rng.below(beginning.len() as u64 + 1) as usize);
                self.put(&mut stream, &beginning)?;
                if self.rng.chance(1, 2) {
                    self.send(&mut stream, 256)?;
                    self.hear(&mut stream)?;
                }
            }
            Manner::Trickle | Manner::Silent => self.leave(stream, manner == Manner::Trickle)?,
            Manner::HalfClose => {
                self.send(&mut stream, 64)?;
                stream.half_close()?;
                self.hear(&mut stream)?;
            }
        }
        Ok(())
    }

    fn beginning(&mut self) -> Vec<u8> {
        if self.plan.beginnings.is_empty() {
            return Vec::new();
        }
        self.rng.pick(&self.plan.beginnings).clone()
    }

    fn send(&mut self, stream: &mut Stream, length: usize) -> io::Result<()> {
        let mut bytes = vec![0; length];
        for chunk in bytes.chunks_mut(8) {
            let word = self.rng.word().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
        self.put(stream, &bytes)
    }

    fn put(&mut self, stream: &mut Stream, bytes: &[u8]) -> io::Result<()> {
        stream.write_all(bytes)?;
        self.outcome.bytes_sent += bytes.len() as u64;
        Ok(())
    }

    /// One look at what comes back, for a short while.
    fn hear(&mut self, stream: &mut Stream) -> io::Result<()> {
        let read = stream.read(&mut [0; 4096])?;
        self.outcome.bytes_received += read as u64;
        Ok(())
    }

    /// Keeps the connection among those that linger; the oldest goes when there are too many.
    fn leave(&mut self, stream: Stream, trickles: bool) -> io::Result<()> {
        stream.set_nonblocking()?;
        let now = Instant::now();
        let span = self.rng.span(Duration::from_secs(1), Duration::from_secs(60));
        self.lingering.push(Lingering {
            stream,
            trickles,
            next: now,
            until: now + span,
        });
        let most = self.plan.lingering.min(GARBAGE_CONNECTIONS_MAX);
        if self.lingering.len() > most {
            self.lingering.remove(0);
        }
        Ok(())
    }

    fn linger(&mut self) {
        let now = Instant::now();
        let (rng, sent) = (&mut self.rng, &mut self.outcome.bytes_sent);
        self.lingering.retain_mut(|one| {
            if now >= one.until {
                return false;
            }
            if !one.trickles || now < one.next {
                return true;
            }
            one.next = now + TRICKLE_INTERVAL;
            match one.stream.write(&[rng.word() as u8]) {
                Ok(written) => {
                    *sent += written as u64;
                    true
                }
                Err(error) => error.kind() == io::ErrorKind::WouldBlock,
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Takes connections, and hears each out for a short while; or keeps everything that it hears.
    fn doors(dir: &std::path::Path, heard: &'static AtomicU64) -> Vec<Door> {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let unix = UnixListener::bind(dir.join("door")).unwrap();
        let doors = vec![Door::Tcp(tcp.local_addr().unwrap()), Door::Unix(dir.join("door"))];
        fn hear(mut stream: impl Read, heard: &AtomicU64) {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = stream.read(&mut bytes) {
                heard.fetch_add(read as u64, Ordering::Relaxed);
            }
        }
        std::thread::spawn(move || {
            for stream in tcp.incoming().flatten() {
                stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
                std::thread::spawn(move || hear(stream, heard));
            }
        });
        std::thread::spawn(move || {
            for stream in unix.incoming().flatten() {
                stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
                std::thread::spawn(move || hear(stream, heard));
            }
        });
        doors
    }

    #[test]
    fn every_manner_is_shown_at_tcp_and_unix_sockets_and_memory_is_watched() {
        static HEARD: AtomicU64 = AtomicU64::new(0);
        let dir = tempfile::tempdir().unwrap();
        let mut plan = Plan {
            doors: doors(dir.path(), &HEARD),
            pids: vec![std::process::id() as i32],
            span: Duration::from_millis(1500),
            seed: 1,
            lingering: 8,
            beginnings: vec![b"CAIRN".to_vec()],
        };
        let outcome = run(&plan);
        assert_eq!(outcome.connections.len(), Manner::ALL.len(), "{outcome}");
        assert!(HEARD.load(Ordering::Relaxed) > 100_000, "{outcome}");
        assert!(outcome.refused.is_empty(), "{outcome}");
        let memory = &outcome.memory[0];
        assert!(memory.before > 0 && memory.after.is_some() && !memory.samples.is_empty());
        // A door that is not there is said, not hidden.
        plan.doors = vec![Door::Unix(dir.path().join("nowhere"))];
        plan.span = Duration::from_millis(50);
        let refused = run(&plan).refused;
        assert!(refused[&plan.doors[0]] > 0);
    }

    #[test]
    fn growth_that_does_not_end_shows_and_a_plateau_does_not() {
        let memory = |samples: Vec<u64>| Memory {
            pid: 1,
            before: 10,
            samples,
            after: Some(10),
        };
        assert_eq!(memory((0..100).collect()).late_growth(), 50);
        assert_eq!(memory(vec![10, 50, 50, 50, 50, 50]).late_growth(), 0);
        assert_eq!(memory(vec![10, 50, 50, 50, 20]).most(), 50);
    }

    #[test]
    fn doors_are_read_as_they_are_written() {
        for text in ["127.0.0.1:7402", "/run/x.sock", "[::1]:80"] {
            assert_eq!(text.parse::<Door>().unwrap().to_string(), text);
        }
        assert!("localhost".parse::<Door>().unwrap_err().contains("neither"));
    }
}
