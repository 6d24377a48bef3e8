//! From finished sums to result rows: scales, router weights, biases, activation.

use crate::Activation;
use crate::activation::{gelu, gelu_tanh, silu, silu_clamped, swiglu_oai};
use crate::panel::PANEL;

/// What a call stores of its products.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Epilogue {
    /// The products, N columns. For plainly packed weights.
    Products,
    /// `activation(gate, up)`, N / 2 columns. For weights packed as gate/up pairs.
    GateUp(Activation),
}

impl Epilogue {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Epilogue::Products => "products",
            Epilogue::GateUp(_) => "an activation of gate and up",
        }
    }
}

/// What makes a row of results out of finished sums.
pub(crate) struct RowTerms<'a> {
    /// Weight scale of each packed column.
    pub(crate) scales: Option<&'a [f32]>,
    /// Activation scale of the row.
    pub(crate) activation: Option<f32>,
    /// Router weight of the row.
    pub(crate) router: Option<f32>,
    /// Bias of each packed column.
    pub(crate) bias: Option<&'a [f32]>,
}

impl RowTerms<'_> {
    /// Scales, then the router weight and the bias: in this order before an activation, where the weight stands for
    /// one on the input, and the other way round where the sums are the results.
    #[inline(always)]
    pub(crate) fn apply(&self, epilogue: Epilogue, sums: &mut [f32]) {
        if let Some(scales) = self.scales {
            for (sum, scale) in sums.iter_mut().zip(scales) {
                *sum *= scale;
            }
        }
        multiply(sums, self.activation);
        match epilogue {
            Epilogue::Products => {
                self.add_bias(sums);
                multiply(sums, self.router);
            }
            Epilogue::GateUp(_) => {
                multiply(sums, self.router);
                self.add_bias(sums);
            }
        }
    }

    #[inline(always)]
    fn add_bias(&self, sums: &mut [f32]) {
        if let Some(bias) = self.bias {
            for (sum, bias) in sums.iter_mut().zip(bias) {
                *sum += bias;
            }
        }
    }
}

#[inline(always)]
fn multiply(sums: &mut [f32], factor: Option<f32>) {
    if let Some(factor) = factor {
        for sum in sums.iter_mut() {
            *sum *= factor;
        }
    }
}

/// Replaces each panel of 32 gate and 32 up values by its 32 results, moved to the front of `sums`.
#[inline(always)]
pub(crate) fn join_gate_up(activation: Activation, sums: &mut [f32]) {
    match activation {
        Activation::Silu => join(sums, |gate, up| silu(gate) * up),
        Activation::Gelu => join(sums, |gate, up| gelu(gate) * up),
        Activation::GeluTanh => join(sums, |gate, up| gelu_tanh(gate) * up),
        Activation::SwigluOai { alpha, limit } => {
            join(sums, |gate, up| swiglu_oai(gate, up, [alpha, limit]));
        }
        Activation::SiluClamped { limit } => join(sums, |gate, up| silu_clamped(gate, up, limit)),
    }
}

#[inline(always)]
fn join(sums: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    const HALF: usize = PANEL / 2;
    for panel in 0..sums.len() / PANEL {
        let mut joined = [0.0; HALF];
        let pair = &sums[panel * PANEL..][..PANEL];
        for (i, joined) in joined.iter_mut().enumerate() {
            *joined = f(pair[i], pair[HALF + i]);
        }
        sums[panel * HALF..][..HALF].copy_from_slice(&joined);
    }
}
