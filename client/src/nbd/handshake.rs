//! The handshake: from the first byte to the choice of an export, or to the end of the connection.

use std::collections::VecDeque;
use std::fmt;

use bytes::{Buf, BufMut};
use cairn_proto::limits::VOLUME_NAME_BYTES_MAX;

use super::limits::{
    BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, LISTED_EXPORTS_MAX, OPTION_BYTES_MAX, OPTION_SKIP_BYTES_MAX, OPTIONS_MAX,
    PAYLOAD_BYTES_MAX,
};
use super::options::{InfoRequest, Malformed, MetaContextRequest, whole_string};
use super::wire::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, BASE_WILDCARD, EXPORT_NAME_ZEROES, IHAVEOPT, NBDMAGIC, OPTION_HEADER_BYTES,
    OPTION_REPLY_MAGIC, export_flag, handshake_flag, info, option, option_reply,
};

/// What a client needs to know of an export before it uses it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExportInfo {
    /// Its size in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// Why a question of the handshake has no answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// There is no such export.
    Unknown,
    /// The server is shutting down.
    Shutdown,
    /// It can't be told now, in words for a person.
    Unavailable(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Unknown => f.write_str("there is no such volume: `cairn volume list` shows those that exist"),
            Refusal::Shutdown => f.write_str("the server is shutting down"),
            Refusal::Unavailable(why) => f.write_str(why),
        }
    }
}

/// Why a connection is to be closed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CloseReason {
    /// The client said good-bye.
    Finished,
    /// What arrived is not this protocol.
    BadMagic {
        /// Where.
        place: &'static str,
        /// What arrived instead.
        found: u64,
    },
    /// The client set handshake flags that do not exist.
    BadClientFlags(u32),
    /// An option or payload is too long to be skipped.
    TooLong {
        /// Which.
        what: &'static str,
        /// Its length in bytes.
        length: u32,
    },
    /// The client would not stop asking.
    TooManyOptions,
    /// The export can't be had, and the client asked in the way that has no error answer.
    Refused(String),
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CloseReason::Finished => f.write_str("the client disconnected"),
            CloseReason::BadMagic { place, found } => {
                write!(f, "not the NBD protocol: the {place} starts with {found:#x}")
            }
            CloseReason::BadClientFlags(flags) => write!(f, "the client set unknown handshake flags ({flags:#x})"),
            CloseReason::TooLong { what, length } => write!(f, "{what} of {length} bytes is too long"),
            CloseReason::TooManyOptions => write!(f, "the client sent more than {OPTIONS_MAX} options"),
            CloseReason::Refused(why) => write!(f, "the export was refused: {why}"),
        }
    }
}

/// What was agreed: the start of a [`Transmission`](super::Transmission).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Negotiated {
    /// The chosen export's name; empty if the client left the choice to the server.
    pub export: String,
    /// What the client was told of it.
    pub info: ExportInfo,
    /// Whether replies are structured.
    pub structured: bool,
    /// Whether the context `base:allocation` is selected.
    pub base_allocation: bool,
}

/// What the driver has to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HandshakeAction {
    /// Write it.
    Send(Vec<u8>),
    /// Answer with [`Handshake::catalogue`].
    ListExports,
    /// Answer with [`Handshake::description`]. An empty name stands for the default export, if there is one.
    Describe(String),
    /// Write what was to be sent, and close.
    Close(CloseReason),
    /// The handshake is over; bytes that came after it are in [`Handshake::into_rest`].
    Transmission(Negotiated),
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Option,
    Skip { option: u32, remaining: u32 },
    AwaitCatalogue,
    AwaitDescription(Question),
    Over,
}

/// Which option waits for the description of an export.
#[derive(Debug)]
struct Question {
    option: u32,
    export: String,
    wants_name: bool,
}

/// One connection's handshake.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    inbox: Vec<u8>,
    actions: VecDeque<HandshakeAction>,
    options: u32,
    no_zeroes: bool,
    structured: bool,
    /// The export for which `base:allocation` was selected last.
    base_allocation: Option<String>,
}

impl Default for Handshake {
    fn default() -> Handshake {
        Handshake::new()
    }
}

impl Handshake {
    /// Starts with the server's greeting.
    pub fn new() -> Handshake {
        let mut greeting = Vec::with_capacity(18);
        greeting.put_u64(NBDMAGIC);
        greeting.put_u64(IHAVEOPT);
        greeting.put_u16(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        Handshake {
            state: State::ClientFlags,
            inbox: Vec::new(),
            actions: VecDeque::from([HandshakeAction::Send(greeting)]),
            options: 0,
            no_zeroes: false,
            structured: false,
            base_allocation: None,
        }
    }

    /// Whether bytes are of use now. While a question is open or after the end they are not: leave them in the socket.
    pub fn wants_input(&self) -> bool {
        matches!(self.state, State::ClientFlags | State::Option | State::Skip { .. })
    }

    /// Takes bytes that arrived: at most a few KiB at a time, as what is beyond an open question is kept.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.inbox.extend_from_slice(bytes);
        self.advance();
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<HandshakeAction> {
        self.actions.pop_front()
    }

    /// Answers [`HandshakeAction::ListExports`].
    pub fn catalogue(&mut self, answer: Result<Vec<String>, Refusal>) {
        assert!(
            matches!(self.state, State::AwaitCatalogue),
            "a catalogue was not asked for in {:?}",
            self.state
        );
        self.state = State::Option;
        match answer {
            Ok(names) if names.len() <= LISTED_EXPORTS_MAX => {
                let mut out = Vec::new();
                for name in names {
                    let mut entry = Vec::with_capacity(4 + name.len());
                    entry.put_u32(name.len() as u32);
                    entry.put_slice(name.as_bytes());
                    put_reply(&mut out, option::LIST, option_reply::SERVER, &entry);
                }
                put_reply(&mut out, option::LIST, option_reply::ACK, &[]);
                self.send(out);
            }
            Ok(names) => {
                let words = format!("there are {} volumes, too many to list here", names.len());
                self.reply(option::LIST, option_reply::ERR_TOO_BIG, words.as_bytes());
            }
            Err(refusal) => self.refuse(option::LIST, &refusal),
        }
        self.advance();
    }

    /// Answers [`HandshakeAction::Describe`].
    pub fn description(&mut self, answer: Result<ExportInfo, Refusal>) {
        let state = std::mem::replace(&mut self.state, State::Option);
        let State::AwaitDescription(question) = state else {
            panic!("a description was not asked for in {state:?}");
        };
        match (question.option, answer) {
            (option::EXPORT_NAME, Err(refusal)) => {
                self.close(CloseReason::Refused(format!("`{}`: {refusal}", question.export)))
            }
            (option::EXPORT_NAME, Ok(info)) => {
                let mut out = Vec::new();
                out.put_u64(info.size);
                out.put_u16(self.transmission_flags(info));
                if !self.no_zeroes {
                    out.put_bytes(0, EXPORT_NAME_ZEROES);
                }
                self.send(out);
                self.finish(question.export, info);
            }
            (option, Err(refusal)) => self.refuse(option, &refusal),
            (option, Ok(info)) => {
                self.send_info(&question, info);
                if option == option::GO {
                    self.finish(question.export, info);
                }
            }
        }
        self.advance();
    }

    /// What arrived after the handshake's last option: the start of the transmission.
    pub fn into_rest(self) -> Vec<u8> {
        self.inbox
    }

    fn advance(&mut self) {
        loop {
            let progress = match self.state {
                State::ClientFlags => self.take_client_flags(),
                State::Option => self.take_option(),
                State::Skip { option, remaining } => self.skip(option, remaining),
                State::AwaitCatalogue | State::AwaitDescription(_) | State::Over => false,
            };
            if !progress {
                return;
            }
        }
    }

    fn take_client_flags(&mut self) -> bool {
        let Ok(flags) = self.inbox.as_slice().try_get_u32() else {
            return false;
        };
        self.inbox.drain(..4);
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if flags & !known != 0 {
            self.close(CloseReason::BadClientFlags(flags));
            return false;
        }
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.state = State::Option;
        true
    }

    fn take_option(&mut self) -> bool {
        let mut header = self.inbox.as_slice();
        let Ok(magic) = header.try_get_u64() else { return false };
        if magic != IHAVEOPT {
            self.close(CloseReason::BadMagic {
                place: "option",
                found: magic,
            });
            return false;
        }
        let (Ok(option), Ok(length)) = (header.try_get_u32(), header.try_get_u32()) else {
            return false;
        };
        if length > OPTION_SKIP_BYTES_MAX {
            self.close(CloseReason::TooLong {
                what: "an option",
                length,
            });
            return false;
        }
        if length > OPTION_BYTES_MAX {
            self.inbox.drain(..OPTION_HEADER_BYTES);
            self.state = State::Skip {
                option,
                remaining: length,
            };
            return true;
        }
        if header.len() < length as usize {
            return false;
        }
        self.options += 1;
        if self.options > OPTIONS_MAX {
            self.close(CloseReason::TooManyOptions);
            return false;
        }
        let rest = self.inbox.split_off(OPTION_HEADER_BYTES + length as usize);
        let taken = std::mem::replace(&mut self.inbox, rest);
        self.handle(option, &taken[OPTION_HEADER_BYTES..]);
        true
    }

    /// Drops the data of an option that is too long to be looked at, then refuses it.
    fn skip(&mut self, option: u32, remaining: u32) -> bool {
        let count = self.inbox.len().min(remaining as usize);
        self.inbox.drain(..count);
        let remaining = remaining - count as u32;
        if remaining > 0 {
            self.state = State::Skip { option, remaining };
            return false;
        }
        self.state = State::Option;
        if option == option::EXPORT_NAME {
            self.close(CloseReason::Refused("its name is too long".to_string()));
            return false;
        }
        self.reply(option, option_reply::ERR_TOO_BIG, b"the option is longer than 16 KiB");
        true
    }

    fn handle(&mut self, option: u32, data: &[u8]) {
        match option {
            option::EXPORT_NAME => match whole_string(data) {
                Ok(name) if name.len() <= VOLUME_NAME_BYTES_MAX => self.describe(option, name, false),
                Ok(_) => self.close(CloseReason::Refused(Refusal::Unknown.to_string())),
                Err(Malformed(words)) => self.close(CloseReason::Refused(words.to_string())),
            },
            option::ABORT => {
                self.reply(option, option_reply::ACK, &[]);
                self.close(CloseReason::Finished);
            }
            option::INFO | option::GO => match InfoRequest::parse(data) {
                Ok(request) if request.name.len() <= VOLUME_NAME_BYTES_MAX => {
                    self.describe(option, request.name, request.asks_for(info::NAME));
                }
                Ok(_) => self.refuse(option, &Refusal::Unknown),
                Err(Malformed(words)) => self.reply(option, option_reply::ERR_INVALID, words.as_bytes()),
            },
            option::LIST | option::STRUCTURED_REPLY | option::STARTTLS if !data.is_empty() => {
                self.reply(option, option_reply::ERR_INVALID, b"the option takes no data");
            }
            option::LIST => {
                self.state = State::AwaitCatalogue;
                self.actions.push_back(HandshakeAction::ListExports);
            }
            option::STRUCTURED_REPLY => {
                self.structured = true;
                self.reply(option, option_reply::ACK, &[]);
            }
            option::STARTTLS => self.reply(option, option_reply::ERR_UNSUP, b"this server has no TLS"),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, data),
            _ => self.reply(option, option_reply::ERR_UNSUP, b"unknown option"),
        }
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) {
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.base_allocation = None;
        }
        if !self.structured {
            return self.reply(
                option,
                option_reply::ERR_INVALID,
                b"structured replies must be negotiated first",
            );
        }
        let request = match MetaContextRequest::parse(data) {
            Ok(request) => request,
            Err(Malformed(words)) => return self.reply(option, option_reply::ERR_INVALID, words.as_bytes()),
        };
        let named = request.queries.contains(&BASE_ALLOCATION);
        let listed = request.queries.is_empty() || request.queries.contains(&BASE_WILDCARD);
        let mut out = Vec::new();
        if named || (!set && listed) {
            let mut context = Vec::with_capacity(4 + BASE_ALLOCATION.len());
            context.put_u32(if set { BASE_ALLOCATION_ID } else { 0 });
            context.put_slice(BASE_ALLOCATION.as_bytes());
            put_reply(&mut out, option, option_reply::META_CONTEXT, &context);
        }
        if set && named {
            self.base_allocation = Some(request.name.to_string());
        }
        put_reply(&mut out, option, option_reply::ACK, &[]);
        self.send(out);
    }

    fn describe(&mut self, option: u32, export: &str, wants_name: bool) {
        self.state = State::AwaitDescription(Question {
            option,
            export: export.to_string(),
            wants_name,
        });
        self.actions.push_back(HandshakeAction::Describe(export.to_string()));
    }

    fn send_info(&mut self, question: &Question, export: ExportInfo) {
        let mut out = Vec::new();
        let mut data = Vec::with_capacity(14);
        data.put_u16(info::EXPORT);
        data.put_u64(export.size);
        data.put_u16(self.transmission_flags(export));
        put_reply(&mut out, question.option, option_reply::INFO, &data);
        data.clear();
        data.put_u16(info::BLOCK_SIZE);
        data.put_u32(BLOCK_BYTES_MIN);
        data.put_u32(BLOCK_BYTES_PREFERRED);
        data.put_u32(PAYLOAD_BYTES_MAX);
        put_reply(&mut out, question.option, option_reply::INFO, &data);
        if question.wants_name {
            data.clear();
            data.put_u16(info::NAME);
            data.put_slice(question.export.as_bytes());
            put_reply(&mut out, question.option, option_reply::INFO, &data);
        }
        put_reply(&mut out, question.option, option_reply::ACK, &[]);
        self.send(out);
    }

    fn transmission_flags(&self, export: ExportInfo) -> u16 {
        use export_flag::*;
        // A write is durable when it is answered and seen by every connection then: CAN_MULTI_CONN is true.
        let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN;
        flags |= if export.read_only {
            READ_ONLY
        } else {
            SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO
        };
        if self.structured { flags | SEND_DF } else { flags }
    }

    fn finish(&mut self, export: String, info: ExportInfo) {
        self.state = State::Over;
        let base_allocation = self.structured && self.base_allocation.as_deref() == Some(export.as_str());
        let structured = self.structured;
        self.actions.push_back(HandshakeAction::Transmission(Negotiated {
            export,
            info,
            structured,
            base_allocation,
        }));
    }

    fn refuse(&mut self, option: u32, refusal: &Refusal) {
        let reply = match refusal {
            Refusal::Shutdown => option_reply::ERR_SHUTDOWN,
            // "The requested export is not available": the words tell the two cases apart.
            Refusal::Unknown | Refusal::Unavailable(_) => option_reply::ERR_UNKNOWN,
        };
        self.reply(option, reply, refusal.to_string().as_bytes());
    }

    fn reply(&mut self, option: u32, reply: u32, data: &[u8]) {
        let mut out = Vec::with_capacity(20 + data.len());
        put_reply(&mut out, option, reply, data);
        self.send(out);
    }

    fn send(&mut self, bytes: Vec<u8>) {
        self.actions.push_back(HandshakeAction::Send(bytes));
    }

    fn close(&mut self, reason: CloseReason) {
        self.state = State::Over;
        self.actions.push_back(HandshakeAction::Close(reason));
    }
}

fn put_reply(out: &mut Vec<u8>, option: u32, reply: u32, data: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(reply);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
