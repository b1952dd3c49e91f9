//! The Prometheus endpoint of a process: `GET /metrics` over plain HTTP, for every kind of Cairn process.

mod seconds;

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

pub use seconds::Seconds;

/// Requests that are answered at the same time; more wait in the listen queue.
const CONNECTIONS_MAX: usize = 8;
/// Bytes of a request's head at the most.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// How long one request may take from connection to answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How often old samples are folded into the histograms, so that memory stays flat when nobody asks.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Upper bounds of the buckets of every histogram whose name ends in `_seconds`, those of [`Seconds`] too.
const SECONDS_BUCKETS: [f64; 16] = [
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0,
    5.0,
];

/// Why there is no endpoint.
#[derive(Debug)]
pub enum MetricsError {
    /// The address can't be listened on.
    Listen(SocketAddr, std::io::Error),
    /// Another recorder of metrics is installed in this process.
    Recorder(String),
}

impl fmt::Display for MetricsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MetricsError::Listen(address, error) => write!(
                f,
                "can't serve metrics on {address} ({error}): choose another address for them, or end what uses it"
            ),
            MetricsError::Recorder(error) => write!(f, "can't record metrics in this process: {error}"),
        }
    }
}

impl std::error::Error for MetricsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            MetricsError::Listen(_, error) => Some(error),
            MetricsError::Recorder(_) => None,
        }
    }
}

/// A running endpoint. Dropping it stops it; what was recorded stays.
#[derive(Debug)]
pub struct MetricsServer {
    local_addr: SocketAddr,
    tasks: [JoinHandle<()>; 2],
}

impl MetricsServer {
    /// Where it listens: the port is the real one when 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Records the metrics of this process and serves them at `http://ADDR/metrics`. May be called again for another
/// address: the recorder is shared. Must be called within a tokio runtime.
///
/// # Errors
/// The address can't be listened on, or the process records its metrics elsewhere.
pub async fn serve_metrics(listen: SocketAddr) -> Result<MetricsServer, MetricsError> {
    let handle = recorder()?;
    let failed = |error| MetricsError::Listen(listen, error);
    let listener = TcpListener::bind(listen).await.map_err(failed)?;
    let local_addr = listener.local_addr().map_err(failed)?;
    let upkeep = handle.clone();
    let tasks = [
        tokio::spawn(accept(listener, handle)),
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(UPKEEP_INTERVAL).await;
                upkeep.run_upkeep();
            }
        }),
    ];
    Ok(MetricsServer { local_addr, tasks })
}

fn recorder() -> Result<PrometheusHandle, MetricsError> {
    static HANDLE: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();
    let handle = HANDLE.get_or_init(|| {
        let matcher = metrics_exporter_prometheus::Matcher::Suffix("_seconds".to_string());
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(matcher, &SECONDS_BUCKETS)
            .map_err(|error| error.to_string())?
            .build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).map_err(|error| error.to_string())?;
        Ok(handle)
    });
    handle.clone().map_err(MetricsError::Recorder)
}

async fn accept(listener: TcpListener, handle: PrometheusHandle) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let handle = handle.clone();
                tokio::spawn(async move {
                    // Whoever asks and does not listen to the answer has only himself to blame.
                    let _ = tokio::time::timeout(REQUEST_TIMEOUT, answer(stream, &handle)).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the metrics endpoint can't accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, handle: &PrometheusHandle) -> std::io::Result<()> {
    let mut head = Vec::with_capacity(1024);
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        if head.len() >= REQUEST_BYTES_MAX || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let path = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
    let (status, body) = if head.starts_with(b"GET ") && (path == b"/metrics" || path.starts_with(b"/metrics?")) {
        ("200 OK", handle.render())
    } else {
        ("404 Not Found", "ask for /metrics\n".to_string())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn what_is_counted_is_served_and_garbage_ends_only_its_connection() {
        let server = serve_metrics("127.0.0.1:0".parse().unwrap()).await.unwrap();
        metrics::counter!("cairn_metrics_test_total").increment(3);
        let garbage = ask(server.local_addr(), b"\x00\xff\r\n\r\n").await;
        assert!(garbage.starts_with("HTTP/1.1 404"), "{garbage}");
        let answer = ask(server.local_addr(), b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("cairn_metrics_test_total 3"), "{answer}");
        let again = serve_metrics(server.local_addr()).await;
        assert!(matches!(again, Err(MetricsError::Listen(..))), "a port is taken once");
    }
}
