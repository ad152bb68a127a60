//! Name resolution and metadata of the container: `--add-host`, `--dns`, `--label`, `--name`, `--attach`.

use super::{env_file, usage};
use crate::{
    apply::container::spec::{Dns, HostEntry},
    cli::Run,
    error::Result,
};
use std::net::IpAddr;

/// Parses `--add-host NAME:ADDRESS`, also with `=`. `host-gateway` is the host: localhost, if the container shares the host's
/// network.
pub fn hosts(args: &Run, host_network: bool) -> Result<Vec<HostEntry>> {
    args.add_host.iter().map(|text| host(text, host_network)).collect()
}

fn host(text: &str, host_network: bool) -> Result<HostEntry> {
    let bad =
        || usage(format!("--add-host {text:?} is not NAME:ADDRESS")).fix("write --add-host db:10.0.0.1");
    let (name, address) = text
        .split_once('=')
        .or_else(|| text.split_once(':'))
        .filter(|(name, _)| !name.is_empty())
        .ok_or_else(bad)?;
    if name.contains(|c: char| c.is_whitespace() || c.is_control() || c == '#') {
        return Err(bad());
    }
    let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    let address = match bare {
        "host-gateway" if host_network => IpAddr::from([127, 0, 0, 1]),
        "host-gateway" => {
            return Err(usage(format!("--add-host {text}: the container has no way to the host"))
                .fix("leave out --network none: with the host's network the host is localhost"));
        }
        other => other.parse().map_err(|_| bad())?,
    };
    Ok(HostEntry { name: name.to_owned(), address })
}

/// `--dns`, `--dns-search` and `--dns-option`; `None` keeps the host's file.
pub fn dns(args: &Run) -> Result<Option<Dns>> {
    let is_word =
        |text: &str| !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c.is_control());
    for (option, values) in [("--dns-search", &args.dns_search), ("--dns-option", &args.dns_option)] {
        if let Some(bad) = values.iter().find(|value| !is_word(value)) {
            return Err(usage(format!("{option} {bad:?} is not one word"))
                .fix(format!("write {option} once for each word")));
        }
    }
    let server = |text: &String| {
        text.parse::<IpAddr>()
            .map_err(|_| usage(format!("--dns {text:?} is not an address")).fix("write --dns 8.8.8.8"))
    };
    let servers = args.dns.iter().map(server).collect::<Result<Vec<_>>>()?;
    if servers.is_empty() && args.dns_search.is_empty() && args.dns_option.is_empty() {
        return Ok(None);
    }
    Ok(Some(Dns { servers, search: args.dns_search.clone(), options: args.dns_option.clone() }))
}

/// Checks `--name`, `--label`, `--label-file`, `--annotation` and `--attach`. They are not stored, because nothing outlives
/// the command.
pub fn check(args: &Run) -> Result<()> {
    if let Some(name) = &args.name {
        let mut letters = name.chars();
        let first = letters.next().is_some_and(|c| c.is_ascii_alphanumeric());
        // Podman's names, which may be one letter long; Docker's have two.
        if !first || !letters.all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c)) {
            return Err(usage(format!("--name {name:?} is not a name"))
                .fix("write one or more of a-z, A-Z, 0-9, _, . and -, with a letter or digit in front"));
        }
    }
    for (option, values) in [("--label", &args.label), ("--annotation", &args.annotation)] {
        if let Some(bad) = values.iter().find(|value| value.split('=').next().unwrap_or_default().is_empty())
        {
            return Err(
                usage(format!("{option} {bad:?} has no name")).fix(format!("write {option} NAME=VALUE"))
            );
        }
    }
    for file in &args.label_file {
        // Docker reads both kinds of files in the same way.
        env_file::read("--label-file", file, |_| None)?;
    }
    let streams: Vec<String> = args.attach.iter().map(|stream| stream.to_ascii_lowercase()).collect();
    if let Some(bad) = streams.iter().find(|stream| !["stdin", "stdout", "stderr"].contains(&stream.as_str()))
    {
        return Err(usage(format!("--attach {bad} is not a stream"))
            .fix("write `-a stdin`, `-a stdout` or `-a stderr`"));
    }
    let has = |stream: &str| streams.iter().any(|one| one == stream);
    let passes_both = has("stdout") && has("stderr");
    if !streams.is_empty() && !passes_both {
        return Err(usage(format!(
            "--attach {}: gpurun passes standard output and standard error",
            streams.join(" --attach ")
        ))
        .fix("leave it out and redirect what is not wanted: 2>/dev/null, or >/dev/null"));
    }
    Ok(())
}

/// Whether `--attach` names standard input.
pub fn attaches_stdin(args: &Run) -> bool {
    args.attach.iter().any(|stream| stream.eq_ignore_ascii_case("stdin"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::run::tests::run;

    #[test]
    fn hosts_and_name_servers_are_dockers() {
        let entry = |words: &[&str]| {
            let all = hosts(&run(words), true).unwrap();
            format!("{} {}", all[0].name, all[0].address)
        };
        assert_eq!(entry(&["--add-host", "db:10.0.0.1"]), "db 10.0.0.1");
        assert_eq!(entry(&["--add-host", "db=10.0.0.1"]), "db 10.0.0.1");
        assert_eq!(entry(&["--add-host", "db:::1"]), "db ::1");
        assert_eq!(entry(&["--add-host", "db:[::1]"]), "db ::1");
        assert_eq!(
            entry(&["--add-host", "host.docker.internal:host-gateway"]),
            "host.docker.internal 127.0.0.1"
        );
        for text in ["db", ":1.2.3.4", "db:", "db:1.2.3", "d b:1.2.3.4", "db\n:1.2.3.4"] {
            assert!(!host(text, true).unwrap_err().fix_line().is_empty(), "{text:?}");
        }
        assert!(host("x:host-gateway", false).is_err());
        assert_eq!(dns(&run(&[])).unwrap(), None);
        assert!(
            dns(&run(&["--dns", "8.8.8.8", "--dns-search", "x.org", "--dns-opt", "ndots:1"]))
                .unwrap()
                .is_some()
        );
        assert!(dns(&run(&["--dns", "google"])).is_err());
        assert!(dns(&run(&["--dns-search", "a b"])).is_err());
    }

    #[test]
    fn metadata_is_checked() {
        for words in [
            &["--name", "-x"] as &[_],
            &["--name", "a/b"],
            &["--label", "=x"],
            &["--attach", "stdout"],
            &["-a", "tty"],
            &["--label-file", "/absent"],
        ] {
            assert!(!check(&run(words)).unwrap_err().fix_line().is_empty(), "{words:?}");
        }
        check(&run(&["--name", "x"])).unwrap();
        check(&run(&[
            "--name", "ollama", "-l", "a=b", "--label", "c", "-a", "STDIN", "-a", "stdout", "-a", "stderr",
        ]))
        .unwrap();
    }
}
