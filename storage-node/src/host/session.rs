//! What the host knows of a connection.

use std::collections::BTreeMap;

use cairn_proto::capability::{Capability, Rights};
use cairn_proto::ids::{ClientId, Generation, VolumeId};
use cairn_proto::message::{Hello, Holder, Purpose};
use cairn_proto::time::Time;

/// A connection that stands.
pub(super) struct Connection {
    /// When it was made.
    pub(super) since: Time,
    /// When something came from it last.
    pub(super) heard: Time,
    /// Who it is; `None` before its hello.
    pub(super) peer: Option<Peer>,
    /// Requests without an answer.
    pub(super) requests: u32,
    /// Bytes of data in those.
    pub(super) bytes: u64,
    /// Requests that were refused because there were too many, since the last that was not.
    pub(super) refused: u32,
    /// Its answers do not get out as fast as they are made: its requests wait.
    pub(super) congested: bool,
    /// Capabilities that it has shown, the latest of each volume.
    proofs: BTreeMap<VolumeId, Proof>,
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// What the connection is for.
    pub purpose: Purpose,
    /// Which client process.
    pub client: ClientId,
    /// The version of the messages that both speak.
    pub version: u16,
}

/// A capability that was shown and verified.
#[derive(Clone, Copy)]
struct Proof {
    generation: Generation,
    rights: Rights,
    /// The peer has been told that a newer attachment exists.
    told: bool,
}

impl Connection {
    pub(super) fn new(now: Time) -> Connection {
        Connection {
            since: now,
            heard: now,
            peer: None,
            requests: 0,
            bytes: 0,
            refused: 0,
            congested: false,
            proofs: BTreeMap::new(),
        }
    }

    /// Its hello was accepted.
    pub(super) fn greeted(&mut self, hello: &Hello, version: u16) {
        self.peer = Some(Peer {
            purpose: hello.purpose,
            client: hello.client,
            version,
        });
    }

    /// It has shown a valid capability. False when it has shown those of too many volumes.
    pub(super) fn proves(&mut self, capability: &Capability, volumes_max: usize) -> bool {
        let (generation, rights) = (capability.generation, capability.rights);
        let known = self.proofs.get(&capability.volume);
        if known.is_some_and(|proof| proof.generation > generation) {
            return true;
        }
        if known.is_none() && self.proofs.len() >= volumes_max {
            // Attachments that are over make room.
            self.proofs.retain(|_, proof| !proof.told);
            if self.proofs.len() >= volumes_max {
                return false;
            }
        }
        let told = false;
        let proof = Proof {
            generation,
            rights,
            told,
        };
        self.proofs.insert(capability.volume, proof);
        true
    }

    /// What the peer may do as this holder.
    pub(super) fn rights(&self, holder: Holder) -> Option<Rights> {
        let proof = self.proofs.get(&holder.volume)?;
        (proof.generation == holder.generation).then_some(proof.rights)
    }

    /// The peer is being told that this holder's attachment is over.
    pub(super) fn told_fenced(&mut self, holder: Holder) {
        if let Some(proof) = self.proofs.get_mut(&holder.volume)
            && proof.generation <= holder.generation
        {
            proof.told = true;
        }
    }

    /// The attachments that the peer believes to have.
    pub(super) fn attachments(&self) -> Vec<Holder> {
        let live = self.proofs.iter().filter(|(_, proof)| !proof.told);
        live.map(|(volume, proof)| Holder {
            volume: *volume,
            generation: proof.generation,
        })
        .collect()
    }
}
