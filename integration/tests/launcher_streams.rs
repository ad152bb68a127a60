//! The standard streams of a container: each cell of the table in `container/stdio.rs`.

use gpurun_integration::{
    Caller, SpawnPiped, TestHost, finish, on_a_terminal, rootfs, run, temporary, until,
};
use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
};

fn busybox() -> String {
    rootfs("busybox")
}

/// The launcher's three streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Streams {
    Terminal,
    File,
    Pipe,
    Socket,
    Null,
    Closed,
}

/// Both callers, as root and as another user of the container.
fn identities() -> impl Iterator<Item = (Caller, &'static str)> {
    Caller::EACH.into_iter().flat_map(|caller| ["-u 0", "-u 1234"].map(|user| (caller, user)))
}

/// Records the streams in the volume, writes to both by opening them again, and copies the input to the volume.
const SCRIPT: &str = "all=$(for n in 0 1 2; do readlink /proc/$$/fd/$n; done); echo \"$all\" > /notes/streams; \
                      echo to-stdout > /dev/stdout; echo to-stderr > /dev/stderr; cat > /notes/input; echo $? > /notes/done";

/// The container's streams (`pipe`, or a path), and the final content of the launcher's standard output, standard error and
/// input.
fn observe(streams: Streams, options: &str, caller: Caller) -> (Vec<String>, String, String, String) {
    let host = TestHost::new("t4");
    let notes = temporary();
    fs::set_permissions(notes.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let options = format!("{options} -v {}:/notes", notes.path().display());
    let mut command = host.command(caller, &options, &busybox(), &["sh", "-c", SCRIPT]);
    let (out, err) = (notes.path().join("out"), notes.path().join("err"));
    let appending = |path: &Path| {
        fs::write(path, "before\n").unwrap();
        fs::OpenOptions::new().append(true).open(path).unwrap()
    };
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let (stdout, stderr) = match streams {
        Streams::Pipe => {
            let mut child = command.stdin(Stdio::piped()).spawn_piped();
            child.stdin.take().unwrap().write_all(b"typed\n").unwrap();
            let ended = finish(child);
            assert_eq!(ended.code, 0, "{ended:?}");
            (ended.out, ended.err)
        }
        Streams::File => {
            fs::write(notes.path().join("in"), "typed\n").unwrap();
            command.stdin(fs::File::open(notes.path().join("in")).unwrap());
            let status = command.stdout(appending(&out)).stderr(appending(&err)).status().unwrap();
            assert!(status.success());
            (read(&out), read(&err))
        }
        Streams::Socket => {
            let pairs = [(); 3].map(|()| UnixStream::pair().unwrap());
            let [(mut input, i), (mut output, o), (mut error, e)] = pairs;
            let [i, o, e] = [i, o, e].map(|end| Stdio::from(OwnedFd::from(end)));
            let mut child = command.stdin(i).stdout(o).stderr(e).spawn().unwrap();
            drop(command);
            input.write_all(b"typed\n").unwrap();
            drop(input);
            let (mut stdout, mut stderr) = (String::new(), String::new());
            output.read_to_string(&mut stdout).unwrap();
            error.read_to_string(&mut stderr).unwrap();
            assert!(child.wait().unwrap().success());
            (stdout, stderr)
        }
        Streams::Null => {
            let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
            assert!(status.unwrap().success());
            Default::default()
        }
        Streams::Closed => {
            let mut closed = Command::new("sh");
            closed.args(["-c", "exec \"$@\" <&- >&- 2>&-", "sh"]);
            closed.arg(command.get_program()).args(command.get_args()).env_clear();
            closed.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            assert!(closed.current_dir(command.get_current_dir().unwrap()).status().unwrap().success());
            Default::default()
        }
        Streams::Terminal => {
            let script = if options.contains("-i") {
                r#"[["type", "typed\n"], ["wait", "to-stderr"], ["type", "\u0004"]]"#
            } else {
                r#"[["wait", "to-stderr"]]"#
            };
            let ended = on_a_terminal(&command, script);
            assert_eq!(ended.code, 0, "{ended:?}");
            let shown = ended.out.replace("\r\n", "\n");
            (shown.clone(), shown)
        }
    };
    assert_eq!(read(&notes.path().join("done")), "0\n", "{streams:?} {options}");
    let kinds = read(&notes.path().join("streams"));
    let kinds = kinds.lines().map(|line| line.split(':').next().unwrap().to_owned()).collect();
    (kinds, stdout, stderr, read(&notes.path().join("input")))
}

fn check(streams: Streams, output: &str, stdout: &str, stderr: &str, input: &str) {
    for (caller, user) in identities() {
        for (interactive, kind, typed) in [("", "/dev/null", ""), ("-i", "pipe", input)] {
            let observed = observe(streams, &format!("{user} {interactive}"), caller);
            let kinds = [kind, output, output].map(str::to_owned).to_vec();
            let expected = (kinds, stdout.to_owned(), stderr.to_owned(), typed.to_owned());
            assert_eq!(observed, expected, "{streams:?} {caller:?} {user} {interactive}");
        }
    }
}

#[test]
fn a_pipe_is_a_pipe_of_the_containers_own() {
    check(Streams::Pipe, "pipe", "to-stdout\n", "to-stderr\n", "typed\n");
}

#[test]
fn a_file_is_appended_to_and_never_truncated() {
    check(Streams::File, "pipe", "before\nto-stdout\n", "before\nto-stderr\n", "typed\n");
}

#[test]
fn a_socket_can_be_opened_as_dev_stdout() {
    check(Streams::Socket, "pipe", "to-stdout\n", "to-stderr\n", "typed\n");
}

#[test]
fn the_null_device_is_the_containers_own() {
    check(Streams::Null, "/dev/null", "", "", "");
}

#[test]
fn a_closed_stream_is_the_null_device() {
    check(Streams::Closed, "/dev/null", "", "", "");
}

#[test]
fn a_terminal_is_never_seen_without_t() {
    for (caller, user) in identities() {
        for (interactive, kind, typed) in [("", "/dev/null", ""), ("-i", "pipe", "typed\n")] {
            let (kinds, shown, _, input) =
                observe(Streams::Terminal, &format!("{user} {interactive}"), caller);
            assert_eq!(kinds, [kind, "pipe", "pipe"], "{caller:?} {user} {interactive}");
            assert_eq!(input, typed, "{caller:?} {user} {interactive}");
            // One pipe for both keeps the order of the command, because both are the same terminal.
            let order = [shown.find("to-stdout"), shown.find("to-stderr")];
            assert!(order[0].is_some() && order[0] < order[1], "{shown}");
        }
    }
}

#[test]
fn with_t_all_three_are_the_containers_terminal() {
    for (caller, user) in identities() {
        for (interactive, typed) in [("", ""), ("-i", "typed\n")] {
            let options = format!("{user} -t {interactive}");
            if interactive.is_empty() {
                // Nothing is typed there, so `cat` would wait forever.
                let host = TestHost::new("t4");
                let out = host.ok(
                    caller,
                    &options,
                    &busybox(),
                    "tty; for n in 0 1 2; do readlink /proc/$$/fd/$n; done; echo a > /dev/stdout",
                );
                assert_eq!(out.replace('\r', ""), "/dev/pts/0\n/dev/pts/0\n/dev/pts/0\n/dev/pts/0\na\n");
                continue;
            }
            let (kinds, _, _, input) = observe(Streams::Terminal, &options, caller);
            assert_eq!(kinds, ["/dev/pts/0"; 3], "{options}");
            assert_eq!(input, typed, "{options}");
        }
    }
}

#[test]
fn streams_that_are_one_file_keep_their_order() {
    let host = TestHost::new("t4");
    let dir = temporary();
    let log = dir.path().join("log");
    let expected: String = (0..500).map(|n| format!("out {n}\nerr {n}\n")).collect();
    for caller in Caller::EACH {
        fs::write(&log, "").unwrap();
        let file = fs::OpenOptions::new().append(true).open(&log).unwrap();
        let script = "i=0; while [ $i -lt 500 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done";
        let mut command = host.command(caller, "", &busybox(), &["sh", "-c", script]);
        let status = command.stdout(file.try_clone().unwrap()).stderr(file).status().unwrap();
        assert!(status.success());
        assert_eq!(fs::read_to_string(&log).unwrap(), expected);
    }
}

#[test]
fn no_byte_is_lost_when_the_container_ends() {
    let host = TestHost::new("t4");
    let dir = temporary();
    // A reader that starts late, so that pipes are full when the command ends; and processes that the command leaves behind.
    let script = "(while :; do sleep 1; done) & head -c 60000 /dev/zero | tr '\\0' e >&2; head -c 60000 /dev/zero | tr '\\0' o";
    for caller in Caller::EACH {
        let mut child = host.command(caller, "", &busybox(), &["sh", "-c", script]).spawn_piped();
        let (mut out, mut err) = (String::new(), String::new());
        let mut stdout = child.stdout.take().unwrap();
        let mut stderr = child.stderr.take().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(300));
        stdout.read_to_string(&mut out).unwrap();
        stderr.read_to_string(&mut err).unwrap();
        assert_eq!((out.len(), err.len(), child.wait().unwrap().code()), (60_000, 60_000, Some(0)));

        let log = dir.path().join("large");
        let file = fs::File::create(&log).unwrap();
        let status = host
            .command(caller, "", &busybox(), &["sh", "-c", "yes | head -c 20000000"])
            .stdout(file)
            .status();
        assert!(status.unwrap().success());
        assert_eq!(fs::metadata(&log).unwrap().len(), 20_000_000);
    }
}

#[test]
fn a_slow_reader_of_one_stream_does_not_stop_the_other() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        // More than any pipe holds goes to standard output, which is not read until standard error is at its end.
        let script = "(head -c 3000000 /dev/zero | tr '\\0' o) & head -c 3000000 /dev/zero | tr '\\0' e >&2; exec 2>&-; wait";
        let mut child = host.command(caller, "", &busybox(), &["sh", "-c", script]).spawn_piped();
        let mut seen = vec![0; 3_000_000];
        child.stderr.as_mut().unwrap().read_exact(&mut seen).unwrap();
        let ended = finish(child);
        assert_eq!((ended.out.len(), ended.code), (3_000_000, 0));
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let mut command = host.command(caller, "", &busybox(), &["sh", "-c", "echo lost; exit 0"]);
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let child = command.stdin(Stdio::null()).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let ended = finish(child);
        assert_eq!(ended.code, 125, "{ended:?}");
        assert!(ended.err.contains("No space left") && ended.err.contains("fix: "), "{ended:?}");
        // Without output there is nothing to lose.
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = host.command(caller, "", &busybox(), &["true"]);
        assert_eq!(command.stdout(full).status().unwrap().code(), Some(0));
    }
}

/// The pid of a container's first process.
fn process_inside(launcher: &Child) -> String {
    let children = format!("/proc/{0}/task/{0}/children", launcher.id());
    let mut inside = String::new();
    // The launcher has other children: one removes what killed launchers left.
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    until("the container's process", || {
        let all = fs::read_to_string(&children).unwrap_or_default();
        let found =
            all.split_whitespace().find(|pid| namespace(pid).is_some_and(|n| Some(n) != namespace("self")));
        inside = found.unwrap_or_default().to_owned();
        !inside.is_empty()
    });
    inside
}

#[test]
fn the_launcher_does_not_wait_for_descriptors_that_left_the_container() {
    // A process of the host holds the container's standard output open, as after SCM_RIGHTS on a volume.
    let host = TestHost::new("t4");
    let script = "echo ready; while :; do sleep 0.05; done";
    let mut child = host.command(Caller::Root, "", &busybox(), &["sh", "-c", script]).spawn_piped();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    let inside = process_inside(&child);
    let held = fs::OpenOptions::new().write(true).open(format!("/proc/{inside}/fd/1")).unwrap();
    gpurun_integration::must(Command::new("kill").args(["-TERM", &child.id().to_string()]));
    assert_eq!(finish(child).code, 143);
    drop(held);
}

#[test]
fn an_empty_input_ends_the_commands_input() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let ended = run(&mut host.command(caller, "-i", &busybox(), &["cat"]));
        assert_eq!((ended.code, ended.out.as_str()), (0, ""));
    }
}

#[test]
fn the_launcher_does_not_wait_for_a_process_outside_that_goes_on_writing() {
    let host = TestHost::new("t4");
    let script = "echo ready; while :; do sleep 0.05; done";
    for options in ["", "-t"] {
        let mut child = host.command(Caller::Root, options, &busybox(), &["sh", "-c", script]).spawn_piped();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        let fd = format!("/proc/{}/fd/1", process_inside(&child));
        let mut held = fs::OpenOptions::new().write(true).open(fd).unwrap();
        // It ends with EPIPE or EIO when the launcher has closed its end.
        let writer = std::thread::spawn(move || while held.write_all(&[b'x'; 1000]).is_ok() {});
        gpurun_integration::must(Command::new("kill").args(["-TERM", &child.id().to_string()]));
        assert_eq!(finish(child).code, 143, "{options}");
        writer.join().unwrap();
    }
}

#[test]
fn a_signal_ends_a_container_whose_output_is_not_read() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        for options in ["", "-t"] {
            for (signal, code) in [("TERM", 143), ("INT", 130), ("HUP", 129)] {
                let mut child = host.command(caller, options, &busybox(), &["yes"]).spawn_piped();
                child.stdout.as_mut().unwrap().read_exact(&mut [0; 2]).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(300));
                gpurun_integration::must(
                    Command::new("kill").args([&format!("-{signal}"), child.id().to_string().as_str()]),
                );
                let mut ended = None;
                until("the end of a launcher without a reader", || {
                    ended = child.try_wait().unwrap();
                    ended.is_some()
                });
                assert_eq!(ended.unwrap().code(), Some(code), "{caller:?} {options} {signal}");
            }
        }
    }
}

/// Runs the command on a terminal, types this many bytes and reads nothing meanwhile. Then reads until `wanted`, sends SIGTERM,
/// and prints the exit code and whether the terminal has its settings back.
fn type_and_terminate(command: &Command, typed: usize, wanted: &str) -> String {
    const DRIVER: &str = r#"
import os, pty, signal, sys, termios, time
typed, wanted, argv = int(sys.argv[1]), sys.argv[2].encode(), sys.argv[3:]
master, slave = pty.openpty()
before = termios.tcgetattr(slave)
pid = os.fork()
if pid == 0:
    os.login_tty(slave) if hasattr(os, "login_tty") else (os.setsid(), [os.dup2(slave, n) for n in range(3)])
    os.execvp(argv[0], argv)
def until(text):
    seen = b""
    while text not in seen: seen += os.read(master, 1000)
until(b"ready")
os.set_blocking(master, False)
stop = time.time() + 2
while time.time() < stop:
    try: typed -= os.write(master, b"x" * min(typed, 4096))
    except BlockingIOError: pass
    time.sleep(0.01)
os.set_blocking(master, True)
if wanted == b"100000": os.write(master, b"x" * typed)
until(wanted)
os.kill(pid, signal.SIGTERM)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(code, termios.tcgetattr(slave) == before)
"#;
    let mut driver = Command::new("/usr/bin/python3");
    driver
        .args(["-c", DRIVER, &typed.to_string(), wanted])
        .arg(command.get_program())
        .args(command.get_args());
    driver.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let ended = run(driver.current_dir(command.get_current_dir().unwrap()));
    assert_eq!(ended.code, 0, "{ended:?}");
    ended.out
}

#[test]
fn a_terminal_that_is_not_read_delays_no_signal() {
    let host = TestHost::new("t4");
    let yes = "echo ready; exec yes";
    let echo = "stty raw; echo ready; exec cat";
    let ticks = "stty raw -echo; echo ready; while :; do sleep 0.2; echo tick; done";
    for caller in Caller::EACH {
        for (options, script, typed, wanted) in [
            ("", yes, 0, ""),
            ("-t", yes, 0, ""),
            ("-it", yes, 0, ""),
            ("-it", echo, 300_000, ""),
            // Input that the command does not read delays no output.
            ("-it", ticks, 20_000, "tick"),
        ] {
            let command = host.command(caller, options, &busybox(), &["sh", "-c", script]);
            let ended = type_and_terminate(&command, typed, wanted);
            assert_eq!(ended, "143 True\n", "{caller:?} {options} {script}");
        }
    }
}

/// Starts the command as a background job whose input its shell takes, continues it, sends SIGTERM, and prints the exit code.
fn take_input_and_terminate(command: &Command) -> String {
    const DRIVER: &str = r#"
import os, pty, signal, sys
pid, master = pty.fork()
if pid == 0:
    job = os.fork()
    if job == 0:
        os.setpgid(0, 0)
        os.execvp(sys.argv[1], sys.argv[1:])
    stopped = os.waitpid(job, os.WUNTRACED)[1]
    assert os.WIFSTOPPED(stopped) and os.WSTOPSIG(stopped) == signal.SIGTTIN, stopped
    assert os.read(0, 100) == b"typed\n"
    os.kill(job, signal.SIGCONT)
    os.kill(job, signal.SIGTERM)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]))
seen = b""
while b"ready" not in seen: seen += os.read(master, 1000)
os.write(master, b"typed\n")
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"#;
    let mut driver = Command::new("/usr/bin/python3");
    driver.args(["-c", DRIVER]).arg(command.get_program()).args(command.get_args());
    driver.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let ended = run(driver.current_dir(command.get_current_dir().unwrap()));
    assert_eq!(ended.code, 0, "{ended:?}");
    ended.out
}

#[test]
fn input_that_another_process_takes_delays_no_signal() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let command = host.command(caller, "-i", &busybox(), &["sh", "-c", "echo ready; exec sleep 1000"]);
        assert_eq!(take_input_and_terminate(&command), "143\n", "{caller:?}");
    }
}

#[test]
fn input_arrives_whole_at_a_terminal_that_was_full() {
    let host = TestHost::new("t4");
    // The command reads late, so that the terminal is full meanwhile.
    let script =
        "stty raw -echo; echo ready; sleep 3; head -c 100000 | wc -c; sleep 1; echo; exec sleep 1000";
    for caller in Caller::EACH {
        let command = host.command(caller, "-it", &busybox(), &["sh", "-c", script]);
        assert_eq!(type_and_terminate(&command, 100_000, "100000"), "143 True\n", "{caller:?}");
    }
}

#[test]
fn a_file_size_limit_is_reported_like_a_full_disk() {
    let host = TestHost::new("t4");
    let dir = temporary();
    for caller in Caller::EACH {
        for options in ["", "-t"] {
            let command = host.command(caller, options, &busybox(), &["yes"]);
            let mut limited = Command::new("sh");
            limited.args(["-c", "ulimit -f 1000; exec \"$@\" > \"$0\""]).arg(dir.path().join("out"));
            limited.arg(command.get_program()).args(command.get_args()).env_clear();
            limited.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            let ended = run(limited.current_dir(command.get_current_dir().unwrap()));
            assert_eq!(ended.code, 125, "{caller:?} {options}: {ended:?}");
            assert!(ended.err.contains("File too large") && ended.err.contains("fix: "), "{ended:?}");
        }
    }
}

/// Another process reads from the launcher's standard input as well, as a shell's other background jobs do: bytes that poll(2)
/// reported may be gone.
#[test]
fn another_reader_of_the_input_does_not_stop_the_launcher() {
    const DRIVER: &str = r#"
import os, pty, random, signal, socket, subprocess, sys, time, tty
kind, argv = sys.argv[1], sys.argv[2:]
if kind == "socket":
    feed, inherited = socket.socketpair()
    fd, write, take = inherited.fileno(), feed.send, lambda: inherited.recv(1, socket.MSG_DONTWAIT)
else:
    fd, end = os.pipe() if kind == "pipe" else pty.openpty()[::-1]
    if kind == "terminal": tty.setraw(fd)
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    write, take = lambda text: os.write(end, text), lambda: os.read(own, 1)
child = subprocess.Popen(argv, stdin=fd, stdout=subprocess.PIPE)
assert b"ready" in child.stdout.readline()
for n in range(4000):
    write(b"x")
    stop = time.perf_counter() + random.random() * 2e-4
    while time.perf_counter() < stop: pass
    try: take()
    except BlockingIOError: pass
    if n % 50 == 0: time.sleep(0.002)
child.send_signal(signal.SIGTERM)
print(child.wait())
"#;
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        for (kind, options) in [("socket", "-i"), ("terminal", "-i"), ("terminal", "-it"), ("pipe", "-i")] {
            let command =
                host.command(caller, options, &busybox(), &["sh", "-c", "echo ready; exec cat > /dev/null"]);
            let mut driver = Command::new("timeout");
            driver.args(["--signal", "KILL", "120", "/usr/bin/python3", "-c", DRIVER, kind]);
            driver.arg(command.get_program()).args(command.get_args());
            driver.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            let ended = run(driver.current_dir(command.get_current_dir().unwrap()));
            assert_eq!(ended.out, "143\n", "{caller:?} {kind} {options}: {ended:?}");
        }
    }
}
