//! Asks the metadata servers as everybody does: finds the leader, tries again, gives up in time.

use std::collections::BTreeMap;
use std::time::Duration;

use cairn_proto::time::Time;

use super::msg::{Answer, Msg, Request};

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_millis(700);
/// How long all attempts of a call may take.
const DEADLINE: Duration = Duration::from_secs(8);
/// The pause after a member that can't help.
const PAUSE: Duration = Duration::from_millis(40);

/// Attempts of one call are told apart by the low bits of the number that travels, so that the answer to one that was
/// given up is not taken for that to a later one.
const ATTEMPT_BITS: u32 = 8;

struct Pending {
    request: Request,
    attempt: u64,
    deadline: Time,
    /// When the attempt is given up, or, between two attempts, the next one is made.
    due: Time,
    /// Between two attempts.
    paused: bool,
}

/// The calls of one process.
pub struct Caller {
    members: u8,
    next_id: u64,
    leader: u8,
    pending: BTreeMap<u64, Pending>,
}

/// How a call ended: its answer, or `None` when nobody gave one.
pub type Ended = (u64, Option<Answer>);

impl Caller {
    /// A caller of these many metadata servers. `first_id` is above all that an earlier run of the process used, so that
    /// answers to its calls are not taken for others.
    pub fn new(members: u8, first_id: u64) -> Caller {
        Caller {
            members,
            next_id: first_id,
            leader: 0,
            pending: BTreeMap::new(),
        }
    }

    /// Starts a call; its number.
    pub fn call(&mut self, now: Time, request: Request, out: &mut Vec<(u8, Msg)>) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        out.push((self.leader, message(id, 0, &request)));
        let pending = Pending {
            request,
            attempt: 0,
            deadline: now + DEADLINE,
            due: now + ATTEMPT,
            paused: false,
        };
        self.pending.insert(id, pending);
        id
    }

    /// The number of the call to which an answer belongs.
    pub fn number(id: u64) -> u64 {
        id >> ATTEMPT_BITS
    }

    /// An answer came. `Some` if it ends the call.
    pub fn answered(&mut self, now: Time, id: u64, answer: Answer) -> Option<Ended> {
        let (id, attempt) = (id >> ATTEMPT_BITS, id & ((1 << ATTEMPT_BITS) - 1));
        let pending = self.pending.get_mut(&id).filter(|pending| pending.attempt == attempt)?;
        match answer {
            Answer::NotLeader(leader) => {
                self.leader = leader
                    .filter(|l| *l != self.leader)
                    .unwrap_or((self.leader + 1) % self.members);
                pending.paused = true;
                pending.due = now + PAUSE;
                None
            }
            Answer::Unknown => {
                pending.paused = true;
                pending.due = now + PAUSE;
                None
            }
            answer => {
                self.pending.remove(&id);
                Some((id, Some(answer)))
            }
        }
    }

    /// When something is due.
    pub fn timeout(&self) -> Option<Time> {
        self.pending
            .values()
            .map(|pending| pending.due.min(pending.deadline))
            .min()
    }

    /// Tries again what is due; the calls that are given up.
    pub fn handle_timeout(&mut self, now: Time, out: &mut Vec<(u8, Msg)>) -> Vec<Ended> {
        let mut ended = Vec::new();
        let due: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, pending)| pending.due.min(pending.deadline) <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            let pending = self.pending.get_mut(&id).expect("listed above");
            if pending.deadline <= now {
                self.pending.remove(&id);
                ended.push((id, None));
                continue;
            }
            if !pending.paused {
                self.leader = (self.leader + 1) % self.members;
            }
            pending.paused = false;
            pending.due = now + ATTEMPT;
            pending.attempt += 1;
            out.push((self.leader, message(id, pending.attempt, &pending.request)));
        }
        ended
    }
}

fn message(id: u64, attempt: u64, request: &Request) -> Msg {
    Msg::Call {
        id: id << ATTEMPT_BITS | attempt,
        request: request.clone(),
    }
}
