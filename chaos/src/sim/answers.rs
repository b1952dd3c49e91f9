//! What guests ask of their volumes, and whether what they are answered is allowed.

use std::time::Duration;

use cairn_client::core::api::VolumeHandle;
use cairn_client::volume::api::{OpId, VolumeError, VolumeReply};
use cairn_proto::ids::{Generation, VolumeId};

use super::actors::client::{ClientActor, Wish};
use super::actors::{Actor, Input};
use super::guest::{Guest, Plan};
use super::process::Process;
use super::world::{Event, Session, SessionPhase, Slot, World};
use crate::checker::history::{Broken, OpKind, OpNumber};
use crate::rng::Rng;

/// Time between an answer and the next operation of a guest that a play is about, at the most.
const AIMED_THINK: Duration = Duration::from_millis(4);

/// How often a guest that moves looks whether it may begin.
const HAND_OVER_LOOK: Duration = Duration::from_millis(1);

impl World {
    pub(super) fn session_mut(&mut self, process: Process, handle: VolumeHandle) -> Option<&mut Session> {
        let Process::Client(client) = process else { return None };
        let index = *self.handles.get(&(client, handle))?;
        self.sessions.get_mut(index)
    }

    /// A client begins to use a volume; the index of the session.
    pub(super) fn open(&mut self, client: u8, volume: usize) -> Result<usize, Broken> {
        let index = self.sessions.len();
        let number = u32::try_from(index).expect("few sessions");
        let handle = VolumeHandle(number);
        let rng = Rng::stream(self.options.seed, &format!("guest-{number}"));
        self.sessions.push(Session {
            client,
            handle,
            volume,
            phase: SessionPhase::Opening,
            guest: Guest::new(number, rng),
            generation: None,
            done: 0,
            told_bytes: self.options.volumes[volume].bytes,
            after: None,
            seal_probed: None,
        });
        self.handles.insert((client, handle), index);
        let id = self.volumes[volume].created.id;
        let now = self.now();
        let numbers = [30, client.into(), id.0, number.into()];
        self.trace.event(
            now,
            &numbers,
            format_args!("client-{client} opens volume {id} as {handle:?}"),
        );
        self.deliver(Process::Client(client), Input::Guest(Wish::Open(handle, id)))?;
        Ok(index)
    }

    /// A client stops using a volume in order.
    pub(super) fn close(&mut self, index: usize) -> Result<(), Broken> {
        let now = self.now();
        let session = &mut self.sessions[index];
        if session.phase != SessionPhase::Open {
            return Ok(());
        }
        session.phase = SessionPhase::Closing;
        let (client, handle) = (session.client, session.handle);
        self.trace.event(
            now,
            &[31, client.into(), handle.0.into()],
            format_args!("client-{client} closes {handle:?}"),
        );
        self.deliver(Process::Client(client), Input::Guest(Wish::Close(handle)))
    }

    pub(super) fn wake_guest(&mut self, process: Process, volume: VolumeHandle) {
        let Process::Client(client) = process else { return };
        let Some(index) = self.handles.get(&(client, volume)) else {
            return;
        };
        let session = *index as u32;
        self.schedule.at(
            self.schedule.now(),
            Event::Guest {
                client,
                volume,
                session,
            },
        );
    }

    pub(super) fn guest_turn(&mut self, client: u8, volume: VolumeHandle, session: u32) -> Result<(), Broken> {
        if self.handles.get(&(client, volume)) != Some(&(session as usize)) {
            return Ok(());
        }
        if let Some(before) = self.sessions[session as usize].after
            && self.sessions[before].phase != SessionPhase::Over
            && self.busy
        {
            let at = self.now() + HAND_OVER_LOOK;
            self.schedule.at(
                at,
                Event::Guest {
                    client,
                    volume,
                    session,
                },
            );
            return Ok(());
        }
        loop {
            let state = &mut self.sessions[session as usize];
            let options = &self.options.volumes[state.volume];
            let done = !self.busy
                || state.phase != SessionPhase::Open
                || state.guest.in_flight.len() >= options.depth
                || self.history.ops().len() as u32 >= self.options.ops_max;
            if done {
                return Ok(());
            }
            let Some(plan) = state.guest.plan(options) else {
                return Ok(());
            };
            self.submit(session as usize, plan)?;
        }
    }

    /// Begins an operation.
    pub(super) fn submit(&mut self, index: usize, plan: Plan) -> Result<(), Broken> {
        let now = self.now();
        let session = &mut self.sessions[index];
        let id = self.volumes[session.volume].created.id;
        let place = (plan.sector, plan.sectors);
        let number = self.history.call(now, session.guest.session, id, plan.kind, place);
        let op = session.guest.begin(number, plan);
        let (client, handle, volume) = (session.client, session.handle, session.volume);
        let numbers = [
            32,
            client.into(),
            handle.0.into(),
            number.into(),
            plan.sector,
            plan.sectors,
        ];
        self.trace.event(
            now,
            &numbers,
            format_args!(
                "client-{client} {handle:?} asks op {number}: {:?} {}+{}",
                plan.kind, plan.sector, plan.sectors
            ),
        );
        let bytes = self.options.volumes[volume].bytes;
        if std::mem::replace(&mut self.sessions[index].told_bytes, bytes) < bytes {
            self.deliver(Process::Client(client), Input::Guest(Wish::Grown(handle, bytes)))?;
        }
        let request = plan.request(id, number);
        self.deliver(Process::Client(client), Input::Guest(Wish::Submit(handle, op, request)))
    }

    pub(super) fn replied(
        &mut self,
        process: Process,
        volume: VolumeHandle,
        op: OpId,
        result: Result<VolumeReply, VolumeError>,
        generation: Option<Generation>,
    ) -> Result<(), Broken> {
        let now = self.now();
        let Some(session) = self.session_mut(process, volume) else {
            return Ok(());
        };
        let Some((number, plan)) = session.guest.end(op) else {
            let words = format!("{process} answered {op:?} of {volume:?}, which nobody waits for");
            return Err(self.broken("every operation is answered once", words));
        };
        let (index, of_volume) = (session.guest.session, session.volume);
        session.done += u64::from(result.is_ok());
        let aimed = session.guest.aim.is_some();
        let think = self.options.volumes[of_volume].think;
        let think = if aimed { think.min(AIMED_THINK) } else { think };
        let (kind, words) = match &result {
            Ok(_) => (0, "done".to_string()),
            Err(error) => (1, error.to_string()),
        };
        self.trace.event(
            now,
            &[33, number.into(), kind],
            format_args!("{process} op {number}: {words}"),
        );
        match result {
            Ok(reply) => {
                self.ops_done += 1;
                let generation = generation.unwrap_or(Generation::NONE);
                let bytes = match &reply {
                    VolumeReply::Read(bytes) => &bytes[..],
                    _ => &[],
                };
                debug_assert!(plan.kind != OpKind::Read || matches!(reply, VolumeReply::Read(_)));
                self.history.done(now, number, generation, bytes)?;
                self.probe_seal(index as usize, generation)?;
                if plan.kind == OpKind::Write && self.probe_rng.permille(self.options.probe_permille) {
                    self.probe(number, of_volume)?;
                }
            }
            Err(error) => {
                self.history.failed(now, number, words);
                self.refused(index as usize, number, error)?;
            }
        }
        let Process::Client(client) = process else {
            return Ok(());
        };
        let think = self.rng.spread(think);
        self.schedule.at(
            now + think,
            Event::Guest {
                client,
                volume,
                session: index,
            },
        );
        Ok(())
    }

    /// An operation ended with an error: was that allowed?
    fn refused(&mut self, index: usize, number: OpNumber, error: VolumeError) -> Result<(), Broken> {
        let kind = format!("{error:?}");
        let kind = kind.split('(').next().unwrap_or_default().to_string();
        *self.errors.entry(kind).or_default() += 1;
        let session = &self.sessions[index];
        let volume = session.volume;
        let session_generation = session.generation;
        match error {
            VolumeError::Fenced => {
                let mut of_volume = self.sessions.iter().filter(|other| other.volume == volume);
                let id = self.volumes[volume].created.id;
                if of_volume.any(|other| other.generation > session_generation)
                    || self.last_granted(id) > session_generation
                {
                    self.close_fenced(index);
                    return Ok(());
                }
                Err(self.broken(
                    "no error without a cause",
                    format!("session {index} was fenced by nobody"),
                ))
            }
            VolumeError::NoSpace => Ok(()),
            VolumeError::Damaged if self.may_be_damaged(number) => Ok(()),
            VolumeError::Shutdown if session.phase != SessionPhase::Open => Ok(()),
            other => Err(self.broken("no error without a cause", format!("session {index}: {other}"))),
        }
    }

    /// The last generation of a volume that meta has granted, whether anybody heard of it or not.
    fn last_granted(&self, id: VolumeId) -> Option<Generation> {
        let of_meta = |slot: &Slot| match slot.actor.as_ref()? {
            Actor::Meta(meta) => Some(meta.state().volumes().get(&id)?.generation),
            _ => None,
        };
        self.slots.values().filter_map(of_meta).max()
    }

    pub(super) fn client(&self, client: u8) -> Option<&ClientActor> {
        match self.slots.get(&Process::Client(client))?.actor.as_ref()? {
            Actor::Client(actor) => Some(actor),
            _ => None,
        }
    }
}
