//! Ranks fail in every phase, alone and together; all ranks return the same error, and the next round is
//! right.

use std::sync::Barrier;
use std::time::Duration;

use ep_transport::ThreadOptions;
use fused_moe_core::*;
use half::bf16;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use rstest::rstest;

use crate::layer::{Case, Rig, Tokens};

/// What goes wrong on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    NanHidden,
    BadId,
    Reported,
    /// Hidden states in the memory of a device that the layer does not run on.
    OnDevice,
    /// Ids in the memory of a second host, found after the row count was announced.
    OnOtherHost,
    DropsPrepareSent,
    DropsDispatched,
    ExpertsFail,
    /// Outputs of too few rows.
    MisfitOutputs,
    DropsFinalizeSent,
    /// An output tensor of another shape.
    MisfitOut,
}

use Failure::*;

/// Each failure, the step that tells the peers, and what it tells them; nothing if they need not know.
const ALL: [(Failure, Option<(Step, Fault)>); 11] = [
    (NanHidden, Some((Step::Announce, Fault::NonFiniteHidden { token: 0, element: 7 }))),
    (BadId, Some((Step::Announce, Fault::ExpertIdOutOfRange { token: 1, slot: 2, id: 5000 }))),
    (Reported, Some((Step::Announce, Fault::Unknown { code: 77 }))),
    (OnDevice, Some((Step::Announce, Fault::BadTensor))),
    (OnOtherHost, Some((Step::Dispatch, Fault::BadTensor))),
    (DropsPrepareSent, Some((Step::Combine, Fault::Abandoned))),
    (DropsDispatched, Some((Step::Combine, Fault::Abandoned))),
    (ExpertsFail, Some((Step::Combine, Fault::ExpertsFailed))),
    (MisfitOutputs, Some((Step::Combine, Fault::BadTensor))),
    (DropsFinalizeSent, None),
    (MisfitOut, None),
];

impl Failure {
    fn told(self) -> Option<(Step, Fault)> {
        ALL.iter().find(|(failure, _)| *failure == self).and_then(|(_, told)| *told)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Announce,
    Dispatch,
    Combine,
}

/// The error of a round: that of the earliest step that fails, and in it of the lowest rank.
fn verdict(failures: &[Option<Failure>]) -> Option<(Rank, Fault, Stage)> {
    let told = failures.iter().map(|failure| failure.and_then(Failure::told));
    let told = told.enumerate().filter_map(|(rank, told)| Some((rank, told?)));
    let (rank, (step, fault)) = told.min_by_key(|&(rank, (step, _))| (step, rank))?;
    let stage = match (step, fault) {
        (_, Fault::ExpertsFailed) => Stage::Experts,
        (Step::Combine, _) => Stage::Combine,
        _ => Stage::QuantizeDispatch,
    };
    Some((Rank(rank as u32), fault, stage))
}

/// `values` as a tensor that claims to lie on `device`.
fn elsewhere<'a, T>(values: &'a [T], dtype: DType, dims: &[usize], device: Device) -> TensorView<'a> {
    let base = values.as_ptr().cast_mut().cast();
    let allocation = Allocation { base, bytes: size_of_val(values), dtype, device };
    // SAFETY: it is memory of this process, borrowed as long as the view, and never written.
    unsafe { TensorView::from_allocation(allocation, Layout::contiguous(dims)) }.unwrap()
}

/// Plays one round of `rig` with its failure; `None` if a ticket was dropped on the way.
fn play(rig: &mut Rig, mut tokens: Tokens, failure: Option<Failure>) -> Option<Result<Vec<f32>>> {
    let case = rig.case;
    match failure {
        Some(NanHidden) => tokens.hidden[7] = bf16::NAN,
        Some(BadId) => tokens.ids[case.top_k + 2] = 5000,
        _ => {}
    }
    let mut sums = vec![f32::NAN; tokens.count * case.hidden];
    let dims = [tokens.count, case.hidden];
    if failure.is_none() {
        let out = TensorViewMut::from_slice(&mut sums, DType::F32, &dims).unwrap();
        return Some(rig.round_into(&tokens, out, |_| {}).map(|()| sums));
    }
    let mut input = tokens.input(&case);
    match failure {
        Some(Reported) => input.fault = Some(Fault::Unknown { code: 77 }),
        Some(OnDevice) => {
            let device = Device { kind: DeviceKind::Cuda, index: 0 };
            input.hidden = elsewhere(&tokens.hidden, DType::Bf16, &dims, device);
        }
        Some(OnOtherHost) => {
            let device = Device { kind: DeviceKind::Host, index: 1 };
            input.topk.ids = elsewhere(&tokens.ids, DType::I32, &[tokens.count, case.top_k], device);
        }
        _ => {}
    }
    let mut workspace = Workspace::new(DeviceKind::Host, 0).unwrap();
    let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
    let comm = rig.modular();
    let sent = comm.prepare_send(&mut cx, input).expect("a send that takes part");
    if failure == Some(DropsPrepareSent) {
        return None;
    }
    let (mut dispatched, routed) = match comm.prepare_recv(&mut cx, sent) {
        Ok(received) => received,
        Err(error) => return Some(Err(error)),
    };
    // The outputs do not matter: either the round fails, or this rank's own part of them is all zeros.
    dispatched.output.take().unwrap().as_mut_slice::<bf16>().unwrap().fill(bf16::ZERO);
    if failure == Some(DropsDispatched) {
        return None;
    }
    let out = match failure {
        Some(ExpertsFail) => ExpertOut::Failed(Fault::ExpertsFailed),
        Some(MisfitOutputs) => {
            ExpertOut::Lent(TensorView::from_slice::<bf16>(&[], DType::Bf16, &[0, case.hidden + 1]).unwrap())
        }
        _ => ExpertOut::InPlace,
    };
    let sent = comm.finalize_send(&mut cx, routed, out).expect("a send that takes part");
    if failure == Some(DropsFinalizeSent) {
        return None;
    }
    let mut misfit = [f32::NAN; 3];
    let out = TensorViewMut::from_slice(&mut misfit, DType::F32, &[1, 3]).unwrap();
    Some(comm.finalize_recv(&mut cx, sent, out).map(|()| sums))
}

/// Checks what a round returned on one rank against what failed on all of them.
fn check_outcome(rig: &Rig, outcome: Result<Vec<f32>>, failures: &[Option<Failure>], round: u64) {
    let (me, own) = (rig.rank, failures[rig.rank.index()]);
    let place = format!("{me} in round {round}: {failures:?}");
    match (outcome, verdict(failures)) {
        (Err(error), Some((rank, fault, stage))) => {
            assert_eq!(error.kind, ErrorKind::RankFailed { rank, fault }, "{place}");
            assert_eq!((error.stage, error.backend), (stage, rig.case.comm), "{place}");
            let knows_more = rank == me && fault == Fault::BadTensor;
            assert_eq!(error.source.is_some(), knows_more, "{place}");
        }
        (Err(error), None) => {
            assert_eq!(own, Some(MisfitOut), "{place}: {error}");
            assert_eq!(error.kind, ErrorKind::Contract, "{place}");
        }
        (Ok(_), None) => assert_eq!(own, None, "{place}"),
        (Ok(_), verdict) => panic!("{place}: succeeded in spite of {verdict:?}"),
    }
}

/// Plays one round per entry of `script`, which says what fails on which rank, and a good one after it.
fn check(case: Case, script: &[Vec<Option<Failure>>]) {
    case.run(ThreadOptions::default(), |mut rig| {
        rig.good_round(1);
        for (round, failures) in (2..).zip(script) {
            let me = rig.rank;
            let failure = failures[me.index()];
            // A rank that fails has a full batch, so that there are tokens to spoil.
            let tokens = Tokens::of(&case, me.index(), if failure.is_some() { 1 } else { round });
            if let Some(outcome) = play(&mut rig, tokens, failure) {
                check_outcome(&rig, outcome, failures, round);
            }
            if round % 3 == 0 {
                rig.good_round(round + 1000);
            }
        }
        rig.good_round(5000);
    });
}

const GROUPS: [(&str, usize); 3] = [("local", 1), ("naive", 3), ("allgather_reducescatter", 3)];

#[rstest]
fn one_rank_fails(#[values(0, 1, 2)] group: usize, #[values(0, 1, 2)] at_fault: usize) {
    let (comm, ranks) = GROUPS[group];
    let at_fault = at_fault % ranks;
    let only = |(failure, _)| (0..ranks).map(|rank| (rank == at_fault).then_some(failure)).collect();
    check(Case::new(comm, ranks), &ALL.map(only));
}

#[rstest]
fn any_ranks_fail_in_any_order(#[values(0, 1, 2)] group: usize) {
    let (comm, ranks) = GROUPS[group];
    let case = Case { hidden: 8, max_tokens: 3, ..Case::new(comm, ranks) };
    let mut rng = Pcg64::seed_from_u64(case.seed);
    let mut failure = || rng.random_bool(0.3).then(|| ALL.choose(&mut rng).unwrap().0);
    let script: Vec<Vec<_>> = (0..600).map(|_| (0..ranks).map(|_| failure()).collect()).collect();
    check(case, &script);
}

/// A handle that goes away in the middle of a round must not cost its peers their deadline.
#[rstest]
fn a_dropped_handle_is_reported_at_once(
    #[values("naive", "allgather_reducescatter")] comm: &'static str,
    #[values(DropsPrepareSent, DropsDispatched, DropsFinalizeSent)] failure: Failure,
) {
    let case = Case::new(comm, 3);
    let everyone = Barrier::new(3);
    // A peer that waits for its deadline returns `PeerLost` instead.
    case.run(ThreadOptions::default(), |mut rig| {
        rig.good_round(1);
        let tokens = rig.tokens(2);
        if rig.rank == Rank(1) {
            let full = rig.tokens(1);
            assert!(play(&mut rig, full, Some(failure)).is_none());
            let Rig { comm, group, .. } = rig;
            drop(comm);
            // Its departure would be noticed too, so it stays.
            everyone.wait();
            drop(group);
            return;
        }
        let outcome = play(&mut rig, tokens, None).unwrap();
        let stage = match failure {
            DropsPrepareSent => Stage::QuantizeDispatch,
            _ => Stage::Combine,
        };
        match outcome {
            // With a reduce-scatter, nothing was missing.
            Ok(_) => assert_eq!((failure, comm), (DropsFinalizeSent, "allgather_reducescatter")),
            Err(error) => {
                let kind = ErrorKind::RankFailed { rank: Rank(1), fault: Fault::Abandoned };
                assert_eq!((error.kind, error.stage), (kind, stage));
                assert!(failure != DropsFinalizeSent || comm == "naive");
            }
        }
        everyone.wait();
    });
}

#[rstest]
fn a_silent_peer_is_lost_by_the_deadline(#[values("naive", "allgather_reducescatter")] comm: &'static str) {
    let case = Case::new(comm, 3);
    let options = ThreadOptions { timeout: Duration::from_millis(300), ..ThreadOptions::default() };
    let everyone = Barrier::new(3);
    case.run(options, |mut rig| {
        if rig.rank != Rank(2) {
            let lost = ErrorKind::PeerLost { rank: Rank(2), round: 1 };
            for attempt in 1..=2 {
                let tokens = rig.tokens(1);
                let error = play(&mut rig, tokens, None).unwrap().unwrap_err();
                assert_eq!((error.kind, error.stage), (lost.clone(), Stage::QuantizeDispatch));
                assert_eq!(error.source.is_some(), attempt == 1);
            }
        }
        everyone.wait();
    });
}

#[rstest]
fn tickets_of_other_handles_and_rounds_are_refused(#[values(0, 1, 2)] group: usize) {
    let (comm, ranks) = GROUPS[group];
    Case::new(comm, ranks).run(ThreadOptions::default(), |mut one| {
        let (case, group) = (one.case, one.group.clone());
        let mut two = Rig::new(case, group);
        let tokens = one.tokens(1);
        let mut workspace = Workspace::new(DeviceKind::Host, 0).unwrap();
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let contract = |error: Option<Error>| assert_eq!(error.map(|e| e.kind), Some(ErrorKind::Contract));

        let of_one = one.modular().prepare_send(&mut cx, tokens.input(&case)).unwrap();
        let of_two = two.modular().prepare_send(&mut cx, tokens.input(&case)).unwrap();
        contract(two.modular().prepare_recv(&mut cx, of_one).err());
        contract(one.modular().prepare_recv(&mut cx, of_two).err());

        let stale = one.modular().prepare_send(&mut cx, tokens.input(&case)).unwrap();
        let fresh = one.modular().prepare_send(&mut cx, tokens.input(&case)).unwrap();
        contract(one.modular().prepare_recv(&mut cx, stale).err());
        let (_, routed) = one.modular().prepare_recv(&mut cx, fresh).unwrap();
        contract(two.modular().finalize_send(&mut cx, routed, ExpertOut::InPlace).err());

        two.good_round(2);
        one.good_round(2);
    });
}
