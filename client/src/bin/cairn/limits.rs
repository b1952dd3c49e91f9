//! Every bound of the command, in one place.

use std::time::Duration;

use cairn_proto::units::ByteSize;

/// How long a command waits for the metadata servers in all.
pub(crate) const META_DEADLINE: Duration = Duration::from_secs(5);
/// Entries that are asked for in one page of a list.
pub(crate) const LIST_PAGE: u32 = 1000;
/// The lowest rate of background work, in bytes a second, beside none.
pub(crate) const RATE_MIN: ByteSize = ByteSize(64 << 10);
/// Days between two verifications of a device at the most.
pub(crate) const SCRUB_INTERVAL_DAYS_MAX: u32 = 3650;
/// Storage nodes that `cairn dev` starts at the most.
pub(crate) const DEV_NODES_MAX: i64 = 32;
/// Metadata servers that `cairn dev` starts at the most.
pub(crate) const DEV_METAS_MAX: u32 = 5;
/// How long a process may take to stop in good order. `cairn dev` waits longer than this before it kills.
pub(crate) const SHUTDOWN_BOUND: Duration = Duration::from_secs(8);
/// Threads of a process's control plane. The data paths have threads of their own.
pub(crate) const WORKER_THREADS: usize = 2;
/// How long `cairn dev` waits for processes that it asked to stop before it kills them.
pub(crate) const STOP_BOUND: Duration = Duration::from_secs(9);
/// How long a killed process may take to be gone.
pub(crate) const KILL_BOUND: Duration = Duration::from_secs(5);
/// How long a cluster may take from its start until its volumes can be used.
pub(crate) const START_BOUND: Duration = Duration::from_secs(60);
/// How often `cairn dev` looks whether what it waits for has come.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// The pause before a process that died is started again: the first, and the longest.
pub(crate) const RESTART_PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// A process that ran this long before it died is started again without a longer pause.
pub(crate) const RESTART_CALM: Duration = Duration::from_secs(60);
/// The longest path of a Unix socket.
pub(crate) const UNIX_PATH_BYTES_MAX: usize = 107;
/// Ports that `cairn dev` chooses from.
pub(crate) const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// Ports that are tried before one is found.
pub(crate) const PORT_ATTEMPTS_MAX: u32 = 2000;
/// A log that is longer than this at the start of its process is put aside as `*.log.old`.
pub(crate) const LOG_BYTES_MAX: u64 = 64 << 20;
/// Lines of a log that are shown when its process dies during the start.
pub(crate) const LOG_TAIL_LINES: usize = 8;
/// Bytes at the end of a log that those lines are looked for in.
pub(crate) const LOG_TAIL_BYTES: u64 = 16 << 10;

const _: () = assert!(SHUTDOWN_BOUND.as_millis() < STOP_BOUND.as_millis());
/// Volumes whose first read is under way at the same time.
pub(crate) const PROBES_MAX: usize = 16;
/// How often `cairn dev --foreground-logs` looks for new lines.
pub(crate) const LOG_FOLLOW_INTERVAL: Duration = Duration::from_millis(100);
/// How often `cairn events --follow` asks.
pub(crate) const EVENTS_INTERVAL: Duration = Duration::from_secs(1);
/// Events that are shown unless told otherwise.
pub(crate) const EVENTS_SHOWN: u32 = 50;
/// Repairs that `cairn status` shows to people at the most.
pub(crate) const REPAIRS_SHOWN_MAX: usize = 20;
/// How often `cairn dev` says what it waits for.
pub(crate) const PATIENCE_INTERVAL: Duration = Duration::from_secs(5);
/// How long a device that is in use is waited for: who had it may just be ending.
pub(crate) const IN_USE_PATIENCE: Duration = Duration::from_secs(2);
/// How often a long look at a device says how far it is: on a terminal, and in a log.
pub(crate) const PROGRESS_INTERVAL_TERMINAL: Duration = Duration::from_millis(100);
/// See [`PROGRESS_INTERVAL_TERMINAL`].
pub(crate) const PROGRESS_INTERVAL_LOG: Duration = Duration::from_secs(10);
