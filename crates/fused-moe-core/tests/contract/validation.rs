//! What an input is refused for, and who learns why.

use fused_moe_core::{
    DType, ErrorKind, Fault, Layout, MonolithicInput, PrepareInput, Rank, TensorView, TicketLedger, TopK,
};
use half::{bf16, f16};
use rstest::rstest;

use crate::layer::{EXPERTS, HIDDEN, MAX_TOKENS, TOP_K, Tokens, config, fresh};

const ME: Rank = Rank(0);

/// The fault that opening a round with `input` finds, after checking that it travels without tokens.
fn fault(in_dtype: DType, input: &PrepareInput<'_>) -> Option<Fault> {
    let mut config = config(2);
    config.in_dtype = in_dtype;
    let (sent, fault) = TicketLedger::new("toy", ME, &config).open(&config, input).unwrap();
    let tokens = if fault.is_some() { 0 } else { input.hidden.dims()[0] };
    assert_eq!(sent.routing().num_tokens(), tokens);
    assert_eq!(sent.routing().ids().len(), tokens * TOP_K);
    fault
}

/// Two good tokens with fixed ids, to be spoilt.
fn good() -> Tokens {
    let mut tokens = Tokens::random(&mut fresh(), 2);
    tokens.ids.copy_from_slice(&[0, 1, 2, 4, -1, -1]);
    tokens
}

#[rstest]
#[case(1, -1, None)]
#[case(1, EXPERTS as i32, Some(Fault::ExpertIdOutOfRange { token: 0, slot: 1, id: EXPERTS as i32 }))]
#[case(4, -2, Some(Fault::ExpertIdOutOfRange { token: 1, slot: 1, id: -2 }))]
#[case(4, i32::MIN, Some(Fault::ExpertIdOutOfRange { token: 1, slot: 1, id: i32::MIN }))]
#[case(2, i32::MAX, Some(Fault::ExpertIdOutOfRange { token: 0, slot: 2, id: i32::MAX }))]
#[case(2, 0, Some(Fault::DuplicateExpertId { token: 0, id: 0 }))]
#[case(5, 4, Some(Fault::DuplicateExpertId { token: 1, id: 4 }))]
#[case(3, 0, None)]
fn ids_are_checked(#[case] at: usize, #[case] id: i32, #[case] wanted: Option<Fault>) {
    let mut tokens = good();
    assert_eq!(fault(DType::Bf16, &tokens.input()), None, "the control is fine");
    tokens.ids[at] = id;
    assert_eq!(fault(DType::Bf16, &tokens.input()), wanted);
}

#[rstest]
fn weights_are_finite(#[values(f32::NAN, f32::INFINITY, f32::NEG_INFINITY)] bad: f32) {
    let mut tokens = good();
    tokens.weights[TOP_K + 2] = bad;
    assert_eq!(fault(DType::Bf16, &tokens.input()), Some(Fault::NonFiniteWeight { token: 1, slot: 2 }));
}

#[rstest]
fn hidden_states_are_finite(
    #[values(f32::NAN, f32::INFINITY, f32::NEG_INFINITY)] bad: f32,
    #[values(DType::Bf16, DType::F16, DType::F32)] dtype: DType,
    #[values(0, HIDDEN - 1, HIDDEN, 2 * HIDDEN - 1)] at: usize,
) {
    let tokens = good();
    let mut hidden: Vec<f32> = tokens.hidden.iter().map(|x| x.to_f32()).collect();
    for spoilt in [false, true] {
        if spoilt {
            hidden[at] = bad;
        }
        let (wide, half) = (&hidden, hidden.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>());
        let brain: Vec<bf16> = hidden.iter().map(|&x| bf16::from_f32(x)).collect();
        let dims = [2, HIDDEN];
        let view = match dtype {
            DType::F32 => TensorView::from_slice(wide, dtype, &dims),
            DType::F16 => TensorView::from_slice(&half, dtype, &dims),
            _ => TensorView::from_slice(&brain, dtype, &dims),
        };
        let (token, element) = ((at / HIDDEN) as u32, (at % HIDDEN) as u32);
        let wanted = spoilt.then_some(Fault::NonFiniteHidden { token, element });
        assert_eq!(fault(dtype, &PrepareInput { hidden: view.unwrap(), ..tokens.input() }), wanted);
    }
}

#[test]
fn a_nan_between_the_rows_is_not_read() {
    let tokens = good();
    let mut wide = vec![bf16::NAN; 2 * (HIDDEN + 2) + 1];
    for row in 0..2 {
        wide[1 + row * (HIDDEN + 2)..][..HIDDEN].copy_from_slice(&tokens.hidden[row * HIDDEN..][..HIDDEN]);
    }
    let layout = Layout::contiguous(&[2, HIDDEN]).strided(&[HIDDEN + 2, 1], 1);
    let hidden = TensorView::from_slice_with(&wide, DType::Bf16, layout).unwrap();
    assert_eq!(fault(DType::Bf16, &PrepareInput { hidden, ..tokens.input() }), None);
}

#[rstest]
#[case(0, None)]
#[case(MAX_TOKENS, None)]
#[case(MAX_TOKENS + 1, Some(Fault::TooManyTokens { tokens: MAX_TOKENS as u32 + 1, max: MAX_TOKENS as u32 }))]
fn the_number_of_tokens_is_bounded(#[case] count: usize, #[case] wanted: Option<Fault>) {
    let tokens = Tokens::random(&mut fresh(), count);
    assert_eq!(fault(DType::Bf16, &tokens.input()), wanted);
}

/// Every way in which a tensor of a call can be the wrong one, with what the failing rank says.
#[rstest]
#[case::hidden_width("hidden states is [2, 7] of bf16, needs [2, 6] of bf16")]
#[case::hidden_dims("hidden states is [12] of bf16, needs [12, 6] of bf16")]
#[case::hidden_dtype("hidden states is [2, 6] of f16, needs [2, 6] of bf16")]
#[case::hidden_gaps("tensor [2, 6] with strides [12, 2] is not contiguous")]
#[case::ids_rows("top-k ids is [1, 3] of i32, needs [2, 3] of i32")]
#[case::ids_slots("top-k ids is [2, 2] of i32, needs [2, 3] of i32")]
#[case::ids_dtype("top-k ids is [2, 3] of f32, needs [2, 3] of i32")]
#[case::weights_rows("top-k weights is [3, 3] of f32, needs [2, 3] of f32")]
#[case::weights_dtype("top-k weights is [2, 3] of i32, needs [2, 3] of f32")]
fn a_misfit_tensor_is_named_on_its_own_rank_only(#[case] why: &str) {
    let tokens = good();
    let halves = [f16::ZERO; 2 * HIDDEN];
    let wide = [bf16::ZERO; 24];
    let (floats, ints) = ([0.0_f32; 9], [0, 1, 2, 0, 1, 2, 0, 1, 2]);
    let f32s = |dims: &[usize]| TensorView::from_slice(&floats, DType::F32, dims).unwrap();
    let i32s = |dims: &[usize]| TensorView::from_slice(&ints, DType::I32, dims).unwrap();
    let bf16s = |layout| TensorView::from_slice_with(&wide, DType::Bf16, layout).unwrap();
    let mut input = tokens.input();
    let TopK { ids, weights } = &mut input.topk;
    match why {
        w if w.contains("[2, 7]") => input.hidden = bf16s(Layout::contiguous(&[2, 7])),
        w if w.contains("[12]") => input.hidden = bf16s(Layout::contiguous(&[12])),
        w if w.contains("f16, needs [2, 6] of bf16") && w.contains("of f16") => {
            input.hidden = TensorView::from_slice(&halves, DType::F16, &[2, HIDDEN]).unwrap();
        }
        w if w.contains("strides") => input.hidden = bf16s(Layout::contiguous(&[2, 6]).strided(&[12, 2], 0)),
        w if w.contains("ids is [1, 3]") => *ids = i32s(&[1, 3]),
        w if w.contains("ids is [2, 2]") => *ids = i32s(&[2, 2]),
        w if w.contains("ids") => *ids = f32s(&[2, 3]),
        w if w.contains("[3, 3]") => *weights = f32s(&[3, 3]),
        _ => *weights = i32s(&[2, 3]),
    }
    assert_eq!(fault(DType::Bf16, &input), Some(Fault::BadTensor));
    for at_fault in [ME, Rank(1)] {
        let mut ledger = TicketLedger::new("toy", ME, &config(2));
        let (sent, fault) = ledger.open(&config(2), &input).unwrap();
        let routed = ledger.receive_prepare(sent).unwrap();
        let error = ledger.fail_prepare(routed, at_fault, fault.unwrap());
        assert_eq!(error.kind, ErrorKind::RankFailed { rank: at_fault, fault: Fault::BadTensor });
        let source = error.source.map(|source| source.to_string());
        assert_eq!(source.as_deref(), (at_fault == ME).then_some(why));
    }
}

#[rstest]
#[case(f32::NAN, Some(Fault::NonFiniteLogit { token: 1, expert: 3 }))]
#[case(f32::NEG_INFINITY, None)]
#[case(0.0, None)]
fn a_logit_is_a_number_or_masked(#[case] value: f32, #[case] wanted: Option<Fault>) {
    let tokens = good();
    let mut logits = [1.0; 2 * EXPERTS];
    logits[EXPERTS + 3] = value;
    let open = |logits: &[f32], dims: &[usize]| {
        let logits = TensorView::from_slice(logits, DType::F32, dims).unwrap();
        let input = MonolithicInput { hidden: tokens.hidden(), logits, input_scale: None, fault: None };
        let (sent, fault) =
            TicketLedger::new("toy", ME, &config(2)).open_monolithic(&config(2), &input).unwrap();
        assert_eq!(sent.routing().num_tokens(), if fault.is_some() { 0 } else { 2 });
        fault
    };
    assert_eq!(open(&logits, &[2, EXPERTS]), wanted);
    assert_eq!(open(&logits, &[EXPERTS, 2]), Some(Fault::BadTensor));
}
