//! Rounds in which a rank fails, forgets a ticket, mixes handles up or falls silent.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use fused_moe_core::{Axis, Error, ErrorKind, Fault, NO_EXPERT, ProcessGroup, Rank, Unsupported};
use half::bf16;

use super::Target;
use super::handle::{Handle, Lent};
use super::rounds::Round;
use super::toy::Values;
use crate::case::{Case, RankInput};
use crate::outcome::{Check, Outcome, chain, fail, on_ranks};

/// Deadline of the ranks that wait for a silent one.
const SILENCE: Duration = Duration::from_millis(300);

/// What else a busy machine may add to a deadline.
const SLACK: Duration = Duration::from_secs(15);

/// What goes wrong in one round, on one rank.
#[derive(Clone, Debug)]
enum Mishap {
    /// The input is refused.
    Input(Box<RankInput>, Shape, Fault),
    /// The caller reports a failure of its own.
    Reported(Fault),
    /// The experts fail.
    Experts,
    /// The ticket of `prepare_send` is dropped.
    AfterPrepareSend,
    /// The ticket of `prepare_recv` is dropped.
    AfterPrepareRecv,
    /// The ticket of `finalize_send` is dropped.
    AfterFinalizeSend,
}

/// Slots per token of the tensors that are lent.
#[derive(Clone, Copy, Debug)]
struct Shape {
    top_k: usize,
}

/// How a round ended on a rank.
#[derive(Debug, PartialEq)]
enum End {
    Done,
    Failed(ErrorKind),
    /// The rank dropped its ticket.
    Left,
}

/// Inputs of `rank` that every backend must refuse, each with the fault that says so.
fn bad_inputs(case: &Case, good: &RankInput, max_tokens: usize) -> Vec<Mishap> {
    let shape = Shape { top_k: case.top_k };
    let with = |change: &dyn Fn(&mut RankInput), fault| {
        let mut input = good.clone();
        change(&mut input);
        Mishap::Input(Box::new(input), shape, fault)
    };
    let (last, token) = (good.num_tokens - 1, (good.num_tokens - 1) as u32);
    let unknown = case.num_experts as i32;
    // A row of its own for each, so that only one thing is wrong with it.
    let row = last * case.top_k;
    let mut mishaps = vec![
        with(&|input| input.ids[row] = unknown, Fault::ExpertIdOutOfRange { token, slot: 0, id: unknown }),
        with(&|input| input.ids[row] = -2, Fault::ExpertIdOutOfRange { token, slot: 0, id: -2 }),
        with(
            &|input| input.hidden[last * case.hidden + 3] = bf16::NAN,
            Fault::NonFiniteHidden { token, element: 3 },
        ),
        with(
            &|input| input.hidden[last * case.hidden] = bf16::NEG_INFINITY,
            Fault::NonFiniteHidden { token, element: 0 },
        ),
        with(&|input| input.weights[row] = f32::INFINITY, Fault::NonFiniteWeight { token, slot: 0 }),
        Mishap::Reported(Fault::OverlapFailed),
    ];
    if case.top_k > 1 {
        let duplicate = |input: &mut RankInput| {
            input.ids[row..row + case.top_k].fill(NO_EXPERT);
            input.ids[row..row + 2].fill(1);
        };
        mishaps.push(with(&duplicate, Fault::DuplicateExpertId { token, id: 1 }));
    }
    let many = max_tokens + 1;
    let too_many = |input: &mut RankInput| {
        input.num_tokens = many;
        input.hidden.resize(many * case.hidden, bf16::ONE);
        input.ids.resize(many * case.top_k, NO_EXPERT);
        input.weights.resize(many * case.top_k, 1.0);
    };
    mishaps.push(with(&too_many, Fault::TooManyTokens { tokens: many as u32, max: max_tokens as u32 }));
    let wide = |input: &mut RankInput| {
        input.ids.resize(input.num_tokens * (case.top_k + 1), NO_EXPERT);
        input.weights.resize(input.num_tokens * (case.top_k + 1), 1.0);
    };
    let mut misfit = with(&wide, Fault::BadTensor);
    if let Mishap::Input(_, shape, _) = &mut misfit {
        shape.top_k += 1;
    }
    mishaps.push(misfit);
    mishaps
}

/// Sends fail only when a handle cannot go on.
fn send_failed<T>(error: Error) -> Check<T> {
    fail(format!("a send fails: {}", chain(&error)))
}

/// One round in which this rank does `mishap`, or takes part without one.
fn round(handle: &mut Handle, case: &Case, input: &RankInput, mishap: Option<&Mishap>) -> Check<End> {
    let mut lent = Lent::new(case, input);
    match mishap {
        Some(Mishap::Input(bad, shape, _)) => {
            lent = Lent { input: bad, top_k: shape.top_k, ..lent };
        }
        Some(Mishap::Reported(fault)) => lent.fault = Some(*fault),
        _ => {}
    }
    let tokens = lent.input.num_tokens;
    let sent = handle.prepare_send(lent).or_else(send_failed)?;
    if matches!(mishap, Some(Mishap::AfterPrepareSend)) {
        return Ok(End::Left);
    }
    let (_, partial, routed) = match handle.prepare_recv(sent, Values::Exact)? {
        Ok(received) => received,
        Err(error) => return Ok(End::Failed(error.kind)),
    };
    if matches!(mishap, Some(Mishap::AfterPrepareRecv)) {
        return Ok(End::Left);
    }
    let out = match mishap {
        Some(Mishap::Experts) => Err(Fault::ExpertsFailed),
        _ => Ok(&partial),
    };
    let sent = handle.finalize_send(routed, out).or_else(send_failed)?;
    if matches!(mishap, Some(Mishap::AfterFinalizeSend)) {
        return Ok(End::Left);
    }
    Ok(match handle.finalize_recv(sent, [tokens, case.hidden], false) {
        Ok(_) => End::Done,
        Err(error) => End::Failed(error.kind),
    })
}

impl Mishap {
    /// How the round must end on a rank that has no mishap, if `failing` has this one.
    fn end(&self, failing: Rank) -> End {
        let fault = match self {
            Mishap::Input(_, _, fault) | Mishap::Reported(fault) => *fault,
            Mishap::Experts => Fault::ExpertsFailed,
            Mishap::AfterPrepareSend | Mishap::AfterPrepareRecv => Fault::Abandoned,
            Mishap::AfterFinalizeSend => return End::Done,
        };
        End::Failed(ErrorKind::RankFailed { rank: failing, fault })
    }

    fn drops_a_ticket(&self) -> bool {
        matches!(self, Mishap::AfterPrepareSend | Mishap::AfterPrepareRecv | Mishap::AfterFinalizeSend)
    }
}

/// Every mishap in turn, on one rank after the other; between them, rounds that must be right on all ranks.
fn mishaps(target: &Target<'_>, case: &Case, of: impl Fn(&RankInput, usize) -> Vec<Mishap> + Sync) -> Check {
    let accepted = target.accepts(case)?;
    let max_tokens = accepted.config.max_tokens_per_rank;
    let good = [Round::new(&accepted, case, 0), Round::new(&accepted, case, 1)];
    let count = of(&good[0].inputs[0], max_tokens).len();
    on_ranks(case, target.settings, |group| {
        let rank = group.rank();
        let mut handle = target.build(&accepted, &group)?;
        for number in 0..count.max(case.ep_size()) {
            let failing = Rank((number % case.ep_size()) as u32);
            let mishap = of(&good[0].inputs[failing.index()], max_tokens).swap_remove(number % count);
            let context = format!("{failing} with {}", describe(&mishap));
            let mine = (rank == failing).then_some(&mishap);
            let end = round(&mut handle, case, &good[0].inputs[rank.index()], mine);
            let end = end.map_err(|e| e.within(&context))?;
            let left = rank == failing && mishap.drops_a_ticket();
            let wanted = if left { End::Left } else { mishap.end(failing) };
            if end != wanted {
                return fail(format!("{context}: the round ends with {end:?} on {rank}, wanted {wanted:?}"));
            }
            let how = (Values::Exact, false);
            let next = &good[1 - number % 2];
            let got = handle.round(case, &next.inputs[rank.index()], how);
            got.and_then(|got| next.check((&accepted, case), rank, &got, how))
                .map_err(|e| e.within(format!("the round after {context}")))?;
        }
        Ok(())
    })?;
    Ok(())
}

fn describe(mishap: &Mishap) -> String {
    match mishap {
        Mishap::Input(_, _, fault) => format!("an input that must be refused ({fault})"),
        other => format!("{other:?}"),
    }
}

/// A rank whose input is refused, or that reports a failure, before dispatch.
pub(super) fn dispatch(target: &Target<'_>, case: &Case) -> Check {
    mishaps(target, case, |input, max_tokens| bad_inputs(case, input, max_tokens))
}

/// A rank whose experts fail.
pub(super) fn experts(target: &Target<'_>, case: &Case) -> Check {
    mishaps(target, case, |_, _| vec![Mishap::Experts])
}

/// A rank that drops its ticket, at each of the three places.
pub(super) fn dropped(target: &Target<'_>, case: &Case) -> Check {
    let places = [Mishap::AfterPrepareSend, Mishap::AfterPrepareRecv, Mishap::AfterFinalizeSend];
    mishaps(target, case, |_, _| places.to_vec())
}

/// Two ranks that fail in one round: every rank returns the fault of the lower one.
pub(super) fn two_ranks(target: &Target<'_>, case: &Case) -> Check {
    let accepted = target.accepts(case)?;
    let round_inputs = Round::new(&accepted, case, 0);
    let low = Fault::OverlapFailed;
    let high = Fault::NonFiniteLogit { token: 5, expert: 7 };
    on_ranks(case, target.settings, |group| {
        let rank = group.rank();
        let mut handle = target.build(&accepted, &group)?;
        let mine = match rank.index() {
            1 => Some(Mishap::Reported(low)),
            2 => Some(Mishap::Reported(high)),
            _ => None,
        };
        let input = &round_inputs.inputs[rank.index()];
        let end = round(&mut handle, case, input, mine.as_ref())?;
        let wanted = End::Failed(ErrorKind::RankFailed { rank: Rank(1), fault: low });
        if end != wanted {
            return fail(format!("ranks 1 and 2 fail: {end:?} on {rank}, wanted {wanted:?}"));
        }
        let got = handle.round(case, input, (Values::Exact, false))?;
        round_inputs.check((&accepted, case), rank, &got, (Values::Exact, false))
    })?;
    Ok(())
}

/// The tickets of one handle given to another are a broken contract, and both handles go on working.
pub(super) fn foreign_ticket(target: &Target<'_>, case: &Case) -> Check {
    let accepted = target.accepts(case)?;
    let good = Round::new(&accepted, case, 0);
    on_ranks(case, target.settings, |group| {
        let rank = group.rank();
        let (mut a, mut b) = (target.build(&accepted, &group)?, target.build(&accepted, &group)?);
        let input = &good.inputs[rank.index()];
        let refused = |what: &str, kind: Option<ErrorKind>| match kind {
            Some(ErrorKind::Contract) => Ok(()),
            other => fail(format!("a foreign ticket in {what} gives {other:?}, wanted a broken contract")),
        };
        let sent = a.prepare_send(Lent::new(case, input)).or_else(fail)?;
        refused("prepare_recv", b.prepare_recv(sent, Values::Exact)?.err().map(|e| e.kind))?;

        let sent = a.prepare_send(Lent::new(case, input)).or_else(fail)?;
        let (_, partial, routed) = a.prepare_recv(sent, Values::Exact)?.or_else(fail)?;
        refused("finalize_send", b.finalize_send(routed, Ok(&partial)).err().map(|e| e.kind))?;

        let sent = a.prepare_send(Lent::new(case, input)).or_else(fail)?;
        let (_, partial, routed) = a.prepare_recv(sent, Values::Exact)?.or_else(fail)?;
        let sent = a.finalize_send(routed, Ok(&partial)).or_else(fail)?;
        let out = b.finalize_recv(sent, [input.num_tokens, case.hidden], false);
        refused("finalize_recv", out.err().map(|e| e.kind))?;

        let how = (Values::Exact, false);
        for handle in [&mut b, &mut a] {
            let got = handle.round(case, input, how)?;
            good.check((&accepted, case), rank, &got, how)?;
        }
        Ok(())
    })?;
    Ok(())
}

/// A rank that builds its end and then falls silent: the others lose it by the deadline, and say so again.
pub(super) fn lost_peer(target: &Target<'_>, case: &Case) -> Check {
    if !target.settings.launcher.is_one_process() {
        let (wanted, offered) = ("ranks that meet outside their group", "ranks in other processes");
        return Err(Outcome::Refused(vec![Unsupported::new(Axis::Parallel, wanted, offered)]));
    }
    let accepted = target.accepts(case)?;
    let good = Round::new(&accepted, case, 0);
    let silent = Rank(case.ep_size() as u32 - 1);
    // The silent rank stays in its group until the others have given it up: it must not be found to be gone.
    let given_up = Barrier::new(case.ep_size());
    on_ranks(case, target.settings.with_timeout(SILENCE), |group| {
        let rank = group.rank();
        let handle = target.build(&accepted, &group);
        let ended = handle.and_then(|mut handle| {
            if rank == silent {
                return Ok((handle, None));
            }
            let start = Instant::now();
            let first = lost(&mut handle, case, &good.inputs[rank.index()])?;
            Ok((handle, Some((first, start.elapsed()))))
        });
        given_up.wait();
        let (mut handle, Some((first, waited))) = ended? else { return Ok(()) };
        if !matches!(first, Some(ErrorKind::PeerLost { rank, .. }) if rank == silent) {
            return fail(format!("{silent} is silent: {first:?} on {rank}, wanted a lost peer"));
        }
        if waited > SILENCE + SLACK {
            return fail(format!("{silent} was given up after {waited:?}, the deadline is {SILENCE:?}"));
        }
        match lost(&mut handle, case, &good.inputs[rank.index()])? {
            Some(ErrorKind::PeerLost { .. }) => Ok(()),
            other => fail(format!("the round after the loss gives {other:?}, wanted a lost peer")),
        }
    })?;
    Ok(())
}

/// The error of a round that cannot succeed.
fn lost(handle: &mut Handle, case: &Case, input: &RankInput) -> Check<Option<ErrorKind>> {
    let sent = match handle.prepare_send(Lent::new(case, input)) {
        Ok(sent) => sent,
        Err(error) => return Ok(Some(error.kind)),
    };
    Ok(handle.prepare_recv(sent, Values::Exact)?.err().map(|error| error.kind))
}
