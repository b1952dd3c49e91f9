//! A device as one attachment sees it: whether it can be spoken to, how fast it is, and how long it lets us read.

use std::time::Duration;

use super::api::RequestId;
use super::limits::ReplicationLimits;
use crate::ids::{CommitSeq, DeviceId};
use crate::time::Time;

/// A device that is a member of at least one group of the volume.
pub(super) struct Member {
    pub(super) device: DeviceId,
    /// The groups it is a member of, and its place in each.
    pub(super) groups: Vec<(usize, usize)>,
    pub(super) connected: bool,
    /// Since when its connection stands, or is over.
    pub(super) since: Time,
    /// Whether the last attempt to connect failed at once.
    pub(super) refused: bool,
    /// Whether it has made our generation durable, as confirmed on the connection that stands.
    pub(super) sealed: bool,
    /// The highest commit sequence that was seen of it.
    pub(super) commit: CommitSeq,
    /// What it recovered at its start, as said by its last hello.
    pub(super) recovered: Option<CommitSeq>,
    /// We may read by its grant until then (rule 8).
    pub(super) grant_until: Time,
    /// Where others reach it, as said for the connection that stands or an earlier one.
    pub(super) address: Option<String>,
    /// Whether it can read from others, as said for the connection that stands.
    pub(super) can_fetch: bool,
    /// The latest request that it answered as one who is at our generation.
    pub(super) confirmed: Option<RequestId>,
    /// The question whether it still is, if one is on its way.
    pub(super) confirming: Option<RequestId>,
    /// When to try again what it refused.
    pub(super) retry_at: Option<Time>,
    /// Of reads.
    pub(super) latency: Latency,
    /// Of writes.
    pub(super) write_latency: Latency,
    /// When it last answered one.
    pub(super) write_sampled: Option<Time>,
}

impl Member {
    pub(super) fn new(device: DeviceId, now: Time) -> Member {
        Member {
            device,
            groups: Vec::new(),
            connected: false,
            since: now,
            refused: false,
            sealed: false,
            commit: CommitSeq(0),
            recovered: None,
            grant_until: Time::ZERO,
            address: None,
            can_fetch: false,
            confirmed: None,
            confirming: None,
            retry_at: None,
            latency: Latency::default(),
            write_latency: Latency::default(),
            write_sampled: None,
        }
    }

    /// Notes what a hello says. `Some(expected)` if the device has forgotten something that it had acknowledged.
    ///
    /// A device that has started anew must have recovered everything it ever answered with; one that has not can't have
    /// gone back. Only comparing its commit sequence now would miss one that forgot and has committed for others since.
    pub(super) fn hello(&mut self, commit: CommitSeq, recovered: CommitSeq) -> Option<CommitSeq> {
        let expected = self.commit;
        let has = match self.recovered {
            Some(before) if before != recovered => recovered,
            _ => commit,
        };
        self.recovered = Some(recovered);
        if has < expected {
            self.commit = commit;
            return Some(expected);
        }
        self.commit = commit.max(expected);
        None
    }

    pub(super) fn saw_commit(&mut self, commit: CommitSeq) {
        self.commit = self.commit.max(commit);
    }

    /// Whether a read that began with this request number may count on the member (rule 17).
    pub(super) fn vouches(&self, now: Time, began: RequestId) -> bool {
        self.has_grant(now) || self.confirmed.is_some_and(|confirmed| confirmed >= began)
    }

    pub(super) fn has_grant(&self, now: Time) -> bool {
        self.grant_until > now
    }
}

/// How long a member takes to answer reads.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Latency {
    mean_ns: u64,
    deviation_ns: u64,
}

impl Latency {
    pub(super) fn sample(&mut self, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX / 16);
        if self.mean_ns == 0 {
            (self.mean_ns, self.deviation_ns) = (took, took / 2);
            return;
        }
        let off = took.abs_diff(self.mean_ns);
        self.deviation_ns = self.deviation_ns - self.deviation_ns / 4 + off / 4;
        self.mean_ns = self.mean_ns - self.mean_ns / 8 + took / 8;
    }

    /// It has not answered for that long.
    pub(super) fn silent_for(&mut self, span: Duration) {
        self.mean_ns = self
            .mean_ns
            .max(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX / 16));
    }

    /// Whether anything was measured.
    pub(super) fn is_known(&self) -> bool {
        self.mean_ns > 0
    }

    /// By what members are ordered, fastest first.
    pub(super) fn expected_ns(&self) -> u64 {
        self.mean_ns
    }

    /// After what time without an answer another member is asked.
    pub(super) fn hedge_after(&self, limits: &ReplicationLimits) -> Duration {
        if self.mean_ns == 0 {
            return limits.hedge_max;
        }
        let usual = Duration::from_nanos(self.mean_ns.saturating_add(self.deviation_ns.saturating_mul(4)));
        usual.clamp(limits.hedge_min, limits.hedge_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_forgot_is_noticed_even_if_it_has_committed_for_others_since() {
        let mut member = Member::new(DeviceId::default(), Time::ZERO);
        assert_eq!(member.hello(CommitSeq(40), CommitSeq(10)), None);
        member.saw_commit(CommitSeq(100));
        assert_eq!(
            member.hello(CommitSeq(120), CommitSeq(10)),
            None,
            "it has not restarted"
        );
        assert_eq!(
            member.hello(CommitSeq(125), CommitSeq(120)),
            None,
            "it recovered everything"
        );
        assert_eq!(
            member.hello(CommitSeq(200), CommitSeq(90)),
            Some(CommitSeq(125)),
            "it recovered less than it had answered with"
        );
        assert_eq!(member.hello(CommitSeq(150), CommitSeq(90)), Some(CommitSeq(200)));
    }

    #[test]
    fn hedging_follows_what_was_measured() {
        let limits = ReplicationLimits::DEFAULT;
        let mut latency = Latency::default();
        assert_eq!(latency.hedge_after(&limits), limits.hedge_max);
        for _ in 0..100 {
            latency.sample(Duration::from_millis(10));
        }
        assert!(latency.hedge_after(&limits) < Duration::from_millis(15));
        latency.silent_for(Duration::from_secs(5));
        assert_eq!(latency.hedge_after(&limits), limits.hedge_max);
    }
}
