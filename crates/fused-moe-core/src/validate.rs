//! The checks that every round begins with, so that no backend needs its own.

use half::{bf16, f16};

use crate::config::MoeConfig;
use crate::dtype::{DType, DeviceKind};
use crate::error::Source;
use crate::fault::Fault;
use crate::placement::NO_EXPERT;
use crate::prepare_finalize::{MonolithicInput, PrepareInput};
use crate::quantization::ScaleSource;
use crate::tensor::TensorView;

/// A fault for the peers, and what only this rank can say about it.
pub(crate) type Refusal = (Fault, Option<Source>);

/// A tensor that is not what the stage needs.
#[derive(Debug, thiserror::Error)]
#[error("{tensor} is {found_dims:?} of {found}, needs {wanted_dims:?} of {wanted}")]
pub(crate) struct Misfit {
    tensor: &'static str,
    found_dims: Vec<usize>,
    found: DType,
    wanted_dims: Vec<usize>,
    wanted: DType,
}

/// Checks shape and element type of a tensor of a call.
pub(crate) fn fits(
    tensor: &'static str,
    view: TensorView<'_>,
    wanted_dims: &[usize],
    wanted: DType,
) -> Result<(), Misfit> {
    if view.dims() == wanted_dims && view.dtype() == wanted {
        return Ok(());
    }
    Err(Misfit {
        tensor,
        found_dims: view.dims().to_vec(),
        found: view.dtype(),
        wanted_dims: wanted_dims.to_vec(),
        wanted,
    })
}

fn bad_tensor(why: impl Into<Source>) -> Refusal {
    (Fault::BadTensor, Some(why.into()))
}

/// Checks that a tensor of a call lies where the layer runs. An empty one lies nowhere.
fn lies_there(config: &MoeConfig, tensor: &'static str, view: TensorView<'_>) -> Result<(), Refusal> {
    let device = view.device();
    if device.kind == config.device || view.layout().num_elements() == 0 {
        return Ok(());
    }
    Err(bad_tensor(format!("the {tensor} lie on {device}, the layer runs on {:?}", config.device)))
}

/// Checks what a modular round starts with. Values are read only where they lie on the host.
pub(crate) fn prepare_input(config: &MoeConfig, input: &PrepareInput<'_>) -> Result<(), Refusal> {
    let tokens = hidden(config, input.hidden)?;
    static_scale(config, input.input_scale)?;
    let dims = [tokens, config.top_k];
    fits("top-k ids", input.topk.ids, &dims, DType::I32).map_err(bad_tensor)?;
    fits("top-k weights", input.topk.weights, &dims, DType::F32).map_err(bad_tensor)?;
    lies_there(config, "top-k ids", input.topk.ids)?;
    lies_there(config, "top-k weights", input.topk.weights)?;
    if input.topk.ids.device().kind != DeviceKind::Host {
        return Ok(());
    }
    for token in 0..tokens {
        let ids = input.topk.ids.row::<i32>(token).map_err(bad_tensor)?;
        let weights = input.topk.weights.row::<f32>(token).map_err(bad_tensor)?;
        for (slot, &id) in ids.iter().enumerate() {
            if id == NO_EXPERT {
                continue;
            }
            if usize::try_from(id).map_or(true, |id| id >= config.num_experts()) {
                return Err((Fault::ExpertIdOutOfRange { token: token as u32, slot: slot as u32, id }, None));
            }
            if ids[..slot].contains(&id) {
                return Err((Fault::DuplicateExpertId { token: token as u32, id }, None));
            }
        }
        if let Some(slot) = weights.iter().position(|w| !w.is_finite()) {
            return Err((Fault::NonFiniteWeight { token: token as u32, slot: slot as u32 }, None));
        }
    }
    Ok(())
}

/// Checks what a monolithic round starts with. Values are read only where they lie on the host.
pub(crate) fn monolithic_input(config: &MoeConfig, input: &MonolithicInput<'_>) -> Result<(), Refusal> {
    let tokens = hidden(config, input.hidden)?;
    static_scale(config, input.input_scale)?;
    let dims = [tokens, config.num_experts()];
    fits("router logits", input.logits, &dims, DType::F32).map_err(bad_tensor)?;
    lies_there(config, "router logits", input.logits)?;
    if input.logits.device().kind != DeviceKind::Host {
        return Ok(());
    }
    for token in 0..tokens {
        let logits = input.logits.row::<f32>(token).map_err(bad_tensor)?;
        if let Some(expert) = logits.iter().position(|l| l.is_nan()) {
            return Err((Fault::NonFiniteLogit { token: token as u32, expert: expert as u32 }, None));
        }
    }
    Ok(())
}

/// Checks the static scale of a scheme that has one.
fn static_scale(config: &MoeConfig, scale: Option<f32>) -> Result<(), Refusal> {
    if config.quant.fp8().is_none() || config.quant.scale_source() == ScaleSource::Dynamic {
        return Ok(());
    }
    match scale {
        Some(scale) if scale > 0.0 && scale.is_finite() && (1.0 / scale).is_finite() => Ok(()),
        Some(scale) => Err(bad_tensor(format!("the static input scale {scale:e} is not usable"))),
        None => Err(bad_tensor(format!("{} needs the static input scale of the layer", config.quant))),
    }
}

fn hidden(config: &MoeConfig, view: TensorView<'_>) -> Result<usize, Refusal> {
    let tokens = view.dims()[0];
    fits("hidden states", view, &[tokens, config.hidden], config.in_dtype).map_err(bad_tensor)?;
    lies_there(config, "hidden states", view)?;
    if tokens > config.max_tokens_per_rank {
        let max = config.max_tokens_per_rank as u32;
        return Err((Fault::TooManyTokens { tokens: tokens as u32, max }, None));
    }
    if view.device().kind != DeviceKind::Host {
        return Ok(tokens);
    }
    for token in 0..tokens {
        let bad = match view.dtype() {
            DType::F32 => first_from(view, token, 0, |x: &f32| x.is_finite()),
            DType::F16 => first_from(view, token, 0, |x: &f16| x.is_finite()),
            _ => first_from(view, token, 0, |x: &bf16| x.is_finite()),
        };
        if let Some(element) = bad.map_err(bad_tensor)? {
            return Err((Fault::NonFiniteHidden { token: token as u32, element: element as u32 }, None));
        }
        let used = config.hidden - config.padding.hidden;
        let padding = match view.dtype() {
            DType::F32 => first_from(view, token, used, |x: &f32| *x == 0.0),
            DType::F16 => first_from(view, token, used, |x: &f16| *x == f16::ZERO),
            _ => first_from(view, token, used, |x: &bf16| *x == bf16::ZERO),
        };
        if let Some(element) = padding.map_err(bad_tensor)? {
            let why = format!("hidden state {element} of token {token} is padding and not zero");
            return Err(bad_tensor(why));
        }
    }
    Ok(tokens)
}

/// The first element of a row, from element `from` on, that is not `fine`.
fn first_from<T: crate::Element>(
    view: TensorView<'_>,
    token: usize,
    from: usize,
    fine: impl Fn(&T) -> bool,
) -> Result<Option<usize>, crate::ViewError> {
    let row = &view.row::<T>(token)?[from..];
    // The common case first: a branch-free sweep that vectorises, then the search for the position.
    if row.iter().map(&fine).fold(true, |all, ok| all & ok) {
        return Ok(None);
    }
    Ok(row.iter().position(|x| !fine(x)).map(|element| from + element))
}
