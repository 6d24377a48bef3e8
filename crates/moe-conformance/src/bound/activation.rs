//! How far an activation computed in f32 may be from the exact one.

use fused_moe_core::Activation;

use super::sums::{Bounded, U};

/// Unit roundoffs of `σ(t)` for small `t`: an exponential within 2 ulp, a sum, a quotient, and products around it.
const SIGMOID: f64 = 8.0;

/// Largest slope of both forms of GELU.
const GELU_SLOPE: f64 = 1.13;

/// The bound of `act(gate, up)`, whose exact value is `value`; NaN for an activation that is not known.
///
/// All activations are `A(gate) · B(up)` with `B` linear or clamped, so to first order the error is
/// `|A′| · |B| · e_gate + |A| · |B′| · e_up + u · c · |A · B|`; the second order is added.
pub(crate) fn activated(activation: Activation, gate: Bounded, up: Bounded, value: f64) -> Bounded {
    let (a, b) = match activation {
        Activation::Silu => (gated(gate, 1.0, f64::INFINITY), linear(up, 0.0)),
        Activation::Gelu | Activation::GeluTanh => (gelu(gate), linear(up, 0.0)),
        Activation::SwigluOai { alpha, limit } => {
            let limit = f64::from(limit);
            (gated(gate, f64::from(alpha), limit), linear(clamped(up, limit), 1.0))
        }
        Activation::SiluClamped { limit } => {
            let limit = f64::from(limit);
            (gated(gate, 1.0, limit), linear(clamped(up, limit), 0.0))
        }
        _ => (Bounded { value: f64::NAN, error: f64::NAN }, up),
    };
    let error = a.error * b.value.abs() + a.value.abs() * b.error + a.error * b.error;
    Bounded { value, error: error + 2.0 * U * value.abs() }
}

/// `g · σ(alpha · g)` with `g = min(gate, limit)`.
fn gated(gate: Bounded, alpha: f64, limit: f64) -> Bounded {
    let g = gate.value.min(limit);
    let off = if gate.value - gate.error > limit { 0.0 } else { gate.error };
    let t = alpha * g;
    let sigmoid = 1.0 / (1.0 + (-t).exp());
    let slope = (sigmoid * (1.0 + t * (1.0 - sigmoid))).abs();
    let value = g * sigmoid;
    // e^(−t) as a power of two is off by |t| roundoffs, which count as far as e^(−t) does against 1.
    let relative = SIGMOID + 2.0 * t.abs() * (1.0 - sigmoid);
    Bounded { value, error: (slope + alpha.max(1.0) * off) * off + relative * U * value.abs() }
}

/// `g · Φ(g)` in either form, of which only bounds are needed: f32 error functions and hyperbolic tangents are off
/// by a few roundoffs of 1, not of a small result.
fn gelu(gate: Bounded) -> Bounded {
    let magnitude = gate.value.abs();
    // |g| · Φ(g) ≤ |g|, and below −4 it is nothing.
    let value = if gate.value < -4.0 { 4e-5 * magnitude } else { magnitude };
    Bounded { value, error: GELU_SLOPE * gate.error + SIGMOID * U * magnitude }
}

fn clamped(up: Bounded, limit: f64) -> Bounded {
    let outside = up.value.abs() - up.error > limit;
    Bounded { value: up.value.clamp(-limit, limit), error: if outside { 0.0 } else { up.error } }
}

/// `up + shift`.
fn linear(up: Bounded, shift: f64) -> Bounded {
    let value = up.value + shift;
    Bounded { value, error: up.error + if shift == 0.0 { 0.0 } else { U * value.abs() } }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silu(gate: f32, up: f32) -> f32 {
        gate / (1.0 + (-gate).exp()) * up
    }

    #[test]
    fn f32_activations_of_inexact_operands_are_within_the_bound() {
        let mut used = 0f64;
        for i in -3000..3000 {
            let (gate, up) = (f64::from(i) * 0.011, f64::from((i * 37) % 101 - 50) * 0.13);
            let off = 40.0 * U * (1.0 + gate.abs());
            let (gate, up) = (Bounded { value: gate, error: off }, Bounded { value: up, error: off });
            let exact = gate.value / (1.0 + (-gate.value).exp()) * up.value;
            let bound = activated(Activation::Silu, gate, up, exact);
            for (dg, du) in [(0.9, 0.9), (0.9, -0.9), (-0.9, 0.9), (-0.9, -0.9)] {
                let got = silu((gate.value + dg * off) as f32, (up.value + du * off) as f32);
                used = used.max((f64::from(got) - exact).abs() / bound.error);
            }
        }
        assert!((0.3..1.0).contains(&used), "{used}");
    }

    #[test]
    fn a_clamp_hides_errors_behind_it() {
        let sharp = |value| Bounded { value, error: 1e-3 };
        let oai = |gate, up| activated(Activation::SWIGLU_OAI, sharp(gate), sharp(up), 1.0).error;
        assert!(oai(9.0, 9.0) < 1e-4, "both are cut");
        assert!(oai(9.0, 6.9999) > 1e-3 && oai(6.9999, 9.0) > 1e-3);
    }
}
