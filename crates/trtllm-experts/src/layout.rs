//! Weights and scales in the orders that FlashInfer's TRTLLM-gen functions read, with exact inverses.
//!
//! A checkpoint stores gate and up as two matrices of rows. The kernels read one matrix per expert:
//!
//! 1. up above gate, `[up; gate]`: the first half is the linear one;
//! 2. where gemm1 applies its activation itself (everywhere but in block FP8), the two interleaved row by row;
//! 3. rows shuffled inside blocks of 16 or 32, so that a thread's results of one instruction are neighbours;
//! 4. for bf16 and block FP8, columns cut into runs of 128 bytes, and the runs of all rows kept together
//!    (`BlockMajorK`, `[K / run, rows, run]`).
//!
//! The E4M3 scales of NVFP4 go through the first three steps with their rows and are then [swizzled](SwizzledScales).
//! Block FP8 keeps its f32 scales as they are, those of up above those of gate.
//!
//! The host's kernels pack their own panels from rows as checkpoints have them. These types serve engines whose weights
//! are in FlashInfer's order already: [`from_trtllm`] gives experts that
//! [`pack`](fused_moe_core::ExpertsProvider::pack) takes.
//!
//! ```
//! use trtllm_experts::layout::{KOrder, RowOrder, TrtllmLayout, TrtllmMatrix};
//!
//! let layout = TrtllmLayout { rows: RowOrder::interleaved(None), k: KOrder::MajorK };
//! let (gate, up) = ([1, 2, 3, 4], [10, 20, 30, 40]);
//! let w13 = TrtllmMatrix::from_gate_up(&gate, &up, 2, layout)?;
//! assert_eq!(w13.values(), [10, 20, 1, 2, 30, 40, 3, 4]);
//! assert_eq!(w13.to_gate_up(), (gate.to_vec(), up.to_vec()));
//! # Ok::<(), trtllm_experts::layout::LayoutError>(())
//! ```

mod experts;
mod matrix;
mod rows;
mod swizzle;

pub use experts::{OwnedExpert, TrtllmScales, TrtllmValues, TrtllmWeights, from_trtllm};
pub use matrix::{KOrder, SchemeLayouts, TrtllmLayout, TrtllmMatrix, transposed};
pub use rows::{RowOrder, ShuffleBlock};
pub use swizzle::{ScaleTile, SwizzledScales};

/// Why values are not in a layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A number of rows or columns that the layout does not fill.
    #[error("{what} {size} is no multiple of {multiple}")]
    Multiple {
        /// Rows or columns.
        what: &'static str,
        /// How many there are.
        size: usize,
        /// What they must be a multiple of.
        multiple: usize,
    },
    /// More or fewer values than the sizes say.
    #[error("{what} have {found} values, wanted {wanted}")]
    Length {
        /// Which values.
        what: &'static str,
        /// What the sizes say.
        wanted: usize,
        /// Values given.
        found: usize,
    },
    /// Values or scales of another scheme.
    #[error("{wanted} weights were given as {found}")]
    Scheme {
        /// The scheme of the configuration.
        wanted: String,
        /// What was given.
        found: &'static str,
    },
}

/// Checks the number of values.
fn check_len(what: &'static str, found: usize, wanted: usize) -> Result<(), LayoutError> {
    if found == wanted { Ok(()) } else { Err(LayoutError::Length { what, wanted, found }) }
}

/// Checks that a layout is filled.
fn check_multiple(what: &'static str, size: usize, multiple: usize) -> Result<(), LayoutError> {
    if size.is_multiple_of(multiple) { Ok(()) } else { Err(LayoutError::Multiple { what, size, multiple }) }
}
