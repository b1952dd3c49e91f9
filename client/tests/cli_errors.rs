//! The real `cairn` program: what it says, and the code that it ends with, when something is wrong.
#![allow(clippy::disallowed_methods, reason = "how long a command takes is what is tested")]

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Runs it in `dir` without any configuration of the machine's user.
fn cairn(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cairn"));
    for variable in ["CAIRN_CONFIG", "CAIRN_META", "CAIRN_LOG"] {
        command.env_remove(variable);
    }
    let command = command.args(args).current_dir(dir).stdin(Stdio::null());
    command.output().expect("the program was built for this test")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// An address where nobody listens, as nearly as one can be had.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("the loopback interface has free ports");
    listener.local_addr().expect("it is bound").to_string()
}

#[test]
fn unreachable_metadata_servers_end_a_command_in_bounded_time_with_code_5() {
    let dir = tempfile::tempdir().unwrap();
    let addresses = format!("{},{}", free_address(), free_address());
    let check = |args: &[&str]| {
        let start = Instant::now();
        let output = cairn(dir.path(), &[&["--meta", &addresses], args].concat());
        assert!(
            start.elapsed() < Duration::from_secs(15),
            "{args:?} took {:?}",
            start.elapsed()
        );
        assert_eq!(output.status.code(), Some(5), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
        let text = stderr(&output);
        for address in addresses.split(',') {
            assert!(text.contains(address), "{args:?} does not name {address}: {text}");
        }
        assert!(text.contains("cairn dev"), "{args:?} does not say what to do: {text}");
    };
    std::thread::scope(|scope| {
        scope.spawn(|| check(&["volume", "list"]));
        scope.spawn(|| check(&["volume", "create", "demo", "1GiB"]));
        scope.spawn(|| check(&["volume", "delete", "demo", "--yes"]));
        scope.spawn(|| check(&["node", "list"]));
        scope.spawn(|| check(&["status"]));
    });
}

#[test]
fn a_server_that_never_answers_ends_a_command_in_bounded_time() {
    let dir = tempfile::tempdir().unwrap();
    // Connections are accepted by the kernel, and that is all.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    for args in [["status"].as_slice(), &["volume", "list"]] {
        let start = Instant::now();
        let output = cairn(dir.path(), &[&["--meta", &address], args].concat());
        assert!(
            start.elapsed() < Duration::from_secs(15),
            "{args:?} took {:?}",
            start.elapsed()
        );
        assert_eq!(output.status.code(), Some(5), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(&address), "{}", stderr(&output));
    }
}

#[test]
fn failures_are_json_for_programs() {
    let dir = tempfile::tempdir().unwrap();
    let output = cairn(dir.path(), &["--json", "--meta", &free_address(), "status"]);
    assert_eq!(output.status.code(), Some(5));
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["error"]["kind"], "unreachable");
    assert!(
        error["error"]["message"]
            .as_str()
            .unwrap()
            .contains("no metadata server answers")
    );
}

#[test]
fn without_a_cluster_named_the_ways_to_name_one_are_told() {
    let dir = tempfile::tempdir().unwrap();
    if Path::new("/etc/cairn/cairn.toml").exists() {
        println!("SKIPPED: this machine has a configuration in /etc/cairn");
        return;
    }
    let output = cairn(dir.path(), &["status"]);
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(
        text.contains("--meta") && text.contains("--config") && text.contains("cairn dev"),
        "{text}"
    );
}

#[test]
fn a_wrong_configuration_file_is_refused_with_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |text: Option<&str>| {
        if let Some(text) = text {
            fs::write(dir.path().join("c.toml"), text).unwrap();
        }
        let output = cairn(dir.path(), &["--config", "c.toml", "status"]);
        assert_eq!(output.status.code(), Some(2), "{text:?}");
        stderr(&output)
    };
    assert!(refused(None).contains("c.toml can't be read"));
    assert!(refused(Some("version = 7\n")).contains("has version 7"));
    assert!(refused(Some("[cluster]\n")).contains("has no `version`"));
    let text = refused(Some("version = 1\n[cluster]\nmeat = []\n"));
    assert!(
        text.contains("no key `meat`") && text.contains("did you mean `meta`?"),
        "{text}"
    );
}

#[test]
fn the_configuration_of_a_dev_cluster_is_found_in_the_working_directory() {
    let dir = tempfile::tempdir().unwrap();
    let address = free_address();
    fs::create_dir(dir.path().join("cairn-data")).unwrap();
    let text = format!("version = 1\n[cluster]\nmeta = ['{address}']\n");
    fs::write(dir.path().join("cairn-data/cairn.toml"), text).unwrap();
    let output = cairn(dir.path(), &["status"]);
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert!(stderr(&output).contains(&address));
}

#[test]
fn wrong_command_lines_end_with_code_2_and_say_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    for (args, words) in [
        (["volume", "create", "demo", "ten"].as_slice(), "is not a size"),
        (&["volume", "create", "demo"], "<SIZE>"),
        (&["volume", "crate"], "tip: a similar subcommand exists: 'create'"),
        (&["dev", "--volume", "demo"], "NAME:SIZE"),
        (&["dev", "--metas", "4"], "an odd number"),
        (&["--meta", "nonsense", "status"], "HOST:PORT"),
    ] {
        let output = cairn(dir.path(), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(words), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn help_and_version_are_no_failures() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        ["--version"].as_slice(),
        &["--help"],
        &["volume", "create", "--help"],
        &["dev", "--help"],
    ] {
        let output = cairn(dir.path(), args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty());
    }
    let output = cairn(dir.path(), &["--version"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with(&format!("cairn {}", env!("CARGO_PKG_VERSION"))),
        "{text}"
    );
    assert_eq!(text.contains("CANARY"), cfg!(feature = "canary"));
}

#[cfg(feature = "canary")]
#[test]
fn a_build_with_planted_bugs_serves_only_with_one_that_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        ["dev", "--dir", "d"].as_slice(),
        &["export", "--meta", "127.0.0.1:1", "--nbd-unix", "s"],
    ] {
        let output = cairn(dir.path(), args);
        assert_eq!(output.status.code(), Some(6), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("planted bugs"), "{}", stderr(&output));
    }
    assert!(!dir.path().join("d").exists());
}
