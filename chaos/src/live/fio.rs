//! Runs of fio, and what it reports.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::process::Guarded;
use super::tools;

/// Where fio sends its I/O.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// An NBD export, by its URI.
    Nbd(String),
    /// A file or device, opened with `O_DIRECT`.
    File(PathBuf),
    /// A file for each of several jobs in a directory, opened with `O_DIRECT`.
    FilePerJob(PathBuf),
    /// An image of Ceph's pool `rbd`.
    Rbd {
        /// The cluster's configuration file.
        conf: PathBuf,
        /// The image's name.
        image: String,
    },
}

impl Target {
    fn args(&self) -> Vec<String> {
        match self {
            Target::Nbd(uri) => vec!["--ioengine=nbd".to_string(), format!("--uri={uri}")],
            Target::File(path) => vec![
                "--ioengine=io_uring".to_string(),
                "--direct=1".to_string(),
                format!("--filename={}", path.display()),
            ],
            Target::FilePerJob(directory) => vec![
                "--ioengine=io_uring".to_string(),
                "--direct=1".to_string(),
                format!("--directory={}", directory.display()),
                "--filename_format=image.$jobnum".to_string(),
            ],
            Target::Rbd { image, .. } => vec![
                "--ioengine=rbd".to_string(),
                "--clientname=admin".to_string(),
                "--pool=rbd".to_string(),
                format!("--rbdname={image}"),
            ],
        }
    }

    /// The environment that the engine needs.
    fn env(&self) -> Option<(&'static str, &Path)> {
        match self {
            Target::Rbd { conf, .. } => Some(("CEPH_CONF", conf)),
            Target::Nbd(_) | Target::File(_) | Target::FilePerJob(_) => None,
        }
    }
}

/// One direction's figures.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Figures {
    /// Operations per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_s: f64,
    /// Mean completion latency, in microseconds.
    pub mean_us: f64,
    /// Median completion latency, in microseconds.
    pub p50_us: f64,
    /// 99th percentile of the completion latency, in microseconds.
    pub p99_us: f64,
    /// 99.9th percentile of the completion latency, in microseconds.
    pub p999_us: f64,
    /// The longest completion latency, in microseconds.
    pub max_us: f64,
    /// How many operations there were.
    pub ios: u64,
}

/// What one run of fio gave.
#[derive(Clone, PartialEq, Debug)]
pub struct Report {
    /// The first error number of any job; zero when all I/O succeeded and every verification matched.
    pub error: i64,
    /// Reads.
    pub read: Figures,
    /// Writes.
    pub write: Figures,
    /// Trims.
    pub trim: Figures,
}

/// fio could not run, or found an error.
#[derive(Debug)]
pub struct FioError {
    what: String,
    output: String,
}

impl fmt::Display for FioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fio {}; it had printed:\n{}", self.what, self.output)
    }
}

impl std::error::Error for FioError {}

/// A run in the background.
#[derive(Debug)]
pub struct Running {
    child: Guarded,
    output: std::thread::JoinHandle<String>,
    errors: std::thread::JoinHandle<String>,
    name: String,
}

/// Starts one job group named `name` on `target`; `args` are fio's own, as `--rw=randwrite`.
///
/// Panics when fio is not installed: ask [`tools::available`] before.
pub fn start(name: &str, target: &Target, args: &[&str]) -> Running {
    let program = tools::find("fio").expect("fio is installed (package fio)");
    let mut command = Command::new(program);
    command.arg(format!("--name={name}")).args(target.args()).args(args);
    command.envs(target.env());
    // Threads, not processes: a process of its own would outlive fio when that is killed.
    command.args([
        "--thread",
        "--verify_state_save=0",
        "--group_reporting",
        "--output-format=json",
    ]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = Guarded::new(command.spawn().expect("fio can be started"));
    let output = collect(child.child().stdout.take().expect("standard output was piped above"));
    let errors = collect(child.child().stderr.take().expect("standard error was piped above"));
    Running {
        child,
        output,
        errors,
        name: name.to_string(),
    }
}

/// Runs one job group to its end; see [`start`].
pub fn run(name: &str, target: &Target, args: &[&str], bound: Duration) -> Result<Report, FioError> {
    start(name, target, args).finish(bound)
}

impl Running {
    /// Waits for its end, `bound` at the most. An error of any I/O, and a mismatch, is an error here.
    pub fn finish(mut self, bound: Duration) -> Result<Report, FioError> {
        let status = self.child.wait(bound);
        drop(self.child);
        let output = self.output.join().expect("the reader of fio's output does not panic");
        let errors = self.errors.join().expect("the reader of fio's errors does not panic");
        let name = self.name;
        let failed = |what: String| FioError {
            what: format!("`{name}` {what}"),
            output: format!("{errors}\n{output}"),
        };
        let status = status.ok_or_else(|| failed(format!("had not ended after {bound:?}")))?;
        let report = parse(&output).ok_or_else(|| failed(format!("gave no report ({status})")))?;
        if report.error != 0 || !status.success() {
            return Err(failed(format!("ended with error {} ({status})", report.error)));
        }
        Ok(report)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.wait(Duration::ZERO).is_none()
    }
}

fn collect(mut pipe: impl std::io::Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What could be read is worth showing whatever ended it.
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The report within fio's output: notes may stand before it.
fn parse(output: &str) -> Option<Report> {
    let json: serde_json::Value = serde_json::from_str(&output[output.find("{\n")?..]).ok()?;
    let jobs = json.get("jobs")?.as_array()?;
    let job = jobs.first()?;
    let error = jobs
        .iter()
        .filter_map(|job| job.get("error")?.as_i64())
        .find(|error| *error != 0);
    Some(Report {
        error: error.unwrap_or(0),
        read: figures(job.get("read")?),
        write: figures(job.get("write")?),
        trim: figures(job.get("trim")?),
    })
}

fn figures(json: &serde_json::Value) -> Figures {
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or(0.0);
    let latency = &json["clat_ns"];
    let percentiles: BTreeMap<String, f64> = latency["percentile"]
        .as_object()
        .map(|map| map.iter().map(|(name, value)| (name.clone(), number(value))).collect())
        .unwrap_or_default();
    let percentile_us = |name: &str| percentiles.get(name).copied().unwrap_or(0.0) / 1e3;
    Figures {
        iops: number(&json["iops"]),
        bytes_per_s: number(&json["bw_bytes"]),
        mean_us: number(&latency["mean"]) / 1e3,
        p50_us: percentile_us("50.000000"),
        p99_us: percentile_us("99.000000"),
        p999_us: percentile_us("99.900000"),
        max_us: number(&latency["max"]) / 1e3,
        ios: json["total_ios"].as_u64().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_found_behind_notes_and_an_error_in_any_job_counts() {
        let output = "note: this and that\n{\n  \"jobs\": [\n {\"error\": 0, \"read\": {\"iops\": 12.5, \"bw_bytes\": 51200, \
            \"total_ios\": 25, \"clat_ns\": {\"mean\": 2000.0, \"max\": 9000, \"percentile\": {\"50.000000\": 1000}}}, \
            \"write\": {}, \"trim\": {}}, {\"error\": 84}]}";
        let report = parse(output).unwrap();
        assert_eq!(report.error, 84);
        assert_eq!((report.read.iops, report.read.ios), (12.5, 25));
        assert_eq!(
            (report.read.mean_us, report.read.p50_us, report.read.max_us),
            (2.0, 1.0, 9.0)
        );
        assert_eq!(report.write, Figures::default());
        assert!(parse("fio: this engine is unknown").is_none());
    }

    #[test]
    fn a_run_on_a_file_gives_figures_and_a_failing_one_an_error() {
        if !tools::available(&[("fio", "fio")]) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let target = Target::File(dir.path().join("f"));
        let args = [
            "--rw=randwrite",
            "--bs=4k",
            "--size=1M",
            "--ioengine=psync",
            "--direct=0",
        ];
        let report = run("w", &target, &args, Duration::from_secs(60)).unwrap();
        assert_eq!((report.error, report.write.ios, report.read.ios), (0, 256, 0));
        let error = run("w", &target, &["--rw=nonsense", "--size=1M"], Duration::from_secs(60)).unwrap_err();
        assert!(error.to_string().contains("nonsense"), "{error}");
    }
}
