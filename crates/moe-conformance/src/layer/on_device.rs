//! A round whose tensors lie on a device: once as it is, and once more from a graph that was recorded on other tokens.

use fused_moe_core::{Call, DType, ExpertWeights, FusedMoEKernel, Overlap, Source, TensorView, TopK};

use crate::case::{Case, RankInput};
use crate::device::{Bytes, Placed, TestDevice, on_device};
use crate::outcome::{Check, Outcome, chain, fail};

/// All bits set: NaN in every float, −1 in every integer.
const POISON: u8 = 0xff;

/// The caller's tensors.
struct Tensors {
    hidden: Placed,
    ids: Placed,
    weights: Placed,
    out: Placed,
}

/// Runs `input` and returns its outputs.
pub(super) fn round(
    device: &dyn TestDevice,
    case: &Case,
    kernel: &mut FusedMoEKernel,
    weights: &ExpertWeights,
    (input, in_bf16): (&RankInput, bool),
) -> Check<Vec<f32>> {
    let FusedMoEKernel::Modular(kernel) = kernel else {
        return fail("on devices the suite runs modular layers");
    };
    let (tokens, slots) = (input.num_tokens, [input.num_tokens, case.top_k]);
    let dims = [tokens, case.hidden];
    let out_dtype = if in_bf16 { DType::Bf16 } else { DType::F32 };
    let contents = [input.hidden.to_bytes(), input.ids.to_bytes(), input.weights.to_bytes()];
    let mut tensors = Tensors {
        hidden: Placed::upload(device, &contents[0], (DType::Bf16, &dims))?,
        ids: Placed::upload(device, &contents[1], (DType::I32, &slots))?,
        weights: Placed::upload(device, &contents[2], (DType::F32, &slots))?,
        out: Placed::filled(device, POISON, (out_dtype, &dims))?,
    };
    let mut overlapped = (0, 0);
    let mut apply = |tensors: &mut Tensors, overlapped: &mut (usize, usize)| -> Result<(), Source> {
        let Tensors { hidden, ids, weights: routing_weights, out } = tensors;
        let mut count_dispatch = |_| {
            overlapped.0 += 1;
            Ok(())
        };
        let mut count_combine = |_| {
            overlapped.1 += 1;
            Ok(())
        };
        let overlap = Overlap { dispatch: Some(&mut count_dispatch), combine: Some(&mut count_combine) };
        kernel.apply(Call {
            stream: device.stream(),
            weights,
            hidden: view(hidden)?,
            routing: TopK { ids: view(ids)?, weights: view(routing_weights)? },
            overlap,
            out: out.view_mut().map_err(text)?,
        })?;
        Ok(())
    };
    if let Err(error) = apply(&mut tensors, &mut overlapped) {
        return fail(chain(&*error));
    }
    if overlapped != (1, 1) {
        return fail(format!(
            "overlapped work ran {} and {} times, not once each",
            overlapped.0, overlapped.1
        ));
    }
    let eager = tensors.out.download(device)?;
    let poison = vec![POISON; eager.len()];

    // What is recorded is where things are, not what they are.
    tensors.out.write(device, &poison)?;
    tensors.hidden.write(device, &vec![0; contents[0].len()])?;
    tensors.ids.write(device, &vec![POISON; contents[1].len()])?;
    let recorded = device.record(&mut || apply(&mut tensors, &mut overlapped));
    let graph = recorded.or_else(|e| fail(format!("the call cannot be recorded: {}", chain(&*e))))?;
    if tensors.out.download(device)? != poison {
        return fail("a recorded call has run");
    }
    tensors.hidden.write(device, &contents[0])?;
    tensors.ids.write(device, &contents[1])?;
    on_device(graph.replay())?;
    if tensors.out.download(device)? != eager {
        return fail("a replay on the same tokens gives other bits");
    }
    let Tensors { hidden, ids, weights, .. } = &tensors;
    for ((name, tensor), before) in
        [("hidden states", hidden), ("ids", ids), ("weights", weights)].into_iter().zip(&contents)
    {
        if tensor.download(device)? != *before {
            return fail(format!("the caller's {name} were changed"));
        }
    }
    Ok(match in_bf16 {
        true => eager.as_chunks().0.iter().map(|&x| half::bf16::from_ne_bytes(x).to_f32()).collect(),
        false => eager.as_chunks().0.iter().map(|&x| f32::from_ne_bytes(x)).collect(),
    })
}

fn view(placed: &Placed) -> Result<TensorView<'_>, Source> {
    placed.view().map_err(text)
}

fn text(outcome: Outcome) -> Source {
    outcome.to_string().into()
}
