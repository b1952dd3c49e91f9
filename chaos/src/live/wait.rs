//! Waiting for a condition, never longer than a bound.

use std::time::{Duration, Instant};

/// How often a condition is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Calls `condition` until it gives a value; `None` when it has not within `bound`. It is called at least once.
pub fn wait_for<T>(bound: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + bound;
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Whether `condition` has become true within `bound`.
pub fn wait_until(bound: Duration, mut condition: impl FnMut() -> bool) -> bool {
    wait_for(bound, || condition().then_some(())).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_the_condition_or_the_bound() {
        let mut calls = 0;
        let third = wait_for(Duration::from_secs(10), || {
            calls += 1;
            (calls == 3).then_some(calls)
        });
        assert_eq!(third, Some(3));
        assert!(!wait_until(Duration::ZERO, || false));
    }
}
