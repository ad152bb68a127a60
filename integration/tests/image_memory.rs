//! Hostile images are unpacked or refused within 300 MB of memory.

use gpurun_integration::{
    Caller, Ended, SpawnPiped, TestHost, finish, must, processes_with,
    registry::{Packed, PackedLayer, Registry},
    temporary, unique,
};
use serde_json::json;
use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

/// The most that one process may have in memory, in kB.
const LIMIT: u64 = 300_000;

/// Runs a command and returns the largest peak memory of its processes, in kB.
fn peak(mut command: Command) -> (Ended, u64) {
    let mark = unique();
    let mut child = command.env("MARK", &mark).stdin(Stdio::null()).spawn_piped();
    let mut most = 0;
    while child.try_wait().unwrap().is_none() {
        for process in processes_with(&mark) {
            let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kb = line.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
            most = most.max(kb);
        }
        thread::sleep(Duration::from_millis(3));
    }
    (finish(child), most)
}

/// An extended header with a record of PAX, and the header of the entry after it.
fn entry(out: &mut impl Write, name: &str, flag: u8) {
    let mut length = name.len() + 8;
    while format!("{length} path={name}\n").len() != length {
        length += 1;
    }
    let record = format!("{length} path={name}\n");
    let mut header = tar::Header::new_ustar();
    header.set_size(record.len() as u64);
    header.as_old_mut().linkflag[0] = b'x';
    header.set_mode(0o755);
    header.set_cksum();
    out.write_all(header.as_bytes()).unwrap();
    out.write_all(record.as_bytes()).unwrap();
    out.write_all(&vec![0; record.len().next_multiple_of(512) - record.len()]).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(0);
    header.set_mode(0o755);
    header.as_old_mut().linkflag[0] = flag;
    header.set_cksum();
    out.write_all(header.as_bytes()).unwrap();
}

/// A stream that is compressed and hashed as it is made.
struct Layer {
    out: zstd::Encoder<'static, Vec<u8>>,
    file: fs::File,
}

impl Layer {
    fn new(directory: &Path) -> Self {
        let out = zstd::Encoder::new(Vec::new(), 1).unwrap();
        Self { out, file: fs::File::create(directory.join("layer.tar")).unwrap() }
    }
    fn finish(self, directory: &Path) -> PackedLayer {
        let data = self.out.finish().unwrap();
        let sum = must(Command::new("sha256sum").arg(directory.join("layer.tar")));
        PackedLayer {
            kind: "application/vnd.oci.image.layer.v1.tar+zstd".into(),
            data,
            diff_id: format!("sha256:{}", &sum[..64]),
        }
    }
}

impl Write for Layer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write_all(bytes)?;
        self.out.write_all(bytes)?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn image(layers: Vec<PackedLayer>) -> Packed {
    let mut packed = Packed::of("busybox", "gzip");
    packed.layers.extend(layers);
    packed.edit(|config, layers| {
        config["rootfs"]["diff_ids"] = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
    })
}

fn pulled(packed: &Packed) -> (Ended, u64) {
    let storage = temporary();
    let registry = Registry::plain(storage.path());
    registry.push("hostile", "1", packed);
    let host = TestHost::new("t4");
    let mut command = host.gpurun_of(Caller::Root);
    command.args(["pull", &format!("{}/hostile:1", registry.address)]);
    peak(command)
}

#[test]
fn long_names_of_an_archive() {
    let dir = temporary();
    let file = dir.path().join("image.tar");
    let mut out = fs::File::create(&file).unwrap();
    for n in 0..600 {
        entry(&mut out, &format!("{n}{}", "n".repeat((1 << 20) - 100)), b'0');
    }
    out.write_all(&[0; 1024]).unwrap();
    must(Command::new("zstd").arg("-q").arg(&file));
    let host = TestHost::new("t4");
    for form in ["", ".zst"] {
        let mut command = host.gpurun();
        command.args(["pull", &format!("docker-archive:{}{form}", file.display())]);
        let (ended, most) = peak(command);
        assert!(ended.code == 125 && ended.err.contains("GPU-0042"), "{ended:?}");
        assert!(most < LIMIT, "{form}: {most} kB");
    }
}

#[test]
fn deep_directories_of_a_layer() {
    let dir = temporary();
    for (deep, ends) in [(true, true), (false, false)] {
        let mut layer = Layer::new(dir.path());
        let parent = if deep { "d/".repeat(1950) } else { String::new() };
        for n in 0..if deep { 3_000 } else { 100_000 } {
            // In two parents alternately, or each with a long unique name, so that prefix compression does not help.
            let name = if deep { format!("{parent}{n}") } else { format!("{n:0250}/{n:0250}/{n:0250}") };
            entry(&mut layer, &name, b'5');
        }
        layer.write_all(&[0; 1024]).unwrap();
        let (ended, most) = pulled(&image(vec![layer.finish(dir.path())]));
        assert_eq!(ended.code == 0, ends, "{ended:?}");
        assert!(most < LIMIT, "deep {deep}: {most} kB");
    }
}

#[test]
fn zstd_windows_of_many_layers() {
    let dir = temporary();
    let layers = (0..5_u8).map(|n| {
        let tar = dir.path().join("w.tar");
        let mut out = fs::File::create(&tar).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_path(format!("file-{n}")).unwrap();
        header.set_size(140 << 20);
        header.set_mode(0o644);
        header.set_cksum();
        out.write_all(header.as_bytes()).unwrap();
        out.write_all(&vec![n; 140 << 20]).unwrap();
        out.write_all(&[0; 1024]).unwrap();
        let _ = fs::remove_file(dir.path().join("w.tar.zst"));
        must(Command::new("zstd").args(["-q", "-1", "--long=27"]).arg(&tar));
        let sum = must(Command::new("sha256sum").arg(&tar));
        PackedLayer {
            kind: "application/vnd.oci.image.layer.v1.tar+zstd".into(),
            data: fs::read(dir.path().join("w.tar.zst")).unwrap(),
            diff_id: format!("sha256:{}", &sum[..64]),
        }
    });
    let (ended, most) = pulled(&image(layers.collect()));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(most < LIMIT, "{most} kB");
}

#[test]
fn entries_of_a_configuration() {
    for key in ["Volumes", "Labels"] {
        let value = if key == "Volumes" { json!({}) } else { json!("") };
        let map: serde_json::Map<_, _> = (0..500_000).map(|n| (format!("/{n:x}"), value.clone())).collect();
        let packed = Packed::of("busybox", "gzip").edit(|config, _| config["config"][key] = map.into());
        assert!(packed.config.len() > 5_000_000, "{}", packed.config.len());
        let (ended, most) = pulled(&packed);
        assert!(most < LIMIT, "{key}: {most} kB, {ended:?}");
    }
}

#[test]
fn padding_after_an_archive_is_not_read_for_ever() {
    let dir = temporary();
    let tar = dir.path().join("w.tar");
    fs::File::create(&tar).unwrap().set_len(1 << 30).unwrap();
    must(Command::new("gzip").args(["-1", "-k"]).arg(&tar));
    let sum = must(Command::new("sha256sum").arg(&tar));
    let layer = PackedLayer {
        kind: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
        data: fs::read(dir.path().join("w.tar.gz")).unwrap(),
        diff_id: format!("sha256:{}", &sum[..64]),
    };
    let (ended, _) = pulled(&image(vec![layer]));
    assert!(ended.code == 125 && ended.err.contains("follow the end of its archive"), "{ended:?}");
    // A compressed archive is read up to its end, and data after it is not stored.
    let host = TestHost::new("t4");
    let store = host.store(0);
    let ended = gpurun_integration::run(
        host.gpurun().args(["pull", &format!("docker-archive:{}.gz", tar.display())]),
    );
    assert!(ended.code == 125 && ended.err.contains("manifest.json"), "{ended:?}");
    drop(store);
}
