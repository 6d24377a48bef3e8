//! The contract in f64, written for reading: dequantised operands, one (token, slot) at a time.

use fused_moe_core::{Fp8Format, MoeConfig, QuantScheme, Rank};
use half::bf16;

use super::{Arrival, Batch, Layer, Matrix, source_ranks};

/// Something to leave out or to get wrong, to see that a test would notice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    SwappedGateUp,
    NoSecondQuantisation,
    NoRouterWeight,
    WrongInputScale,
}

/// What the experts must return.
pub struct Expected {
    /// `[rows, hidden]`.
    pub out: Vec<f64>,
    /// Scale groups of the second quantisation, and those whose scale hangs on the last bits of a f32 sum: their
    /// largest magnitude lies where bf16 rounds up or down.
    pub groups: usize,
    pub ambiguous: usize,
}

impl Expected {
    /// Whether a different order of summation could give visibly different codes.
    pub fn is_ambiguous(&self, quant: QuantScheme) -> bool {
        let most = if matches!(quant, QuantScheme::Fp8PerTensor(_)) { 0 } else { self.groups / 50 };
        self.ambiguous > most
    }

    pub fn of(
        config: &MoeConfig,
        (layer, rank): (&Layer, Rank),
        batch: &Batch,
        (arrival, fault): (Arrival, Fault),
    ) -> Self {
        let (hidden, top_k, quant) = (config.hidden, config.top_k, config.quant);
        let x: Vec<f64> = batch.x[..batch.rows * hidden].iter().map(|v| v.to_f64()).collect();
        let sources = match arrival {
            Arrival::Quantised => source_ranks(batch.rows).to_vec(),
            Arrival::Bf16 => std::iter::once(0..batch.rows).collect(),
        };
        let mut x_hat = Vec::new();
        for rows in sources {
            x_hat.extend(quantised(quant, &x[rows.start * hidden..rows.end * hidden], hidden).0);
        }
        if fault == Fault::WrongInputScale {
            // What a misread scale does: rows are off by a factor.
            x_hat.iter_mut().for_each(|x| *x *= 1.1);
        }
        let pairs: Vec<(usize, usize, usize)> = (0..batch.rows * top_k)
            .filter_map(|slot| {
                let id = usize::try_from(batch.ids[slot]).ok()?;
                (config.placement.owners()[id] == rank).then_some((slot / top_k, slot, id))
            })
            .collect();
        let activated = pairs.iter().flat_map(|&(row, _, id)| {
            let expert = &layer.experts[id];
            let x = &x_hat[row * hidden..][..hidden];
            let (mut gate, mut up) = (product(&expert.gate, x), product(&expert.up, x));
            if fault == Fault::SwappedGateUp {
                std::mem::swap(&mut gate, &mut up);
            }
            gate.into_iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>()
        });
        let activated: Vec<f64> = activated.collect();
        let (mut groups, mut ambiguous) = (0, 0);
        for group in groups_of(quant, &activated, config.intermediate) {
            let amax = group.iter().fold(0.0f64, |a, &b| a.max(b.abs()));
            let near = |factor: f64| bf16::from_f64(amax * factor).to_bits();
            groups += 1;
            ambiguous += usize::from(near(1.0 - 4e-6) != near(1.0 + 4e-6));
        }
        let rounded: Vec<f64> = activated.iter().map(|&a| bf16::from_f32(a as f32).to_f64()).collect();
        let a_hat = match fault {
            Fault::NoSecondQuantisation => rounded,
            _ => quantised(quant, &rounded, config.intermediate).0,
        };
        let mut out = vec![0.0; batch.rows * hidden];
        for (pair, &(row, slot, id)) in pairs.iter().enumerate() {
            let weight = if fault == Fault::NoRouterWeight { 0.4 } else { f64::from(batch.weights[slot]) };
            let a = &a_hat[pair * config.intermediate..][..config.intermediate];
            let y = product(&layer.experts[id].down, a);
            for (out, y) in out[row * hidden..][..hidden].iter_mut().zip(y) {
                *out += weight * y;
            }
        }
        Expected { out, groups, ambiguous }
    }
}

fn product(weight: &Matrix, x: &[f64]) -> Vec<f64> {
    let rows = weight.values.chunks(weight.dims[1]);
    rows.map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

/// Values that share a scale: 1x128 of a row, a row, or all rows.
fn groups_of(quant: QuantScheme, x: &[f64], columns: usize) -> Vec<&[f64]> {
    match quant {
        QuantScheme::Unquantized => vec![],
        QuantScheme::Fp8Block(_) => x.chunks(columns).flat_map(|row| row.chunks(128)).collect(),
        QuantScheme::Fp8Ptpc(_) => x.chunks(columns).collect(),
        _ => vec![x],
    }
}

/// `x` after quantisation and dequantisation, and the scales.
fn quantised(quant: QuantScheme, x: &[f64], columns: usize) -> (Vec<f64>, Vec<f32>) {
    let Some(format) = quant.fp8() else { return (x.to_vec(), vec![]) };
    let (mut values, mut scales) = (Vec::new(), Vec::new());
    for group in groups_of(quant, x, columns) {
        let scale = scale_of(format, group);
        scales.push(scale);
        let inverse = 1.0 / scale;
        values.extend(group.iter().map(|&x| {
            let code = quant::encode(format, x as f32 * inverse);
            f64::from(quant::decode(format, code)) * f64::from(scale)
        }));
    }
    (values, scales)
}

fn scale_of(format: Fp8Format, group: &[f64]) -> f32 {
    let amax = group.iter().fold(1e-10f32, |a, &b| a.max(b.abs() as f32));
    amax * (1.0 / format.max())
}
