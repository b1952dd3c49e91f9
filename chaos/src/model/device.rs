//! What a device does with a request: rules 3, 4, 13, 21 and 24.

use super::message::Message;
use super::rules::{Rule, Rules};
use super::state::{BLOCKS, Cell, Device, Version};

/// What became of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Received {
    /// The device has seen a higher generation.
    Refused,
    /// There is nothing to answer for.
    Silent,
    /// It is done, durably.
    Answer(Message),
}

impl Device {
    /// Takes a request.
    pub fn receive(&mut self, rules: Rules, request: Message) -> Received {
        let lower = request.holder() < self.seal;
        let refusing = match request {
            Message::Write { .. } | Message::Repair { .. } => rules.has(Rule::RefuseWrites),
            Message::Resync { .. } | Message::Join { .. } => rules.has(Rule::RefuseResyncs),
            _ => true,
        };
        if lower && refusing {
            return Received::Refused;
        }
        if let Message::Join { epoch, .. } | Message::Drop { epoch, .. } = request {
            if epoch < self.epoch && rules.has(Rule::EpochOrder) {
                return Received::Refused;
            }
            self.epoch = self.epoch.max(epoch);
        }
        if rules.has(Rule::JoinAdopts) || !matches!(request, Message::Join { .. }) {
            self.adopt(rules, request.holder());
        }
        match request {
            Message::Seal { holder, device } if self.replica => Received::Answer(Message::Sealed {
                holder,
                device,
                cells: self.collect(rules),
            }),
            Message::Join { holder, device, .. } => {
                self.replica = true;
                Received::Answer(Message::Joined {
                    holder,
                    device,
                    cells: self.collect(rules),
                })
            }
            Message::Write {
                holder,
                device,
                block,
                cell,
            }
            | Message::Repair {
                holder,
                device,
                block,
                cell,
            } => {
                if !self.replica {
                    return Received::Silent;
                }
                if cell.version() > self.version(block) {
                    self.put(rules, block, cell);
                }
                self.durable(rules, holder, device, block)
            }
            Message::Resync {
                holder,
                device,
                block,
                cell,
            } if self.replica => {
                let local = self.version(block);
                let by_generation = rules.has(Rule::ResyncGeneration) && local.generation() < holder;
                if by_generation || cell.version() > local {
                    self.put(rules, block, cell);
                }
                self.durable(rules, holder, device, block)
            }
            Message::Drop { floor, .. } if self.replica => {
                self.drop_tombstones(rules, floor);
                Received::Silent
            }
            _ => Received::Silent,
        }
    }

    /// Rule 3: makes a higher generation durable.
    pub fn adopt(&mut self, rules: Rules, g: u8) {
        self.seal = self.seal.max(g);
        if rules.has(Rule::SealDurable) {
            self.seal_on_disk = self.seal;
        }
    }

    /// What it says of a block: of absence without a tombstone, that it is as old as the floor (rule 24).
    pub fn cell(&self, rules: Rules, block: u8) -> Cell {
        match self.cells[block as usize] {
            Cell::EMPTY if rules.has(Rule::AbsenceVersion) => Cell::absent(self.floor),
            cell => cell,
        }
    }

    /// What it says of all blocks.
    pub fn collect(&self, rules: Rules) -> [Cell; BLOCKS] {
        std::array::from_fn(|block| self.cell(rules, block as u8))
    }

    /// What a write has to be newer than: an absent block is as old as the floor (rule 24).
    fn version(&self, block: u8) -> Version {
        match self.cells[block as usize] {
            Cell::EMPTY => self.floor,
            cell => cell.version(),
        }
    }

    fn put(&mut self, rules: Rules, block: u8, cell: Cell) {
        self.cells[block as usize] = cell;
        self.write_through(rules);
    }

    fn write_through(&mut self, rules: Rules) {
        if rules.has(Rule::AnswerDurable) {
            self.cells_on_disk = self.cells;
        }
    }

    fn durable(&self, rules: Rules, holder: u8, device: u8, block: u8) -> Received {
        Received::Answer(Message::Durable {
            holder,
            device,
            block,
            cell: self.cell(rules, block),
        })
    }

    fn drop_tombstones(&mut self, rules: Rules, floor: Version) {
        for cell in &mut self.cells {
            if cell.is_absent() && cell.version() <= floor {
                *cell = Cell::EMPTY;
            }
        }
        if rules.has(Rule::Floor) {
            self.floor = self.floor.max(floor);
        }
        self.write_through(rules);
    }

    /// Loses what is not on disk.
    pub fn crash(&mut self) {
        self.seal = self.seal_on_disk;
        self.cells = self.cells_on_disk;
    }

    /// Puts all on disk.
    pub fn flush(&mut self) {
        self.seal_on_disk = self.seal;
        self.cells_on_disk = self.cells;
    }

    /// Drops its replica: the group does without it in this configuration. The generation is the volume's, and stays.
    pub fn forget(&mut self, rules: Rules, epoch: u8) {
        let (seal, epoch) = if rules.has(Rule::KeepGeneration) {
            (self.seal, epoch)
        } else {
            (0, 0)
        };
        *self = Device {
            seal,
            seal_on_disk: seal,
            epoch,
            replica: false,
            cells: [Cell::EMPTY; BLOCKS],
            floor: Version::ZERO,
            cells_on_disk: [Cell::EMPTY; BLOCKS],
        };
    }
}
