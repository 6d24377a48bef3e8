//! What a call has received, as gemm1 reads it.

use fused_moe_core::{Arrived, Dispatched, NO_EXPERT, ReceivedRows, TensorView, TopK, WireFormat};

use super::error::ExpertsError;
use super::layout::WeightLayout;
use super::quantize::Codes;
use super::rows::Pitched;
use super::scheme::Scheme;
use crate::Activations;

/// The rows that a call has received in the standard format.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// `[max_rows, hidden]` in the wire format.
    pub hidden: TensorView<'a>,
    /// Their scales, if the wire has some.
    pub scale: Option<TensorView<'a>>,
    /// Valid rows.
    pub rows: usize,
}

impl<'a> Received<'a> {
    /// `hidden` with the first `rows` of `max` rows valid. The count is checked before anything is computed from it.
    ///
    /// # Errors
    /// [`ExpertsError::View`] for a count in device memory, [`ExpertsError::TooManyRows`].
    pub fn new(
        hidden: TensorView<'a>,
        scale: Option<TensorView<'a>>,
        rows: ReceivedRows<'_>,
        max: usize,
    ) -> Result<Self, ExpertsError> {
        let rows = rows.on_host()?;
        if rows > max {
            Err(ExpertsError::TooManyRows { rows, max })
        } else {
            Ok(Self { hidden, scale, rows })
        }
    }

    /// What was dispatched in the standard format, at most `max` rows, with its routing.
    ///
    /// # Errors
    /// As [`Received::new`], and [`ExpertsError::Tensor`] for batches.
    pub fn standard(input: &Dispatched<'a>, max: usize) -> Result<(Self, TopK<'a>), ExpertsError> {
        let Arrived::Standard { topk, rows } = input.arrived else {
            let (tensor, wanted) = ("the received batch", "[rows, hidden] with top-k".into());
            let found = "one batch per expert".into();
            return Err(ExpertsError::Tensor { tensor, wanted, found });
        };
        Ok((Self::new(input.hidden, input.scale, rows, max)?, topk))
    }

    /// The rows as the GEMMs of `layout` read them: as they arrived in `wire`, or quantised into `codes`, by
    /// `input_scale` if the scheme has one.
    ///
    /// # Errors
    /// [`ExpertsError::Tensor`] for tensors that are not of `wire`, and those of [`Scheme::activations`].
    pub fn activations(
        &self,
        layout: &WeightLayout,
        wire: WireFormat,
        input_scale: f32,
        codes: Codes<'a>,
    ) -> Result<Activations<'a>, ExpertsError> {
        const HIDDEN: &str = "the received tensor";
        let dims = [self.rows, layout.hidden];
        if self.hidden.dtype() != wire.payload {
            return Err(ExpertsError::tensor(HIDDEN, &self.hidden, wire.payload.to_string()));
        }
        check_scale(wire, self.scale)?;
        match (layout.scheme, self.scale) {
            (Scheme::Fp8(fp8), Some(scales)) => {
                let hidden = Pitched::new(HIDDEN, self.hidden, dims)?;
                let per_row = fp8.scaling.scales_per_row(layout.hidden);
                Ok(fp8.arrived(hidden, Pitched::new(SCALES, scales, [self.rows, per_row])?, codes))
            }
            (scheme, _) => scheme.activations(Pitched::new(HIDDEN, self.hidden, dims)?, input_scale, codes),
        }
    }
}

/// The received scales as errors name them.
pub const SCALES: &str = "the received scale tensor";

/// Checks that scales are there exactly when `wire` has some.
///
/// # Errors
/// [`ExpertsError::Tensor`].
pub fn check_scale(wire: WireFormat, scale: Option<TensorView<'_>>) -> Result<(), ExpertsError> {
    if scale.is_some() == wire.scale.is_some() {
        return Ok(());
    }
    let [wanted, found] = [wire.scale.is_some(), scale.is_some()]
        .map(|is_there| if is_there { "there" } else { "absent" }.to_string());
    Err(ExpertsError::Tensor { tensor: SCALES, wanted, found })
}

/// Calls `pair(slot, expert)` for the slots of row `row` whose expert `local` finds on this rank, and checks all its
/// ids against `num_experts`. Slots of -1 are passed over.
///
/// # Errors
/// [`ExpertsError::ExpertId`], and [`ExpertsError::DuplicateExpertId`] of a local expert.
pub fn visit_local<E>(
    (row, ids): (usize, &[i32]),
    num_experts: usize,
    local: impl Fn(i32) -> Option<E>,
    mut pair: impl FnMut(usize, E),
) -> Result<(), ExpertsError> {
    for (slot, &id) in ids.iter().enumerate() {
        if id != NO_EXPERT && usize::try_from(id).map_or(true, |id| id >= num_experts) {
            return Err(ExpertsError::ExpertId { row, slot, id, num_experts });
        }
        let Some(expert) = local(id) else { continue };
        if ids[..slot].contains(&id) {
            return Err(ExpertsError::DuplicateExpertId { row, id });
        }
        pair(slot, expert);
    }
    Ok(())
}
