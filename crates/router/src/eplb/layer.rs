//! Replicas and weights of one layer, changed together on all ranks between two calls.

use fused_moe_core::{
    Error, ExpertWeights, Mismatch, ModularKernel, MoeConfig, ProcessGroup, Rank, first_mismatch,
};

use super::table::ReplicaTable;

/// A table and the weights of this rank's slots under it: two that are only right together.
#[derive(Debug)]
pub struct PlacedWeights {
    /// The same on every rank.
    pub table: ReplicaTable,
    /// The experts of this rank's slots, in slot order, packed by the plan's experts backend. Slot `p` holds logical
    /// expert `table.physical_to_logical()[p]`.
    pub weights: ExpertWeights,
}

/// Why a layer is as it was. Every rank returns one, about the same rank.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RebalanceError {
    /// A call of a kernel that runs the layer has not ended: receive its tickets first, or settle a dropped one.
    #[error("a call is in flight on {rank}, round {round}")]
    InFlight {
        /// The lowest rank with such a call.
        rank: Rank,
        /// Its round.
        round: u64,
    },
    /// A rank has brought a table or weights that are not of this layer.
    #[error("{rank} cannot change the layer: {why}")]
    Unfit {
        /// The lowest such rank.
        rank: Rank,
        /// What does not fit, with the values.
        why: String,
    },
    /// The ranks have brought different tables, or are about to change different layers.
    #[error("{0}")]
    Mismatch(Box<Mismatch>),
    /// The ranks could not be asked. A peer is lost; the layer should not be used again.
    #[error(transparent)]
    Group(#[from] Error),
}

/// A refusal, with what was refused: packing it again would take long.
#[derive(Debug, thiserror::Error)]
#[error("the layer goes on with the experts it has")]
pub struct RefusedRebalance {
    /// The reason.
    #[source]
    pub error: RebalanceError,
    /// What was to be put in use.
    pub next: PlacedWeights,
}

/// One layer of a model with replicated experts, on one rank.
///
/// A call borrows it: [`BalancedLayer::table`] for the ids, [`BalancedLayer::weights`] for the experts.
/// [`BalancedLayer::rebalance`] needs it for itself, so on a rank no call can begin with one table and go on with
/// another, and the path of a call has no lock.
#[derive(Debug)]
pub struct BalancedLayer {
    layer: usize,
    generation: u64,
    placed: PlacedWeights,
}

impl BalancedLayer {
    /// Layer number `layer` as it starts.
    ///
    /// # Errors
    /// [`RefusedRebalance`] with [`RebalanceError::Unfit`] for a table that is not for the experts of `config`, told
    /// by this rank alone.
    pub fn new(
        layer: usize,
        placed: PlacedWeights,
        config: &MoeConfig,
        rank: Rank,
    ) -> Result<Self, Box<RefusedRebalance>> {
        let wanted = [config.num_logical_experts(), config.num_experts()];
        match misfit(&placed, wanted, placed.weights.backend()) {
            Some(why) => {
                let error = RebalanceError::Unfit { rank, why };
                Err(Box::new(RefusedRebalance { error, next: placed }))
            }
            None => Ok(Self { layer, generation: 0, placed }),
        }
    }

    /// Number of the layer in the model.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// How often it has been rebalanced.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The replicas in use.
    pub fn table(&self) -> &ReplicaTable {
        &self.placed.table
    }

    /// The weights in use.
    pub fn weights(&self) -> &ExpertWeights {
        &self.placed.weights
    }

    /// Puts `next` in use on all ranks, and returns what was in use before. Collective: every rank of `group` calls it
    /// for the same layer, between calls. `kernels` are all that run the layer on this rank, one per micro-batch.
    ///
    /// The ranks first ask each other whether a call is in flight, then compare layer, generation, table and static
    /// scale field by field. Unless all agree, nothing has changed on any rank, and the next call is as good as the
    /// last. It moves no weights: they are in `next`, which may have been packed while calls went on.
    ///
    /// # Errors
    /// [`RefusedRebalance`], which gives `next` back, on every rank.
    pub fn rebalance(
        &mut self,
        next: PlacedWeights,
        kernels: &mut [&mut ModularKernel],
        group: &dyn ProcessGroup,
    ) -> Result<PlacedWeights, Box<RefusedRebalance>> {
        match self.agree(&next, kernels, group) {
            Ok(()) => {
                self.generation += 1;
                Ok(std::mem::replace(&mut self.placed, next))
            }
            Err(error) => Err(Box::new(RefusedRebalance { error, next })),
        }
    }

    fn agree(
        &self,
        next: &PlacedWeights,
        kernels: &mut [&mut ModularKernel],
        group: &dyn ProcessGroup,
    ) -> Result<(), RebalanceError> {
        // A rank that cannot take part says so in the first collective instead of staying away from it.
        let in_flight = kernels.iter_mut().find_map(|k| k.prepare_finalize().ledger().in_flight());
        let wanted = [self.placed.table.num_logical(), self.placed.table.num_physical()];
        let mine = match (in_flight, misfit(next, wanted, self.placed.weights.backend())) {
            (Some(round), _) => Word::InFlight(round),
            (None, Some(why)) => Word::Unfit(why),
            (None, None) => Word::Ready,
        };
        let words = group.all_gather(&mine.to_bytes())?;
        for (rank, word) in words.iter().enumerate() {
            let rank = Rank(rank as u32);
            match Word::from_bytes(word) {
                Word::Ready => {}
                Word::InFlight(round) => return Err(RebalanceError::InFlight { rank, round }),
                Word::Unfit(why) => return Err(RebalanceError::Unfit { rank, why }),
            }
        }
        let slots: Vec<String> = next.table.physical_to_logical().iter().map(u32::to_string).collect();
        let scale = next.weights.input_scale();
        let fields = [
            ("layer", self.layer.to_string()),
            ("generation", self.generation.to_string()),
            ("num_logical", next.table.num_logical().to_string()),
            ("physical_to_logical", slots.join(",")),
            // The scale of a layer is that of all its experts, wherever they are.
            ("input_scale", scale.map_or("none".into(), |scale| format!("{scale:?}"))),
        ];
        match first_mismatch(group, &fields)? {
            None => Ok(()),
            Some(mismatch) => Err(RebalanceError::Mismatch(Box::new(mismatch))),
        }
    }
}

/// What is wrong with `placed` for a layer of `wanted` logical and physical experts.
fn misfit(placed: &PlacedWeights, wanted: [usize; 2], backend: &str) -> Option<String> {
    let found = [placed.table.num_logical(), placed.table.num_physical()];
    if found != wanted {
        return Some(format!(
            "the table is of {} experts in {} slots, the layer has {} in {}",
            found[0], found[1], wanted[0], wanted[1]
        ));
    }
    let packed_by = placed.weights.backend();
    (packed_by != backend)
        .then(|| format!("the weights were packed by {packed_by}, those in use by {backend}"))
}

/// What a rank says before tables are compared.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Word {
    Ready,
    InFlight(u64),
    Unfit(String),
}

impl Word {
    fn to_bytes(&self) -> Vec<u8> {
        match self {
            Word::Ready => vec![0],
            Word::InFlight(round) => [&[1], &round.to_le_bytes()[..]].concat(),
            Word::Unfit(why) => [&[2], why.as_bytes()].concat(),
        }
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        match bytes {
            [0] => Word::Ready,
            [1, round @ ..] => Word::InFlight(round.try_into().map_or(0, u64::from_le_bytes)),
            [2, why @ ..] => Word::Unfit(String::from_utf8_lossy(why).into_owned()),
            other => Word::Unfit(format!("it answers {other:?}, which this build does not know")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_wire() {
        for word in [Word::Ready, Word::InFlight(0), Word::InFlight(u64::MAX), Word::Unfit("why".into())] {
            assert_eq!(Word::from_bytes(&word.to_bytes()), word);
        }
        assert!(matches!(Word::from_bytes(&[]), Word::Unfit(_)));
        assert!(matches!(Word::from_bytes(&[9, 9]), Word::Unfit(_)));
    }
}
