//! A hundredth of the blocks and inodes of the store's filesystem stays free, whatever a layer is made of.

use gpurun_integration::{SpawnPiped, TestHost, finish, must, temporary};
use serde_json::json;
use std::{fs, io::Write, path::Path, process::Command, thread, time::Duration};

/// A filesystem in memory, mounted as long as this value lives.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(path: &'a Path, options: &str) -> Self {
        must(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", &format!("mode=0755,{options}"), "tmpfs"])
                .arg(path),
        );
        Self(path)
    }
    fn free(&self) -> (u64, u64, u64, u64) {
        let space = rustix::fs::statvfs(self.0).unwrap();
        (space.f_bavail, space.f_blocks, space.f_favail, space.f_files)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        must(Command::new("umount").arg("-l").arg(self.0));
    }
}

fn digest(path: &Path) -> String {
    format!("sha256:{}", &must(Command::new("sha256sum").arg(path))[..64])
}

/// An OCI layout of one layer, which has so many of these entries.
fn layout(directory: &Path, kind: &str, count: usize) {
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let tar = directory.join("layer.tar");
    let mut builder = tar::Builder::new(std::io::BufWriter::new(fs::File::create(&tar).unwrap()));
    let content = vec![b'x'; 40_000];
    let mut append = |name: String, flag: u8, link: &str, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(data.len() as u64);
        header.set_entry_type(tar::EntryType::new(flag));
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        builder.append_data(&mut header, name, data).unwrap();
    };
    append("first".into(), b'0', "", b"");
    for n in 0..count {
        match kind {
            "files" => append(format!("f{n}"), b'0', "", b""),
            "blocks" => append(format!("f{n}"), b'0', "", &content),
            "directories" => append(format!("f{n}"), b'5', "", b""),
            "unnamed directories" => append(format!("f{n}/g"), b'0', "", b""),
            "symbolic links" => append(format!("f{n}"), b'2', "first", b""),
            "links" => append(format!("f{n}"), b'1', "first", b""),
            _ => append(format!(".wh.f{n}"), b'0', "", b""),
        }
    }
    builder.into_inner().unwrap().flush().unwrap();
    let put = |text: String| {
        let file = directory.join("document");
        fs::write(&file, &text).unwrap();
        let digest = digest(&file);
        fs::rename(file, blobs.join(&digest[7..])).unwrap();
        (digest, text.len())
    };
    let diff_id = digest(&tar);
    let size = fs::metadata(&tar).unwrap().len();
    fs::rename(&tar, blobs.join(&diff_id[7..])).unwrap();
    let (config, length) = put(
        json!({"architecture": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }, "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [diff_id]}})
        .to_string(),
    );
    let (manifest, all) = put(
        json!({"schemaVersion": 2,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": length},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": diff_id, "size": size}]})
        .to_string(),
    );
    let index = json!({"schemaVersion": 2, "manifests": [
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": all}]});
    fs::write(directory.join("index.json"), index.to_string()).unwrap();
}

#[test]
fn a_hundredth_of_blocks_and_inodes_stays_free() {
    let host = TestHost::new("t4");
    for (kind, count, options) in [
        ("files", 20_000, "size=400m,nr_inodes=10000"),
        ("directories", 20_000, "size=400m,nr_inodes=10000"),
        ("unnamed directories", 20_000, "size=400m,nr_inodes=10000"),
        ("symbolic links", 20_000, "size=400m,nr_inodes=10000"),
        ("links", 20_000, "size=400m,nr_inodes=10000"),
        ("whiteouts", 20_000, "size=400m,nr_inodes=10000"),
        ("blocks", 3_000, "size=60m,nr_inodes=100000"),
    ] {
        let (image, store) = (temporary(), temporary());
        layout(image.path(), kind, count);
        let mounted = Mounted::new(store.path(), options);
        let mut child = host
            .gpurun()
            .args(["pull", &format!("oci:{}", image.path().display())])
            .env("GPURUN_STORE", store.path())
            .spawn_piped();
        // The least free space, because partial layers are removed at the end.
        let (mut blocks, all_blocks, mut inodes, all_inodes) = mounted.free();
        while child.try_wait().unwrap().is_none() {
            let free = mounted.free();
            (blocks, inodes) = (blocks.min(free.0), inodes.min(free.2));
            thread::sleep(Duration::from_micros(300));
        }
        let ended = finish(child);
        assert!(ended.code == 125 && ended.err.contains("GPU-0049"), "{kind}: {ended:?}");
        assert!(blocks >= all_blocks / 100, "{kind}: {blocks} of {all_blocks} blocks");
        assert!(inodes >= all_inodes / 100, "{kind}: {inodes} of {all_inodes} inodes");
        let left = fs::read_dir(store.path().join("layers")).unwrap().count();
        assert_eq!(left, 0, "{kind}");
    }
}
