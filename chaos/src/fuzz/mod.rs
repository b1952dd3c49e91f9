//! Fuzzing of everything that decodes bytes from outside: well-formed inputs, broken by seed, given to the decoder.
//!
//! A target fails by panicking: on the decoder's own assertions, or on what the target asserts of its answer. One seed
//! gives the same inputs in every run, so `chaos fuzz --target T --seed N` replays a failure.

mod mutate;
mod store;
mod targets;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Every target.
pub fn targets() -> impl Iterator<Item = &'static Target> {
    targets::TARGETS.iter().chain(&store::TARGETS)
}

use crate::rng::Rng;

/// Something that decodes bytes from outside.
pub struct Target {
    /// What it is called.
    pub name: &'static str,
    /// What it decodes.
    pub what: &'static str,
    /// As how many runs one counts: 1 for what decodes a few bytes.
    pub cost: u64,
    /// Well-formed inputs to begin with.
    corpus: fn() -> Vec<Vec<u8>>,
    /// Makes checksums right again, so that a broken field gets past them.
    mend: fn(&mut [u8]),
    /// Decodes; panics on what must not happen.
    run: fn(&[u8]),
}

/// An input that a target did not survive.
#[derive(Debug)]
pub struct Failure {
    /// Which target.
    pub target: &'static str,
    /// The seed of the run.
    pub seed: u64,
    /// Which of its inputs.
    pub input_number: u64,
    /// The input.
    pub input: Vec<u8>,
    /// What it panicked with.
    pub panic: String,
    /// As how many runs one counts.
    pub cost: u64,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failure {
            target,
            seed,
            input_number,
            panic,
            cost,
            ..
        } = self;
        writeln!(
            f,
            "{target} did not survive input {input_number} of seed {seed}: {panic}"
        )?;
        write!(f, "the input, {} bytes in hexadecimal: ", self.input.len())?;
        self.input.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        let runs = (input_number + 1) * cost;
        write!(
            f,
            "\nreplay it: chaos fuzz --target {target} --seed {seed} --runs {runs}"
        )
    }
}

/// Gives a target `runs` inputs of one seed, or fewer if one of them costs as much as many of others.
pub fn fuzz(target: &Target, seed: u64, runs: u64) -> Result<(), Box<Failure>> {
    let corpus = (target.corpus)();
    let mut rng = Rng::stream(seed, target.name);
    for input_number in 0..runs.div_ceil(target.cost) {
        let mut input = mutate::mutated(&corpus, &mut rng);
        if rng.below(4) > 0 {
            (target.mend)(&mut input);
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(&input))) {
            let words = panic.downcast_ref::<String>().cloned();
            let words = words.or_else(|| panic.downcast_ref::<&str>().map(|words| words.to_string()));
            let panic = words.unwrap_or_else(|| "a panic without words".to_string());
            return Err(Box::new(Failure {
                target: target.name,
                seed,
                input_number,
                input,
                panic,
                cost: target.cost,
            }));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_survives_a_few_thousand_inputs() {
        for target in targets() {
            if let Err(failure) = fuzz(target, 1, 4000) {
                panic!("{failure}");
            }
        }
    }

    #[test]
    fn the_inputs_as_they_are_before_they_are_broken_decode() {
        for target in targets() {
            let corpus = (target.corpus)();
            assert!(!corpus.is_empty(), "{} has nothing to begin with", target.name);
            corpus.iter().for_each(|input| (target.run)(input));
        }
    }

    /// A target that panics is found, and the same input again.
    #[test]
    fn a_target_that_panics_is_reported_with_its_input() {
        let planted = Target {
            name: "planted",
            what: "panics on a zero byte in third place",
            cost: 1,
            corpus: || vec![vec![1, 2, 3, 4]],
            mend: |_| (),
            run: |input| assert!(input.get(2) != Some(&0), "a zero in third place"),
        };
        let failure = fuzz(&planted, 7, 10_000).expect_err("the planted bug is found");
        assert_eq!(failure.input[2], 0);
        assert!(failure.panic.contains("a zero in third place"));
        assert_eq!(fuzz(&planted, 7, 10_000).unwrap_err().input, failure.input);
    }
}
