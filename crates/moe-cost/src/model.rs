//! The model: a trait, so that an engine can put its own measurements in the place of a file.

use fused_moe_core::{CommTraffic, PerLink, Protocol};

/// Which half of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Half {
    /// Tokens go to their experts.
    Dispatch,
    /// Outputs come back.
    Combine,
}

impl Half {
    /// Name as it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Half::Dispatch => "dispatch",
            Half::Combine => "combine",
        }
    }
}

/// Why a half has no price.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CostError {
    /// The machine does not know the protocol.
    #[error("{machine} has no constants for protocol {protocol}; known: {}", .known.join(", "))]
    UnknownProtocol {
        /// The machine.
        machine: String,
        /// The protocol.
        protocol: Protocol,
        /// Those that it knows.
        known: Vec<String>,
    },
    /// The protocol crosses nodes, and the machine does not say how fast.
    #[error("{machine} has no network bandwidth for the {half} of protocol {protocol}")]
    NoNetwork {
        /// The machine.
        machine: String,
        /// The protocol.
        protocol: Protocol,
        /// The half.
        half: &'static str,
    },
}

/// Microseconds of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerCost {
    /// Of the dispatch.
    pub dispatch: f64,
    /// Of the combine.
    pub combine: f64,
}

impl LayerCost {
    /// Of both.
    pub fn total(self) -> f64 {
        self.dispatch + self.combine
    }
}

/// Prices what backends move.
pub trait CostModel {
    /// Microseconds of one half when every rank brings `tokens` tokens that move `bytes` each.
    ///
    /// # Errors
    /// [`CostError`] for what the model has no constants for.
    fn half(&self, protocol: Protocol, half: Half, bytes: PerLink, tokens: usize) -> Result<f64, CostError>;

    /// Both halves of a layer.
    ///
    /// # Errors
    /// As [`CostModel::half`].
    fn layer(&self, traffic: &CommTraffic, tokens: usize) -> Result<LayerCost, CostError> {
        let CommTraffic { protocol, dispatch, combine } = *traffic;
        Ok(LayerCost {
            dispatch: self.half(protocol, Half::Dispatch, dispatch, tokens)?,
            combine: self.half(protocol, Half::Combine, combine, tokens)?,
        })
    }
}
