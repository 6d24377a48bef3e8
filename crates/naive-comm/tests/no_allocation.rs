//! The four phases allocate nothing.

use counting_alloc::allocations;
use ep_transport::{ThreadOptions, run_ranks};
use fused_moe_core::*;
use half::bf16;
use naive_comm::{AllGatherReduceScatter, Local, Naive};
use rstest::rstest;

#[global_allocator]
static ALLOCATOR: counting_alloc::Counting = counting_alloc::Counting;

const HIDDEN: usize = 256;
const TOKENS: usize = 4;

#[rstest]
#[case::local(&Local, 1)]
#[case::allgather_reducescatter(&AllGatherReduceScatter, 3)]
#[case::naive(&Naive, 3)]
fn a_round_allocates_nothing(#[case] provider: &dyn PrepareFinalizeProvider, #[case] ranks: usize) {
    let config = MoeConfig {
        hidden: HIDDEN,
        intermediate: 8,
        top_k: 1,
        max_tokens_per_rank: TOKENS,
        in_dtype: DType::Bf16,
        quant: QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
        activation: Activation::Silu,
        apply_router_weight_on_input: false,
        expert_bias: false,
        padding: Default::default(),
        redundant_experts: 0,
        max_received_rows: None,
        combine_wire: Default::default(),
        routing: None,
        placement: ExpertPlacement::linear(4, ranks).unwrap(),
        ranks_per_node: ranks,
        device: DeviceKind::Host,
    };
    let experts = ExpertsCaps::host("none", vec![config.quant.quantized_wire(DType::Bf16)]);
    let counts = run_ranks(ranks, ThreadOptions::default(), |group| {
        let made = maybe_make_prepare_finalize(&[provider], &config, &experts, &group);
        let Ok((_, PrepareFinalize::Modular(mut comm))) = made else { panic!("{made:?}") };
        let mut workspace = Workspace::new(DeviceKind::Host, 0).unwrap();
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let (hidden, mut sums) = ([bf16::ONE; TOKENS * HIDDEN], [f32::NAN; TOKENS * HIDDEN]);
        let mut round = || {
            let hidden = TensorView::from_slice(&hidden, DType::Bf16, &[TOKENS, HIDDEN]).unwrap();
            let topk = TopK {
                ids: TensorView::from_slice(&[0; TOKENS], DType::I32, &[TOKENS, 1]).unwrap(),
                weights: TensorView::from_slice(&[1.0f32; TOKENS], DType::F32, &[TOKENS, 1]).unwrap(),
            };
            let sent = comm
                .prepare_send(&mut cx, PrepareInput { hidden, topk, input_scale: None, fault: None })
                .unwrap();
            let (_, routed) = comm.prepare_recv(&mut cx, sent).unwrap();
            let sent = comm.finalize_send(&mut cx, routed, ExpertOut::InPlace).unwrap();
            let out = TensorViewMut::from_slice(&mut sums, DType::F32, &[TOKENS, HIDDEN]).unwrap();
            comm.finalize_recv(&mut cx, sent, out).unwrap();
        };
        allocations(|| (0..3).for_each(|_| round()))
    });
    assert_eq!(counts.unwrap(), vec![0; ranks]);
}
