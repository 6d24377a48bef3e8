//! Tickets: the order of the phases, and what becomes of a broken one.

use fused_moe_core::{
    DType, Error, ErrorKind, Fault, MonolithicInput, Outstanding, PrepareInput, Rank, Routing, Stage,
    TensorView, TicketLedger,
};
use rstest::rstest;

use crate::layer::{EXPERTS, TOP_K, Tokens, config, fresh};

const ME: Rank = Rank(1);

fn ledger() -> TicketLedger {
    TicketLedger::new("toy", ME, &config(2))
}

#[track_caller]
fn assert_contract(error: Error, stage: Stage, why: &str) {
    assert_eq!((&error.kind, error.stage, error.backend), (&ErrorKind::Contract, stage, "toy"));
    let source = error.source.expect("a contract error says what was wrong").to_string();
    assert!(source.contains(why), "{source:?} does not say {why:?}");
}

#[test]
fn a_round_carries_its_routing_to_the_end() {
    let mut ledger = ledger();
    assert_eq!(ledger.round(), 0);
    let mut rng = fresh();
    for round in 1..=3 {
        let tokens = Tokens::random(&mut rng, round as usize);
        let (sent, fault) = ledger.open(&config(2), &tokens.input()).unwrap();
        assert_eq!((fault, sent.round(), ledger.round()), (None, round, round));
        assert_eq!((sent.routing().num_tokens(), sent.routing().top_k()), (round as usize, TOP_K));
        let routed = ledger.receive_prepare(sent).unwrap();
        assert_eq!((routed.round(), routed.routing().ids()), (round, &tokens.ids[..]));
        let sent = ledger.send_finalize(routed).unwrap();
        let routing = ledger.receive_finalize(sent).unwrap();
        assert_eq!((routing.ids(), routing.weights()), (&tokens.ids[..], &tokens.weights[..]));
        assert_eq!(routing.ids_of(0), &tokens.ids[..TOP_K]);
        ledger.close(routing);
        assert!(ledger.outstanding().is_none());
    }
}

#[test]
fn a_monolithic_round_has_no_routing() {
    let tokens = Tokens::random(&mut fresh(), 2);
    let logits = [0.5; 2 * EXPERTS];
    let logits = TensorView::from_slice(&logits, DType::F32, &[2, EXPERTS]).unwrap();
    let input = MonolithicInput { hidden: tokens.hidden(), logits, input_scale: None, fault: None };
    let (sent, fault) = ledger().open_monolithic(&config(2), &input).unwrap();
    assert_eq!(fault, None);
    let routing = sent.routing();
    assert_eq!((routing.num_tokens(), routing.top_k(), routing.ids().len()), (2, 0, 0));
}

/// Brings a ledger to one of the four points of a round, keeping the ticket.
enum At {
    Idle,
    PrepareSent,
    Dispatched,
    FinalizeSent,
}

#[rstest]
fn a_call_out_of_order_is_a_broken_contract(
    #[values(At::Idle, At::PrepareSent, At::Dispatched, At::FinalizeSent)] at: At,
) {
    let tokens = Tokens::random(&mut fresh(), 1);
    let input = tokens.input();
    // Tickets of the same round of the same handle in a state that has passed: re-made, then kept too long.
    let mut ledger = ledger();
    let (first, _) = ledger.open(&config(2), &input).unwrap();
    let Some(Outstanding::PrepareSent(second)) = ledger.outstanding() else { panic!("prepare is sent") };
    let mut late_prepare = Some(second);
    let routed = ledger.receive_prepare(first).unwrap();
    let Some(Outstanding::Dispatched(late_routed)) = ledger.outstanding() else { panic!("dispatched") };
    let mut late_routed = Some(late_routed);
    if !matches!(at, At::PrepareSent | At::Dispatched) {
        let sent = ledger.send_finalize(routed).unwrap();
        let Some(Outstanding::FinalizeSent(late_finalize)) = ledger.outstanding() else { panic!("combined") };
        if matches!(at, At::Idle) {
            let routing = ledger.receive_finalize(sent).unwrap();
            ledger.close(routing);
            let error = ledger.receive_finalize(late_finalize).unwrap_err();
            assert_contract(error, Stage::Combine, "round 1 is Idle, the call needs FinalizeSent");
        }
    } else if matches!(at, At::PrepareSent) {
        // The next round: tickets of the first are stale.
        ledger.send_finalize(routed).map(drop).unwrap();
        ledger.close(Routing::default());
        let (_open, _) = ledger.open(&config(2), &input).unwrap();
        let error = ledger.receive_prepare(late_prepare.take().unwrap()).unwrap_err();
        assert_contract(error, Stage::QuantizeDispatch, "ticket of round 1 given in round 2");
        let error = ledger.send_finalize(late_routed.take().unwrap()).unwrap_err();
        assert_contract(error, Stage::Combine, "ticket of round 1 given in round 2");
    }
    let state = match at {
        At::Idle => "Idle",
        At::PrepareSent => "PrepareSent",
        At::Dispatched => "Dispatched",
        At::FinalizeSent => "FinalizeSent",
    };
    if let Some(late) = late_prepare {
        let error = ledger.receive_prepare(late).unwrap_err();
        assert_contract(error, Stage::QuantizeDispatch, &format!("is {state}, the call needs PrepareSent"));
    }
    if let Some(late) = late_routed
        && !matches!(at, At::Dispatched)
    {
        let error = ledger.send_finalize(late).unwrap_err();
        assert_contract(error, Stage::Combine, &format!("is {state}, the call needs Dispatched"));
    }
    match at {
        At::Idle => drop(ledger.open(&config(2), &input).expect("the control opens")),
        _ => {
            let error = ledger.open(&config(2), &input).unwrap_err();
            assert_contract(error, Stage::QuantizeDispatch, &format!("is {state}, the call needs Idle"));
        }
    }
}

#[test]
fn a_foreign_ticket_is_refused_and_the_own_round_goes_on() {
    let tokens = Tokens::random(&mut fresh(), 1);
    let (mut mine, mut other) = (ledger(), ledger());
    let (sent, _) = mine.open(&config(2), &tokens.input()).unwrap();
    let (foreign, _) = other.open(&config(2), &tokens.input()).unwrap();
    let error = mine.receive_prepare(foreign).unwrap_err();
    assert_contract(error, Stage::QuantizeDispatch, "given to handle");
    let routed = mine.receive_prepare(sent).unwrap();
    let Some(Outstanding::PrepareSent(again)) = other.outstanding() else { panic!("its round is open") };
    let foreign = other.receive_prepare(again).unwrap();
    assert_contract(mine.send_finalize(foreign).unwrap_err(), Stage::Combine, "given to handle");
    let sent = mine.send_finalize(routed).unwrap();
    let Some(Outstanding::Dispatched(again)) = other.outstanding() else { panic!("its round is open") };
    let foreign = other.send_finalize(again).unwrap();
    assert_contract(mine.receive_finalize(foreign).unwrap_err(), Stage::Combine, "given to handle");
    mine.receive_finalize(sent).unwrap();
}

#[test]
fn a_dropped_ticket_is_made_again_in_every_state() {
    let tokens = Tokens::random(&mut fresh(), 2);
    let mut ledger = ledger();
    assert!(ledger.outstanding().is_none());
    assert_eq!(ledger.in_flight(), None);
    drop(ledger.open(&config(2), &tokens.input()).unwrap());
    let Some(Outstanding::PrepareSent(sent)) = ledger.outstanding() else { panic!("prepare is sent") };
    assert_eq!((sent.round(), sent.routing().num_tokens()), (1, 0));
    drop(ledger.receive_prepare(sent).unwrap());
    let Some(Outstanding::Dispatched(routed)) = ledger.outstanding() else { panic!("dispatched") };
    assert_eq!((routed.round(), routed.routing().num_tokens()), (1, 0));
    assert_eq!(ledger.in_flight(), Some(1));
    drop(ledger.send_finalize(routed).unwrap());
    let Some(Outstanding::FinalizeSent(sent)) = ledger.outstanding() else { panic!("finalize is sent") };
    let routing = ledger.receive_finalize(sent).unwrap();
    let error = ledger.fail_finalize(routing, ME, Fault::Abandoned);
    assert_eq!(error.kind, ErrorKind::RankFailed { rank: ME, fault: Fault::Abandoned });
    assert!(ledger.outstanding().is_none());
    assert_eq!(ledger.in_flight(), None);
    assert_eq!(ledger.open(&config(2), &tokens.input()).unwrap().0.routing().ids(), tokens.ids);
    assert_eq!(ledger.in_flight(), Some(2));
}

#[test]
fn a_lost_peer_poisons_the_handle() {
    let tokens = Tokens::random(&mut fresh(), 1);
    let mut ledger = ledger();
    let (sent, _) = ledger.open(&config(2), &tokens.input()).unwrap();
    let lost = ledger.lost(Rank(0), Stage::QuantizeDispatch);
    let kind = ErrorKind::PeerLost { rank: Rank(0), round: 1 };
    assert_eq!(lost.kind, kind);
    assert!(ledger.outstanding().is_none(), "there is nobody to settle with");
    assert_eq!(ledger.in_flight(), None);
    assert_eq!(ledger.receive_prepare(sent).unwrap_err().kind, kind);
    ledger.close(Routing::default());
    assert_eq!(ledger.open(&config(2), &tokens.input()).unwrap_err().kind, kind, "closing does not heal");
}

#[test]
fn a_reported_fault_travels_without_tokens() {
    let tokens = Tokens::random(&mut fresh(), 2);
    let mut ledger = ledger();
    let input = PrepareInput { fault: Some(Fault::OverlapFailed), ..tokens.input() };
    let (sent, fault) = ledger.open(&config(2), &input).unwrap();
    assert_eq!(fault, Some(Fault::OverlapFailed));
    assert_eq!((sent.routing().num_tokens(), sent.routing().ids().len()), (0, 0));
    let routed = ledger.receive_prepare(sent).unwrap();
    let error = ledger.fail_prepare(routed, ME, Fault::OverlapFailed);
    assert_eq!(error.to_string(), "quantize-dispatch (toy): rank 1 failed: the overlapped work failed");
    assert!(error.source.is_none());
    let (sent, fault) = ledger.open(&config(2), &tokens.input()).unwrap();
    assert_eq!((fault, sent.routing().num_tokens()), (None, 2), "the next round is clean");
}

#[rstest]
#[case::here(ME, true)]
#[case::elsewhere(Rank(0), false)]
fn only_the_rank_at_fault_explains(#[case] at_fault: Rank, #[case] explained: bool) {
    let tokens = Tokens::random(&mut fresh(), 1);
    let mut ledger = ledger();
    for again in [true, false] {
        let (sent, _) = ledger.open(&config(2), &tokens.input()).unwrap();
        if again {
            ledger.explain("row 3 is missing");
        }
        let routed = ledger.receive_prepare(sent).unwrap();
        let error = ledger.fail_prepare(routed, at_fault, Fault::BadTensor);
        assert_eq!(error.kind, ErrorKind::RankFailed { rank: at_fault, fault: Fault::BadTensor });
        let source = error.source.map(|source| source.to_string());
        // The second round has nothing left of the first one's explanation.
        assert_eq!(source.as_deref(), (explained && again).then_some("row 3 is missing"));
    }
}

#[rstest]
#[case(Fault::ExpertsFailed, Stage::Experts)]
#[case(Fault::OverlapFailed, Stage::Combine)]
#[case(Fault::BadTensor, Stage::Combine)]
fn a_failed_combine_names_its_stage(#[case] fault: Fault, #[case] stage: Stage) {
    let error = ledger().fail_finalize(Routing::default(), Rank(0), fault);
    assert_eq!((error.kind, error.stage), (ErrorKind::RankFailed { rank: Rank(0), fault }, stage));
}
