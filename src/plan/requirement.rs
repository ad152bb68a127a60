//! Whether the host is what an image requires.

use super::{Selected, cuda};
use crate::{
    error::{Code, Error, Result},
    inventory::Driver,
    request::{Comparison, Condition, Requirement},
};

/// Checks every requirement on every selected GPU, and on the driver alone where none is selected; then conditions on
/// a GPU hold.
pub(super) fn check(requirements: &[Requirement], driver: &Driver, selected: &[Selected<'_>]) -> Result<()> {
    let gpus: Vec<Option<Selected<'_>>> =
        if selected.is_empty() { vec![None] } else { selected.iter().copied().map(Some).collect() };
    for requirement in requirements {
        for gpu in &gpus {
            let met =
                requirement.alternatives.iter().any(|all| all.iter().all(|one| holds(one, driver, *gpu)));
            if !met {
                return Err(unmet(requirement, driver, *gpu));
            }
        }
    }
    Ok(())
}

fn holds(condition: &Condition, driver: &Driver, gpu: Option<Selected<'_>>) -> bool {
    match condition {
        Condition::Cuda(comparison, wanted) => comparison.holds(driver.cuda.cmp(wanted)),
        Condition::Driver(comparison, wanted) => comparison.holds(driver.version.cmp(wanted)),
        Condition::Arch(comparison, wanted) => {
            gpu.is_none_or(|gpu| comparison.holds(gpu.gpu.compute_capability.cmp(wanted)))
        }
        Condition::Brand { name, wanted } => {
            gpu.is_none_or(|gpu| gpu.gpu.brand.eq_ignore_ascii_case(name) == *wanted)
        }
    }
}

/// Speaks of the first alternative: images put what they were made for there, and the exceptions after it.
fn unmet(requirement: &Requirement, driver: &Driver, gpu: Option<Selected<'_>>) -> Error {
    let variable = &requirement.variable;
    let first = requirement.alternatives.iter().flatten().find(|one| !holds(one, driver, gpu));
    let Some(condition) = first else {
        return Error::new(Code::Unsatisfied, format!("the host does not satisfy {variable}"));
    };
    let gpu_is = |is: &dyn Fn(Selected<'_>) -> String| {
        gpu.map(|gpu| format!("GPU {gpu} {}", is(gpu))).unwrap_or_default()
    };
    let actual = match condition {
        Condition::Cuda(..) => format!("driver {} speaks CUDA {}", driver.version, driver.cuda),
        Condition::Driver(..) => format!("the driver is {}", driver.version),
        Condition::Arch(..) => {
            gpu_is(&|gpu| format!("has compute capability {}", gpu.gpu.compute_capability))
        }
        Condition::Brand { .. } => {
            gpu_is(&|gpu| format!("is of brand {}", gpu.gpu.brand.to_ascii_lowercase()))
        }
    };
    let remedy = match condition {
        Condition::Cuda(Comparison::GreaterOrEqual | Comparison::Greater | Comparison::Equal, wanted)
            if *wanted >= driver.cuda =>
        {
            cuda::remedy(wanted, &driver.cuda)
        }
        Condition::Driver(Comparison::GreaterOrEqual, wanted) => format!("install driver {wanted} or newer"),
        Condition::Cuda(..) | Condition::Driver(..) => {
            format!("install a driver for which {condition} holds")
        }
        Condition::Arch(..) | Condition::Brand { .. } => format!("ask for a GPU for which {condition} holds"),
    };
    let others = match requirement.alternatives.len() - 1 {
        0 => String::new(),
        1 => ", and its other alternative does not hold either".into(),
        others => format!(", and none of its {others} other alternatives holds either"),
    };
    Error::new(Code::Unsatisfied, format!("the image requires {condition} and {actual}"))
        .cause(format!("the image's {variable} says so{others}"))
        .fix(format!("{remedy}; NVIDIA_DISABLE_REQUIRE=1 tries it all the same"))
}
