//! gemm1, activation, requantisation and gemm2 as plain loops over (row, expert) pairs.

use fused_moe_core::{
    Activation, Arena, DType, Dispatched, Fp8Format, Granularity, MoeConfig, QuantScheme, Source, TensorView,
    TensorViewMut, ViewError,
};
use half::bf16;
use quant::{Activations, Quantizer, decode_table};

use super::slip::Slip;
use super::weights::PackedExperts;
use crate::bound::nearest;
use crate::oracle::{activate, fp4};

/// One row that one local expert works on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair {
    /// Row of the input.
    pub(super) row: usize,
    /// Local expert.
    pub(super) expert: usize,
    /// Factor on gemm1's result: the routing weight where it is applied on the input, 1 otherwise.
    pub(super) early: f32,
}

/// Sizes and scheme of the computation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Compute {
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) quant: QuantScheme,
    pub(super) activation: Activation,
    /// Most rows of the input.
    pub(super) max_rows: usize,
    /// Most pairs.
    pub(super) max_pairs: usize,
    /// What is wrong with it.
    pub(super) slip: Option<Slip>,
}

impl Compute {
    pub(super) fn new(config: &MoeConfig, max_rows: usize, max_pairs: usize) -> Self {
        let MoeConfig { hidden, intermediate, quant, activation, .. } = *config;
        Self { hidden, intermediate, quant, activation, max_rows, max_pairs, slip: None }
    }

    /// Bytes of workspace for the largest batch.
    pub(super) fn workspace_bytes(&self) -> usize {
        let Self { hidden, intermediate, max_rows, max_pairs, .. } = *self;
        Arena::bytes_for::<bf16>(max_rows * hidden)
            + Arena::bytes_for::<f32>(max_rows * hidden)
            + Arena::bytes_for::<bf16>(max_pairs * intermediate)
            + Arena::bytes_for::<f32>(max_pairs * intermediate)
            + Arena::bytes_for::<f32>(max_pairs * hidden)
    }

    /// The valid rows of a dispatched batch in f32, quantised on the way unless they arrived so. `valid` are their
    /// positions in `[rows, hidden]`.
    pub(super) fn arrived<'w>(
        &self,
        (input, input_scale): (&Dispatched<'_>, Option<f32>),
        valid: &[usize],
        arena: &mut Arena<'w>,
    ) -> Result<&'w [f32], Source> {
        let scales = match input.scale {
            Some(view) => Some(view.as_slice::<f32>()?),
            None => None,
        };
        self.rows((input.hidden, scales, input_scale), valid, arena)
    }

    /// As [`Compute::arrived`] on the payload and scales themselves.
    pub(super) fn rows<'w>(
        &self,
        (payload, scales, input_scale): (TensorView<'_>, Option<&[f32]>, Option<f32>),
        valid: &[usize],
        arena: &mut Arena<'w>,
    ) -> Result<&'w [f32], Source> {
        let hidden = self.hidden;
        let kept = arena.take::<bf16>(self.max_rows * hidden)?;
        let values = &mut arena.take::<f32>(self.max_rows * hidden)?[..valid.len() * hidden];
        match (self.quant.fp8(), scales) {
            (Some(format), Some(scales)) => {
                let codes = payload.as_slice::<u8>()?;
                let granularity = self.quant.activation_granularity().unwrap_or(Granularity::Token);
                let per_row = granularity.scales_per_token(hidden);
                for (out, &row) in values.chunks_exact_mut(hidden).zip(valid) {
                    let (codes, scales) =
                        (&codes[row * hidden..][..hidden], &scales[row * per_row..][..per_row]);
                    dequantize(format, granularity, (codes, scales), out);
                }
            }
            _ => {
                let rows = payload.as_slice::<bf16>()?;
                for (kept, &row) in kept.chunks_exact_mut(hidden).zip(valid) {
                    kept.copy_from_slice(&rows[row * hidden..][..hidden]);
                }
                self.through_codes((&kept[..valid.len() * hidden], input_scale), hidden, values)?;
            }
        }
        Ok(values)
    }

    /// Outputs of all pairs, `[pairs, hidden]`, unweighted.
    pub(super) fn run<'w>(
        &self,
        packed: &PackedExperts,
        x: &[f32],
        pairs: &[Pair],
        arena: &mut Arena<'w>,
    ) -> Result<&'w [f32], Source> {
        let Self { hidden, intermediate, slip, .. } = *self;
        let activated = &mut arena.take::<bf16>(self.max_pairs * intermediate)?[..pairs.len() * intermediate];
        let inputs = &mut arena.take::<f32>(self.max_pairs * intermediate)?[..pairs.len() * intermediate];
        let outputs = &mut arena.take::<f32>(self.max_pairs * hidden)?[..pairs.len() * hidden];
        let (mut gate_row, mut up_row) = (vec![0.0; hidden], vec![0.0; hidden]);
        let mut down_row = vec![0.0; intermediate];
        let unrounded_len = if slip.is_some_and(Slip::reads_unrounded) { activated.len() } else { 0 };
        let mut unrounded = vec![0f32; unrounded_len];
        let of_expert = |expert: usize| pairs.iter().enumerate().filter(move |(_, p)| p.expert == expert);

        for (expert, [gate, up, _]) in packed.experts.iter().enumerate() {
            if of_expert(expert).next().is_none() {
                continue;
            }
            for column in 0..intermediate {
                gate.row(column, &mut gate_row);
                up.row(column, &mut up_row);
                for (index, pair) in of_expert(expert) {
                    let x = &x[pair.row * hidden..][..hidden];
                    let (g, u) = (pair.early * dot(x, &gate_row), pair.early * dot(x, &up_row));
                    let (g, u) = (g + gate.bias(column), u + up.bias(column));
                    let (g, u) = slip.map_or((g, u), |slip| slip.gate_up(g, u));
                    let value = activate(self.activation, f64::from(g), f64::from(u));
                    let value = slip.map_or(value, |slip| slip.activation(value));
                    activated[index * intermediate + column] = nearest(value);
                    if let Some(unrounded) = unrounded.get_mut(index * intermediate + column) {
                        *unrounded = value as f32;
                    }
                }
            }
        }
        match slip.filter(|slip| slip.reads_unrounded()) {
            Some(slip) => slip.requantize(self.quant, (&unrounded, activated), intermediate, inputs),
            None => self.through_codes((activated, packed.input_scales[1]), intermediate, inputs)?,
        }
        for (expert, [_, _, down]) in packed.experts.iter().enumerate() {
            if of_expert(expert).next().is_none() {
                continue;
            }
            for column in 0..hidden {
                down.row(column, &mut down_row);
                for (index, _) in of_expert(expert) {
                    let x = &inputs[index * intermediate..][..intermediate];
                    let output = dot(x, &down_row) + down.bias(column);
                    outputs[index * hidden + column] = slip.map_or(output, |slip| slip.output(output));
                }
            }
        }
        Ok(outputs)
    }

    /// Writes the sums of each row's pairs, weighted by `late`, to the first `count` rows of `out`. Pairs are in
    /// order of their rows and, within a row, of its slots.
    pub(super) fn write_sums(
        &self,
        (outputs, pairs, late): (&[f32], &[Pair], &[f32]),
        count: usize,
        out: &mut TensorViewMut<'_>,
    ) -> Result<(), ViewError> {
        let mut sums = vec![0f32; self.hidden];
        let mut done = 0;
        for row in 0..count {
            sums.fill(0.0);
            while pairs.get(done).is_some_and(|pair| pair.row == row) {
                let output = &outputs[done * self.hidden..][..self.hidden];
                sums.iter_mut().zip(output).for_each(|(sum, y)| *sum += late[done] * y);
                done += 1;
            }
            store(out, row, &sums)?;
        }
        Ok(())
    }

    /// Rows as the next GEMM sees them: quantised and back.
    fn through_codes(
        &self,
        (rows, input_scale): (&[bf16], Option<f32>),
        width: usize,
        out: &mut [f32],
    ) -> Result<(), Source> {
        if self.quant == QuantScheme::Nvfp4 {
            let global = input_scale.ok_or("the weights have no input scale")?;
            let values = fp4::nv_rows(rows, width, global);
            out.iter_mut().zip(values).for_each(|(out, x)| *out = x as f32);
            return Ok(());
        }
        let (Some(format), Some(granularity)) = (self.quant.fp8(), self.quant.activation_granularity())
        else {
            out.iter_mut().zip(rows).for_each(|(out, x)| *out = x.to_f32());
            return Ok(());
        };
        let count = rows.len() / width;
        let view = TensorView::from_slice(rows, DType::Bf16, &[count, width])?;
        let (mut codes, mut scales) =
            (vec![0; rows.len()], vec![0.0; count * granularity.scales_per_token(width)]);
        Quantizer::for_scheme(self.quant).quantize_rows(
            Activations::of(view).scaled(input_scale),
            &mut codes,
            &mut scales,
        )?;
        let rows = codes.chunks_exact(width).zip(scales.chunks_exact(granularity.scales_per_token(width)));
        for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
            dequantize(format, granularity, row, out);
        }
        Ok(())
    }
}

fn dequantize(
    format: Fp8Format,
    granularity: Granularity,
    (codes, scales): (&[u8], &[f32]),
    out: &mut [f32],
) {
    let group = match granularity {
        Granularity::Group(n) => n.get(),
        _ => codes.len().max(1),
    };
    let table = decode_table(format);
    for ((codes, out), scale) in codes.chunks(group).zip(out.chunks_mut(group)).zip(scales) {
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = table[usize::from(code)] * scale);
    }
}

/// Sum of products in sixteen lanes, which the compiler vectorises.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((lane, x), y) in lanes.iter_mut().zip(a).zip(b) {
            *lane += x * y;
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// Writes a row of f32 sums to row `row` of an output in bf16 or f32.
pub(super) fn store(out: &mut TensorViewMut<'_>, row: usize, sums: &[f32]) -> Result<(), ViewError> {
    if out.dtype() == DType::F32 {
        out.row_mut::<f32>(row)?.copy_from_slice(sums);
    } else {
        let row = out.row_mut::<bf16>(row)?;
        row.iter_mut().zip(sums).for_each(|(out, &x)| *out = bf16::from_f32(x));
    }
    Ok(())
}
