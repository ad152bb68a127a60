//! A bad network and a hard hand, for an ordinary user's store as for root's: each pull ends in the image or in one error, and
//! the store is whole at every moment.

use gpurun_integration::{
    Caller, Ended, SpawnPiped, TestHost, USER, dist, finish, must, processes_with,
    registry::{Fault, Packed, Proxy, Registry},
    run, temporary, unique, until,
};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

fn layers() -> Packed {
    Packed::of("busybox", "gzip")
        .with_layer("a", 3 << 20, "tar")
        .with_layer("b", 2 << 20, "tar+gzip")
        .with_layer("c", 2 << 20, "tar+zstd")
}

const WHOLE: &str = "cat /a /b /c | wc -c";

/// Each image in the store is good, but for layers that did not come yet, and nobody else's files are in it.
fn intact(mut verify: Command, store: &Path, uid: u32, complete: bool) {
    let ended = run(verify.args(["images", "--verify"]));
    let missing = |line: &str| {
        line.split(": ").skip(1).all(|word| word.ends_with("is not there") || word.contains("sha256"))
    };
    assert!(
        ended.code == 0
            || !complete && ended.out.lines().all(|line| line.ends_with(": good") || missing(line)),
        "{ended:?}"
    );
    let layers = fs::read_dir(store.join("layers")).unwrap().flatten();
    for layer in layers {
        assert_eq!(layer.metadata().unwrap().uid(), uid, "{layer:?}");
    }
    if complete {
        let left: Vec<_> =
            fs::read_dir(store.join("tmp")).unwrap().flatten().map(|one| one.file_name()).collect();
        assert!(left.iter().all(|name| name.to_string_lossy().ends_with(".lock")), "{left:?}");
    }
}

fn fails(ended: &Ended, code: &str) {
    assert!(ended.code == 125 && ended.err.starts_with(&format!("error[{code}]: ")), "{code}: {ended:?}");
    assert_eq!(ended.err.lines().filter(|line| line.starts_with("error")).count(), 1, "{ended:?}");
}

#[test]
fn a_users_pull_on_a_bad_network_ends_in_the_image_or_in_one_error() {
    let storage = temporary();
    let registry = Registry::plain(storage.path());
    let packed = layers();
    registry.push("ml", "1", &packed);
    let busy = |seconds: u32| Fault::Answer(429, format!("Retry-After: {seconds}\r\n"), String::new());
    // What happens to the largest blob, how often, and how it ends.
    for (fault, count, end) in [
        (Fault::Cut(1 << 20), 2, ""),
        (Fault::Cut(700_000), 99, ""),
        (Fault::Cut(10), 99, "GPU-0047"),
        (Fault::Drop, 2, ""),
        (Fault::Drop, 99, "GPU-0047"),
        (busy(1), 2, ""),
        (busy(3600), 1, "GPU-0047"),
        (Fault::Answer(500, String::new(), String::new()), 2, ""),
        (Fault::Answer(404, String::new(), String::new()), 99, "GPU-0042"),
        (Fault::Answer(200, String::new(), "something else".into()), 99, "GPU-0042"),
        (Fault::Garble, 99, "GPU-0043"),
    ] {
        let host = TestHost::new("t4");
        let (what, blob) = (fault.clone(), packed.blob(1));
        let left = Arc::new(AtomicUsize::new(count));
        let times = Arc::clone(&left);
        let proxy = Proxy::before(&registry, move |request| {
            let hit = request.path.ends_with(&blob)
                && times.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok();
            if hit { fault.clone() } else { Fault::Pass }
        });
        let image = format!("{}/ml:1", proxy.address);
        let pull = || run(host.gpurun_as_user().args(["pull", &image]));
        let ended = pull();
        if end.is_empty() {
            assert_eq!(ended.code, 0, "{what:?}: {ended:?}");
        } else {
            fails(&ended, end);
            intact(host.gpurun_as_user(), &host.store(USER), USER, false);
            left.store(0, Ordering::Relaxed);
            assert_eq!(pull().code, 0, "{what:?}");
        }
        intact(host.gpurun_as_user(), &host.store(USER), USER, true);
        assert_eq!(host.ok(Caller::User, "", &image, WHOLE).trim(), (7 << 20).to_string(), "{what:?}");
    }
}

#[test]
fn after_every_kill_the_store_is_good_and_the_next_pull_succeeds() {
    let storage = temporary();
    let registry = Registry::plain(storage.path());
    registry.push("ml", "1", &layers());
    let proxy = Proxy::before(&registry, |_| Fault::Slow(256 << 10));
    let image = format!("{}/ml:1", proxy.address);
    for caller in Caller::EACH {
        let host = TestHost::new("t4");
        let store = host.store(caller.uid());
        for moment in 0..24 {
            let mark = unique();
            let mut child = host
                .gpurun_of(caller)
                .args(["pull", &image])
                .env("MARK", &mark)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            thread::sleep(Duration::from_millis(9 * moment));
            // By turns the one that was started, and the one that fetches.
            let victims = processes_with(&mark);
            let victim = if moment % 2 == 0 { Some(&child.id()) } else { victims.iter().max() };
            if let Some(victim) = victim {
                run(Command::new("kill").args(["-KILL", &victim.to_string()]));
            }
            child.wait().unwrap();
            until("the end of gpurun-pull", || processes_with(&mark).is_empty());
            intact(host.gpurun_of(caller), &store, caller.uid(), false);
            if moment % 8 == 7 {
                must(host.gpurun_of(caller).args(["pull", &image]));
                intact(host.gpurun_of(caller), &store, caller.uid(), true);
                must(host.gpurun_of(caller).args(["rmi", &image]));
            }
        }
        assert_eq!(host.ok(caller, "", &image, WHOLE).trim(), (7 << 20).to_string());
        intact(host.gpurun_of(caller), &store, caller.uid(), true);
    }
}

#[test]
fn two_users_and_root_fetch_the_same_image_at_once_each_into_a_store_of_his_own() {
    let storage = temporary();
    let registry = Registry::plain(storage.path());
    let packed = layers();
    registry.push("ml", "1", &packed);
    let proxy = Proxy::before(&registry, |request| {
        if request.before == 3 { Fault::Cut(100_000) } else { Fault::Slow(256 << 10) }
    });
    let image = format!("{}/ml:1", proxy.address);
    let host = TestHost::new("t4");
    let gpurun = |uid: u32| {
        let id = uid.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]).arg(dist("gpurun"));
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", host.store(uid))
            .env("GPURUN_SIMULATED_HOST", host.path())
            .env("GPURUN_STATE_DIR", host.state_dir(uid))
            .env("GPURUN_STORE", host.store(uid));
        command
    };
    let users = [0, USER, USER + 1];
    let children: Vec<_> = users
        .iter()
        .cycle()
        .take(9)
        .map(|&uid| gpurun(uid).args(["run", &image, "sh", "-c", WHOLE]).spawn_piped())
        .collect();
    for child in children {
        let ended = finish(child);
        assert_eq!((ended.code, ended.out.trim()), (0, (7 << 20).to_string().as_str()), "{ended:?}");
    }
    for uid in users {
        intact(gpurun(uid), &host.store(uid), uid, true);
        // What one has the others can neither read nor take for theirs.
        for other in users.into_iter().filter(|other| *other != uid) {
            let ended = run(gpurun(uid)
                .env("GPURUN_STORE", host.store(other))
                .args(["run", "--pull", "never", &image, "true"]));
            fails(&ended, "GPU-0046");
        }
    }
}
