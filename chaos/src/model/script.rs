//! Beginnings that are told step by step, for what lies too deep to be found from the start.

use super::message::{End, Message};
use super::state::{Set, State};
use super::step::{Action, Fate, Model};

/// A beginning that is being told.
pub struct Script {
    model: Model,
    state: State,
    way: Vec<Action>,
}

impl Script {
    /// At the start of the model's scope.
    pub fn new(model: Model) -> Script {
        Script {
            model,
            state: model.scope.start(),
            way: Vec::new(),
        }
    }

    /// What has become of the world, and what was done.
    pub fn end(self) -> (State, Vec<Action>) {
        (self.state, self.way)
    }

    /// Does one thing, which is among those that can happen.
    ///
    /// # Panics
    ///
    /// If it can't happen now, or breaks a promise: then the script is wrong.
    pub fn act(&mut self, action: Action) -> &mut Script {
        let mut actions = Vec::new();
        self.model.actions(&self.state, &mut actions);
        assert!(
            actions.contains(&action),
            "{action:?} can't happen in\n{:#?}",
            self.state
        );
        let step = self.model.step(&self.state, action);
        let step = step.unwrap_or_else(|| panic!("{action:?} changes nothing in\n{:#?}", self.state));
        assert_eq!(step.broken, None, "{action:?} is too early for a script");
        self.state = step.state;
        self.way.push(action);
        self
    }

    /// Delivers all requests of a holder to these devices, and their answers, until nothing changes.
    pub fn exchange(&mut self, holder: u8, devices: &[u8]) -> &mut Script {
        loop {
            let effective = self.state.net.iter().find_map(|message| {
                let End::To(device) = message.end() else { return None };
                let action = Action::Arrive(message, Fate::Heard);
                let wanted = message.holder() == holder && devices.contains(&device);
                let changes = wanted && self.model.step(&self.state, action).is_some();
                changes.then_some(action)
            });
            match effective {
                Some(action) => self.act(action),
                None => return self,
            };
        }
    }

    /// A holder starts, and these devices seal.
    pub fn attach(&mut self, holder: u8, devices: &[u8]) -> &mut Script {
        self.act(Action::Grant(holder)).act(Action::ReadMap(holder));
        self.exchange(holder, devices)
    }

    /// Meta commits what the holder has proposed.
    pub fn commit(&mut self, holder: u8, heard: bool) -> &mut Script {
        let proposals = |message: &Message| message.end() == End::Meta && message.holder() == holder;
        let proposal = self.state.net.iter().find(proposals).expect("something is proposed");
        self.act(Action::Commit { proposal, heard })
    }

    /// A holder ejects a member.
    pub fn eject(&mut self, holder: u8, device: u8) -> &mut Script {
        self.act(Action::Eject { holder, device }).commit(holder, true)
    }

    /// A holder has a device join.
    pub fn invite(&mut self, holder: u8, device: u8) -> &mut Script {
        self.act(Action::Invite { holder, device }).commit(holder, true)
    }

    /// A holder admits a joiner.
    pub fn admit(&mut self, holder: u8, device: u8) -> &mut Script {
        self.act(Action::Admit { holder, device }).commit(holder, true)
    }

    /// A holder writes a block, and these devices get it.
    pub fn write(&mut self, holder: u8, block: u8, devices: &[u8]) -> &mut Script {
        let discard = false;
        self.act(Action::Write { holder, block, discard });
        self.exchange(holder, devices)
    }

    /// The members as meta has them.
    pub fn members(&self) -> Set {
        self.state.meta.config.insync
    }
}
