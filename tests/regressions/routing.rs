//! Logits to experts.

use fused_moe::router::HostRouter;
use fused_moe::{
    Arena, DType, ExecCx, ExpertGroups, Router, RoutingConfig, RoutingMethod, Stream, TensorView,
    TensorViewMut, TopKMut,
};
use rstest::rstest;

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

/// Routes one row into outputs that hold garbage.
fn route(config: &RoutingConfig, logits: &[f32]) -> (Vec<i32>, Vec<f32>) {
    let k = config.top_k;
    let (mut ids, mut weights) = (vec![-99; k], vec![f32::NAN; k]);
    let out = TopKMut {
        ids: TensorViewMut::from_slice(&mut ids, DType::I32, &[1, k]).unwrap(),
        weights: TensorViewMut::from_slice(&mut weights, DType::F32, &[1, k]).unwrap(),
    };
    let workspace = Arena::new(TensorViewMut::from_slice(&mut [0u8; 0], DType::U8, &[0]).unwrap());
    let mut cx = ExecCx { stream: Stream::Host, workspace };
    let logits = TensorView::from_slice(logits, DType::F32, &[1, config.num_experts]).unwrap();
    HostRouter::new(config.clone()).unwrap().route(&mut cx, logits, out).unwrap();
    (ids, weights)
}

/// FlashInfer #2822, vLLM #37591 (gsm8k 0 %): the kernel began its maximum at 0 and chose padding over experts whose logits
/// were all negative.
#[rstest]
fn flashinfer_2822_negative_logits_choose_the_largest(
    #[values(RoutingMethod::Renormalize, RoutingMethod::RenormalizeNaive, RoutingMethod::Default)]
    method: RoutingMethod,
) {
    let (ids, weights) = route(&config(method, 6, 2), &[-9.0, -7.5, -8.0, -30.0, -7.0, -50.0]);
    assert_eq!(ids, [4, 1]);
    assert!(weights.iter().all(|w| *w > 0.0 && *w < 1.0), "{weights:?}");
}

/// DeepSeek-V3 with a bias: masked groups were set to 0, which wins over admissible experts whose biased scores are
/// negative. They are out, whatever the scores.
#[test]
fn vllm_masked_groups_never_win_over_negative_scores() {
    let v3 = RoutingConfig {
        groups: Some(ExpertGroups { n_group: 2, topk_group: 1 }),
        correction_bias: Some(vec![-2.0, -2.0, -2.0, -3.0, -3.0, -3.0]),
        ..config(RoutingMethod::DeepSeekV3, 6, 3)
    };
    assert_eq!(route(&v3, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).0, [2, 1, 0]);
}

/// vLLM's `grouped_topk` without a bias ignored `scoring_func` and `routed_scaling_factor` where the groups did not fit,
/// and went on. Groups that do not fit are an error that names the numbers; those that do are scored as asked.
#[test]
fn vllm_groups_that_do_not_fit_are_an_error() {
    let grouped = |n_group, topk_group| RoutingConfig {
        groups: Some(ExpertGroups { n_group, topk_group }),
        routed_scaling_factor: 2.5,
        ..config(RoutingMethod::GroupLimitedSigmoid, 8, 2)
    };
    let error = HostRouter::new(grouped(3, 1)).unwrap_err().to_string();
    assert_eq!(error, "num_experts 8 does not divide into n_group 3 groups");
    let (ids, weights) = route(&grouped(4, 1), &[0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
    assert_eq!(ids, [4, 5]);
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    assert!(
        (weights[0] - 2.5 * sigmoid(1.0)).abs() < 1e-6 && (weights[1] - 1.25).abs() < 1e-6,
        "{weights:?}"
    );
}

/// FlashInfer #2736: methods that models need were missing, and the nearest one was taken. Every method of the
/// vocabulary is there, by a name that is parsed back; one that is not is an error.
#[test]
fn flashinfer_2736_every_method_has_a_router() {
    for method in RoutingMethod::ALL {
        let groups =
            matches!(method, RoutingMethod::GroupLimitedSoftmax | RoutingMethod::GroupLimitedSigmoid)
                .then_some(ExpertGroups { n_group: 2, topk_group: 1 });
        let (ids, weights) = route(&RoutingConfig { groups, ..config(method, 8, 1) }, &[0.5; 8]);
        assert_eq!(ids, [0], "{method}: the lowest of equals");
        assert!(weights[0].is_finite());
        assert_eq!(method.name().parse(), Ok(method));
    }
    assert!("noaux".parse::<RoutingMethod>().is_err());
}
