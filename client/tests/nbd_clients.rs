//! The NBD protocol against the clients that people use, on a volume in memory behind a blocking server.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;

use bytes::Bytes;
use cairn_chaos::live::tools;
use cairn_client::nbd::{
    ExportInfo, Handshake, HandshakeAction, Input, Negotiated, Refusal, Transmission, TransmissionLimits,
};
use cairn_client::volume::api::{StatusExtent, VolumeError, VolumeOp, VolumeReply};

const BLOCK: usize = 4096;
const SIZE: usize = 48 << 20;

/// Blocks that were never written or were discarded are absent.
#[derive(Default)]
struct MemoryVolume {
    blocks: std::collections::BTreeMap<usize, [u8; BLOCK]>,
}

impl MemoryVolume {
    fn write(&mut self, offset: usize, data: &[u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let count = (BLOCK - at % BLOCK).min(rest.len());
            let block = self.blocks.entry(at / BLOCK).or_insert([0; BLOCK]);
            block[at % BLOCK..at % BLOCK + count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            at += count;
        }
    }

    /// Whole blocks go, unless they must stay; parts of blocks are zeroed.
    fn zero(&mut self, offset: usize, length: usize, may_discard: bool) {
        let end = offset + length;
        for block in offset / BLOCK..end.div_ceil(BLOCK) {
            let (from, to) = (offset.max(block * BLOCK), end.min((block + 1) * BLOCK));
            if to - from == BLOCK && may_discard {
                self.blocks.remove(&block);
            } else if !may_discard || self.blocks.contains_key(&block) {
                self.write(from, &vec![0; to - from]);
            }
        }
    }

    fn read(&self, offset: usize, length: usize) -> Vec<Bytes> {
        let mut pieces = Vec::new();
        let mut at = offset;
        while at < offset + length {
            let count = (BLOCK - at % BLOCK).min(offset + length - at);
            let block = self.blocks.get(&(at / BLOCK)).unwrap_or(&[0; BLOCK]);
            pieces.push(Bytes::copy_from_slice(&block[at % BLOCK..at % BLOCK + count]));
            at += count;
        }
        pieces
    }

    fn status(&self, offset: usize, length: usize) -> Vec<StatusExtent> {
        let mut extents = Vec::new();
        let mut at = offset;
        while at < offset + length && extents.len() < 1024 {
            let count = (BLOCK - at % BLOCK).min(offset + length - at);
            extents.push(StatusExtent {
                length: count as u64,
                data: self.blocks.contains_key(&(at / BLOCK)),
            });
            at += count;
        }
        extents
    }

    fn run(&mut self, op: VolumeOp) -> Result<VolumeReply, VolumeError> {
        let done = match op {
            VolumeOp::Read { offset, length } => VolumeReply::Read(self.read(offset as usize, length as usize)),
            VolumeOp::BlockStatus { offset, length } => {
                VolumeReply::BlockStatus(self.status(offset as usize, length as usize))
            }
            VolumeOp::Write { offset, data } => {
                self.write(offset as usize, &data);
                VolumeReply::Done
            }
            VolumeOp::Discard { offset, length } => {
                self.zero(offset as usize, length as usize, true);
                VolumeReply::Done
            }
            VolumeOp::WriteZeroes {
                offset,
                length,
                may_discard,
            } => {
                self.zero(offset as usize, length as usize, may_discard);
                VolumeReply::Done
            }
            VolumeOp::Flush => VolumeReply::Done,
        };
        Ok(done)
    }
}

/// Serves `disk` on a socket in a directory of its own, until the test ends.
struct Server {
    dir: tempfile::TempDir,
}

impl Server {
    fn start() -> Server {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("nbd.sock")).unwrap();
        let volume = Arc::new(Mutex::new(MemoryVolume::default()));
        thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let volume = volume.clone();
                // A client that leaves in the middle is its own business.
                thread::spawn(move || serve(socket, &volume).ok());
            }
        });
        Server { dir }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path("nbd.sock").display())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn serve(mut socket: UnixStream, volume: &Mutex<MemoryVolume>) -> std::io::Result<()> {
    let Some((negotiated, rest)) = shake_hands(&mut socket)? else {
        return Ok(());
    };
    let mut transmission = Transmission::new(negotiated, &rest, TransmissionLimits::default());
    loop {
        while let Some(input) = transmission.next_input() {
            if let Input::Request { token, op } = input {
                let result = volume.lock().unwrap().run(op);
                transmission.complete(token, result);
            }
        }
        while !transmission.outbox().is_empty() {
            let mut slices = [IoSlice::new(&[]); 16];
            let used = transmission.outbox().slices(&mut slices);
            let count = socket.write_vectored(&slices[..used])?;
            transmission.outbox().advance(count);
        }
        if transmission.is_finished() {
            return Ok(());
        }
        let Some((payload, ahead)) = transmission.read_target() else {
            continue;
        };
        let count = socket.read_vectored(&mut [IoSliceMut::new(payload), IoSliceMut::new(ahead)])?;
        if count == 0 {
            return Ok(());
        }
        transmission.received(count);
    }
}

fn shake_hands(socket: &mut UnixStream) -> std::io::Result<Option<(Negotiated, Vec<u8>)>> {
    let mut handshake = Handshake::new();
    let mut buf = [0; 512];
    loop {
        match handshake.poll_action() {
            Some(HandshakeAction::Send(bytes)) => socket.write_all(&bytes)?,
            Some(HandshakeAction::ListExports) => handshake.catalogue(Ok(vec!["disk".to_string()])),
            Some(HandshakeAction::Describe(name)) => handshake.description(match name.as_str() {
                "disk" => Ok(ExportInfo {
                    size: SIZE as u64,
                    read_only: false,
                }),
                _ => Err(Refusal::Unknown),
            }),
            Some(HandshakeAction::Close(_)) => return Ok(None),
            Some(HandshakeAction::Transmission(negotiated)) => {
                return Ok(Some((negotiated, handshake.into_rest())));
            }
            None => {
                let count = socket.read(&mut buf)?;
                if count == 0 {
                    return Ok(None);
                }
                handshake.receive(&buf[..count]);
            }
        }
    }
}

/// The Python that has libnbd's module: the system's own, whatever else stands first in the path.
fn python_with_libnbd() -> Option<&'static str> {
    let has = |python: &&str| {
        let output = Command::new(python).args(["-c", "import nbd"]).output();
        output.is_ok_and(|output| output.status.success())
    };
    ["/usr/bin/python3", "python3"].into_iter().find(has)
}

fn run(program: &str, args: &[&str]) -> Output {
    Command::new("timeout")
        .arg("60")
        .arg(program)
        .args(args)
        .output()
        .unwrap()
}

fn must(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}",
        output.status,
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// An image with data, zeroes that were written, and holes.
fn image(path: &Path) {
    let mut content = vec![0; SIZE];
    for block in (0..SIZE / BLOCK).filter(|block| block % 7 == 0 || (2000..4000).contains(block)) {
        for (index, byte) in content[block * BLOCK..][..BLOCK].iter_mut().enumerate() {
            *byte = (block * 31 + index * 7 + 1) as u8;
        }
    }
    fs::write(path, content).unwrap();
}

#[test]
fn nbdinfo_sees_the_export_as_it_is() {
    if !tools::available(&[("nbdinfo", "libnbd-bin")]) {
        return;
    }
    let server = Server::start();
    let info = must("nbdinfo", &["--json", &server.uri()]);
    for part in [
        "\"export-name\": \"disk\"",
        "\"export-size\": 50331648",
        "\"is_read_only\": false",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"can_fast_zero\": true",
        "\"can_df\": true",
        "\"can_multi_conn\": true",
        "\"block_size_minimum\": 512",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "\"base:allocation\"",
        "\"structured\": true",
    ] {
        assert!(info.contains(part), "{part} is not in {info}");
    }
    let list = must("nbdinfo", &["--list", &server.uri()]);
    assert!(list.contains("export=\"disk\""), "{list}");
    let map = must("nbdinfo", &["--map", &server.uri()]);
    assert_eq!(
        map.split_whitespace().collect::<Vec<_>>(),
        ["0", "50331648", "3", "hole,zero"]
    );
    assert_eq!(must("nbdinfo", &["--size", &server.uri()]).trim(), SIZE.to_string());
    let unknown = server.uri().replace("disk?", "none?");
    let refused = run("nbdinfo", &[&unknown]);
    assert!(!refused.status.success());
}

#[test]
fn images_copied_in_and_out_are_the_same_and_holes_stay_holes() {
    if !tools::available(&[
        ("nbdcopy", "libnbd-bin"),
        ("nbdinfo", "libnbd-bin"),
        ("qemu-img", "qemu-utils"),
    ]) {
        return;
    }
    let server = Server::start();
    let (source, copy) = (server.path("source.img"), server.path("copy.img"));
    let (source, copy) = (source.to_str().unwrap(), copy.to_str().unwrap());
    image(Path::new(source));
    let uri = server.uri();

    must("nbdcopy", &["--connections=4", "--destination-is-zero", source, &uri]);
    must("nbdcopy", &["--connections=4", &uri, copy]);
    assert!(
        fs::read(source).unwrap() == fs::read(copy).unwrap(),
        "nbdcopy gave back another image"
    );
    let map = must("nbdinfo", &["--map", "--totals", &uri]);
    assert!(map.contains("hole,zero") && map.contains("data"), "{map}");
    must("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]);

    // Over what is there, with zeroes and trims.
    fs::write(source, vec![0x5a; SIZE / 2]).unwrap();
    fs::File::options()
        .write(true)
        .open(source)
        .unwrap()
        .set_len(SIZE as u64)
        .unwrap();
    must("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source, &uri]);
    must("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]);
    fs::remove_file(copy).unwrap();
    must("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, copy]);
    assert!(
        fs::read(source).unwrap() == fs::read(copy).unwrap(),
        "qemu-img gave back another image"
    );
}

#[test]
fn qemu_io_patterns_are_read_back() {
    if !tools::available(&[("qemu-io", "qemu-utils")]) {
        return;
    }
    let server = Server::start();
    let script = [
        "write -P 0x11 0 1M",
        "write -P 0x22 512 1024",
        "write -f -P 0x33 8k 4k",
        "read -P 0x11 0 512",
        "read -P 0x22 512 1024",
        "read -P 0x33 8k 4k",
        "write -z 4k 4k",
        "read -P 0 4k 4k",
        "write -z -u 16k 64k",
        "read -P 0 16k 64k",
        "discard 128k 128k",
        "write -P 0x44 32M 16M",
        "read -P 0x44 32M 16M",
        "flush",
    ];
    let mut args = vec!["-f", "raw"];
    script.iter().for_each(|line| args.extend(["-c", line]));
    let uri = server.uri();
    args.push(&uri);
    let output = must("qemu-io", &args);
    assert!(!output.contains("verification failed"), "{output}");
}

#[test]
fn libnbd_sees_errors_flags_and_extents() {
    let Some(python) = python_with_libnbd() else {
        tools::skip("needs libnbd for Python (package python3-libnbd)");
        return;
    };
    let server = Server::start();
    let script = r#"
import errno, nbd
h = nbd.NBD()
def fails(expected, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == expected, (expected, error)
    else:
        raise AssertionError("no error %s" % expected)
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(uri)
size = h.get_size()
h.pwrite(b"x" * 4096, 8192, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 8192) == b"x" * 4096
assert h.pread(16384, 0, nbd.CMD_FLAG_DF) == bytes(8192) + b"x" * 4096 + bytes(4096)
chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
h.pread_structured(16384, 0, chunk)
assert sorted(chunks) == [(0, 8192, nbd.READ_HOLE), (8192, 4096, nbd.READ_DATA), (12288, 4096, nbd.READ_HOLE)], chunks
extents = []
h.block_status(size, 0, lambda context, offset, entries, error: extents.extend(entries))
assert extents[:4] == [8192, 3, 4096, 0], extents
one = []
h.block_status(size - 8192, 8192, lambda context, offset, entries, error: one.extend(entries), nbd.CMD_FLAG_REQ_ONE)
assert one == [4096, 0], one
fails(errno.EINVAL, lambda: h.pread(512, size))
fails(errno.EINVAL, lambda: h.pread(10, 0))
fails(errno.ENOSPC, lambda: h.pwrite(b"x" * 512, size))
fails(errno.EINVAL, lambda: h.pwrite(b"x" * 100, 0))
fails(errno.ENOTSUP, lambda: h.zero(1024, 512, nbd.CMD_FLAG_FAST_ZERO))
h.zero(1024, 512)
h.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 8192) == bytes(4096)
fails(errno.EINVAL, lambda: h.cache(4096, 0))
h.trim(size, 0)
h.flush()
h.shutdown()
"#;
    must(python, &["-c", &format!("uri = \"{}\"\n{script}", server.uri())]);
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !tools::available(&[("fio", "fio")]) {
        return;
    }
    let server = Server::start();
    let uri = format!("--uri={}", server.uri());
    let common = [
        "--name=verify",
        "--ioengine=nbd",
        "--direct=1",
        "--randseed=7",
        "--verify=crc32c",
    ];
    let shapes: [&[&str]; 3] = [
        &["--bs=4k", "--iodepth=16", "--rw=randwrite", "--size=8M"],
        &["--bs=512", "--iodepth=4", "--rw=randwrite", "--size=1M"],
        &["--bs=1M", "--iodepth=8", "--rw=write", "--size=32M"],
    ];
    for shape in shapes {
        let mut args = common.to_vec();
        args.extend(shape);
        // Where fio puts its verify state.
        let aux = format!("--aux-path={}", server.dir.path().display());
        args.extend([uri.as_str(), &aux]);
        let output = run("fio", &args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() && text.contains("nbd") && text.contains("not loadable") {
            tools::skip("needs fio with the engine nbd (package fio)");
            return;
        }
        assert!(output.status.success(), "{shape:?}: {text}");
    }
}
