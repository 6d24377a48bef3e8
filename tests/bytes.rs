//! What a kernel holds: as announced, and the same for one layer and for a whole model.

use ep_transport::{ThreadOptions, run_ranks};
use fused_moe::{
    Call, DType, ExpertWeights, Fp8Format, FusedMoEKernel, Overlap, ProcessGroup, QuantScheme, Selection,
    Stream, TensorView, TensorViewMut, TopK,
};
use moe_conformance::{Case, Seed};
use rstest::rstest;

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// DeepSeek-V3 has 58 layers with experts.
const LAYERS: usize = 58;

#[rstest]
#[case("local", 1)]
#[case("mori_high_throughput", 3)]
#[case("allgather_reducescatter", 3)]
#[case("naive", 3)]
#[case("batched", 3)]
fn one_kernel_serves_58_layers(
    #[case] comm: &str,
    #[case] ep_size: usize,
    #[values(QuantScheme::Unquantized, QuantScheme::Fp8Block(Fp8Format::E4M3Fn))] quant: QuantScheme,
) -> Outcome<()> {
    let registry = fused_moe::default_backends();
    let case = Case::small(quant, ep_size, Seed::fresh());
    let config = case.config();
    let inputs = case.inputs(0);
    let selection = Selection { comm: Some(comm), experts: None };
    let ranks = run_ranks(ep_size, ThreadOptions::default(), |group| -> Outcome<()> {
        let rank = group.rank();
        let FusedMoEKernel::Modular(mut kernel) = registry.build(&config, selection, &group)? else {
            return Err("not modular".into());
        };
        let announced = registry.required_bytes(&config, kernel.plan(), rank)?;
        let provider = registry.experts(kernel.plan().experts())?;
        let pack = |layer: usize| -> Outcome<ExpertWeights> {
            let weights = Case { seed: case.seed.derive(layer as u64), ..case.clone() }.weights();
            let all = weights.matrices();
            let local: Vec<_> = config.placement.experts_of(rank).map(|id| all[id.0 as usize]).collect();
            Ok(provider.pack(&config, rank, &local)?)
        };
        let layers: Vec<ExpertWeights> = (0..LAYERS).map(pack).collect::<Outcome<_>>()?;
        assert_eq!(kernel.bytes(), announced, "before the first layer");
        let input = &inputs[rank.index()];
        let tokens = input.num_tokens;
        let mut out = vec![f32::NAN; tokens * config.hidden];
        for weights in &layers {
            kernel.apply(Call {
                stream: Stream::Host,
                weights,
                hidden: TensorView::from_slice(&input.hidden, DType::Bf16, &[tokens, config.hidden])?,
                routing: TopK {
                    ids: TensorView::from_slice(&input.ids, DType::I32, &[tokens, config.top_k])?,
                    weights: TensorView::from_slice(&input.weights, DType::F32, &[tokens, config.top_k])?,
                },
                overlap: Overlap::default(),
                out: TensorViewMut::from_slice(&mut out, DType::F32, &[tokens, config.hidden])?,
            })?;
            assert_eq!(kernel.bytes(), announced);
        }
        Ok(())
    })?;
    ranks.into_iter().collect::<Outcome<()>>().map_err(|e| format!("{comm}: {e}"))?;
    Ok(())
}
