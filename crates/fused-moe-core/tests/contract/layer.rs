//! A small layer and the tensors of one call.

use fused_moe_core::{
    Activation, DType, DeviceKind, ExpertPlacement, MoeConfig, PrepareInput, QuantScheme, TensorView, TopK,
};
use half::bf16;
use rand::{Rng, RngCore, SeedableRng};
use rand_pcg::Pcg64;

pub const HIDDEN: usize = 6;
pub const EXPERTS: usize = 5;
pub const TOP_K: usize = 3;
pub const MAX_TOKENS: usize = 4;

/// A generator with a fresh seed, which is printed.
pub fn fresh() -> Pcg64 {
    let seed = rand::rng().next_u64();
    println!("seed {seed}");
    Pcg64::seed_from_u64(seed)
}

pub fn config(ranks: usize) -> MoeConfig {
    MoeConfig {
        hidden: HIDDEN,
        intermediate: 4,
        top_k: TOP_K,
        max_tokens_per_rank: MAX_TOKENS,
        in_dtype: DType::Bf16,
        quant: QuantScheme::Unquantized,
        activation: Activation::Silu,
        apply_router_weight_on_input: false,
        expert_bias: false,
        padding: Default::default(),
        redundant_experts: 0,
        max_received_rows: None,
        combine_wire: Default::default(),
        routing: None,
        placement: ExpertPlacement::linear(EXPERTS, ranks).unwrap(),
        ranks_per_node: ranks,
        device: DeviceKind::Host,
    }
}

/// The tensors that one rank brings to one call. Values are small integers, so that sums are exact.
#[derive(Clone)]
pub struct Tokens {
    pub count: usize,
    pub hidden: Vec<bf16>,
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
}

impl Tokens {
    pub fn random(rng: &mut impl Rng, count: usize) -> Self {
        let mut ids = Vec::new();
        for _ in 0..count {
            let first = rng.random_range(0..EXPERTS);
            let row = (0..TOP_K).map(|slot| ((first + slot) % EXPERTS) as i32);
            ids.extend(row.map(|id| if rng.random_ratio(1, 6) { -1 } else { id }));
        }
        let mut integers = |n: usize| (0..n).map(|_| rng.random_range(-4..=4) as f32).collect::<Vec<_>>();
        let hidden = integers(count * HIDDEN).into_iter().map(bf16::from_f32).collect();
        Self { count, hidden, ids, weights: integers(count * TOP_K) }
    }

    pub fn hidden(&self) -> TensorView<'_> {
        TensorView::from_slice(&self.hidden, DType::Bf16, &[self.count, HIDDEN]).unwrap()
    }

    pub fn topk(&self) -> TopK<'_> {
        let dims = [self.count, TOP_K];
        TopK {
            ids: TensorView::from_slice(&self.ids, DType::I32, &dims).unwrap(),
            weights: TensorView::from_slice(&self.weights, DType::F32, &dims).unwrap(),
        }
    }

    pub fn input(&self) -> PrepareInput<'_> {
        PrepareInput { hidden: self.hidden(), topk: self.topk(), input_scale: None, fault: None }
    }
}
