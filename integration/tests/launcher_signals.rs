//! Signals and the end of a container: every case of the rule in `container/signals.rs`.

use gpurun_integration::{
    Caller, SpawnPiped, TestHost, finish, must, on_a_terminal, processes_with, rootfs, run, unique, until,
};
use std::{
    io::Read,
    process::{Child, Command},
};

fn busybox() -> String {
    rootfs("busybox")
}

/// Executes a program without handlers, and prints "ready" only then: BusyBox's shell ignores SIGQUIT until the exec.
const SLEEP: &str = "(while ! grep -q sleep /proc/$$/comm; do :; done; echo ready) & exec sleep 1000";

/// Waits for the five bytes of "ready".
fn started(command: &mut Command) -> Child {
    let mut child = command.spawn_piped();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 5]).unwrap();
    child
}

fn send(child: &Child, signal: &str) {
    must(Command::new("kill").args([format!("-{signal}"), child.id().to_string()]));
}

/// The same command with words before it, such as `nohup`.
fn behind(words: &[&str], command: &Command) -> Command {
    let mut all = Command::new(words[0]);
    all.args(&words[1..]).arg(command.get_program()).args(command.get_args()).env_clear();
    all.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    all.current_dir(command.get_current_dir().unwrap());
    all
}

const ENDING: [(&str, i32); 12] = [
    ("HUP", 129),
    ("INT", 130),
    ("QUIT", 131),
    ("USR1", 138),
    ("USR2", 140),
    ("ALRM", 142),
    ("TERM", 143),
    ("XCPU", 152),
    ("VTALRM", 154),
    ("PROF", 155),
    ("IO", 157),
    ("PWR", 158),
];

#[test]
fn a_signal_without_a_handler_ends_the_container() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        for options in ["", "-t", "--init", "-u 0"] {
            for (signal, code) in ENDING {
                let child = started(&mut host.command(caller, options, &busybox(), &["sh", "-c", SLEEP]));
                send(&child, signal);
                let ended = finish(child);
                assert_eq!(ended.code, code, "{caller:?} {options} {signal}: {ended:?}");
            }
        }
    }
}

/// The kernel cuts a long name after 15 bytes, within a letter.
#[test]
fn a_command_whose_name_is_not_utf_8_ends_as_well() {
    let host = TestHost::new("t4");
    let sleep = "ln -s $(readlink /proc/$$/exe) /tmp/busybox1234567\u{e9}; \
        (while ! grep -q busybox1234567 /proc/$$/comm; do :; done; echo ready) & exec /tmp/busybox1234567\u{e9} sleep 1000";
    for caller in Caller::EACH {
        let child = started(&mut host.command(caller, "", &busybox(), &["sh", "-c", sleep]));
        send(&child, "TERM");
        assert_eq!(finish(child).code, 143, "{caller:?}");
    }
}

#[test]
fn real_time_signals_are_forwarded() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        for options in ["", "-t", "-u 0", "--init"] {
            let child = started(&mut host.command(caller, options, &busybox(), &["sh", "-c", SLEEP]));
            send(&child, "40");
            assert_eq!(finish(child).code, 168, "{caller:?} {options}");
        }
        let handled = "trap 'exit 9' 40; echo ready; while :; do sleep 0.02; done";
        let child =
            started(&mut host.command(caller, "", &rootfs("debian-python"), &["bash", "-c", handled]));
        send(&child, "40");
        assert_eq!(finish(child).code, 9);
    }
}

#[test]
fn signals_that_end_no_process_end_no_container() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let child =
            started(&mut host.command(caller, "", &busybox(), &["sh", "-c", "echo ready; exec sleep 1"]));
        for signal in ["CONT", "WINCH", "CHLD", "URG"] {
            send(&child, signal);
        }
        assert_eq!(finish(child).code, 0);
    }
}

#[test]
fn handled_ignored_and_blocked_signals_are_left_to_the_command() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let handled = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.02; done";
        let ignored = "trap '' TERM; echo ready; sleep 0.5; exit 8";
        for (script, code) in [(handled, 9), (ignored, 8)] {
            let child = started(&mut host.command(caller, "", &busybox(), &["sh", "-c", script]));
            send(&child, "TERM");
            assert_eq!(finish(child).code, code);
        }
        // Like an init in the image: sigwait(3) takes signals out of the mask meanwhile.
        let blocked = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\nprint('ready', flush=True)\n\
                       signal.sigwait([signal.SIGTERM])\nraise SystemExit(7)";
        let mut command = host.command(caller, "", &rootfs("debian-python"), &["python3", "-c", blocked]);
        let child = started(&mut command);
        send(&child, "TERM");
        assert_eq!(finish(child).code, 7);
    }
}

#[test]
fn keys_end_a_command_without_a_handler() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        for options in ["-it", "-it -u 0", "-it --init"] {
            for (key, code) in [("\\u0003", 130), ("\\u001c", 131)] {
                let command = host.command(caller, options, &busybox(), &["sh", "-c", SLEEP]);
                let script = format!(r#"[["wait", "ready"], ["type", "{key}"]]"#);
                let ended = on_a_terminal(&command, &script);
                assert_eq!(ended.code, code, "{caller:?} {options} {key}: {ended:?}");
            }
        }
        // A command that reads keys itself, or has its own foreground, is not ended by one.
        let raw = "stty raw -echo; echo ready; dd bs=1 count=1 2>/dev/null | od -An -tx1; exit 5";
        let command = host.command(caller, "-it", &busybox(), &["sh", "-c", raw]);
        let ended = on_a_terminal(&command, r#"[["wait", "ready"], ["type", "\u0003"]]"#);
        assert!(ended.code == 5 && ended.out.contains("03"), "{ended:?}");
    }
}

#[test]
fn without_i_the_launchers_own_terminal_interrupts_it() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        for options in ["", "-i", "-t"] {
            let command = host.command(caller, options, &busybox(), &["sh", "-c", SLEEP]);
            let ended = on_a_terminal(&command, r#"[["wait", "ready"], ["type", "\u0003"]]"#);
            assert_eq!(ended.code, 130, "{caller:?} {options}: {ended:?}");
        }
    }
}

#[test]
fn a_terminal_that_is_closed_leaves_no_container() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        for options in ["", "-i", "-t", "-it"] {
            let mark = unique();
            let command =
                host.command(caller, &format!("{options} -e MARK={mark}"), &busybox(), &["sh", "-c", SLEEP]);
            // The shell leads the session of the terminal and is killed with its window.
            let script = r#"
import os, pty, signal, sys
pid, fd = pty.fork()
if pid == 0:
    os.execvp("sh", ["sh", "-c", '"$@"; :', "sh"] + sys.argv[1:])
seen = b""
while b"ready" not in seen: seen += os.read(fd, 1000)
os.close(fd)
os.waitpid(pid, 0)
"#;
            let ended = run(&mut behind(&["/usr/bin/python3", "-c", script], &command));
            assert_eq!(ended.code, 0, "{ended:?}");
            until(&format!("the end of {caller:?} {options}"), || {
                processes_with(&format!("MARK={mark}")).is_empty()
            });
            until("the removal of its files", || host.scratch(caller).is_empty());
        }
    }
}

#[test]
fn what_the_parent_ignores_stays_ignored() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let command = host.command(caller, "", &busybox(), &["sh", "-c", "echo ready; sleep 0.5; exit 6"]);
        let child = started(&mut behind(&["env", "--ignore-signal=HUP"], &command));
        send(&child, "HUP");
        assert_eq!(finish(child).code, 6);
    }
}

#[test]
fn signals_that_the_parent_left_ignored_or_blocked_change_nothing() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        for words in [
            &["env", "--ignore-signal=CHLD"][..],
            &["env", "--block-signal=CHLD,TERM,INT"],
            &["env", "--ignore-signal"],
            &["env", "--block-signal"],
        ] {
            // The exit code is not lost, and the command has the default actions and blocks nothing.
            let show = "grep -E '^Sig(Blk|Ign)' /proc/self/status; exit 7";
            for options in ["", "--init", "-u 0"] {
                let command = host.command(caller, options, &busybox(), &["sh", "-c", show]);
                let ended = run(&mut behind(words, &command));
                assert_eq!(ended.code, 7, "{words:?} {options}: {ended:?}");
                assert_eq!(
                    ended.out, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n",
                    "{words:?} {options}"
                );
            }
        }
        let command = host.command(caller, "", &busybox(), &["sh", "-c", SLEEP]);
        let child = started(&mut behind(&["env", "--block-signal"], &command));
        send(&child, "TERM");
        assert_eq!(finish(child).code, 143);
    }
}

#[test]
fn every_program_survives_a_parent_that_ignores_its_childrens_end() {
    let host = TestHost::new("8xh100");
    let gpurun = host.gpurun();
    let ignoring = |words: &[&str]| {
        let mut command = behind(&["env", "--ignore-signal=CHLD"], &gpurun);
        command.args(words);
        run(&mut command)
    };
    // The inventory is read by gpurun-nvml, a child.
    let ended = ignoring(&["inventory"]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.out.contains("H100"), "{ended:?}");
    let ended = ignoring(&["run", "--gpus", "all", &busybox(), "sh", "-c", "exit 4"]);
    assert_eq!(ended.code, 4, "{ended:?}");
    let ended = ignoring(&["cdi", "generate"]);
    assert_eq!(ended.code, 0, "{ended:?}");
}

/// A process that calls PTRACE_TRACEME stops at each signal until its parent continues it; the parent of pid 1 is gpurun.
#[test]
fn a_first_process_that_asks_to_be_traced_is_not_stopped() {
    let host = TestHost::new("t4");
    // 0 is PTRACE_TRACEME.
    let script = "import ctypes, os, signal, sys\n\
        signal.signal(signal.SIGUSR1, lambda *_: print('handled', flush=True))\n\
        libc = ctypes.CDLL(None)\n\
        for one in (signal.SIGUSR1, signal.SIGSTOP, signal.SIGWINCH, signal.SIGTSTP):\n  \
          assert libc.ptrace(0, 0, 0, 0) == 0; os.kill(os.getpid(), one)\n\
        libc.ptrace(0, 0, 0, 0)\n\
        os.execvp('sh', ['sh', '-c', 'echo executed; exit 7'])";
    for caller in Caller::EACH {
        for options in ["", "--init", "-t", "--pid host", "-u 0"] {
            let ended =
                run(&mut host.command(caller, options, &rootfs("debian-python"), &["python3", "-c", script]));
            let out = ended.out.replace('\r', "");
            assert_eq!(
                (ended.code, out.as_str()),
                (7, "handled\nexecuted\n"),
                "{caller:?} {options}: {ended:?}"
            );
        }
    }
    // It can still be killed, and stopped from outside.
    let traced = "import ctypes, time; ctypes.CDLL(None).ptrace(0, 0, 0, 0); print('ready', flush=True); time.sleep(1000)";
    for options in ["", "--init"] {
        let child = started(&mut host.command(
            Caller::User,
            options,
            &rootfs("debian-python"),
            &["python3", "-c", traced],
        ));
        send(&child, "TERM");
        assert_eq!(finish(child).code, 143, "{options}");
    }
}
