//! The `cairn` command: every process of a cluster, and everything that asks about one, in one program.
//!
//! Reading order: `args` (what can be written), `failure` and `output` (what comes back), `context` (which cluster is
//! meant), `commands` (asking), `process` (running one part), `dev` (running all of it).
#![allow(
    clippy::disallowed_methods,
    reason = "the program is the edge: clocks and waiting are its business, the cores below take time as an argument"
)]

mod args;
mod commands;
mod context;
mod dev;
mod failure;
mod limits;
mod output;
mod process;

use std::process::ExitCode;

use clap::Parser as _;

use args::{Cli, Command, MetaCommand, NodeCommand};
use failure::Failure;

/// Messages are decoded, queued and encoded in small pieces of memory, and freed where others are made: what an I/O costs the
/// system's allocator is a tenth of all it costs.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What `--version` prints. A build with planted bugs says so.
pub(crate) const VERSION: &str = if cfg!(feature = "canary") {
    concat!(
        env!("CARGO_PKG_VERSION"),
        " CANARY (a test build with planted bugs: never for data)"
    )
} else {
    env!("CARGO_PKG_VERSION")
};

fn main() -> ExitCode {
    // Usage errors end here, with code 2.
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if cli.global.json {
                eprintln!("{}", failure.to_json());
            } else {
                eprintln!("{failure}");
            }
            ExitCode::from(failure.kind.exit_code())
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    let global = &cli.global;
    match &cli.command {
        Command::Volume(command) => commands::volume::run(global, command),
        Command::Node(args) => match &args.command {
            Some(NodeCommand::Inspect(args)) => commands::device::inspect::run(global, args),
            Some(NodeCommand::Format(args)) => commands::device::format::run(global, args),
            Some(NodeCommand::List) => commands::node::list(global),
            Some(NodeCommand::Show(args)) => commands::node::show(global, args),
            Some(NodeCommand::Scrub(args)) => commands::node::scrub(global, args),
            Some(NodeCommand::Drain(args)) => commands::drain::drain(global, args),
            Some(NodeCommand::Undrain(args)) => commands::drain::undrain(global, args),
            None => process::node::run(global, args),
        },
        Command::Status(args) => commands::status::run(global, args),
        Command::Events(args) => commands::events::run(global, args),
        Command::Completion(args) => commands::completion::run(args),
        Command::Dev(args) => dev::run(global, args),
        Command::Meta(args) => match &args.command {
            Some(MetaCommand::List) => commands::meta::list(global),
            Some(MetaCommand::Remove(args)) => commands::meta::remove(global, args),
            None => process::meta::run(global, args),
        },
        Command::Export(args) => process::export::run(global, args),
    }
}
