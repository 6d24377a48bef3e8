//! What the name of a case says: `check_scheme_epN`.

use fused_moe_core::QuantScheme;

use crate::case::SCHEMES;

/// A case by its name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Named {
    /// What is checked.
    pub(crate) check: &'static str,
    /// Under which scheme.
    pub(crate) quant: QuantScheme,
    /// Over how many ranks.
    pub(crate) ep_size: usize,
}

impl Named {
    pub(crate) fn parse(name: &'static str) -> Option<Self> {
        let mut parts = name.split('_');
        let (check, scheme, ep) = (parts.next()?, parts.next()?, parts.next()?);
        let (_, quant) = SCHEMES.into_iter().find(|(known, _)| *known == scheme)?;
        Some(Self { check, quant, ep_size: ep.strip_prefix("ep")?.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_name_that_says_what_it_is() {
        let suites = [crate::comm_suite::CASES, crate::experts_suite::CASES, crate::monolithic_suite::CASES];
        for name in suites.concat() {
            assert!(Named::parse(name).is_some(), "{name}");
        }
    }
}
