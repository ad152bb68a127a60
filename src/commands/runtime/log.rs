//! The low-level runtime's own log, in which engines look for the reason of a failure. Its lines are logrus', Go's logger.
//!
//! A failure is one line there (`Error::for_engine`), and a paragraph on a terminal.

use super::args::RuntimeArgs;
use crate::{
    config::{Config, LogLevel},
    error::Error,
};
use serde_json::{Value, json};
use std::{
    fmt::Write as _,
    fs::File,
    io::{IsTerminal, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// logrus' words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Why no container was made.
    Error,
    /// What its user should know.
    Warning,
    /// What was decided, with `--debug` or `log-level`.
    Debug,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Debug => "debug",
        }
    }
}

/// Where messages go.
pub struct Log<'a> {
    args: &'a RuntimeArgs,
    /// The administrator's file, and the least that is written there.
    file: Option<(PathBuf, Level)>,
}

impl<'a> Log<'a> {
    /// To where `--log` says.
    pub fn new(args: &'a RuntimeArgs) -> Self {
        Self { args, file: None }
    }

    /// To where the configuration says, too.
    pub fn configure(&mut self, config: &Config) {
        // NVIDIA's file names it where nothing is to be kept.
        let file = config.log_file.clone().filter(|file| file != Path::new("/dev/null"));
        let least = match config.log_level {
            LogLevel::Error => Level::Error,
            LogLevel::Warning | LogLevel::Info => Level::Warning,
            LogLevel::Debug => Level::Debug,
        };
        self.file = file.map(|file| (file, least));
    }

    /// Writes a failure.
    pub fn write_error(&self, level: Level, error: &Error) {
        let line = error.for_engine();
        let shown = if std::io::stderr().is_terminal() { error.to_string() } else { line.clone() };
        self.record(level, &line, &shown);
    }

    /// Writes one message to where `--log` says, and to standard error where it says nothing. An error goes there in any case.
    ///
    /// A container's own output begins on the same standard error, so nothing else is said there.
    pub fn write(&self, level: Level, message: &str) {
        self.record(level, message, message);
    }

    fn record(&self, level: Level, message: &str, shown: &str) {
        if let Some((file, _)) = self.file.as_ref().filter(|(_, least)| level <= *least) {
            append(file, &line(false, level, message, SystemTime::now()));
        }
        if level == Level::Debug && !self.args.debug {
            return;
        }
        if level == Level::Error || (self.args.log.is_none() && level == Level::Warning) {
            let _ = writeln!(std::io::stderr(), "{shown}");
        }
        if let Some(file) = &self.args.log {
            append(file, &line(self.args.log_json, level, message, SystemTime::now()));
        }
    }
}

/// A log that cannot be written keeps no container from its start.
fn append(file: &Path, line: &str) {
    // The mode that runc gives it, whatever the engine's umask.
    if let Ok(mut file) = File::options().append(true).create(true).mode(0o644).open(file) {
        // One write: lines of two processes do not mix.
        let _ = file.write_all(line.as_bytes());
    }
}

fn line(is_json: bool, level: Level, message: &str, now: SystemTime) -> String {
    let (level, time) = (level.word(), rfc3339(now));
    if is_json {
        format!("{}\n", json!({"level": level, "msg": message, "time": time}))
    } else {
        format!("time=\"{time}\" level={level} msg={}\n", Value::from(message))
    }
}

/// `2026-02-28T23:59:59Z`
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (mut day, second) = (seconds / 86_400, seconds % 86_400);
    let is_leap =
        |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    let mut text = String::new();
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let _ = write!(text, "{year}-{month:02}-{:02}T{hour:02}:{minute:02}:{:02}Z", day + 1, second % 60);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(at(seconds)), text);
        }
    }

    #[test]
    fn lines_are_those_that_engines_read() {
        assert_eq!(
            line(true, Level::Error, "no \"GPU\"\n  fix: x", at(0)),
            "{\"level\":\"error\",\"msg\":\"no \\\"GPU\\\"\\n  fix: x\",\"time\":\"1970-01-01T00:00:00Z\"}\n"
        );
        assert_eq!(
            line(false, Level::Warning, "a\nb", at(0)),
            "time=\"1970-01-01T00:00:00Z\" level=warning msg=\"a\\nb\"\n"
        );
    }
}
