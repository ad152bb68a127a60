//! Which /dev/nvidia-caps/nvidia-capN guards which MIG instance: /proc/driver/nvidia-caps/mig-minors (NVIDIA's MIG user
//! guide, "Device Nodes and Capabilities").

use std::collections::BTreeMap;

/// The file's content. GPUs are named by the N of /dev/nvidiaN, which is not NVML's index.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Minors {
    /// `config`: the right to make and destroy instances.
    pub config: Option<u32>,
    /// `monitor`: the right to watch all instances.
    pub monitor: Option<u32>,
    instances: BTreeMap<(u32, u32, Option<u32>), u32>,
}

impl Minors {
    /// Lines that are not understood are left out: a newer driver may add kinds.
    pub fn parse(text: &str) -> Self {
        let mut minors = Self::default();
        for line in text.lines() {
            let Some((name, Ok(minor))) =
                line.trim().rsplit_once(' ').map(|(name, minor)| (name, minor.parse()))
            else {
                continue;
            };
            let part =
                |text: &str, prefix| text.strip_prefix(prefix).and_then(|number| number.parse::<u32>().ok());
            match name.split('/').collect::<Vec<_>>()[..] {
                ["config"] => minors.config = Some(minor),
                ["monitor"] => minors.monitor = Some(minor),
                [gpu, gi, "access"] => {
                    if let (Some(gpu), Some(gi)) = (part(gpu, "gpu"), part(gi, "gi")) {
                        minors.instances.insert((gpu, gi, None), minor);
                    }
                }
                [gpu, gi, ci, "access"] => {
                    if let (Some(gpu), Some(gi), Some(ci)) =
                        (part(gpu, "gpu"), part(gi, "gi"), part(ci, "ci"))
                    {
                        minors.instances.insert((gpu, gi, Some(ci)), minor);
                    }
                }
                _ => {}
            }
        }
        minors
    }

    /// The minor that guards a GPU instance of /dev/nvidia`gpu_minor`.
    pub fn gpu_instance(&self, gpu_minor: u32, gpu_instance: u32) -> Option<u32> {
        self.instances.get(&(gpu_minor, gpu_instance, None)).copied()
    }

    /// The minor that guards a compute instance within it.
    pub fn compute_instance(&self, gpu_minor: u32, gpu_instance: u32, compute_instance: u32) -> Option<u32> {
        self.instances.get(&(gpu_minor, gpu_instance, Some(compute_instance))).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn instances_are_keyed_by_the_gpus_minor() {
        let minors = Minors::parse(
            "config 1\nmonitor 2\ngpu0/gi7/access 66\ngpu0/gi7/ci0/access 67\ngpu3/gi7/access 471\n\
             gpu0/gi7/shadow 9\ngpux/gi1/access 8\ngpu1/gi1/access many\n\nfabric-imex-mgmt 5\n",
        );
        assert_eq!((minors.config, minors.monitor), (Some(1), Some(2)));
        assert_eq!((minors.gpu_instance(0, 7), minors.compute_instance(0, 7, 0)), (Some(66), Some(67)));
        assert_eq!((minors.gpu_instance(3, 7), minors.compute_instance(3, 7, 0)), (Some(471), None));
        assert_eq!(minors.instances.len(), 3);
    }

    proptest! {
        #[test]
        fn any_text_is_understood_or_left_out(text in "((gpu|gi|ci|config|access|[0-9/ ]){0,9}\n){0,5}") {
            let _ = Minors::parse(&text);
        }
    }
}
