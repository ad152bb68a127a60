//! Maps the ids of a container without root to ids of the host.

use super::{caller::Caller, subordinate::Subordinate};
use crate::apply::container::user_namespace::IdMap;

/// The number of ids of a container, if the caller has enough subordinate ids.
const COUNT: u32 = 65_536;

/// The id map of a launcher without root. The container's user is the caller, so that volumes and devices open as usual. All
/// other ids, which package managers need, are the caller's subordinate ids.
pub fn id_map(uid: u32, gid: u32, caller: &Caller, subordinate: Option<Subordinate>) -> IdMap {
    match subordinate {
        Some(ids) => IdMap {
            uids: spread(uid, caller.uid, ids.first_uid),
            gids: spread(gid, caller.gid, ids.first_gid),
            helpers: true,
        },
        None => IdMap { uids: vec![(uid, caller.uid, 1)], gids: vec![(gid, caller.gid, 1)], helpers: false },
    }
}

/// Whether a gid of the container has a counterpart on the host.
pub fn maps_gid(map: &IdMap, gid: u32) -> bool {
    map.gids.iter().any(|&(inside, _, count)| gid >= inside && gid - inside < count)
}

/// The ranges of [`COUNT`] ids without a gap: `inside` maps to `own`, all others to subordinate ids.
fn spread(inside: u32, own: u32, subordinate: u32) -> Vec<(u32, u32, u32)> {
    let mut ranges = vec![(inside, own, 1)];
    let below = inside.min(COUNT);
    if below > 0 {
        ranges.push((0, subordinate, below.min(COUNT - 1)));
    }
    if inside < COUNT - 1 {
        ranges.push((inside + 1, subordinate + below, COUNT - 1 - inside));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_has_every_id_once_and_the_user_is_the_caller() {
        for inside in [0, 1, 1000, 65_534, 65_535, 65_536, 4_000_000_000] {
            let ranges = spread(inside, 1000, 100_000);
            assert_eq!(ranges[0], (inside, 1000, 1));
            let rest: u32 = ranges[1..].iter().map(|r| r.2).sum();
            assert_eq!(rest, 65_535, "{inside}: {ranges:?}");
            assert!(ranges[1..].iter().all(|r| inside < r.0 || inside >= r.0 + r.2), "{inside}: {ranges:?}");
            assert!(
                ranges[1..].iter().all(|r| r.1 >= 100_000 && r.1 + r.2 <= 165_535),
                "{inside}: {ranges:?}"
            );
        }
        let map = id_map(
            0,
            7,
            &Caller::new(1000, 1000, 1000),
            Some(Subordinate { first_uid: 100_000, first_gid: 200_000 }),
        );
        assert!(maps_gid(&map, 0) && maps_gid(&map, 7) && maps_gid(&map, 65_535) && !maps_gid(&map, 65_536));
    }
}
