//! What the device may still have in its cache alone: whether a write that is durable by itself is all that a commit needs.

use cairn_proto::collections::Map;

/// Counts the writes that only a flush makes durable. A flush covers those that had ended when it was given to the device; it is
/// believed to cover all, or else nothing.
#[derive(Debug, Default)]
pub(super) struct Unflushed {
    /// Writes given to the device so far.
    begun: u64,
    in_flight: u64,
    /// So many of the first of them are known to be durable.
    durable: u64,
    /// By the token of a flush in flight, how many it covers.
    flushes: Map<u64, u64>,
}

impl Unflushed {
    pub(super) fn write_begun(&mut self) {
        self.begun += 1;
        self.in_flight += 1;
    }

    /// However it ended.
    pub(super) fn write_ended(&mut self) {
        self.in_flight -= 1;
    }

    pub(super) fn flush_begun(&mut self, token: u64) {
        if self.in_flight == 0 {
            self.flushes.insert(token, self.begun);
        }
    }

    /// A flush ended; one that failed has covered nothing.
    pub(super) fn flush_ended(&mut self, token: u64, is_good: bool) {
        if let Some(covered) = self.flushes.remove(&token)
            && is_good
        {
            self.durable = self.durable.max(covered);
        }
    }

    /// Whether every write so far is durable.
    pub(super) fn is_none(&self) -> bool {
        self.durable == self.begun
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_had_ended_before_it_and_nothing_else() {
        let mut unflushed = Unflushed::default();
        assert!(unflushed.is_none());
        unflushed.write_begun();
        assert!(!unflushed.is_none());
        // In flight when the flush begins: not covered.
        unflushed.flush_begun(1);
        unflushed.write_ended();
        unflushed.flush_ended(1, true);
        assert!(!unflushed.is_none());
        // One that fails covers nothing.
        unflushed.flush_begun(2);
        unflushed.flush_ended(2, false);
        assert!(!unflushed.is_none());
        // A write that comes after the flush began is not covered.
        unflushed.flush_begun(3);
        unflushed.write_begun();
        unflushed.flush_ended(3, true);
        assert!(!unflushed.is_none());
        unflushed.write_ended();
        unflushed.flush_begun(4);
        unflushed.flush_ended(4, true);
        assert!(unflushed.is_none());
    }
}
