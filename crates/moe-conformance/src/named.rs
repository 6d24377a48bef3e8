//! What the name of a case says: `check_scheme_epN`, or `check_scheme_epNnM` over M nodes.

use fused_moe_core::QuantScheme;

use crate::case::{SCHEMES, Topology};

/// A case by its name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Named {
    /// What is checked.
    pub(crate) check: &'static str,
    /// Under which scheme.
    pub(crate) quant: QuantScheme,
    /// Over which ranks.
    pub(crate) topology: Topology,
}

impl Named {
    pub(crate) fn parse(name: &'static str) -> Option<Self> {
        let mut parts = name.split('_');
        let (check, scheme, ep) = (parts.next()?, parts.next()?, parts.next()?);
        let (_, quant) = SCHEMES.into_iter().find(|(known, _)| *known == scheme)?;
        let ep = ep.strip_prefix("ep")?;
        let (ranks, nodes) = ep.split_once('n').unwrap_or((ep, "1"));
        let topology = Topology { ranks: ranks.parse().ok()?, nodes: nodes.parse().ok()? };
        Some(Self { check, quant, topology })
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
