//! What a run tells: its timeline, the table of faults, and how it failed.

use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::ledger::Tally;

/// What kind of promise was broken. Each has an exit code of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailureKind {
    /// A guest read what it must not have read, or was acknowledged what it must not have been.
    Data,
    /// A guest was told an error.
    GuestError,
    /// I/O did not end, or took longer than it may.
    Stall,
    /// The cluster did not become well again by itself.
    Unhealed,
    /// A process ended, or panicked, though nobody ended it.
    Died,
    /// A process used more memory than it may.
    Memory,
    /// An operator's command did something else than it must do.
    Operation,
    /// The run itself could not go on: no program, no directory, no cluster.
    Setup,
    /// A signal asked the run to stop; nothing had gone wrong until then.
    Stopped,
}

impl FailureKind {
    /// The exit code of `chaos live`.
    pub fn exit_code(self) -> u8 {
        match self {
            FailureKind::Data => 10,
            FailureKind::GuestError => 11,
            FailureKind::Stall => 12,
            FailureKind::Unhealed => 13,
            FailureKind::Died => 14,
            FailureKind::Memory => 15,
            FailureKind::Operation => 16,
            FailureKind::Setup => 20,
            FailureKind::Stopped => 21,
        }
    }

    /// Stable words.
    pub fn name(self) -> &'static str {
        match self {
            FailureKind::Data => "data",
            FailureKind::GuestError => "guest-error",
            FailureKind::Stall => "stall",
            FailureKind::Unhealed => "unhealed",
            FailureKind::Died => "died",
            FailureKind::Memory => "memory",
            FailureKind::Operation => "operation",
            FailureKind::Setup => "setup",
            FailureKind::Stopped => "stopped",
        }
    }
}

/// Why a run failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Which promise.
    pub kind: FailureKind,
    /// What was seen.
    pub words: String,
    /// All that is known of it, such as the operations on a block.
    pub story: Vec<String>,
}

impl Failure {
    /// One without a story.
    pub fn new(kind: FailureKind, words: impl Into<String>) -> Failure {
        Failure {
            kind,
            words: words.into(),
            story: Vec::new(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.name(), self.words)?;
        for line in &self.story {
            write!(f, "\n  | {line}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

/// What happened when, in a file and for whoever watches.
pub struct Timeline {
    begun: Instant,
    file: Option<File>,
    is_told: bool,
}

impl Timeline {
    /// In `timeline.txt` of a directory; on standard error too if `is_told`.
    pub fn new(dir: &Path, is_told: bool) -> Timeline {
        Timeline {
            begun: Instant::now(),
            // A run without a timeline is better than none.
            file: File::create(dir.join("timeline.txt")).ok(),
            is_told,
        }
    }

    /// Since its beginning.
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Adds a line.
    pub fn note(&mut self, words: impl fmt::Display) {
        let line = format!("{:>9.3} {words}\n", self.begun.elapsed().as_secs_f64());
        if let Some(file) = &mut self.file {
            let _ = file.write_all(line.as_bytes());
        }
        if self.is_told {
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }
}

/// One line of the table: a fault.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its name.
    pub fault: &'static str,
    /// How often it was injected.
    pub times: u64,
    /// What guests saw.
    pub tally: Tally,
    /// Reads and acknowledgements that must not be.
    pub mismatches: u64,
    /// How long it took at the most, after the fault had ended, until the cluster had no problem any more.
    pub well_after: Duration,
    /// The kind of failure, if it had one.
    pub failed: Option<FailureKind>,
}

/// All faults of a run.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: Vec<Row>,
}

impl Table {
    /// The row of a fault.
    pub fn row(&mut self, fault: &'static str) -> &mut Row {
        let index = self.rows.iter().position(|row| row.fault == fault);
        let index = index.unwrap_or_else(|| {
            self.rows.push(Row {
                fault,
                times: 0,
                tally: Tally::default(),
                mismatches: 0,
                well_after: Duration::ZERO,
                failed: None,
            });
            self.rows.len() - 1
        });
        &mut self.rows[index]
    }

    /// The rows.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// As an array.
    pub fn json(&self) -> Value {
        let row = |row: &Row| {
            json!({
                "fault": row.fault,
                "times": row.times,
                "operations": row.tally.ops,
                "operations_done": row.tally.done,
                "unanswered": row.tally.unanswered,
                "errors": row.tally.errors,
                "fenced": row.tally.fenced,
                "longest_stall_ms": row.tally.longest_stall.as_millis() as u64,
                "well_after_ms": row.well_after.as_millis() as u64,
                "mismatches": row.mismatches,
                "failed": row.failed.map(FailureKind::name),
            })
        };
        Value::Array(self.rows.iter().map(row).collect())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| {:<24} | {:>5} | {:>8} | {:>10} | {:>6} | {:>7} | {:>10} | {:>10} | {:<11} |",
            "fault", "times", "I/Os", "unanswered", "errors", "stall s", "well after", "mismatches", "verdict"
        )?;
        writeln!(
            f,
            "|{:-<26}|{:->7}|{:->10}|{:->12}|{:->8}|{:->9}|{:->12}|{:->12}|{:-<13}|",
            "", "", "", "", "", "", "", "", ""
        )?;
        for row in &self.rows {
            writeln!(
                f,
                "| {:<24} | {:>5} | {:>8} | {:>10} | {:>6} | {:>7.2} | {:>10.2} | {:>10} | {:<11} |",
                row.fault,
                row.times,
                row.tally.done,
                row.tally.unanswered,
                row.tally.errors,
                row.tally.longest_stall.as_secs_f64(),
                row.well_after.as_secs_f64(),
                row.mismatches,
                row.failed.map_or("ok", FailureKind::name),
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_failure_has_an_exit_code_of_its_own() {
        use FailureKind::*;
        let kinds = [Data, GuestError, Stall, Unhealed, Died, Memory, Operation, Setup];
        let mut codes = kinds.map(FailureKind::exit_code).to_vec();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), kinds.len());
        // 0 is success, 1 a panic's neighbour, 2 a wrong command line, 101 a panic.
        assert!(codes.iter().all(|code| (10..100).contains(code)));
    }

    #[test]
    fn the_table_has_one_line_for_each_fault() {
        let mut table = Table::default();
        table.row("freeze").times += 1;
        table.row("kill-node").times += 2;
        table.row("freeze").times += 1;
        assert_eq!(table.rows().len(), 2);
        assert_eq!(table.to_string().lines().count(), 4);
        assert_eq!(table.json()[0]["times"], 2);
    }

    #[test]
    fn a_timeline_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut timeline = Timeline::new(dir.path(), false);
        timeline.note("node-1 is killed");
        let text = std::fs::read_to_string(dir.path().join("timeline.txt")).unwrap();
        assert!(text.ends_with(" node-1 is killed\n"), "{text}");
    }
}
