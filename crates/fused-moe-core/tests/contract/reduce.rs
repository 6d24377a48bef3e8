//! Weight and reduce against a sum in f64, and what is refused.

use fused_moe_core::{
    Contiguous, DType, Delegate, ExpertMap, ExpertPlacement, NaiveBatched, NoOp, Rank, ReduceError,
    ReduceInput, TensorView, TensorViewMut, TopK, TopKWeightAndReduce,
};
use half::{bf16, f16};
use rand::Rng;
use rstest::rstest;

use crate::layer::fresh;

const ROWS: usize = 5;
const VALID: usize = 4;
const SLOTS: usize = 3;
const HIDDEN: usize = 7;
const EXPERTS: usize = 6;

/// Rows with their routing, and the placement of which rank 1 of 2 reduces.
struct Batch {
    ids: Vec<i32>,
    weights: Vec<f32>,
    placement: ExpertPlacement,
}

impl Batch {
    fn random(rng: &mut impl Rng) -> Self {
        let mut ids = Vec::new();
        for _ in 0..ROWS {
            let first: usize = rng.random_range(0..EXPERTS);
            ids.extend((0..SLOTS).map(|slot| ((first + slot * 2) % EXPERTS) as i32));
        }
        ids[SLOTS - 1] = -1;
        let owners: Vec<usize> = (0..EXPERTS).map(|_| rng.random_range(0..2)).collect();
        let weights = (0..ROWS * SLOTS).map(|_| rng.random_range(-1.0..1.0)).collect();
        Self { ids, weights, placement: ExpertPlacement::from_owners(&owners, 2).unwrap() }
    }

    fn map(&self) -> ExpertMap {
        ExpertMap::new(&self.placement, Rank(1))
    }

    fn topk(&self) -> TopK<'_> {
        TopK {
            ids: TensorView::from_slice(&self.ids, DType::I32, &[ROWS, SLOTS]).unwrap(),
            weights: TensorView::from_slice(&self.weights, DType::F32, &[ROWS, SLOTS]).unwrap(),
        }
    }

    /// The row of the flattened expert output that holds `slot` of `row`, by each variant's definition.
    fn source(&self, how: TopKWeightAndReduce, row: usize, slot: usize) -> Option<usize> {
        let id = self.ids[row * SLOTS + slot];
        let local = self.map().local(id)?.0 as usize;
        Some(match how {
            TopKWeightAndReduce::Contiguous(_) => row * SLOTS + slot,
            _ => local * ROWS + self.ids[..row * SLOTS].iter().filter(|&&other| other == id).count(),
        })
    }
}

fn dims(how: TopKWeightAndReduce) -> Vec<usize> {
    match how {
        TopKWeightAndReduce::NoOp(_) => vec![ROWS, HIDDEN],
        TopKWeightAndReduce::Contiguous(_) => vec![ROWS, SLOTS, HIDDEN],
        _ => vec![EXPERTS, ROWS, HIDDEN],
    }
}

#[rstest]
fn sums_are_those_of_f64_in_slot_order(
    #[values(NoOp.into(), Contiguous.into(), NaiveBatched.into())] how: TopKWeightAndReduce,
    #[values(DType::F32, DType::Bf16)] from: DType,
    #[values(DType::F32, DType::Bf16)] to: DType,
    #[values(false, true)] weighted: bool,
) {
    let mut rng = fresh();
    let batch = Batch::random(&mut rng);
    let len: usize = dims(how).iter().product();
    let brain: Vec<bf16> = (0..len).map(|_| bf16::from_f32(rng.random_range(-2.0..2.0))).collect();
    let wide: Vec<f32> = brain.iter().map(|x| x.to_f32()).collect();
    let expert_out = match from {
        DType::F32 => TensorView::from_slice(&wide, from, &dims(how)),
        _ => TensorView::from_slice(&brain, from, &dims(how)),
    }
    .unwrap();
    let (mut out32, mut out16) = (vec![f32::NAN; ROWS * HIDDEN], vec![bf16::NAN; ROWS * HIDDEN]);
    let out = match to {
        DType::F32 => TensorViewMut::from_slice(&mut out32, to, &[ROWS, HIDDEN]),
        _ => TensorViewMut::from_slice(&mut out16, to, &[ROWS, HIDDEN]),
    }
    .unwrap();
    let map = batch.map();
    how.reduce(ReduceInput { expert_out, topk: batch.topk(), num_rows: VALID, experts: &map, weighted }, out)
        .unwrap();
    if to == DType::Bf16 {
        out32 = out16.iter().map(|x| x.to_f32()).collect();
    }
    for row in 0..VALID {
        for column in 0..HIDDEN {
            let (mut exact, mut ordered) = (0.0_f64, 0.0_f32);
            let mut term = |source: usize, weight: f32| {
                let x = wide[source * HIDDEN + column];
                exact += f64::from(weight) * f64::from(x);
                ordered += weight * x;
            };
            if how.is_no_op() {
                term(row, 1.0);
            } else {
                for slot in 0..SLOTS {
                    let weight = if weighted { 1.0 } else { batch.weights[row * SLOTS + slot] };
                    if let Some(source) = batch.source(how, row, slot) {
                        term(source, weight);
                    }
                }
            }
            let got = out32[row * HIDDEN + column];
            let tolerance = if to == DType::F32 { 1e-5 } else { 2e-2 * (1.0 + exact.abs()) };
            assert!((f64::from(got) - exact).abs() <= tolerance, "[{row}, {column}]: {got}, want {exact}");
            let rounded = if to == DType::F32 { ordered } else { bf16::from_f32(ordered).to_f32() };
            assert_eq!(got.to_bits(), rounded.to_bits(), "[{row}, {column}] is not summed in slot order");
        }
    }
    assert!(out32[VALID * HIDDEN..].iter().all(|x| x.is_nan()), "a row behind the valid ones was written");
}

#[test]
fn the_order_of_slots_shows() {
    // 1e8 + 1 - 1e8 is 0 in f32, 1e8 - 1e8 + 1 is 1: the test above can tell the orders apart.
    let placement = ExpertPlacement::linear(3, 1).unwrap();
    let map = ExpertMap::new(&placement, Rank(0));
    let (ids, values) = ([0, 1, 2], [1e8_f32, 1.0, -1e8]);
    for (order, wanted) in [([0, 1, 2], 0.0_f32), ([0, 2, 1], 1.0)] {
        let outputs = order.map(|i| values[i]);
        let topk = TopK {
            ids: TensorView::from_slice(&ids, DType::I32, &[1, 3]).unwrap(),
            weights: TensorView::from_slice(&[1.0; 3], DType::F32, &[1, 3]).unwrap(),
        };
        let expert_out = TensorView::from_slice(&outputs, DType::F32, &[1, 3, 1]).unwrap();
        let mut out = [f32::NAN];
        let view = TensorViewMut::from_slice(&mut out, DType::F32, &[1, 1]).unwrap();
        let input = ReduceInput { expert_out, topk, num_rows: 1, experts: &map, weighted: false };
        TopKWeightAndReduce::from(Contiguous).reduce(input, view).unwrap();
        assert_eq!(out, [wanted]);
    }
}

/// Reduces zeros of `from` dimensions for `rows` rows with `slots` slots into `to` dimensions.
fn try_reduce(
    how: TopKWeightAndReduce,
    from: (DType, &[usize]),
    (rows, slots): (usize, usize),
    to: &[usize],
) -> Result<(), ReduceError> {
    let placement = ExpertPlacement::linear(EXPERTS, 1).unwrap();
    let (wide, half) = (vec![0_f32; 400], vec![f16::ZERO; 400]);
    let expert_out = match from.0 {
        DType::F16 => TensorView::from_slice(&half, DType::F16, from.1),
        _ => TensorView::from_slice(&wide, DType::F32, from.1),
    }
    .unwrap();
    let ids: Vec<i32> = (0..rows * slots).map(|i| (i % slots) as i32).collect();
    let topk = TopK {
        ids: TensorView::from_slice(&ids, DType::I32, &[rows, slots]).unwrap(),
        weights: TensorView::from_slice(&wide, DType::F32, &[rows, slots]).unwrap(),
    };
    let mut out = vec![f32::NAN; 200];
    let out = TensorViewMut::from_slice(&mut out, DType::F32, to).unwrap();
    let map = ExpertMap::new(&placement, Rank(0));
    how.reduce(ReduceInput { expert_out, topk, num_rows: 4, experts: &map, weighted: false }, out)
}

#[rstest]
#[case::no_op(NoOp.into(), &[4, 7], 2, &[4, 7], true)]
#[case::no_op_wide_out(NoOp.into(), &[4, 7], 2, &[4, 8], false)]
#[case::no_op_narrow_out(NoOp.into(), &[4, 7], 2, &[4, 6], false)]
#[case::no_op_few_rows(NoOp.into(), &[3, 7], 2, &[4, 7], false)]
#[case::no_op_short_out(NoOp.into(), &[4, 7], 2, &[3, 7], false)]
#[case::no_op_flat_out(NoOp.into(), &[4, 7], 2, &[28], false)]
#[case::no_op_with_slots(NoOp.into(), &[4, 2, 7], 2, &[4, 7], false)]
#[case::contiguous(Contiguous.into(), &[4, 2, 7], 2, &[4, 7], true)]
#[case::contiguous_spare_rows(Contiguous.into(), &[5, 2, 7], 2, &[6, 7], true)]
#[case::contiguous_other_slots(Contiguous.into(), &[4, 3, 7], 2, &[4, 7], false)]
#[case::contiguous_few_rows(Contiguous.into(), &[3, 2, 7], 2, &[4, 7], false)]
#[case::contiguous_wide_out(Contiguous.into(), &[4, 2, 7], 2, &[4, 8], false)]
#[case::contiguous_reduced(Contiguous.into(), &[4, 7], 2, &[4, 7], false)]
#[case::batched(NaiveBatched.into(), &[2, 4, 7], 2, &[4, 7], true)]
#[case::batched_few_experts(NaiveBatched.into(), &[1, 4, 7], 2, &[4, 7], false)]
#[case::batched_few_tokens(NaiveBatched.into(), &[2, 3, 7], 2, &[4, 7], false)]
#[case::batched_wide_out(NaiveBatched.into(), &[2, 4, 7], 2, &[4, 9], false)]
fn shapes_are_checked(
    #[case] how: TopKWeightAndReduce,
    #[case] from: &[usize],
    #[case] slots: usize,
    #[case] to: &[usize],
    #[case] fits: bool,
) {
    let result = try_reduce(how, (DType::F32, from), (4, slots), to);
    assert_eq!(result.is_ok(), fits, "{result:?}");
    if fits {
        let too_few = try_reduce(how, (DType::F32, from), (3, slots), to);
        assert_eq!(too_few.is_ok(), how.is_no_op(), "top-k of 3 rows: {too_few:?}");
        let f16 = try_reduce(how, (DType::F16, from), (4, slots), to).unwrap_err();
        assert!(matches!(f16, ReduceError::Unsupported { dtype: DType::F16, .. }), "{f16}");
    }
}

#[test]
fn a_delegated_reduction_is_not_done() {
    let error = try_reduce(Delegate.into(), (DType::F32, &[4, 7]), (4, 2), &[4, 7]).unwrap_err();
    assert_eq!(error, ReduceError::Delegated);
    let names = [NoOp.into(), Contiguous.into(), NaiveBatched.into(), Delegate.into()]
        .map(|how: TopKWeightAndReduce| (how.name(), how.is_no_op(), how.is_delegate()));
    let wanted = [("no-op", true, false), ("contiguous", false, false), ("naive-batched", false, false)];
    assert_eq!(names[..3], wanted);
    assert_eq!(names[3], ("delegate", false, true));
}
