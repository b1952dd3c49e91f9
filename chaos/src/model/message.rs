//! Messages, and the network that loses, duplicates and reorders them.

use std::hash::Hasher;

use super::fingerprint::Fingerprint;
use super::state::{BLOCKS, Cell, DEVICES, Set, Version};

/// Messages that may arrive at one time, at the most.
const ROOM: usize = 48;

/// A message. `holder` is a generation: that of the sender or, in an answer, of who had asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Message {
    /// Rule 6: adopt this generation, and say what you hold.
    Seal {
        /// From it.
        holder: u8,
        /// To it.
        device: u8,
    },
    /// It is durable, and this is what the device holds.
    Sealed {
        /// To it.
        holder: u8,
        /// From it.
        device: u8,
        /// What it holds.
        cells: [Cell; BLOCKS],
    },
    /// Rule 21: adopt this generation, have a replica, and say what you hold.
    Join {
        /// From it.
        holder: u8,
        /// To it.
        device: u8,
        /// Of this configuration.
        epoch: u8,
    },
    /// It is so.
    Joined {
        /// To it.
        holder: u8,
        /// From it.
        device: u8,
        /// What it holds.
        cells: [Cell; BLOCKS],
    },
    /// Rule 12.
    Write {
        /// From it.
        holder: u8,
        /// To it.
        device: u8,
        /// Where.
        block: u8,
        /// What.
        cell: Cell,
    },
    /// Rule 9: a repair copy, applied if it is newer.
    Repair {
        /// From it.
        holder: u8,
        /// To it.
        device: u8,
        /// Where.
        block: u8,
        /// What.
        cell: Cell,
    },
    /// Rule 21: a resync copy, applied if the local generation is lower or the version newer.
    Resync {
        /// From it.
        holder: u8,
        /// To it.
        device: u8,
        /// Where.
        block: u8,
        /// What.
        cell: Cell,
    },
    /// To a write or a copy: what the device now holds of that block, durably.
    Durable {
        /// To it.
        holder: u8,
        /// From it.
        device: u8,
        /// Where.
        block: u8,
        /// What.
        cell: Cell,
    },
    /// Rule 24: drop tombstones up to this version. It needs no answer.
    Drop {
        /// From it.
        holder: u8,
        /// To it.
        device: u8,
        /// The new floor.
        floor: Version,
        /// The members of this configuration hold everything up to it.
        epoch: u8,
    },
    /// Rule 18: a proposal to meta.
    Change {
        /// From it.
        holder: u8,
        /// How many it had proposed before.
        number: u8,
        /// The epoch that it follows.
        epoch: u8,
        /// `I′`
        insync: Set,
        /// `J′`
        joining: Set,
    },
}

/// To or from whom a message is, on the side that is not a holder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// A request to a device.
    To(u8),
    /// An answer of a device.
    From(u8),
    /// A proposal to meta.
    Meta,
}

impl Message {
    /// The generation that it belongs to.
    pub fn holder(self) -> u8 {
        match self {
            Message::Seal { holder, .. }
            | Message::Sealed { holder, .. }
            | Message::Join { holder, .. }
            | Message::Joined { holder, .. }
            | Message::Write { holder, .. }
            | Message::Repair { holder, .. }
            | Message::Resync { holder, .. }
            | Message::Durable { holder, .. }
            | Message::Drop { holder, .. }
            | Message::Change { holder, .. } => holder,
        }
    }

    /// Its other end.
    pub fn end(self) -> End {
        match self {
            Message::Seal { device, .. }
            | Message::Join { device, .. }
            | Message::Write { device, .. }
            | Message::Repair { device, .. }
            | Message::Resync { device, .. }
            | Message::Drop { device, .. } => End::To(device),
            Message::Sealed { device, .. } | Message::Joined { device, .. } | Message::Durable { device, .. } => {
                End::From(device)
            }
            Message::Change { .. } => End::Meta,
        }
    }

    /// Adds what it says to the hash of its device or, if it has none, to the common one.
    pub(super) fn hash_into(self, common: &mut Fingerprint, own: &mut [Fingerprint; DEVICES]) {
        match self.end() {
            End::To(device) | End::From(device) => {
                // The network is in order, so what goes to or comes from one device is too.
                own[device as usize].write_u64(self.word());
            }
            End::Meta => {
                let Message::Change {
                    holder,
                    number,
                    epoch,
                    insync,
                    joining,
                } = self
                else {
                    unreachable!("only proposals go to meta");
                };
                let words = u64::from(u32::from_le_bytes([holder, number, epoch, 0xcc]));
                common.write_u64(words);
                for (device, hash) in own.iter_mut().enumerate() {
                    let device = device as u8;
                    let bits = u64::from(insync.has(device)) << 1 | u64::from(joining.has(device));
                    hash.write_u64(words << 2 | bits);
                }
            }
        }
    }

    /// All that it says but the name of its device, in one number.
    fn word(self) -> u64 {
        let at = |kind: u8, holder: u8, block: u8, cell: Cell| [kind, holder, block, cell.bits(), 0];
        let all = |kind: u8, holder: u8, cells: [Cell; BLOCKS]| [kind, holder, cells[0].bits(), cells[1].bits(), 1];
        let bytes = match self {
            Message::Seal { holder, .. } => [1, holder, 0, 0, 0],
            Message::Sealed { holder, cells, .. } => all(2, holder, cells),
            Message::Join { holder, epoch, .. } => [3, holder, epoch, 0, 0],
            Message::Joined { holder, cells, .. } => all(4, holder, cells),
            Message::Write {
                holder, block, cell, ..
            } => at(5, holder, block, cell),
            Message::Repair {
                holder, block, cell, ..
            } => at(6, holder, block, cell),
            Message::Resync {
                holder, block, cell, ..
            } => at(7, holder, block, cell),
            Message::Durable {
                holder, block, cell, ..
            } => at(8, holder, block, cell),
            Message::Drop {
                holder, floor, epoch, ..
            } => at(9, holder, epoch, Cell::data(floor)),
            Message::Change { .. } => unreachable!("a proposal is about several devices"),
        };
        bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte))
    }
}

/// The network: a set of messages. One that was sent stays and may arrive at any time, in any order, and again, or never: so
/// it loses, duplicates, delays and reorders without a step of its own for any of these.
#[derive(Clone, Debug)]
pub struct Net {
    len: u8,
    crowded: bool,
    messages: [Message; ROOM],
}

impl Net {
    /// Nothing under way.
    pub fn new() -> Net {
        Net {
            len: 0,
            crowded: false,
            messages: [Message::Seal { holder: 0, device: 0 }; ROOM],
        }
    }

    /// These, which are in order.
    pub fn of(messages: &[Message]) -> Net {
        let mut net = Net::new();
        net.messages[..messages.len()].copy_from_slice(messages);
        net.len = messages.len() as u8;
        net
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = Message> + '_ {
        self.as_slice().iter().copied()
    }

    /// All of them, in order.
    pub fn as_slice(&self) -> &[Message] {
        &self.messages[..self.len as usize]
    }

    /// Whether there is room for so many more.
    pub fn has_room(&self, more: usize) -> bool {
        self.len as usize + more <= ROOM
    }

    /// Whether a message was lost for want of room. The protocol bears with that, but then not everything was searched.
    pub fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// Sends a message; one that is there already is there but once. Without room it is lost.
    pub fn send(&mut self, message: Message) {
        let len = self.len as usize;
        if let Err(place) = self.as_slice().binary_search(&message) {
            if len == ROOM {
                self.crowded = true;
                return;
            }
            self.messages.copy_within(place..len, place + 1);
            self.messages[place] = message;
            self.len += 1;
        }
    }

    /// Takes a message out.
    pub fn remove(&mut self, message: Message) {
        if let Ok(place) = self.as_slice().binary_search(&message) {
            self.messages.copy_within(place + 1..self.len as usize, place);
            self.len -= 1;
        }
    }

    /// Takes out all for which it is not true.
    pub fn retain(&mut self, keep: impl Fn(Message) -> bool) {
        let mut kept = 0;
        for place in 0..self.len as usize {
            if keep(self.messages[place]) {
                self.messages[kept] = self.messages[place];
                kept += 1;
            }
        }
        self.len = kept as u8;
    }
}

impl Default for Net {
    fn default() -> Net {
        Net::new()
    }
}

impl PartialEq for Net {
    fn eq(&self, other: &Net) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Net {}
