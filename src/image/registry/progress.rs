//! Shows the progress of a pull on stderr.
//!
//! | `--progress` | terminal | elsewhere |
//! |---|---|---|
//! | `auto` | a bar for each layer, and a line with what is waited for | a line every five seconds |
//! | `plain` | a line for each layer that is in the store, and one every five seconds | the same |
//! | `json` | objects for each layer, and one with what is waited for | the same |
//! | `none` | nothing | nothing |
//!
//! A pull that takes less than five seconds prints nothing where stderr is not a terminal.

use super::{Progress, status::Status};
use crate::image::Digest;
use indicatif::{DecimalBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::{
    fmt::Write as _,
    io::{IsTerminal, Write},
    sync::{Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// The pause between two objects of `--progress json` about one layer.
const EVERY: Duration = Duration::from_millis(500);
/// The pause between two lines about the whole pull.
const LINES: Duration = Duration::from_secs(5);
/// Shorter waits are not shown.
const LONG_WAIT: Duration = Duration::from_secs(2);
/// Columns that the numbers beside a bar take, and those that a name with two numbers takes.
const NUMBERS: u16 = 54;

/// All layers of an image.
pub struct Board<'a> {
    kind: Progress,
    terminal: bool,
    bars: MultiProgress,
    status: &'a Status,
    image: String,
}

/// One layer.
pub struct Line<'a> {
    kind: Progress,
    bar: ProgressBar,
    layer: String,
    size: u64,
    written: Mutex<Instant>,
    status: &'a Status,
}

impl<'a> Board<'a> {
    /// A board for a pull of this image.
    pub fn new(kind: Progress, status: &'a Status, image: String) -> Self {
        let terminal = kind == Progress::Auto && std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self { kind, terminal, bars: MultiProgress::with_draw_target(target), status, image }
    }

    /// Runs the work and shows its progress meanwhile.
    pub fn watch<T>(&self, work: impl FnOnce() -> T) -> T {
        if self.kind == Progress::None {
            return work();
        }
        let (done, changed) = (Mutex::new(false), Condvar::new());
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut ended = done.lock().unwrap_or_else(PoisonError::into_inner);
                let mut spinner = None;
                while !*ended {
                    let pause = if self.terminal { Duration::from_secs(1) } else { LINES };
                    ended = changed.wait_timeout(ended, pause).unwrap_or_else(PoisonError::into_inner).0;
                    if !*ended {
                        self.tick(&mut spinner);
                    }
                }
                if let Some(spinner) = spinner {
                    ProgressBar::finish_and_clear(&spinner);
                }
            });
            let result = work();
            *done.lock().unwrap_or_else(PoisonError::into_inner) = true;
            changed.notify_all();
            result
        })
    }

    fn tick(&self, spinner: &mut Option<ProgressBar>) {
        let wait = self.status.longest_wait().filter(|(duration, _)| *duration >= LONG_WAIT);
        let waiting = wait.map(|(duration, what)| (duration.as_secs(), what));
        if self.terminal {
            if let Some(old) = spinner.take() {
                old.finish_and_clear();
                self.bars.remove(&old);
            }
            if let Some((seconds, what)) = waiting {
                let style = ProgressStyle::with_template("{wide_msg}")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner());
                let bar = self.bars.add(ProgressBar::new_spinner().with_style(style));
                bar.set_message(format!("waiting for {what} ({seconds} s)"));
                bar.tick();
                *spinner = Some(bar);
            }
            return;
        }
        let now = self.status.snapshot();
        if self.kind == Progress::Json {
            if let Some((seconds, what)) = waiting {
                print(&json!({"waiting_for": what, "seconds": seconds}).to_string());
            }
            return;
        }
        let mut line = format!("gpurun: pulling {}", self.image);
        if now.total_layers > 0 {
            let _ = write!(
                line,
                ": {} of {} layers, {} of {}",
                now.layers,
                now.total_layers,
                DecimalBytes(now.bytes),
                DecimalBytes(now.total_bytes)
            );
        }
        if let Some((seconds, what)) = waiting {
            let _ = write!(line, "; waiting for {what} ({seconds} s)");
        }
        print(&line);
    }

    /// Adds a layer that is about to be fetched.
    pub fn line(&self, layer: &Digest, size: u64) -> Line<'a> {
        let bar = self.bars.add(ProgressBar::new(size).with_style(style(columns())));
        bar.set_prefix(layer.hex()[..12].to_owned());
        Line {
            kind: self.kind,
            bar,
            layer: layer.to_string(),
            size,
            written: Mutex::new(Instant::now()),
            status: self.status,
        }
    }
}

/// The width of the terminal. indicatif finds it for stdout, which may be a file.
fn columns() -> u16 {
    rustix::termios::tcgetwinsize(std::io::stderr()).map_or(80, |size| size.ws_col).max(1)
}

/// The style of a layer's bar, which must fit on one line: a wrapped line cannot be redrawn in place.
fn style(columns: u16) -> ProgressStyle {
    let sizes = "{prefix} {decimal_bytes:>9} of {decimal_total_bytes:9}";
    let template = match columns.saturating_sub(NUMBERS + 1) {
        0..10 if columns < 36 => "{prefix}".to_owned(),
        0..10 => sizes.to_owned(),
        rest => format!("{sizes} {{bar:{}}} {{decimal_bytes_per_sec:>11}} {{eta:>4}}", rest.min(40)),
    };
    // The template is valid: a test draws it in every width.
    ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Errors are ignored: the reader may be gone, and the pull continues.
fn print(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

impl Line<'_> {
    /// So many bytes more have come.
    pub fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        self.status.advance(bytes);
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if self.kind == Progress::Json && written.elapsed() >= EVERY {
            *written = Instant::now();
            self.object(false);
        }
    }

    /// The layer is in the store.
    pub fn done(&self) {
        self.bar.finish();
        self.status.layer_done();
        match self.kind {
            Progress::Plain => print(&format!("{}: {}", self.layer, DecimalBytes(self.size))),
            Progress::Json => self.object(true),
            Progress::Auto | Progress::None => {}
        }
    }

    fn object(&self, done: bool) {
        let object =
            json!({"layer": self.layer, "bytes": self.bar.position(), "size": self.size, "done": done});
        print(&object.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use indicatif::TermLike;
    use std::{io, sync::Arc};

    /// A terminal of 400 columns, so that nothing is cut, which keeps what is written.
    #[derive(Debug, Clone, Default)]
    struct Paper(Arc<Mutex<String>>);

    impl TermLike for Paper {
        fn width(&self) -> u16 {
            400
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(&format!("{text}\n"))
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_bar_fits_every_terminal() {
        for columns in [20_u16, 36, 40, 60, 64, 65, 66, 72, 80, 100, 132, 200] {
            let paper = Paper::default();
            let target = ProgressDrawTarget::term_like(Box::new(paper.clone()));
            let bar = ProgressBar::with_draw_target(Some(999_990_000_000), target).with_style(style(columns));
            bar.set_prefix("0123456789ab");
            bar.set_position(999_980_000_000);
            bar.tick();
            let drawn = paper.0.lock().unwrap().clone();
            // The last drawn line, without padding.
            let drawn = drawn.trim_end().rsplit("          ").next().unwrap().trim();
            assert!(drawn.starts_with("0123456789ab"), "{columns}: {drawn:?}");
            assert!(
                !drawn.contains('\n') && drawn.chars().count() < usize::from(columns),
                "{columns}: {drawn:?}"
            );
        }
    }
}
