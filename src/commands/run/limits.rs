//! `--ulimit`.

use super::usage;
use crate::{apply::container::spec::Rlimit, error::Result};
use nix::sys::resource::Resource;

/// Docker's names (go-units ulimit.go) for the kernel's limits.
const LIMITS: [(&str, Resource); 15] = [
    ("core", Resource::RLIMIT_CORE),
    ("cpu", Resource::RLIMIT_CPU),
    ("data", Resource::RLIMIT_DATA),
    ("fsize", Resource::RLIMIT_FSIZE),
    ("locks", Resource::RLIMIT_LOCKS),
    ("memlock", Resource::RLIMIT_MEMLOCK),
    ("msgqueue", Resource::RLIMIT_MSGQUEUE),
    ("nice", Resource::RLIMIT_NICE),
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("rss", Resource::RLIMIT_RSS),
    ("rtprio", Resource::RLIMIT_RTPRIO),
    ("rttime", Resource::RLIMIT_RTTIME),
    ("sigpending", Resource::RLIMIT_SIGPENDING),
    ("stack", Resource::RLIMIT_STACK),
];

/// The most descriptors that a container gets unasked: programs that close every possible one take seconds where the limit
/// is 10⁹, as systemd sets it for daemons.
const NOFILE: u64 = 1_048_576;

/// What GPU work wants (memory for RDMA locked, NCCL), and over it what `--ulimit` says.
pub fn rlimits(typed: &[String]) -> Result<Vec<Rlimit>> {
    let mut limits = vec![
        Rlimit {
            resource: Resource::RLIMIT_MEMLOCK,
            name: "memlock",
            soft: u64::MAX,
            hard: u64::MAX,
            required: false,
        },
        Rlimit {
            resource: Resource::RLIMIT_NOFILE,
            name: "nofile",
            soft: NOFILE,
            hard: NOFILE,
            required: false,
        },
    ];
    for text in typed {
        let bad = || {
            let names = LIMITS.map(|(name, _)| name).join(", ");
            usage(format!("--ulimit {text:?} is not NAME=SOFT[:HARD]"))
                .fix(format!("names are {names}; -1 is no limit"))
        };
        let (name, value) = text.split_once('=').ok_or_else(bad)?;
        let (name, resource) = LIMITS.into_iter().find(|(known, _)| *known == name).ok_or_else(bad)?;
        let number =
            |text: &str| if text == "-1" { Ok(u64::MAX) } else { text.parse::<u64>().map_err(|_| bad()) };
        let (soft, hard) = value.split_once(':').unwrap_or((value, value));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(usage(format!("--ulimit {text:?}: the soft limit is above the hard one")).fix(
                format!(
                    "write --ulimit {name}={value} with a hard limit of at least the soft one: NAME=SOFT:HARD"
                ),
            ));
        }
        limits.retain(|limit| limit.resource != resource);
        limits.push(Rlimit { resource, name, soft, hard, required: true });
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn limits_are_dockers() {
        let limits = rlimits(&["nofile=1024:2048".into(), "memlock=-1".into()]).unwrap();
        assert_eq!(limits.len(), 2);
        assert_eq!(
            (limits[0].name, limits[0].soft, limits[0].hard, limits[0].required),
            ("nofile", 1024, 2048, true)
        );
        for text in ["nofile", "files=1", "nofile=2:1", "nofile=x"] {
            assert!(!rlimits(&[text.into()]).unwrap_err().fix_line().is_empty(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_limit_or_an_error(text in ".{0,40}") {
            let _ = rlimits(&[text]);
        }
    }
}
