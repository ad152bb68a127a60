//! Tests the split of command lines and the messages of parse errors.

use super::*;
use std::os::unix::ffi::OsStringExt;

fn parse_words(words: &[OsString]) -> Parsed {
    let line: Vec<OsString> = std::iter::once("gpurun".into()).chain(words.iter().cloned()).collect();
    parse(&line)
}

fn split(line: &str) -> Vec<OsString> {
    line.split(' ').filter(|word| !word.is_empty()).map(OsString::from).collect()
}

/// The image and the container's words.
fn container_of(words: &[OsString]) -> (String, Vec<OsString>) {
    match parse_words(words).request {
        Ok(Request::Run(_, run) | Request::Plan(_, run)) => (run.image, run.command),
        other => panic!("{words:?}: {other:?}"),
    }
}

fn refusal(line: &str) -> String {
    match parse_words(&split(line)).request {
        Err(error) => error.to_string(),
        other => panic!("{line}: {other:?}"),
    }
}

/// Every spelling of every option of `run`, from the definitions of the parser.
fn every_option() -> Vec<Vec<OsString>> {
    let mut all = Vec::new();
    for arg in run_command("run").get_arguments() {
        let names = arg.get_long_and_visible_aliases().unwrap_or_default();
        let mut names: Vec<String> = names.iter().map(|name| format!("--{name}")).collect();
        names.extend(arg.get_short().map(|letter| format!("-{letter}")));
        for name in names {
            all.push(vec![name.clone().into(), "value".into()]);
            all.push(vec![format!("{name}=value").into()]);
            all.push(vec![format!("{name}value").into()]);
        }
    }
    assert!(all.len() > 400, "{}", all.len());
    all
}

#[test]
fn every_option_behind_the_image_belongs_to_the_container() {
    for option in every_option() {
        for front in [
            "run IMAGE",
            "plan IMAGE",
            "docker.io/library/x",
            "--gpus all IMAGE",
            "--json run --rm -it -e A=b IMAGE",
            "run --gpus all -- IMAGE",
        ] {
            let mut words = split(front);
            words.extend(option.iter().cloned());
            words.extend(split("last -- --json"));
            let expected: Vec<OsString> = option.iter().cloned().chain(split("last -- --json")).collect();
            let parsed = parse_words(&words);
            assert_eq!(parsed.json, front.starts_with("--json"), "{words:?}");
            let Ok(Request::Run(_, run) | Request::Plan(_, run)) = parsed.request else {
                panic!("{words:?}");
            };
            assert!(run.image == "IMAGE" || run.image.starts_with("docker.io"), "{words:?}");
            assert_eq!(run.command, expected, "{words:?}");
        }
    }
}

#[test]
fn words_of_the_container_need_not_be_text() {
    let odd = OsString::from_vec(b"\xff\xfe=\x80".to_vec());
    let words: Vec<OsString> = split("run IMAGE").into_iter().chain([odd.clone()]).collect();
    assert_eq!(container_of(&words).1, std::slice::from_ref(&odd));
    let words: Vec<OsString> = split("run").into_iter().chain([odd]).collect();
    assert!(parse_words(&words).request.is_err());
}

#[test]
fn the_short_form_is_for_options_and_explicit_references_alone() {
    for line in [
        "--gpus all ubuntu",
        "-it ubuntu",
        "-h trainer ubuntu",
        "docker://ubuntu",
        "ubuntu:24.04",
        "nvcr.io/nvidia/cuda",
        "ubuntu@sha256:00",
        "host: true",
        "rootfs:/x",
        "--config /c --json ubuntu:24.04 ls",
        "-- ubuntu",
        "--rm=true ubuntu",
    ] {
        assert!(matches!(parse_words(&split(line)).request, Ok(Request::Run(..))), "{line}");
    }
    for line in [
        "dcotor",
        "ps",
        "exec",
        "up",
        "login",
        "build .",
        "ubuntu",
        "ubuntu ls",
        "--json dcotor",
        "--config /c ubuntu",
    ] {
        let refused = refusal(line);
        assert!(refused.starts_with("error[GPU-0001]: there is no command \""), "{line}: {refused}");
        assert!(refused.contains("fix: "), "{line}: {refused}");
    }
    assert_eq!(
        refusal("dcotor"),
        "error[GPU-0001]: there is no command \"dcotor\"\n  fix: did you mean doctor? `gpurun run dcotor` runs an image of that \
         name, and `gpurun --help` lists the commands"
    );
    assert!(refusal("--gpus all doctor").contains("the command doctor stands behind options of gpurun run"));
    for line in [
        "version",
        "--version",
        "-V",
        "--help",
        "-h",
        "help",
        "help run",
        "help cdi generate",
        "run --help",
        "plan --help",
        "--gpus all --help",
        "doctor -h",
    ] {
        assert!(matches!(parse_words(&split(line)).request, Ok(Request::Print(_))), "{line}");
    }
}

#[test]
fn a_failure_of_parsing_says_what_the_parser_knows() {
    for (line, parts) in [
        (
            "run",
            &["IMAGE is missing", "write gpurun run [OPTIONS] IMAGE [COMMAND…]", "gpurun run --help"]
                as &[_],
        ),
        ("--gpu all ubuntu", &["there is no option --gpu", "did you mean --gpus?"]),
        ("run --gpu all ubuntu", &["there is no option --gpu", "did you mean --gpus?"]),
        ("run -Z ubuntu", &["there is no option -Z", "gpurun run --help"]),
        ("run --gpus", &["--gpus wants a value", "write --gpus REQUEST"]),
        ("run -h", &["-h wants a value"]),
        (
            "run --pull sometimes ubuntu",
            &["\"sometimes\" is not a value of --pull", "always, missing, never"],
        ),
        ("run --cpus x ubuntu", &["\"x\" cannot be used for --cpus", "cause: invalid float", "--cpus 1.5"]),
        ("run --cpu-shares many ubuntu", &["\"many\" cannot be used for --cpu-shares"]),
        ("completions foo", &["\"foo\" is not a value of <SHELL>", "bash, elvish, fish"]),
        ("completions bsh", &["did you mean bash?"]),
        ("configure foo", &["\"foo\" is not a value of <ENGINE>", "docker, containerd, crio, podman"]),
        ("images --verify --usage", &["--verify cannot be used together with --usage"]),
        ("pull", &["IMAGES... is missing"]),
        ("cdi", &["no command is given", "gpurun cdi --help"]),
        ("cdi generat", &["there is no command \"generat\"", "did you mean generate?"]),
        ("", &["no command is given", "gpurun --help"]),
        ("doctor --jsn", &["there is no option --jsn", "did you mean --json?"]),
        ("doctor x", &["gpurun doctor takes no word \"x\""]),
        ("--log loud doctor", &["\"loud\" cannot be used for --log", "error, warn, info"]),
        ("run --gpus all -it", &["write gpurun run [OPTIONS] IMAGE [COMMAND…]"]),
        ("run --pids-limit x ubuntu", &["--pids-limit 1024"]),
        ("run --platform windows ubuntu", &["--platform linux/amd64"]),
        ("configure docker --config /x", &["did you mean --file /x?"]),
        ("--GPUS all ubuntu", &["did you mean --gpus?"]),
        ("-gpus all ubuntu", &["there is no option -gpus", "did you mean --gpus?"]),
        ("run -rm ubuntu", &["did you mean --rm?"]),
        ("run -net=host ubuntu", &["did you mean --net=host?"]),
        ("–-gpus all ubuntu", &["there is no option –-gpus", "did you mean --gpus?"]),
        ("run —gpus all ubuntu", &["did you mean --gpus?"]),
        ("run –x ubuntu", &["type its dashes again"]),
        ("RUN ubuntu", &["did you mean gpurun run?"]),
        ("run --rm=maybe ubuntu", &["--rm=maybe is neither true nor false"]),
    ] {
        let refused = refusal(line);
        let is_paragraph = refused.starts_with("error[GPU-0001]: ") && refused.lines().count() <= 3;
        assert!(is_paragraph, "{line}: {refused}");
        for part in parts {
            assert!(refused.contains(part), "{line}: {refused}");
        }
    }
}

#[test]
fn verbs_are_the_parsers() {
    let mut known: Vec<String> = command().get_subcommands().map(|c| c.get_name().to_owned()).collect();
    known.push("help".into());
    known.sort();
    let mut verbs = VERBS.map(str::to_owned).to_vec();
    verbs.sort();
    assert_eq!(known, verbs);
    command().debug_assert();
    run_command("run").debug_assert();
}

#[test]
fn the_last_value_of_an_option_counts() {
    let Ok(Request::Run(global, run)) = parse_words(&split(
        "--log error run -w /a -w /b --log info --memory 1g --memory=2g -t -t=false IMAGE",
    ))
    .request
    else {
        panic!("it is a run");
    };
    assert_eq!(run.workdir, Some("/b".into()));
    assert_eq!(run.resources.memory.as_deref(), Some("2g"));
    assert_eq!(global.log, tracing::level_filters::LevelFilter::INFO);
    assert!(!run.tty);
}

/// The options of `docker run --help`, Docker 28.5.
const DOCKER: &str = "add-host annotation attach blkio-weight blkio-weight-device cap-add cap-drop cgroup-parent cgroupns cidfile \
    cpu-count cpu-percent cpu-period cpu-quota cpu-rt-period cpu-rt-runtime cpu-shares cpus cpuset-cpus \
    cpuset-mems detach detach-keys device device-cgroup-rule device-read-bps device-read-iops device-write-bps \
    device-write-iops disable-content-trust dns dns-option dns-search domainname entrypoint env env-file expose \
    gpus group-add health-cmd health-interval health-retries health-start-interval health-start-period \
    health-timeout help hostname init interactive io-maxbandwidth io-maxiops ip ip6 ipc isolation kernel-memory \
    label label-file link link-local-ip log-driver log-opt mac-address memory memory-reservation memory-swap \
    memory-swappiness mount name network network-alias no-healthcheck oom-kill-disable oom-score-adj pid \
    pids-limit platform privileged publish publish-all pull quiet read-only restart rm runtime security-opt \
    shm-size sig-proxy stop-signal stop-timeout storage-opt sysctl tmpfs tty ulimit use-api-socket user userns uts \
    volume volume-driver volumes-from workdir";

#[test]
fn every_option_of_docker_is_known() {
    let command = run_command("run");
    let known: Vec<&str> = command
        .get_arguments()
        .flat_map(|arg| arg.get_long().into_iter().chain(arg.get_all_aliases().into_iter().flatten()))
        .collect();
    for option in DOCKER.split_whitespace() {
        assert!(known.contains(&option), "--{option}");
    }
}

#[test]
fn help_describes_every_command() {
    let help = command().render_help().to_string();
    assert!(help.contains("run          Run a command in a new container"), "{help}");
    assert!(help.contains("plan         Show what a container would get, without starting it"), "{help}");
    for (line, text) in [
        ("run --help", "Run a command in a new container"),
        ("plan --help", "Show what a container would get"),
        ("run -V", "gpurun 0."),
        ("plan --version", "gpurun 0."),
    ] {
        let Ok(Request::Print(printed)) = parse_words(&split(line)).request else { panic!("{line}") };
        assert!(printed.starts_with(text), "{line}: {printed}");
    }
}

/// A line, what is said and what to do, each with the user's own words.
const REFUSALS: &[(&str, &str, &str)] = &[
    ("run -v", "-v wants a value", "write -v SOURCE:TARGET[:ro]"),
    ("run -it -e", "-e wants a value", "write -e NAME[=VALUE]"),
    ("run --gpus", "--gpus wants a value", "write --gpus REQUEST"),
    ("run -h", "-h wants a value", "gpurun run --help"),
    ("run -i=maybe x", "-i=maybe is neither true nor false", "write -i or -i=false"),
    ("run --it x", "there is no option --it", "did you mean -it?"),
    ("run --itd x", "there is no option --itd", "did you mean -itd?"),
    ("run --pull newer x", "\"newer\" is not a value of --pull", "write --pull always"),
    ("run --oom-score-adj a x", "\"a\" cannot be used for --oom-score-adj", "from -1000 to 1000"),
    ("run --blkio-weight a x", "\"a\" cannot be used for --blkio-weight", "from 10 to 1000"),
    ("run --memory-swappiness a x", "\"a\" cannot be used for --memory-swappiness", "from 0 to 100"),
    ("run --cpu-quota a x", "\"a\" cannot be used for --cpu-quota", "microseconds"),
    ("run --stop-timeout a x", "cannot serve --stop-timeout a", "--stop-timeout 10"),
    ("run --expose http x", "cannot serve --expose http", "--expose 8000"),
    ("run --expose 90-80 x", "cannot serve --expose 90-80", "--expose 8000"),
    ("run --expose 80/ x", "cannot serve --expose 80/", "--expose 8000"),
    ("ls x", "gpurun ls takes no word \"x\"", "gpurun ls --help"),
    ("config get x", "gpurun config takes no word \"get\"", "gpurun config --help"),
    ("cdi generate --format xml", "\"xml\" is not a value of --format", "gpurun cdi generate --help"),
    ("pull", "IMAGES", "write gpurun pull IMAGES…"),
    ("completions", "SHELL is missing", "write gpurun completions SHELL;"),
    ("configure", "ENGINE is missing", "write gpurun configure ENGINE;"),
    ("help nope", "there is no command \"nope\"", "gpurun --help"),
    ("docker run x", "there is no command \"docker\"", "leave that word out"),
    ("gpu", "there is no command \"gpu\"", "gpurun ls"),
];

#[test]
fn refusals_name_the_users_word_and_a_way_out() {
    for (line, what, fix) in REFUSALS {
        let refused = refusal(line);
        let (said, advice) = refused.split_once("  fix: ").unwrap();
        assert!(said.contains(what), "{line}: {refused}");
        assert!(advice.contains(fix), "{line}: {refused}");
    }
    assert!(parse_words(&["".into()]).request.unwrap_err().to_string().contains("an empty word"));
}

#[test]
fn an_empty_value_is_no_value() {
    for option in [
        "--workdir",
        "--cidfile",
        "--pidfile",
        "--hostname",
        "--domainname",
        "--name",
        "--user",
        "--stop-signal",
        "--runtime",
        "--ipc",
        "--pid",
        "--uts",
        "--cgroupns",
        "--userns",
        "--cgroup-parent",
        "--platform",
        "--pull",
    ] {
        let plain = parse_words(&split("run x"));
        for words in [vec![option.into(), OsString::new()], vec![format!("{option}=").into()]] {
            let words: Vec<OsString> = ["run".into()].into_iter().chain(words).chain(["x".into()]).collect();
            let (Ok(Request::Run(_, empty)), Ok(Request::Run(_, plain))) =
                (parse_words(&words).request, &plain.request)
            else {
                panic!("{option}");
            };
            let run =
                |run: &Run| format!("{run:?}").replace(&format!("platform: {:?}", run.pulling.platform), "");
            assert_eq!(run(&empty), run(plain), "{option}");
        }
    }
}

/// Docker 28.5 reads one-letter options after a single hyphen, and so does gpurun; a note says what was probably meant.
#[test]
fn one_hyphen_before_the_name_of_an_option_is_noted() {
    for (line, image, note) in [
        ("-env A=b ubuntu", "A=b", "the option is --env"),
        ("run -env=A=b ubuntu", "ubuntu", "-env is read as one-letter options"),
        ("run -volume /a:/b ubuntu", "/a:/b", "--volume"),
        ("run -help ubuntu", "ubuntu", "--help"),
        ("run -user 5 ubuntu", "5", "--user"),
        ("run -workdir /x ubuntu", "/x", "--workdir"),
        ("run -entrypoint sh ubuntu", "sh", "--entrypoint"),
    ] {
        let parsed = parse_words(&split(line));
        assert!(parsed.notes.len() == 1 && parsed.notes[0].contains(note), "{line}: {:?}", parsed.notes);
        assert_eq!(container_of(&split(line)).0, image, "{line}");
    }
    for line in ["run -tty ubuntu", "run -init ubuntu", "run -memory 5m ubuntu", "run -cpus 2 ubuntu"] {
        let parsed = parse_words(&split(line));
        assert_eq!(parsed.notes.len(), 1, "{line}: {parsed:?}");
    }
    for line in [
        "run -it ubuntu",
        "run -eA=b ubuntu",
        "run -iu5 ubuntu",
        "run -w=/tmp ubuntu",
        "run ubuntu -env A=b",
        "run -gpus all x",
    ] {
        assert!(parse_words(&split(line)).notes.is_empty(), "{line}");
    }
}
