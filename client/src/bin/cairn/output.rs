//! Standard output: tables for people, JSON for programs.

use std::io::{self, IsTerminal as _, Write as _};

use serde::Serialize;

use crate::failure::Failure;

/// Columns of text, as wide as their longest entry.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<usize>,
}

/// Between two columns.
const GAP: usize = 2;

impl Table {
    /// A table with these headings.
    pub(crate) fn new(headings: &[&str]) -> Table {
        Table {
            rows: vec![headings.iter().map(ToString::to_string).collect()],
            right: Vec::new(),
        }
    }

    /// Pairs of a name and a value, without headings.
    pub(crate) fn pairs() -> Table {
        Table {
            rows: Vec::new(),
            right: Vec::new(),
        }
    }

    /// Numbers are easier to compare when they end at the same place.
    pub(crate) fn right(mut self, columns: &[usize]) -> Table {
        self.right = columns.to_vec();
        self
    }

    /// Adds a row.
    pub(crate) fn row<I: IntoIterator<Item = S>, S: Into<String>>(&mut self, cells: I) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// The text, each line ended.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let room = " ".repeat(widths[column] - cell.chars().count());
                if self.right.contains(&column) {
                    line.push_str(&room);
                    line.push_str(cell);
                } else {
                    line.push_str(cell);
                    line.push_str(&room);
                }
                line.push_str(&" ".repeat(GAP));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Writes to standard output at once. A reader that has gone away (`| head`) is no failure.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::failed(format!("can't write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Writes it as JSON, in one document.
pub(crate) fn print_json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).expect("what is printed has string keys only");
    print(&format!("{text}\n"))
}

/// Either, as the caller asked.
pub(crate) fn show<T: Serialize>(json: bool, value: &T, text: impl FnOnce() -> String) -> Result<(), Failure> {
    if json { print_json(value) } else { print(&text()) }
}

/// Asks before something that can't be undone. `yes` is the flag that answers in advance.
pub(crate) fn confirm(question: &str, yes: bool) -> Result<(), Failure> {
    use crate::failure::Kind;
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::new(Kind::Refused, format!("not confirmed: {question}"))
            .hint("There is no terminal to ask on: say --yes if it is meant."));
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .map_err(|error| Failure::failed(format!("can't read the answer: {error}")))?;
    if matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        Ok(())
    } else {
        Err(Failure::new(Kind::Refused, "not confirmed: nothing was changed"))
    }
}

/// `1 node`, `2 nodes`.
pub(crate) fn count(number: u64, one: &str) -> String {
    if number == 1 {
        format!("1 {one}")
    } else {
        format!("{number} {one}s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_as_wide_as_its_entries() {
        let mut table = Table::new(&["NAME", "SIZE", "STATE"]).right(&[1]);
        table.row(["demo", "1 GiB", "in use"]);
        table.row(["a-longer-name", "512 MiB", ""]);
        assert_eq!(
            table.render(),
            "NAME              SIZE  STATE\n\
             demo             1 GiB  in use\n\
             a-longer-name  512 MiB\n"
        );
    }

    #[test]
    fn without_a_terminal_nothing_is_destroyed_unasked() {
        assert!(confirm("Delete it?", true).is_ok());
        if !io::stdin().is_terminal() {
            assert_eq!(confirm("Delete it?", false).unwrap_err().kind.exit_code(), 6);
        }
    }
}
