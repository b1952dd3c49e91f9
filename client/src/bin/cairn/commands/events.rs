//! `cairn events`.

use cairn_meta::client::MetaClient;
use cairn_proto::control::v1;
use serde::Serialize;

use super::{block_on, device_id, utc};
use crate::args::{Events, Global};
use crate::context::meta_client;
use crate::failure::Failure;
use crate::limits::{EVENTS_INTERVAL, LIST_PAGE};
use crate::output;

/// Something that has happened, for programs.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct EventRecord {
    id: u64,
    unix_ms: u64,
    kind: String,
    message: String,
    cause: Option<String>,
    volume_id: Option<u64>,
    volume: Option<String>,
    group: Option<u32>,
    device: Option<String>,
    incarnation: Option<String>,
    node_id: Option<u64>,
}

impl From<v1::Event> for EventRecord {
    fn from(event: v1::Event) -> EventRecord {
        let device = event.device.as_ref().map(|id| device_id(Some(id)));
        EventRecord {
            id: event.id,
            unix_ms: event.unix_ms,
            kind: event.kind,
            message: event.message,
            cause: Some(event.cause).filter(|cause| !cause.is_empty()),
            volume_id: Some(event.volume_id).filter(|id| *id != 0),
            volume: Some(event.volume).filter(|name| !name.is_empty()),
            group: event.group,
            device: device.map(|id| id.uuid.to_string()),
            incarnation: device.map(|id| id.incarnation.to_string()),
            node_id: Some(event.node_id).filter(|id| *id != 0),
        }
    }
}

#[derive(Serialize)]
struct Listing {
    events: Vec<EventRecord>,
    first_id: Option<u64>,
    last_id: Option<u64>,
}

pub(crate) fn run(global: &Global, args: &Events) -> Result<(), Failure> {
    let meta = meta_client(global)?;
    block_on(async {
        let request = v1::ListEventsRequest {
            after: 0,
            limit: args.limit,
            volume: args.volume.clone().unwrap_or_default(),
            newest: true,
        };
        let answer = meta.list_events(request).await;
        let answer = answer.map_err(|error| Failure::of_meta("list the events", &meta.endpoints(), &error))?;
        let last = answer.last_id;
        let listing = Listing {
            first_id: Some(answer.first_id).filter(|id| *id != 0),
            last_id: Some(answer.last_id).filter(|id| *id != 0),
            events: answer.events.into_iter().map(EventRecord::from).collect(),
        };
        if args.follow {
            show_lines(global, &listing.events)?;
            return follow(global, &meta, args, last).await;
        }
        output::show(global.json, &listing, || {
            if listing.events.is_empty() {
                return "nothing has happened that was written down\n".to_string();
            }
            listing.events.iter().map(line).collect()
        })
    })
}

/// Goes on for ever, over changes of the leader too.
async fn follow(global: &Global, meta: &MetaClient, args: &Events, mut last: u64) -> Result<(), Failure> {
    let mut is_cut_off = false;
    loop {
        tokio::time::sleep(EVENTS_INTERVAL).await;
        let request = v1::ListEventsRequest {
            after: last,
            limit: LIST_PAGE,
            volume: args.volume.clone().unwrap_or_default(),
            newest: false,
        };
        let answer = match meta.list_events(request).await {
            Ok(answer) => answer,
            Err(error) => {
                if !is_cut_off {
                    eprintln!("cairn: no events for a while, trying on: {error}");
                }
                is_cut_off = true;
                continue;
            }
        };
        is_cut_off = false;
        if answer.first_id > last.saturating_add(1) {
            eprintln!("cairn: {} events were missed", answer.first_id - last - 1);
        }
        last = match answer.events.last() {
            Some(event) if answer.more => event.id,
            _ => answer.last_id.max(last),
        };
        let events: Vec<EventRecord> = answer.events.into_iter().map(EventRecord::from).collect();
        show_lines(global, &events)?;
    }
}

/// One line for each, for programs too: who follows can't wait for the end of a document.
fn show_lines(global: &Global, events: &[EventRecord]) -> Result<(), Failure> {
    let json = |event: &EventRecord| {
        let text = serde_json::to_string(event).expect("what is printed has string keys only");
        format!("{text}\n")
    };
    let text: String = match global.json {
        true => events.iter().map(json).collect(),
        false => events.iter().map(line).collect(),
    };
    output::print(&text)
}

fn line(event: &EventRecord) -> String {
    let cause = event
        .cause
        .as_ref()
        .map(|cause| format!(": {cause}"))
        .unwrap_or_default();
    format!("{}  {}{cause}\n", utc(event.unix_ms), event.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> v1::Event {
        v1::Event {
            id: 9,
            unix_ms: 1_790_000_000_123,
            kind: "ejected".to_string(),
            message: "device 03030303 of node `n3` does not count any more in group 0 of volume `demo`".to_string(),
            cause: "it is not heard of".to_string(),
            volume_id: 7,
            volume: "demo".to_string(),
            group: Some(0),
            device: Some(v1::DeviceId {
                uuid: vec![3; 16],
                incarnation: 1,
            }),
            node_id: 3,
        }
    }

    #[test]
    fn an_event_is_a_line_for_people() {
        assert_eq!(
            line(&event().into()),
            "2026-09-21 14:13:20Z  device 03030303 of node `n3` does not count any more in group 0 of volume `demo`: it is \
             not heard of\n"
        );
    }

    #[test]
    fn an_event_has_stable_keys_for_programs() {
        let json = serde_json::to_value(EventRecord::from(event())).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys.join(" "),
            "cause device group id incarnation kind message node_id unix_ms volume volume_id"
        );
        let bare = serde_json::to_value(EventRecord::from(v1::Event::default())).unwrap();
        assert!(bare["cause"].is_null() && bare["volume"].is_null() && bare["device"].is_null());
    }
}
