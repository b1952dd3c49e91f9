//! The logs of the parts, shown here.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use super::layout::{Layout, Part};
use crate::limits::{LOG_TAIL_BYTES, LOG_TAIL_LINES};

/// Bytes of one log that are shown in one go at the most; the rest follows.
const READ_BYTES_MAX: u64 = 64 << 10;

/// The last lines of a log, indented.
pub(crate) fn tail(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
    last.iter().map(|line| format!("    {line}\n")).collect()
}

/// Shows what is added to the logs from now on.
#[derive(Debug)]
pub(crate) struct Follower {
    logs: Vec<(Part, PathBuf, u64)>,
}

impl Follower {
    /// Begins at the present end of each log.
    pub(crate) fn new(layout: &Layout, parts: &[Part]) -> Follower {
        let log = |part: &Part| {
            let path = layout.log(*part);
            let length = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
            (*part, path, length)
        };
        Follower {
            logs: parts.iter().map(log).collect(),
        }
    }

    /// The whole lines that were added since the last call, each with its part's name.
    pub(crate) fn read(&mut self) -> String {
        let mut text = String::new();
        for (part, path, offset) in &mut self.logs {
            // A log that can't be read now may be readable later.
            let Ok(bytes) = read_from(path, offset) else { continue };
            let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            // A line longer than what is read in one go is shown in pieces.
            let whole = if bytes.len() as u64 == READ_BYTES_MAX && whole == 0 {
                bytes.len()
            } else {
                whole
            };
            *offset += whole as u64;
            for line in String::from_utf8_lossy(&bytes[..whole]).lines() {
                text.push_str(&format!("{part} | {line}\n"));
            }
        }
        text
    }
}

fn read_from(path: &Path, offset: &mut u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() < *offset {
        // It was put aside, and a new one begun.
        *offset = 0;
    }
    file.seek(SeekFrom::Start(*offset))?;
    let mut bytes = Vec::new();
    file.take(READ_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn whole_lines_are_shown_once_with_the_name_of_their_part() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path())).unwrap();
        layout.create().unwrap();
        let log = layout.log(Part::Meta(1));
        fs::write(&log, "old\n").unwrap();
        let mut follower = Follower::new(&layout, &[Part::Meta(1), Part::Export]);
        assert_eq!(follower.read(), "");
        fs::write(&log, "old\nnew\nhal").unwrap();
        assert_eq!(follower.read(), "meta-1 | new\n");
        fs::write(&log, "old\nnew\nhalf\n").unwrap();
        fs::write(layout.log(Part::Export), "x\n").unwrap();
        assert_eq!(follower.read(), "meta-1 | half\nexport | x\n");
        fs::write(&log, "a\n").unwrap();
        assert_eq!(
            follower.read(),
            "meta-1 | a\n",
            "a log that was begun anew is shown from its start"
        );
    }

    #[test]
    fn a_tail_is_the_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert_eq!(tail(&path), "");
        let lines: String = (0..100).map(|n| format!("line {n}\n")).collect();
        fs::write(&path, lines).unwrap();
        let tail = tail(&path);
        assert_eq!(tail.lines().count(), LOG_TAIL_LINES);
        assert!(tail.ends_with("    line 99\n"), "{tail}");
    }
}
