//! The command of the benches.

use std::path::PathBuf;
use std::process::ExitCode;

use cairn_benches::matrix::{self, MatrixOptions};
use cairn_benches::targets::Kind;
use clap::{Parser, Subcommand};

/// Measures Cairn beside its peers.
#[derive(Parser)]
#[command(name = "cairn-benches")]
struct Arguments {
    #[command(subcommand)]
    command: Benches,
}

#[derive(Subcommand)]
enum Benches {
    /// The fio matrix on every target in turn. Example: cargo run --release -p cairn-benches -- fio --rounds 5
    Fio(FioArguments),
}

#[derive(clap::Args)]
struct FioArguments {
    /// How often every case runs on every target; the spread is over the rounds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds per case.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=3600))]
    runtime: u32,
    /// What to measure, separated by commas; the first is compared with the others.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["cairn", "raw", "qemu-nbd"])]
    targets: Vec<Kind>,
    /// Only cases whose name contains one of these, separated by commas.
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Bytes that the I/O is spread over, as fio writes sizes: written in full once before anything is measured.
    #[arg(long, default_value = "1G")]
    size: String,
    /// Where the files of all targets lie; the device under it is what is measured.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The `cairn` program; built in the profile of this one when not given.
    #[arg(long)]
    cairn: Option<PathBuf>,
    /// Also write all figures of all rounds to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let Benches::Fio(arguments) = Arguments::parse().command;
    let options = MatrixOptions {
        rounds: arguments.rounds,
        runtime_s: arguments.runtime,
        targets: arguments.targets,
        cases: arguments.cases,
        size: arguments.size,
        dir: arguments.dir,
        cairn: arguments.cairn,
        json: arguments.json,
    };
    match matrix::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
