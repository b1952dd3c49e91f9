//! What is measured: each brought up on fresh files in one directory, so that all of them use the same device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use cairn_chaos::live::dev::{Dev, DevDir, DevOptions};
use cairn_chaos::live::fio::Target;
use cairn_chaos::live::process::Guarded;
use cairn_chaos::live::tools;
use cairn_chaos::live::wait::wait_until;
use cairn_proto::units::ByteSize;
use clap::ValueEnum;

use crate::ceph::Ceph;
use crate::cost::Role;
use crate::library::Library;

/// How long a server may take to listen.
const LISTEN_BOUND: Duration = Duration::from_secs(20);
/// The volume that is measured.
const VOLUME: &str = "bench";

/// The kinds of target.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub enum Kind {
    /// A volume with three copies of a `cairn dev` cluster, over NBD. A write is durable on two when answered.
    Cairn,
    /// The same, a cluster of its own, through the library in this process instead of NBD and fio.
    CairnLibrary,
    /// A file opened with `O_DIRECT`, through io_uring. A write is not durable when answered.
    Raw,
    /// The same, each write durable when answered (`O_DSYNC`).
    RawDsync,
    /// Three such files, each with a writer of its own at the depth of the case: what three durable copies cost at the least. Its
    /// rate is that of all three together.
    RawDsync3,
    /// The same file as `raw`, over NBD by `qemu-nbd --cache=none`. A write is not durable when answered.
    QemuNbd,
    /// An image of Ceph with three copies. A write is durable on all three when answered.
    Ceph,
}

impl Kind {
    /// Whether it is a cluster of Cairn's.
    pub fn is_cairn(self) -> bool {
        matches!(self, Kind::Cairn | Kind::CairnLibrary)
    }

    /// As it stands in tables.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Cairn => "cairn",
            Kind::CairnLibrary => "library",
            Kind::Raw => "raw",
            Kind::RawDsync => "raw-dsync",
            Kind::RawDsync3 => "3-dsync",
            Kind::QemuNbd => "qemu-nbd",
            Kind::Ceph => "ceph",
        }
    }
}

/// One target that is up; dropping it ends its processes and removes its files.
#[derive(Debug)]
pub struct Up {
    /// Which.
    pub kind: Kind,
    /// For fio.
    pub target: Target,
    /// More arguments of fio.
    pub args: Vec<&'static str>,
    /// Its processes.
    pub roles: Vec<Role>,
    /// The volume in this process, of [`Kind::CairnLibrary`].
    pub library: Option<Library>,
    /// The cluster, of [`Kind::Cairn`] and [`Kind::CairnLibrary`].
    pub cluster: Option<Dev>,
    _server: Option<Guarded>,
    _ceph: Option<Ceph>,
    _files: Option<tempfile::TempDir>,
}

/// Brings a target up in `dir`, with room for `size` bytes. `cairn` is the program, used where there is a cluster.
pub fn bring_up(kind: Kind, dir: &Path, size: ByteSize, cairn: &Path) -> Result<Up, String> {
    match kind {
        Kind::Cairn | Kind::CairnLibrary => return bring_up_cairn(kind, dir, size, cairn),
        Kind::Ceph => return bring_up_ceph(dir, size),
        _ => {}
    }
    let words = |error: std::io::Error| format!("{} in {}: {error}", kind.name(), dir.display());
    let files = tempfile::Builder::new()
        .prefix("bench-")
        .tempdir_in(dir)
        .map_err(words)?;
    let image = files.path().join("image");
    fs::File::create(&image)
        .and_then(|file| file.set_len(size.0))
        .map_err(words)?;
    let mut server = None;
    let mut roles = Vec::new();
    let mut target = Target::File(image.clone());
    if kind == Kind::RawDsync3 {
        // One file for each writer; fio makes them, and they are written in full before anything is measured, as all are.
        fs::remove_file(&image).map_err(words)?;
        target = Target::FilePerJob(files.path().to_path_buf());
    }
    if kind == Kind::QemuNbd {
        let program = tools::find("qemu-nbd").ok_or("qemu-nbd is not installed (package qemu-utils)")?;
        let socket = files.path().join("sock");
        let mut command = Command::new(program);
        command.args([
            "-f",
            "raw",
            "-t",
            "-e",
            "16",
            "--cache=none",
            "--aio=native",
            "-x",
            VOLUME,
            "-k",
        ]);
        command.arg(&socket).arg(&image).stdin(Stdio::null());
        let child = Guarded::new(command.spawn().map_err(words)?);
        roles.push(("qemu-nbd", child.pid()));
        server = Some(child);
        if !wait_until(LISTEN_BOUND, || socket.exists()) {
            return Err(format!(
                "qemu-nbd did not listen on {} within {LISTEN_BOUND:?}",
                socket.display()
            ));
        }
        target = Target::Nbd(format!("nbd+unix:///{VOLUME}?socket={}", socket.display()));
    }
    Ok(Up {
        kind,
        target,
        args: match kind {
            Kind::RawDsync => vec!["--sync=dsync"],
            Kind::RawDsync3 => vec!["--sync=dsync", "--numjobs=3"],
            _ => Vec::new(),
        },
        roles,
        library: None,
        cluster: None,
        _server: server,
        _ceph: None,
        _files: Some(files),
    })
}

fn bring_up_cairn(kind: Kind, dir: &Path, size: ByteSize, cairn: &Path) -> Result<Up, String> {
    // Room for the volume once more: overwrites take new space before they give the old back.
    let device = ByteSize((size.0 * 2).max(1 << 30));
    let options = DevOptions::new(cairn)
        .volumes(&[&format!("{VOLUME}:{}", size.0)])
        .device_size(&device.0.to_string());
    let dir = DevDir::new(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let cluster = Dev::start(options, dir).map_err(|error| error.to_string())?;
    let mut roles = roles_of(&cluster);
    let mut library = None;
    if kind == Kind::CairnLibrary {
        library = Some(Library::open(&cluster.path().join("cairn.toml"), VOLUME)?);
        roles.push(("load+library", std::process::id() as i32));
    }
    Ok(Up {
        kind,
        target: Target::Nbd(cluster.uri(VOLUME)),
        args: Vec::new(),
        roles,
        library,
        cluster: Some(cluster),
        _server: None,
        _ceph: None,
        _files: None,
    })
}

/// The processes of a cluster by what they do.
pub fn roles_of(cluster: &Dev) -> Vec<Role> {
    let role = |part: &str| match part.split('-').next() {
        Some("node") => "nodes",
        Some("meta") => "metas",
        Some("export") => "export",
        _ => "other",
    };
    let pids = cluster.pids().into_iter();
    pids.map(|(part, pid)| (role(&part), pid)).collect()
}

fn bring_up_ceph(dir: &Path, size: ByteSize) -> Result<Up, String> {
    let ceph = Ceph::start(dir, size)?;
    Ok(Up {
        kind: Kind::Ceph,
        target: ceph.target(),
        args: Vec::new(),
        roles: ceph.processes(),
        library: None,
        cluster: None,
        _server: None,
        _ceph: Some(ceph),
        _files: None,
    })
}

/// The `cairn` program of this build: built with the cargo that runs this, in the same profile.
pub fn build_cairn() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| format!("the path of this program is not known: {error}"))?;
    let folder = own.parent().ok_or("this program lies in no directory")?;
    let program = folder.join("cairn");
    let profile = match folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(name) => name,
    };
    let build = ["build", "--profile", profile, "-p", "cairn-client", "--bin", "cairn"];
    match std::env::var_os("CARGO") {
        Some(cargo) => {
            let status = Command::new(cargo).args(build).stdin(Stdio::null()).status();
            let built = status
                .map_err(|error| format!("cargo can't be run: {error}"))?
                .success();
            if !built {
                return Err(format!("cargo {} failed", build.join(" ")));
            }
        }
        None if !program.is_file() => {
            return Err(format!(
                "there is no {}: build it with cargo {}",
                program.display(),
                build.join(" ")
            ));
        }
        None => {}
    }
    Ok(program)
}
