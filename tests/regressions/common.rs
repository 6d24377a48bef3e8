//! Layers over threads as ranks.

use std::time::Duration;

use ep_transport::{Endpoint, ThreadOptions, run_ranks};
use fused_moe::{
    Call, DType, Error, ExpertPlacement, ExpertWeights, FusedMoEKernel, ModularKernel, MoeConfig, Overlap,
    ProcessGroup, Registry, Selection, Stream, TensorView, TensorViewMut, TopK,
};
use moe_conformance::{Case, LayerWeights, Outcome, RankInput, Seed, Settings, layer};

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Every pair of backends of this workspace that serves more than one rank.
pub const PAIRS: [(&str, &str); 5] = [
    ("mori_high_throughput", "aiter"),
    ("mori_low_latency", "aiter"),
    ("allgather_reducescatter", "aiter"),
    ("naive", "aiter"),
    ("batched", "batched"),
];

pub fn pair((comm, experts): (&'static str, &'static str)) -> Selection<'static> {
    Selection { comm: Some(comm), experts: Some(experts) }
}

/// A new seed, which a failing test prints.
pub fn seed() -> Seed {
    let seed = Seed::fresh();
    println!("seed {seed}");
    seed
}

/// `experts` experts in contiguous blocks over `ranks` ranks.
pub fn linear(experts: usize, ranks: usize) -> ExpertPlacement {
    ExpertPlacement::linear(experts, ranks).expect("there are ranks")
}

/// Runs `case` with every pair: three rounds on one handle against the oracle, see [`layer::run`].
pub fn agrees_everywhere(case: &Case) {
    for names in PAIRS {
        let outcome = layer::run(&fused_moe::default_backends(), case, pair(names), Settings::default());
        assert_eq!(outcome, Outcome::Pass, "{names:?}");
    }
}

/// A modular kernel of one rank, and its layer's weights.
pub struct Rank {
    pub kernel: ModularKernel,
    pub weights: ExpertWeights,
    pub rank: usize,
}

impl Rank {
    pub fn build(
        registry: &Registry,
        (config, weights): (&MoeConfig, &LayerWeights),
        selection: Selection<'_>,
        group: &Endpoint,
    ) -> Result<Self, Failure> {
        let FusedMoEKernel::Modular(kernel) = registry.build(config, selection, group)? else {
            return Err("not modular".into());
        };
        let all = weights.matrices();
        let local: Vec<_> = config.placement.experts_of(group.rank()).map(|id| all[id.0 as usize]).collect();
        let weights = registry.experts(kernel.plan().experts())?.pack(config, group.rank(), &local)?;
        Ok(Self { kernel, weights, rank: group.rank().index() })
    }

    /// One call on the tokens of `input`, whose output is full of NaN before.
    pub fn apply(&mut self, input: &RankInput, overlap: Overlap<'_>) -> Result<Vec<f32>, Error> {
        let (hidden, top_k) = (self.kernel.config().hidden, self.kernel.config().top_k);
        let tokens = input.num_tokens;
        let mut out = vec![f32::NAN; tokens * hidden];
        // The lifetime of a `&mut dyn` cannot be shortened inside an `Option`; that of a closure around it can.
        let Overlap { mut dispatch, mut combine } = overlap;
        let mut in_dispatch = |stream| dispatch.as_mut().map_or(Ok(()), |work| work(stream));
        let mut in_combine = |stream| combine.as_mut().map_or(Ok(()), |work| work(stream));
        let fits = "the input is of the case";
        self.kernel.apply(Call {
            stream: Stream::Host,
            weights: &self.weights,
            hidden: TensorView::from_slice(&input.hidden, DType::Bf16, &[tokens, hidden]).expect(fits),
            routing: TopK {
                ids: TensorView::from_slice(&input.ids, DType::I32, &[tokens, top_k]).expect(fits),
                weights: TensorView::from_slice(&input.weights, DType::F32, &[tokens, top_k]).expect(fits),
            },
            overlap: Overlap { dispatch: Some(&mut in_dispatch), combine: Some(&mut in_combine) },
            out: TensorViewMut::from_slice(&mut out, DType::F32, &[tokens, hidden]).expect(fits),
        })?;
        Ok(out)
    }
}

/// Runs `body` on a thread per rank of `case` and returns what the ranks return, in their order.
pub fn on_ranks<T: Send>(
    case: &Case,
    timeout: Duration,
    body: impl Fn(Endpoint) -> Result<T, Failure> + Sync,
) -> Vec<T> {
    let options = ThreadOptions { timeout, ..ThreadOptions::default() };
    let ranks = run_ranks(case.ep_size(), options, body).expect("threads can be made");
    ranks.into_iter().map(|rank| rank.unwrap_or_else(|e| panic!("{e} ({case})"))).collect()
}

/// The deadline of ranks that are all well.
pub const PATIENT: Duration = Duration::from_secs(60);
