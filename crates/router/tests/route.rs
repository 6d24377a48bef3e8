//! The softmax and DeepSeek methods by hand on small rows, and what every call refuses.

use fused_moe_core::{
    Arena, DType, ErrorKind, ExecCx, ExpertGroups, Fault, Layout, Result, Router, RoutingConfig,
    RoutingMethod, Stream, TensorView, TensorViewMut, TopKMut,
};
use router::HostRouter;
use rstest::rstest;

const INF: f32 = f32::INFINITY;

fn route_into(config: &RoutingConfig, logits: &[f32], ids: &mut [i32], weights: &mut [f32]) -> Result<()> {
    let tokens = logits.len() / config.num_experts;
    let dims = [tokens, config.top_k];
    let workspace = Arena::new(TensorViewMut::from_slice(&mut [0u8; 0], DType::U8, &[0]).unwrap());
    let mut cx = ExecCx { stream: Stream::Host, workspace };
    HostRouter::new(config.clone()).unwrap().route(
        &mut cx,
        TensorView::from_slice(logits, DType::F32, &[tokens, config.num_experts]).unwrap(),
        TopKMut {
            ids: TensorViewMut::from_slice(ids, DType::I32, &dims).unwrap(),
            weights: TensorViewMut::from_slice(weights, DType::F32, &dims).unwrap(),
        },
    )
}

fn route(config: &RoutingConfig, logits: &[f32]) -> (Vec<i32>, Vec<f32>) {
    let len = logits.len() / config.num_experts * config.top_k;
    let (mut ids, mut weights) = (vec![-99; len], vec![f32::NAN; len]);
    route_into(config, logits, &mut ids, &mut weights).unwrap();
    (ids, weights)
}

fn softmax_config(method: RoutingMethod, num_experts: usize, top_k: usize) -> RoutingConfig {
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

fn v2(num_experts: usize, top_k: usize, n_group: usize, topk_group: usize) -> RoutingConfig {
    let groups = Some(ExpertGroups { n_group, topk_group });
    RoutingConfig { groups, ..softmax_config(RoutingMethod::GroupLimitedSoftmax, num_experts, top_k) }
}

fn v3(top_k: usize, n_group: usize, topk_group: usize, bias: &[f32]) -> RoutingConfig {
    RoutingConfig {
        method: RoutingMethod::DeepSeekV3,
        correction_bias: Some(bias.to_vec()),
        renormalize: true,
        ..v2(bias.len(), top_k, n_group, topk_group)
    }
}

fn assert_close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= 2e-6 * w.abs().max(1e-3), "{got:?} is not {want:?}");
    }
}

// Logits with softmax 1/10, 2/10, 3/10, 4/10, in another order.
const LN: [f32; 4] = [1.098_612_3, 0.0, 1.386_294_4, core::f32::consts::LN_2];

#[rstest]
#[case::softmax(RoutingMethod::Default, &[0.4, 0.3])]
#[case::renormalize(RoutingMethod::Renormalize, &[4.0 / 7.0, 3.0 / 7.0])]
#[case::naive(RoutingMethod::RenormalizeNaive, &[4.0 / 7.0, 3.0 / 7.0])]
fn softmax_methods(#[case] method: RoutingMethod, #[case] want: &[f32]) {
    let config = softmax_config(method, 4, 2);
    let (ids, weights) = route(&config, &LN);
    assert_eq!(ids, [2, 0]);
    assert_close(&weights, want);

    let scaled = RoutingConfig { routed_scaling_factor: 2.5, ..config };
    assert_close(&route(&scaled, &LN).1, &want.iter().map(|w| w * 2.5).collect::<Vec<_>>());
}

#[rstest]
#[case::ties(&[1.0, 7.0, 7.0, 7.0], &[1, 2])]
#[case::all_equal(&[0.0, -0.0, 0.0, 0.0], &[0, 1])]
#[case::negative(&[-90.0, -100.0, -89.0, -120.0], &[2, 0])]
#[case::underflow(&[0.0, -300.0, -200.0, -250.0], &[0, 2])]
#[case::minus_infinity(&[-INF, -INF, -3.0, -INF], &[2, 0])]
#[case::nothing_admissible(&[-INF, -INF, -INF, -INF], &[0, 1])]
fn order_of_ids(
    #[case] logits: &[f32],
    #[case] want: &[i32],
    #[values(RoutingMethod::Default, RoutingMethod::Renormalize, RoutingMethod::RenormalizeNaive)]
    method: RoutingMethod,
) {
    let (ids, weights) = route(&softmax_config(method, 4, 2), logits);
    assert_eq!(ids, want);
    assert!(weights.iter().all(|w| (0.0..=1.0).contains(w)), "{weights:?}");
    assert_eq!(weights.iter().sum::<f32>() > 0.0, logits.iter().any(|l| l.is_finite()), "{weights:?}");
}

#[test]
fn top_k_of_all_experts_is_a_sorted_softmax() {
    let (ids, weights) = route(&softmax_config(RoutingMethod::Default, 4, 4), &LN);
    assert_eq!(ids, [2, 0, 3, 1]);
    assert_close(&weights, &[0.4, 0.3, 0.2, 0.1]);
}

#[test]
fn v2_chooses_groups_by_their_maximum() {
    // The groups' maxima are 3, 4, 1: expert 1 is third best of all but its group is out.
    let logits = [3.0, 0.0, 4.0, 2.0, 1.0, 1.0];
    let config = v2(6, 3, 3, 2);
    let (ids, weights) = route(&config, &logits);
    assert_eq!(ids, [2, 0, 3]);
    let sum: f32 = logits.iter().map(|l| l.exp()).sum();
    let want = [4.0f32, 3.0, 2.0].map(|l| l.exp() / sum);
    assert_close(&weights, &want);

    let factor = RoutingConfig { routed_scaling_factor: 16.0, renormalize: true, ..config };
    let kept: f32 = want.iter().sum();
    assert_close(&route(&factor, &logits).1, &want.map(|w| w / kept * 16.0));
}

#[test]
fn v2_fills_up_inside_its_groups_only() {
    // Only expert 3 is admissible; its group mate is next, not an expert of a masked group.
    let (ids, weights) = route(&v2(4, 2, 2, 1), &[-INF, -INF, -INF, 0.0]);
    assert_eq!((ids, weights), (vec![3, 2], vec![1.0, 0.0]));
}

#[test]
fn v3_chooses_groups_by_their_best_two() {
    // Group 0 has the best expert, group 1 the best two.
    let (ids, weights) = route(&v3(2, 2, 1, &[0.0; 6]), &[4.0, -9.0, -9.0, 2.0, 1.0, -9.0]);
    assert_eq!(ids, [3, 4]);
    let (a, b) = (1.0 / (1.0 + (-2f32).exp()), 1.0 / (1.0 + (-1f32).exp()));
    assert_close(&weights, &[a / (a + b), b / (a + b)]);
}

#[test]
fn v3_bias_chooses_but_does_not_weigh() {
    let config = RoutingConfig {
        renormalize: false,
        routed_scaling_factor: 2.0,
        ..v3(2, 1, 1, &[0.0, 1.0, 0.0, 0.9])
    };
    let (ids, weights) = route(&config, &[3.0, 0.0, 0.0, 0.0]);
    assert_eq!(ids, [1, 3]);
    assert_close(&weights, &[1.0, 1.0]);
}

#[test]
fn v3_negative_biased_scores_do_not_lose_to_masked_groups() {
    // All choice scores are negative; filling masked groups with 0 would choose experts 0 and 1.
    let (ids, weights) = route(&v3(2, 2, 1, &[-5.0, -5.0, -3.0, -2.0]), &[9.0, 9.0, 0.0, 0.0]);
    assert_eq!((ids, weights), (vec![3, 2], vec![0.5, 0.5]));
}

#[rstest]
#[case::ties_of_groups(&[0.0; 4], &[1.0; 4], 2, &[0, 1])]
#[case::saturated(&[0.0; 4], &[30.0, 20.0, 40.0, 90.0], 1, &[0, 1])]
#[case::nothing_admissible(&[0.0; 4], &[-INF; 4], 2, &[0, 1])]
fn v3_ties(#[case] bias: &[f32], #[case] logits: &[f32], #[case] n_group: usize, #[case] want: &[i32]) {
    let (ids, weights) = route(&v3(2, n_group, 1, bias), logits);
    assert_eq!(ids, want);
    assert!(weights.iter().all(|w| w.is_finite()), "{weights:?}");
}

#[rstest]
#[case(f32::NAN)]
#[case(INF)]
fn bad_logits_are_named_and_nothing_is_written(#[case] bad: f32) {
    for method in RoutingMethod::ALL {
        let mut logits = [0.0; 12];
        logits[10] = bad;
        let (mut ids, mut weights) = ([-99; 6], [-9.0; 6]);
        let grouped =
            matches!(method, RoutingMethod::GroupLimitedSoftmax | RoutingMethod::GroupLimitedSigmoid);
        let groups = grouped.then_some(ExpertGroups { n_group: 2, topk_group: 1 });
        let top_k = if method == RoutingMethod::Llama4 { 1 } else { 2 };
        let config = RoutingConfig { groups, ..softmax_config(method, 4, top_k) };
        let len = 3 * top_k;
        let error = route_into(&config, &logits, &mut ids[..len], &mut weights[..len]).unwrap_err();
        assert_eq!(error.kind, ErrorKind::BadInput(Fault::NonFiniteLogit { token: 2, expert: 2 }));
        assert_eq!((ids, weights), ([-99; 6], [-9.0; 6]));
    }
}

#[rstest]
#[case::experts(&[2, 3], DType::F32, &[2, 2], &[2, 2])]
#[case::rank(&[8], DType::F32, &[2, 2], &[2, 2])]
#[case::ids(&[2, 4], DType::F32, &[2, 3], &[2, 2])]
#[case::weights(&[2, 4], DType::F32, &[2, 2], &[1, 2])]
fn misfits_are_contract_errors(
    #[case] logits: &[usize],
    #[case] dtype: DType,
    #[case] ids: &[usize],
    #[case] weights: &[usize],
) {
    let (x, mut i, mut w) = ([0f32; 8], [0i32; 6], [0f32; 6]);
    let workspace = Arena::new(TensorViewMut::from_slice(&mut [0u8; 0], DType::U8, &[0]).unwrap());
    let out = TopKMut {
        ids: TensorViewMut::from_slice(&mut i, DType::I32, ids).unwrap(),
        weights: TensorViewMut::from_slice(&mut w, DType::F32, weights).unwrap(),
    };
    let router = HostRouter::new(softmax_config(RoutingMethod::Default, 4, 2)).unwrap();
    let logits = TensorView::from_slice(&x, dtype, logits).unwrap();
    let error = router.route(&mut ExecCx { stream: Stream::Host, workspace }, logits, out).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Contract);
}

#[test]
fn rows_with_gaps_and_no_rows_at_all() {
    let config = softmax_config(RoutingMethod::Default, 2, 1);
    assert_eq!(route(&config, &[]), (vec![], vec![]));

    let logits = [0.0f32, 9.0, INF, 9.0, 0.0];
    let (mut ids, mut weights) = ([0i32; 2], [0f32; 2]);
    let workspace = Arena::new(TensorViewMut::from_slice(&mut [0u8; 0], DType::U8, &[0]).unwrap());
    let out = TopKMut {
        ids: TensorViewMut::from_slice(&mut ids, DType::I32, &[2, 1]).unwrap(),
        weights: TensorViewMut::from_slice(&mut weights, DType::F32, &[2, 1]).unwrap(),
    };
    let layout = Layout::contiguous(&[2, 2]).strided(&[3, 1], 0);
    let logits = TensorView::from_slice_with(&logits, DType::F32, layout).unwrap();
    let mut cx = ExecCx { stream: Stream::Host, workspace };
    HostRouter::new(config).unwrap().route(&mut cx, logits, out).unwrap();
    assert_eq!(ids, [1, 0]);
}
