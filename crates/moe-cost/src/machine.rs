//! Machines as files: links, and constants by protocol.

use std::collections::BTreeMap;

use fused_moe_core::{PerLink, Protocol};
use serde::Deserialize;

use crate::model::{CostError, CostModel, Half};

/// The files of this crate, by name.
const BUILT_IN: [(&str, &str); 7] = [
    ("mi300x", include_str!("../machines/mi300x.toml")),
    ("mi355x", include_str!("../machines/mi355x.toml")),
    ("h100", include_str!("../machines/h100.toml")),
    ("h200", include_str!("../machines/h200.toml")),
    ("h200-efa", include_str!("../machines/h200-efa.toml")),
    ("h800", include_str!("../machines/h800.toml")),
    ("b200", include_str!("../machines/b200.toml")),
];

/// A machine: what its links can do, and what protocols make of them.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// As it is printed.
    pub name: String,
    /// Architecture of its GPUs as their compiler names it.
    pub arch: String,
    /// GPUs that share a node.
    pub gpus_per_node: usize,
    /// GB/s that leave a GPU over the links inside the node, one direction, by data sheet.
    pub scale_up_peak: f64,
    /// GB/s that leave a GPU over the network, one direction, by data sheet.
    pub network_peak: f64,
    #[serde(rename = "protocol")]
    protocols: BTreeMap<String, Constants>,
}

/// Constants of a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Constants {
    #[serde(default)]
    hops: Hops,
    dispatch: HalfConstants,
    combine: HalfConstants,
}

/// Whether a token's bytes cross the links at the same time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Hops {
    #[default]
    AtOnce,
    InSequence,
}

/// `alpha_us` before the first byte, then GB/s over each link.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct HalfConstants {
    alpha_us: f64,
    scale_up: f64,
    network: Option<f64>,
}

/// Why there is no such machine.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// No machine of that name is built in.
    #[error("unknown machine {name:?}; known: {}", Machine::names().join(", "))]
    Unknown {
        /// The name that was asked for.
        name: String,
    },
    /// The text is not a machine.
    #[error("not a machine: {0}")]
    Parse(String),
    /// A number that no machine has.
    #[error("{what} is {value}, must be finite and above 0")]
    Value {
        /// Which.
        what: String,
        /// The number.
        value: f64,
    },
}

impl Machine {
    /// Names of the machines of this crate.
    pub fn names() -> Vec<&'static str> {
        BUILT_IN.iter().map(|(name, _)| *name).collect()
    }

    /// A machine of this crate.
    ///
    /// # Errors
    /// [`MachineError::Unknown`].
    pub fn named(name: &str) -> Result<Self, MachineError> {
        match BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            Some((_, text)) => Self::from_toml(text),
            None => Err(MachineError::Unknown { name: name.to_string() }),
        }
    }

    /// The machine that a file in the form of `machines/*.toml` describes.
    ///
    /// # Errors
    /// [`MachineError::Parse`] and [`MachineError::Value`].
    pub fn from_toml(text: &str) -> Result<Self, MachineError> {
        let machine: Self = toml::from_str(text).map_err(|error| MachineError::Parse(error.to_string()))?;
        let mut numbers = vec![
            ("gpus_per_node".to_string(), machine.gpus_per_node as f64),
            ("scale_up_peak".to_string(), machine.scale_up_peak),
            ("network_peak".to_string(), machine.network_peak),
        ];
        for (name, constants) in &machine.protocols {
            for (half, values) in [("dispatch", constants.dispatch), ("combine", constants.combine)] {
                let HalfConstants { alpha_us, scale_up, network } = values;
                let named =
                    [("alpha_us", Some(alpha_us)), ("scale_up", Some(scale_up)), ("network", network)];
                let given = named.into_iter().filter_map(|(what, value)| value.map(|value| (what, value)));
                numbers.extend(given.map(|(what, value)| (format!("{name}.{half}.{what}"), value)));
            }
        }
        match numbers.into_iter().find(|(_, value)| !(value.is_finite() && *value > 0.0)) {
            Some((what, value)) => Err(MachineError::Value { what, value }),
            None => Ok(machine),
        }
    }
}

impl CostModel for Machine {
    fn half(&self, protocol: Protocol, half: Half, bytes: PerLink, tokens: usize) -> Result<f64, CostError> {
        let unknown = || CostError::UnknownProtocol {
            machine: self.name.clone(),
            protocol,
            known: self.protocols.keys().cloned().collect(),
        };
        let constants = self.protocols.get(protocol.0).ok_or_else(unknown)?;
        let HalfConstants { alpha_us, scale_up, network } = match half {
            Half::Dispatch => constants.dispatch,
            Half::Combine => constants.combine,
        };
        // 1 GB/s is 1000 bytes per microsecond.
        let inside = bytes.scale_up / (scale_up * 1e3);
        let between = match network {
            _ if bytes.network == 0.0 => 0.0,
            Some(network) => bytes.network / (network * 1e3),
            None => {
                let (machine, half) = (self.name.clone(), half.name());
                return Err(CostError::NoNetwork { machine, protocol, half });
            }
        };
        let per_token = match constants.hops {
            Hops::AtOnce => inside.max(between),
            Hops::InSequence => inside + between,
        };
        Ok(alpha_us + tokens as f64 * per_token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_machine_is_one() {
        for name in Machine::names() {
            let machine = Machine::named(name).unwrap();
            for (protocol, constants) in &machine.protocols {
                for half in [constants.dispatch, constants.combine] {
                    assert!(half.scale_up < machine.scale_up_peak, "{name}, {protocol}: {half:?}");
                    assert!(
                        half.network.unwrap_or(0.0) < machine.network_peak,
                        "{name}, {protocol}: {half:?}"
                    );
                }
            }
        }
        let error = Machine::named("mi300").unwrap_err().to_string();
        assert!(error.starts_with("unknown machine \"mi300\"; known: mi300x, mi355x,"), "{error}");
    }

    fn toy(network: &str) -> String {
        format!(
            "name = \"toy\"\narch = \"none\"\ngpus_per_node = 2\nscale_up_peak = 4.0\nnetwork_peak = 2.0\n\
             [protocol.mine]\nhops = \"in_sequence\"\ndispatch = {{ alpha_us = 10.0, scale_up = 2.0, network = 1.0 }}\n\
             combine = {{ alpha_us = 10.0, scale_up = 2.0{network} }}\n"
        )
    }

    #[test]
    fn a_machine_of_ones_own_prices_a_protocol_of_ones_own() {
        let machine = Machine::from_toml(&toy("")).unwrap();
        let mine = Protocol("mine");
        let bytes = PerLink { scale_up: 4000.0, network: 1000.0 };
        // 2 us inside and 1 us between, one after the other.
        assert_eq!(machine.half(mine, Half::Dispatch, bytes, 5), Ok(10.0 + 5.0 * 3.0));
        let error = machine.half(mine, Half::Combine, bytes, 5).unwrap_err().to_string();
        assert_eq!(error, "toy has no network bandwidth for the combine of protocol mine");
        let error = machine.half(Protocol::TWO_HOP, Half::Combine, bytes, 5).unwrap_err().to_string();
        assert_eq!(error, "toy has no constants for protocol two_hop; known: mine");
    }

    #[test]
    fn what_is_no_machine_is_refused() {
        for network in ["0.0", "-1.0", "nan", "inf"] {
            let error = Machine::from_toml(&toy(&format!(", network = {network}"))).unwrap_err();
            assert!(
                matches!(&error, MachineError::Value { what, .. } if what == "mine.combine.network"),
                "{network}: {error}"
            );
        }
        assert!(matches!(Machine::from_toml("name = 3"), Err(MachineError::Parse(_))));
        assert!(matches!(Machine::from_toml(&toy(", typo = 1.0")), Err(MachineError::Parse(_))));
    }
}
