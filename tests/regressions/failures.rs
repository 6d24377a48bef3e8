//! Ranks that hang, fail or overtake each other.

use std::time::{Duration, Instant};

use fused_moe::{ErrorKind, Fault, Overlap, QuantScheme, Rank};
use moe_conformance::Case;

use crate::common::{self, PAIRS, PATIENT, on_ranks, pair, seed};

/// DeepEP #74, #137, #294, #570, #707, mori #588, #494, NeMo-RL #4027: a rank that did not come left the others spinning until
/// somebody killed the job. Every wait has a deadline, and its end names the rank that is missing.
#[test]
fn deepep_74_a_silent_rank_is_named_at_the_deadline() {
    let case = Case::small(QuantScheme::Unquantized, 3, seed());
    let (weights, registry, inputs) = (case.weights(), fused_moe::default_backends(), case.inputs(0));
    for names in PAIRS {
        on_ranks(&case, Duration::from_secs(2), |group| {
            let mut rank = common::Rank::build(&registry, (&case.config(), &weights), pair(names), &group)?;
            if rank.rank == 1 {
                return Ok(());
            }
            let start = Instant::now();
            let error = rank.apply(&inputs[rank.rank], Overlap::default()).expect_err("rank 1 is silent");
            assert!(matches!(error.kind, ErrorKind::PeerLost { rank: Rank(1), .. }), "{names:?}: {error}");
            assert!(start.elapsed() < PATIENT);
            Ok(())
        });
    }
}

/// vLLM #27774: one rank raised and the others waited for it for ever. A rank that fails takes part with a status word:
/// all ranks return the same error, and the handle goes on.
#[test]
fn vllm_27774_a_failing_rank_fails_the_round_and_nothing_else() {
    let case = Case::small(QuantScheme::Unquantized, 3, seed());
    let (weights, registry, inputs) = (case.weights(), fused_moe::default_backends(), case.inputs(0));
    let wanted = ErrorKind::RankFailed { rank: Rank(2), fault: Fault::OverlapFailed };
    for names in PAIRS {
        on_ranks(&case, PATIENT, |group| {
            let mut rank = common::Rank::build(&registry, (&case.config(), &weights), pair(names), &group)?;
            let input = &inputs[rank.rank];
            let before = rank.apply(input, Overlap::default())?;
            let fails = rank.rank == 2;
            let mut work = |_| match fails {
                true => Err(fused_moe::Error::new(ErrorKind::Other, fused_moe::Stage::Experts, "shared")),
                false => Ok(()),
            };
            let overlap = Overlap { dispatch: Some(&mut work), combine: None };
            let error = rank.apply(input, overlap).expect_err("rank 2 fails");
            assert_eq!(error.kind, wanted, "{names:?}");
            assert_eq!(rank.apply(input, Overlap::default())?, before, "{names:?}");
            Ok(())
        });
    }
}

/// mori #80, #342, #494 and rtp-llm #1325 (a third of its runs): buffers of one round were written by the next before all
/// ranks had read them. Rounds follow each other here without a barrier, of different sizes, with ranks that dawdle in
/// turn; each has to give the bits that it gives alone.
#[test]
fn mori_80_rounds_do_not_overtake_each_other() {
    const ROUNDS: usize = 24;
    let case = Case { top_k: 4, ..Case::small(QuantScheme::Unquantized, 4, seed()) };
    let (weights, registry) = (case.weights(), fused_moe::default_backends());
    let inputs: Vec<_> = (0..3).map(|round| case.inputs(round)).collect();
    for names in PAIRS {
        on_ranks(&case, PATIENT, |group| {
            let mut rank = common::Rank::build(&registry, (&case.config(), &weights), pair(names), &group)?;
            let mut alone = Vec::new();
            for inputs in &inputs {
                alone.push(rank.apply(&inputs[rank.rank], Overlap::default())?);
            }
            for round in 0..ROUNDS {
                // Work of about the length of a round, on another rank and in another half each time.
                let busy = round % 4 == rank.rank;
                let mut work = |_| {
                    let sum =
                        (0..200_000u64 * u64::from(busy)).fold(0, |sum, i| std::hint::black_box(sum ^ i));
                    std::hint::black_box(sum);
                    Ok(())
                };
                let overlap = match round % 2 {
                    0 => Overlap { dispatch: Some(&mut work), combine: None },
                    _ => Overlap { dispatch: None, combine: Some(&mut work) },
                };
                let which = round % 3;
                let out = rank.apply(&inputs[which][rank.rank], overlap)?;
                assert_eq!(out, alone[which], "{names:?} in round {round}");
            }
            Ok(())
        });
    }
}

/// vLLM #27513: two micro-batches on a backend that cannot overlap ended in an assertion of the forward pass. Overlapped
/// work runs on every backend, at once where nothing is in flight, and once per half.
#[test]
fn vllm_27513_overlap_is_never_an_assertion() {
    let case = Case::small(QuantScheme::Unquantized, 2, seed());
    let (weights, registry, inputs) = (case.weights(), fused_moe::default_backends(), case.inputs(0));
    for names in PAIRS {
        on_ranks(&case, PATIENT, |group| {
            let mut rank = common::Rank::build(&registry, (&case.config(), &weights), pair(names), &group)?;
            let (mut first, mut second) = (0, 0);
            let mut in_dispatch = |_| {
                first += 1;
                Ok(())
            };
            let mut in_combine = |_| {
                second += 1;
                Ok(())
            };
            let overlap = Overlap { dispatch: Some(&mut in_dispatch), combine: Some(&mut in_combine) };
            rank.apply(&inputs[rank.rank], overlap)?;
            assert_eq!((first, second), (1, 1), "{names:?}");
            Ok(())
        });
    }
}
