//! Hidden states to router logits, accurate enough that the choice of experts does not depend on the summation.

use fused_moe_core::{Element, Error, Result, Stage, TensorView, TensorViewMut};
use half::bf16;

use crate::score::sigmoid;

/// Name under which the functions of this file report errors.
const BACKEND: &str = "host";

/// Partial sums per dot product: one AVX-512 register of f32, two of AVX2, four of SSE or NEON.
const LANES: usize = 16;

/// Elements that are summed in f32 before the sum moves on to f64.
const BLOCK: usize = 16 * LANES;

/// Tokens and experts of one register tile.
const TILE_TOKENS: usize = 4;
const TILE_EXPERTS: usize = 2;

/// An element type that f32 holds exactly.
trait Widen: Element {
    fn widen(self) -> f32;
}

impl Widen for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Widen for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        // The upper half of an f32. `bf16::to_f32` also quietens NaNs, which keeps it from being vectorised.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Router logits `out = hidden · gateᵀ`.
///
/// `hidden` is `[tokens, hidden]` bf16 or f32, `gate` `[num_experts, hidden]` bf16 or f32, `out`
/// `[tokens, num_experts]` f32; all on the host with contiguous rows. Products are exact for bf16 operands; 256
/// of them at a time are summed in f32 in 16 lanes, the blocks in f64. The bits of a logit depend on its own row
/// and column alone: not on the other tokens, nor on the instruction set.
///
/// # Errors
/// [`fused_moe_core::ErrorKind::Contract`] for a tensor of the wrong shape, element type, device or layout.
pub fn gate_logits(hidden: TensorView<'_>, gate: TensorView<'_>, mut out: TensorViewMut<'_>) -> Result<()> {
    let (&[tokens, width], &[experts, gate_width]) = (hidden.dims(), gate.dims()) else {
        return Err(misfit(hidden, gate, &out));
    };
    if width != gate_width || out.dims() != [tokens, experts] {
        return Err(misfit(hidden, gate, &out));
    }
    if tokens == 0 || experts == 0 {
        return Ok(());
    }
    use fused_moe_core::DType::{Bf16, F32};
    match (hidden.dtype(), gate.dtype()) {
        (Bf16, Bf16) => by_isa::<bf16, bf16>(hidden, gate, &mut out),
        (Bf16, F32) => by_isa::<bf16, f32>(hidden, gate, &mut out),
        (F32, Bf16) => by_isa::<f32, bf16>(hidden, gate, &mut out),
        (F32, F32) => by_isa::<f32, f32>(hidden, gate, &mut out),
        (hidden, gate) => Err(Error::contract(
            Stage::Router,
            BACKEND,
            format!("hidden states of {hidden} and a gate of {gate}, wanted bf16 or f32"),
        )),
    }
}

/// Adds a gate's `bias`, `[num_experts]`, to every token's logits (gpt-oss).
///
/// `logits` is `[tokens, num_experts]` f32 on the host with contiguous rows.
///
/// # Errors
/// As [`gate_logits`].
pub fn add_gate_bias(bias: &[f32], mut logits: TensorViewMut<'_>) -> Result<()> {
    let &[tokens, experts] = logits.dims() else {
        return Err(Error::contract(Stage::Router, BACKEND, format!("logits of {:?}", logits.dims())));
    };
    if experts != bias.len() {
        let why = format!("logits {:?} and a bias of {} experts", logits.dims(), bias.len());
        return Err(Error::contract(Stage::Router, BACKEND, why));
    }
    for token in 0..tokens {
        let row = logits.row_mut::<f32>(token).map_err(contract)?;
        row.iter_mut().zip(bias).for_each(|(logit, bias)| *logit += bias);
    }
    Ok(())
}

/// The factor on a shared expert's output, `out = sigmoid(hidden · weightᵀ)` (Qwen2-MoE).
///
/// `hidden` is `[tokens, hidden]`, `weight` `[1, hidden]`, `out` `[tokens, 1]` f32; the rest as in
/// [`gate_logits`].
///
/// # Errors
/// As [`gate_logits`].
pub fn shared_expert_gate(
    hidden: TensorView<'_>,
    weight: TensorView<'_>,
    mut out: TensorViewMut<'_>,
) -> Result<()> {
    if weight.dims().first() != Some(&1) {
        return Err(misfit(hidden, weight, &out));
    }
    gate_logits(hidden, weight, out.reborrow())?;
    for token in 0..out.dims()[0] {
        for factor in out.row_mut::<f32>(token).map_err(contract)? {
            *factor = sigmoid(*factor);
        }
    }
    Ok(())
}

fn contract(why: fused_moe_core::ViewError) -> Error {
    Error::contract(Stage::Router, BACKEND, why)
}

fn misfit(hidden: TensorView<'_>, gate: TensorView<'_>, out: &TensorViewMut<'_>) -> Error {
    let why = format!(
        "hidden states {:?}, gate {:?} and logits {:?} are not [tokens, hidden], [experts, hidden] and [tokens, experts]",
        hidden.dims(),
        gate.dims(),
        out.dims()
    );
    Error::contract(Stage::Router, BACKEND, why)
}

/// Runs [`multiply`] compiled for the widest vectors of this machine. The operations and their order are the
/// same in each, and Rust never contracts a product and a sum, so the bits are too.
fn by_isa<X: Widen, W: Widen>(
    hidden: TensorView<'_>,
    gate: TensorView<'_>,
    out: &mut TensorViewMut<'_>,
) -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the machine has AVX-512F.
            return unsafe { multiply_avx512::<X, W>(hidden, gate, out) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the machine has AVX2.
            return unsafe { multiply_avx2::<X, W>(hidden, gate, out) };
        }
    }
    multiply::<X, W>(hidden, gate, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn multiply_avx512<X: Widen, W: Widen>(
    hidden: TensorView<'_>,
    gate: TensorView<'_>,
    out: &mut TensorViewMut<'_>,
) -> Result<()> {
    multiply::<X, W>(hidden, gate, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn multiply_avx2<X: Widen, W: Widen>(
    hidden: TensorView<'_>,
    gate: TensorView<'_>,
    out: &mut TensorViewMut<'_>,
) -> Result<()> {
    multiply::<X, W>(hidden, gate, out)
}

#[inline(always)]
fn multiply<X: Widen, W: Widen>(
    hidden: TensorView<'_>,
    gate: TensorView<'_>,
    out: &mut TensorViewMut<'_>,
) -> Result<()> {
    let (tokens, experts) = (hidden.dims()[0], gate.dims()[0]);
    let mut token = 0;
    while token < tokens {
        // The rows past the end repeat the last one; their results are not stored.
        let mut x: [&[X]; TILE_TOKENS] = [&[]; TILE_TOKENS];
        for (t, row) in x.iter_mut().enumerate() {
            *row = hidden.row::<X>((token + t).min(tokens - 1)).map_err(contract)?;
        }
        let mut expert = 0;
        while expert < experts {
            let mut w: [&[W]; TILE_EXPERTS] = [&[]; TILE_EXPERTS];
            for (e, row) in w.iter_mut().enumerate() {
                *row = gate.row::<W>((expert + e).min(experts - 1)).map_err(contract)?;
            }
            let tile = dots(x, w);
            for (t, sums) in tile.iter().enumerate().take(tokens - token) {
                let row = out.row_mut::<f32>(token + t).map_err(contract)?;
                for (logit, sum) in row[expert..].iter_mut().zip(sums) {
                    *logit = *sum;
                }
            }
            expert += TILE_EXPERTS;
        }
        token += TILE_TOKENS;
    }
    Ok(())
}

/// Dot products of every row of `x` with every row of `w`, all of one length.
#[inline(always)]
fn dots<X: Widen, W: Widen>(
    x: [&[X]; TILE_TOKENS],
    w: [&[W]; TILE_EXPERTS],
) -> [[f32; TILE_EXPERTS]; TILE_TOKENS] {
    let width = x[0].len();
    let mut total = [[0f64; TILE_EXPERTS]; TILE_TOKENS];
    let mut start = 0;
    while start < width {
        let end = (start + BLOCK).min(width);
        let mut sums = [[[0f32; LANES]; TILE_EXPERTS]; TILE_TOKENS];
        let mut at = start;
        while at < end {
            let count = LANES.min(end - at);
            let mut xs = [[0f32; LANES]; TILE_TOKENS];
            let mut ws = [[0f32; LANES]; TILE_EXPERTS];
            for (lanes, row) in xs.iter_mut().zip(&x) {
                widen_into(lanes, &row[at..at + count]);
            }
            for (lanes, row) in ws.iter_mut().zip(&w) {
                widen_into(lanes, &row[at..at + count]);
            }
            for t in 0..TILE_TOKENS {
                for e in 0..TILE_EXPERTS {
                    for lane in 0..LANES {
                        sums[t][e][lane] += xs[t][lane] * ws[e][lane];
                    }
                }
            }
            at += LANES;
        }
        for t in 0..TILE_TOKENS {
            for e in 0..TILE_EXPERTS {
                total[t][e] += f64::from(pairwise(sums[t][e]));
            }
        }
        start = end;
    }
    total.map(|row| row.map(|sum| sum as f32))
}

/// Widens `row`, of at most [`LANES`] elements, into the front of `lanes`.
#[inline(always)]
fn widen_into<T: Widen>(lanes: &mut [f32; LANES], row: &[T]) {
    // A constant length is what lets the compiler use vectors.
    if let Ok(row) = <&[T; LANES]>::try_from(row) {
        *lanes = row.map(Widen::widen);
    } else {
        for (lane, value) in lanes.iter_mut().zip(row) {
            *lane = value.widen();
        }
    }
}

#[inline(always)]
fn pairwise(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use fused_moe_core::DType;
    use rand::{Rng, SeedableRng};
    use rand_pcg::Pcg64;
    use rstest::rstest;

    use super::*;

    fn random_bf16(rng: &mut Pcg64, len: usize) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(rng.random_range(-2.0..2.0))).collect()
    }

    /// Dot products in f64, and the sum of the magnitudes, which the rounding error is relative to.
    fn exact(x: &[f32], w: &[f32]) -> (f64, f64) {
        x.iter().zip(w).fold((0.0, 0.0), |(sum, size), (&a, &b)| {
            let product = f64::from(a) * f64::from(b);
            (sum + product, size + product.abs())
        })
    }

    #[rstest]
    #[case(1, 1, 1)]
    #[case(3, 5, 15)]
    #[case(4, 8, 256)]
    #[case(5, 3, 257)]
    #[case(9, 64, 4099)]
    fn agrees_with_f64(
        #[case] tokens: usize,
        #[case] experts: usize,
        #[case] width: usize,
        #[values(DType::Bf16, DType::F32)] gate_dtype: DType,
    ) {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = Pcg64::seed_from_u64(seed);
        let hidden = random_bf16(&mut rng, tokens * width);
        let gate_bf16 = random_bf16(&mut rng, experts * width);
        let gate_f32: Vec<f32> = match gate_dtype {
            DType::F32 => (0..experts * width).map(|_| rng.random_range(-2.0..2.0)).collect(),
            _ => gate_bf16.iter().map(|w| w.to_f32()).collect(),
        };
        let dims = [experts, width];
        let gate = match gate_dtype {
            DType::F32 => TensorView::from_slice(&gate_f32, DType::F32, &dims).unwrap(),
            _ => TensorView::from_slice(&gate_bf16, DType::Bf16, &dims).unwrap(),
        };
        let x = TensorView::from_slice(&hidden, DType::Bf16, &[tokens, width]).unwrap();
        let mut logits = vec![f32::NAN; tokens * experts];
        let out = TensorViewMut::from_slice(&mut logits, DType::F32, &[tokens, experts]).unwrap();
        gate_logits(x, gate, out).unwrap();

        let mut portable = vec![f32::NAN; tokens * experts];
        let mut out = TensorViewMut::from_slice(&mut portable, DType::F32, &[tokens, experts]).unwrap();
        match gate_dtype {
            DType::F32 => multiply::<bf16, f32>(x, gate, &mut out).unwrap(),
            _ => multiply::<bf16, bf16>(x, gate, &mut out).unwrap(),
        }
        assert_eq!(logits, portable, "the bits depend on the instruction set");

        let hidden: Vec<f32> = hidden.iter().map(|x| x.to_f32()).collect();
        for (token, x) in hidden.chunks(width).enumerate() {
            for (expert, w) in gate_f32.chunks(width).enumerate() {
                let (want, size) = exact(x, w);
                let got = f64::from(logits[token * experts + expert]);
                let bound = 1e-6 * size + f64::from(f32::EPSILON) * want.abs();
                assert!((got - want).abs() <= bound, "token {token} expert {expert}: {got} != {want}");
            }
        }
    }

    #[test]
    fn shared_gate_is_a_sigmoid() {
        let hidden = [1.0f32, 0.0, 0.0, 0.0, -200.0, 0.0];
        let weight = [1.0f32, 1.0];
        let mut out = [f32::NAN; 3];
        shared_expert_gate(
            TensorView::from_slice(&hidden, DType::F32, &[3, 2]).unwrap(),
            TensorView::from_slice(&weight, DType::F32, &[1, 2]).unwrap(),
            TensorViewMut::from_slice(&mut out, DType::F32, &[3, 1]).unwrap(),
        )
        .unwrap();
        assert!((out[0] - 0.731_058_6).abs() < 1e-6);
        assert_eq!(out[1..], [0.5, 0.0]);
    }

    #[test]
    fn the_bias_is_added_to_every_token() {
        let mut logits = [1.0f32, 2.0, 3.0, -1.0, -2.0, -3.0];
        let view = TensorViewMut::from_slice(&mut logits, DType::F32, &[2, 3]).unwrap();
        add_gate_bias(&[0.5, 0.0, -8.0], view).unwrap();
        assert_eq!(logits, [1.5, 2.0, -5.0, -0.5, -2.0, -11.0]);
        let view = TensorViewMut::from_slice(&mut logits, DType::F32, &[3, 2]).unwrap();
        let refused = add_gate_bias(&[0.0; 3], view).unwrap_err();
        assert_eq!(refused.kind, fused_moe_core::ErrorKind::Contract);
    }

    #[rstest]
    #[case(&[2, 4], &[3, 5], &[2, 3])]
    #[case(&[2, 4], &[3, 4], &[3, 2])]
    #[case(&[8], &[3, 4], &[2, 3])]
    fn misfits_are_refused(#[case] hidden: &[usize], #[case] gate: &[usize], #[case] out: &[usize]) {
        let (x, mut y) = ([0f32; 16], [7f32; 6]);
        let hidden = TensorView::from_slice(&x, DType::F32, hidden).unwrap();
        let gate = TensorView::from_slice(&x, DType::F32, gate).unwrap();
        let result = gate_logits(hidden, gate, TensorViewMut::from_slice(&mut y, DType::F32, out).unwrap());
        assert_eq!(result.unwrap_err().kind, fused_moe_core::ErrorKind::Contract);
        assert_eq!(y, [7f32; 6]);
    }
}
