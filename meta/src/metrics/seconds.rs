//! A histogram of durations for the data path. It belongs to one thread, which counts in plain integers and publishes them
//! now and then: a histogram of the recorder keeps every sample with its time until somebody folds it in, which for a million of
//! them each second is more memory and time than what they measure.

use std::time::Duration;

use metrics::{Counter, Gauge, Label, counter, gauge};

use super::SECONDS_BUCKETS;

/// Durations by size, published as the series of a Prometheus histogram: `NAME_bucket` by `le`, `NAME_sum` in seconds and `NAME_count`.
/// Several of one name and with the same labels, of several threads or one after the other, are added up.
pub struct Seconds {
    /// Not published yet: those of each bucket alone; the last one is without a bound.
    counts: [u64; SECONDS_BUCKETS.len() + 1],
    sum: Duration,
    buckets: [Counter; SECONDS_BUCKETS.len() + 1],
    published_sum: Gauge,
    published_count: Counter,
}

impl Seconds {
    /// An empty one, under this name, which should end in `_seconds`.
    pub fn new(name: &'static str, labels: Vec<Label>) -> Seconds {
        let part = |suffix: &str| format!("{name}_{suffix}");
        let bucket = |index: usize| {
            let bound = SECONDS_BUCKETS.get(index).map_or("+Inf".to_string(), f64::to_string);
            let labels = labels.iter().cloned().chain([Label::new("le", bound)]);
            counter!(part("bucket"), labels.collect::<Vec<_>>())
        };
        Seconds {
            counts: [0; SECONDS_BUCKETS.len() + 1],
            sum: Duration::ZERO,
            buckets: std::array::from_fn(bucket),
            published_sum: gauge!(part("sum"), labels.clone()),
            published_count: counter!(part("count"), labels),
        }
    }

    /// Counts one.
    pub fn record(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = SECONDS_BUCKETS.partition_point(|bound| *bound < seconds);
        self.counts[bucket] += 1;
        self.sum = self.sum.saturating_add(took);
    }

    /// Makes what was counted visible to whoever asks for metrics.
    pub fn publish(&mut self) {
        let mut so_far = 0;
        for (count, published) in self.counts.iter_mut().zip(&self.buckets) {
            so_far += std::mem::take(count);
            if so_far > 0 {
                published.increment(so_far);
            }
        }
        if so_far > 0 {
            self.published_count.increment(so_far);
            self.published_sum
                .increment(std::mem::take(&mut self.sum).as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    #[test]
    fn what_was_counted_is_published_as_a_histogram_with_cumulative_buckets() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            // Two threads, and one of them again.
            let of_thread = || Seconds::new("cairn_test_seconds", vec![Label::new("op", "read")]);
            let (mut one, mut other) = (of_thread(), of_thread());
            for micros in [3, 10, 11] {
                one.record(Duration::from_micros(micros));
            }
            other.record(Duration::from_micros(90));
            one.publish();
            other.publish();
            one.record(Duration::from_secs(7));
            one.publish();
            other.publish();
        });
        let text = handle.render();
        for line in [
            "cairn_test_seconds_bucket{op=\"read\",le=\"0.00001\"} 2",
            "cairn_test_seconds_bucket{op=\"read\",le=\"0.000025\"} 3",
            "cairn_test_seconds_bucket{op=\"read\",le=\"0.0001\"} 4",
            "cairn_test_seconds_bucket{op=\"read\",le=\"5\"} 4",
            "cairn_test_seconds_bucket{op=\"read\",le=\"+Inf\"} 5",
            "cairn_test_seconds_count{op=\"read\"} 5",
            "cairn_test_seconds_sum{op=\"read\"} 7.000114",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
