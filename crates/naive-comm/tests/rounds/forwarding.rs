//! What arrives is what was sent, and what comes back is its sum.

use std::num::NonZeroUsize;

use ep_transport::ThreadOptions;
use fused_moe_core::*;
use half::bf16;
use rstest::rstest;

use crate::layer::{Case, EXPERTS, Tokens};

const ROUNDS: u64 = 6;

/// Checks every received byte of the valid rows against the tokens of all ranks in rank order.
fn check_rounds(case: Case, options: ThreadOptions) {
    case.run(options, |mut rig| {
        for round in 1..=ROUNDS {
            let all: Vec<Tokens> = (0..case.ranks).map(|rank| Tokens::of(&case, rank, round)).collect();
            let own = rig.tokens(round);
            let before = own.hidden.clone();
            let mut sums = vec![f32::NAN; own.count * case.hidden];
            let out = TensorViewMut::from_slice(&mut sums, DType::F32, &[own.count, case.hidden]).unwrap();
            let rank = rig.rank;
            let result = rig.round_into(&own, out, |arrival| {
                assert_eq!(arrival.rows, all.iter().map(|t| t.count).sum::<usize>());
                assert_eq!(arrival.scale.is_some(), case.quant != QuantScheme::Unquantized);
                let sources = all.iter().map(|tokens| (tokens, tokens.on_the_wire(&case)));
                let mut row = 0;
                for (tokens, (payload, scales)) in sources {
                    let (bytes, width) =
                        (payload.len() / tokens.count.max(1), scales.len() / tokens.count.max(1));
                    for token in 0..tokens.count {
                        let place = format!("row {row} on {rank} in round {round}");
                        let want = &payload[token * bytes..][..bytes];
                        assert_eq!(arrival.payload.row_bytes(row).unwrap(), want, "{place}");
                        if let Some(scale) = arrival.scale {
                            assert_eq!(
                                scale.row::<f32>(row).unwrap(),
                                &scales[token * width..][..width],
                                "{place}"
                            );
                        }
                        if case.kind == KernelKind::Monolithic {
                            let want = &tokens.logits[token * EXPERTS..][..EXPERTS];
                            assert_eq!(arrival.routing[0].row::<f32>(row).unwrap(), want, "{place}");
                        } else {
                            let slots = token * case.top_k..(token + 1) * case.top_k;
                            let ids = arrival.routing[0].row::<i32>(row).unwrap();
                            let weights = arrival.routing[1].row::<f32>(row).unwrap();
                            assert_eq!(ids, &tokens.ids[slots.clone()], "{place}");
                            match case.weight_on_input {
                                true => assert_eq!(weights, [1.0], "{place}"),
                                false => assert_eq!(weights, &tokens.weights[slots], "{place}"),
                            }
                        }
                        row += 1;
                    }
                }
            });
            result.expect("a good round");
            assert_eq!(sums, own.answer(&case, &rig.config), "{rank} in round {round}");
            assert_eq!(own.hidden, before, "the caller's tensor was written");
        }
    });
}

#[rstest]
fn arrives_bit_for_bit_and_sums_in_rank_order(
    #[values(
        ("local", 1),
        ("naive", 1), ("naive", 2), ("naive", 3), ("naive", 8),
        ("allgather_reducescatter", 1), ("allgather_reducescatter", 2),
        ("allgather_reducescatter", 3), ("allgather_reducescatter", 8)
    )]
    (comm, ranks): (&'static str, usize),
    #[values(KernelKind::Modular, KernelKind::Monolithic)] kind: KernelKind,
    #[values(
        QuantScheme::Unquantized,
        QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
        QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fnuz),
        QuantScheme::Fp8PerTensor(Fp8Format::E4M3FnuzMax224)
    )]
    quant: QuantScheme,
) {
    check_rounds(Case { kind, quant, ..Case::new(comm, ranks) }, ThreadOptions::default());
}

#[rstest]
fn outputs_may_be_lent(
    #[values(("local", 1), ("naive", 3), ("allgather_reducescatter", 3))] on: (&'static str, usize),
) {
    check_rounds(Case { in_place: false, ..Case::new(on.0, on.1) }, ThreadOptions::default());
}

#[rstest]
fn peers_on_other_nodes_are_reached(#[values("naive", "allgather_reducescatter")] comm: &'static str) {
    let options = ThreadOptions { ranks_per_node: NonZeroUsize::new(2), ..ThreadOptions::default() };
    check_rounds(Case { quant: QuantScheme::Fp8Block(Fp8Format::E4M3Fn), ..Case::new(comm, 4) }, options);
}

#[rstest]
fn the_weight_multiplies_the_rows_that_travel(
    #[values(("local", 1), ("naive", 3), ("allgather_reducescatter", 3))] (comm, ranks): (
        &'static str,
        usize,
    ),
    #[values(QuantScheme::Unquantized, QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn))] quant: QuantScheme,
) {
    let case = Case { quant, top_k: 1, weight_on_input: true, ..Case::new(comm, ranks) };
    assert_eq!(case.plan(&case.config()).router_weight(), RouterWeight::OnInputByPrepare);
    check_rounds(case, ThreadOptions::default());
}

/// Rows with gaps on both sides, and an output that is rounded once to bf16.
#[rstest]
fn tensors_may_have_gaps_between_rows(
    #[values(("local", 1), ("naive", 2), ("allgather_reducescatter", 2))] (comm, ranks): (
        &'static str,
        usize,
    ),
) {
    let case = Case::new(comm, ranks);
    case.run(ThreadOptions::default(), |mut rig| {
        let tokens = rig.tokens(1);
        let (dims, pitch) = ([tokens.count, case.hidden], case.hidden + 5);
        let layout = Layout::contiguous(&dims).strided(&[pitch, 1], 3);
        let mut spread = vec![bf16::NAN; tokens.count * pitch + 3];
        for (row, to) in tokens.hidden.chunks(case.hidden).zip(spread[3..].chunks_mut(pitch)) {
            to[..case.hidden].copy_from_slice(row);
        }
        let mut written = vec![bf16::INFINITY; spread.len()];
        let mut workspace = Workspace::new(DeviceKind::Host, 0).unwrap();
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let hidden = TensorView::from_slice_with(&spread, DType::Bf16, layout).unwrap();
        let input = PrepareInput { hidden, ..tokens.input(&case) };
        let me = rig.rank;
        let (mut dispatched, routed) = rig.modular().prepare(&mut cx, input).unwrap();
        // Experts that return the rows on rank 0 and nothing elsewhere.
        let output = dispatched.output.take().unwrap().into_mut_slice::<bf16>().unwrap();
        let rows = dispatched.hidden.as_slice::<bf16>().unwrap();
        output.iter_mut().zip(rows).for_each(|(o, x)| *o = if me.0 == 0 { *x } else { bf16::ZERO });
        let out = TensorViewMut::from_slice_with(&mut written, DType::Bf16, layout).unwrap();
        rig.modular().finalize(&mut cx, routed, ExpertOut::InPlace, out).unwrap();
        for (index, (x, out)) in spread[3..].iter().zip(&written[3..]).enumerate() {
            let want = if index % pitch < case.hidden { *x } else { bf16::INFINITY };
            assert_eq!(*out, want, "element {index}");
        }
    });
}
