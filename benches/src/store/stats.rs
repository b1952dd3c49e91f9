//! Latencies of one run, and the spread of figures over the rounds.

use std::time::Duration;

/// Latencies kept per run at the most; beyond it every second one is dropped, again and again.
const SAMPLES_MAX: usize = 1 << 20;

/// Latencies of operations, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Latencies {
    samples: Vec<u64>,
    /// One of so many is kept.
    stride: u64,
    seen: u64,
    sum: u128,
}

impl Default for Latencies {
    fn default() -> Latencies {
        Latencies {
            samples: Vec::new(),
            stride: 1,
            seen: 0,
            sum: 0,
        }
    }
}

impl Latencies {
    /// Notes one.
    pub fn add(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        if self.seen.is_multiple_of(self.stride) {
            self.samples.push(nanos);
        }
        self.seen += 1;
        self.sum += u128::from(nanos);
        if self.samples.len() >= SAMPLES_MAX {
            let mut keep = false;
            self.samples.retain(|_| {
                keep = !keep;
                keep
            });
            self.stride *= 2;
        }
    }

    /// How many were noted.
    pub fn count(&self) -> u64 {
        self.seen
    }

    /// The mean, in microseconds; zero if there are none.
    pub fn mean_us(&self) -> f64 {
        self.sum as f64 / self.seen.max(1) as f64 / 1e3
    }

    /// These quantiles (0 to 1), in microseconds.
    pub fn quantiles_us<const N: usize>(&self, quantiles: [f64; N]) -> [f64; N] {
        let mut sorted = self.samples.clone();
        sorted.sort_unstable();
        quantiles.map(|quantile| {
            let last = sorted.len().saturating_sub(1);
            let at = (last as f64 * quantile).round() as usize;
            sorted.get(at).map_or(0.0, |nanos| *nanos as f64 / 1e3)
        })
    }
}

/// Lowest, middle and highest of the rounds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Spread {
    /// The lowest.
    pub lowest: f64,
    /// The middle one; the mean of the two middle ones if their number is even. Not a number if there are none.
    pub median: f64,
    /// The highest.
    pub highest: f64,
}

impl Spread {
    /// Of these values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let last = values.len().saturating_sub(1);
        Spread {
            lowest: at(0),
            median: (at(last / 2) + at(values.len() / 2)) / 2.0,
            highest: at(last),
        }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = format!("{:.2} ({:.2}–{:.2})", self.median, self.lowest, self.highest);
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lies_in_the_middle_of_odd_and_even_counts() {
        let spread = Spread::of([3.0, 1.0, 2.0]);
        assert_eq!((spread.lowest, spread.median, spread.highest), (1.0, 2.0, 3.0));
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert!(Spread::of([]).median.is_nan());
    }

    #[test]
    fn quantiles_stay_right_when_samples_are_thinned_out() {
        let mut latencies = Latencies::default();
        let count = 3 * SAMPLES_MAX as u64;
        (0..count).for_each(|i| latencies.add(Duration::from_nanos(i)));
        assert_eq!(latencies.count(), count);
        let [p50, p99] = latencies.quantiles_us([0.5, 0.99]);
        let close = |found: f64, expected: f64| (found / expected - 1.0).abs() < 0.01;
        assert!(close(p50 * 1e3, count as f64 * 0.5), "{p50}");
        assert!(close(p99 * 1e3, count as f64 * 0.99), "{p99}");
        assert!(close(latencies.mean_us() * 1e3, count as f64 * 0.5));
        assert!(latencies.samples.len() < SAMPLES_MAX);
    }
}
