//! `chaos proxy` and `chaos shim`: injectors as processes of their own, told what to do over a control socket.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;

use cairn_chaos::live::inject::control::{self, Control};
use cairn_chaos::live::inject::proxy::Proxy;
use cairn_chaos::live::inject::shim::{self, Shim};
use clap::Args;

#[derive(Args)]
#[command(after_help = "\
Commands, one per line, each answered by one line:
  delay MS [JITTER_MS]           what is forwarded arrives later
  bandwidth BYTES_PER_S          each way of each connection
  drop                           reset all connections now
  half-open                      new connections are accepted, and nothing is forwarded
  black-hole                     nothing is forwarded on any connection; goes on when healed
  silence                        what is connected now falls silent for good
  one-way to-target|to-client    only this direction is forwarded
  reset-after BYTES              each connection is reset after so many more bytes
  corrupt ONE_IN_BYTES           flips a bit of one byte in so many
  refuse                         new connections are refused
  heal                           ends all of them
  status                         what was done so far

Example:
  chaos proxy --listen 127.0.0.1:7502 --to 127.0.0.1:7402 --control /tmp/proxy.sock &
  cairn node --listen 127.0.0.1:7402 --advertise 127.0.0.1:7502 ... &
  chaos tell /tmp/proxy.sock delay 100 20")]
pub(crate) struct ProxyArgs {
    /// Where to listen
    #[arg(long, value_name = "ADDR")]
    listen: SocketAddr,
    /// Where to forward to
    #[arg(long, value_name = "ADDR")]
    to: SocketAddr,
    /// Where commands are taken: a Unix socket
    #[arg(long, value_name = "SOCK")]
    control: PathBuf,
    /// Chooses jitter and flipped bits
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Args)]
#[command(after_help = "\
Needs root, or the program fusermount3.

Commands, one per line, each answered by one line:
  on KIND EFFECT [WHEN] [RANGE]  from now on; KIND is read, write, flush or any; EFFECT is one of
                                   eio, enospc, delay MS [JITTER_MS], stick,
                                   lose (done, says the answer), misdirect, stale (all but a sector), rot (a bit flips);
                                   WHEN is always, once, times N or one-in N; RANGE is FIRST_BYTE..END
  heal                           ends all of that; what is stuck goes on
  power-cut [SEED|lose-all]      unflushed writes are kept, lost or torn; EIO until power-on
  power-on                       ends that
  rot BITS [RANGE]               flips so many bits of what is stored
  wipe                           an empty device from now on
  swap FILE                      another backing file from now on
  settle                         makes durable what was written
  status                         what was done so far
  exit                           settles and ends
  die [SEED|lose-all]            power-cut, and ends: the backing file stays as it is then

Example:
  truncate -s 4G backing && mkdir mount
  chaos shim --backing backing --mount mount --control shim.sock &
  cairn node --device mount/device ... &
  chaos tell shim.sock on flush eio once")]
pub(crate) struct ShimArgs {
    /// What is durable: a file that exists, of whole sectors
    #[arg(long, value_name = "FILE")]
    backing: PathBuf,
    /// Where the file `device` appears: an empty directory
    #[arg(long, value_name = "DIR")]
    mount: PathBuf,
    /// Where commands are taken: a Unix socket
    #[arg(long, value_name = "SOCK")]
    control: PathBuf,
    /// Chooses what is lost, torn, flipped and misdirected
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Args)]
pub(crate) struct TellArgs {
    /// The control socket of a running injector
    #[arg(value_name = "SOCK")]
    control: PathBuf,
    /// The command
    #[arg(required = true, value_name = "WORD")]
    words: Vec<String>,
}

fn fail(doing: &str, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("chaos: {doing}: {error}");
    ExitCode::FAILURE
}

/// Until it is killed.
pub(crate) fn proxy(args: &ProxyArgs) -> ExitCode {
    let proxy = match Proxy::start(args.listen, args.to, args.seed) {
        Ok(proxy) => Arc::new(proxy),
        Err(error) => return fail(&format!("listening at {}", args.listen), &error),
    };
    let obeying = Arc::clone(&proxy);
    let control = Control::serve(&args.control, Arc::new(move |line: &str| obeying.obey(line)));
    match control {
        Ok(_control) => {
            println!("proxy {} to {}", proxy.address(), args.to);
            loop {
                std::thread::park();
            }
        }
        Err(error) => fail(&format!("serving {}", args.control.display()), &error),
    }
}

/// Until it is told to end.
pub(crate) fn shim(args: &ShimArgs) -> ExitCode {
    shim::sweep(&args.mount);
    let shim = match Shim::start(&args.backing, &args.mount, args.seed) {
        Ok(shim) => Arc::new(shim),
        Err(error) => return fail("starting the shim", &error),
    };
    let (end, ended) = channel();
    let obeying = Arc::clone(&shim);
    let obey = move |line: &str| {
        let done = match (line, line.strip_prefix("die")) {
            ("exit", _) => Ok(String::new()),
            (_, Some(seed)) => obeying.obey(&format!("power-cut{seed}")),
            _ => return obeying.obey(line),
        };
        if done.is_ok() {
            // The receiver lives as long as the process.
            let _ = end.send(());
        }
        done
    };
    match Control::serve(&args.control, Arc::new(obey)) {
        Ok(control) => {
            println!("shim {} on {}", shim.device().display(), args.backing.display());
            // An error would mean that nobody can end it any more.
            let _ = ended.recv();
            shim.end();
            drop(control);
            ExitCode::SUCCESS
        }
        Err(error) => fail(&format!("serving {}", args.control.display()), &error),
    }
}

/// One command, its answer on standard output.
pub(crate) fn tell(args: &TellArgs) -> ExitCode {
    let command = args.words.join(" ");
    match control::ask(&args.control, &command) {
        Ok(words) => {
            if !words.is_empty() {
                println!("{words}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => fail(&format!("telling {} to {command}", args.control.display()), &error),
    }
}
