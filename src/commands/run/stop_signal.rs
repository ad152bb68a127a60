//! The image's STOPSIGNAL, as Docker reads it (`moby/sys/signal`).

/// The names of signal(7), without SIG, and their numbers.
const NAMES: [(&str, i32); 36] = [
    ("ABRT", libc::SIGABRT),
    ("ALRM", libc::SIGALRM),
    ("BUS", libc::SIGBUS),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("FPE", libc::SIGFPE),
    ("HUP", libc::SIGHUP),
    ("ILL", libc::SIGILL),
    ("INT", libc::SIGINT),
    ("IO", libc::SIGIO),
    ("IOT", libc::SIGIOT),
    ("KILL", libc::SIGKILL),
    ("PIPE", libc::SIGPIPE),
    ("POLL", libc::SIGPOLL),
    ("PROF", libc::SIGPROF),
    ("PWR", libc::SIGPWR),
    ("QUIT", libc::SIGQUIT),
    ("SEGV", libc::SIGSEGV),
    ("STKFLT", libc::SIGSTKFLT),
    ("STOP", libc::SIGSTOP),
    ("SYS", libc::SIGSYS),
    ("TERM", libc::SIGTERM),
    ("TRAP", libc::SIGTRAP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("VTALRM", libc::SIGVTALRM),
    ("WINCH", libc::SIGWINCH),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    // The C library keeps 32 and 33 for itself.
    ("RTMIN", 34),
    ("RTMAX", 64),
];

/// Parses a signal: a name with or without SIG, or a number. `None` if there is no such signal; Docker then sends SIGTERM.
pub fn number(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let known = |name: &str| NAMES.iter().find(|(known, _)| *known == name).map(|&(_, number)| number);
    let offset = |after: &str| after.parse::<i32>().ok().filter(|offset| (1..=15).contains(offset));
    known(name).or_else(|| match (name.strip_prefix("RTMIN+"), name.strip_prefix("RTMAX-")) {
        (Some(after), _) => Some(34 + offset(after)?),
        (_, Some(after)) => Some(64 - offset(after)?),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, expected) in [
            ("SIGTERM", Some(15)),
            ("quit", Some(3)),
            ("SigInt", Some(2)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("RTMIN", Some(34)),
            ("", None),
            ("0", None),
            ("-1", None),
            ("65", None),
            ("SIGNONE", None),
            ("RTMIN+99", None),
            ("RTMIN+", None),
        ] {
            assert_eq!(number(text), expected, "{text:?}");
        }
    }
}
