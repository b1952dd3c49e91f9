//! Breaking an input: the mutations that decoders trip over.

use crate::rng::Rng;

/// Values at the edges of fields and bounds.
const INTERESTING: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 40,
    u64::MAX,
];

/// No input grows beyond this.
const INPUT_BYTES_MAX: usize = 1 << 20;

/// One of the corpus, broken in one to four places.
pub(super) fn mutated(corpus: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let mut input = pick(corpus, rng).clone();
    for _ in 0..rng.within(1, 4) {
        mutate(&mut input, corpus, rng);
    }
    input.truncate(INPUT_BYTES_MAX);
    input
}

fn pick<'a>(corpus: &'a [Vec<u8>], rng: &mut Rng) -> &'a Vec<u8> {
    &corpus[rng.below(corpus.len() as u64) as usize]
}

fn mutate(input: &mut Vec<u8>, corpus: &[Vec<u8>], rng: &mut Rng) {
    if input.is_empty() {
        input.push(rng.word() as u8);
        return;
    }
    // Headers decide more than content: half of all places are near the start.
    let reach = if rng.below(2) == 0 {
        input.len().min(192)
    } else {
        input.len()
    };
    let at = rng.below(reach as u64) as usize;
    match rng.below(8) {
        0 => input[at] ^= 1 << rng.below(8),
        1 => input[at] = rng.word() as u8,
        2 => overwrite(
            input,
            at,
            &INTERESTING[rng.below(12) as usize].to_le_bytes()[..1 << rng.below(4)],
        ),
        3 => overwrite(
            input,
            at,
            &INTERESTING[rng.below(12) as usize].to_be_bytes()[8 - (1 << rng.below(4))..],
        ),
        4 => input.truncate(at),
        5 => {
            let count = rng.within(1, 64) as usize;
            input.splice(at..at, std::iter::repeat_n(rng.word() as u8, count));
        }
        6 => {
            let end = (at + rng.within(1, 64) as usize).min(input.len());
            input.drain(at..end);
        }
        _ => {
            let other = pick(corpus, rng);
            let from = rng.below(other.len().max(1) as u64) as usize;
            let tail = other[from.min(other.len())..].to_vec();
            overwrite(input, at, &tail);
        }
    }
}

fn overwrite(input: &mut [u8], at: usize, bytes: &[u8]) {
    let count = bytes.len().min(input.len() - at);
    input[at..at + count].copy_from_slice(&bytes[..count]);
}
