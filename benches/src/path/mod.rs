//! All that is computed for an I/O, in one process: the client's core, the hosts and stores of three nodes, and every frame between
//! them encoded and decoded, on devices that do nothing. What is left out is what the kernel does, and the drivers' loops.
//!
//! Reading order: [`cluster`] puts the parts together, [`count`] runs them under valgrind.

pub mod cluster;
pub mod count;

use serde_json::{Value, json};

use self::cluster::Cluster;
use crate::store::work::{self, Load, Stop};

/// What to do.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PathOptions {
    /// Write, or write all of the span once and then read.
    pub write: bool,
    /// Operations in flight.
    pub depth: usize,
    /// Blocks of one operation.
    pub blocks: u32,
    /// How many operations, at random places.
    pub count: u64,
    /// Blocks that they are spread over.
    pub span: u64,
}

/// Runs it.
///
/// # Errors
/// An operation failed, in words.
pub fn run(options: &PathOptions) -> Result<Value, String> {
    let mut cluster = Cluster::start(options.span)?;
    let load = Load {
        write: options.write,
        random: true,
        blocks: options.blocks,
        depth: options.depth,
        span: options.span,
        stop: Stop::Operations(options.count),
    };
    // All that is read, or written again, was written once.
    let fill = Load {
        write: true,
        random: false,
        blocks: 64,
        depth: 8,
        stop: Stop::Once,
        ..load
    };
    work::run(&mut cluster, &fill, 0)?;
    let frames = cluster.frames();
    let figures = work::run(&mut cluster, &load, 1)?;
    let ops = figures.ops.max(1) as f64;
    Ok(json!({
        "ops": figures.ops,
        "cpu_us_per_op": figures.cpu_us_per_op,
        "frames_per_op": (cluster.frames() - frames) as f64 / ops,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_three_requests_and_three_answers_and_a_read_one_of_each() {
        for (write, frames) in [(true, 6.0), (false, 2.0)] {
            let options = PathOptions {
                write,
                depth: 4,
                blocks: 1,
                count: 500,
                span: 1024,
            };
            let found = run(&options).expect("it runs");
            assert_eq!(found["ops"], 500);
            // Beside them only signs of life, now and then.
            let found = found["frames_per_op"].as_f64().expect("a number");
            assert!((frames..frames + 0.5).contains(&found), "{found} frames");
        }
    }
}
