//! Hello: the first message of both sides of a connection. Its layout is the same in all versions; what may follow is
//! the highest version that both ranges have.

use bytes::Bytes;

use super::no_data;
use crate::capability::Capability;
use crate::codec::{DecodeError, Put, Reader};
use crate::ids::{ClientId, ClusterId, CommitSeq, DeviceId, DeviceUuid, Incarnation};
use crate::limits::{
    FRAME_CONTROL_BYTES_MAX, FRAME_DATA_BYTES_MAX, REQUEST_BYTES_IN_FLIGHT_MAX, REQUESTS_IN_FLIGHT_MAX,
};

/// Bits for what a peer can do beyond its version.
pub mod features {
    /// Nothing beyond the version.
    pub const NONE: u64 = 0;
    /// The device knows [`Fetch`](super::super::Fetch): it reads from another device what it is to write.
    pub const FETCH: u64 = 1;
}

/// What a connection is for. Repair and scrub never share one with guest I/O.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Purpose {
    /// Guest I/O of all volumes that the client has on the device.
    Guest = 0,
    /// Copies between replicas.
    Repair = 1,
    /// Verification in the background.
    Scrub = 2,
}

/// What a peer takes at the most on this connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerLimits {
    /// Requests without an answer.
    pub requests_in_flight: u32,
    /// Bytes of data in requests without an answer.
    pub request_bytes_in_flight: u64,
    /// Bytes of a control part.
    pub control_bytes: u32,
    /// Bytes of a data part.
    pub data_bytes: u32,
}

impl Default for PeerLimits {
    fn default() -> PeerLimits {
        PeerLimits {
            requests_in_flight: REQUESTS_IN_FLIGHT_MAX,
            request_bytes_in_flight: REQUEST_BYTES_IN_FLIGHT_MAX,
            control_bytes: FRAME_CONTROL_BYTES_MAX as u32,
            data_bytes: FRAME_DATA_BYTES_MAX as u32,
        }
    }
}

/// Who speaks. The side that connects says which device it wants to reach; the device answers who it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The oldest version of the messages it speaks.
    pub version_min: u16,
    /// The newest.
    pub version_max: u16,
    /// What the connection is for.
    pub purpose: Purpose,
    /// What it can do beyond its version; see [`features`].
    pub features: u64,
    /// Its cluster.
    pub cluster: ClusterId,
    /// The device that is wanted, or that answers.
    pub device: DeviceId,
    /// From a device: its commit sequence as recovered at its start, at least. Zero from a client.
    pub recovered: CommitSeq,
    /// From a device: its commit sequence now. Zero from a client.
    pub commit: CommitSeq,
    /// The client process, zero from a device.
    pub client: ClientId,
    /// What it takes.
    pub limits: PeerLimits,
    /// Proof of what it may do, where the purpose asks for one. Volumes are proven by each seal.
    pub capability: Option<Capability>,
}

impl Hello {
    /// The version of the messages that this code speaks.
    pub const VERSION: u16 = 1;

    /// The newest version that both speak.
    pub fn common_version(&self, other: &Hello) -> Option<u16> {
        let newest = self.version_max.min(other.version_max);
        (newest >= self.version_min.max(other.version_min)).then_some(newest)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        out.put_u16(self.version_min);
        out.put_u16(self.version_max);
        out.put_u8(self.purpose as u8);
        out.put_u8(u8::from(self.capability.is_some()));
        out.put_u16(0);
        out.put_u64(self.features);
        out.put_bytes(&self.cluster.0);
        out.put_bytes(&self.device.uuid.0);
        out.put_u64(self.device.incarnation.0);
        out.put_u64(self.recovered.0);
        out.put_u64(self.commit.0);
        out.put_bytes(&self.client.0);
        out.put_u32(self.limits.requests_in_flight);
        out.put_u32(self.limits.control_bytes);
        out.put_u32(self.limits.data_bytes);
        out.put_u32(0);
        out.put_u64(self.limits.request_bytes_in_flight);
        if let Some(capability) = &self.capability {
            capability.encode(out);
        }
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Hello, DecodeError> {
        no_data(&data)?;
        let (version_min, version_max) = (reader.u16()?, reader.u16()?);
        if version_min > version_max || version_min == 0 {
            return Err(DecodeError::Invalid("version range"));
        }
        let purpose = match reader.u8()? {
            0 => Purpose::Guest,
            1 => Purpose::Repair,
            2 => Purpose::Scrub,
            _ => return Err(DecodeError::Invalid("purpose")),
        };
        let with_capability = reader.bool("capability")?;
        reader.zeroes(2)?;
        let features = reader.u64()?;
        let cluster = ClusterId(reader.array()?);
        let device = DeviceId {
            uuid: DeviceUuid(reader.array()?),
            incarnation: Incarnation(reader.u64()?),
        };
        let (recovered, commit) = (CommitSeq(reader.u64()?), CommitSeq(reader.u64()?));
        let client = ClientId(reader.array()?);
        let (requests_in_flight, control_bytes, data_bytes) = (reader.u32()?, reader.u32()?, reader.u32()?);
        reader.zeroes(4)?;
        let request_bytes_in_flight = reader.u64()?;
        let limits = PeerLimits {
            requests_in_flight,
            request_bytes_in_flight,
            control_bytes,
            data_bytes,
        };
        let capability = with_capability.then(|| Capability::decode(reader)).transpose()?;
        Ok(Hello {
            version_min,
            version_max,
            purpose,
            features,
            cluster,
            device,
            recovered,
            commit,
            client,
            limits,
            capability,
        })
    }
}
