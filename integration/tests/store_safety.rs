//! A store is made only in an empty directory, and gpurun deletes only its own files there.

use gpurun_integration::{Caller, Ended, TestHost, must, rootfs, run};
use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
};

fn owned(path: &Path, uid: u32) {
    must(Command::new("chown").args(["-R", &format!("{uid}:{uid}")]).arg(path));
}

fn in_store(host: &TestHost, caller: Caller, store: &Path, words: &[&str]) -> Ended {
    run(host.gpurun_of(caller).args(words).env("GPURUN_STORE", store))
}

/// Each file below a directory, with its content.
fn files(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut todo = vec![directory.to_path_buf()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            } else {
                found.push((entry.path(), fs::read_to_string(entry.path()).unwrap_or_default()));
            }
        }
    }
    found.sort();
    found
}

/// Every command refuses directories that are not a store, and leaves them unchanged.
#[test]
fn a_directory_with_foreign_files_is_refused_and_unchanged() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        for content in [
            "scratch/0123456789ab/thesis.tex",
            "scratch/data/thesis.tex",
            "layers/0123456789abcdef0123456789abcdef/thesis.tex",
            "tmp/half.lock",
            "Documents/thesis.tex",
            ".bashrc",
            // A store of a version without a marker, plus one file.
            "layers/.keep layers/mine/x blobs/.keep images/.keep tmp/.keep",
            "layers/a blobs/b images/c tmp/d",
        ] {
            let home = host.path().parent().unwrap().join(format!("home-{caller:?}"));
            let _ = fs::remove_dir_all(&home);
            for file in content.split(' ') {
                let path = home.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "years of work").unwrap();
            }
            fs::set_permissions(&home, fs::Permissions::from_mode(0o755)).unwrap();
            owned(&home, caller.uid());
            let before = files(&home);
            for words in [
                &["run", &rootfs("busybox"), "true"][..],
                &["prune"],
                &["images"],
                &["rmi", "x"],
                &["pull", "x"],
            ] {
                let ended = in_store(&host, caller, &home, words);
                assert!(
                    ended.code == 125 && ended.err.starts_with("error[GPU-0046]"),
                    "{content} {words:?}: {ended:?}"
                );
                let fix = format!("fix: GPURUN_STORE={}", home.join("gpurun").display());
                assert!(ended.err.contains(&fix), "{content} {words:?}: {ended:?}");
                assert_eq!(files(&home), before, "{content} {words:?}");
            }
            // The fix in the message works.
            let ended = in_store(&host, caller, &home.join("gpurun"), &["run", &rootfs("busybox"), "true"]);
            assert_eq!(ended.code, 0, "{ended:?}");
        }
    }
}

#[test]
fn foreign_files_in_a_store_are_kept() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let store = host.store(caller.uid());
        assert_eq!(in_store(&host, caller, &store, &["images"]).code, 0);
        let foreign = [
            "layers/mine/file",
            "layers/0123456789abcdef0123456789abcdef/file",
            "blobs/mine",
            "blobs/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            "stacks/mine",
            "images/mine",
            "parts/mine/0",
            "parts/0123456789abcdef0123456789abcdef/notes.txt",
            "scratch/mine/upper/file",
            "scratch/0123456789ab/file",
            "parts/0123456789abcdef0123456789abcdef/4096",
            "scratch/0123456789ac/upper/file",
            "tmp/mine/file",
            "tmp/0123456789abcdef0123456789abcdef/file",
            "tmp/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef/file",
            "tmp/0123456789abcdef0123456789abcdef.1",
            "tmp/0123456789abcdef0123456789abcde0.1/file",
            "tmp/0123456789abcdef0123456789abcdef.lock",
            "tmp/notes.lock",
            "notes.txt",
        ];
        for path in foreign {
            let path = store.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "years of work").unwrap();
        }
        owned(&store, caller.uid());
        for words in [
            &["prune"][..],
            &["run", &rootfs("busybox"), "sleep", "3"],
            &["run", &rootfs("busybox"), "true"],
            &["images", "--usage"],
            &["prune"],
        ] {
            let ended = in_store(&host, caller, &store, words);
            assert_eq!(ended.code, 0, "{words:?}: {ended:?}");
        }
        for path in foreign {
            assert_eq!(fs::read_to_string(store.join(path)).unwrap(), "years of work", "{path}");
        }
    }
}

/// A store of a version that wrote no marker is adopted, and its layers can still be removed.
#[test]
fn an_old_store_is_adopted() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let store = host.store(caller.uid());
        let image = format!("oci:{}:gzip", gpurun_integration::image("busybox", "oci").display());
        must(host.gpurun_of(caller).args(["pull", &image]));
        fs::remove_file(store.join("gpurun-store")).unwrap();
        for name in ["notes", "stacks"] {
            fs::remove_dir_all(store.join(name)).unwrap();
        }
        for leftover in ["scratch/0123456789ab/upper/x", "tmp/0123456789abcdef0123456789abcdef/x"] {
            fs::create_dir_all(store.join(leftover)).unwrap();
            owned(&store, caller.uid());
        }
        assert_eq!(host.ok(caller, "", &image, "echo it runs"), "it runs\n");
        let pruned = must(host.gpurun_of(caller).args(["rmi", &image]));
        assert!(pruned.starts_with("1 layers removed"), "{pruned}");
    }
}

#[test]
fn a_store_that_another_user_could_change_is_refused() {
    let host = TestHost::new("t4");
    let store = host.path().parent().unwrap().join("shared-store");
    fs::create_dir(&store).unwrap();
    fs::set_permissions(&store, fs::Permissions::from_mode(0o777)).unwrap();
    let refused = |what: &str| {
        let ended = in_store(&host, Caller::Root, &store, &["images"]);
        assert!(ended.code == 125 && ended.err.contains(what) && ended.err.contains("fix: "), "{ended:?}");
    };
    refused("can be written by others");
    fs::set_permissions(&store, fs::Permissions::from_mode(0o755)).unwrap();
    chown(&store, Some(4321), None).unwrap();
    refused("belongs to user 4321");
    chown(&store, Some(0), None).unwrap();
    fs::write(store.join("gpurun-store"), "of another version\n").unwrap();
    refused("another version");
}

/// Another user changes a link in the path of root's store while containers run.
#[test]
fn a_changed_link_in_the_path_of_a_store_does_not_redirect_removal() {
    let host = TestHost::new("t4");
    let place = host.path().parent().unwrap().join("others");
    let (real, victim, link) = (place.join("real"), place.join("victim"), place.join("link"));
    fs::create_dir_all(victim.join("store/scratch")).unwrap();
    fs::create_dir_all(&real).unwrap();
    symlink(&real, &link).unwrap();
    let store = link.join("store");
    let script = "echo ready; read line; mkdir /x; exit 0";
    let mut child = host
        .gpurun()
        .args(["run", "-i", &rootfs("busybox"), "sh", "-c", script])
        .env("GPURUN_STORE", &store)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();
    let id = fs::read_dir(real.join("store/scratch")).unwrap().next().unwrap().unwrap().file_name();
    fs::create_dir_all(victim.join("store/scratch").join(&id).join("upper")).unwrap();
    fs::write(victim.join("store/scratch").join(&id).join("upper/file"), "years of work").unwrap();
    fs::remove_file(&link).unwrap();
    symlink(&victim, &link).unwrap();
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"go\n").unwrap();
    assert!(child.wait().unwrap().success());
    assert!(victim.join("store/scratch").join(&id).join("upper/file").exists(), "the victim's file");
    assert_eq!(
        fs::read_dir(real.join("store/scratch")).unwrap().count(),
        0,
        "the container's own directory is gone"
    );
}

/// Another user exchanges two links in the path of root's store during starts. A start may fail, but mounts nothing by that path.
#[test]
fn a_changing_link_in_the_path_of_a_store_does_not_redirect_mounts() {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use std::sync::atomic::{AtomicBool, Ordering};
    let host = TestHost::new("t4");
    let place = host.path().parent().unwrap().join("others");
    let (link, other) = (place.join("link"), place.join("other"));
    fs::create_dir_all(place.join("real")).unwrap();
    fs::create_dir_all(place.join("decoy")).unwrap();
    symlink(place.join("real"), &link).unwrap();
    symlink(place.join("decoy"), &other).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                renameat_with(CWD, &link, CWD, &other, RenameFlags::EXCHANGE).unwrap();
            }
        });
        let starts: Vec<Ended> = (0..60)
            .map(|_| in_store(&host, Caller::Root, &link.join("store"), &["run", &rootfs("busybox"), "true"]))
            .collect();
        over.store(true, Ordering::Relaxed);
        assert!(starts.iter().any(|ended| ended.code == 0), "{:?}", starts[0]);
        for ended in starts.iter().filter(|ended| ended.code != 0) {
            assert!(ended.err.contains("store") && !ended.err.contains("overlay"), "{ended:?}");
        }
    });
}
