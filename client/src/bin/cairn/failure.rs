//! Why a command failed: what a person reads, and the exit code that a program reads.

use std::fmt;

use cairn_client::config::ConfigError;
use cairn_meta::client::ClientError;
use cairn_proto::control::Code;
use serde_json::json;

/// Kinds of failure. The numbers and texts are stable: programs rely on them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Anything else.
    Failed = 1,
    /// The command line or the configuration file is wrong.
    Usage = 2,
    /// There is no such thing.
    NotFound = 3,
    /// There is one already.
    Exists = 4,
    /// Nobody who could do it answered in time.
    Unreachable = 5,
    /// It can't be done as things are now.
    Refused = 6,
    /// A port, socket or directory is used by another process.
    Occupied = 7,
    /// The cluster answered, and it is not well.
    Unhealthy = 8,
    /// A device was read, and something on it is damaged.
    Damaged = 9,
}

impl Kind {
    /// The exit code.
    pub(crate) fn exit_code(self) -> u8 {
        self as u8
    }

    /// The name in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Failed => "failed",
            Kind::Usage => "usage",
            Kind::NotFound => "not_found",
            Kind::Exists => "exists",
            Kind::Unreachable => "unreachable",
            Kind::Refused => "refused",
            Kind::Occupied => "occupied",
            Kind::Unhealthy => "unhealthy",
            Kind::Damaged => "damaged",
        }
    }
}

/// Why a command failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Failure {
    /// For programs.
    pub(crate) kind: Kind,
    /// What failed, and on what.
    pub(crate) what: String,
    /// What to do next.
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(kind: Kind, what: impl Into<String>) -> Failure {
        Failure {
            kind,
            what: what.into(),
            hint: None,
        }
    }

    pub(crate) fn usage(what: impl Into<String>) -> Failure {
        Failure::new(Kind::Usage, what)
    }

    pub(crate) fn failed(what: impl Into<String>) -> Failure {
        Failure::new(Kind::Failed, what)
    }

    /// With what to do next.
    pub(crate) fn hint(self, hint: impl Into<String>) -> Failure {
        Failure {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// What the metadata servers said, or that they said nothing; `endpoints` are those that were asked.
    pub(crate) fn of_meta(doing: &str, endpoints: &[String], error: &ClientError) -> Failure {
        let kind = kind_of(error.code);
        let tried = endpoints.join(", ");
        match error.code {
            Code::Unreachable => Failure::new(kind, format!("can't {doing}: no metadata server answers ({tried})"))
                .hint(format!("{}\n  {OTHER_CLUSTER}", error.message)),
            Code::Timeout | Code::NotReady | Code::NotLeader | Code::Busy => {
                let unknown = if error.outcome_unknown {
                    "; it may have been done all the same: look before you ask again"
                } else {
                    ""
                };
                Failure::new(
                    kind,
                    format!("can't {doing}: the metadata servers ({tried}) have not done it in time{unknown}"),
                )
                .hint(match error.code {
                    Code::NotLeader | Code::NotReady => format!("They have no leader: {MAJORITY}"),
                    _ => format!("{}\n  `cairn status` shows who is missing.", error.message),
                })
            }
            _ => Failure::new(kind, format!("can't {doing}: {error}")),
        }
    }

    /// As an object for programs.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        json!({ "error": { "kind": self.kind.name(), "message": self.what, "hint": self.hint } })
    }
}

/// What the metadata servers need to decide anything.
const MAJORITY: &str = "a majority of them must run and reach each other, `cairn status` shows who is missing. \
                                   Volumes that are in use go on meanwhile.";
const OTHER_CLUSTER: &str = "Is the cluster running? `cairn dev` starts one here; --meta or --config name another one.";

fn kind_of(code: Code) -> Kind {
    match code {
        Code::InvalidArgument | Code::InvalidName | Code::InvalidSize | Code::InvalidMember => Kind::Usage,
        Code::VolumeNotFound | Code::DeviceNotFound | Code::NodeNotFound => Kind::NotFound,
        Code::NameTaken => Kind::Exists,
        Code::Unreachable | Code::Timeout | Code::NotLeader | Code::NotReady | Code::Busy => Kind::Unreachable,
        Code::VolumeAttached
        | Code::NotEnoughDevices
        | Code::TooMany
        | Code::StaleGeneration
        | Code::StaleEpoch
        | Code::DeviceElsewhere
        | Code::DeviceSuperseded
        | Code::ForeignDevice
        | Code::NodeSuperseded
        | Code::MemberChangePending
        | Code::MemberNeeded
        | Code::Unauthenticated
        | Code::ForeignCluster
        | Code::FeatureLevel => Kind::Refused,
        _ => Kind::Failed,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cairn: {}", self.what)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Failure {
        Failure::usage(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_meta_says_becomes_a_kind_and_words() {
        let error = |code, message: &str| ClientError {
            code,
            message: message.to_string(),
            outcome_unknown: false,
        };
        let endpoints = ["a:1".to_string(), "b:2".to_string()];
        let failure = Failure::of_meta(
            "create volume `demo`",
            &endpoints,
            &error(Code::NameTaken, "another volume is named `demo`: choose another name"),
        );
        assert_eq!(failure.kind.exit_code(), 4);
        assert_eq!(
            failure.to_string(),
            "cairn: can't create volume `demo`: another volume is named `demo`: choose another name"
        );
        let failure = Failure::of_meta("list volumes", &endpoints, &error(Code::Unreachable, "no one answers."));
        assert_eq!(failure.kind.exit_code(), 5);
        let text = failure.to_string();
        assert!(
            text.starts_with("cairn: can't list volumes: no metadata server answers (a:1, b:2)\n  no one answers.")
        );
        assert_eq!(failure.to_json()["error"]["kind"], "unreachable");
    }

    #[test]
    fn every_kind_has_its_own_code_and_name() {
        use Kind::*;
        let kinds = [
            Failed,
            Usage,
            NotFound,
            Exists,
            Unreachable,
            Refused,
            Occupied,
            Unhealthy,
            Damaged,
        ];
        for (i, kind) in kinds.iter().enumerate() {
            assert_eq!(usize::from(kind.exit_code()), i + 1);
            assert!(kinds.iter().all(|other| other == kind || other.name() != kind.name()));
        }
    }
}
