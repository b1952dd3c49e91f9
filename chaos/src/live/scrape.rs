//! Metrics of a running process, as its endpoint shows them.

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// How long a process may take to answer.
const ANSWER_BOUND: Duration = Duration::from_secs(10);
/// No process shows more.
const BYTES_MAX: u64 = 16 << 20;

/// All metrics of the process whose endpoint has this address, in Prometheus' text format. A process that falls silent within its
/// answer is an error; what came before is lost.
pub fn scrape(address: impl ToSocketAddrs) -> std::io::Result<String> {
    let mut text = Vec::new();
    fetch(address, &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The same as far as it comes: all that the process has said before it fell silent, which may be nothing.
pub fn scrape_what_comes(address: impl ToSocketAddrs) -> String {
    let mut text = Vec::new();
    let _ = fetch(address, &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

fn fetch(address: impl ToSocketAddrs, text: &mut Vec<u8>) -> std::io::Result<()> {
    let none = || std::io::Error::other("the address of the metrics names no host");
    let address = address.to_socket_addrs()?.next().ok_or_else(none)?;
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_BOUND)?;
    stream.set_read_timeout(Some(ANSWER_BOUND))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nConnection: close\r\n\r\n")?;
    stream.take(BYTES_MAX).read_to_end(text)?;
    Ok(())
}

/// The sum of all series of `name` whose labels contain `label` (all when it is empty). Zero when there is none.
pub fn sum(text: &str, name: &str, label: &str) -> f64 {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let is_it = rest.starts_with([' ', '{']) && rest.contains(label);
        is_it.then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
    });
    values.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_of_exactly_this_name_are_summed() {
        let text = "# TYPE a counter\na{op=\"read\"} 1\na{op=\"write\"} 2.5\na_total 9\nb 7\n";
        assert_eq!(sum(text, "a", ""), 3.5);
        assert_eq!(sum(text, "a", "op=\"write\""), 2.5);
        assert_eq!(sum(text, "b", ""), 7.0);
        assert_eq!(sum(text, "c", ""), 0.0);
    }
}
