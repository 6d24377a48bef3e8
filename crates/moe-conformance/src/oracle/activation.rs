//! Activations of gate and up in f64.

use std::f64::consts::PI;

use fused_moe_core::Activation;

/// What gemm1 stores for a gate and an up value, before it is rounded; NaN for an activation that the oracle does
/// not know.
pub fn activate(activation: Activation, gate: f64, up: f64) -> f64 {
    match activation {
        Activation::Silu => gate * sigmoid(gate) * up,
        Activation::Gelu => gate * normal_distribution(gate) * up,
        Activation::GeluTanh => {
            let inner = (2.0 / PI).sqrt() * (gate + 0.044715 * gate.powi(3));
            0.5 * gate * (1.0 + inner.tanh()) * up
        }
        Activation::SwigluOai { alpha, limit } => {
            let (gate, up) = clamped(gate, up, limit);
            gate * sigmoid(f64::from(alpha) * gate) * (up + 1.0)
        }
        Activation::SiluClamped { limit } => {
            let (gate, up) = clamped(gate, up, limit);
            gate * sigmoid(gate) * up
        }
        _ => f64::NAN,
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn clamped(gate: f64, up: f64, limit: f32) -> (f64, f64) {
    let limit = f64::from(limit);
    (gate.min(limit), up.clamp(-limit, limit))
}

/// `Φ(x) = ½ erfc(−x/√2)`.
fn normal_distribution(x: f64) -> f64 {
    let z = -x / std::f64::consts::SQRT_2;
    if z < 0.0 { 1.0 - 0.5 * erfc(-z) } else { 0.5 * erfc(z) }
}

/// `erfc(z)` for `z ≥ 0`: the series without cancellation below 2, the continued fraction of Laplace above.
fn erfc(z: f64) -> f64 {
    let factor = (-z * z).exp() / PI.sqrt();
    if z < 2.0 {
        // erf(z) = 2/√π · e^(−z²) · Σ 2ⁿ z^(2n+1) / (2n+1)!!
        let mut term = z;
        let mut sum = z;
        for n in 1..80 {
            term *= 2.0 * z * z / f64::from(2 * n + 1);
            sum += term;
        }
        return 1.0 - 2.0 * factor * sum;
    }
    let fraction = (1..=120).rev().fold(z, |tail, n| z + f64::from(n) / 2.0 / tail);
    factor / fraction
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_tables() {
        // Abramowitz and Stegun, table 7.1.
        for (z, want) in
            [(0.5, 0.479_500_122), (1.0, 0.157_299_207), (1.9, 0.007_209_571), (2.0, 0.004_677_735)]
        {
            assert!((erfc(z) - want).abs() < 1e-9, "{z}: {}", erfc(z));
        }
        assert!((erfc(1.999_999) / erfc(2.0) - 1.0).abs() < 1e-5, "the two forms meet");
        assert!((erfc(5.0) / 1.537_459_794e-12 - 1.0).abs() < 1e-9);
        let gelu = |x| activate(Activation::Gelu, x, 1.0);
        assert!((gelu(1.0) - 0.841_344_746).abs() < 1e-9);
        assert!((activate(Activation::GeluTanh, 1.0, 2.0) - 2.0 * 0.841_192).abs() < 1e-5);
        let oai = activate(Activation::SWIGLU_OAI, 100.0, -100.0);
        assert!((oai - 7.0 * sigmoid(1.702 * 7.0) * -6.0).abs() < 1e-6, "{oai}");
        let clamped = activate(Activation::SiluClamped { limit: 2.0 }, -50.0, 9.0);
        assert!((clamped - -50.0 * sigmoid(-50.0) * 2.0).abs() < 1e-12);
    }
}
