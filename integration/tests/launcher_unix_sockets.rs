//! The supervisor of a container's Unix sockets: whom its sockets belong to, what they count against, and whose memory it writes.

use gpurun_integration::{Caller, Ended, TestHost, rootfs, run};
use std::{
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
};

fn debian() -> String {
    rootfs("debian-python")
}

const OWNERS: &str = r#"
import os, socket, struct
def check():
    ids = os.geteuid(), os.getegid()
    single = [socket.socket(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)]
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for s in (*single, *pair):
        stat = os.fstat(s.fileno())
        assert (stat.st_uid, stat.st_gid) == ids, (stat, ids)
        os.fchmod(s.fileno(), 0o600)
    peer = struct.unpack("iii", pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    assert peer[1:] == ids, peer
    name = "/tmp/" + os.urandom(8).hex()
    single[0].bind(name)
    assert os.stat(name).st_mode & 0o777 == 0o600
check()
if CHANGES:
    child = os.fork()
    if child == 0:
        os.setgroups([]); os.setgid(4321); os.setuid(1234)
        check()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    check()
print("owned")
"#;

#[test]
fn a_socket_belongs_to_the_process_that_asked_for_it() {
    let host = TestHost::new("t4");
    for (caller, options, changes) in [
        (Caller::Root, "", "True"),
        (Caller::Root, "-u 1234:4321", "False"),
        (Caller::Root, "-u 65534", "False"),
        (Caller::Root, "--network none", "True"),
        (Caller::User, "", "False"),
        (Caller::User, "-u 0", "False"),
    ] {
        let script = OWNERS.replace("CHANGES", changes);
        let ended = run(&mut host.command(caller, options, &debian(), &["python3", "-c", &script]));
        assert_eq!((ended.code, ended.out.as_str()), (0, "owned\n"), "{caller:?} {options}: {ended:?}");
    }
}

/// Makes sockets until the memory limit ends it.
const MANY: &str = r#"
import os, resource, time
import ctypes
libc = ctypes.CDLL(None)
hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 20000)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
for _ in range(400000 // hard):
    reader, writer = os.pipe()
    if os.fork() == 0:
        while libc.socket(1, 2, 0) >= 0: pass
        os.write(writer, b"x")
        time.sleep(1000)
    os.close(writer)
    os.read(reader, 1)
print("all were made")
"#;

#[test]
fn sockets_count_against_the_memory_limit() {
    let host = TestHost::new("t4");
    let ended = run(&mut host.command(Caller::Root, "-m 100m", &debian(), &["python3", "-c", MANY]));
    assert!(ended.err.contains("memory limit (-m 100m)"), "{ended:?}");
}

/// Starts a container in a new pid namespace in which /proc still shows the old one, and gives its first process the number
/// `first` there.
fn in_new_pid_namespace(command: &Command, first: u32) -> Command {
    let script = format!("echo {} > /proc/sys/kernel/ns_last_pid; \"$@\"", first - 1);
    let mut new = Command::new("unshare");
    new.args(["--pid", "--fork", "sh", "-c", &script, "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    new.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    new
}

/// Shows where its memory is, waits for the end of its input, and shows the memory.
const VICTIM: &str = r#"
import ctypes, os, sys
memory = ctypes.create_string_buffer(b"unchanged")
print(os.getpid(), ctypes.addressof(memory), flush=True)
sys.stdin.read()
print(memory.value.decode(errors="replace"))
"#;

/// Processes with many numbers ask for a pair, to be written to an address that the victim has.
const ATTACKER: &str = r#"
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
address = int(sys.argv[1])
page = address & ~4095
libc.mmap.restype = ctypes.c_void_p
# MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE: the address also exists here.
assert libc.mmap(ctypes.c_void_p(page), ctypes.c_size_t(8192), 3, 0x100022, -1, ctypes.c_long(0)) == page
for _ in range(60):
    child = os.fork()
    if child == 0:
        os._exit(0 if libc.syscall(SOCKETPAIR, 1, 2, 0, ctypes.c_void_p(address)) == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0, "no pair"
for index, name in socket.if_nameindex():
    assert socket.if_nametoindex(name) == index
print("done")
"#;

#[test]
fn memory_of_the_hosts_processes_is_not_written_through_a_foreign_proc() {
    let host = TestHost::new("t4");
    let mut victim = Command::new("/usr/bin/python3")
        .args(["-c", VICTIM])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(victim.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    let (pid, address) = line.trim().split_once(' ').unwrap();
    let script = ATTACKER.replace("SOCKETPAIR", if cfg!(target_arch = "aarch64") { "199" } else { "53" });
    let command = host.command(Caller::Root, "", &debian(), &["python3", "-c", &script, address]);
    let first = pid.parse::<u32>().unwrap().saturating_sub(30).max(300);
    let ended = run(&mut in_new_pid_namespace(&command, first));
    drop(victim.stdin.take());
    let mut memory = String::new();
    output.read_to_string(&mut memory).unwrap();
    victim.wait().unwrap();
    assert_eq!((ended.code, ended.out.as_str()), (0, "done\n"), "{ended:?}");
    assert_eq!(memory, "unchanged\n");
}

#[test]
fn a_stop_signal_ends_a_container_where_proc_shows_another_pid_namespace() {
    let host = TestHost::new("t4");
    let script = "\"$@\" > out & pid=$!; until grep -q ready out; do sleep 0.05; done; kill -TERM $pid; wait $pid; echo $?";
    for options in ["", "-t"] {
        let directory = tempfile::tempdir().unwrap();
        // A shell that runs its last command as a child has no handler for SIGTERM, and the kernel does not end pid 1 for it.
        let command =
            host.command(Caller::Root, options, &debian(), &["sh", "-c", "echo ready; sleep 60; true"]);
        let mut inside = Command::new("timeout");
        inside.args(["50", "unshare", "--pid", "--fork", "sh", "-c", script, "sh"]);
        inside.arg(command.get_program()).args(command.get_args()).current_dir(directory.path());
        inside.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let Ended { code, out, err } = run(&mut inside);
        assert_eq!((code, out.as_str()), (0, "143\n"), "{options}: {err}");
    }
}
