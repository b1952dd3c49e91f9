//! Commands to an injector that runs as a process of its own: lines of text over a Unix socket, each with one line for an
//! answer, `ok`, `ok WORDS` or `error: WORDS`.

use std::fmt;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::limits::{ANSWER_BOUND, COMMAND_BYTES_MAX, CONTROLLERS_MAX};
use crate::live::wait::wait_until;

/// What obeys: a command without its newline in; words for the answer, or why not, out. Without newlines.
pub type Obey = dyn Fn(&str) -> Result<String, String> + Send + Sync;

/// How long a silent controller keeps one of the few connections.
const IDLE_BOUND: Duration = Duration::from_secs(600);

/// A control socket that is served by threads of its own until it is dropped, which removes it.
pub struct Control {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    /// Commands that are not answered yet.
    busy: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Serves commands at `path`. What a dead process left there is replaced.
    ///
    /// # Errors
    /// The socket can't be made: there is something else at `path`, a living process serves it, or its directory is missing.
    pub fn serve(path: &Path, obey: Arc<Obey>) -> io::Result<Control> {
        let listener = bind(path)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let busy = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&busy);
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || {
            let controllers = Arc::new(AtomicUsize::new(0));
            for stream in listener.incoming() {
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                if controllers.fetch_add(1, Ordering::AcqRel) >= CONTROLLERS_MAX {
                    controllers.fetch_sub(1, Ordering::AcqRel);
                    continue;
                }
                let (obey, count, busy) = (Arc::clone(&obey), Arc::clone(&controllers), Arc::clone(&counting));
                let served = std::thread::Builder::new().name("controller".into()).spawn(move || {
                    // A controller that goes away in the middle of a command is nobody's trouble.
                    let _ = converse(stream, &*obey, &busy);
                    count.fetch_sub(1, Ordering::AcqRel);
                });
                if served.is_err() {
                    controllers.fetch_sub(1, Ordering::AcqRel);
                }
            }
        })?;
        Ok(Control {
            path: path.to_owned(),
            stop,
            busy,
            thread: Some(thread),
        })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread; it fails only if that has ended already.
        let _ = UnixStream::connect(&self.path);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.path);
        // Whoever told this process to end gets the answer.
        wait_until(ANSWER_BOUND, || self.busy.load(Ordering::Acquire) == 0);
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let dead =
                matches!(UnixStream::connect(path), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused);
            if !dead {
                return Err(error);
            }
            fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
}

fn converse(stream: UnixStream, obey: &Obey, busy: &AtomicUsize) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE_BOUND))?;
    stream.set_write_timeout(Some(ANSWER_BOUND))?;
    let mut answers = stream.try_clone()?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        let read = lines.by_ref().take(COMMAND_BYTES_MAX as u64).read_line(&mut line)?;
        if read == 0 {
            return Ok(());
        }
        busy.fetch_add(1, Ordering::AcqRel);
        let complete = line.ends_with('\n');
        let answer = if complete {
            match obey(line.trim()) {
                Ok(words) if words.is_empty() => "ok\n".to_string(),
                Ok(words) => format!("ok {words}\n"),
                Err(words) => format!("error: {words}\n"),
            }
        } else {
            format!("error: a command is one line of at most {COMMAND_BYTES_MAX} bytes\n")
        };
        let answered = answers.write_all(answer.as_bytes());
        busy.fetch_sub(1, Ordering::AcqRel);
        answered?;
        if !complete {
            return Ok(());
        }
    }
}

/// Sends one command to the control socket at `path` and waits for the answer's words.
///
/// # Errors
/// Nobody serves it, no answer came within 20 s, or the words of an `error`.
pub fn ask(path: &Path, command: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(ANSWER_BOUND))?;
    stream.set_write_timeout(Some(ANSWER_BOUND))?;
    stream.write_all(format!("{command}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).take(1 << 20).read_line(&mut answer)?;
    let answer = answer.trim_end();
    match (answer, answer.strip_prefix("ok "), answer.strip_prefix("error: ")) {
        ("ok", ..) => Ok(String::new()),
        (_, Some(words), _) => Ok(words.to_string()),
        (_, _, Some(words)) => Err(io::Error::other(words.to_string())),
        _ => Err(io::Error::other(format!("no answer to `{command}`, but `{answer}`"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo(dir: &Path) -> (PathBuf, Control) {
        let path = dir.join("control");
        let obey = |line: &str| match line {
            "quiet" => Ok(String::new()),
            "bad" => Err("that is bad".to_string()),
            line => Ok(format!("<{line}>")),
        };
        let control = Control::serve(&path, Arc::new(obey)).unwrap();
        (path, control)
    }

    #[test]
    fn commands_are_answered_and_the_socket_goes_with_its_server() {
        let dir = tempfile::tempdir().unwrap();
        let (path, control) = echo(dir.path());
        assert_eq!(ask(&path, "quiet").unwrap(), "");
        assert_eq!(ask(&path, "a b").unwrap(), "<a b>");
        assert_eq!(ask(&path, "bad").unwrap_err().to_string(), "that is bad");
        drop(control);
        assert!(!path.exists());
        assert!(ask(&path, "quiet").is_err());
    }

    #[test]
    fn a_socket_of_a_dead_process_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(dir.path().join("control")).unwrap());
        let (path, control) = echo(dir.path());
        assert_eq!(ask(&path, "x").unwrap(), "<x>");
        assert!(Control::serve(&path, Arc::new(|_: &str| Ok(String::new()))).is_err());
        assert_eq!(ask(&path, "x").unwrap(), "<x>");
        drop(control);
    }

    #[test]
    fn an_endless_command_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, _control) = echo(dir.path());
        let error = ask(&path, &"x".repeat(COMMAND_BYTES_MAX - 1)).map(|words| words.len());
        assert_eq!(error.unwrap(), COMMAND_BYTES_MAX + 1);
        let mut stream = UnixStream::connect(&path).unwrap();
        // The server may close before all of it is written.
        let _ = stream.write_all(&[b'x'; COMMAND_BYTES_MAX]);
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        assert!(answer.starts_with("error: a command is one line"), "{answer}");
    }
}
