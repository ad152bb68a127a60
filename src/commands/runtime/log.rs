//! The low-level runtime's own log, in which engines look for the reason of a failure. Its lines are logrus', Go's logger.

use super::args::RuntimeArgs;
use serde_json::{Value, json};
use std::{
    fmt::Write as _,
    fs::File,
    io::Write,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// logrus' words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Why no container was made.
    Error,
    /// What its user should know.
    Warning,
    /// What was decided, with `--debug`.
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

/// Writes one message to where `--log` says, and to standard error where it says nothing. An error goes there in any case.
///
/// A container's own output begins on the same standard error, so nothing else is said there.
pub fn write(args: &RuntimeArgs, level: Level, message: &str) {
    if level == Level::Debug && !args.debug {
        return;
    }
    let file = args.log.as_ref().and_then(|path| File::options().append(true).create(true).open(path).ok());
    if level == Level::Error || (args.log.is_none() && level == Level::Warning) {
        let _ = writeln!(std::io::stderr(), "{message}");
    }
    if let Some(mut file) = file {
        // One write: lines of two processes do not mix.
        let _ = file.write_all(line(args.log_json, level, message, SystemTime::now()).as_bytes());
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
