//! Bits that must not change.

mod common;

use std::num::NonZeroUsize;

use aiter_experts::{AiterExperts, SortPolicy};
use common::*;
use fused_moe_core::QuantScheme::{self, *};
use fused_moe_core::{DType, Layout, Rank, TensorView, TensorViewMut};
use grouped_gemm::{Executor, Isa};
use half::bf16;
use rstest::rstest;

fn with_threads(isa: Isa, threads: usize) -> AiterExperts {
    AiterExperts::with_executor(Executor::new(isa, NonZeroUsize::new(threads).unwrap()).unwrap())
}

#[rstest]
fn the_number_of_threads_does_not_matter(
    #[values(Unquantized, Fp8Block(FN), Fp8Ptpc(FN), Fp8PerTensor(FN))] quant: QuantScheme,
) {
    let mut rng = fresh_rng();
    let config = on_one_rank(quant, RAGGED);
    let layer = Layer::random(&mut rng, &config);
    let batch = Batch::random(&mut rng, &config, [200, 201]);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let run = |threads| {
            let provider = with_threads(isa, threads);
            bits(&run_with(&provider, &config, (&layer, Rank(0)), &batch, Arrival::Bf16))
        };
        let one = run(1);
        for threads in [1, 2, 7] {
            assert_eq!(run(threads), one, "{quant} on {threads} threads, {isa}");
        }
    }
}

/// Rows and ids behind the received ones are poison in every batch of these tests.
#[rstest]
fn the_sort_policy_does_not_matter(#[values(Unquantized, Fp8Block(FN))] quant: QuantScheme) {
    let mut rng = fresh_rng();
    let config = on_one_rank(quant, RAGGED);
    let layer = Layer::random(&mut rng, &config);
    for rows in [0, 1, 40] {
        let batch = Batch::random(&mut rng, &config, [rows, 60]);
        let [auto, single, multi] = SortPolicy::ALL.map(|policy| {
            let provider = AiterExperts::new().with_sort_policy(policy);
            bits(&run_with(&provider, &config, (&layer, Rank(0)), &batch, Arrival::Bf16))
        });
        assert_eq!(single, auto);
        assert_eq!(multi, auto);
    }
}

#[rstest]
fn calls_may_overlap(#[values(Unquantized, Fp8Block(FN))] quant: QuantScheme) {
    let mut rng = fresh_rng();
    let config = on_one_rank(quant, RAGGED);
    let layer = Layer::random(&mut rng, &config);
    let batch = Batch::random(&mut rng, &config, [64, 64]);
    let alone = bits(&run(&config, &layer, &batch, Arrival::Quantised));
    std::thread::scope(|scope| {
        let call = || bits(&run(&config, &layer, &batch, Arrival::Quantised));
        let calls: Vec<_> = (0..8).map(|_| scope.spawn(call)).collect();
        for call in calls {
            assert_eq!(call.join().unwrap(), alone);
        }
    });
}

#[rstest]
fn a_row_does_not_depend_on_the_others(
    #[values(Unquantized, Fp8Block(FN), Fp8Ptpc(FNUZ))] quant: QuantScheme,
    #[values(Arrival::Quantised, Arrival::Bf16)] arrival: Arrival,
) {
    let mut rng = fresh_rng();
    let config = on_one_rank(quant, RAGGED);
    let layer = Layer::random(&mut rng, &config);
    let batch = Batch::random(&mut rng, &config, [120, 120]);
    let all = run(&config, &layer, &batch, arrival);
    for row in [0, 1, 59, 119] {
        let alone = run(&config, &layer, &batch.only(&config, row), arrival);
        assert_eq!(bits(&alone), bits(&all[row * config.hidden..][..config.hidden]), "{quant} row {row}");
    }
}

/// Rows of a wider buffer, as a comm that keeps everything of a token together lends them.
#[rstest]
fn rows_may_have_gaps(
    #[values(Unquantized, Fp8Block(FN), Fp8Ptpc(FN))] quant: QuantScheme,
    #[values(Arrival::Quantised, Arrival::Bf16)] arrival: Arrival,
) {
    fn spread<T: Copy>(values: &[T], columns: usize, gap: usize, poison: T) -> Vec<T> {
        let rows = values.chunks(columns).flat_map(|row| row.iter().copied().chain(vec![poison; gap]));
        rows.collect()
    }
    let mut rng = fresh_rng();
    let config = on_one_rank(quant, RAGGED);
    let layer = Layer::random(&mut rng, &config);
    let batch = Batch::random(&mut rng, &config, [33, 40]);
    let wanted = run(&config, &layer, &batch, arrival);

    let plan = plan(&config, 40, arrival);
    let kernel = build(&AiterExperts::new(), &config, &plan, Rank(0));
    let payload = plan.wire().scale.map(|_| Payload::quantize(&config, &batch));
    let (hidden, k) = (config.hidden, config.top_k);
    let x = spread(&batch.x, hidden, 16, bf16::NAN);
    let ids = spread(&batch.ids, k, 5, i32::MIN);
    let weights = spread(&batch.weights, k, 1, f32::NAN);
    let codes = payload.as_ref().map(|p| spread(&p.codes, hidden, 3, 0x7f));
    let groups = plan.wire().scales_per_token(hidden);
    let scales = payload.as_ref().map(|p| spread(&p.scales, groups, 2, f32::NAN));

    let mut lent = Lent::new(&config, &batch, payload.as_ref());
    lent.hidden = match &codes {
        None => gapped(&x, DType::Bf16, [40, hidden], 16),
        Some(codes) => gapped(codes, FN.dtype(), [40, hidden], 3),
    };
    lent.scale = scales.as_ref().map(|scales| gapped(scales, DType::F32, [40, groups], 2));
    lent.ids = gapped(&ids, DType::I32, [40, k], 5);
    lent.weights = gapped(&weights, DType::F32, [40, k], 1);
    let mut out = vec![bf16::ZERO; 40 * (hidden + 7)];
    let layout = Layout::contiguous(&[40, hidden]).strided(&[hidden + 7, 1], 0);
    let view = TensorViewMut::from_slice_with(&mut out, DType::Bf16, layout).unwrap();
    lent.apply(&*kernel, &layer.pack(&config, Rank(0)), batch.rows, view).unwrap();
    for (row, out) in out.chunks(hidden + 7).enumerate() {
        if row < batch.rows {
            assert_eq!(bits(&out[..hidden]), bits(&wanted[row * hidden..][..hidden]), "{quant} row {row}");
        }
        assert!(out[hidden..].iter().all(|v| v.to_bits() == 0), "the gap behind row {row} was written");
    }
}

fn gapped<T: fused_moe_core::Element>(
    values: &[T],
    dtype: DType,
    [rows, columns]: [usize; 2],
    gap: usize,
) -> TensorView<'_> {
    let layout = Layout::contiguous(&[rows, columns]).strided(&[columns + gap, 1], 0);
    TensorView::from_slice_with(values, dtype, layout).unwrap()
}
