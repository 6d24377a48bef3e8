//! The sigmoid, raw and biased methods by hand, and what a router does beside its method: hash tables, appended
//! shared slots, zero-experts.

use fused_moe_core::{
    Arena, DType, ErrorKind, ExecCx, NO_EXPERT, Result, Router, RouterInput, RouterOutput, RoutingConfig,
    RoutingMethod, Stream, TensorView, TensorViewMut, TopKMut,
};
use router::{HashTable, HostRouter, SharedSlots};
use rstest::rstest;

const INF: f32 = f32::INFINITY;

/// What one call reads beside the logits, and what of it is lent.
#[derive(Default)]
struct Call<'a> {
    token_ids: Option<&'a [i32]>,
    identity: bool,
}

#[derive(Debug, PartialEq)]
struct Rows {
    ids: Vec<i32>,
    weights: Vec<f32>,
    identity: Vec<f32>,
}

fn route_all(router: &HostRouter, logits: &[f32], call: Call<'_>) -> Result<Rows> {
    let experts = router.config().num_experts;
    let (tokens, slots) = (logits.len() / experts, router.slots());
    let mut rows = Rows {
        ids: vec![-99; tokens * slots],
        weights: vec![f32::NAN; tokens * slots],
        identity: vec![f32::NAN; if call.identity { tokens } else { 0 }],
    };
    let workspace = Arena::new(TensorViewMut::from_slice(&mut [0u8; 0], DType::U8, &[0]).unwrap());
    let mut cx = ExecCx { stream: Stream::Host, workspace };
    let input = RouterInput {
        logits: TensorView::from_slice(logits, DType::F32, &[tokens, experts]).unwrap(),
        token_ids: call.token_ids.map(|ids| TensorView::from_slice(ids, DType::I32, &[ids.len()]).unwrap()),
    };
    let identity = TensorViewMut::from_slice(&mut rows.identity, DType::F32, &[tokens]);
    let out = RouterOutput {
        topk: TopKMut {
            ids: TensorViewMut::from_slice(&mut rows.ids, DType::I32, &[tokens, slots]).unwrap(),
            weights: TensorViewMut::from_slice(&mut rows.weights, DType::F32, &[tokens, slots]).unwrap(),
        },
        identity: call.identity.then(|| identity.unwrap()),
    };
    router.route_all(&mut cx, input, out)?;
    Ok(rows)
}

fn config(method: RoutingMethod, num_experts: usize, top_k: usize) -> RoutingConfig {
    RoutingConfig {
        method,
        num_experts,
        top_k,
        groups: None,
        renormalize: false,
        routed_scaling_factor: 1.0,
        correction_bias: None,
    }
}

fn router(method: RoutingMethod, num_experts: usize, top_k: usize) -> HostRouter {
    HostRouter::new(config(method, num_experts, top_k)).unwrap()
}

fn assert_close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= 2e-6 * w.abs().max(1e-3), "{got:?} is not {want:?}");
    }
}

// σ of these is 1/2, 3/4, 2/3, 1/4; √softplus of the first is √ln 2.
const L: [f32; 4] = [0.0, 1.098_612_3, core::f32::consts::LN_2, -1.098_612_3];

#[rstest]
#[case::llama4(RoutingMethod::Llama4, 1, &[1], &[0.75])]
#[case::topk(RoutingMethod::TopK, 2, &[1, 2], &[L[1], L[2]])]
#[case::sigmoid(RoutingMethod::Sigmoid, 3, &[1, 2, 0], &[0.75, 2.0 / 3.0, 0.5])]
#[case::topk_sigmoid(RoutingMethod::TopKSigmoid, 3, &[1, 2, 0], &[0.75, 2.0 / 3.0, 0.5])]
#[case::sigmoid_renorm(RoutingMethod::SigmoidRenorm, 2, &[1, 2], &[9.0 / 17.0, 8.0 / 17.0])]
#[case::minimax2(RoutingMethod::MiniMax2, 2, &[1, 2], &[9.0 / 17.0, 8.0 / 17.0])]
#[case::softmax(RoutingMethod::BiasedSoftmax, 1, &[1], &[3.0 / (1.0 + 3.0 + 2.0 + 1.0 / 3.0)])]
#[case::sqrt_softplus(RoutingMethod::SqrtSoftplus, 3, &[1, 2, 0], &[1.177_41, 1.048_147_1, 0.832_554_6])]
fn formulas(
    #[case] method: RoutingMethod,
    #[case] top_k: usize,
    #[case] ids: &[i32],
    #[case] weights: &[f32],
    #[values(1.0, 2.5)] factor: f32,
) {
    let config = RoutingConfig { routed_scaling_factor: factor, ..config(method, 4, top_k) };
    let rows = route_all(&HostRouter::new(config).unwrap(), &L, Call::default()).unwrap();
    assert_eq!(rows.ids, ids);
    assert_close(&rows.weights, &weights.iter().map(|w| w * factor).collect::<Vec<_>>());
}

#[rstest]
#[case::minimax2(RoutingMethod::MiniMax2, &[0.5, 0.5])]
#[case::softmax(RoutingMethod::BiasedSoftmax, &[0.5, 0.5])]
#[case::sqrt_softplus(RoutingMethod::SqrtSoftplus, &[0.5, 0.5])]
fn a_bias_chooses_but_does_not_weigh(#[case] method: RoutingMethod, #[case] want: &[f32]) {
    // All choice scores are negative; the best logits lose by their bias.
    let bias = Some(vec![-9.0, -9.0, -3.0, -2.0]);
    let config = RoutingConfig { correction_bias: bias, renormalize: true, ..config(method, 4, 2) };
    let rows = route_all(&HostRouter::new(config).unwrap(), &[2.0, 2.0, 0.0, 0.0], Call::default()).unwrap();
    assert_eq!(rows.ids, [3, 2]);
    assert_close(&rows.weights, want);
}

#[rstest]
#[case::saturated(&[90.0, 80.0, 100.0, 70.0], &[2, 0])]
#[case::underflow(&[-300.0, -200.0, -250.0, -400.0], &[1, 2])]
#[case::ties(&[1.0, 2.0, 2.0, 2.0], &[1, 2])]
#[case::one_admissible(&[-INF, -INF, -3.0, -INF], &[2, 0])]
#[case::nothing_admissible(&[-INF; 4], &[0, 1])]
fn rounding_does_not_choose(
    #[case] logits: &[f32],
    #[case] want: &[i32],
    #[values(
        RoutingMethod::TopK,
        RoutingMethod::Sigmoid,
        RoutingMethod::TopKSigmoid,
        RoutingMethod::SigmoidRenorm,
        RoutingMethod::MiniMax2,
        RoutingMethod::BiasedSoftmax,
        RoutingMethod::SqrtSoftplus
    )]
    method: RoutingMethod,
) {
    let rows = route_all(&router(method, 4, 2), logits, Call::default()).unwrap();
    assert_eq!(rows.ids, want);
    assert!(rows.weights.iter().all(|w| w.is_finite()), "{:?}", rows.weights);
    for (id, weight) in want.iter().zip(rows.weights) {
        assert!(logits[*id as usize].is_finite() || weight == 0.0, "{weight} for a logit of -inf");
    }
}

#[test]
fn a_hash_table_chooses_and_the_method_weighs() {
    let table = HashTable::new(vec![0, 1, 3, 0, 2, 1], 2).unwrap();
    let sigmoid = router(RoutingMethod::SigmoidRenorm, 4, 2).with_hash_table(table.clone()).unwrap();
    let logits = [L, L, L].concat();
    let call = Call { token_ids: Some(&[1, 0, 1]), identity: false };
    let rows = route_all(&sigmoid, &logits, call).unwrap();
    assert_eq!(rows.ids, [3, 0, 0, 1, 3, 0]);
    assert_close(&rows.weights, &[1.0 / 3.0, 2.0 / 3.0, 0.4, 0.6, 1.0 / 3.0, 2.0 / 3.0]);

    // Softmax over the chosen two, in the order of the table.
    let softmax = router(RoutingMethod::Renormalize, 4, 2).with_hash_table(table).unwrap();
    let rows = route_all(&softmax, &L, Call { token_ids: Some(&[2]), identity: false }).unwrap();
    assert_eq!(rows.ids, [2, 1]);
    assert_close(&rows.weights, &[0.4, 0.6]);
}

#[rstest]
#[case::none(None, "the router looks experts up by token id and has got none")]
#[case::few(Some([0].as_slice()), "token ids are [1], wanted [2]")]
#[case::unknown(Some([0, 3].as_slice()), "id 3 of token 1 is not in 0..3")]
#[case::negative(Some([-1, 0].as_slice()), "id -1 of token 0 is not in 0..3")]
#[case::wrapping(Some([0, i32::MAX].as_slice()), "id 2147483647 of token 1 is not in 0..3")]
fn bad_token_ids_are_contract_errors(#[case] token_ids: Option<&[i32]>, #[case] why: &str) {
    let table = HashTable::new(vec![0, 1, 3, 0, 2, 1], 2).unwrap();
    let router = router(RoutingMethod::Sigmoid, 4, 2).with_hash_table(table).unwrap();
    let error = route_all(&router, &[0.0; 8], Call { token_ids, identity: false }).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Contract);
    assert_eq!(error.source.map(|source| source.to_string()).as_deref(), Some(why));
}

#[test]
fn shared_slots_keep_their_weight() {
    let config = RoutingConfig { routed_scaling_factor: 3.0, ..config(RoutingMethod::SigmoidRenorm, 4, 1) };
    let shared = SharedSlots { count: 2, weight: 0.5 };
    let router = HostRouter::new(config).unwrap().with_shared_slots(shared).unwrap();
    assert_eq!(router.slots(), 3);
    let rows = route_all(&router, &[L, [9.0, 0.0, 0.0, 0.0]].concat(), Call::default()).unwrap();
    assert_eq!(rows.ids, [1, 4, 5, 0, 4, 5]);
    assert_close(&rows.weights, &[3.0, 0.5, 0.5, 3.0, 0.5, 0.5]);
}

#[test]
fn zero_experts_become_the_identity_weight() {
    // Experts 2 and 3 have no weights; the shared slot follows the two that have.
    let config = RoutingConfig { routed_scaling_factor: 2.0, ..config(RoutingMethod::Sigmoid, 4, 3) };
    let router = HostRouter::new(config).unwrap().with_zero_experts(2).unwrap();
    let router = router.with_shared_slots(SharedSlots { count: 1, weight: 1.0 }).unwrap();
    let logits = [L, [3.0, 2.0, 0.0, -9.0]].concat();
    let rows = route_all(&router, &logits, Call { token_ids: None, identity: true }).unwrap();
    assert_eq!(rows.ids, [1, NO_EXPERT, 0, 2, 0, 1, NO_EXPERT, 2]);
    assert_close(&rows.weights[..4], &[1.5, 0.0, 1.0, 1.0]);
    assert_eq!((rows.weights[6], rows.weights[7]), (0.0, 1.0));
    assert_close(&rows.identity, &[4.0 / 3.0, 1.0]);
}

#[test]
fn identity_weights_are_lent_exactly_where_there_are_some() {
    let plain = router(RoutingMethod::Sigmoid, 4, 2);
    let with = plain.clone().with_zero_experts(1).unwrap();
    for (router, identity) in [(plain, true), (with, false)] {
        let error = route_all(&router, &L, Call { token_ids: None, identity }).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Contract);
    }
}

#[test]
fn additions_that_do_not_fit_are_refused() {
    let router = || router(RoutingMethod::DeepSeekV3, 4, 2);
    let table = |ids: &[i32], top_k| HashTable::new(ids, top_k);
    let biased =
        RoutingConfig { correction_bias: Some(vec![0.0; 4]), ..config(RoutingMethod::DeepSeekV3, 4, 2) };
    let biased = HostRouter::new(biased).unwrap();
    for (error, want) in [
        (table(&[], 2).err(), "hash table has 0 ids, wanted rows of 2"),
        (table(&[1, 2, 3], 2).err(), "hash table has 3 ids, wanted rows of 2"),
        (
            router().with_hash_table(table(&[1], 1).unwrap()).err(),
            "hash table has rows of 1 ids, wanted top_k 2",
        ),
        (
            router().with_hash_table(table(&[0, 1, 2, 2], 2).unwrap()).err(),
            "row 1 of the hash table has id 2, wanted distinct ids in 0..4",
        ),
        (
            router().with_hash_table(table(&[0, 4], 2).unwrap()).err(),
            "row 0 of the hash table has id 4, wanted distinct ids in 0..4",
        ),
        (
            biased.with_hash_table(table(&[0, 1], 2).unwrap()).err(),
            "routing method deepseek-v3 has groups or a correction bias to choose by, and a hash table",
        ),
        (
            router().with_shared_slots(SharedSlots { count: 1, weight: f32::NAN }).err(),
            "weight of the shared slots is NaN",
        ),
        (
            router().with_shared_slots(SharedSlots { count: usize::MAX, weight: 1.0 }).err(),
            "num_experts 18446744073709551615 is not in 1..=2147483647",
        ),
        (router().with_zero_experts(4).err(), "4 zero-experts of num_experts 4 leave no expert"),
    ] {
        assert_eq!(error.map(|e| e.to_string()).as_deref(), Some(want));
    }
}
