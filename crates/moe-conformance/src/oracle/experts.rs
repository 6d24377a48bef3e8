//! The experts of one rank in f64: gemm1, activation, rounding, requantisation, gemm2, weighted sum.

use std::sync::Mutex;

use fused_moe_core::{
    Accumulation, Activation, ExpertMatrices, ExpertPlacement, GlobalExpertId, Padding, Rank, RouterWeight,
};

use super::activation::activate;
use super::codes::Codes;
use super::matrix::{Matrix, bias};
use super::{OracleError, Shape};
use crate::bound::{Bounded, PairOutputs, Products, Requantized, activated, requantized};

/// Multiply-adds below which threads cost more than they save.
const WORTH_A_THREAD: usize = 20_000_000;

/// What one rank computes.
#[derive(Clone, Copy)]
pub(crate) struct RankExperts<'a> {
    pub(crate) shape: Shape,
    /// What gemm2 reads is quantised by.
    pub(crate) codes: Codes,
    pub(crate) activation: Activation,
    pub(crate) padding: Padding,
    pub(crate) router_weight: RouterWeight,
    pub(crate) accumulation: Accumulation,
    /// All experts of the layer, by global id.
    pub(crate) experts: &'a [ExpertMatrices<'a>],
    pub(crate) placement: &'a ExpertPlacement,
    pub(crate) rank: Rank,
}

/// Rows that arrived at a rank, as gemm1 sees them.
#[derive(Clone, Copy)]
pub(crate) struct ArrivedRows<'a> {
    /// `[rows, hidden]`, dequantised.
    pub(crate) values: &'a [f64],
    /// `[rows, top_k]`.
    pub(crate) ids: &'a [i32],
    /// `[rows, top_k]`.
    pub(crate) weights: &'a [f32],
}

/// One (row, slot) whose expert is on this rank.
#[derive(Clone, Copy)]
struct Pair {
    row: usize,
    weight: f64,
}

/// The pairs of one expert, and where their part of a buffer begins.
struct Group<'a> {
    expert: &'a ExpertMatrices<'a>,
    pairs: &'a [Pair],
}

impl RankExperts<'_> {
    /// The outputs of all (row, expert) pairs of this rank.
    pub(crate) fn outputs(&self, rows: ArrivedRows<'_>) -> Result<PairOutputs, OracleError> {
        let Shape { hidden, intermediate, top_k } = self.shape;
        let mut of_expert: Vec<Vec<Pair>> = vec![Vec::new(); self.experts.len()];
        for (position, (&id, &weight)) in rows.ids.iter().zip(rows.weights).enumerate() {
            if self.placement.rank_of_slot(id) == Some(self.rank) {
                let pair = Pair { row: position / top_k, weight: f64::from(weight) };
                of_expert[id as usize].push(pair);
            }
        }
        let local = self.placement.experts_of(self.rank);
        let groups: Vec<Group<'_>> = local
            .map(|GlobalExpertId(id)| id as usize)
            .filter(|&id| !of_expert[id].is_empty())
            .map(|id| Group { expert: &self.experts[id], pairs: &of_expert[id] })
            .collect();
        let num_pairs: usize = groups.iter().map(|g| g.pairs.len()).sum();
        let parallel = num_pairs * hidden * intermediate > WORTH_A_THREAD;

        let mut activated = vec![Bounded::default(); num_pairs * intermediate];
        for_each(split(&groups, &mut activated, intermediate), parallel, |(group, out)| {
            self.gemm1(group, rows.values, out)
        })?;
        let inputs = requantized(&self.codes, &activated, intermediate);
        let mut values = vec![Bounded::default(); num_pairs * hidden];
        let mut first = 0;
        let with_inputs = split(&groups, &mut values, hidden).into_iter().map(|(group, out)| {
            let pairs = first..first + group.pairs.len();
            first = pairs.end;
            (group, pairs, out)
        });
        let with_inputs: Vec<_> = with_inputs.collect();
        for_each(with_inputs, parallel, |(group, pairs, out)| self.gemm2(group, (&inputs, pairs), out))?;

        let late = self.router_weight == RouterWeight::OnOutput;
        let pairs = groups.iter().flat_map(|g| g.pairs);
        let pairs = pairs.map(|pair| (pair.row, if late { pair.weight } else { 1.0 })).collect();
        Ok(PairOutputs { pairs, values })
    }

    /// `act(x · gateᵀ + bias, x · upᵀ + bias)`, `[pairs, intermediate]`.
    fn gemm1(&self, group: &Group<'_>, values: &[f64], out: &mut [Bounded]) -> Result<(), OracleError> {
        let Shape { hidden, intermediate, .. } = self.shape;
        let dims = [intermediate, hidden];
        let gate = Matrix::new("gate", group.expert.gate, dims, self.padding.hidden)?;
        let up = Matrix::new("up", group.expert.up, dims, self.padding.hidden)?;
        let gate_bias = bias("gate bias", group.expert.gate, intermediate)?;
        let up_bias = bias("up bias", group.expert.up, intermediate)?;
        let (mut gate_row, mut up_row) = (vec![0.0; hidden], vec![0.0; hidden]);
        for column in 0..intermediate - self.padding.intermediate {
            gate.row(column, &mut gate_row)?;
            up.row(column, &mut up_row)?;
            for (pair, out) in group.pairs.iter().zip(out.chunks_exact_mut(intermediate)) {
                let x = &values[pair.row * hidden..][..hidden];
                let early =
                    if self.router_weight == RouterWeight::OnInputByExperts { pair.weight } else { 1.0 };
                let gate = Products::of(x, &gate_row, self.accumulation).affine(early, gate_bias[column]);
                let up = Products::of(x, &up_row, self.accumulation).affine(early, up_bias[column]);
                let value = activate(self.activation, gate.value, up.value);
                out[column] = activated(self.activation, gate, up, value);
            }
        }
        Ok(())
    }

    fn gemm2(
        &self,
        group: &Group<'_>,
        (inputs, pairs): (&Requantized, std::ops::Range<usize>),
        out: &mut [Bounded],
    ) -> Result<(), OracleError> {
        let Shape { hidden, intermediate, .. } = self.shape;
        let down = Matrix::new("down", group.expert.down, [hidden, intermediate], self.padding.intermediate)?;
        let down_bias = bias("down bias", group.expert.down, hidden)?;
        let mut down_row = vec![0.0; intermediate];
        for column in 0..hidden - self.padding.hidden {
            down.row(column, &mut down_row)?;
            for (pair, out) in pairs.clone().zip(out.chunks_exact_mut(hidden)) {
                let x = &inputs.values[pair * intermediate..][..intermediate];
                let mut output = Products::of(x, &down_row, self.accumulation).affine(1.0, down_bias[column]);
                output.error += inputs.moves[pair].reach(&down_row);
                out[column] = output;
            }
        }
        Ok(())
    }
}

/// Pairs each group with its rows of `buffer`.
fn split<'g, 'b, T>(
    groups: &'g [Group<'g>],
    mut buffer: &'b mut [T],
    width: usize,
) -> Vec<(&'g Group<'g>, &'b mut [T])> {
    let mut parts = Vec::with_capacity(groups.len());
    for group in groups {
        let (head, tail) = buffer.split_at_mut(group.pairs.len() * width);
        parts.push((group, head));
        buffer = tail;
    }
    parts
}

/// Runs `work` on every item, over all cores if it is `parallel`.
fn for_each<T: Send>(
    items: Vec<T>,
    parallel: bool,
    work: impl Fn(T) -> Result<(), OracleError> + Sync,
) -> Result<(), OracleError> {
    if !parallel {
        return items.into_iter().try_for_each(work);
    }
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(items.len());
    let queue = Mutex::new(items.into_iter());
    let next = || queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
    let drain = || std::iter::from_fn(&next).try_for_each(&work);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(drain)).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}
