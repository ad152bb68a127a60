//! Tests stacked layers with the kernel's overlayfs.

use super::*;

/// Opens an image of these layers, lowest first, and lists path, mode, owner and kind of each file in a container.
fn seen(maker: &Maker, layers: &[Vec<Raw>]) -> Vec<String> {
    let packed: Vec<_> = layers.iter().map(|entries| maker.layer(&archive(entries), Pack::Gzip)).collect();
    let (descriptors, ids): (Vec<_>, Vec<_>) = packed.into_iter().unzip();
    maker.index(&[maker.manifest(&Maker::config(&ids), &descriptors)]);
    let layout = format!("oci:{}", maker.text("layout"));
    let first = maker.open(&layout).unwrap().root(&maker.store()).unwrap();
    assert_eq!(
        maker.open(&layout).unwrap().root(&maker.store()).unwrap(),
        first,
        "a second start finds the same"
    );
    let mut lower: Vec<_> = first.iter().map(|path| path.to_str().unwrap()).collect();
    let _ = fs::create_dir(maker.path("merged"));
    // overlayfs needs two layers; an opaque root leaves one.
    let _ = fs::create_dir(maker.path("empty"));
    let below = maker.text("empty");
    if lower.len() == 1 {
        lower.push(&below);
    }
    let script = format!(
        "mount -t overlay overlay -o lowerdir={} {m} && cd {m} && find . -printf '%p %m %U %y\\n' | sort",
        lower.join(":"),
        m = maker.text("merged")
    );
    run("unshare", &["-m", "sh", "-c", &script]).lines().map(str::to_owned).collect()
}

fn with_mode(mode: u32, entry: Raw) -> Raw {
    Raw { mode, ..entry }
}

#[test]
fn a_directory_that_a_layer_does_not_name_is_the_one_below() {
    if !root() {
        return;
    }
    let maker = Maker::new();
    let lower = vec![
        with_mode(0o555, directory("./")),
        with_mode(0o1777, directory("tmp")),
        with_mode(0o700, directory("home")),
        Raw {
            pax: vec![("SCHILY.xattr.user.note", b"kept".to_vec())],
            ..with_mode(0o2750, directory("home/u"))
        },
    ];
    // The second layer also lacks entries for them, and the third has one.
    let middle = vec![file("tmp/a", ""), file("home/u/deep/er/b", "")];
    let upper =
        vec![file("tmp/c", ""), file("home/u/d", ""), with_mode(0o711, directory("home")), file("new/e", "")];
    let expected = [
        ". 555 1234 d",
        "./home 711 1234 d",
        "./home/u 2750 1234 d",
        "./home/u/d 755 1234 f",
        "./home/u/deep 755 0 d",
        "./home/u/deep/er 755 0 d",
        "./home/u/deep/er/b 755 1234 f",
        "./new 755 0 d",
        "./new/e 755 1234 f",
        "./tmp 1777 1234 d",
        "./tmp/a 755 1234 f",
        "./tmp/c 755 1234 f",
    ];
    let layers = [lower, middle.clone(), upper.clone()];
    assert_eq!(seen(&maker, &layers), expected);
    let facts = maker.open(&format!("oci:{}", maker.text("layout"))).unwrap().root(&maker.store()).unwrap();
    let mut value = [0; 8];
    assert_eq!(rustix::fs::getxattr(facts[0].join("home/u"), "user.note", &mut value[..]), Ok(4));
    assert_eq!(facts.len(), 4, "one layer of their own facts");
    // The same layers above another one get their own stack.
    let other = vec![with_mode(0o755, directory("tmp"))];
    let shown = seen(&maker, &[other, middle, upper]);
    assert!(shown.contains(&"./tmp 755 1234 d".to_owned()), "{shown:?}");
    assert!(shown.contains(&"./home/u 755 0 d".to_owned()), "{shown:?}");
    // Unneeded stacks are removed with the image.
    let store = maker.store();
    store.prune().unwrap();
    for image in store.images().unwrap() {
        store.forget(&image.name).unwrap();
    }
    store.prune().unwrap();
    for place in ["layers", "notes", "stacks", "tmp"] {
        assert_eq!(fs::read_dir(maker.path("store").join(place)).unwrap().count(), 0, "{place}");
    }
}

#[test]
fn whiteouts_leave_neither_ghosts_nor_directories_behind() {
    if !root() {
        return;
    }
    let lower =
        || vec![with_mode(0o700, directory("d")), file("d/a", ""), file("d/s/x", ""), file("keep", "")];
    let kept = "./keep 755 1234 f";
    let top = ". 755 0 d";
    let cases: [(&str, Vec<Raw>, &[&str]); 12] = [
        ("a directory removed, and below it", vec![file(".wh.d", ""), file("d/.wh.a", "")], &[kept]),
        ("in the other order", vec![file("d/.wh.a", ""), file("d/s/.wh.x", ""), file(".wh.d", "")], &[kept]),
        (
            "with its content",
            vec![file("d/.wh..wh..opq", ""), file(".wh.d", ""), file("d/s/.wh..wh..opq", "")],
            &[kept],
        ),
        (
            "removed and made again without a name",
            vec![file(".wh.d", ""), file("d/b", "")],
            &["./d 755 0 d", "./d/b 755 1234 f", kept],
        ),
        (
            "made again first",
            vec![file("d/b", ""), file(".wh.d", "")],
            &["./d 755 0 d", "./d/b 755 1234 f", kept],
        ),
        (
            "made again with a name",
            vec![file(".wh.d", ""), with_mode(0o711, directory("d")), file("d/.wh.a", "")],
            &["./d 711 1234 d", kept],
        ),
        (
            "opaque without a name",
            vec![file("d/.wh..wh..opq", ""), file("d/b", "")],
            &["./d 700 1234 d", "./d/b 755 1234 f", kept],
        ),
        (
            "opaque with whiteouts in it",
            vec![
                with_mode(0o711, directory("d")),
                file("d/.wh..wh..opq", ""),
                file("d/.wh.a", ""),
                file("d/s/.wh.x", ""),
            ],
            &["./d 711 1234 d", kept],
        ),
        (
            "a new directory with a whiteout",
            vec![directory("new"), file("new/.wh.gone", "")],
            &[
                "./d 700 1234 d",
                "./d/a 755 1234 f",
                "./d/s 755 0 d",
                "./d/s/x 755 1234 f",
                kept,
                "./new 755 1234 d",
            ],
        ),
        ("a whiteout where nothing is", vec![file("nowhere/at/.wh.all", ""), file(".wh.d", "")], &[kept]),
        ("an opaque root", vec![file(".wh..wh..opq", ""), file("b", "")], &["./b 755 1234 f"]),
        (
            "a whiteout below a file of the layer",
            vec![file("d", ""), file("d/.wh.a", "")],
            &["./d 755 1234 f", kept],
        ),
    ];
    for (what, upper, expected) in cases {
        let maker = Maker::new();
        let expected: Vec<_> = [top].iter().chain(expected).map(|&line| line.to_owned()).collect();
        assert_eq!(seen(&maker, &[lower(), upper]), expected, "{what}");
    }
    // Three layers: the middle one has the directory again, without a name.
    let maker = Maker::new();
    let shown = seen(&maker, &[lower(), vec![file(".wh.d", ""), file("d/b", "")], vec![file("d/c", "")]]);
    assert_eq!(shown, [top, "./d 755 0 d", "./d/b 755 1234 f", "./d/c 755 1234 f", kept]);
}

#[test]
fn whiteouts_below_a_link_or_a_file_leave_it_in_place() {
    if !root() {
        return;
    }
    let lower = || {
        let mut entries = vec![directory("usr"), directory("usr/lib"), file("usr/lib/a", ""), file("f", "")];
        entries.extend([
            raw(b'2', "lib", "usr/lib"),
            raw(b'2', "gone", "usr"),
            raw(b'2', "usr/deep", "/nowhere"),
        ]);
        entries
    };
    let below = [
        ". 755 0 d",
        "./f 755 1234 f",
        "./gone 777 1234 l",
        "./lib 777 1234 l",
        "./usr 755 1234 d",
        "./usr/deep 777 1234 l",
        "./usr/lib 755 1234 d",
        "./usr/lib/a 755 1234 f",
    ];
    for (what, upper, removed) in [
        ("a link", vec![file("lib/.wh.a", "")], None),
        ("deep below a link", vec![file("lib/x/y/.wh.a", "")], None),
        ("an opaque link", vec![file("lib/.wh..wh..opq", "")], None),
        ("a link in a directory", vec![file("usr/deep/.wh.a", "")], None),
        ("a file", vec![file("f/.wh.a", ""), file("f/x/.wh.b", "")], None),
        ("a link that is removed", vec![file("gone/.wh.a", ""), file(".wh.gone", "")], Some("./gone ")),
    ] {
        let maker = Maker::new();
        let shown = seen(&maker, &[lower(), upper]);
        let expected: Vec<_> =
            below.iter().filter(|line| removed.is_none_or(|gone| !line.starts_with(gone))).copied().collect();
        assert_eq!(shown, expected, "{what}");
    }
    // A layer between them removes the link, or has it again.
    let maker = Maker::new();
    let shown = seen(&maker, &[lower(), vec![file(".wh.lib", "")], vec![file("lib/.wh.a", "")]]);
    assert!(!shown.iter().any(|line| line.starts_with("./lib ")), "{shown:?}");
    let maker = Maker::new();
    let layers =
        [lower(), vec![raw(b'2', "lib", "usr")], vec![file("lib/.wh.a", "")], vec![file("lib/.wh.b", "")]];
    assert_eq!(seen(&maker, &layers), below);
}

#[test]
fn layers_of_docker_build_need_no_additional_layer() {
    let maker = Maker::new();
    let lower = vec![with_mode(0o755, directory("./")), directory("etc"), file("etc/a", "")];
    let upper = vec![directory("etc"), file("etc/.wh.a", ""), file("etc/b", "")];
    let packed: Vec<_> =
        [lower, upper].iter().map(|entries| maker.layer(&archive(entries), Pack::Gzip)).collect();
    let (descriptors, ids): (Vec<_>, Vec<_>) = packed.into_iter().unzip();
    maker.index(&[maker.manifest(&Maker::config(&ids), &descriptors)]);
    let store = maker.store();
    let paths = maker.open(&format!("oci:{}", maker.text("layout"))).unwrap().root(&store).unwrap();
    assert_eq!(paths.len(), 2, "although the upper one does not name its root");
}
