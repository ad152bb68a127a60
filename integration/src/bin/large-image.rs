//! Makes an image of the kind that machine learning uses, always the same one: 7 layers, 37 000 entries, 2 GB; most files are
//! small sources, most bytes lie in a few huge libraries.
//!
//! `large-image DIRECTORY` writes `oci`, a layout with the tags `gzip` and `zstd`, and `docker.tar`, what `docker save` would.

use flate2::{Compression, write::GzEncoder};
use gpurun::image::Digest;
use serde_json::{Value, json};
use std::{
    env,
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

fn main() {
    let directory = env::args_os().nth(1).expect("a directory");
    write(Path::new(&directory)).expect("the image can be written");
}

/// What is in a layer: directories below this one, each with sources and headers, and libraries and weights of these
/// sizes in bytes.
struct Content {
    top: &'static str,
    directories: usize,
    sources: usize,
    libraries: &'static [usize],
    weights: usize,
}

const MB: usize = 1_000_000;
/// As a distribution, its packages, CUDA, PyTorch, what is installed with it, an application, its configuration.
const LAYERS: [Content; 7] = [
    Content { top: "usr/share", directories: 420, sources: 3_000, libraries: &[2 * MB; 24], weights: 0 },
    Content {
        top: "usr/lib/x86_64-linux-gnu",
        directories: 650,
        sources: 5_400,
        libraries: &[3 * MB; 50],
        weights: 0,
    },
    Content {
        top: "usr/local/cuda/lib64",
        directories: 40,
        sources: 300,
        libraries: &[470 * MB, 130 * MB, 85 * MB, 40 * MB, 20 * MB, 5 * MB],
        weights: 0,
    },
    Content {
        top: "opt/venv/lib/python3.11/site-packages/torch",
        directories: 900,
        sources: 11_500,
        libraries: &[390 * MB, 140 * MB, 60 * MB, 10 * MB],
        weights: 0,
    },
    Content {
        top: "opt/venv/lib/python3.11/site-packages",
        directories: 1_100,
        sources: 12_000,
        libraries: &[4 * MB; 40],
        weights: 0,
    },
    Content {
        top: "srv/application",
        directories: 120,
        sources: 1_500,
        libraries: &[30 * MB],
        weights: 60 * MB,
    },
    Content { top: "etc/application", directories: 5, sources: 20, libraries: &[], weights: 0 },
];

fn write(directory: &Path) -> io::Result<()> {
    let blobs = directory.join("oci/blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let keep = |bytes: &[u8], kind: &str| -> io::Result<Value> {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes)?;
        Ok(json!({"mediaType": kind, "digest": digest.to_string(), "size": bytes.len()}))
    };
    let mut saved = tar::Builder::new(File::create(directory.join("docker.tar"))?);
    let (mut diff_ids, mut gzip, mut zstd) = (Vec::new(), Vec::new(), Vec::new());
    for (number, content) in LAYERS.iter().enumerate() {
        let layer = content.pack(&mut Random(number as u64 + 1))?;
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(&layer)?;
        gzip.push(keep(&encoder.finish()?, "application/vnd.oci.image.layer.v1.tar+gzip")?);
        zstd.push(keep(&zstd::encode_all(&layer[..], 3)?, "application/vnd.oci.image.layer.v1.tar+zstd")?);
        append(&mut saved, &format!("{number}/layer.tar"), &layer)?;
        diff_ids.push(Digest::of(&layer).to_string());
    }
    let config = json!({
        "architecture": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" },
        "os": "linux",
        "config": {"Cmd": ["/bin/true"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config_bytes = config.to_string().into_bytes();
    let config = keep(&config_bytes, "application/vnd.oci.image.config.v1+json")?;
    let mut manifests = Vec::new();
    for (tag, layers) in [("gzip", gzip), ("zstd", zstd)] {
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers});
        let mut descriptor = keep(manifest.to_string().as_bytes(), kind)?;
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        manifests.push(descriptor);
    }
    fs::write(directory.join("oci/oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#)?;
    fs::write(
        directory.join("oci/index.json"),
        json!({"schemaVersion": 2, "manifests": manifests}).to_string(),
    )?;
    let file = format!("{}.json", Digest::of(&config_bytes).hex());
    append(&mut saved, &file, &config_bytes)?;
    let paths: Vec<_> = (0..LAYERS.len()).map(|number| format!("{number}/layer.tar")).collect();
    let manifest = json!([{"Config": file, "RepoTags": ["large:1"], "Layers": paths}]);
    append(&mut saved, "manifest.json", manifest.to_string().as_bytes())?;
    saved.finish()
}

impl Content {
    /// Its tar stream.
    fn pack(&self, random: &mut Random) -> io::Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        let mut directories = vec![self.top.to_owned()];
        for _ in 1..self.directories {
            let parent = &directories[random.below(directories.len())];
            let parent = if parent.len() > 120 { self.top } else { parent };
            directories.push(format!("{parent}/{}", random.word()));
        }
        directories.sort();
        directories.dedup();
        for (at, directory) in directories.iter().enumerate() {
            let mut header = described(0, 0o755);
            header.set_entry_type(tar::EntryType::Directory);
            archive.append_data(&mut header, format!("{directory}/"), io::empty())?;
            // As many everywhere, one more in the first ones.
            let count = self.sources / directories.len() + usize::from(at < self.sources % directories.len());
            for file in 0..count {
                let name = format!("{directory}/{}_{file}.py", random.word());
                if random.below(40) == 0 {
                    let mut header = described(0, 0o777);
                    header.set_entry_type(tar::EntryType::Symlink);
                    archive.append_link(&mut header, name, "../elsewhere")?;
                } else {
                    // Mostly a few kB, now and then a hundred.
                    let size = 600 << random.below(6) >> random.below(3) << (random.below(30) / 29 * 4);
                    append(&mut archive, &name, &random.source(size))?;
                }
            }
        }
        for (number, &size) in self.libraries.iter().enumerate() {
            append(&mut archive, &format!("{}/lib{number}.so.1", self.top), &random.library(size))?;
        }
        if self.weights > 0 {
            let bytes: Vec<u8> = (0..self.weights).map(|_| random.next() as u8).collect();
            append(&mut archive, &format!("{}/model.safetensors", self.top), &bytes)?;
        }
        archive.into_inner()
    }
}

fn described(size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(1_700_000_000);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn append<W: Write>(archive: &mut tar::Builder<W>, name: &str, bytes: &[u8]) -> io::Result<()> {
    archive.append_data(&mut described(bytes.len() as u64, 0o644), name, bytes)
}

/// Numbers that are the same each time (Steele, Lea and Flood, SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// The lower the more often, as words of a language are.
    fn ranked(&mut self, bound: usize) -> usize {
        let bits = self.below(bound.ilog2() as usize + 1);
        self.below((2 << bits).min(bound))
    }

    fn word(&mut self) -> String {
        const SYLLABLES: [&str; 16] = [
            "ten", "sor", "mod", "el", "in", "put", "con", "fig", "re", "load", "ba", "tch", "ker", "nel",
            "op", "_x",
        ];
        (0..2 + self.below(3)).map(|_| SYLLABLES[self.below(16)]).collect()
    }

    /// A program's text of about so many bytes.
    fn source(&mut self, size: usize) -> Vec<u8> {
        let words: Vec<_> = (0..60).map(|_| self.word()).collect();
        let mut text = Vec::with_capacity(size + 80);
        while text.len() < size {
            let indent = 4 * self.below(4);
            text.resize(text.len() + indent, b' ');
            for _ in 0..2 + self.below(6) {
                text.extend_from_slice(words[self.ranked(60)].as_bytes());
                text.extend_from_slice([" = ", "(", ", ", ".", "): ", " "][self.below(6)].as_bytes());
            }
            text.push(b'\n');
        }
        text
    }

    /// Machine code of so many bytes: instructions, some far more frequent than others, with operands.
    fn library(&mut self, size: usize) -> Vec<u8> {
        let instructions: Vec<Vec<u8>> =
            (0..4096).map(|_| (0..2 + self.below(5)).map(|_| self.next() as u8).collect()).collect();
        let mut code = Vec::with_capacity(size + 512);
        while code.len() < size {
            match self.below(96) {
                // A function that is there already, in another variant.
                0..2 if code.len() > 4096 => {
                    let far = code.len().min([16 << 10, 1 << 20][self.below(2)]);
                    let start = code.len() - 300 - self.below(far - 300);
                    code.extend_from_within(start..start + 40 + self.below(240));
                }
                2 => code.resize(code.len() + 16 + self.below(100), 0),
                _ => {
                    code.extend_from_slice(&instructions[self.ranked(4096)]);
                    if self.below(4) == 0 {
                        code.push(self.next() as u8);
                    }
                }
            }
        }
        code.truncate(size);
        code
    }
}
