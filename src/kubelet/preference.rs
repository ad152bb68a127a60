//! Which devices go well together: those that the kubelet should take where it may choose. It is asked before each start of a
//! container, and need not listen.

use crate::resources::{Device, Resource};
use clap::ValueEnum;
use gpurun::inventory::{Gpu, Inventory};
use std::collections::BTreeMap;

/// Which replicas of shared devices are taken first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum SharedPolicy {
    /// Those of the device of which the fewest are taken.
    #[default]
    Distributed,
    /// Those of the device of which the most are taken.
    Packed,
}

/// More sets than this are not looked at one by one: eight of sixteen GPUs are 12,870.
const MOST_SETS: usize = 20_000;

/// So many of the available ids, with those that must be among them; fewer where there are not as many.
pub fn preferred(
    inventory: &Inventory,
    resource: &Resource,
    policy: SharedPolicy,
    available: &[String],
    must_include: &[String],
    size: usize,
) -> Vec<String> {
    let mut chosen: Vec<String> = must_include.iter().take(size).cloned().collect();
    let mut others: Vec<&String> = available.iter().filter(|id| !chosen.contains(id)).collect();
    others.sort_unstable();
    let missing = (size - chosen.len()).min(others.len());
    let of_gpus = |ids: &[&String]| {
        ids.iter().map(|id| inventory.gpus.iter().find(|gpu| gpu.uuid == **id)).collect::<Option<Vec<&Gpu>>>()
    };
    let fixed: Vec<&String> = chosen.iter().collect();
    if let (None, Some(fixed), Some(free)) = (resource.shared, of_gpus(&fixed), of_gpus(&others)) {
        chosen.extend(nearest(&fixed, &free, missing).into_iter().map(|gpu| gpu.uuid.clone()));
    } else {
        chosen.extend(spread(resource, policy, &others, missing));
    }
    chosen
}

/// The GPUs that are nearest to each other and to the fixed ones; among equals, those that leave the nearest behind.
fn nearest<'a>(fixed: &[&Gpu], free: &[&'a Gpu], missing: usize) -> Vec<&'a Gpu> {
    let all: Vec<&Gpu> = fixed.iter().chain(free).copied().collect();
    let near: Vec<Vec<u32>> =
        all.iter().map(|one| all.iter().map(|other| nearness(one, other)).collect()).collect();
    let sum = |set: &[usize]| -> u32 {
        let pairs =
            set.iter().enumerate().flat_map(|(at, one)| set[at + 1..].iter().map(move |other| (one, other)));
        pairs.map(|(one, other)| near[*one][*other]).sum()
    };
    let with_fixed = |set: &[usize]| -> Vec<usize> {
        (0..fixed.len()).chain(set.iter().map(|place| place + fixed.len())).collect()
    };
    let taken = if sets(free.len(), missing) <= MOST_SETS {
        let mut best: Option<((u32, u32), Vec<usize>)> = None;
        combinations(free.len(), missing, &mut |set| {
            let rest: Vec<usize> = (0..free.len())
                .filter(|place| !set.contains(place))
                .map(|place| place + fixed.len())
                .collect();
            let score = (sum(&with_fixed(set)), sum(&rest));
            if best.as_ref().is_none_or(|(other, _)| score > *other) {
                best = Some((score, set.to_vec()));
            }
        });
        best.map(|(_, set)| set).unwrap_or_default()
    } else {
        let mut set: Vec<usize> = Vec::new();
        while set.len() < missing {
            let candidates = (0..free.len()).filter(|place| !set.contains(place));
            let Some(next) =
                candidates.rev().max_by_key(|place| sum(&with_fixed(&[set.as_slice(), &[*place]].concat())))
            else {
                break;
            };
            set.push(next);
        }
        set
    };
    taken.into_iter().map(|place| free[place]).collect()
}

/// How well two GPUs speak to each other. An NVLink is worth more than any way over PCIe, and two are worth more than one.
fn nearness(one: &Gpu, other: &Gpu) -> u32 {
    let links = one.nvlinks.get(&other.pci).copied().unwrap_or(0);
    // Where NVML does not tell, the kernel may.
    let same_node = one.numa_node.is_some() && one.numa_node == other.numa_node;
    let by_kernel = if same_node { "same-numa-node" } else { "cross-numa-node" };
    let pcie = match one.topology.get(&other.uuid).map_or(by_kernel, String::as_str) {
        "same-board" => 60,
        "single-bridge" => 50,
        "multiple-bridges" => 40,
        "same-host-bridge" => 30,
        "same-numa-node" => 20,
        _ => 10,
    };
    links * 100 + pcie
}

/// How many sets of `size` there are.
fn sets(of: usize, size: usize) -> usize {
    (0..size.min(of)).fold(1, |sets: usize, n| sets.saturating_mul(of - n) / (n + 1))
}

/// Every set of `size` numbers below `of`, in ascending order.
fn combinations(of: usize, size: usize, each: &mut impl FnMut(&[usize])) {
    let mut set: Vec<usize> = (0..size).collect();
    if size > of {
        return;
    }
    loop {
        each(&set);
        let Some(at) = (0..size).rev().find(|&at| set[at] < of - size + at) else { return };
        set[at] += 1;
        for next in at + 1..size {
            set[next] = set[next - 1] + 1;
        }
    }
}

/// Replicas, and MIG devices, which have no way to each other: taken one by one from the device that the policy names.
fn spread(resource: &Resource, policy: SharedPolicy, free: &[&String], missing: usize) -> Vec<String> {
    let device = |id: &str| resource.device(id).ok().map(|device: &Device| device.uuid.clone());
    let total = usize::try_from(resource.replicas()).unwrap_or(usize::MAX);
    let mut left: BTreeMap<String, Vec<&String>> = BTreeMap::new();
    for id in free.iter().rev() {
        if let Some(uuid) = device(id) {
            left.entry(uuid).or_default().push(id);
        }
    }
    let mut chosen = Vec::new();
    while chosen.len() < missing {
        let with_some = left.iter_mut().filter(|(_, ids)| !ids.is_empty());
        let taken = |ids: &Vec<&String>| total.saturating_sub(ids.len());
        let next = match policy {
            SharedPolicy::Distributed => with_some.min_by_key(|(_, ids)| taken(ids)),
            // The first of equals, as above.
            SharedPolicy::Packed => with_some.min_by_key(|(_, ids)| usize::MAX - taken(ids)),
        };
        let Some(id) = next.and_then(|(_, ids)| ids.pop()) else { break };
        chosen.push(id.clone());
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::file::tests::time_slicing,
        resources::{MigStrategy, Sharing, resources, tests::inventory},
    };

    fn ids(numbers: &[usize]) -> Vec<String> {
        numbers.iter().map(|number| format!("GPU-{number}")).collect()
    }

    fn chosen(inventory: &Inventory, available: &[usize], must: &[usize], size: usize) -> Vec<String> {
        let resources = resources(inventory, MigStrategy::None, &Sharing::default()).unwrap();
        let mut chosen =
            preferred(inventory, &resources[0], SharedPolicy::Distributed, &ids(available), &ids(must), size);
        chosen.sort_unstable();
        chosen
    }

    /// Eight GPUs, four behind each CPU; neighbours are pairs with two NVLinks.
    fn pairs() -> Inventory {
        let mut inventory = inventory(&[&[] as &[&str]; 8]);
        for number in 0..8 {
            let other = inventory.gpus[number ^ 1].pci.clone();
            inventory.gpus[number].nvlinks.insert(other, 2);
        }
        inventory
    }

    #[test]
    fn gpus_with_links_go_together_and_then_those_of_one_numa_node() {
        let host = pairs();
        assert_eq!(chosen(&host, &[0, 1, 2, 3, 4, 5, 6, 7], &[], 2), ids(&[0, 1]));
        assert_eq!(chosen(&host, &[1, 2, 5, 6, 7], &[], 2), ids(&[6, 7]));
        assert_eq!(chosen(&host, &[0, 1, 3, 4, 5, 6, 7], &[], 4), ids(&[4, 5, 6, 7]));
        assert_eq!(chosen(&host, &[1, 2, 5, 6], &[], 2), ids(&[1, 2]), "no links: the node counts");
        assert_eq!(chosen(&host, &[0, 1, 2, 3, 4, 5], &[5], 2), ids(&[4, 5]));
    }

    #[test]
    fn one_gpu_is_taken_where_it_breaks_no_pair() {
        assert_eq!(chosen(&pairs(), &[0, 1, 2, 3, 5, 6, 7], &[], 1), ids(&[5]));
    }

    #[test]
    fn never_more_than_there_are_and_never_less_than_must_be() {
        let host = pairs();
        assert_eq!(chosen(&host, &[0, 3], &[], 5), ids(&[0, 3]));
        assert_eq!(chosen(&host, &[0, 3], &[0, 3], 1).len(), 1);
        assert_eq!(chosen(&host, &[], &[], 1), ids(&[]));
        assert_eq!(chosen(&host, &[0, 1], &[], 0), ids(&[]));
    }

    #[test]
    fn more_gpus_than_can_be_looked_at_one_by_one_are_taken_by_steps() {
        let mut host = inventory(&[&[] as &[&str]; 32]);
        for number in 0..32 {
            let other = host.gpus[number ^ 1].pci.clone();
            host.gpus[number].nvlinks.insert(other, 2);
        }
        let all: Vec<usize> = (0..32).collect();
        let chosen = chosen(&host, &all, &[], 16);
        assert_eq!(chosen.len(), 16);
        for id in &chosen {
            let number: usize = id[4..].parse().unwrap();
            assert!(chosen.contains(&format!("GPU-{}", number ^ 1)), "{id} without its pair: {chosen:?}");
        }
    }

    #[test]
    fn every_set_is_looked_at_once() {
        for (of, size) in [(5, 2), (4, 4), (3, 0), (2, 3)] {
            let mut seen = Vec::new();
            combinations(of, size, &mut |set| seen.push(set.to_vec()));
            let distinct: std::collections::BTreeSet<_> = seen.iter().collect();
            assert_eq!(
                (seen.len(), distinct.len()),
                (if size > of { 0 } else { sets(of, size) }, seen.len())
            );
        }
    }

    #[test]
    fn replicas_are_distributed_or_packed() {
        let host = inventory(&[&[], &[]]);
        let sharing = time_slicing("{resources: [{name: gpu, replicas: 3}]}");
        let shared = &resources(&host, MigStrategy::None, &sharing).unwrap()[0];
        // One of the first GPU is taken.
        let available: Vec<String> =
            ["GPU-0::1", "GPU-0::2", "GPU-1::0", "GPU-1::1", "GPU-1::2"].map(String::from).into();
        let chosen = |policy| preferred(&host, shared, policy, &available, &[], 3);
        assert_eq!(chosen(SharedPolicy::Distributed), ["GPU-1::0", "GPU-0::1", "GPU-1::1"]);
        assert_eq!(chosen(SharedPolicy::Packed), ["GPU-0::1", "GPU-0::2", "GPU-1::0"]);
    }
}
