//! Shows the progress of long local work on stderr: decompressing an archive, unpacking layers.
//!
//! Nothing is shown in the first second. On a terminal one line is overwritten; to a file or a pipe (CI) a line is written
//! every few seconds, so that the job does not look hung.

use super::registry::Progress;
use std::{
    io::{self, IsTerminal, Read, Write},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Delay before the first line.
const QUIET: Duration = Duration::from_secs(1);
/// Interval between updates of a terminal's line, and between objects of `--progress json`.
const SOON: Duration = Duration::from_millis(500);
/// Interval between lines.
const LINES: Duration = Duration::from_secs(3);

/// Work in progress; dropping it ends the display.
#[derive(Debug)]
pub struct Unpacking {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    what: String,
    bytes: AtomicU64,
    total: Option<u64>,
    over: Mutex<bool>,
    ended: Condvar,
}

#[derive(Debug, Clone, Copy)]
enum Form {
    Line,
    Lines,
    Json,
}

impl Unpacking {
    /// Starts the display of `what`, with the bytes read and, if known, the total.
    pub fn start(what: String, total: Option<u64>, progress: Progress) -> Self {
        let (bytes, over, ended) = (AtomicU64::new(0), Mutex::new(false), Condvar::new());
        let shared = Arc::new(Shared { what, bytes, total, over, ended });
        let form = match progress {
            Progress::None => None,
            Progress::Json => Some(Form::Json),
            Progress::Auto if io::stderr().is_terminal() => Some(Form::Line),
            _ => Some(Form::Lines),
        };
        let thread = form.and_then(|form| {
            let shared = Arc::clone(&shared);
            // Without a thread nothing is shown, and the work goes on.
            thread::Builder::new().spawn(move || shared.show(form)).ok()
        });
        Self { shared, thread }
    }

    /// Counts the bytes of a reader.
    pub fn count<R>(&self, inner: R) -> Counted<R> {
        Counted { inner, shared: Arc::clone(&self.shared) }
    }
}

impl Drop for Unpacking {
    fn drop(&mut self) {
        *self.shared.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.ended.notify_all();
        if let Some(thread) = self.thread.take() {
            // The thread only writes to stderr, whose reader may be gone.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn show(&self, form: Form) {
        let started = Instant::now();
        let mut shown = false;
        let mut wait = QUIET;
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            over = self
                .ended
                .wait_timeout_while(over, wait, |over| !*over)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(over, _)| over);
            if *over {
                break;
            }
            wait = if matches!(form, Form::Lines) { LINES } else { SOON };
            shown = true;
            // A failing stderr must not stop the work.
            let _ = io::stderr().write_all(self.text(form, started.elapsed()).as_bytes());
        }
        if shown && matches!(form, Form::Line) {
            let _ = io::stderr().write_all(b"\r\x1b[K");
        }
    }

    fn text(&self, form: Form, elapsed: Duration) -> String {
        let bytes = self.bytes.load(Ordering::Relaxed);
        let total = self.total.map_or_else(String::new, |total| format!(" of {}", total / 1_000_000));
        let text = format!("{}: {}{total} MB, {} s", self.what, bytes / 1_000_000, elapsed.as_secs());
        match form {
            // A wrapped line cannot be overwritten.
            Form::Line => format!("\r\x1b[K{}", fitting(&text, width())),
            Form::Lines => text + "\n",
            Form::Json => {
                let object = serde_json::json!({"work": self.what, "bytes": bytes, "size": self.total});
                format!("{object}\n")
            }
        }
    }
}

/// Shortens a text to its end, which is the part that changes.
fn fitting(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width { text.into() } else { text.chars().skip(length - width).collect() }
}

fn width() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stderr());
    size.ok().map(|size| usize::from(size.ws_col)).filter(|width| *width > 1).unwrap_or(80) - 1
}

/// A reader that counts its bytes.
#[derive(Debug)]
pub struct Counted<R> {
    inner: R,
    shared: Arc<Shared>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.shared.bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
