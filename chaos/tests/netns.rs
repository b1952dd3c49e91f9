//! Real processes in network namespaces, and ways between them that are cut.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "this test watches real processes in real time, and a panic is how a test fails"
)]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use cairn_chaos::live::inject::netns::{self, Namespace, Network};
use cairn_chaos::live::process::Guarded;
use cairn_chaos::live::tools;

/// Longer than TCP takes to send again after a cut of a second.
const BOUND: Duration = Duration::from_secs(30);
/// For so long nothing must arrive where nothing may.
const QUIET: Duration = Duration::from_millis(700);

/// Sends back what it is sent, on every connection.
fn echo(network: &Network) -> u16 {
    let listener = TcpListener::bind((network.gateway(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut bytes = [0; 512];
                while let Ok(read @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..read]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

/// A shell in a namespace with an open connection: lines in are sent, lines out were received.
struct Talker {
    child: Guarded,
    lines: Receiver<String>,
}

impl Talker {
    fn start(network: &Network, namespace: Namespace, to: &str, port: u16) -> Talker {
        let script = format!(
            "exec 3<>/dev/tcp/{to}/{port}; echo open; cat <&3 & while read -r line; do echo \"$line\" >&3; done"
        );
        let mut command = network.command(namespace, "bash");
        command
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = Guarded::new(command.spawn().unwrap());
        let stdout = child.child().stdout.take().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let talker = Talker { child, lines };
        assert_eq!(talker.hear(BOUND).as_deref(), Some("open"));
        talker
    }

    fn say(&mut self, word: &str) {
        let stdin = self.child.child().stdin.as_mut().unwrap();
        writeln!(stdin, "{word}").unwrap();
    }

    fn hear(&self, bound: Duration) -> Option<String> {
        match self.lines.recv_timeout(bound) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the connection has ended"),
        }
    }
}

#[test]
fn ways_between_namespaces_are_cut_in_silence_and_opened_again() {
    if !netns::available() || !tools::available(&[("bash", "bash")]) {
        return;
    }
    let mut network = Network::new().unwrap();
    let (one, other) = (network.join().unwrap(), network.join().unwrap());
    let port = echo(&network);
    // In the other namespace a proxy listens, so that there is a way from the one to the other.
    let address = network.address(other).to_string();
    let dir = tempfile::tempdir().unwrap();
    let mut proxy = network.command(other, env!("CARGO_BIN_EXE_chaos"));
    proxy.args(["proxy", "--listen", &format!("{address}:7000"), "--to"]);
    proxy.arg(format!("{}:{port}", network.gateway()));
    proxy
        .arg("--control")
        .arg(dir.path().join("control"))
        .stdout(Stdio::piped());
    let mut proxy = Guarded::new(proxy.spawn().unwrap());
    let mut listening = String::new();
    let stdout = proxy.child().stdout.take().unwrap();
    BufReader::new(stdout).read_line(&mut listening).unwrap();
    assert!(listening.starts_with("proxy "), "{listening}");

    let mut talker = Talker::start(&network, one, &address, 7000);
    talker.say("a");
    assert_eq!(talker.hear(BOUND).as_deref(), Some("a"));
    for (from, to) in [(one, other), (other, one)] {
        network.cut(from, to).unwrap();
        talker.say("b");
        assert_eq!(talker.hear(QUIET), None, "{from} to {to} is cut");
        network.open(from, to).unwrap();
        assert_eq!(talker.hear(BOUND).as_deref(), Some("b"), "what was lost is sent again");
    }
    network.isolate(other).unwrap();
    talker.say("c");
    assert_eq!(talker.hear(QUIET), None, "{other} has no cable");
    network.heal().unwrap();
    assert_eq!(talker.hear(BOUND).as_deref(), Some("c"));

    let name = network.name(one);
    let exists = || std::path::Path::new("/run/netns").join(&name).exists();
    assert!(exists());
    drop(talker);
    drop(proxy);
    drop(network);
    assert!(!exists(), "nothing stays behind");
}
