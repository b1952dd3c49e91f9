//! A way through the model, told in words.

use super::message::Message;
use super::promises::{Broken, device_name};
use super::state::{Cell, Op, Phase, Set, State, Version};
use super::step::{Action, Fate, Model};

/// Tells a way from a state on, a line per step, and what it breaks.
pub fn tell(model: &Model, start: &State, way: &[Action]) -> (Vec<String>, Option<Broken>) {
    let mut state = start.clone();
    let mut lines = Vec::new();
    for action in way {
        let Some(step) = model.step(&state, *action) else {
            lines.push(format!("(impossible: {action:?})"));
            return (lines, None);
        };
        lines.push(line(&state, &step.state, *action));
        state = step.state;
        if step.broken.is_some() {
            return (lines, step.broken);
        }
    }
    (lines, None)
}

fn names(set: Set) -> String {
    let names: Vec<String> = set.iter().map(|device| device_name(device).to_string()).collect();
    format!("{{{}}}", names.join(","))
}

fn cell(cell: Cell) -> String {
    match (cell.is_absent(), cell.version()) {
        (true, Version::ZERO) => "nothing".into(),
        (true, version) => format!("absence {version}"),
        (false, version) => version.to_string(),
    }
}

/// What a request asks for.
fn request(message: Message) -> String {
    match message {
        Message::Seal { .. } => "seal".into(),
        Message::Join { .. } => "join".into(),
        Message::Write { block, cell: c, .. } => format!("write {} to block {block}", cell(c)),
        Message::Repair { block, cell: c, .. } => format!("repair block {block} with {}", cell(c)),
        Message::Resync { block, cell: c, .. } => format!("resync block {block} to {}", cell(c)),
        Message::Drop { floor, .. } => format!("drop tombstones up to {floor}"),
        _ => format!("{message:?}"),
    }
}

fn answer(message: Message) -> String {
    match message {
        Message::Sealed { cells, .. } => format!("sealed, it holds {}", cells.map(cell).join(" and ")),
        Message::Joined { cells, .. } => format!("joined, it holds {}", cells.map(cell).join(" and ")),
        Message::Durable { block, cell: c, .. } => format!("it holds {} in block {block}", cell(c)),
        _ => format!("{message:?}"),
    }
}

fn line(before: &State, after: &State, action: Action) -> String {
    let name = device_name;
    let mut text = match action {
        Action::Grant(g) => format!("meta grants generation {g} to h{g}"),
        Action::ReadMap(g) => format!(
            "h{g} reads the group map: I = {}, J = {}",
            names(after.holder(g).config.insync),
            names(after.holder(g).config.joining)
        ),
        Action::Arrive(message, fate) => arrival(before, after, message, fate),
        Action::Hear(message) => format!("h{} hears a late answer: {}", message.holder(), answer_from(message)),
        Action::Write { holder, block, discard } => {
            let version = Version::new(holder, after.holder(holder).issued);
            let what = if discard { "discards" } else { "writes" };
            format!("h{holder} {what} block {block}, as {version}")
        }
        Action::Read { holder, block, device } => {
            let found = before.device(device).cells[block as usize];
            let idle = after.holder(holder).ops[block as usize] == Op::Idle;
            let answered = if idle { "; the read is ANSWERED with that" } else { "" };
            format!(
                "h{holder} reads block {block} from {}: {}{answered}",
                name(device),
                cell(found)
            )
        }
        Action::Confirm { holder, device } => format!(
            "{} confirms to h{holder} that it is at generation {holder}",
            name(device)
        ),
        Action::GiveGrant { holder, device } => format!("{} gives h{holder} a read grant", name(device)),
        Action::GrantEnds { holder, device } => format!("the read grant of {} to h{holder} runs out", name(device)),
        Action::Eject { holder, device } => format!("h{holder} proposes to eject {}", name(device)),
        Action::Settle(g) => format!("h{g} waits no longer for members that it has not heard: its base is settled"),
        Action::Invite { holder, device } => format!("h{holder} proposes that {} joins", name(device)),
        Action::Admit { holder, device } => format!("h{holder} proposes to admit {}", name(device)),
        Action::Commit { proposal, heard } => format!(
            "meta commits the proposal of h{}: I = {}, J = {}{}",
            proposal.holder(),
            names(after.meta.config.insync),
            names(after.meta.config.joining),
            if heard { "" } else { "; the answer is lost" }
        ),
        Action::Learn(g) => format!("h{g} learns that its proposal is committed"),
        Action::DropTombstones { holder, block } => format!("h{holder} has the tombstone of block {block} dropped"),
        Action::Release(g) => format!("h{g} has drained and releases the volume"),
        Action::Refusal { holder, device } => format!(
            "h{holder} is refused by {}, which has seen a higher generation",
            name(device)
        ),
        Action::Forget(device) => format!("{} is no member and drops its replica", name(device)),
        Action::Flush(device) => format!("{} puts everything on disk", name(device)),
        Action::Crash(device) => format!("{} crashes and starts again", name(device)),
    };
    for (g, (old, new)) in before.holders.iter().zip(&after.holders).enumerate() {
        if !old.complete && new.complete {
            text += &format!("; the attachment of h{} is complete", g + 1);
        }
        if old.phase != new.phase && new.phase == Phase::Serving {
            text += &format!("; h{} serves", g + 1);
        }
    }
    for (block, (old, new)) in before
        .watch
        .acknowledged
        .iter()
        .zip(&after.watch.acknowledged)
        .enumerate()
    {
        if old != new {
            text += &format!("; {new} of block {block} is ACKNOWLEDGED");
        }
    }
    for (old, new) in before.holders.iter().zip(&after.holders) {
        for (was, is) in old.ops.iter().zip(&new.ops) {
            if let (Op::Read { found, .. }, Op::Idle) = (was, is) {
                text += &format!("; the read is ANSWERED with {}", cell(*found));
            }
        }
    }
    text
}

fn answer_from(message: Message) -> String {
    match message.end() {
        super::message::End::From(device) => format!("{}: {}", device_name(device), answer(message)),
        _ => answer(message),
    }
}

fn arrival(before: &State, after: &State, message: Message, fate: Fate) -> String {
    let super::message::End::To(device) = message.end() else {
        return format!("{message:?}");
    };
    let changed = before.device(device) != after.device(device);
    let again = if changed { "" } else { " (nothing changes there)" };
    let heard = match fate {
        Fate::Heard => "; the answer is heard",
        Fate::Late => "; the answer is under way",
        Fate::Lost => match message {
            Message::Drop { .. } => "",
            _ => "; the answer is lost",
        },
    };
    format!(
        "{} gets from h{}: {}{again}{heard}",
        device_name(device),
        message.holder(),
        request(message)
    )
}
