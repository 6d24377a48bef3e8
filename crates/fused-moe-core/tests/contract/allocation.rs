//! A round that goes well allocates nothing once the ledger is warm.

use counting_alloc::allocations;
use fused_moe_core::{
    Activation, DType, DeviceKind, ExpertPlacement, MoeConfig, PrepareInput, QuantScheme, Rank, TensorView,
    TicketLedger, TopK, TopKWeightAndReduce, Workspace,
};
use fused_moe_core::{Contiguous, ExpertMap, ReduceInput};
use half::bf16;

#[global_allocator]
static ALLOCATOR: counting_alloc::Counting = counting_alloc::Counting;

#[test]
fn a_round_and_a_reduction_allocate_nothing() {
    const TOKENS: usize = 16;
    let config = MoeConfig {
        hidden: 32,
        intermediate: 8,
        top_k: 2,
        max_tokens_per_rank: TOKENS,
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
        placement: ExpertPlacement::linear(8, 1).unwrap(),
        ranks_per_node: 1,
        device: DeviceKind::Host,
    };
    let hidden = vec![bf16::ONE; TOKENS * 32];
    let ids: Vec<i32> = (0..TOKENS * 2).map(|i| i as i32 % 8).collect();
    let weights = vec![0.5_f32; TOKENS * 2];
    let map = ExpertMap::new(&config.placement, Rank(0));
    let mut outputs = Workspace::new(DeviceKind::Host, TOKENS * 2 * 32 * 2).unwrap();
    let mut reduced = Workspace::new(DeviceKind::Host, TOKENS * 32 * 2).unwrap();
    let mut scratch = Workspace::new(DeviceKind::Host, 4096).unwrap();
    let mut ledger = TicketLedger::new("toy", Rank(0), &config);
    for round in 0..5 {
        let tokens = if round == 2 { 0 } else { TOKENS };
        let count = allocations(|| {
            let input = PrepareInput {
                hidden: TensorView::from_slice(&hidden, DType::Bf16, &[tokens, 32]).unwrap(),
                input_scale: None,
                topk: TopK {
                    ids: TensorView::from_slice(&ids, DType::I32, &[tokens, 2]).unwrap(),
                    weights: TensorView::from_slice(&weights, DType::F32, &[tokens, 2]).unwrap(),
                },
                fault: None,
            };
            let (sent, fault) = ledger.open(&config, &input).unwrap();
            assert!(fault.is_none());
            let routed = ledger.receive_prepare(sent).unwrap();
            scratch.arena().take::<f32>(512).unwrap().fill(1.0);
            outputs
                .tensor_mut(DType::Bf16, &[TOKENS, 2, 32])
                .unwrap()
                .as_mut_slice()
                .unwrap()
                .fill(bf16::ONE);
            let reduce = ReduceInput {
                expert_out: outputs.tensor(DType::Bf16, &[TOKENS, 2, 32]).unwrap(),
                topk: input.topk,
                num_rows: tokens,
                experts: &map,
                weighted: false,
            };
            let out = reduced.tensor_mut(DType::Bf16, &[TOKENS, 32]).unwrap();
            TopKWeightAndReduce::from(Contiguous).reduce(reduce, out).unwrap();
            let sent = ledger.send_finalize(routed).unwrap();
            let routing = ledger.receive_finalize(sent).unwrap();
            assert_eq!(routing.num_tokens(), tokens);
            ledger.close(routing);
        });
        assert_eq!(count, 0, "round {round}");
    }
}
