//! How far a long look at a device is, on standard error: a line that changes on a terminal, now and then a new line in a
//! log.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Instant;

use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::ByteSize;
use cairn_storage_node::store::inspect::InspectProgress;

use crate::commands::percent;
use crate::limits::{PROGRESS_INTERVAL_LOG, PROGRESS_INTERVAL_TERMINAL};

/// Says how far something is.
pub(crate) struct Progress {
    terminal: bool,
    last: Instant,
    /// Whether a line stands on the terminal that is to be replaced.
    shown: bool,
}

impl Progress {
    pub(crate) fn new() -> Progress {
        Progress {
            terminal: io::stderr().is_terminal(),
            last: Instant::now(),
            shown: false,
        }
    }

    pub(crate) fn tell(&mut self, progress: InspectProgress) {
        let interval = if self.terminal {
            PROGRESS_INTERVAL_TERMINAL
        } else {
            PROGRESS_INTERVAL_LOG
        };
        if self.last.elapsed() < interval {
            return;
        }
        self.last = Instant::now();
        let text = words(progress);
        // Standard error that can't be written to is no reason to end.
        let _ = if self.terminal {
            self.shown = true;
            write!(io::stderr(), "\r\x1b[K{text}")
        } else {
            writeln!(io::stderr(), "{text}")
        };
    }

    /// Takes the line from the terminal.
    pub(crate) fn end(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

fn words(progress: InspectProgress) -> String {
    match progress {
        InspectProgress::Opening => "reading the log".to_string(),
        InspectProgress::Index(done, all) => {
            format!("reading the index: {done} of {all} pages ({})", percent(done, all))
        }
        InspectProgress::Data(done, all, damage) => {
            let bytes = |blocks: u64| ByteSize(blocks * BLOCK_BYTES as u64);
            let share = percent(done, all);
            format!(
                "verifying: {} of {} ({share}), {damage} damaged",
                bytes(done),
                bytes(all)
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_is_done_and_what_was_found() {
        let words = words(InspectProgress::Data(1 << 18, 1 << 19, 3));
        assert_eq!(words, "verifying: 1 GiB of 2 GiB (50 %), 3 damaged");
    }
}
