//! The control plane: generated gRPC types and services, the stable codes of its errors, and the tokens with which
//! members and nodes show that they hold the cluster key.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::capability::ClusterKey;

/// Generated from `proto/*.proto`, package `cairn.control.v1`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used,
    clippy::disallowed_types,
    clippy::disallowed_methods
)]
pub mod v1 {
    tonic::include_proto!("cairn.control.v1");
}

/// Metadata key of the stable code that every error carries.
pub const CODE_KEY: &str = "cairn-code";
/// Metadata key of the leader's address, in errors with code [`Code::NotLeader`].
pub const LEADER_KEY: &str = "cairn-leader";
/// Metadata key of the token that calls of members and nodes carry.
pub const TOKEN_KEY: &str = "cairn-token";

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal / $grpc:ident,)*) => {
        /// What went wrong, for programs. The texts are stable.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[$doc])* $name,)*
        }

        impl Code {
            /// The text that travels.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$name => $text,)* }
            }

            /// `None` for a code of a later version.
            pub fn from_text(text: &str) -> Option<Code> {
                match text { $($text => Some(Code::$name),)* _ => None }
            }

            /// The gRPC status code that goes with it.
            pub fn grpc(self) -> tonic::Code {
                match self { $(Code::$name => tonic::Code::$grpc,)* }
            }

            /// Every code of this version.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];
        }
    };
}

codes! {
    /// A field has a value that is not allowed.
    InvalidArgument = "invalid-argument" / InvalidArgument,
    /// A volume's name has other characters than allowed, or too many.
    InvalidName = "invalid-name" / InvalidArgument,
    /// A size is zero, no multiple of 4096, too large, or smaller than now.
    InvalidSize = "invalid-size" / InvalidArgument,
    /// Another volume has the name.
    NameTaken = "name-taken" / AlreadyExists,
    /// There is no such volume.
    VolumeNotFound = "volume-not-found" / NotFound,
    /// The volume is held by a client.
    VolumeAttached = "volume-attached" / FailedPrecondition,
    /// There are too few devices in distinct failure domains.
    NotEnoughDevices = "not-enough-devices" / FailedPrecondition,
    /// A bound of the cluster is reached.
    TooMany = "too-many" / ResourceExhausted,
    /// A newer grant exists.
    StaleGeneration = "stale-generation" / FailedPrecondition,
    /// The group has another configuration by now.
    StaleEpoch = "stale-epoch" / FailedPrecondition,
    /// The proposed configuration breaks a rule of replication.
    InvalidConfiguration = "invalid-configuration" / InvalidArgument,
    /// All generations of the volume are used up.
    GenerationsExhausted = "generations-exhausted" / ResourceExhausted,
    /// A group or device that the call names is not known.
    DeviceNotFound = "device-not-found" / NotFound,
    /// The device is served by another node that is alive.
    DeviceElsewhere = "device-elsewhere" / FailedPrecondition,
    /// A later format of the device is registered, or it was taken out.
    DeviceSuperseded = "device-superseded" / FailedPrecondition,
    /// The device belongs to another cluster.
    ForeignDevice = "foreign-device" / FailedPrecondition,
    /// The node is not registered: register again.
    NodeNotFound = "node-not-found" / NotFound,
    /// Another run of the same node has registered since.
    NodeSuperseded = "node-superseded" / FailedPrecondition,
    /// The member does not lead; the metadata names who does, if known.
    NotLeader = "not-leader" / Unavailable,
    /// Too many proposals are in flight: try again.
    Busy = "busy" / Unavailable,
    /// No answer in time. A change may have been made or not.
    Timeout = "timeout" / DeadlineExceeded,
    /// The cluster has not been initialised yet: try again.
    NotReady = "not-ready" / Unavailable,
    /// The member id was used before, or is not allowed.
    InvalidMember = "invalid-member" / InvalidArgument,
    /// Without the member too few of the others would answer.
    MemberNeeded = "member-needed" / FailedPrecondition,
    /// Another change of members is not finished yet: try again.
    MemberChangePending = "member-change-pending" / Unavailable,
    /// The call has no valid token.
    Unauthenticated = "unauthenticated" / Unauthenticated,
    /// The caller belongs to another cluster.
    ForeignCluster = "foreign-cluster" / FailedPrecondition,
    /// The process or the cluster is too old for this.
    FeatureLevel = "feature-level" / FailedPrecondition,
    /// The member has stopped because its own log or state can't be used.
    Internal = "internal" / Internal,
    /// No metadata server could be reached.
    Unreachable = "unreachable" / Unavailable,
}

/// What a token is good for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TokenPurpose {
    /// Service `Members`.
    Member,
    /// Service `Nodes`.
    Node,
}

impl TokenPurpose {
    fn label(self) -> &'static [u8] {
        match self {
            TokenPurpose::Member => b"cairn-rpc-1 member",
            TokenPurpose::Node => b"cairn-rpc-1 node",
        }
    }

    fn mac(self, key: &ClusterKey) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&key.0).expect("HMAC takes keys of any length");
        mac.update(self.label());
        mac
    }

    /// The token, 64 hexadecimal digits: derived from the cluster key, which it does not tell.
    pub fn token(self, key: &ClusterKey) -> String {
        let bytes = self.mac(key).finalize().into_bytes();
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether the token is right. Takes the same time for every wrong one of the right length.
    pub fn verify(self, key: &ClusterKey, token: &str) -> bool {
        let digits = token.as_bytes();
        if digits.len() != 64 {
            return false;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |c: u8| (c as char).to_digit(16);
            match (digit(pair[0]), digit(pair[1])) {
                (Some(high), Some(low)) => *byte = (high * 16 + low) as u8,
                _ => return false,
            }
        }
        self.mac(key).verify_slice(&bytes).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_round_trip() {
        for code in Code::ALL {
            assert_eq!(Code::from_text(code.as_str()), Some(*code));
        }
        assert_eq!(Code::from_text("of a later version"), None);
    }

    #[test]
    fn a_token_is_good_for_one_key_and_one_purpose() {
        let key = ClusterKey([7; 32]);
        let token = TokenPurpose::Node.token(&key);
        assert!(TokenPurpose::Node.verify(&key, &token));
        assert!(!TokenPurpose::Member.verify(&key, &token));
        assert!(!TokenPurpose::Node.verify(&ClusterKey([8; 32]), &token));
        assert!(!TokenPurpose::Node.verify(&key, ""));
        assert!(!TokenPurpose::Node.verify(&key, &"é".repeat(32)));
    }
}
