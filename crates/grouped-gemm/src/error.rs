//! What a caller can get wrong.

use crate::{Isa, WeightKind};

/// A refused packing or a refused call. Nothing was written when one is returned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GemmError {
    /// The instruction set was forced on a machine that lacks it.
    #[error("instruction set {0} is not available on this machine")]
    IsaUnavailable(Isa),
    /// f32 weights with other activations, or the other way round.
    #[error("{weights:?} weights are not multiplied with {} activations", if *f32_activations { "f32" } else { "bf16 or fp8" })]
    Operands {
        /// How the weights are stored.
        weights: WeightKind,
        /// Whether the activations are f32.
        f32_activations: bool,
    },
    /// A row of a tuning table with a value that the kernels cannot use.
    #[error("tuned {name} is {value}, needs {wanted}")]
    Tuning {
        /// The value's name in the table.
        name: &'static str,
        /// What it is.
        value: usize,
        /// What it may be.
        wanted: &'static str,
    },
    /// A weight matrix with no rows or no columns.
    #[error("weight [{n}, {k}] is empty")]
    EmptyWeight {
        /// Rows of the weight.
        n: usize,
        /// Columns of the weight.
        k: usize,
    },
    /// A weight slice whose length is not `n * k`.
    #[error("weight [{n}, {k}] needs {} values, found {found}", n * k)]
    WeightLength {
        /// Rows of the weight.
        n: usize,
        /// Columns of the weight.
        k: usize,
        /// Values in the slice.
        found: usize,
    },
    /// Gate and up projections that cannot share panels.
    #[error("gate is {gate} but up is {up}")]
    GateUpMismatch {
        /// Shape, kind and scale granularity of the gate projection.
        gate: String,
        /// The same of the up projection.
        up: String,
    },
    /// A scale tensor or a bias of the wrong size.
    #[error("{what} needs {wanted} values, found {found}")]
    ScaleLength {
        /// Which scale tensor.
        what: &'static str,
        /// Values that the shapes ask for.
        wanted: usize,
        /// Values given.
        found: usize,
    },
    /// An FP4 weight whose rows are not whole groups.
    #[error("an fp4 weight of {k} columns is not whole groups of {group}")]
    RaggedGroup {
        /// Columns of the weight.
        k: usize,
        /// Columns under one scale.
        group: usize,
    },
    /// Pairs of FP4 codes that are not `n * k / 2`.
    #[error("fp4 weight [{n}, {k}] needs {} pairs of codes, found {found}", n * k / 2)]
    Fp4Length {
        /// Rows of the weight.
        n: usize,
        /// Columns of the weight.
        k: usize,
        /// Pairs in the slice.
        found: usize,
    },
    /// A group scale that is NaN.
    #[error("the scale of row {row} from column {column} on is NaN (code {code:#04x})")]
    NanScale {
        /// Row of the weight.
        row: usize,
        /// First column of the group.
        column: usize,
        /// The code.
        code: u8,
    },
    /// A row of an MXFP4 weight whose values no common factor brings into bf16's normal range.
    #[error("row {row} has e8m0 scales from {least} to {most}, more than 250 apart")]
    Fp4Range {
        /// Row of the weight.
        row: usize,
        /// Smallest scale of a group that is not zero.
        least: u8,
        /// Largest scale of a group that is not zero.
        most: u8,
    },
    /// Experts of one call that differ in shape or column order.
    #[error("expert {expert} is {found}, expert 0 is {wanted}")]
    ExpertShape {
        /// Index in the weights slice.
        expert: usize,
        /// Its shape and column order.
        found: String,
        /// Shape and column order of expert 0.
        wanted: String,
    },
    /// A group that names an expert that was not given.
    #[error("group {group} names expert {expert} of {experts}")]
    ExpertOutOfRange {
        /// Index of the group.
        group: usize,
        /// The expert that it names.
        expert: usize,
        /// Experts given.
        experts: usize,
    },
    /// A reversed group, or one that starts before the end of its predecessor.
    #[error("group {group} covers rows {start}..{end}, which do not ascend from row {previous_end}")]
    GroupOrder {
        /// Index of the group.
        group: usize,
        /// Its first row.
        start: usize,
        /// One past its last row.
        end: usize,
        /// One past the last row of the group before.
        previous_end: usize,
    },
    /// A row pitch smaller than the row.
    #[error("{what} pitch {pitch} is smaller than its {columns} columns")]
    Pitch {
        /// Which tensor.
        what: &'static str,
        /// Pitch given, in elements.
        pitch: usize,
        /// Columns of the tensor.
        columns: usize,
    },
    /// A tensor with fewer rows than the groups reach.
    #[error("{what} has {found} rows, the groups need {wanted}")]
    TooFewRows {
        /// Which tensor.
        what: &'static str,
        /// Rows it has.
        found: usize,
        /// Rows that are needed.
        wanted: usize,
    },
    /// A gather entry past the last activation row.
    #[error("gather maps row {row} to activation row {index} of {rows}")]
    GatherOutOfRange {
        /// Sorted row.
        row: usize,
        /// Activation row it names.
        index: usize,
        /// Activation rows given.
        rows: usize,
    },
    /// A sink whose width is not that of the result.
    #[error("sink has {found} columns, the result has {wanted}")]
    SinkColumns {
        /// Columns of the sink.
        found: usize,
        /// Columns of the result.
        wanted: usize,
    },
    /// An activation asked of plain weights, or none asked of gate/up weights.
    #[error("weights are packed as {columns} but the call asks for {epilogue}")]
    Epilogue {
        /// Column order of the weights.
        columns: &'static str,
        /// What was asked.
        epilogue: &'static str,
    },
    /// Lent scratch smaller than [`scratch_bytes`](crate::Executor::scratch_bytes).
    #[error("scratch has {found} bytes, {wanted} are needed")]
    ScratchTooSmall {
        /// Bytes lent.
        found: usize,
        /// Bytes needed.
        wanted: usize,
    },
}
