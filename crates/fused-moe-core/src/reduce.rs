//! Top-k weight and reduce: how the outputs of a token's experts become one row.

use enum_dispatch::enum_dispatch;
use half::bf16;
use smallvec::SmallVec;

use crate::dtype::DType;
use crate::layout::ViewError;
use crate::placement::ExpertMap;
use crate::router::TopK;
use crate::tensor::{TensorView, TensorViewMut};

/// What a reduction reads.
#[derive(Clone, Copy, Debug)]
pub struct ReduceInput<'a> {
    /// Expert outputs; the shape depends on the variant. bf16 or f32.
    pub expert_out: TensorView<'a>,
    /// Top-k of the rows to be reduced, `[rows, top_k]`.
    pub topk: TopK<'a>,
    /// Rows that are valid; rows behind are neither read nor written.
    pub num_rows: usize,
    /// Which experts are local; slots of other experts contribute nothing.
    pub experts: &'a ExpertMap,
    /// Whether the routing weights were already applied.
    pub weighted: bool,
}

/// Why a reduction cannot be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReduceError {
    /// A tensor does not fit.
    #[error(transparent)]
    View(#[from] ViewError),
    /// An expert output of a type or shape that this reduction does not read.
    #[error("expert output {dims:?} of {dtype} cannot be reduced by {reduction}")]
    Unsupported {
        /// Shape of the expert output.
        dims: Vec<usize>,
        /// Its element type.
        dtype: DType,
        /// The reduction.
        reduction: &'static str,
    },
    /// A tensor whose size is not what the others imply.
    #[error("{tensor} is {found:?}, needs {wanted:?}")]
    Misfit {
        /// Which tensor.
        tensor: &'static str,
        /// Its dimensions, or the first of them.
        found: Vec<usize>,
        /// What they have to be; where more is allowed, the least.
        wanted: Vec<usize>,
    },
    /// [`Delegate`] was asked to reduce: the combine does it.
    #[error("weight and reduce is delegated to the combine")]
    Delegated,
}

/// One way to weight and reduce. Sums are f32 in slot order, rounded once to the output's type.
#[enum_dispatch]
trait WeightAndReduce {
    /// Writes the first `num_rows` rows of `out`, `[rows, hidden]` bf16 or f32.
    fn reduce(&self, input: ReduceInput<'_>, out: TensorViewMut<'_>) -> Result<(), ReduceError>;
}

/// The experts already weighted and reduced: `[rows, hidden]` is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NoOp;

/// `[rows, top_k, hidden]`, unweighted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Contiguous;

/// `[local_experts, max_tokens, hidden]`, unweighted; a token's row is the number of hits on that expert before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NaiveBatched;

/// The combine of the prepare/finalize backend does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Delegate;

/// The closed set of reductions.
#[enum_dispatch(WeightAndReduce)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TopKWeightAndReduce {
    /// See [`NoOp`].
    NoOp,
    /// See [`Contiguous`].
    Contiguous,
    /// See [`NaiveBatched`].
    NaiveBatched,
    /// See [`Delegate`].
    Delegate,
}

impl TopKWeightAndReduce {
    /// The experts do it.
    pub const fn no_op() -> Self {
        TopKWeightAndReduce::NoOp(NoOp)
    }

    /// The combine does it.
    pub const fn delegate() -> Self {
        TopKWeightAndReduce::Delegate(Delegate)
    }

    /// Whether the experts do it.
    pub const fn is_no_op(&self) -> bool {
        matches!(self, TopKWeightAndReduce::NoOp(_))
    }

    /// Whether the combine does it.
    pub const fn is_delegate(&self) -> bool {
        matches!(self, TopKWeightAndReduce::Delegate(_))
    }

    /// Name as it is printed.
    pub const fn name(&self) -> &'static str {
        match self {
            TopKWeightAndReduce::NoOp(_) => "no-op",
            TopKWeightAndReduce::Contiguous(_) => "contiguous",
            TopKWeightAndReduce::NaiveBatched(_) => "naive-batched",
            TopKWeightAndReduce::Delegate(_) => "delegate",
        }
    }

    /// Weights and reduces on the host. See the variants for the shape of `input.expert_out`.
    ///
    /// # Errors
    /// [`ReduceError`].
    pub fn reduce(&self, input: ReduceInput<'_>, out: TensorViewMut<'_>) -> Result<(), ReduceError> {
        WeightAndReduce::reduce(self, input, out)
    }
}

/// Rows of the expert output that make up one row of the result, each with its weight.
type Terms = SmallVec<[(usize, f32); 16]>;

impl WeightAndReduce for NoOp {
    fn reduce(&self, input: ReduceInput<'_>, mut out: TensorViewMut<'_>) -> Result<(), ReduceError> {
        let rows = ExpertRows::new(input.expert_out, "no-op")?;
        at_least("expert output", input.expert_out.dims()[0], input.num_rows)?;
        rows.fit(&out, input.num_rows)?;
        (0..input.num_rows).try_for_each(|row| rows.sum(&[(row, 1.0)], &mut out, row))
    }
}

impl WeightAndReduce for Contiguous {
    fn reduce(&self, input: ReduceInput<'_>, mut out: TensorViewMut<'_>) -> Result<(), ReduceError> {
        let rows = ExpertRows::new(input.expert_out, "contiguous")?;
        at_least("expert output", input.expert_out.dims()[0], input.num_rows)?;
        rows.fit(&out, input.num_rows)?;
        let top_k = input.topk_of(input.expert_out.dims()[1])?;
        for row in 0..input.num_rows {
            let (ids, weights) = (input.topk.ids.row::<i32>(row)?, input.topk.weights.row::<f32>(row)?);
            let mut terms = Terms::new();
            for (slot, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
                if input.experts.local(id).is_some() {
                    terms.push((row * top_k + slot, if input.weighted { 1.0 } else { weight }));
                }
            }
            rows.sum(&terms, &mut out, row)?;
        }
        Ok(())
    }
}

impl WeightAndReduce for NaiveBatched {
    fn reduce(&self, input: ReduceInput<'_>, mut out: TensorViewMut<'_>) -> Result<(), ReduceError> {
        let rows = ExpertRows::new(input.expert_out, "naive-batched")?;
        let (local, max_tokens) = (input.expert_out.dims()[0], input.expert_out.dims()[1]);
        rows.fit(&out, input.num_rows)?;
        input.topk_of(input.topk.ids.dims().last().copied().unwrap_or(0))?;
        for row in 0..input.num_rows {
            let (ids, weights) = (input.topk.ids.row::<i32>(row)?, input.topk.weights.row::<f32>(row)?);
            let mut terms = Terms::new();
            for (&id, &weight) in ids.iter().zip(weights) {
                let Some(expert) = input.experts.local(id) else { continue };
                // The layout's definition: the n-th token that hits an expert has that expert's n-th row.
                let mut position = 0;
                for earlier in 0..row {
                    position += input.topk.ids.row::<i32>(earlier)?.iter().filter(|&&e| e == id).count();
                }
                let (found, wanted) = ([local, max_tokens], [expert.0 as usize + 1, position + 1]);
                if found[0] < wanted[0] || found[1] < wanted[1] {
                    return Err(misfit("expert output", &found, &wanted));
                }
                let weight = if input.weighted { 1.0 } else { weight };
                terms.push((expert.0 as usize * max_tokens + position, weight));
            }
            rows.sum(&terms, &mut out, row)?;
        }
        Ok(())
    }
}

impl WeightAndReduce for Delegate {
    fn reduce(&self, _input: ReduceInput<'_>, _out: TensorViewMut<'_>) -> Result<(), ReduceError> {
        Err(ReduceError::Delegated)
    }
}

fn misfit(tensor: &'static str, found: &[usize], wanted: &[usize]) -> ReduceError {
    ReduceError::Misfit { tensor, found: found.to_vec(), wanted: wanted.to_vec() }
}

fn at_least(tensor: &'static str, found: usize, wanted: usize) -> Result<(), ReduceError> {
    if found < wanted { Err(misfit(tensor, &[found], &[wanted])) } else { Ok(()) }
}

impl ReduceInput<'_> {
    /// Slots per row, if ids and weights have `top_k` of them in enough rows.
    fn topk_of(&self, top_k: usize) -> Result<usize, ReduceError> {
        for (tensor, view) in [("top-k ids", self.topk.ids), ("top-k weights", self.topk.weights)] {
            match *view.dims() {
                [rows, slots] if rows >= self.num_rows && slots == top_k => {}
                _ => return Err(misfit(tensor, view.dims(), &[self.num_rows, top_k])),
            }
        }
        Ok(top_k)
    }
}

/// Expert outputs seen as rows of `hidden` elements.
enum ExpertRows<'a> {
    F32(&'a [f32], usize),
    Bf16(&'a [bf16], usize),
}

impl<'a> ExpertRows<'a> {
    fn new(expert_out: TensorView<'a>, reduction: &'static str) -> Result<Self, ReduceError> {
        let dims = expert_out.dims();
        let wanted_dims = if reduction == "no-op" { 2 } else { 3 };
        match expert_out.dtype() {
            DType::F32 if dims.len() == wanted_dims => {
                Ok(Self::F32(expert_out.as_slice()?, dims[dims.len() - 1]))
            }
            DType::Bf16 if dims.len() == wanted_dims => {
                Ok(Self::Bf16(expert_out.as_slice()?, dims[dims.len() - 1]))
            }
            dtype => Err(ReduceError::Unsupported { dims: dims.to_vec(), dtype, reduction }),
        }
    }

    /// Checks that `out` has the rows' width and at least `num_rows` rows.
    fn fit(&self, out: &TensorViewMut<'_>, num_rows: usize) -> Result<(), ReduceError> {
        let (ExpertRows::F32(_, hidden) | ExpertRows::Bf16(_, hidden)) = *self;
        match *out.dims() {
            [rows, width] if rows >= num_rows && width == hidden => Ok(()),
            _ => Err(misfit("output", out.dims(), &[num_rows, hidden])),
        }
    }

    /// Writes row `row` of `out` as the weighted sum of `terms`, in their order.
    fn sum(
        &self,
        terms: &[(usize, f32)],
        out: &mut TensorViewMut<'_>,
        row: usize,
    ) -> Result<(), ReduceError> {
        match out.dtype() {
            DType::F32 => self.sum_into(terms, out.row_mut::<f32>(row)?, |x| x),
            DType::Bf16 => self.sum_into(terms, out.row_mut::<bf16>(row)?, bf16::from_f32),
            dtype => Err(ReduceError::Unsupported { dims: out.dims().to_vec(), dtype, reduction: "output" }),
        }
    }

    fn sum_into<T>(
        &self,
        terms: &[(usize, f32)],
        out: &mut [T],
        round: fn(f32) -> T,
    ) -> Result<(), ReduceError> {
        for (column, out) in out.iter_mut().enumerate() {
            let mut acc = 0.0;
            for &(row, weight) in terms {
                acc += weight
                    * match *self {
                        ExpertRows::F32(rows, hidden) => rows[row * hidden + column],
                        ExpertRows::Bf16(rows, hidden) => rows[row * hidden + column].to_f32(),
                    };
            }
            *out = round(acc);
        }
        Ok(())
    }
}
