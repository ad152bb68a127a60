//! The language of `NVIDIA_REQUIRE_*`: a space is OR, a comma is AND, and a condition is `cuda>=12.4`.
//!
//! It is read whole before anything is evaluated, so an image with a condition that nobody understands is refused on
//! every host and not just on those where an alternative before it fails.

use super::{Comparison, Condition, Requirement, quoted};
use crate::{
    error::{Code, Error, Result},
    vocabulary::Version,
};

/// The requirement of one variable; `None` if it requires nothing.
pub(super) fn parse(variable: &str, value: &str) -> Result<Option<Requirement>> {
    let alternatives = value
        .split_ascii_whitespace()
        .map(|alternative| {
            let conditions = alternative.split(',').filter(|condition| !condition.is_empty());
            conditions.map(|text| condition(text, variable)).collect::<Result<Vec<_>>>()
        })
        .filter(|alternative| !matches!(alternative, Ok(conditions) if conditions.is_empty()))
        .collect::<Result<Vec<_>>>()?;
    Ok((!alternatives.is_empty()).then(|| Requirement { variable: variable.into(), alternatives }))
}

fn condition(text: &str, variable: &str) -> Result<Condition> {
    let fail = |cause: String| {
        Error::new(
            Code::BadRequirement,
            format!("{variable} holds {}, which is not a condition", quoted(text)),
        )
        .cause(cause)
        .fix(
            "write conditions as `cuda>=12.4`, `driver<560`, `arch>=8.0` or `brand=tesla`, or set \
                 NVIDIA_DISABLE_REQUIRE=1 to check none",
        )
    };
    // Conditions are quoted in messages.
    if text.len() > 100 {
        return Err(fail("it is longer than 100 bytes".into()));
    }
    let operator = text.find(['<', '>', '=', '!']).ok_or_else(|| fail("it compares nothing".into()))?;
    let (property, rest) = text.split_at(operator);
    let (comparison, value) = Comparison::ALL
        .iter()
        .find_map(|(sign, comparison)| Some((*comparison, rest.strip_prefix(sign)?)))
        .ok_or_else(|| fail("the comparisons are = != < <= > >=".into()))?;
    let version =
        || value.parse::<Version>().map_err(|_| fail(format!("{} is not a version", quoted(value))));
    match property {
        "cuda" => Ok(Condition::Cuda(comparison, version()?)),
        "driver" => Ok(Condition::Driver(comparison, version()?)),
        "arch" => Ok(Condition::Arch(comparison, version()?)),
        "brand" => match comparison {
            _ if value.is_empty() || value.contains(['<', '>', '=', '!']) => {
                Err(fail(format!("{} is not a brand", quoted(value))))
            }
            Comparison::Equal => Ok(Condition::Brand { name: value.into(), wanted: true }),
            Comparison::NotEqual => Ok(Condition::Brand { name: value.into(), wanted: false }),
            _ => Err(fail("a brand is only equal (=) or not (!=)".into())),
        },
        _ => Err(fail(format!("there is no property {}, only cuda, driver, arch, brand", quoted(property)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(value: &str) -> String {
        let alternatives =
            parse("NVIDIA_REQUIRE_CUDA", value).unwrap().map_or(Vec::new(), |r| r.alternatives);
        alternatives
            .iter()
            .map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and "))
            .collect::<Vec<_>>()
            .join(" or ")
    }

    #[test]
    fn a_space_is_or_and_a_comma_is_and() {
        assert_eq!(
            shown(
                "cuda>=12.4  brand=tesla,driver>=470,driver<471 arch!=7.0,,brand!=Tesla , driver<=1,cuda=1,cuda>1"
            ),
            "cuda>=12.4 or brand=tesla and driver>=470 and driver<471 or arch!=7.0 and brand!=Tesla or \
             driver<=1 and cuda=1 and cuda>1"
        );
        for nothing in ["", " ", ",", " , ,, "] {
            assert_eq!(parse("X", nothing).unwrap(), None, "{nothing:?}");
        }
    }

    #[test]
    fn what_is_not_a_condition_says_so() {
        for (text, cause) in [
            ("cuda", "it compares nothing"),
            ("cuda!12", "the comparisons are = != < <= > >="),
            ("cuda>=", "`` is not a version"),
            ("cuda>=12.x", "`12.x` is not a version"),
            ("cuda==12", "`=12` is not a version"),
            ("driver>=4294967296", "`4294967296` is not a version"),
            ("arch=>8", "`>8` is not a version"),
            ("brand=", "`` is not a brand"),
            ("brand==tesla", "`=tesla` is not a brand"),
            ("brand>tesla", "a brand is only equal (=) or not (!=)"),
            ("gpus>=2", "there is no property `gpus`, only cuda, driver, arch, brand"),
            (">=2", "there is no property ``, only cuda, driver, arch, brand"),
        ] {
            let error = parse("NVIDIA_REQUIRE_CUDA", &format!("cuda>=1 brand=x,{text}")).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "error[GPU-0023]: NVIDIA_REQUIRE_CUDA holds `{text}`, which is not a condition\n  cause: {cause}\n  \
                     fix: write conditions as `cuda>=12.4`, `driver<560`, `arch>=8.0` or `brand=tesla`, or set \
                     NVIDIA_DISABLE_REQUIRE=1 to check none"
                )
            );
        }
    }

    #[test]
    fn an_endless_condition_is_cut() {
        let error = parse("X", &format!("brand={}", "x".repeat(5000))).unwrap_err();
        assert_eq!(error.cause_line(), "it is longer than 100 bytes");
        assert!(error.what().len() < 130);
    }

    proptest! {
        #[test]
        fn any_text_is_a_requirement_or_a_message(text in "[a-z<>=!., 0-9]{0,40}|.{0,40}") { let _ = parse("X", &text); }
        #[test]
        fn what_is_shown_is_what_was_read(text in "((cuda|driver|arch)(=|!=|<|<=|>|>=)[0-9]{1,3}(\\.[0-9]{1,3}){0,2}[ ,]){1,6}") {
            let read = |text: &str| parse("X", text).unwrap();
            let once = read(&text).unwrap();
            let again = once.alternatives.iter()
                .map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))
                .collect::<Vec<_>>().join(" ");
            prop_assert_eq!(read(&again), Some(once));
        }
    }
}
