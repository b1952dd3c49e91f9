//! Which generation of a volume a device serves.

use crate::ids::Generation;

/// Why a request is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// A higher generation, this one, has been seen.
    Fenced(Generation),
    /// The generation was not sealed here, or its seal has not been answered yet.
    NotSealed,
}

/// What is to be done about a seal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SealStep {
    /// Make it durable; lower generations are refused already.
    MakeDurable,
    /// It is durable.
    Durable,
    /// A higher generation, this one, has been seen.
    Fenced(Generation),
}

/// How far the highest generation of one volume is: open ≤ durable ≤ seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fence {
    seen: Generation,
    durable: Generation,
    open: Generation,
}

impl Fence {
    /// After a restart: what was durable is known, and nothing is open.
    pub fn recovered(generation: Generation) -> Fence {
        Fence {
            seen: generation,
            durable: generation,
            open: Generation::NONE,
        }
    }

    /// The highest generation that was seen.
    pub fn seen(&self) -> Generation {
        self.seen
    }

    /// The highest generation that will be remembered.
    pub fn durable(&self) -> Generation {
        self.durable
    }

    /// Whether a request of this generation is served.
    ///
    /// # Errors
    /// Why it is not.
    pub fn admit(&self, generation: Generation) -> Result<(), Refusal> {
        if generation < self.seen {
            Err(Refusal::Fenced(self.seen))
        } else if generation == self.open && generation > Generation::NONE {
            Ok(())
        } else {
            Err(Refusal::NotSealed)
        }
    }

    /// A seal with a valid capability has come: every lower generation is refused from now on. That is safe before the
    /// seal is durable, because meta has granted the higher generation already.
    pub fn seal(&mut self, generation: Generation) -> SealStep {
        if generation < self.seen {
            return SealStep::Fenced(self.seen);
        }
        self.seen = generation;
        if self.durable < generation {
            SealStep::MakeDurable
        } else {
            SealStep::Durable
        }
    }

    /// The device will remember it.
    pub fn made_durable(&mut self, generation: Generation) {
        assert!(
            generation <= self.seen,
            "seal {generation} is durable, only {} was asked for",
            self.seen
        );
        self.durable = self.durable.max(generation);
    }

    /// Its requests are served from now on.
    pub fn open(&mut self, generation: Generation) {
        assert!(
            generation == self.seen,
            "generation {generation} is opened, {} was seen",
            self.seen
        );
        self.open = generation;
    }
}
