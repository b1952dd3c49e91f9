//! Programs that are not part of this project and may be absent.

use std::io::Write as _;
use std::path::PathBuf;

/// Set to `1`, an absent program fails a test instead of skipping it.
pub const REQUIRE_TOOLS: &str = "CAIRN_REQUIRE_TOOLS";

/// Where the program is: on `PATH`, or where system administration tools are.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    places.map(|place| place.join(program)).find(|file| file.is_file())
}

/// Whether everything that a test needs is there: pairs of a program and the Debian package that has it. When not, says
/// SKIPPED with the packages and gives `false`; with `CAIRN_REQUIRE_TOOLS=1` it panics instead.
pub fn available(needed: &[(&str, &str)]) -> bool {
    let absent: Vec<_> = needed.iter().filter(|(program, _)| find(program).is_none()).collect();
    let absent: Vec<String> = absent
        .iter()
        .map(|(program, package)| format!("{program} (package {package})"))
        .collect();
    absent.is_empty() || skip(&format!("needs {}", absent.join(", ")))
}

/// Says that a test is skipped and why, and gives `false`; with `CAIRN_REQUIRE_TOOLS=1` it panics instead.
pub fn skip(why: &str) -> bool {
    let required = std::env::var_os(REQUIRE_TOOLS).is_some_and(|value| value == "1");
    assert!(!required, "{REQUIRE_TOOLS}=1, and this test can't run: it {why}");
    let thread = std::thread::current();
    // Past the capture of a passing test's output: a person must see what was not tested.
    let _ = writeln!(std::io::stderr(), "SKIPPED {}: {why}", thread.name().unwrap_or("test"));
    false
}
