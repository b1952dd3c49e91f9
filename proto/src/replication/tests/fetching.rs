//! Devices that read from each other.

use std::time::Duration;

use super::model::Answer;
use super::world::World;
use crate::message::{Copy, Failed, FailureKind, Fetch, Message, Read};
use crate::replication::RequestId;
use crate::time::Time;

/// How long a device waits for another one.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// What a device is to read from another one.
pub(super) struct Fetching {
    pub(super) h: usize,
    /// The device that reads.
    pub(super) d: usize,
    pub(super) request: RequestId,
    pub(super) fetch: Fetch,
    pub(super) since: Time,
    /// What it has read.
    pub(super) copy: Option<Copy>,
}

impl World {
    /// What a device reads from another one for a fetch; else why it can't.
    pub(super) fn read_for(&mut self, d: usize, fetch: &Fetch) -> Result<Copy, FailureKind> {
        let now = self.now;
        let at = self.devices.iter().position(|device| device.id == fetch.from);
        let at = at.filter(|at| self.devices[*at].alive && !self.cut.contains(&(*at, d)) && self.frozen != Some(*at));
        let Some(at) = at else {
            return Err(FailureKind::PeerUnreachable);
        };
        let read = Message::Read(Read {
            holder: fetch.holder,
            group: fetch.group,
            layer: fetch.layer,
            range: fetch.range,
        });
        match self.devices[at].handle(now, &read) {
            Answer::Now(Message::ReadAnswer(answer), _) if self.devices[at].recovered == fetch.recovered.0 => {
                fetch.copy(answer).map_err(|_| FailureKind::NotFetched)
            }
            _ => Err(FailureKind::NotFetched),
        }
    }

    /// Goes on with one of the fetches: first it is read, then it is written.
    pub(super) fn go_on_fetching(&mut self, i: usize) -> bool {
        let now = self.now;
        let (h, d, request) = (self.fetches[i].h, self.fetches[i].d, self.fetches[i].request);
        let answer = if let Some(copy) = self.fetches[i].copy.take() {
            *self.arrived.entry("fetched").or_default() += 1;
            match self.devices[d].handle(now, &Message::Copy(copy)) {
                Answer::Now(answer, grant) => (answer, grant),
                Answer::At(..) => unreachable!("a copy waits for nobody"),
            }
        } else {
            let fetch = self.fetches[i].fetch.clone();
            let is_frozen = self.frozen.is_some_and(|at| self.devices[at].id == fetch.from);
            if is_frozen && now.saturating_since(self.fetches[i].since) < FETCH_TIMEOUT {
                return false;
            }
            match self.read_for(d, &fetch) {
                Ok(copy) => {
                    self.fetches[i].copy = Some(copy);
                    return true;
                }
                Err(kind) => (Message::Failed(Failed::new(kind, "from another device")), false),
            }
        };
        self.fetches.swap_remove(i);
        let link = &mut self.holders[h].links[d];
        link.to_holder.push_back((request, answer.0, answer.1));
        true
    }

    pub(super) fn fetch_any(&mut self) -> bool {
        let count = self.fetches.len();
        if count == 0 {
            return false;
        }
        let start = self.random.below(count as u64) as usize;
        (0..count).any(|i| self.go_on_fetching((start + i) % count))
    }
}
