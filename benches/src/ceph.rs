//! Ceph as a peer: one monitor, one manager and three BlueStore OSDs on files in one directory, all on loopback and without
//! authentication, three copies of all. Its writes are durable when answered. Needs Debian's packages ceph-mon, ceph-mgr,
//! ceph-osd and ceph-common, and root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use cairn_chaos::live::fio::Target;
use cairn_chaos::live::process::Guarded;
use cairn_chaos::live::tools;
use cairn_chaos::live::wait::wait_until;
use cairn_proto::units::ByteSize;

/// Copies of all data, each on an OSD of its own.
const OSDS: u32 = 3;
/// Placement groups of the pool, and one of Ceph's own.
const GROUPS: u32 = 32;
/// Bytes of each OSD's file at the least.
const OSD_BYTES_MIN: u64 = 12 << 30;
/// How long the monitor, and then all placement groups, may take to be ready.
const READY_BOUND: Duration = Duration::from_secs(60);
/// How long an OSD may take to be up.
const OSD_BOUND: Duration = Duration::from_secs(20);
/// How often an OSD is started: now and then one ends at its first start because the monitor refuses its first command.
const OSD_STARTS_MAX: u32 = 5;
/// The image that is measured.
const IMAGE: &str = "bench";

/// A running cluster; dropping it ends its processes and removes its files.
#[derive(Debug)]
pub struct Ceph {
    // In this order: the processes end before their files go.
    daemons: Vec<(String, Guarded)>,
    files: tempfile::TempDir,
    image: u64,
}

impl Ceph {
    /// Brings it up in `dir`, with an image of `size` bytes.
    pub fn start(dir: &Path, size: ByteSize) -> Result<Ceph, String> {
        for (program, package) in [
            ("ceph-mon", "ceph-mon"),
            ("ceph-mgr", "ceph-mgr"),
            ("ceph-osd", "ceph-osd"),
            ("rbd", "ceph-common"),
        ] {
            if tools::find(program).is_none() {
                return Err(format!("{program} is not installed (package {package})"));
            }
        }
        let files = tempfile::Builder::new()
            .prefix("ceph-")
            .tempdir_in(dir)
            .map_err(words)?;
        let mut ceph = Ceph {
            daemons: Vec::new(),
            files,
            image: size.0,
        };
        ceph.monitor()?;
        for number in 0..OSDS {
            ceph.osd(number)?;
        }
        ceph.pool()?;
        Ok(ceph)
    }

    /// For fio.
    pub fn target(&self) -> Target {
        Target::Rbd {
            conf: self.conf(),
            image: IMAGE.to_string(),
        }
    }

    /// Its processes, each with what it does.
    pub fn processes(&self) -> Vec<(&'static str, i32)> {
        let of = |(name, daemon): &(String, Guarded)| {
            (if name.starts_with("osd") { "osd" } else { "mon, mgr" }, daemon.pid())
        };
        self.daemons.iter().map(of).collect()
    }

    /// The process of the OSD with this number.
    pub fn osd_pid(&self, number: u32) -> Option<i32> {
        let name = format!("osd.{number}");
        let daemon = self.daemons.iter().find(|(known, _)| *known == name)?;
        Some(daemon.1.pid())
    }

    fn dir(&self) -> &Path {
        self.files.path()
    }

    fn conf(&self) -> PathBuf {
        self.dir().join("ceph.conf")
    }

    fn monitor(&mut self) -> Result<(), String> {
        let dir = self.dir().to_path_buf();
        let fsid = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(words)?;
        // An address of its own: a port that was free a moment ago may be the source of somebody's connection.
        let [.., high, low] = std::process::id().to_be_bytes();
        let address = format!("127.77.{high}.{}:3300", low.max(1));
        let osd_bytes = OSD_BYTES_MIN.max(self.image * 2);
        let path = dir.display();
        let conf = format!(
            "[global]\nfsid = {fsid}mon host = {address}\nauth cluster required = none\nauth service required = none\n\
             auth client required = none\nosd pool default size = {OSDS}\nosd pool default min size = 2\n\
             osd crush chooseleaf type = 0\nosd crush update on start = false\nrun dir = {path}\n\
             admin socket = {path}/$name.asok\nlog file = {path}/$name.log\npid file = {path}/$name.pid\n\
             keyring = {path}/keyring\npublic network = 127.0.0.0/8\n[osd]\nosd data = {path}/osd$id\n\
             osd objectstore = bluestore\nbluestore block size = {osd_bytes}\nbluestore block create = true\n\
             osd memory target = 2147483648\n[client]\nrbd cache = false\n[mon]\nmon data = {path}/mon\nmon initial members = a\n\
             mgr data = {path}/mgr\n[mgr]\nmgr data = {path}/mgr\nmgr initial modules =\n"
        );
        fs::write(self.conf(), conf).map_err(words)?;
        for part in ["mon", "mgr"] {
            fs::create_dir_all(dir.join(part)).map_err(words)?;
        }
        let keyring = dir.join("keyring").display().to_string();
        let map = dir.join("monmap").display().to_string();
        let all = "allow *";
        self.run(
            "monmaptool",
            &["--create", "--add", "a", &address, "--fsid", fsid.trim(), &map],
        )?;
        let monitor = [
            "--create-keyring",
            &keyring,
            "--gen-key",
            "-n",
            "mon.",
            "--cap",
            "mon",
            all,
        ];
        self.run("ceph-authtool", &monitor)?;
        let caps = ["--cap", "mon", all, "--cap", "osd", all, "--cap", "mgr", all];
        self.run(
            "ceph-authtool",
            &[&[keyring.as_str(), "--gen-key", "-n", "client.admin"], &caps[..]].concat(),
        )?;
        self.run(
            "ceph-mon",
            &["--mkfs", "-i", "a", "--monmap", &map, "--keyring", &keyring],
        )?;
        self.daemon("mon", "ceph-mon", "a")?;
        let mut why = String::new();
        let answers = wait_until(READY_BOUND, || {
            let asked = self.ceph(&["mon", "stat"]);
            asked.map_err(|error| why = error).is_ok()
        });
        if !answers {
            return Err(format!("Ceph's monitor did not answer within {READY_BOUND:?}: {why}"));
        }
        self.daemon("mgr", "ceph-mgr", "x")
    }

    fn osd(&mut self, number: u32) -> Result<(), String> {
        let (name, id) = (format!("osd.{number}"), number.to_string());
        fs::create_dir_all(self.dir().join(format!("osd{number}"))).map_err(words)?;
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(words)?;
        self.ceph(&["osd", "new", uuid.trim(), &id])?;
        self.run("ceph-osd", &["-i", &id, "--mkfs", "--osd-uuid", uuid.trim()])?;
        let host = format!("host=h{number}");
        self.ceph(&["osd", "crush", "add", &name, "1.0", "root=default", &host])?;
        for _ in 0..OSD_STARTS_MAX {
            self.daemon(&name, "ceph-osd", &id)?;
            let mut ended = false;
            let up = wait_until(OSD_BOUND, || {
                let daemon = self.daemons.last_mut().expect("it was just started");
                ended = daemon.1.wait(Duration::ZERO).is_some();
                ended || self.is_up(number)
            });
            if up && !ended {
                return Ok(());
            }
            self.daemons.pop();
        }
        let log = self.dir().join(format!("{name}.log"));
        Err(format!(
            "{name} of Ceph is not up after {OSD_STARTS_MAX} starts; {} said why",
            log.display()
        ))
    }

    fn is_up(&self, number: u32) -> bool {
        let dump = self.ceph(&["osd", "dump", "--format", "json"]).unwrap_or_default();
        let json: serde_json::Value = serde_json::from_str(&dump).unwrap_or_default();
        let osds = json["osds"].as_array();
        let found = osds.and_then(|osds| osds.iter().find(|osd| osd["osd"].as_u64() == Some(number.into())));
        found.is_some_and(|osd| osd["up"].as_u64() == Some(1))
    }

    fn pool(&mut self) -> Result<(), String> {
        let groups = GROUPS.to_string();
        self.ceph(&["osd", "pool", "create", "rbd", &groups, &groups])?;
        self.ceph(&["osd", "pool", "application", "enable", "rbd", "rbd"])?;
        let bytes = format!("{}B", self.image);
        self.run("rbd", &["create", "--size", &bytes, IMAGE])?;
        self.wait_well()
    }

    /// Waits until every placement group has all its copies.
    pub fn wait_well(&self) -> Result<(), String> {
        let well = wait_until(READY_BOUND, || {
            let states = self
                .ceph(&["pg", "dump", "pgs_brief", "--format", "json"])
                .unwrap_or_default();
            let json: serde_json::Value = serde_json::from_str(&states).unwrap_or_default();
            let groups = json["pg_stats"].as_array();
            groups.is_some_and(|all| {
                all.len() >= GROUPS as usize && all.iter().all(|group| group["state"] == "active+clean")
            })
        });
        if well {
            return Ok(());
        }
        Err(format!(
            "Ceph's placement groups are not all active and clean after {READY_BOUND:?}: {}",
            self.ceph(&["-s"]).unwrap_or_default()
        ))
    }

    fn daemon(&mut self, name: &str, program: &str, id: &str) -> Result<(), String> {
        let log = fs::File::create(self.dir().join(format!("{name}.out"))).map_err(words)?;
        let mut command = self.command(program, &["-f", "-i", id])?;
        let (out, errors) = (log.try_clone().map_err(words)?, log);
        let child = command.stdin(Stdio::null()).stdout(out).stderr(errors).spawn();
        let child = child.map_err(|error| format!("{program} can't be started: {error}"))?;
        self.daemons.push((name.to_string(), Guarded::new(child)));
        Ok(())
    }

    /// A command of the `ceph` tool, and what it printed.
    fn ceph(&self, args: &[&str]) -> Result<String, String> {
        self.run("ceph", &[&["--connect-timeout", "20"], args].concat())
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String, String> {
        let output = self.command(program, args)?.stdin(Stdio::null()).output();
        let output = output.map_err(|error| format!("{program} can't be run: {error}"))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        Err(format!(
            "{program} {} failed ({}): {}",
            args.join(" "),
            output.status,
            errors.trim()
        ))
    }

    fn command(&self, program: &str, args: &[&str]) -> Result<Command, String> {
        let found = tools::find(program).ok_or_else(|| format!("{program} is not installed"))?;
        let mut command = Command::new(found);
        if !["monmaptool", "ceph-authtool"].contains(&program) {
            command.arg("-c").arg(self.conf());
        }
        command.args(args).current_dir(self.dir());
        Ok(command)
    }
}

fn words(error: std::io::Error) -> String {
    format!("a file of Ceph's can't be made: {error}")
}
