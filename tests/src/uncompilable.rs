//! Bugs of other projects that types rule out here: programs with them do not compile.
//!
//! Every example comes in two versions, which differ in the mistake alone: the right one is compiled, too, so that it
//! cannot be a typing error that is refused.

/// vLLM #49758, #29773, #47158: a map of local ids where a mask of zeros and ones is wanted.
///
/// ```
/// # use fused_moe::{ExpertMap, ExpertMask, ExpertPlacement, Rank, aiter_experts::MoeSorting};
/// fn sorting(placement: &ExpertPlacement) -> MoeSorting {
///     let local = ExpertMask::new(placement, Rank(0));
///     MoeSorting::new(&local, 2, 32.try_into().unwrap()).unwrap()
/// }
/// ```
///
/// ```compile_fail,E0308
/// # use fused_moe::{ExpertMap, ExpertMask, ExpertPlacement, Rank, aiter_experts::MoeSorting};
/// fn sorting(placement: &ExpertPlacement) -> MoeSorting {
///     let local = ExpertMap::new(placement, Rank(0));
///     MoeSorting::new(&local, 2, 32.try_into().unwrap()).unwrap()
/// }
/// ```
pub const MAP_FOR_MASK: () = ();

/// vLLM #52639, mori #475: combine before dispatch, or twice, or with the ids of the rows that arrived. Combine takes the
/// `Routed` that dispatch made, once.
///
/// ```
/// # use fused_moe::*;
/// fn once(comm: &mut dyn PrepareAndFinalizeModular, cx: &mut ExecCx<'_>, routed: Routed) {
///     let _ = comm.finalize_send(cx, routed, ExpertOut::InPlace);
/// }
/// ```
///
/// ```compile_fail,E0382
/// # use fused_moe::*;
/// fn twice(comm: &mut dyn PrepareAndFinalizeModular, cx: &mut ExecCx<'_>, routed: Routed) {
///     let _ = comm.finalize_send(cx, routed, ExpertOut::InPlace);
///     let _ = comm.finalize_send(cx, routed, ExpertOut::InPlace);
/// }
/// ```
pub const COMBINE_TWICE: () = ();

/// vLLM's `a1.mul_`: a backend that writes to the hidden states that it was lent.
///
/// ```
/// # use fused_moe::*;
/// fn first(input: PrepareInput<'_>) -> &[half::bf16] {
///     input.hidden.row::<half::bf16>(0).unwrap()
/// }
/// ```
///
/// ```compile_fail,E0599
/// # use fused_moe::*;
/// fn first(input: PrepareInput<'_>) -> &mut [half::bf16] {
///     input.hidden.row_mut::<half::bf16>(0).unwrap()
/// }
/// ```
pub const WRITTEN_HIDDEN_STATES: () = ();

/// vLLM: a count of tokens per expert where a total is wanted.
///
/// ```
/// # use fused_moe::*;
/// fn total(arrived: &Arrived<'_>) -> Result<usize, ViewError> {
///     match arrived {
///         Arrived::Standard { rows, .. } => rows.on_host(),
///         Arrived::Batched { .. } => Ok(0),
///     }
/// }
/// ```
///
/// ```compile_fail,E0599
/// # use fused_moe::*;
/// fn total(arrived: &Arrived<'_>) -> Result<usize, ViewError> {
///     match arrived {
///         Arrived::Standard { rows, .. } => rows.on_host(),
///         Arrived::Batched { tokens } => tokens.on_host(),
///     }
/// }
/// ```
pub const COUNTS_FOR_A_TOTAL: () = ();
