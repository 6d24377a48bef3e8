//! One call of a composed layer, in order and when something fails.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use counting_alloc::allocations;
use fused_moe_core::{
    Arena, Call, Contiguous, DType, DeviceKind, Error, ErrorKind, ExecCx, ExpertWeights, ExpertsCaps, Fault,
    KernelKind, Layout, ModularKernel, Overlap, PrepareAndFinalizeModular, PrepareCaps, PrepareInput, Rank,
    Result, Stage, StageTimes, Stream, TensorView, TensorViewMut, TopK, TopKWeightAndReduce, WireFormat,
    Workspace, negotiate,
};
use half::bf16;
use rstest::rstest;

use crate::layer::{EXPERTS, HIDDEN, MAX_TOKENS, Tokens, config, fresh};
use crate::toys::{Script, ToyComm, ToyExperts, WORKSPACE};

const ME: Rank = Rank(0);

struct Rig {
    kernel: ModularKernel,
    script: Arc<Mutex<Script>>,
    experts_fail: Arc<AtomicBool>,
    weights: ExpertWeights,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    reduction: TopKWeightAndReduce,
    /// Whether the comm lends its own buffer.
    offers: bool,
    /// Whether the plan takes it.
    planned: bool,
}

const PLAIN: Shape = Shape { reduction: TopKWeightAndReduce::no_op(), offers: false, planned: false };

impl Rig {
    fn new(shape: Shape, rank: Rank) -> Self {
        let config = config(1);
        let wires = vec![WireFormat::unquantized(DType::Bf16)];
        let mut caps = PrepareCaps::host("toy", KernelKind::Modular, wires.clone(), MAX_TOKENS + 1);
        let mut experts = ExpertsCaps::host("toy_experts", wires);
        experts.weight_and_reduce = shape.reduction;
        caps.in_place_output = shape.planned;
        let plan = negotiate(&config, &caps, &experts).unwrap();
        caps.in_place_output = shape.offers;
        let (script, experts_fail) = (Arc::<Mutex<Script>>::default(), Arc::new(AtomicBool::new(false)));
        let comm = ToyComm::new(caps, &config, rank, script.clone());
        let experts = ToyExperts { caps: experts, config: config.clone(), fail: experts_fail.clone() };
        // The map of rank 0 in both cases: the other rank only stands for one that is not the lowest.
        let kernel = ModularKernel::new(config, plan, rank, Box::new(comm), Box::new(experts)).unwrap();
        Self { kernel, script, experts_fail, weights: ExpertWeights::new("toy_experts", (), 0) }
    }

    fn apply(&mut self, tokens: &Tokens, mut overlap: Overlap<'_>, out: TensorViewMut<'_>) -> Result<()> {
        let call = Call {
            stream: Stream::Host,
            weights: &self.weights,
            hidden: tokens.hidden(),
            routing: tokens.topk(),
            overlap: shorter(&mut overlap),
            out,
        };
        self.kernel.apply(call)
    }

    /// A call that must work, checked against the definition of the toy experts.
    fn apply_right(&mut self, tokens: &Tokens) {
        let mut out = vec![f32::NAN; tokens.count * HIDDEN];
        let before = tokens.clone();
        let view = TensorViewMut::from_slice(&mut out, DType::F32, &[tokens.count, HIDDEN]).unwrap();
        self.apply(tokens, Overlap::default(), view).unwrap();
        let top_k = tokens.ids.len() / tokens.count.max(1);
        for (row, out) in out.chunks_exact(HIDDEN).enumerate() {
            let slots = row * top_k..(row + 1) * top_k;
            let factor: f32 = slots.map(|s| tokens.weights[s] * (tokens.ids[s] + 1) as f32).sum();
            for (column, &got) in out.iter().enumerate() {
                let want = bf16::from_f32(tokens.hidden[row * HIDDEN + column].to_f32() * factor).to_f32();
                assert_eq!(got, want, "[{row}, {column}]");
            }
        }
        assert_eq!(
            (&before.hidden, &before.ids),
            (&tokens.hidden, &tokens.ids),
            "the caller's tensors changed"
        );
    }

    fn fails(&mut self, tokens: &Tokens, overlap: Overlap<'_>) -> Error {
        let mut out = vec![f32::NAN; tokens.count * HIDDEN];
        let view = TensorViewMut::from_slice(&mut out, DType::F32, &[tokens.count, HIDDEN]).unwrap();
        let error = self.apply(tokens, overlap, view).unwrap_err();
        assert!(out.iter().all(|x| x.is_nan()), "a failed call wrote its output");
        error
    }

    fn log(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.script.lock().unwrap().log)
    }
}

/// The same work for the length of one call.
fn shorter<'s>(overlap: &'s mut Overlap<'_>) -> Overlap<'s> {
    let mut short = Overlap::default();
    if let Some(work) = &mut overlap.dispatch {
        short.dispatch = Some(&mut **work);
    }
    if let Some(work) = &mut overlap.combine {
        short.combine = Some(&mut **work);
    }
    short
}

fn failed(rank: Rank, fault: Fault) -> ErrorKind {
    ErrorKind::RankFailed { rank, fault }
}

fn source(error: &Error) -> &Error {
    error.source.as_ref().expect("the local cause").downcast_ref().expect("an error of a stage")
}

#[rstest]
#[case::lent(PLAIN, "lent")]
#[case::in_place(Shape { offers: true, planned: true, ..PLAIN }, "in place")]
#[case::offered_in_vain(Shape { offers: true, ..PLAIN }, "lent")]
#[case::contiguous(Shape { reduction: TopKWeightAndReduce::Contiguous(Contiguous), ..PLAIN }, "lent")]
#[case::contiguous_wanted(
    Shape { reduction: TopKWeightAndReduce::Contiguous(Contiguous), planned: true, ..PLAIN }, "lent"
)]
#[case::contiguous_offered(
    Shape { reduction: TopKWeightAndReduce::Contiguous(Contiguous), offers: true, planned: true }, "lent"
)]
fn a_layer_is_the_sum_of_its_experts(#[case] shape: Shape, #[case] how: &str) {
    let mut rng = fresh();
    let mut rig = Rig::new(shape, ME);
    // Falling counts, so that rows of an earlier call lie behind the valid ones.
    for count in [MAX_TOKENS, 2, 0, 3, 1] {
        rig.apply_right(&Tokens::random(&mut rng, count));
        assert_eq!(rig.log(), ["prepare_send", "prepare_recv", how, "finalize_recv"]);
    }
}

#[rstest]
fn a_call_allocates_nothing(
    #[values(TopKWeightAndReduce::no_op(), Contiguous.into())] reduction: TopKWeightAndReduce,
    #[values(false, true)] in_place: bool,
) {
    let mut rng = fresh();
    let mut rig = Rig::new(Shape { reduction, offers: in_place, planned: in_place }, ME);
    rig.script.lock().unwrap().log.reserve(100);
    for count in [MAX_TOKENS, 0, 3] {
        let tokens = Tokens::random(&mut rng, count);
        let mut out = vec![f32::NAN; count * HIDDEN];
        let mut overlapped = |_| Ok(());
        let counted = allocations(|| {
            let view = TensorViewMut::from_slice(&mut out, DType::F32, &[count, HIDDEN]).unwrap();
            let overlap = Overlap { dispatch: None, combine: Some(&mut overlapped) };
            rig.apply(&tokens, overlap, view).unwrap();
        });
        assert_eq!(counted, 0, "{count} tokens");
    }
}

#[test]
fn overlapped_work_runs_between_send_and_receive() {
    let mut rig = Rig::new(PLAIN, ME);
    let tokens = Tokens::random(&mut fresh(), 2);
    let script = rig.script.clone();
    let mut dispatch = |stream| {
        assert_eq!(stream, Stream::Host);
        script.lock().unwrap().log.push("overlap dispatch");
        Ok(())
    };
    let mut combine = |_| {
        script.lock().unwrap().log.push("overlap combine");
        Ok(())
    };
    let mut out = [f32::NAN; 2 * HIDDEN];
    let view = TensorViewMut::from_slice(&mut out, DType::F32, &[2, HIDDEN]).unwrap();
    let overlap = Overlap { dispatch: Some(&mut dispatch), combine: Some(&mut combine) };
    assert_eq!(format!("{overlap:?}"), "Overlap { dispatch: true, combine: true }");
    rig.apply(&tokens, overlap, view).unwrap();
    let order =
        ["prepare_send", "overlap dispatch", "prepare_recv", "lent", "overlap combine", "finalize_recv"];
    assert_eq!(rig.log(), order);
    assert!(out.iter().all(|x| !x.is_nan()));
    assert_ne!(rig.kernel.stage_times(), StageTimes::default());
}

fn broken(_: Stream) -> Result<()> {
    Err(Error::other(Stage::Experts, "shared", "no shared expert"))
}

#[test]
fn a_failing_overlap_of_the_dispatch_fails_the_round() {
    let mut rig = Rig::new(PLAIN, ME);
    let tokens = Tokens::random(&mut fresh(), 2);
    let error = rig.fails(&tokens, Overlap { dispatch: Some(&mut broken), combine: None });
    assert_eq!(error.kind, failed(ME, Fault::OverlapFailed));
    assert_eq!(source(&error).source.as_ref().unwrap().to_string(), "no shared expert");
    assert_eq!(rig.log(), ["prepare_send", "prepare_recv", "failed", "finalize_recv"]);
    rig.apply_right(&tokens);
}

#[test]
fn a_failing_overlap_of_the_combine_fails_here_only() {
    let mut rig = Rig::new(PLAIN, ME);
    let tokens = Tokens::random(&mut fresh(), 2);
    let mut out = [f32::NAN; 2 * HIDDEN];
    let view = TensorViewMut::from_slice(&mut out, DType::F32, &[2, HIDDEN]).unwrap();
    let error = rig.apply(&tokens, Overlap { dispatch: None, combine: Some(&mut broken) }, view).unwrap_err();
    assert_eq!((error.kind, error.backend), (ErrorKind::Other, "shared"));
    assert_eq!(rig.script.lock().unwrap().sent_fault, None, "the peers have all they need");
    rig.apply_right(&tokens);
}

#[test]
fn failing_experts_are_a_fault_with_the_local_cause() {
    let mut rig = Rig::new(PLAIN, ME);
    let tokens = Tokens::random(&mut fresh(), 2);
    rig.experts_fail.store(true, Ordering::Relaxed);
    let error = rig.fails(&tokens, Overlap::default());
    assert_eq!((&error.kind, error.stage), (&failed(ME, Fault::ExpertsFailed), Stage::Experts));
    assert_eq!(source(&error).source.as_ref().unwrap().to_string(), "out of luck");
    assert_eq!(rig.script.lock().unwrap().sent_fault, Some(Fault::ExpertsFailed));
    rig.experts_fail.store(false, Ordering::Relaxed);
    rig.apply_right(&tokens);
}

#[rstest]
fn another_ranks_failure_is_not_explained_with_ours(#[values(false, true)] in_dispatch: bool) {
    let mut rig = Rig::new(PLAIN, Rank(1));
    let tokens = Tokens::random(&mut fresh(), 1);
    let theirs = (Rank(0), Fault::Abandoned);
    if in_dispatch {
        rig.script.lock().unwrap().dispatch = Some(theirs);
        rig.weights = ExpertWeights::new("others", (), 0);
    } else {
        rig.script.lock().unwrap().combine = Some(theirs);
        rig.experts_fail.store(true, Ordering::Relaxed);
    }
    let error = rig.fails(&tokens, Overlap::default());
    assert_eq!(error.kind, failed(Rank(0), Fault::Abandoned));
    assert!(error.source.is_none(), "{:?}", error.source);
    // The control: the same failure of our own, now the lowest.
    let error = rig.fails(&tokens, Overlap::default());
    let fault = if in_dispatch { Fault::BadTensor } else { Fault::ExpertsFailed };
    assert_eq!(error.kind, failed(Rank(1), fault));
    assert!(error.source.is_some());
}

#[rstest]
#[case::width(DType::F32, Layout::contiguous(&[2, HIDDEN + 1]), "output is [2, 7] of f32")]
#[case::rows(DType::F32, Layout::contiguous(&[3, HIDDEN]), "output is [3, 6] of f32")]
#[case::flat(DType::F32, Layout::contiguous(&[2 * HIDDEN]), "output is [12] of f32")]
#[case::dtype(DType::I32, Layout::contiguous(&[2, HIDDEN]), "output is [2, 6] of i32")]
#[case::gaps(DType::F32, Layout::contiguous(&[2, HIDDEN]).strided(&[12, 2], 0), "strides [12, 2]")]
fn a_misfit_output_is_a_fault_before_anything_is_sent(
    #[case] dtype: DType,
    #[case] layout: Layout,
    #[case] why: &str,
) {
    let mut rig = Rig::new(PLAIN, ME);
    let tokens = Tokens::random(&mut fresh(), 2);
    let (mut floats, mut ints) = ([0.5; 24], [7; 24]);
    let out = match dtype {
        DType::F32 => TensorViewMut::from_slice_with(&mut floats, dtype, layout),
        _ => TensorViewMut::from_slice_with(&mut ints, dtype, layout),
    };
    let error = rig.apply(&tokens, Overlap::default(), out.unwrap()).unwrap_err();
    assert_eq!(error.kind, failed(ME, Fault::BadTensor));
    assert_eq!(source(&error).kind, ErrorKind::Contract);
    let cause = source(&error).source.as_ref().unwrap().to_string();
    assert!(cause.contains(why), "{cause}");
    assert_eq!(rig.script.lock().unwrap().sent_fault, Some(Fault::BadTensor));
    assert_eq!(rig.log(), ["prepare_send", "prepare_recv"]);
    assert_eq!((floats, ints), ([0.5; 24], [7; 24]));
    rig.apply_right(&tokens);
}

#[test]
fn weights_of_another_backend_are_refused() {
    let mut rig = Rig::new(PLAIN, ME);
    let tokens = Tokens::random(&mut fresh(), 1);
    let mine = std::mem::replace(&mut rig.weights, ExpertWeights::new("others", 5_u8, 1));
    let error = rig.fails(&tokens, Overlap::default());
    assert_eq!(error.kind, failed(ME, Fault::BadTensor));
    assert_eq!(source(&error).source.as_ref().unwrap().to_string(), "the weights were packed by others");
    rig.weights = mine;
    rig.apply_right(&tokens);
}

#[test]
fn a_bad_input_is_the_same_fault_for_everyone() {
    let mut rig = Rig::new(PLAIN, ME);
    let mut tokens = Tokens::random(&mut fresh(), 2);
    tokens.hidden[HIDDEN + 1] = bf16::NAN;
    let error = rig.fails(&tokens, Overlap::default());
    assert_eq!(error.kind, failed(ME, Fault::NonFiniteHidden { token: 1, element: 1 }));
    assert_eq!(rig.kernel.stage_times(), StageTimes::default(), "no stage was finished");
    tokens.hidden[HIDDEN + 1] = bf16::ONE;
    rig.apply_right(&tokens);
}

#[test]
fn a_lost_peer_ends_the_kernel() {
    let mut rig = Rig::new(PLAIN, ME);
    let tokens = Tokens::random(&mut fresh(), 1);
    rig.script.lock().unwrap().lost = Some(Rank(3));
    for _ in 0..2 {
        let error = rig.fails(&tokens, Overlap::default());
        assert_eq!(error.kind, ErrorKind::PeerLost { rank: Rank(3), round: 1 });
        rig.script.lock().unwrap().lost = None;
    }
}

#[rstest]
fn a_dropped_ticket_is_settled_by_the_next_call(#[values(0, 1, 2)] phases: usize) {
    let mut rig = Rig::new(PLAIN, ME);
    let tokens = Tokens::random(&mut fresh(), 2);
    let mut memory = Workspace::new(DeviceKind::Host, 0).unwrap();
    let mut cx = ExecCx { stream: Stream::Host, workspace: memory.arena() };
    let comm = rig.kernel.prepare_finalize();
    let sent = comm.prepare_send(&mut cx, tokens.input()).unwrap();
    if phases > 0 {
        let (_, routed) = comm.prepare_recv(&mut cx, sent).unwrap();
        if phases > 1 {
            let out = fused_moe_core::ExpertOut::Failed(Fault::OverlapFailed);
            drop(comm.finalize_send(&mut cx, routed, out).unwrap());
        }
    }
    rig.log();
    rig.apply_right(&tokens);
    let whole = ["prepare_recv", "failed", "finalize_recv"];
    let settled = &whole[phases..];
    assert_eq!(rig.log()[..settled.len()], *settled);
}

#[test]
fn the_four_phases_forward_through_box_and_reference() {
    fn round<P: PrepareAndFinalizeModular>(mut comm: P, tokens: &Tokens) -> Vec<f32> {
        let mut memory = [0_u8; 0];
        let memory = TensorViewMut::from_slice(&mut memory, DType::U8, &[0]).unwrap();
        let mut cx = ExecCx { stream: Stream::Host, workspace: Arena::new(memory) };
        let (dispatched, routed) = comm.prepare(&mut cx, tokens.input()).unwrap();
        let rows = dispatched.hidden.as_slice::<bf16>().unwrap().to_vec();
        let rows = TensorView::from_slice(&rows, DType::Bf16, &[MAX_TOKENS, HIDDEN]).unwrap();
        let mut out = vec![f32::NAN; tokens.count * HIDDEN];
        let view = TensorViewMut::from_slice(&mut out, DType::F32, &[tokens.count, HIDDEN]).unwrap();
        comm.finalize(&mut cx, routed, fused_moe_core::ExpertOut::Lent(rows), view).unwrap();
        out
    }
    let tokens = Tokens::random(&mut fresh(), 3);
    let wires = vec![WireFormat::unquantized(DType::Bf16)];
    let caps = PrepareCaps::host("toy", KernelKind::Modular, wires, MAX_TOKENS);
    let mut comm: Box<dyn PrepareAndFinalizeModular> =
        Box::new(ToyComm::new(caps, &config(1), ME, Arc::default()));
    let want: Vec<f32> = tokens.hidden.iter().map(|x| x.to_f32()).collect();
    assert_eq!(round(&mut comm, &tokens), want);
    assert_eq!((comm.ledger().round(), comm.caps().name), (1, "toy"));
    assert_eq!(round(comm, &tokens), want);
}

#[test]
fn a_kernel_says_what_it_holds() {
    let lent = Rig::new(PLAIN, ME).kernel.bytes();
    let in_place = Rig::new(Shape { offers: true, planned: true, ..PLAIN }, ME).kernel.bytes();
    assert_eq!(lent.workspace, Workspace::rounded(WORKSPACE));
    assert_eq!(lent.comm, ToyComm::bytes(&config(1), MAX_TOKENS + 1));
    assert_eq!(lent.expert_out, Workspace::rounded((MAX_TOKENS + 1) * HIDDEN * 2));
    assert_eq!(lent.total(), lent.comm + lent.workspace + lent.expert_out);
    assert_eq!((in_place.expert_out, in_place.comm), (0, lent.comm));
}

#[test]
fn a_fault_of_the_caller_goes_through_the_phases() {
    let tokens = Tokens::random(&mut fresh(), 1);
    let mut rig = Rig::new(PLAIN, ME);
    let mut memory = Workspace::new(DeviceKind::Host, 0).unwrap();
    let mut cx = ExecCx { stream: Stream::Host, workspace: memory.arena() };
    let fault = Fault::NonFiniteLogit { token: 0, expert: EXPERTS as u32 - 1 };
    let topk = TopK { ..tokens.topk() };
    let input = PrepareInput { hidden: tokens.hidden(), topk, input_scale: None, fault: Some(fault) };
    let error = rig.kernel.prepare_finalize().prepare(&mut cx, input).unwrap_err();
    assert_eq!(error.kind, failed(ME, fault));
    rig.apply_right(&tokens);
}
