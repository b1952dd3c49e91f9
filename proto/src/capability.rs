//! Capabilities: what meta grants for a volume, in a form that a device can verify without asking meta.
//!
//! A capability is 48 bytes: volume `u64`, generation `u32`, rights `u8`, three zero bytes, then HMAC-SHA-256 over
//! `"cairn-capability-1"`, the cluster id and those 16 bytes, under the cluster key. Only meta servers and storage nodes
//! have the key; a client holds capabilities alone, so it can seal no volume that it was not granted.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::codec::{DecodeError, Put, Reader};
use crate::ids::{ClusterId, Generation, VolumeId};

/// Bytes of a capability on the wire.
pub const CAPABILITY_BYTES: usize = 48;

/// The secret that meta servers and storage nodes of one cluster share.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey(pub [u8; 32]);

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterKey(…)")
    }
}

/// What the holder of a capability may do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Rights {
    /// Read only.
    Read = 1,
    /// Read, write and coordinate.
    Write = 2,
}

/// The right to one volume under one generation, authenticated with the cluster key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capability {
    /// Of which volume.
    pub volume: VolumeId,
    /// Under which grant.
    pub generation: Generation,
    /// To do what.
    pub rights: Rights,
    mac: [u8; 32],
}

impl Capability {
    /// Grants it. Only meta does.
    pub fn grant(
        key: &ClusterKey,
        cluster: ClusterId,
        volume: VolumeId,
        generation: Generation,
        rights: Rights,
    ) -> Capability {
        let mac = mac(key, cluster, volume, generation, rights)
            .finalize()
            .into_bytes()
            .into();
        Capability {
            volume,
            generation,
            rights,
            mac,
        }
    }

    /// Whether this cluster's meta granted it. Takes the same time for every wrong code.
    pub fn is_valid(&self, key: &ClusterKey, cluster: ClusterId) -> bool {
        mac(key, cluster, self.volume, self.generation, self.rights)
            .verify_slice(&self.mac)
            .is_ok()
    }

    /// Appends its wire form.
    pub fn encode(&self, out: &mut Vec<u8>) {
        encode_claims(out, self.volume, self.generation, self.rights);
        out.put_bytes(&self.mac);
    }

    /// Reads its wire form. That it decodes does not make it valid.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Capability, DecodeError> {
        let volume = VolumeId(reader.u64()?);
        let generation = Generation::new(reader.u32()?).ok_or(DecodeError::Invalid("generation"))?;
        let rights = match reader.u8()? {
            1 => Rights::Read,
            2 => Rights::Write,
            _ => return Err(DecodeError::Invalid("rights")),
        };
        reader.zeroes(3)?;
        Ok(Capability {
            volume,
            generation,
            rights,
            mac: reader.array()?,
        })
    }
}

fn encode_claims(out: &mut Vec<u8>, volume: VolumeId, generation: Generation, rights: Rights) {
    out.put_u64(volume.0);
    out.put_u32(generation.get());
    out.put_u8(rights as u8);
    out.put_bytes(&[0; 3]);
}

fn mac(key: &ClusterKey, cluster: ClusterId, volume: VolumeId, generation: Generation, rights: Rights) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(&key.0).expect("HMAC takes keys of any length");
    let mut claims = Vec::with_capacity(16);
    encode_claims(&mut claims, volume, generation, rights);
    mac.update(b"cairn-capability-1");
    mac.update(&cluster.0);
    mac.update(&claims);
    mac
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_meta_granted_is_valid() {
        let (key, cluster) = (ClusterKey([1; 32]), ClusterId([2; 16]));
        let generation = Generation::new(7).unwrap();
        let granted = Capability::grant(&key, cluster, VolumeId(3), generation, Rights::Write);
        let mut bytes = Vec::new();
        granted.encode(&mut bytes);
        assert_eq!(bytes.len(), CAPABILITY_BYTES);
        let read = Capability::decode(&mut Reader::new(&bytes)).unwrap();
        assert_eq!(read, granted);
        assert!(read.is_valid(&key, cluster));
        assert!(!read.is_valid(&ClusterKey([9; 32]), cluster));
        assert!(!read.is_valid(&key, ClusterId([9; 16])));
        assert!(
            !Capability {
                generation: Generation::new(8).unwrap(),
                ..read
            }
            .is_valid(&key, cluster)
        );
        assert!(
            !Capability {
                volume: VolumeId(4),
                ..read
            }
            .is_valid(&key, cluster)
        );
    }
}
