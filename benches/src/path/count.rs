//! Instructions and allocations per I/O, counted by valgrind: no load of the machine moves them. Each case runs twice, with so many
//! operations and with three times as many, so that what is done once falls out.

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::PathOptions;

/// Operations of the shorter run.
const COUNT: u64 = 4000;
/// Blocks that they are spread over.
const SPAN: u64 = 1 << 14;
/// Name, whether it writes, operations in flight, blocks of one.
const CASES: [(&str, bool, usize, u32); 6] = [
    ("write qd1", true, 1, 1),
    ("write qd64", true, 64, 1),
    ("read qd1", false, 1, 1),
    ("read qd64", false, 64, 1),
    ("write 1M", true, 8, 256),
    ("read 1M", false, 8, 256),
];

/// What one run took in all.
#[derive(Clone, Copy, Debug)]
struct Taken {
    instructions: f64,
    allocations: f64,
    bytes: f64,
}

/// Counts every case and prints a table.
///
/// # Errors
/// valgrind is not installed, or a run failed, in words.
pub fn run() -> Result<Value, String> {
    let mut found = Vec::new();
    println!(
        "{:<12} {:>18} {:>18} {:>18}",
        "case", "instructions", "allocations", "bytes allocated"
    );
    for (name, write, depth, blocks) in CASES {
        let options = |count| PathOptions {
            write,
            depth,
            blocks,
            count,
            span: SPAN,
        };
        let count = COUNT / u64::from(blocks).min(20);
        let (few, many) = (taken(&options(count))?, taken(&options(3 * count))?);
        let per_op = |of: fn(&Taken) -> f64| (of(&many) - of(&few)) / (2 * count) as f64;
        let [instructions, allocations, bytes] = [
            per_op(|taken| taken.instructions),
            per_op(|taken| taken.allocations),
            per_op(|taken| taken.bytes),
        ];
        println!("{name:<12} {instructions:>18.0} {allocations:>18.1} {bytes:>18.0}");
        found.push(json!({
            "case": name,
            "instructions_per_op": instructions,
            "allocations_per_op": allocations,
            "allocated_bytes_per_op": bytes,
        }));
    }
    Ok(Value::Array(found))
}

fn taken(options: &PathOptions) -> Result<Taken, String> {
    let callgrind = valgrind(&["--tool=callgrind", "--callgrind-out-file=/dev/null"], options)?;
    let memcheck = valgrind(
        &["--tool=memcheck", "--leak-check=no", "--undef-value-errors=no"],
        options,
    )?;
    let heap = number_after(&memcheck, "total heap usage:", 0).zip(number_after(&memcheck, "total heap usage:", 2));
    let (allocations, bytes) = heap.ok_or("valgrind said nothing of the heap")?;
    Ok(Taken {
        instructions: number_after(&callgrind, "Collected :", 0).ok_or("valgrind counted no instructions")?,
        allocations,
        bytes,
    })
}

/// What valgrind says of a run.
fn valgrind(tool: &[&str], options: &PathOptions) -> Result<String, String> {
    let own = std::env::current_exe().map_err(|error| format!("the path of this program is not known: {error}"))?;
    let mut command = Command::new("valgrind");
    command.args(tool).arg(own).arg("path");
    command.arg(if options.write { "--write" } else { "--read" });
    for (name, value) in [
        ("--depth", options.depth as u64),
        ("--blocks", options.blocks.into()),
        ("--count", options.count),
        ("--span", options.span),
    ] {
        command.arg(name).arg(value.to_string());
    }
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).output();
    let output =
        output.map_err(|error| format!("valgrind can't be run: {error}; install Debian's package of that name"))?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        return Err(format!("a run under valgrind failed: {words}"));
    }
    Ok(words)
}

/// The number in the line with these words, that so many numbers come before.
fn number_after(text: &str, words: &str, skip: usize) -> Option<f64> {
    let (_, rest) = text.lines().find_map(|line| line.split_once(words))?;
    let numbers = rest
        .split_whitespace()
        .filter_map(|word| word.replace(',', "").parse::<f64>().ok());
    numbers.into_iter().nth(skip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_where_valgrind_puts_them() {
        let heap = "==7== HEAP SUMMARY:\n==7==   total heap usage: 1,234 allocs, 1,230 frees, 56,789 bytes allocated\n";
        let found = [0, 1, 2].map(|skip| number_after(heap, "total heap usage:", skip));
        assert_eq!(found, [Some(1234.0), Some(1230.0), Some(56789.0)]);
        assert_eq!(
            number_after("==7== Collected : 987654\n", "Collected :", 0),
            Some(987_654.0)
        );
        assert_eq!(number_after(heap, "Collected :", 0), None);
    }
}
