//! The four phases allocate nothing, inside a node and between nodes.

use std::num::NonZeroUsize;

use counting_alloc::allocations;
use ep_transport::{ThreadOptions, run_ranks};
use fused_moe_core::*;
use half::bf16;
use mori_comm::MoriBackend;
use rstest::rstest;

#[global_allocator]
static ALLOCATOR: counting_alloc::Counting = counting_alloc::Counting;

const HIDDEN: usize = 256;
/// Two chunks.
const TOKENS: usize = 70;

#[rstest]
fn a_round_allocates_nothing(
    #[values(1, 2)] nodes: usize,
    #[values(MoriBackend::HighThroughput, MoriBackend::LowLatency)] backend: MoriBackend,
    #[values(false, true)] quantised: bool,
) {
    let (ranks, format) = (4, Fp8Format::E4M3Fn);
    let mut config = MoeConfig {
        hidden: HIDDEN,
        intermediate: 8,
        top_k: 3,
        max_tokens_per_rank: TOKENS,
        ranks_per_node: ranks / nodes,
        ..MoeConfig::new(ExpertPlacement::linear(8, ranks).unwrap())
    };
    if quantised {
        (config.quant, config.combine_wire) = (QuantScheme::Fp8Block(format), CombineWire::Fp8Block(format));
    }
    let experts = ExpertsCaps::host("none", vec![config.quant.quantized_wire(DType::Bf16)]);
    let ranks_per_node = NonZeroUsize::new(ranks / nodes);
    let counts = run_ranks(ranks, ThreadOptions { ranks_per_node, ..ThreadOptions::default() }, |group| {
        let made = maybe_make_prepare_finalize(&[&backend], &config, &experts, &group);
        let Ok((_, PrepareFinalize::Modular(mut comm))) = made else { panic!("{made:?}") };
        let mut workspace = Workspace::new(DeviceKind::Host, 0).unwrap();
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let (hidden, mut sums) = ([bf16::ONE; TOKENS * HIDDEN], [f32::NAN; TOKENS * HIDDEN]);
        let (ids, weights) = ([[0, 7, -1]; TOKENS], [0.25f32; 3 * TOKENS]);
        let mut round = || {
            let topk = TopK {
                ids: TensorView::from_slice(ids.as_flattened(), DType::I32, &[TOKENS, 3]).unwrap(),
                weights: TensorView::from_slice(&weights, DType::F32, &[TOKENS, 3]).unwrap(),
            };
            let hidden = TensorView::from_slice(&hidden, DType::Bf16, &[TOKENS, HIDDEN]).unwrap();
            let input = PrepareInput { hidden, topk, input_scale: None, fault: None };
            let sent = comm.prepare_send(&mut cx, input).unwrap();
            let (_, routed) = comm.prepare_recv(&mut cx, sent).unwrap();
            let sent = comm.finalize_send(&mut cx, routed, ExpertOut::InPlace).unwrap();
            let out = TensorViewMut::from_slice(&mut sums, DType::F32, &[TOKENS, HIDDEN]).unwrap();
            comm.finalize_recv(&mut cx, sent, out).unwrap();
        };
        // What a machine detects once in its life, it detects here.
        round();
        allocations(|| (0..3).for_each(|_| round()))
    });
    assert_eq!(counts.unwrap(), [0; 4]);
}
