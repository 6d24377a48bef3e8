//! Kernels of both forms on hand-made batches of cases whose sizes fill FlashInfer's layouts.
#![allow(dead_code, reason = "every test takes what it needs")]

use fused_moe_core::*;
use half::bf16;
use moe_conformance::{Case, RoutingPattern, Seed, TokenCounts};
use rand::SeedableRng;
use rand_pcg::Pcg64Mcg;
use trtllm_experts::{TrtllmExperts, TrtllmRoutedExperts};

pub const FN: Fp8Format = Fp8Format::E4M3Fn;

/// The schemes that both forms run.
pub const SCHEMES: [QuantScheme; 4] = [
    QuantScheme::Unquantized,
    QuantScheme::Fp8Block(FN),
    QuantScheme::Fp8PerTensorStatic(FN),
    QuantScheme::Nvfp4,
];

/// Rows behind the valid ones.
const GARBAGE: usize = 3;

pub fn fresh_rng() -> Pcg64Mcg {
    let seed = rand::random();
    println!("seed {seed}");
    Pcg64Mcg::seed_from_u64(seed)
}

/// Top-4 of 16 experts in equal ranges over `ep_size` ranks, in sizes that all schemes take.
pub fn case(quant: QuantScheme, ep_size: usize) -> Case {
    let seed = Seed::fresh();
    println!("case seed {seed}");
    Case {
        hidden: 256,
        intermediate: 128,
        num_experts: 16,
        top_k: 4,
        tokens: vec![9; ep_size],
        placement: ExpertPlacement::linear(16, ep_size).unwrap(),
        ..Case::small(quant, ep_size, seed)
    }
}

/// [`case`] with every routing pattern, several numbers of tokens and of experts per token.
pub fn cases(quant: QuantScheme, ep_size: usize) -> Vec<Case> {
    let patterns = RoutingPattern::ALL.into_iter().zip(TokenCounts::ALL).enumerate();
    let cases = patterns.map(|(at, (routing, counts))| {
        let tokens = match counts {
            TokenCounts::Each(tokens) => vec![tokens.min(20); ep_size],
            TokenCounts::Uneven => (0..ep_size).map(|rank| 1 + (rank * 29 + 11) % 20).collect(),
            TokenCounts::SomeIdle => (0..ep_size).map(|rank| (1 - rank % 2) * 17).collect(),
        };
        let (hidden, intermediate) = [(256, 128), (256, 256), (512, 128)][at % 3];
        Case { routing, tokens, top_k: [1, 4, 8][at % 3], hidden, intermediate, ..case(quant, ep_size) }
    });
    cases.collect()
}

/// Rows with logits, ids and weights, and garbage behind them.
pub struct Batch {
    pub rows: usize,
    max_rows: usize,
    pub hidden: Vec<bf16>,
    pub logits: Vec<f32>,
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
}

impl Batch {
    /// The rows of all ranks.
    pub fn of(case: &Case) -> Self {
        let inputs = case.inputs(0);
        let rows = inputs.iter().map(|input| input.num_tokens).sum();
        let max_rows = rows + GARBAGE;
        let mut batch = Self { rows, max_rows, hidden: vec![], logits: vec![], ids: vec![], weights: vec![] };
        for input in inputs {
            batch.hidden.extend(input.hidden);
            batch.logits.extend(input.logits);
            batch.ids.extend(input.ids);
            batch.weights.extend(input.weights);
        }
        batch.hidden.extend(vec![bf16::NAN; GARBAGE * case.hidden]);
        batch.logits.extend(vec![f32::NAN; GARBAGE * case.num_experts]);
        batch.ids.extend(vec![i32::MAX; GARBAGE * case.top_k]);
        batch.weights.extend(vec![f32::NAN; GARBAGE * case.top_k]);
        batch
    }

    pub fn max_rows(&self) -> usize {
        self.max_rows
    }
}

/// A plan for bf16 rows.
pub fn plan(provider: &dyn ExpertsProvider, config: &MoeConfig, max_rows: usize) -> Plan {
    let caps = match provider.supports(config) {
        Support::Supported(caps) => caps,
        Support::Unsupported(reasons) => panic!("refused: {reasons:?}"),
    };
    let wires = vec![WireFormat::unquantized(DType::Bf16)];
    let comm = PrepareCaps::host("test", caps.kind, wires, max_rows);
    negotiate(config, &comm, &caps).unwrap()
}

/// The experts of `rank` in local order.
pub fn local<'a>(config: &MoeConfig, all: &[ExpertMatrices<'a>], rank: Rank) -> Vec<ExpertMatrices<'a>> {
    config.placement.experts_of(rank).map(|id| all[id.0 as usize]).collect()
}

/// Everything of a call that does not change from batch to batch.
pub struct Built<'a> {
    pub config: &'a MoeConfig,
    pub experts: Experts,
    pub weights: ExpertWeights,
}

impl<'a> Built<'a> {
    pub fn new(
        provider: &dyn ExpertsProvider,
        config: &'a MoeConfig,
        (all, rank): (&[ExpertMatrices<'_>], Rank),
        max_rows: usize,
    ) -> Self {
        let plan = plan(provider, config, max_rows);
        let experts = provider.build(config, &plan, rank).unwrap();
        assert_eq!(provider.workspace_bytes(config, &plan), experts.workspace_bytes());
        Self { config, experts, weights: provider.pack(config, rank, &local(config, all, rank)).unwrap() }
    }

    /// Runs the kernel in a workspace of exactly its size, full of NaN and -1, and returns the valid rows; the others
    /// must still be poison.
    pub fn apply(&self, batch: &Batch) -> Result<Vec<bf16>> {
        let (config, max_rows) = (self.config, batch.max_rows());
        let bytes = self.experts.workspace_bytes();
        let mut workspace = Workspace::new(DeviceKind::Host, bytes).unwrap();
        workspace.tensor_mut(DType::U8, &[bytes]).unwrap().as_mut_slice::<u8>().unwrap().fill(0xff);
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let poison = bf16::from_bits(0x7fab);
        let mut out = vec![poison; max_rows * config.hidden];
        let view = TensorViewMut::from_slice(&mut out, DType::Bf16, &[max_rows, config.hidden]).unwrap();
        self.apply_in(batch, &mut cx, view)?;
        let behind = out.split_off(batch.rows * config.hidden);
        assert!(behind.iter().all(|v| v.to_bits() == poison.to_bits()), "garbage rows were written");
        Ok(out)
    }

    /// Runs the kernel.
    pub fn apply_in(&self, batch: &Batch, cx: &mut ExecCx<'_>, out: TensorViewMut<'_>) -> Result<()> {
        let (config, max_rows) = (self.config, batch.max_rows());
        let hidden = TensorView::from_slice(&batch.hidden, DType::Bf16, &[max_rows, config.hidden]).unwrap();
        let count = [batch.rows as i32];
        let rows = ReceivedRows(TensorView::from_slice(&count, DType::I32, &[1]).unwrap());
        match &self.experts {
            Experts::Monolithic(kernel) => {
                let dims = [max_rows, config.num_experts()];
                let logits = TensorView::from_slice(&batch.logits, DType::F32, &dims).unwrap();
                let input = DispatchedMonolithic { hidden, scale: None, logits, rows, output: None };
                kernel.apply(cx, &self.weights, &input, out)
            }
            Experts::Modular(kernel) => {
                let dims = [max_rows, config.top_k];
                let topk = TopK {
                    ids: TensorView::from_slice(&batch.ids, DType::I32, &dims).unwrap(),
                    weights: TensorView::from_slice(&batch.weights, DType::F32, &dims).unwrap(),
                };
                let arrived = Arrived::Standard { topk, rows };
                let input = Dispatched { hidden, scale: None, arrived, output: None };
                kernel.apply(cx, &self.weights, &input, out)
            }
        }
    }
}

pub fn monolithic() -> TrtllmExperts {
    TrtllmExperts::new()
}

pub fn routed() -> TrtllmRoutedExperts {
    TrtllmRoutedExperts::new()
}

pub fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|v| v.to_bits()).collect()
}
