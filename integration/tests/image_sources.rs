//! Images that other programs of this machine keep: Podman's where they lie, Docker's through its socket.

use gpurun_integration::{
    Ended, SpawnPiped,
    engines::{Cgroups, Machine, Suite},
    finish, image, run,
};
use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// Whose Podman or Docker it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Root,
    User,
}

impl Whose {
    fn command(self, machine: &Machine, words: &[&str]) -> Command {
        match self {
            Self::Root => machine.command(words),
            Self::User => machine.command_as_user(words),
        }
    }

    fn run(self, machine: &Machine, words: &[&str]) -> Ended {
        run(&mut self.command(machine, words))
    }

    fn ok(self, machine: &Machine, words: &[&str]) -> String {
        let ended = self.run(machine, words);
        assert_eq!(ended.code, 0, "{self:?} {words:?}: {ended:?}");
        ended.out
    }

    /// `gpurun`, with its own store where an overlay can be stacked on it.
    fn gpurun<'a>(self, words: &[&'a str]) -> Vec<&'a str> {
        let store = match self {
            Self::Root => "GPURUN_STORE=/var/lib/containers/gpurun",
            Self::User => "GPURUN_STORE=/home/someone/gpurun",
        };
        [&["env", store, "gpurun"], words].concat()
    }

    /// Podman's images on the machine.
    fn graph(self) -> &'static str {
        match self {
            Self::Root => "/var/lib/containers/storage",
            Self::User => "/home/someone/.local/share/containers/storage",
        }
    }
}

fn machine(suite: Suite) -> Machine {
    Machine::start(suite, Cgroups::possible()[0])
}

fn fails(ended: &Ended, code: &str) {
    assert!(ended.code == 125 && ended.err.starts_with(&format!("error[{code}]: ")), "{code}: {ended:?}");
    assert_eq!(ended.err.lines().filter(|line| line.starts_with("error")).count(), 1, "{ended:?}");
}

/// What makes an image of two layers that says something of each kind of entry: owners, modes, links, and then removed files and
/// a directory that is another one now.
const EDITS: [&str; 2] = [
    "echo 'app:x:1001:1002::/srv:/bin/sh' >> /etc/passwd; mkdir -p /srv/deep /srv/gone /srv/new
     echo secret > /srv/own; chmod 600 /srv/own; chown 1001:1002 /srv/own; chown 8:12 /srv/deep; chmod 2775 /srv/deep
     ln /srv/own /srv/second; ln -s own /srv/link; mkfifo /srv/fifo; touch /srv/gone/file /srv/new/old",
    "rm /bin/cal; chmod 4755 /bin/busybox; rm -r /srv/gone /srv/new; mkdir /srv/new; echo new > /srv/new/file",
];
/// All of it, as a container sees it.
const LOOK: &str =
    "find /bin /srv -exec stat -c '%n %F %a %u %g %s %Y' {} + | sort; cat /srv/new/file /srv/own";

/// Loads an image into Podman, and makes `localhost/own:1` of it.
fn fill(machine: &Machine, whose: Whose) {
    // Not loaded: Podman 4.3 commits nothing above a layer without a history.
    let root = image("busybox", "root");
    let import = format!("tar -C {} -c . | podman import -q - base:1", root.display());
    whose.ok(machine, &["sh", "-c", &import]);
    for (from, edit) in ["base:1", "own:1"].into_iter().zip(EDITS) {
        whose.ok(machine, &["podman", "run", "--name", "editor", from, "sh", "-ec", edit]);
        whose.ok(machine, &["podman", "commit", "-q", "editor", "own:1"]);
        whose.ok(machine, &["podman", "rm", "editor"]);
    }
}

/// Every file of a directory with its inode, size and times, but for those by which it was read.
fn state(directory: &Path) -> BTreeSet<String> {
    let script = "find . -printf '%p %i %m %U %G %n %s %T@ %C@ %l\\n'";
    let ended = run(Command::new("sh").args(["-c", script]).current_dir(directory));
    assert!(ended.code == 0 && ended.out.lines().count() > 100, "{ended:?}");
    ended.out.lines().map(str::to_owned).collect()
}

#[test]
fn podmans_images_run_where_they_lie_and_look_as_podman_shows_them() {
    for suite in [Suite::Bookworm, Suite::Sid] {
        let machine = machine(suite);
        for whose in [Whose::Root, Whose::User] {
            fill(&machine, whose);
            let expected = whose.ok(&machine, &["podman", "run", "--rm", "own:1", "sh", "-c", LOOK]);
            assert!(
                expected.contains("/srv/own regular file 600 1001 1002 7") && !expected.contains("/srv/gone"),
                "{expected}"
            );
            let id = whose.ok(&machine, &["podman", "inspect", "--type=image", "-f", "{{.Id}}", "own:1"]);
            let graph = machine.path(whose.graph());
            let before = state(&graph);
            for (name, user) in [("own:1", "-u=0"), ("localhost/own:1", "-u=0")] {
                let name = format!("containers-storage:{name}");
                let seen = whose.ok(&machine, &whose.gpurun(&["run", user, &name, "sh", "-c", LOOK]));
                assert_eq!(seen, expected, "{suite:?} {whose:?} {name}");
            }
            let by_id = format!("containers-storage:{}", &id[..12]);
            let words = [
                "--gpus",
                "all",
                &by_id,
                "sh",
                "-c",
                "ls -d /dev/nvidia[0-9]* | wc -l; echo x > /srv/own; cat /srv/own; id -u",
            ];
            // Behind no sudo root is root; and who is root in Podman's store is the caller.
            assert_eq!(whose.ok(&machine, &whose.gpurun(&words)), "8\nx\n0\n", "{suite:?} {whose:?}");
            let written: Vec<_> = state(&graph).difference(&before).cloned().collect();
            assert!(written.is_empty(), "{suite:?} {whose:?}: {written:?}");
            // Podman goes on as before.
            assert_eq!(
                whose.ok(&machine, &["podman", "run", "--rm", "own:1", "cat", "/srv/own"]),
                "secret\n"
            );
            let missing = whose.run(&machine, &whose.gpurun(&["containers-storage:none", "true"]));
            fails(&missing, "GPU-0041");
            assert!(missing.err.contains("localhost/own:1"), "{missing:?}");
        }
        // A user whose ids would be others' is refused, and so is one with other ranges than Podman has.
        let user = Whose::User;
        for options in ["-u=1001", "-u=app"] {
            let ended =
                user.run(&machine, &user.gpurun(&["run", options, "containers-storage:own:1", "true"]));
            fails(&ended, "GPU-0054");
            assert!(ended.err.contains("-u 0"), "{ended:?}");
        }
        user.ok(
            &machine,
            &["sh", "-c", "printf 'FROM localhost/own:1\\nUSER 1001\\n' | podman build -q -t own:user -"],
        );
        fails(&user.run(&machine, &user.gpurun(&["containers-storage:own:user", "true"])), "GPU-0054");
        let root = Whose::Root;
        root.ok(&machine, &["sh", "-c", "echo someone:300000:65536 >> /etc/subuid"]);
        fails(&user.run(&machine, &user.gpurun(&["containers-storage:own:1", "true"])), "GPU-0054");
    }
}

#[test]
fn podmans_locks_are_waited_for_and_hold_podman_up_for_no_container() {
    let machine = machine(Suite::Sid);
    let whose = Whose::Root;
    fill(&machine, whose);
    let lock = machine.path(whose.graph()).join("overlay-layers/layers.lock");
    // As containers/storage takes it to write: all of the file (fcntl(2)).
    let script = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()";
    let mut holder = Command::new("python3")
        .args(["-c", script])
        .arg(&lock)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 7];
    holder.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    let words =
        whose.gpurun(&["containers-storage:own:1", "sh", "-c", "echo it runs; read -r line; cat /srv/own"]);
    let mut child = whose
        .command(&machine, &[&words[..3], &["run", "-i", "-u=0"], &words[3..]].concat())
        .stdin(Stdio::piped())
        .spawn_piped();
    let mut waiting = String::new();
    BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut waiting).unwrap();
    assert!(waiting.contains("waiting for another process") && waiting.contains("layers.lock"), "{waiting}");
    drop(holder.stdin.take());
    holder.wait().unwrap();
    let mut begun = [0; 8];
    child.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    // While the container runs, Podman writes its files and makes layers.
    whose.ok(&machine, &["podman", "tag", "own:1", "other:1"]);
    let archive = image("distroless", "docker.tar");
    whose.ok(&machine, &["podman", "load", "-qi", archive.to_str().unwrap()]);
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let ended = finish(child);
    assert_eq!((ended.code, ended.out.as_str()), (0, "secret\n"), "{ended:?}");
}

#[test]
fn a_store_of_podmans_that_cannot_be_trusted_or_read_is_refused() {
    let machine = machine(Suite::Sid);
    let (root, user) = (Whose::Root, Whose::User);
    fill(&machine, root);
    let graph = machine.path(root.graph());
    let refused = |script: &str, word: &str, back: &str| {
        machine.sh(&format!("cd {} && {script}", root.graph()));
        let ended = root.run(&machine, &root.gpurun(&["containers-storage:own:1", "true"]));
        fails(&ended, "GPU-0046");
        assert!(ended.err.contains(word), "{script}: {ended:?}");
        machine.sh(&format!("cd {} && {back}", root.graph()));
        root.ok(&machine, &root.gpurun(&["containers-storage:own:1", "true"]));
    };
    refused("chmod 777 overlay-layers", "chmod go-w", "chmod 700 overlay-layers");
    refused("chown 1000 overlay", "belongs to user 1000", "chown 0 overlay");
    let top = machine.sh("podman inspect --type=image -f '{{.RootFS.Layers}}' own:1 | tr -d '[]' | wc -w");
    assert_eq!(top.trim(), "3");
    let layers: serde_json::Value =
        serde_json::from_slice(&fs::read(graph.join("overlay-layers/layers.json")).unwrap()).unwrap();
    let layer = layers.as_array().unwrap().iter().find(|layer| layer["parent"].is_string()).unwrap();
    let diff = format!("overlay/{}/diff", layer["id"].as_str().unwrap());
    refused(
        &format!("mv {diff} {diff}.away && ln -s /srv {diff}"),
        "cannot be opened",
        &format!("rm {diff} && mv {diff}.away {diff}"),
    );
    let edit = |from: &str, to: &str| format!("sed -i 's|{from}|{to}|' overlay-layers/layers.json");
    let id = layer["id"].as_str().unwrap();
    let parent = layer["parent"].as_str().unwrap();
    let field = |value: &str| format!("\"parent\":\"{value}\"");
    refused(&edit(&field(parent), &field(id)), "its own parent", &edit(&field(id), &field(parent)));
    refused(
        &edit(&field(parent), &field("../../../etc")),
        "is not there",
        &edit(&field("../../../etc"), &field(parent)),
    );
    let incomplete = format!("{},\"flags\":{{\"incomplete\":true}}", field(parent));
    refused(&edit(&field(parent), &incomplete), "not finished", &edit(&incomplete, &field(parent)));
    // Another user's store is closed; one that storage.conf leads to is somebody else's.
    machine.sh("chmod 755 /var/lib/containers /var/lib/containers/storage");
    user.ok(&machine, &["sh", "-c", "mkdir -p ~/.config/containers && printf '[storage]\\ndriver = \"overlay\"\\ngraphroot = \"/var/lib/containers/storage\"\\n' > ~/.config/containers/storage.conf"]);
    let ended = user.run(&machine, &user.gpurun(&["containers-storage:own:1", "true"]));
    fails(&ended, "GPU-0046");
    assert!(ended.err.contains("belongs to user 0, not to 1000"), "{ended:?}");
    user.ok(
        &machine,
        &["sh", "-c", "printf '[storage]\\ndriver = \"vfs\"\\n' > ~/.config/containers/storage.conf"],
    );
    fails(&user.run(&machine, &user.gpurun(&["containers-storage:own:1", "true"])), "GPU-0046");
    user.ok(&machine, &["rm", "-r", "/home/someone/.config/containers"]);
    fails(&user.run(&machine, &user.gpurun(&["containers-storage:own:1", "true"])), "GPU-0041");
    // Where root puts it with storage.conf(5), it is found; and so is what it adds.
    machine.sh("mkdir -p /etc/containers /var/lib/containers/elsewhere && printf '[storage]\\ndriver = \"overlay\"\\ngraphroot = \"/var/lib/containers/elsewhere\"\\nrunroot = \"/run/elsewhere\"\\n[storage.options]\\nadditionalimagestores = [\"/var/lib/containers/storage\"]\\n' > /etc/containers/storage.conf");
    assert_eq!(
        root.ok(&machine, &root.gpurun(&["run", "-u=0", "containers-storage:own:1", "cat", "/srv/own"])),
        "secret\n"
    );
}

/// Passes on to Docker's socket, and ends the answer to a `get` after so many bytes; what was asked for.
fn before_docker(socket: &Path, to: PathBuf, cut: &Arc<AtomicUsize>) -> Arc<Mutex<Vec<String>>> {
    let listener = UnixListener::bind(socket).unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (log, cut) = (Arc::clone(&asked), Arc::clone(cut));
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut request = vec![0; 4096];
            let length = client.read(&mut request).unwrap();
            let line =
                String::from_utf8_lossy(&request[..length]).lines().next().unwrap_or_default().to_owned();
            let mut server = UnixStream::connect(&to).unwrap();
            server.write_all(&request[..length]).unwrap();
            let limit = if line.contains("/get ") { cut.load(Ordering::Relaxed) } else { usize::MAX };
            log.lock().unwrap().push(line);
            let _ = std::io::copy(&mut server.take(limit as u64), &mut client);
        }
    });
    asked
}

#[test]
fn dockers_images_come_through_its_socket_and_again_when_they_are_others() {
    for suite in [Suite::Bookworm, Suite::Sid] {
        let machine = machine(suite);
        machine.start_docker();
        let load = |name: &str| {
            let archive = image(name, "docker.tar");
            machine.sh(&format!("docker load -qi {}", archive.display()));
        };
        load("busybox");
        load("cuda");
        let socket = machine.shared().join("docker.sock");
        let cut = Arc::new(AtomicUsize::new(300_000));
        let asked = before_docker(&socket, machine.path("/run/docker.sock"), &cut);
        let host = format!("DOCKER_HOST=unix://{}", socket.display());
        let saved = || asked.lock().unwrap().iter().filter(|line| line.contains("/get ")).count();
        let gpurun = |words: &[&str]| {
            let words = Whose::Root.gpurun(words);
            Whose::Root.run(&machine, &[&words[..1], &[&host], &words[1..]].concat())
        };
        let ok = |words: &[&str]| {
            let ended = gpurun(words);
            assert_eq!(ended.code, 0, "{suite:?} {words:?}: {ended:?}");
            ended.out
        };
        // A stream that is cut is one error, and the store stays as it was.
        let ended = gpurun(&["docker-daemon:busybox", "true"]);
        assert!(ended.code == 125 && ended.err.starts_with("error[GPU-004"), "{ended:?}");
        assert_eq!(ok(&["images", "--verify"]), "");
        cut.store(usize::MAX, Ordering::Relaxed);
        let before = saved();
        for name in ["busybox", "docker.io/library/busybox:latest"] {
            assert_eq!(ok(&[&format!("docker-daemon:{name}"), "echo", "it runs"]), "it runs\n");
        }
        assert_eq!(saved(), before + 1, "the second start does not have it saved again");
        assert!(ok(&["--gpus", "all", "docker-daemon:cuda", "nvidia-smi", "-L"]).lines().count() == 8);
        let id = machine.sh("docker image inspect -f '{{.Id}}' busybox");
        assert_eq!(ok(&[&format!("docker-daemon:{}", id.trim()), "echo", "by id"]), "by id\n");
        // Built anew under the same name it is another image.
        machine.sh("docker run --name editor --network none busybox sh -c 'rm /bin/cal; echo new > /new' && docker commit editor busybox && docker rm editor");
        assert_eq!(
            ok(&[
                "docker-daemon:busybox",
                "sh",
                "-c",
                "cat /new; ls /bin/cal 2>&1 | wc -l; ls /bin | grep -c '^cal$' || true"
            ]),
            "new\n1\n0\n"
        );
        assert!(ok(&["images", "--verify"]).lines().all(|line| line.ends_with(": good")));
        assert!(ok(&["rmi", "docker-daemon:busybox"]).contains("removed"));
        assert_eq!(ok(&["docker-daemon:busybox", "cat", "/new"]), "new\n");
        let ended = gpurun(&["docker-daemon:none:1", "true"]);
        fails(&ended, "GPU-0041");
        assert!(ended.err.contains("docker images"), "{ended:?}");
        for (host, word) in
            [("tcp://127.0.0.1:2375", "unix://PATH"), ("unix:///nowhere", "systemctl start docker")]
        {
            let words = Whose::Root.gpurun(&["docker-daemon:busybox", "true"]);
            let host = format!("DOCKER_HOST={host}");
            let ended = Whose::Root.run(&machine, &[&words[..1], &[&host], &words[1..]].concat());
            fails(&ended, "GPU-0047");
            assert!(ended.err.contains(word), "{ended:?}");
        }
        // Whoever may not speak to Docker is told so; the socket is where it always is where nobody says otherwise.
        let user = ["env", "-u", "DOCKER_HOST", "gpurun", "docker-daemon:busybox", "true"];
        let ended = Whose::User.run(&machine, &user);
        fails(&ended, "GPU-0047");
        assert!(ended.err.contains("group docker"), "{ended:?}");
        assert_eq!(
            Whose::Root.ok(&machine, &Whose::Root.gpurun(&["docker-daemon:busybox", "cat", "/new"])),
            "new\n"
        );
    }
}

#[test]
fn a_users_own_docker_is_asked_too() {
    let machine = machine(Suite::Sid);
    machine.start_rootless_docker();
    let archive = image("busybox", "docker.tar");
    let user = Whose::User;
    user.ok(&machine, &["docker", "load", "-qi", archive.to_str().unwrap()]);
    assert_eq!(user.ok(&machine, &user.gpurun(&["docker-daemon:busybox", "echo", "it runs"])), "it runs\n");
}
