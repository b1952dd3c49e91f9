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
    /// Whether the holder has said that it is done.
    released: bool,
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

    /// It has shown a valid capability. False when it has shown those of too many volumes; attachments that are `over`
    /// do not count.
    pub(super) fn proves(
        &mut self,
        capability: &Capability,
        volumes_max: usize,
        over: impl Fn(Holder) -> bool,
    ) -> bool {
        let (volume, generation, rights) = (capability.volume, capability.generation, capability.rights);
        let known = self.proofs.get(&volume);
        if known.is_some_and(|proof| proof.generation > generation) {
            return true;
        }
        if known.is_none() && self.proofs.len() >= volumes_max {
            self.proofs.retain(|volume, proof| {
                !over(Holder {
                    volume: *volume,
                    generation: proof.generation,
                })
            });
            if self.proofs.len() >= volumes_max {
                return false;
            }
        }
        let proof = Proof {
            generation,
            rights,
            released: false,
        };
        self.proofs.insert(volume, proof);
        true
    }

    /// Whether its peer may be a holder: others only read for one.
    pub(super) fn is_guest(&self) -> bool {
        self.peer.is_some_and(|peer| peer.purpose == Purpose::Guest)
    }

    /// Whether it holds, or held, no volume.
    pub(super) fn is_bare(&self) -> bool {
        self.proofs.is_empty()
    }

    /// What it has shown a capability for and has not released.
    pub(super) fn holds(&self) -> impl Iterator<Item = Holder> + '_ {
        let live = self.proofs.iter().filter(|(_, proof)| !proof.released);
        live.map(|(volume, proof)| Holder {
            volume: *volume,
            generation: proof.generation,
        })
    }

    /// The holder is done with the volume.
    pub(super) fn release(&mut self, holder: Holder) {
        let proof = self.proofs.get_mut(&holder.volume);
        if let Some(proof) = proof.filter(|proof| proof.generation == holder.generation) {
            proof.released = true;
        }
    }

    /// What the peer may do as this holder.
    pub(super) fn rights(&self, holder: Holder) -> Option<Rights> {
        let proof = self.proofs.get(&holder.volume)?;
        (proof.generation == holder.generation).then_some(proof.rights)
    }
}
