//! The file that holds a running process's id.

use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Kind};

/// Written at the start, removed at an orderly end.
#[derive(Debug)]
pub(crate) struct PidFile {
    path: PathBuf,
}

impl PidFile {
    /// Refuses while another process with this one's command line has the file.
    pub(crate) fn create(path: &Path) -> Result<PidFile, Failure> {
        let own = std::process::id();
        if let Some(other) = read(path).filter(|other| *other != own) {
            let command = command_line(other);
            if command.is_some() && command == command_line(own) {
                return Err(Failure::new(
                    Kind::Occupied,
                    format!("this runs already as process {other}, says {}", path.display()),
                )
                .hint(format!("Stop it first: kill {other}")));
            }
        }
        fs::write(path, format!("{own}\n")).map_err(|error| {
            Failure::failed(format!("can't write the process id to {}: {error}", path.display()))
                .hint("Does its directory exist, and may this user write there?")
        })?;
        Ok(PidFile {
            path: path.to_path_buf(),
        })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // A process that was started in the meantime has its own id there.
        if read(&self.path) == Some(std::process::id()) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The process id in a file; `None` when there is none.
pub(crate) fn read(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The arguments of a process, each ended by a zero byte; `None` when it does not run (any more).
fn command_line(pid: u32) -> Option<Vec<u8>> {
    fs::read(format!("/proc/{pid}/cmdline"))
        .ok()
        .filter(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_lives_as_long_as_the_process_and_a_stale_one_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.pid");
        // No process has this id: the kernel's are smaller.
        fs::write(&path, "4194305\n").unwrap();
        let file = PidFile::create(&path).unwrap();
        assert_eq!(read(&path), Some(std::process::id()));
        drop(file);
        assert!(!path.exists());
        // Another program's process has the id by now.
        fs::write(&path, "1\n").unwrap();
        let file = PidFile::create(&path).unwrap();
        fs::write(&path, "1\n").unwrap();
        drop(file);
        assert_eq!(read(&path), Some(1), "it is another process's file by now");
    }
}
