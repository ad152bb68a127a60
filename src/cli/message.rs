//! Converts errors of the argument parser to ours: one paragraph with the argument, its possible values and suggestions.

use crate::error::{Code, Error};
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Converts an error of clap. `help` is the command that shows the options.
pub fn explain(error: &clap::Error, help: &str) -> Error {
    let context = Context { error };
    let argument = context.text(ContextKind::InvalidArg);
    let value = context.text(ContextKind::InvalidValue);
    let what = match error.kind() {
        ErrorKind::UnknownArgument if argument.starts_with('-') => format!("there is no option {argument}"),
        ErrorKind::UnknownArgument => {
            format!("{} takes no word {argument:?}", help.trim_end_matches(" --help"))
        }
        ErrorKind::InvalidSubcommand => {
            format!("there is no command {:?}", context.text(ContextKind::InvalidSubcommand))
        }
        ErrorKind::InvalidValue if value.is_empty() => format!("{argument} wants a value"),
        ErrorKind::InvalidValue => format!("{value:?} is not a value of {argument}"),
        ErrorKind::ValueValidation => format!("{value:?} cannot be used for {argument}"),
        ErrorKind::MissingRequiredArgument => format!("{} is missing", argument.replace(['<', '>'], "")),
        ErrorKind::ArgumentConflict => {
            format!("{argument} cannot be used together with {}", context.text(ContextKind::PriorArg))
        }
        ErrorKind::NoEquals => format!("{argument} takes its value behind \"=\""),
        ErrorKind::TooManyValues => format!("{argument} does not take the value {value:?}"),
        ErrorKind::InvalidUtf8 => "an argument is not UTF-8".to_owned(),
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            "no command is given".to_owned()
        }
        _ => first_paragraph(error),
    };
    let mut explained = Error::new(Code::Usage, what);
    if let Some(cause) = std::error::Error::source(error) {
        explained = explained.cause(cause);
    }
    explained.fix(context.fix(help))
}

/// Commands similar to the typed one.
pub fn suggested_commands(error: &clap::Error) -> Vec<String> {
    Context { error }.strings(ContextKind::SuggestedSubcommand)
}

/// What options allow whose parsers say only that a value is not a number or a word of theirs.
const ALLOWED: [(&str, &str); 10] = [
    ("--cpus", "write a number of processors: --cpus 1.5"),
    ("--pids-limit", "write a number of processes, or -1 for no limit: --pids-limit 1024"),
    ("--platform", "write --platform linux/amd64 or --platform linux/arm64"),
    ("--log", "choose from off, error, warn, info, debug, trace"),
    ("--cpu-shares", "write a weight from 2 to 262144: --cpu-shares 1024"),
    ("--cpu-period", "write microseconds: --cpu-period 100000"),
    ("--cpu-quota", "write microseconds: --cpu-quota 50000"),
    ("--memory-swappiness", "write a number from 0 to 100: --memory-swappiness 60"),
    ("--oom-score-adj", "write a number from -1000 to 1000: --oom-score-adj 500"),
    ("--blkio-weight", "write a weight from 10 to 1000: --blkio-weight 500"),
];

/// Values of other programs that resemble a value with another meaning.
const MEANT: [(&str, &str, &str); 1] =
    [("--pull", "newer", "write --pull always, which downloads only what has changed")];

struct Context<'a> {
    error: &'a clap::Error,
}

impl Context<'_> {
    fn strings(&self, kind: ContextKind) -> Vec<String> {
        match self.error.get(kind) {
            Some(ContextValue::String(one)) => vec![one.clone()],
            Some(ContextValue::Strings(all)) => all.clone(),
            Some(ContextValue::StyledStr(text)) => vec![text.to_string()],
            Some(ContextValue::StyledStrs(all)) => all.iter().map(ToString::to_string).collect(),
            _ => Vec::new(),
        }
    }

    fn text(&self, kind: ContextKind) -> String {
        self.strings(kind).join(", ")
    }

    /// How the command is written. The parser's own usage repeats the options that were typed or set by variables.
    fn usage(&self, help: &str) -> Option<String> {
        if let Some(command) =
            help.strip_suffix(" --help").filter(|c| c.ends_with(" run") || c.ends_with(" plan"))
        {
            return Some(format!("{command} [OPTIONS] IMAGE [COMMAND…]"));
        }
        let missing = self.text(ContextKind::InvalidArg);
        let command = help.strip_suffix(" --help")?;
        Some(format!("{command} {}", missing.replace(['<', '>'], "").replace("...", "…")))
    }

    /// What was probably meant comes first, then every possible value, then where the rest is.
    fn fix(&self, help: &str) -> String {
        let argument = self.text(ContextKind::InvalidArg);
        let name = argument.split_whitespace().next().unwrap_or_default();
        let value = self.text(ContextKind::InvalidValue);
        if let Some((_, _, fix)) =
            MEANT.iter().find(|(option, word, _)| (*option, *word) == (name, value.as_str()))
        {
            return (*fix).to_owned();
        }
        let meant: Vec<String> =
            [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand, ContextKind::SuggestedValue]
                .into_iter()
                .flat_map(|kind| self.strings(kind))
                .collect();
        let mut parts = Vec::new();
        if !meant.is_empty() {
            parts.push(format!("did you mean {}?", meant.join(" or ")));
        }
        // An empty value is not offered.
        let values: Vec<String> =
            self.strings(ContextKind::ValidValue).into_iter().filter(|value| !value.is_empty()).collect();
        if !values.is_empty() {
            parts.push(format!("choose from {}", values.join(", ")));
        }
        if meant.is_empty() && self.error.kind() == ErrorKind::MissingRequiredArgument {
            parts.extend(self.usage(help).map(|usage| format!("write {usage}")));
        }
        if self.error.kind() == ErrorKind::ValueValidation {
            parts.extend(ALLOWED.iter().find(|(known, _)| *known == name).map(|(_, fix)| (*fix).to_owned()));
        }
        parts.push(format!("`{help}` lists what there is"));
        parts.join("; ").replace("?; ", "? ")
    }
}

/// clap's own message, in one line.
fn first_paragraph(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let joined = lines.collect::<Vec<_>>().join(" ");
    joined.trim_start_matches("error: ").to_owned()
}
