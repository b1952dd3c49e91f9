//! Planted bugs that real processes are tried with: the scenario that must find each within a bounded time, and must find nothing
//! in a sound program. The program is a build with the feature `canary`, told by its environment which bug it has, or that it has none.

use std::time::Duration;

use super::report::FailureKind;
use super::scenario::{Plan, Scenario};

/// Names the planted bug of a process, see `cairn_client::planted`.
pub const VARIABLE: &str = "CAIRN_PLANTED";
/// What the same program is told that has none, see `cairn_client::planted`.
pub const NONE: &str = "none";

/// A bug, and what finds it.
#[derive(Clone, Copy, Debug)]
pub struct Hunt {
    /// The bug, as the product calls it.
    pub bug: &'static str,
    /// Whose bug it would be.
    pub component: &'static str,
    /// The faults that bring it out, drawn at random.
    pub faults: &'static [&'static str],
    /// How it may show.
    pub shows_as: &'static [FailureKind],
}

/// For how long a bug is hunted at the most.
pub const BOUND: Duration = Duration::from_secs(240);
/// For how long a sound program is tried with the same.
pub const SOUND: Duration = Duration::from_secs(90);

/// All of them.
pub const HUNTS: &[Hunt] = &[
    Hunt {
        bug: "ack-before-flush",
        component: "store",
        faults: &["power-cut-lose-all"],
        shows_as: &[FailureKind::Data],
    },
    Hunt {
        bug: "generation-ignored",
        component: "host",
        faults: &["zombie"],
        shows_as: &[FailureKind::Data],
    },
    Hunt {
        bug: "skip-reconcile",
        component: "coordinator",
        faults: &["take-over-again", "kill-all", "power-cut"],
        shows_as: &[FailureKind::Data],
    },
    Hunt {
        bug: "checksum-unverified",
        component: "host",
        faults: &["corrupt-all"],
        shows_as: &[FailureKind::GuestError, FailureKind::Data, FailureKind::Unhealed],
    },
    Hunt {
        bug: "answer-unverified",
        component: "coordinator",
        faults: &["corrupt-node"],
        shows_as: &[FailureKind::Data],
    },
];

impl Hunt {
    /// The hunt for this bug.
    pub fn of(bug: &str) -> Option<&'static Hunt> {
        HUNTS.iter().find(|hunt| hunt.bug == bug)
    }

    /// What is played, for so long.
    pub fn plan(&self, span: Duration) -> Plan {
        Plan {
            scenario: Scenario::Random,
            only: self.faults.iter().map(ToString::to_string).collect(),
            span: Some(span),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::scenario::chosen;

    #[test]
    fn every_hunt_has_faults_that_exist() {
        for hunt in HUNTS {
            let faults = chosen(&hunt.plan(BOUND).only).map(|faults| faults.len());
            assert!(faults.is_ok_and(|count| count >= hunt.faults.len()), "{}", hunt.bug);
        }
    }

    #[cfg(feature = "canary")]
    #[test]
    fn every_bug_exists_in_the_product() {
        for hunt in HUNTS {
            let planted = cairn_client::planted::named(hunt.bug);
            assert_eq!(planted.map(|bug| bug.component()), Ok(hunt.component));
        }
        assert_eq!(VARIABLE, cairn_client::planted::VARIABLE);
        assert_eq!(NONE, cairn_client::planted::NONE);
    }
}
