//! The command of the benches.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use cairn_benches::matrix::{self, MatrixOptions};
use cairn_benches::path::{self, PathOptions};
use cairn_benches::rebuild::{self, RebuildOptions};
use cairn_benches::scale::{self, ScaleOptions};
use cairn_benches::stall::{self, StallOptions};
use cairn_benches::store::spin::{self, SpinOptions};
use cairn_benches::store::{self, StoreOptions};
use cairn_benches::targets::Kind;
use cairn_proto::units::ByteSize;
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
    /// A volume through the library beside the same through NBD. Example: cargo run --release -p cairn-benches -- volume --rounds 5
    Volume(VolumeArguments),
    /// What an idle cluster costs, and an I/O as work grows. Example: cargo run --release -p cairn-benches -- scale
    Scale(ScaleArguments),
    /// The longest I/O when something fails. Example: cargo run --release -p cairn-benches -- stall
    Stall(StallArguments),
    /// What guests feel of a rebuild. Example: cargo run --release -p cairn-benches -- rebuild --size 2G
    Rebuild(RebuildArguments),
    /// The store of one device beside the device itself. Example: cargo run --release -p cairn-benches -- store --rounds 5
    Store(StoreArguments),
    /// Layouts of a commit and ways to flush it, on the device itself.
    Layouts(LayoutArguments),
    /// The store on a device that does nothing: what it costs itself. Prints JSON.
    Spin(SpinArguments),
    /// All that is computed for an I/O, by a client and three nodes in one process, without a kernel. Prints JSON.
    /// Example: cargo run --release -p cairn-benches -- path --instructions
    Path(PathArguments),
}

/// Where a cluster runs that is measured, and of what.
#[derive(clap::Args)]
struct ClusterArguments {
    /// Where the files lie, those of all that it is compared with too; the device under it is what is measured.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The `cairn` program; built in the profile of this one when not given.
    #[arg(long)]
    cairn: Option<PathBuf>,
}

#[derive(clap::Args)]
struct ScaleArguments {
    /// How often every case runs on every cluster; the spread is over the rounds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds per case.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=3600))]
    runtime: u32,
    /// Bytes of the small volume; the large one has a hundred times as many, of which three copies are written twice: that takes
    /// room for six hundred times as many.
    #[arg(long, default_value = "16M")]
    size: ByteSize,
    /// Volumes of the cluster with many.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    volumes: u32,
    /// Only look at an idle cluster.
    #[arg(long)]
    idle: bool,
    #[command(flatten)]
    cluster: ClusterArguments,
}

#[derive(clap::Args)]
struct StallArguments {
    /// Seconds of each run; a fault comes after 3.
    #[arg(long, default_value_t = 18, value_parser = clap::value_parser!(u32).range(5..=3600))]
    runtime: u32,
    /// Only faults whose name contains one of these, separated by commas.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Then Ceph under the same load, with one of its OSDs frozen and killed; takes Debian's packages of Ceph, and root.
    #[arg(long)]
    ceph: bool,
    #[command(flatten)]
    cluster: ClusterArguments,
}

#[derive(clap::Args)]
struct RebuildArguments {
    /// Bytes of the volume.
    #[arg(long, default_value = "2G")]
    size: ByteSize,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=60))]
    runtime: u32,
    /// Without guests while the copies are made anew: how fast it can be.
    #[arg(long)]
    idle: bool,
    #[command(flatten)]
    cluster: ClusterArguments,
}

#[derive(clap::Args)]
struct StoreArguments {
    /// How often every case runs; the spread is over the rounds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds per case.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=3600))]
    runtime: u32,
    /// Bytes of each device (a file, as `512M` or `2G`); two are written in full in each round.
    #[arg(long, default_value = "1G")]
    size: ByteSize,
    /// Where the files lie; the device under it is what is measured.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Only cases whose name contains one of these, separated by commas.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Also write all figures of all rounds to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(clap::Args)]
struct LayoutArguments {
    /// How often every way is measured; the spread is over the rounds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds of each.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=3600))]
    runtime: u32,
    /// Bytes of the file.
    #[arg(long, default_value = "512M")]
    size: ByteSize,
    /// Where the file lies.
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(clap::Args)]
struct SpinArguments {
    /// Write.
    #[arg(long, required_unless_present = "read")]
    write: bool,
    /// Write all of the span once, then read.
    #[arg(long, conflicts_with = "write")]
    read: bool,
    /// In random order.
    #[arg(long)]
    random: bool,
    /// Operations in flight.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    depth: u16,
    /// Blocks of 4096 bytes of one operation.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    blocks: u32,
    /// How many operations; zero to touch all of the span once.
    #[arg(long, default_value_t = 0)]
    count: u64,
    /// Blocks that they are spread over.
    #[arg(long, default_value_t = 1 << 16, value_parser = clap::value_parser!(u64).range(256..))]
    span: u64,
    /// Blocks of the device; twice the span when not given.
    #[arg(long)]
    device_blocks: Option<u64>,
}

#[derive(clap::Args)]
struct PathArguments {
    /// Count instructions and allocations per I/O of a row of cases, with valgrind.
    #[arg(long)]
    instructions: bool,
    /// Write.
    #[arg(long, required_unless_present_any = ["read", "instructions"])]
    write: bool,
    /// Write all of the span once, then read.
    #[arg(long, conflicts_with = "write")]
    read: bool,
    /// Operations in flight.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=256))]
    depth: u16,
    /// Blocks of 4096 bytes of one operation.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    blocks: u32,
    /// How many operations.
    #[arg(long, default_value_t = 100_000)]
    count: u64,
    /// Blocks that they are spread over.
    #[arg(long, default_value_t = 1 << 16, value_parser = clap::value_parser!(u64).range(256..))]
    span: u64,
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
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["cairn", "raw", "raw-dsync3", "qemu-nbd"])]
    targets: Vec<Kind>,
    /// Only cases whose name contains one of these, separated by commas.
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Bytes that the I/O is spread over, as fio writes sizes: written in full once before anything is measured.
    #[arg(long, default_value = "1G")]
    size: String,
    #[command(flatten)]
    cluster: ClusterArguments,
    /// Also write all figures of all rounds to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(clap::Args)]
struct VolumeArguments {
    /// How often every case runs each way; the spread is over the rounds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds per case.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=3600))]
    runtime: u32,
    /// Only cases whose name contains one of these, separated by commas.
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Bytes that the I/O is spread over: written in full before anything is measured.
    #[arg(long, default_value = "1G")]
    size: String,
    #[command(flatten)]
    cluster: ClusterArguments,
    /// Also write all figures of all rounds to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Benches::Fio(arguments) => run_matrix(arguments),
        Benches::Volume(arguments) => run_volume(arguments),
        Benches::Scale(arguments) => scale::run(&ScaleOptions {
            rounds: arguments.rounds,
            runtime_s: arguments.runtime,
            size: arguments.size,
            volumes: arguments.volumes as usize,
            idle_only: arguments.idle,
            dir: arguments.cluster.dir,
            cairn: arguments.cluster.cairn,
        }),
        Benches::Stall(arguments) => stall::run(&StallOptions {
            runtime_s: arguments.runtime,
            only: arguments.only,
            ceph: arguments.ceph,
            dir: arguments.cluster.dir,
            cairn: arguments.cluster.cairn,
        }),
        Benches::Rebuild(arguments) => rebuild::run(&RebuildOptions {
            size: arguments.size,
            runtime_s: arguments.runtime,
            idle: arguments.idle,
            dir: arguments.cluster.dir,
            cairn: arguments.cluster.cairn,
        }),
        Benches::Store(arguments) => store::run(&StoreOptions {
            rounds: arguments.rounds,
            runtime_s: arguments.runtime,
            size: arguments.size,
            dir: arguments.dir,
            only: arguments.only,
            json: arguments.json,
        }),
        Benches::Layouts(arguments) => store::layouts::run(
            arguments.rounds,
            Duration::from_secs(arguments.runtime.into()),
            arguments.size,
            arguments.dir.as_deref(),
        ),
        Benches::Spin(arguments) => run_spin(&arguments),
        Benches::Path(arguments) => run_path(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_matrix(arguments: FioArguments) -> Result<(), String> {
    matrix::run(&MatrixOptions {
        rounds: arguments.rounds,
        runtime_s: arguments.runtime,
        targets: arguments.targets,
        cases: arguments.cases,
        size: arguments.size,
        dir: arguments.cluster.dir,
        cairn: arguments.cluster.cairn,
        json: arguments.json,
    })
}

/// The matrix with these two targets.
fn run_volume(arguments: VolumeArguments) -> Result<(), String> {
    matrix::run(&MatrixOptions {
        rounds: arguments.rounds,
        runtime_s: arguments.runtime,
        targets: vec![Kind::CairnLibrary, Kind::Cairn],
        cases: arguments.cases,
        size: arguments.size,
        dir: arguments.cluster.dir,
        cairn: arguments.cluster.cairn,
        json: arguments.json,
    })
}

fn run_path(arguments: &PathArguments) -> Result<(), String> {
    let figures = match arguments.instructions {
        true => path::count::run()?,
        false => path::run(&PathOptions {
            write: !arguments.read,
            depth: arguments.depth.into(),
            blocks: arguments.blocks,
            count: arguments.count,
            span: arguments.span,
        })?,
    };
    println!("{figures:#}");
    Ok(())
}

fn run_spin(arguments: &SpinArguments) -> Result<(), String> {
    let figures = spin::run(&SpinOptions {
        write: !arguments.read,
        random: arguments.random,
        depth: arguments.depth.into(),
        blocks: arguments.blocks,
        count: arguments.count,
        span: arguments.span,
        device_blocks: arguments.device_blocks.unwrap_or(arguments.span * 2),
    })?;
    println!("{figures:#}");
    Ok(())
}
