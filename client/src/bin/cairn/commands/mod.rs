//! Commands that ask the cluster, or change it.

pub(crate) mod completion;
pub(crate) mod device;
pub(crate) mod drain;
pub(crate) mod events;
pub(crate) mod health;
pub(crate) mod meta;
pub(crate) mod node;
pub(crate) mod status;
pub(crate) mod volume;

use std::time::{SystemTime, UNIX_EPOCH};

use cairn_proto::control::v1;
use cairn_proto::ids::{DeviceId, DeviceUuid, Incarnation};

/// Runs one command to its end, on this thread.
pub(crate) fn block_on<F: Future>(command: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime needs only memory and an epoll descriptor")
        .block_on(command)
}

/// A device as it is named everywhere.
fn device_id(id: Option<&v1::DeviceId>) -> DeviceId {
    let id = id.cloned().unwrap_or_default();
    DeviceId {
        uuid: DeviceUuid(id.uuid.try_into().unwrap_or_default()),
        incarnation: Incarnation(id.incarnation),
    }
}

/// Sixteen bytes as a UUID is written; empty for anything else.
fn uuid_text(bytes: &[u8]) -> String {
    bytes
        .try_into()
        .map(|bytes| DeviceUuid(bytes).to_string())
        .unwrap_or_default()
}

/// The first part of a UUID: enough for a table.
fn short(uuid: &DeviceUuid) -> String {
    uuid.to_string().chars().take(8).collect()
}

/// `5 s`, `3 min`, `2 h`, `4 d`: how long ago something was.
fn ago(ms: u64) -> String {
    match ms / 1000 {
        s @ 0..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}

/// Milliseconds between a point in time and now; 0 for the future.
fn since(unix_ms: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (now.as_millis() as u64).saturating_sub(unix_ms)
}

/// A point in time as people read it, to the second: `2026-11-21 16:04:25Z`.
fn utc(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days are counted from 1 March of the year 0 on, so that a leap day ends its year (Howard Hinnant, "chrono-compatible
    // low-level date algorithms").
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + next;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}Z")
}

/// `31 %`; of nothing it is nothing.
fn percent(part: u64, whole: u64) -> String {
    let percent = (u128::from(part) * 100).checked_div(u128::from(whole)).unwrap_or(0);
    format!("{percent} %")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_shares_are_short() {
        assert_eq!(ago(0), "0 s");
        assert_eq!(ago(119_999), "119 s");
        assert_eq!(ago(120_000), "2 min");
        assert_eq!(ago(7_200_000), "2 h");
        assert_eq!(ago(86_400_000 * 3), "3 d");
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00Z"),
            (951_782_400, "2000-02-29 00:00:00Z"),
            (1_709_251_199, "2024-02-29 23:59:59Z"),
            (1_709_251_200, "2024-03-01 00:00:00Z"),
            (4_102_444_799, "2099-12-31 23:59:59Z"),
        ] {
            assert_eq!(utc(seconds * 1000 + 999), text);
        }
        assert_eq!(percent(1, 3), "33 %");
        assert_eq!(percent(0, 0), "0 %");
        assert_eq!(percent(u64::MAX, u64::MAX), "100 %");
    }
}
