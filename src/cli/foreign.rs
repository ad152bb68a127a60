//! A table of the options of Docker, Podman and Apptainer that gpurun does not implement: options without effect here are
//! accepted, all others are refused with an alternative. The parser, `--help` and tests share the table.

use crate::error::{Code, Error, Result};
use clap::{Arg, ArgAction, ArgMatches, parser::ValueSource};
use std::ffi::OsString;

/// The value of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// A flag: no value, `=true`, or `=false`, which is the same as omitting it.
    Flag,
    /// A value.
    Value,
    /// A flag that is on by default: no value, or a value after `=`.
    OptionalValue,
}

/// One option.
#[derive(Debug)]
pub struct Foreign {
    /// Long name, without dashes.
    pub long: &'static str,
    /// Short name.
    pub short: Option<char>,
    /// Kind of value.
    pub takes: Takes,
    /// Accepted values, which match gpurun's behaviour; `*` is any value.
    pub accepted: &'static [&'static str],
    /// Decides about other values.
    pub is_valid: Option<fn(&str) -> bool>,
    /// The fix for every other value.
    pub instead: &'static str,
}

const fn flag(long: &'static str, instead: &'static str) -> Foreign {
    Foreign { long, short: None, takes: Takes::Flag, accepted: &[], is_valid: None, instead }
}

const fn value(long: &'static str, instead: &'static str) -> Foreign {
    Foreign { long, short: None, takes: Takes::Value, accepted: &[], is_valid: None, instead }
}

impl Foreign {
    const fn short(mut self, letter: char) -> Self {
        self.short = Some(letter);
        self
    }

    const fn accepts(mut self, values: &'static [&'static str]) -> Self {
        self.accepted = values;
        self
    }

    const fn valid_if(mut self, is_valid: fn(&str) -> bool) -> Self {
        self.is_valid = Some(is_valid);
        self
    }

    const fn on_by_default(mut self) -> Self {
        self.takes = Takes::OptionalValue;
        self
    }

    fn argument(&self) -> Arg {
        let arg = Arg::new(self.long).long(self.long).hide(true);
        let arg = match self.short {
            Some(letter) => arg.short(letter),
            None => arg,
        };
        match self.takes {
            Takes::Flag => arg.action(ArgAction::SetTrue),
            Takes::Value => {
                arg.action(ArgAction::Append).value_parser(clap::value_parser!(OsString)).value_name("VALUE")
            }
            Takes::OptionalValue => arg
                .action(ArgAction::Append)
                .value_parser(clap::value_parser!(OsString))
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true"),
        }
    }

    fn accepts_value(&self, value: &OsString) -> bool {
        self.accepted.contains(&"*")
            || value.to_str().is_some_and(|value| {
                self.accepted.contains(&value) || self.is_valid.is_some_and(|is_valid| is_valid(value))
            })
    }
}

const ANY: &[&str] = &["*"];
/// strconv.ParseBool's words.
const TRUE: &[&str] = &["1", "t", "T", "TRUE", "true", "True"];
const FALSE: &[&str] = &["0", "f", "F", "FALSE", "false", "False"];

const BACKGROUND: &str = "start it in the background with systemd-run: systemd-run --user --unit NAME gpurun run …; \
                          `systemctl --user stop NAME` ends it and `journalctl --user -u NAME` shows its output";
const PORTS: &str = "leave it out: the container has the host's network, so a port on which its program listens is a port of the \
                     host (to move it, tell the program itself which port to use)";
const HEALTH: &str = "leave it out: gpurun runs no health checks yet; check the service from outside, or start it with Docker and \
                      --runtime gpurun";
const NETWORKS: &str = "leave it out: the container has the host's network and addresses; for networks of their own start it with \
                        Docker and --runtime gpurun";
const LOGS: &str =
    "leave it out and redirect gpurun's output: gpurun run … > FILE 2>&1, or … | systemd-cat -t NAME";
const THROTTLE: &str = "leave it out and limit it with systemd: systemd-run --scope -p \"IOReadBandwidthMax=/dev/sda 10M\" gpurun run … \
                        (also IOWriteBandwidthMax, IOReadIOPSMax, IOWriteIOPSMax, IODeviceWeight)";
const REAL_TIME: &str =
    "leave it out; to let a program use real-time scheduling write --ulimit rtprio=99 --cap-add SYS_NICE";
const WINDOWS: &str = "leave it out: it is for Windows containers; --cpus limits processors";
const ID_MAPS: &str =
    "leave it out: -u UID:GID chooses the container's user, and --userns keep-id makes it the caller";
const VOLUMES: &str = "mount a directory of the host: mkdir -p ./data, and -v ./data:/path/in/the/container";
const SIGNATURES: &str = "leave it out and name the image by its digest: NAME@sha256:…, which gpurun checks whatever the registry sends";
const CREDENTIALS: &str =
    "leave it out and log in with docker login, podman login or skopeo login, whose files gpurun reads";

/// Whether this is `PORT[-PORT][/PROTOCOL]` (docker/go-connections, ParsePortRange).
fn is_port_range(text: &str) -> bool {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let port =
        |text: &str| text.parse::<u16>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    // As Docker, which does not look at the protocol.
    !protocol.is_empty() && port(first).zip(port(last)).is_some_and(|(first, last)| first <= last)
}

/// Every one, by name.
pub const OPTIONS: &[Foreign] = &[
    // Already the behaviour of gpurun.
    flag("rm", "").accepts(ANY),
    flag("replace", "").accepts(ANY),
    flag("disable-content-trust", "").accepts(ANY),
    value("expose", "write a port or a range of ports: --expose 8000, --expose 8000-8010/udp").valid_if(is_port_range),
    value("stop-timeout", "write a number of seconds: --stop-timeout 10").valid_if(|text| text.parse::<i32>().is_ok()),
    value("detach-keys", "").accepts(ANY),
    value("isolation", "leave it out: containers are isolated by the kernel's namespaces").accepts(&["default", "", "process"]),
    value(
        "restart",
        "leave it out and let systemd restart it: systemd-run --user --unit NAME -p Restart=on-failure gpurun run …",
    )
    .accepts(&["no", ""]),
    value("log-driver", LOGS).accepts(&["none", "passthrough"]),
    value("cgroups", "leave it out: the container has a cgroup wherever gpurun may make one").accepts(&["enabled"]),
    value("systemd", "leave it out: gpurun does not start systemd in a container").accepts(FALSE),
    value("image-volume", "leave it out: the image's volumes are removed with the container")
        .accepts(&["anonymous", "bind"]),
    value("kernel-memory", "leave it out: no kernel since Linux 5.16 has this limit; --memory counts the kernel's memory as well")
        .accepts(&["0"]),
    flag("http-proxy", "leave it out and name the variables: -e HTTP_PROXY -e HTTPS_PROXY -e NO_PROXY")
        .on_by_default()
        .accepts(FALSE),
    flag("sig-proxy", "leave it out: gpurun passes every signal that it gets to the command; `setsid gpurun run …` keeps the terminal's ^C away")
        .on_by_default()
        .accepts(TRUE),
    flag("tls-verify", "add the host to insecure-registries in /etc/gpurun/config.toml").on_by_default().accepts(TRUE),
    flag("passwd", "leave it out: the container's /etc/passwd has a line for its user").on_by_default().accepts(TRUE),
    flag("read-only-tmpfs", "add --tmpfs /run --tmpfs /tmp for directories that can be written").on_by_default().accepts(FALSE),
    // Options that need a container that outlives the gpurun command.
    flag("detach", BACKGROUND).short('d'),
    value("publish", PORTS).short('p'),
    flag("publish-all", PORTS).short('P'),
    value("volumes-from", "repeat that container's own -v options here"),
    value("volume-driver", VOLUMES),
    value("health-cmd", HEALTH),
    value("health-interval", HEALTH),
    value("health-retries", HEALTH),
    value("health-start-interval", HEALTH),
    value("health-start-period", HEALTH),
    value("health-timeout", HEALTH),
    value("health-on-failure", HEALTH),
    value("health-log-destination", HEALTH),
    value("health-max-log-count", HEALTH),
    value("health-max-log-size", HEALTH),
    value("health-startup-cmd", HEALTH),
    value("health-startup-interval", HEALTH),
    value("health-startup-retries", HEALTH),
    value("health-startup-success", HEALTH),
    value("health-startup-timeout", HEALTH),
    value("pod", "start each container by itself: all have the host's network, and --ipc host shares memory"),
    value("pod-id-file", "start each container by itself: all have the host's network, and --ipc host shares memory"),
    value("requires", "start the containers in their order from a script or a systemd unit (Requires=, After=)"),
    value("sdnotify", "use a unit of Type=exec, which counts the container as started when gpurun has started it"),
    value("timeout", "write timeout 60 gpurun run …"),
    value("log-opt", LOGS),
    // Networks.
    value("link", "leave it out: both containers have the host's network, so the other one is at localhost"),
    value("ip", NETWORKS),
    value("ip6", NETWORKS),
    value("link-local-ip", NETWORKS),
    value("mac-address", NETWORKS),
    value("network-alias", NETWORKS),
    value("net-alias", NETWORKS),
    flag("no-hosts", "mount your own file: -v ./hosts:/etc/hosts"),
    flag("no-hostname", "mount your own file: -v ./hostname:/etc/hostname"),
    value("hosts-file", "mount your own file: -v FILE:/etc/hosts"),
    // Resources.
    value("blkio-weight-device", THROTTLE),
    value("device-read-bps", THROTTLE),
    value("device-read-iops", THROTTLE),
    value("device-write-bps", THROTTLE),
    value("device-write-iops", THROTTLE),
    value("cpu-rt-period", REAL_TIME),
    value("cpu-rt-runtime", REAL_TIME),
    value("cpu-count", WINDOWS),
    value("cpu-percent", WINDOWS),
    value("io-maxbandwidth", WINDOWS),
    value("io-maxiops", WINDOWS),
    value("cgroup-conf", "leave it out; the limits that gpurun can set are listed by gpurun run --help"),
    value("storage-opt", "leave it out and keep gpurun's store on a file system of that size: GPURUN_STORE=DIR"),
    value("rdt-class", "leave it out and start gpurun with `resctrl` set up on the host"),
    value("shm-size-systemd", "leave it out: gpurun does not start systemd in a container"),
    // Identity.
    value("uidmap", ID_MAPS),
    value("gidmap", ID_MAPS),
    value("subuidname", ID_MAPS),
    value("subgidname", ID_MAPS),
    value("hostuser", ID_MAPS),
    value("group-entry", "leave it out, or mount your own file: -v ./group:/etc/group:ro"),
    value("passwd-entry", "leave it out, or mount your own file: -v ./passwd:/etc/passwd:ro"),
    value("umask", "set it in the command: sh -c 'umask 0027; exec PROGRAM'"),
    value("chrootdirs", "leave it out: gpurun writes /etc/hosts and /etc/resolv.conf only in the container's root"),
    value("secret", "mount the file that holds it: -v ./secret:/run/secrets/NAME:ro"),
    value("unsetenv", "set it to nothing with -e NAME=, or run env -u NAME PROGRAM"),
    flag("unsetenv-all", "run env -i PROGRAM in the container"),
    value("env-merge", "set the whole value: -e NAME=VALUE"),
    value("tz", "write -e TZ=Europe/Berlin, or -v /etc/localtime:/etc/localtime:ro"),
    value("preserve-fds", "pass data by -i, a file or a socket: -v ./socket:/socket"),
    value("preserve-fd", "pass data by -i, a file or a socket: -v ./socket:/socket"),
    value("personality", "run setarch in the container"),
    value("seccomp-policy", "leave it out; --security-opt seccomp=unconfined turns the filter off"),
    // Images and engines.
    flag("use-api-socket", "mount the socket: -v /var/run/docker.sock:/var/run/docker.sock"),
    value("hooks-dir", "leave it out: gpurun gives containers the driver by itself and runs no OCI hooks"),
    value("module", "leave it out: gpurun reads no containers.conf"),
    value("arch", "write --platform linux/ARCH"),
    value("os", "write --platform linux/ARCH"),
    value("variant", "write --platform linux/ARCH/VARIANT"),
    value("authfile", "write REGISTRY_AUTH_FILE=FILE gpurun run …"),
    value("cert-dir", "put the certificate into /etc/containers/certs.d/HOST or /etc/docker/certs.d/HOST"),
    value("creds", CREDENTIALS),
    value("signature-policy", SIGNATURES),
    value("decryption-key", "decrypt the image with skopeo copy, and run oci:DIR"),
    value("retry", "leave it out: a pull that is cut off resumes by itself"),
    value("retry-delay", "leave it out: a pull that is cut off resumes by itself"),
    flag("rootfs", "write rootfs:DIR in place of the image"),
    value("init-path", "leave it out: --init runs gpurun's own init"),
    value("init-ctr", "run the first step with a gpurun run of its own"),
    value("conmon-pidfile", "leave it out: no monitor process is started; --pidfile names the container's own process"),
    // Apptainer.
    flag("nvccli", "leave it out: --gpus all injects the driver"),
    flag("rocm", "leave it out: gpurun serves NVIDIA GPUs; --device /dev/kfd --device /dev/dri passes AMD's"),
    flag("contain", "").accepts(ANY),
    flag("containall", "").accepts(ANY),
    flag("cleanenv", "").accepts(ANY),
    flag("no-home", "").accepts(ANY),
    flag("writable-tmpfs", "").accepts(ANY),
    flag("fakeroot", "write -u 0"),
    flag("writable", "leave it out: writes to the container's root are discarded at its end; -v ./data:/data keeps data"),
    value("overlay", "leave it out: -v ./data:/data keeps what the container writes there"),
    value("pwd", "write -w DIR"),
    value("cwd", "write -w DIR"),
    value("home", "write -v DIR:/home/user -e HOME=/home/user"),
    value("scratch", "write --tmpfs DIR"),
    value("no-mount", "leave it out: gpurun mounts no directory of the host by itself; -v mounts one"),
    flag("compat", "").accepts(ANY),
    flag("no-compat", "leave it out, and mount what the command needs: -v \"$HOME:$HOME\" -v \"$PWD:$PWD\" -w \"$PWD\""),
    value("fusemount", "mount it on the host, and pass it with -v DIR:/path/in/the/container:rslave"),
    value("add-caps", "write --cap-add CAPABILITY"),
    value("drop-caps", "write --cap-drop CAPABILITY"),
    flag("keep-privs", "write --cap-add ALL, or the capabilities that the command needs"),
    flag("no-privs", "write --cap-drop ALL"),
    flag("no-init", "").accepts(ANY),
    flag("no-umask", "").accepts(ANY),
    value("security", "write --security-opt OPTION, or -u UID:GID for its uid: and gid:"),
    value("app", "name the program: gpurun run IMAGE /scif/apps/NAME/scif/runscript"),
    flag("oci", "").accepts(ANY),
    flag("vm", "leave it out: gpurun starts no virtual machines"),
    flag("docker-login", CREDENTIALS),
    flag("disable-cache", "leave it out: gpurun prune and gpurun rmi IMAGE remove what the store keeps"),
    flag("no-https", "add the host to insecure-registries in /etc/gpurun/config.toml"),
];

/// Adds the options to a command.
pub fn add(command: clap::Command) -> clap::Command {
    command.args(OPTIONS.iter().map(Foreign::argument))
}

/// Refuses the first unsupported option.
///
/// # Errors
/// [`Code::Usage`], with a fix.
pub fn check(matches: &ArgMatches) -> Result<()> {
    for option in OPTIONS {
        if matches.value_source(option.long) != Some(ValueSource::CommandLine) {
            continue;
        }
        let refused = match option.takes {
            Takes::Flag => (!option.accepted.contains(&"*")).then(String::new),
            Takes::Value | Takes::OptionalValue => {
                let mut values = matches.get_many::<OsString>(option.long).into_iter().flatten();
                values.find(|value| !option.accepts_value(value)).map(|v| format!(" {}", v.to_string_lossy()))
            }
        };
        if let Some(value) = refused {
            return Err(Error::new(Code::Usage, format!("gpurun run cannot serve --{}{value}", option.long))
                .fix(option.instead));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_says_what_to_do() {
        for option in OPTIONS {
            let accepts_everything = option.accepted.contains(&"*");
            assert_eq!(accepts_everything, option.instead.is_empty(), "--{}", option.long);
        }
    }
}
