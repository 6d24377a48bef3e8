//! How much memory there is, who knows it beforehand, and what happens at its end.

use fused_moe::{ErrorKind, Fault, Overlap, ProcessGroup, QuantScheme, Rank};
use moe_conformance::{Case, RankInput};
use rstest::rstest;

use crate::common::{self, PAIRS, PATIENT, agrees_everywhere, on_ranks, pair, seed};

/// vLLM #48179 and #30899: a workspace that had been locked at 3.75 MB needed 146.41 MB for a later batch, and the
/// engine ended. A kernel holds what its configuration needs at most, from the start, for one token and for all; and how
/// much that is, is known before (MoRI's `MORI_SHMEM_HEAP_SIZE` has to be guessed).
#[test]
fn vllm_48179_memory_is_known_before_and_never_grows() {
    let case = Case { tokens: vec![33; 3], ..Case::small(QuantScheme::Unquantized, 3, seed()) };
    let (weights, registry, config) = (case.weights(), fused_moe::default_backends(), case.config());
    let few = Case { tokens: vec![1, 0, 1], ..case.clone() };
    let (small, large) = (few.inputs(0), case.inputs(0));
    for names in PAIRS {
        let plan = registry.survey(&config, pair(names)).unwrap().fitting.remove(0);
        on_ranks(&case, PATIENT, |group| {
            let announced = registry.required_bytes(&config, &plan, group.rank())?;
            let mut rank = common::Rank::build(&registry, (&config, &weights), pair(names), &group)?;
            assert_eq!(rank.kernel.bytes(), announced, "{names:?}");
            for inputs in [&small, &large, &small, &large] {
                rank.apply(&inputs[rank.rank], Overlap::default())?;
                assert_eq!(rank.kernel.bytes(), announced, "{names:?}");
            }
            Ok(())
        });
    }
}

/// vLLM sends without comparing the batch with the buffers, and MoRI's overflow is an assertion that release builds leave
/// out. One token too many is the same typed error on every rank.
#[test]
fn vllm_a_batch_larger_than_the_buffers_is_an_error_on_every_rank() {
    let case = Case { tokens: vec![2, 2], ..Case::small(QuantScheme::Unquantized, 2, seed()) };
    let (weights, registry, config) = (case.weights(), fused_moe::default_backends(), case.config());
    let max = config.max_tokens_per_rank;
    let many = Case { tokens: vec![max + 1, 1], ..case.clone() }.inputs(0);
    let fault = Fault::TooManyTokens { tokens: max as u32 + 1, max: max as u32 };
    let wanted = ErrorKind::RankFailed { rank: Rank(0), fault };
    for names in PAIRS {
        on_ranks(&case, PATIENT, |group| {
            let mut rank = common::Rank::build(&registry, (&config, &weights), pair(names), &group)?;
            let error = rank.apply(&many[rank.rank], Overlap::default()).expect_err("there is no room");
            assert_eq!(error.kind, wanted, "{names:?}");
            rank.apply(&RankInput::default(), Overlap::default())?;
            Ok(())
        });
    }
}

/// mori #356: with room for fewer than 256 tokens per rank, gsm8k was 0.00, and there was no error. Small buffers are
/// buffers; so are those of mori #610, which corrupted rows from 128 tokens on.
#[rstest]
fn mori_356_buffers_of_any_size_are_right(#[values(0, 1, 2, 130)] tokens: usize) {
    agrees_everywhere(&Case {
        tokens: vec![tokens; 3],
        hidden: 64,
        intermediate: 32,
        ..Case::small(QuantScheme::Unquantized, 3, seed())
    });
}
