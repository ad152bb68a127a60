//! A container cannot use files outside of its own `/`, nor sockets of the host's processes.

use gpurun_integration::{Caller, Ended, SpawnPiped, TestHost, finish, rootfs, run, temporary, unique};
use std::{
    fs,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

fn debian() -> String {
    rootfs("debian-python")
}

/// A process of another user of the host that passes a descriptor of the host's `/`.
const HELPER: &str = r#"
import array, os, socket, sys, time
how, name = sys.argv[1:]
address = name if name.startswith("/") else "\0" + name
root = os.open("/", os.O_RDONLY)
def give(s): s.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [root]).tobytes())])
if how == "listen":
    s = socket.socket(socket.AF_UNIX); s.bind(address); s.listen()
    if name.startswith("/"): os.chmod(name, 0o777)
    print("ready", flush=True)
    c = s.accept()[0]; give(c); time.sleep(100)
print("ready", flush=True)
while True:
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if how == "send" else socket.SOCK_STREAM)
    try: s.connect(address); give(s); time.sleep(100)
    except OSError: time.sleep(0.02)
"#;

/// The container's side: receives the descriptor and tries to use it.
const INSIDE: &str = r#"
import array, os, socket, sys
how, name = sys.argv[1:]
address = name if name.startswith("/") else "\0" + name
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if how == "send" else socket.SOCK_STREAM)
if how == "pair":
    # An end of a pair gets a name, and takes leave of the other end.
    import ctypes
    s, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ctypes.CDLL(None).connect(s.fileno(), bytes(2), 2)
s.settimeout(0.7)
try:
    if how == "listen": s.connect(address)
    else:
        s.bind(address)
        if name.startswith("/"): os.chmod(name, 0o777)
        if how == "connect": s.listen(); s = s.accept()[0]; s.settimeout(0.7)
    control = s.recvmsg(1, 64)[1]
except OSError as error:
    print("no descriptor"); sys.exit()
root = array.array("i", control[0][2])[0]
print("a descriptor")
def attempt(what, use):
    try: use(); print(what, "worked")
    except OSError: pass
attempt("open", lambda: os.open("etc/passwd", os.O_RDONLY, dir_fd=root))
attempt("proc", lambda: os.open(f"/proc/self/fd/{root}/etc/passwd", os.O_RDONLY))
attempt("reopen", lambda: os.open(f"/proc/self/fd/{root}", os.O_RDONLY))
attempt("create", lambda: os.open("tmp/" + sys.argv[0], os.O_WRONLY | os.O_CREAT, dir_fd=root))
attempt("mkdir", lambda: os.mkdir("tmp/gpurun-escaped", dir_fd=root))
attempt("symlink", lambda: os.symlink("x", "tmp/gpurun-escaped", dir_fd=root))
attempt("rename", lambda: os.rename("tmp", "tmp2", src_dir_fd=root, dst_dir_fd=root))
attempt("link in", lambda: os.link("etc/passwd", "/tmp/passwd", src_dir_fd=root))
attempt("execute", lambda: os.execve(f"/proc/self/fd/{root}/bin/true", ["true"], {}))
attempt("unlink", lambda: os.unlink("etc/hostname", dir_fd=root))
try: os.chroot(f"/proc/self/fd/{root}")
except PermissionError: pass
else: attempt("open after chroot", lambda: os.open("/etc/passwd", os.O_RDONLY))
print("tried")
"#;

struct Helper(Child);

impl Helper {
    fn start(how: &str, name: &str) -> Self {
        let mut child = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .args(["/usr/bin/python3", "-c", HELPER, how, name])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        Self(child)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).expect("the helper is ours");
    }
}

fn attack(host: &TestHost, caller: Caller, options: &str, how: &str, name: &str) -> Ended {
    let _helper = Helper::start(if how == "pair" { "send" } else { how }, name);
    run(&mut host.command(caller, options, &debian(), &["python3", "-c", INSIDE, how, name]))
}

const IDENTITIES: [(Caller, &str); 5] = [
    (Caller::Root, ""),
    (Caller::Root, "-u 1234"),
    (Caller::Root, "-u 65534"),
    (Caller::User, ""),
    (Caller::User, "-u 0"),
];

#[test]
fn no_descriptor_arrives_over_an_abstract_socket() {
    let host = TestHost::new("t4");
    for (caller, user) in IDENTITIES {
        for network in ["", "--network none", "--init", "--security-opt seccomp=unconfined"] {
            for how in ["listen", "connect", "send", "pair"] {
                let ended = attack(&host, caller, &format!("{user} {network}"), how, &unique());
                assert_eq!(ended.out, "no descriptor\n", "{caller:?} {user} {network} {how}: {ended:?}");
            }
        }
    }
}

#[test]
fn a_descriptor_from_a_socket_on_a_volume_opens_nothing() {
    let host = TestHost::new("t4");
    let volume = temporary();
    fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o777)).unwrap();
    for (caller, user) in IDENTITIES {
        for other in ["", "--network none", "--init", "-v /tmp:/host-tmp"] {
            for how in ["listen", "connect", "send"] {
                let socket: PathBuf = volume.path().join(unique());
                let options = format!("{user} {other} -v {0}:{0}", volume.path().display());
                let ended = attack(&host, caller, &options, how, socket.to_str().unwrap());
                assert_eq!(ended.out, "a descriptor\ntried\n", "{caller:?} {options} {how}: {ended:?}");
            }
        }
    }
    assert!(!Path::new("/tmp/gpurun-escaped").exists());
}

/// Abstract sockets of services that trust the caller's uid: X11, D-Bus.
#[test]
fn the_callers_abstract_sockets_are_out_of_reach() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let name = unique();
        let _helper = Helper::start("listen", &name);
        let script = format!("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{name}')");
        for options in ["", "--security-opt seccomp=unconfined"] {
            let ended = run(&mut host.command(caller, options, &debian(), &["python3", "-c", &script]));
            assert!(ended.code == 1 && ended.err.contains("Error"), "{options}: {ended:?}");
        }
    }
}

/// Each socket of a container gets an abstract name, in every way in which sockets are made.
#[test]
fn a_containers_abstract_names_are_not_the_hosts() {
    let host = TestHost::new("t4");
    for (caller, user) in IDENTITIES {
        let name = unique();
        let script = format!(
            "import socket\nfor kind in (1, 2, 3, 5):\n  s = socket.socket(1, kind); s.bind('\\0{name}-socket-%d' % kind)\n  \
             for end in (0, 1):\n    s = socket.socketpair(1, kind)[end]; s.bind('\\0{name}-pair-%d-%d' % (kind, end))\n  \
             globals()['kept%d' % kind] = s\n\
             print(open('/proc/net/unix').read().count('{name}'), flush=True)\nimport sys; sys.stdin.read()"
        );
        for options in ["-i", "-i --security-opt seccomp=unconfined"] {
            let options = format!("{options} {user}");
            let mut command = host.command(caller, &options, &debian(), &["python3", "-c", &script]);
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let mut line = [0; 2];
            child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
            let taken = fs::read_to_string("/proc/net/unix").unwrap();
            drop(child.stdin.take());
            assert!(child.wait().unwrap().success());
            assert!(!taken.contains(&name), "{caller:?} {options}");
        }
    }
}

/// Common operations that too strict a confinement would break.
const ORDINARY: &str = r#"
import array, ctypes, os, socket, tempfile
libc = ctypes.CDLL(None, use_errno=True)
for a, b in (("/tmp/a", "/tmp/b"), (os.environ["HOME"] + "/a", os.environ["HOME"] + "/b"), ("/volume/a", "/volume/b"), ("/dev/shm/a", "/dev/shm/b")):
    os.mkdir(a); os.mkdir(b)
    with open(a + "/file", "w") as f: f.write("text")
    os.rename(a + "/file", b + "/file")
    os.link(b + "/file", a + "/link")
    os.symlink("file", b + "/symlink")
    os.truncate(b + "/file", 1)
    assert open(a + "/link").read() == "t"
    os.mkfifo(a + "/fifo")
    s = socket.socket(socket.AF_UNIX); s.bind(a + "/s"); s.listen()
    c = socket.socket(socket.AF_UNIX); c.connect(a + "/s")
    p = s.accept()[0]
    assert p.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[4:8] == os.getuid().to_bytes(4, "little")
    os.unlink(a + "/link"); os.unlink(b + "/file"); os.rename(b, a + "/b")
# A process passes a descriptor to another, over an abstract socket of their own.
r = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); r.bind("\0own")
w = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
w.connect("\0own")
fd = os.open("/etc/passwd", os.O_RDONLY)
w.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes())])
got = array.array("i", r.recvmsg(1, 64)[1][0][2])[0]
os.close(os.open(f"/proc/self/fd/{got}", os.O_RDONLY))
assert not os.get_inheritable(r.fileno())
for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
    a, b = socket.socketpair(socket.AF_UNIX, kind)
    a.send(b"over"); assert b.recv(9) == b"over" and not os.get_inheritable(a.fileno())
for wrong in ((socket.AF_UNIX, 77), (socket.AF_UNIX, socket.SOCK_DGRAM, 99)):
    for make in (socket.socket, socket.socketpair):
        try: make(*wrong)
        except OSError as error: assert error.errno in (22, 93, 94), error
        else: raise SystemExit("a socket of no kind")
# Message queues, memory files, interfaces, signals to its own.
# A queue that is left counts against its user's RLIMIT_MSGQUEUE until its namespace is gone, which the kernel does later.
if MESSAGE_QUEUES:
    queue = libc.mq_open(b"/queue", os.O_RDWR | os.O_CREAT, 0o600, None)
    assert queue >= 0, ctypes.get_errno()
    assert libc.mq_unlink(b"/queue") == 0 and os.close(queue) is None, ctypes.get_errno()
m = os.memfd_create("m"); os.close(os.open(f"/proc/self/fd/{m}", os.O_RDWR))
for index, name in socket.if_nameindex():
    assert socket.if_nametoindex(name) == index and socket.if_indextoname(index) == name
for wrong in (lambda: socket.if_nametoindex("none-such"), lambda: socket.if_indextoname(9999)):
    try: wrong()
    except OSError: pass
    else: raise SystemExit("an interface that is not there")
child = os.fork()
if child == 0:
    while True: pass
os.kill(child, 9); assert os.waitpid(child, 0)[1] == 9
print("as ever")
"#;

#[test]
fn common_operations_work_in_confinement() {
    let host = TestHost::new("t4");
    for (caller, user) in IDENTITIES {
        for other in ["", "--init", "--network none", "--ipc host"] {
            let volume = temporary();
            fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o777)).unwrap();
            // /dev/shm is the host's with --ipc host, so its names must be free.
            let script = ORDINARY.replace("/dev/shm/", &format!("/dev/shm/{}-", unique()));
            let script = script.replace("b\"/queue\"", &format!("b\"/{}\"", unique()));
            // An ordinary user can only show the host's message queues where the host has them mounted.
            let message_queues = (caller, other) != (Caller::User, "--ipc host");
            let script = script.replace("MESSAGE_QUEUES", if message_queues { "True" } else { "False" });
            let options = format!("{user} {other} -v {}:/volume", volume.path().display());
            let ended = run(&mut host.command(caller, &options, &debian(), &["python3", "-c", &script]));
            assert_eq!((ended.code, ended.out.as_str()), (0, "as ever\n"), "{caller:?} {options}: {ended:?}");
        }
    }
    let leftovers = fs::read_dir("/dev/shm").unwrap().flatten();
    for entry in leftovers.filter(|entry| entry.file_name().to_string_lossy().starts_with("gpurun-test-")) {
        fs::remove_dir_all(entry.path()).unwrap();
    }
}

#[test]
fn a_container_that_may_mount_mounts() {
    let host = TestHost::new("t4");
    let mount = "mount -t tmpfs none /mnt && touch /mnt/x && mkdir /tmp/root && mount --bind / /tmp/root && echo mounted";
    assert_eq!(host.ok(Caller::Root, "--cap-add SYS_ADMIN", &debian(), mount), "mounted\n");
    let nested = "unshare -Urm sh -c 'mount -t tmpfs none /mnt && echo mounted'";
    let out = host.ok(Caller::User, "--security-opt seccomp=unconfined", &debian(), nested);
    assert_eq!(out, "mounted\n");
}

/// Runs a command on a kernel without Landlock: the system call does not exist.
fn without_landlock(command: &Command) -> Command {
    const SCRIPT: &str = r#"
import ctypes, os, struct, sys
filter = b"".join(struct.pack("HBBI", *i) for i in ((0x20, 0, 0, 0), (0x15, 0, 1, 444), (6, 0, 0, 0x50026), (6, 0, 0, 0x7fff0000)))
buffer = ctypes.create_string_buffer(filter)
program = struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
os.execvp(sys.argv[1], sys.argv[1:])
"#;
    let mut older = Command::new("/usr/bin/python3");
    older.args(["-c", SCRIPT]).arg(command.get_program()).args(command.get_args()).env_clear();
    older.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    older.current_dir(command.get_current_dir().unwrap());
    older
}

#[test]
fn on_an_older_kernel_root_needs_an_explicit_network_option() {
    let host = TestHost::new("t4");
    let start = |caller, options: &str| {
        run(&mut without_landlock(&host.command(caller, options, &debian(), &["echo", "started"])))
    };
    for options in ["", "--init", "-u 0"] {
        let ended = start(Caller::Root, options);
        assert_eq!((ended.code, ended.out.as_str()), (125, ""), "{options}: {ended:?}");
        assert!(ended.err.starts_with("error[GPU-0062]: "), "{options}: {ended:?}");
        assert!(ended.err.contains("fix: type --network host"), "{options}: {ended:?}");
    }
    for (caller, options) in [
        (Caller::Root, "--network host"),
        (Caller::Root, "--network none"),
        (Caller::Root, "-u 1000"),
        (Caller::User, ""),
        (Caller::User, "-u 0"),
    ] {
        let ended = start(caller, options);
        assert_eq!((ended.code, ended.out.as_str()), (0, "started\n"), "{caller:?} {options}: {ended:?}");
    }
    let ended = run(&mut without_landlock(host.gpurun().arg("doctor")));
    assert!(ended.out.contains("GPU-0062"), "{ended:?}");
    let ended = run(host.gpurun().arg("doctor"));
    assert!(ended.out.contains("landlock") && !ended.out.contains("GPU-0062"), "{ended:?}");
}

/// The separate Unix sockets do not depend on Landlock, whose scopes are newer than its file domain.
#[test]
fn without_landlock_no_descriptor_arrives_over_an_abstract_socket() {
    let host = TestHost::new("t4");
    for options in ["--network host", "--network host --security-opt seccomp=unconfined"] {
        for how in ["listen", "connect", "send", "pair"] {
            let name = unique();
            let _helper = Helper::start(if how == "pair" { "send" } else { how }, &name);
            let inside = ["python3", "-c", INSIDE, how, &name];
            let ended = run(&mut without_landlock(&host.command(Caller::Root, options, &debian(), &inside)));
            assert_eq!(ended.out, "no descriptor\n", "{options} {how}: {ended:?}");
        }
    }
}

/// Sockets with a path are not separated: programs of the same or of different containers can connect to each other.
#[test]
fn containers_meet_at_a_socket_on_a_volume() {
    let host = TestHost::new("t4");
    let volume = temporary();
    fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let options = format!("-v {}:/volume", volume.path().display());
    for caller in Caller::EACH {
        let name = unique();
        let server = format!(
            "import socket\ns = socket.socket(socket.AF_UNIX); s.bind('/volume/{name}'); s.listen(); print('ready', flush=True)\nc = s.accept()[0]; print(c.recv(9).decode())"
        );
        let mut server = host.command(caller, &options, &debian(), &["python3", "-c", &server]).spawn_piped();
        server.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        let client = format!(
            "import socket\ns = socket.socket(socket.AF_UNIX); s.connect('/volume/{name}'); s.send(b'hello')"
        );
        let ended = run(&mut host.command(caller, &options, &debian(), &["python3", "-c", &client]));
        assert_eq!(ended.code, 0, "{ended:?}");
        assert_eq!(finish(server).out, "hello\n");
    }
}

#[test]
fn net_raw_must_be_asked_for_on_the_hosts_network() {
    let host = TestHost::new("t4");
    let script = "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3).close()\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close()\nprint('raw')";
    for (options, works) in [
        ("", false),
        ("--network host", false),
        ("--network none", true),
        ("--cap-add NET_RAW", true),
        ("--cap-add ALL", true),
        ("--cap-add CAP_NET_RAW --cap-drop CHOWN", true),
    ] {
        let ended = run(&mut host.command(Caller::Root, options, &debian(), &["python3", "-c", script]));
        assert_eq!(ended.out == "raw\n", works, "{options}: {ended:?}");
    }
}

#[test]
fn a_container_that_runs_out_of_its_memory_says_so() {
    let host = TestHost::new("t4");
    let eat = "x = bytearray(400 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1";
    for options in ["-m 128m", "-m 128m --init"] {
        let ended = run(&mut host.command(Caller::Root, options, &debian(), &["python3", "-c", eat]));
        assert_eq!(ended.code, 137, "{ended:?}");
        assert!(ended.err.contains("memory limit (-m 128m)") && ended.err.contains("-m 256m"), "{ended:?}");
    }
    for (options, script) in [
        ("-m 1g", "import os\nos.kill(os.getpid(), 9)\nraise SystemExit(137)"),
        ("", "raise SystemExit(137)"),
    ] {
        let ended = run(&mut host.command(Caller::Root, options, &debian(), &["python3", "-c", script]));
        assert_eq!((ended.code, ended.err.as_str()), (137, ""), "{ended:?}");
    }
}
