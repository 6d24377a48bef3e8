//! From the outputs of pairs to the output of the layer: partial sums, their rounding, the sum over ranks.

use fused_moe_core::{Accumulation, CombineWire, DType, KernelKind, PartialSums, Plan};

use super::requantize::travelled;
use super::rounding::to_bf16;
use super::sums::{Bounded, U};
use super::{Expected, MOST_ERROR, MOST_ERROR_CUT_OFF};

/// Relative error of routing weights that experts compute themselves: 32 unit roundoffs, a softmax or sigmoid with
/// its sum and quotient.
const COMPUTED_WEIGHT: f64 = 32.0 * U;

/// What is rounded to bf16 on the way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returned {
    /// The weighted sum over the experts of a rank; a combine adds up ranks.
    PartialSums,
    /// The output of every expert; a combine weights them and adds them up.
    ExpertOutputs,
}

/// Where a layer rounds behind gemm2, and in what its GEMMs add up. Other sums are f32 everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounding {
    /// What travels back, in bf16.
    pub returned: Returned,
    /// What is rounded to bf16 again on the way.
    pub partial_sums: PartialSums,
    /// As what everything travels that was rounded.
    pub combine_wire: CombineWire,
    /// Element type of the layer's output.
    pub output: DType,
    /// In what the GEMMs add products up.
    pub accumulation: Accumulation,
    /// Whether the experts compute the routing weights, from logits.
    pub routes: bool,
}

impl Rounding {
    /// That of a layer with `plan` and this output.
    pub fn of_plan(plan: &Plan, output: DType) -> Self {
        let returned = match plan.weight_and_reduce().is_no_op() {
            true => Returned::PartialSums,
            false => Returned::ExpertOutputs,
        };
        let routes = plan.kind() == KernelKind::Monolithic;
        let (partial_sums, combine_wire) = (plan.partial_sums(), plan.combine_wire());
        let accumulation = plan.accumulation();
        Self { returned, partial_sums, combine_wire, output, accumulation, routes }
    }
}

/// The outputs of one rank.
#[derive(Debug, Default)]
pub(crate) struct PairOutputs {
    /// Row and factor of each pair; the factor is 1 where the routing weight was applied earlier.
    pub(crate) pairs: Vec<(usize, f64)>,
    /// `[pairs, hidden]`.
    pub(crate) values: Vec<Bounded>,
}

/// Sums of what was rounded, `[rows, hidden]`.
struct Sums {
    want: Vec<f64>,
    bound: Vec<f64>,
    /// Of what is added up, the sum of magnitudes.
    magnitude: Vec<f64>,
    /// How many are added up, for each row.
    added: Vec<u32>,
}

impl Sums {
    fn new(rows: usize, hidden: usize) -> Self {
        let zeros = vec![0.0; rows * hidden];
        Self { want: zeros.clone(), bound: zeros.clone(), magnitude: zeros, added: vec![0; rows] }
    }

    fn add(&mut self, at: usize, Bounded { value, error }: Bounded) {
        self.want[at] += value;
        self.bound[at] += error;
        self.magnitude[at] += value.abs();
    }

    /// The sum at `at`, which is in `row`.
    fn sum(&self, at: usize, row: usize) -> Bounded {
        let additions = f64::from(self.added[row].saturating_sub(1));
        let (value, error) = (self.want[at], self.bound[at]);
        Bounded { value, error: error + additions * U * (self.magnitude[at] + error) }
    }
}

/// The sum of all outputs of a layer.
pub(crate) struct Combine {
    rounding: Rounding,
    hidden: usize,
    ranks: usize,
    exact: Vec<f64>,
    /// Of the current node, if sums of nodes are rounded, and of all ranks if not.
    of_ranks: Sums,
    of_nodes: Sums,
}

impl Combine {
    pub(crate) fn new(rounding: Rounding, rows: usize, hidden: usize) -> Self {
        let (of_ranks, of_nodes) = (Sums::new(rows, hidden), Sums::new(rows, hidden));
        Self { rounding, hidden, ranks: 0, exact: vec![0.0; rows * hidden], of_ranks, of_nodes }
    }

    /// Adds what the next rank returns.
    pub(crate) fn add_rank(&mut self, outputs: &PairOutputs) {
        let hidden = self.hidden;
        let mut of_row: Vec<(usize, f64, &[Bounded])> = outputs
            .pairs
            .iter()
            .zip(outputs.values.chunks_exact(hidden))
            .map(|(&(row, factor), values)| (row, factor, values))
            .collect();
        of_row.sort_by_key(|&(row, ..)| row);
        let weight_error = if self.rounding.routes { COMPUTED_WEIGHT } else { 0.0 };
        let mut partials = Vec::new();
        for slots in of_row.chunk_by(|a, b| a.0 == b.0) {
            let row = slots[0].0;
            // A product with the weight and an addition for each slot.
            let roundings = slots.len() as f64 + 1.0;
            self.of_ranks.added[row] += match self.rounding.returned {
                Returned::PartialSums => 1,
                Returned::ExpertOutputs => slots.len() as u32,
            };
            for column in 0..hidden {
                let at = row * hidden + column;
                let mut partial = Bounded::default();
                for &(_, factor, values) in slots {
                    let Bounded { value, error } = values[column];
                    self.exact[at] += factor * value;
                    match self.rounding.returned {
                        Returned::PartialSums => {
                            let relative = roundings * U + weight_error;
                            partial.value += factor * value;
                            partial.error += factor.abs() * (error + relative * (value.abs() + error));
                        }
                        Returned::ExpertOutputs => {
                            let output = to_bf16(values[column]);
                            let (value, error) = (factor * output.value, factor.abs() * output.error);
                            // What was off is rounded at the size that it has then.
                            let error = error + (U + weight_error) * (value.abs() + error);
                            self.of_ranks.add(at, Bounded { value, error });
                        }
                    }
                }
                partials.push(partial);
            }
        }
        if self.rounding.returned == Returned::PartialSums {
            let partials = travelled(self.rounding.combine_wire, &partials, hidden);
            let rows = of_row.chunk_by(|a, b| a.0 == b.0).map(|slots| slots[0].0);
            for (row, partials) in rows.zip(partials.chunks_exact(hidden)) {
                (row * hidden..).zip(partials).for_each(|(at, &partial)| self.of_ranks.add(at, partial));
            }
        }
        self.ranks += 1;
        match self.rounding.partial_sums {
            PartialSums::OfNodes { ranks_per_node } if self.ranks.is_multiple_of(ranks_per_node) => {
                self.end_node();
            }
            _ => {}
        }
    }

    /// Rounds the sums of the ranks of a node.
    fn end_node(&mut self) {
        let rows = self.of_ranks.added.len();
        let of_ranks = std::mem::replace(&mut self.of_ranks, Sums::new(rows, self.hidden));
        let hidden = self.hidden;
        let sums: Vec<_> = (0..rows * hidden).map(|at| of_ranks.sum(at, at / hidden)).collect();
        for (at, sum) in travelled(self.rounding.combine_wire, &sums, hidden).into_iter().enumerate() {
            if of_ranks.added[at / hidden] > 0 {
                self.of_nodes.add(at, sum);
            }
        }
        let visited = self.of_nodes.added.iter_mut().zip(&of_ranks.added);
        visited.for_each(|(nodes, &ranks)| *nodes += u32::from(ranks > 0));
    }

    /// The sums in the type of the output.
    pub(crate) fn finish(self) -> Expected {
        let sums = match self.rounding.partial_sums {
            PartialSums::OfNodes { .. } => self.of_nodes,
            _ => self.of_ranks,
        };
        let (mut want, mut bound) = (Vec::new(), Vec::new());
        for at in 0..self.exact.len() {
            let mut output = sums.sum(at, at / self.hidden);
            if self.rounding.output == DType::Bf16 {
                output = to_bf16(output);
            }
            want.push(output.value);
            // Where nothing is left to chance the bound is nothing; errors are easier to read in units of something.
            bound.push(output.error.max(U * output.value.abs()));
        }
        let most_error = match self.rounding.accumulation {
            Accumulation::Aligned { .. } => MOST_ERROR_CUT_OFF,
            _ => MOST_ERROR,
        };
        Expected { exact: self.exact, want, bound, most_error }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    const PLAIN: Rounding = Rounding {
        returned: Returned::PartialSums,
        partial_sums: PartialSums::None,
        combine_wire: CombineWire::InDtype,
        output: DType::F32,
        accumulation: Accumulation::F32,
        routes: false,
    };

    fn expected(returned: Returned, output: DType, error: f64) -> Expected {
        let rounding = Rounding { returned, output, ..PLAIN };
        let mut combine = Combine::new(rounding, 2, 1);
        let value = |value| Bounded { value, error };
        // 1 + 2⁻⁹ is no bf16, nor is three quarters of it.
        let odd = 1.0 + 2f64.powi(-9);
        combine.add_rank(&PairOutputs {
            pairs: vec![(1, 0.75), (1, 0.25)],
            values: vec![value(odd), value(odd)],
        });
        combine.add_rank(&PairOutputs { pairs: vec![(1, 1.0)], values: vec![value(2.0 * odd)] });
        combine.finish()
    }

    /// A value that is off by more than its size is rounded by the backend at the size that it has there.
    #[test]
    fn roundings_are_those_of_the_value_that_is_off() {
        for returned in [Returned::PartialSums, Returned::ExpertOutputs] {
            let rounding = Rounding { returned, ..PLAIN };
            let mut combine = Combine::new(rounding, 1, 1);
            let far = Bounded { value: 0.125, error: 8.0 };
            combine.add_rank(&PairOutputs { pairs: vec![(0, 0.7)], values: vec![far] });
            let Expected { want, bound, .. } = combine.finish();
            let output = 0.7f32 * 8.125;
            let got =
                if returned == Returned::PartialSums { bf16::from_f32(output).to_f32() } else { output };
            let off = (f64::from(got) - want[0]).abs();
            assert!(off <= bound[0], "{returned:?}: off by {off}, bound {}", bound[0]);
        }
    }

    #[test]
    fn what_returns_is_rounded_once() {
        for returned in [Returned::PartialSums, Returned::ExpertOutputs] {
            let Expected { exact, want, bound, .. } = expected(returned, DType::F32, 1e-9);
            assert_eq!(
                (exact[0], want[0], bound[0]),
                (0.0, 0.0, 0.0),
                "a row without experts is exactly zero"
            );
            assert_eq!((exact[1], want[1]), (3.0 + 3.0 * 2f64.powi(-9), 3.0));
            assert!(bound[1] > 0.0 && bound[1] < 1e-6, "{returned:?}: {}", bound[1]);
        }
        // An error that reaches the boundary at 1 + 2⁻⁸ is a step of bf16.
        let step = expected(Returned::PartialSums, DType::F32, 2f64.powi(-8)).bound[1];
        assert!((2f64.powi(-7)..2f64.powi(-5)).contains(&step), "{step}");
        let narrow = expected(Returned::PartialSums, DType::Bf16, 1e-9);
        assert_eq!((narrow.want[1], narrow.bound[1]), (3.0, 3.0 * U));
    }

    /// Three ranks return 1, 2⁻⁹ and 2⁻⁸: each is a bf16, and what of them is lost depends on where nodes end.
    #[test]
    fn sums_of_nodes_are_rounded_where_nodes_end() {
        let sum = |partial_sums| {
            let mut combine = Combine::new(Rounding { partial_sums, ..PLAIN }, 1, 1);
            for value in [1.0, 2f64.powi(-9), 2f64.powi(-8), 0.0] {
                let values = vec![Bounded { value, error: 0.0 }];
                combine.add_rank(&PairOutputs { pairs: vec![(0, 1.0)], values });
            }
            combine.finish()
        };
        let exact = 1.0 + 3.0 * 2f64.powi(-9);
        let of_nodes = |ranks_per_node| sum(PartialSums::OfNodes { ranks_per_node });
        for (expected, want) in [
            (sum(PartialSums::None), exact),
            (of_nodes(4), 1.0 + 2f64.powi(-7)),
            // The first two are nearest to 1.
            (of_nodes(2), 1.0 + 2f64.powi(-8)),
            (of_nodes(1), exact),
        ] {
            assert_eq!((expected.exact[0], expected.want[0]), (exact, want));
            assert!(expected.bound[0] < 1e-6, "{}", expected.bound[0]);
        }
    }
}
