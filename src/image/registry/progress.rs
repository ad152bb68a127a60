//! How far each layer is, on stderr.

use super::Progress;
use crate::image::Digest;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::{
    io::{IsTerminal, Write},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// An object of `--progress json` is written so often, for each layer.
const EVERY: Duration = Duration::from_millis(500);

/// All layers of an image.
pub struct Board {
    kind: Progress,
    bars: MultiProgress,
}

/// One layer.
pub struct Line {
    kind: Progress,
    bar: ProgressBar,
    layer: String,
    size: u64,
    written: Mutex<Instant>,
}

impl Board {
    /// An empty one.
    pub fn new(kind: Progress) -> Self {
        let target = match kind {
            Progress::Auto if std::io::stderr().is_terminal() => ProgressDrawTarget::stderr(),
            _ => ProgressDrawTarget::hidden(),
        };
        Self { kind, bars: MultiProgress::with_draw_target(target) }
    }

    /// A layer that is about to come.
    pub fn line(&self, layer: &Digest, size: u64) -> Line {
        let style = "{prefix} {bar:30} {decimal_bytes:>10} of {decimal_total_bytes:10} {decimal_bytes_per_sec:>12} {eta:>4}";
        // The template is a constant, and good.
        let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.bars.add(ProgressBar::new(size).with_style(style));
        bar.set_prefix(layer.hex()[..12].to_owned());
        Line { kind: self.kind, bar, layer: layer.to_string(), size, written: Mutex::new(Instant::now()) }
    }
}

impl Line {
    /// So many bytes more have come.
    pub fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if self.kind == Progress::Json && written.elapsed() >= EVERY {
            *written = Instant::now();
            self.object(false);
        }
    }

    /// The layer is in the store.
    pub fn done(&self) {
        self.bar.finish();
        match self.kind {
            // Who reads this may be gone, and the image matters more.
            Progress::Plain => {
                let _ = writeln!(std::io::stderr(), "{}: {}", self.layer, indicatif::DecimalBytes(self.size));
            }
            Progress::Json => self.object(true),
            Progress::Auto | Progress::None => {}
        }
    }

    fn object(&self, done: bool) {
        let object =
            json!({"layer": self.layer, "bytes": self.bar.position(), "size": self.size, "done": done});
        let _ = writeln!(std::io::stderr(), "{object}");
    }
}
