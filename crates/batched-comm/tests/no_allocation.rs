//! The four phases allocate nothing.

use std::num::NonZeroUsize;

use batched_comm::Batched;
use counting_alloc::allocations;
use ep_transport::{ThreadOptions, run_ranks};
use fused_moe_core::*;
use half::bf16;
use rstest::rstest;

#[global_allocator]
static ALLOCATOR: counting_alloc::Counting = counting_alloc::Counting;

const HIDDEN: usize = 256;
const TOKENS: usize = 4;

#[rstest]
fn a_round_allocates_nothing(#[values(1, 3)] ranks: usize, #[values(false, true)] quantised: bool) {
    let quant = if quantised { QuantScheme::Fp8Block(Fp8Format::E4M3Fn) } else { QuantScheme::Unquantized };
    let config = MoeConfig {
        hidden: HIDDEN,
        intermediate: 8,
        top_k: 2,
        max_tokens_per_rank: TOKENS,
        in_dtype: DType::Bf16,
        quant,
        activation: Activation::Silu,
        apply_router_weight_on_input: false,
        expert_bias: false,
        padding: Default::default(),
        redundant_experts: 0,
        max_received_rows: None,
        combine_wire: Default::default(),
        routing: None,
        placement: ExpertPlacement::linear(4, ranks).unwrap(),
        // Every rank on a node of its own: nothing is reached but by puts.
        ranks_per_node: 1,
        device: DeviceKind::Host,
    };
    let mut experts = ExpertsCaps::host("none", vec![config.quant.quantized_wire(DType::Bf16)]);
    experts.format = ActivationFormat::BatchedExperts;
    experts.weight_and_reduce = TopKWeightAndReduce::delegate();
    let options = ThreadOptions { ranks_per_node: NonZeroUsize::new(1), ..ThreadOptions::default() };
    let counts = run_ranks(ranks, options, |group| {
        let made = maybe_make_prepare_finalize(&[&Batched], &config, &experts, &group);
        let Ok((plan, PrepareFinalize::Modular(mut comm))) = made else { panic!("{made:?}") };
        let mut workspace = Workspace::new(DeviceKind::Host, 0).unwrap();
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let (hidden, mut sums) = ([bf16::ONE; TOKENS * HIDDEN], [f32::NAN; TOKENS * HIDDEN]);
        let dims = [config.placement.num_local_experts(group.rank()), plan.max_rows(), HIDDEN];
        let outputs = vec![bf16::ONE; dims.iter().product()];
        let mut round = || {
            let hidden = TensorView::from_slice(&hidden, DType::Bf16, &[TOKENS, HIDDEN]).unwrap();
            let topk = TopK {
                ids: TensorView::from_slice([[0, 3]; TOKENS].as_flattened(), DType::I32, &[TOKENS, 2])
                    .unwrap(),
                weights: TensorView::from_slice(&[0.25f32; 2 * TOKENS], DType::F32, &[TOKENS, 2]).unwrap(),
            };
            let sent = comm
                .prepare_send(&mut cx, PrepareInput { hidden, topk, input_scale: None, fault: None })
                .unwrap();
            let (_, routed) = comm.prepare_recv(&mut cx, sent).unwrap();
            let outputs = ExpertOut::Lent(TensorView::from_slice(&outputs, DType::Bf16, &dims).unwrap());
            let sent = comm.finalize_send(&mut cx, routed, outputs).unwrap();
            let out = TensorViewMut::from_slice(&mut sums, DType::F32, &[TOKENS, HIDDEN]).unwrap();
            comm.finalize_recv(&mut cx, sent, out).unwrap();
        };
        let allocated = allocations(|| (0..3).for_each(|_| round()));
        assert!(sums.iter().all(|&sum| sum == 0.5), "{sums:?}");
        allocated
    });
    assert_eq!(counts.unwrap(), vec![0; ranks]);
}
