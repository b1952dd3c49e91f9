//! Seeded randomness of the simulator's own: xoshiro256** (Blackman and Vigna), its state filled by SplitMix64. Part of
//! what makes a seed replayable: it never changes, whatever crates are updated.

use std::time::Duration;

/// A stream of numbers that depends on its seed alone.
#[derive(Clone, Debug)]
pub struct Rng {
    state: [u64; 4],
}

/// One step of SplitMix64: also a good mixer of one word.
pub fn mix(word: u64) -> u64 {
    let mut z = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rng {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Rng {
        let mut word = seed;
        let state = std::array::from_fn(|_| {
            let out = mix(word);
            word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
            out
        });
        Rng { state }
    }

    /// A stream of its own for one purpose, so that drawing more for one leaves the others as they are.
    pub fn stream(seed: u64, purpose: &str) -> Rng {
        let label = purpose
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| mix(hash ^ u64::from(byte)));
        Rng::new(mix(seed) ^ label)
    }

    /// 64 random bits.
    pub fn word(&mut self) -> u64 {
        let s = &mut self.state;
        let out = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        out
    }

    /// Below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "nothing is below zero");
        ((u128::from(self.word()) * u128::from(bound)) >> 64) as u64
    }

    /// Within `low ..= high`.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        assert!(low <= high, "{low} ..= {high}");
        low + self.below((high - low).saturating_add(1))
    }

    /// True in `part` of `whole` cases.
    pub fn chance(&mut self, part: u64, whole: u64) -> bool {
        self.below(whole) < part
    }

    /// True in this many of a thousand cases.
    pub fn permille(&mut self, part: u32) -> bool {
        self.chance(part.into(), 1000)
    }

    /// One of them.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    /// An index below `len`, which is not zero.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// An index, drawn by weight. At least one weight is above zero.
    pub fn weighted(&mut self, weights: &[u32]) -> usize {
        let total: u64 = weights.iter().map(|w| u64::from(*w)).sum();
        let mut left = self.below(total);
        for (i, weight) in weights.iter().enumerate() {
            let weight = u64::from(*weight);
            if left < weight {
                return i;
            }
            left -= weight;
        }
        unreachable!("{left} left of {total}")
    }

    /// A span within `low ..= high`.
    pub fn span(&mut self, low: Duration, high: Duration) -> Duration {
        let nanos = |span: Duration| u64::try_from(span.as_nanos()).expect("spans are short");
        Duration::from_nanos(self.within(nanos(low), nanos(high)))
    }

    /// A span around `mean`: mostly below it, sometimes several times as long.
    pub fn spread(&mut self, mean: Duration) -> Duration {
        let nanos = u64::try_from(mean.as_nanos()).expect("spans are short");
        let factor = match self.below(100) {
            0..=69 => self.within(30, 100),
            70..=97 => self.within(100, 250),
            _ => self.within(250, 2000),
        };
        Duration::from_nanos(nanos / 100 * factor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_of_a_seed_never_changes() {
        let mut rng = Rng::new(1);
        let first: Vec<u64> = (0..3).map(|_| rng.word()).collect();
        assert_eq!(
            first,
            [12966619160104079557, 9600361134598540522, 10590380919521690900],
            "else no seed that was ever noted down can be replayed"
        );
    }

    #[test]
    fn draws_stay_within_their_bounds() {
        let mut rng = Rng::stream(7, "bounds");
        for _ in 0..1000 {
            assert!(rng.below(3) < 3);
            assert!((5..=9).contains(&rng.within(5, 9)));
            assert_ne!(rng.weighted(&[1, 0, 2]), 1);
        }
    }

    #[test]
    fn streams_of_one_seed_differ() {
        assert_ne!(Rng::stream(7, "disk").word(), Rng::stream(7, "network").word());
    }
}
