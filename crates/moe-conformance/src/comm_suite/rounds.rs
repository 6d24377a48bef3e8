//! Rounds in which nothing goes wrong: what arrives, what is summed, what it costs.

use ep_transport::{Endpoint, Traffic};
use fused_moe_core::{CombineKind, CombineWire, ProcessGroup, Rank, RouterWeight};

use super::arrivals::{Arrivals, conserved};
use super::handle::{Handle, Lent};
use super::toy::{Expected, Returning, Values};
use super::{Accepted, Target};
use crate::bound::nearest;
use crate::case::{Case, RankInput, RoutingPattern};
use crate::layer::bits;
use crate::outcome::{Check, fail, on_ranks};
use crate::wire::WireRow;

/// Largest error of an element of a combine in f32, in units of the sum of the magnitudes of its terms. Eight
/// terms in f32 are off by less than 8·2⁻²⁴; one addition in bf16 is off by up to 2⁻⁹.
const SUM_TOLERANCE: f64 = 1e-6;

/// One round as all ranks ran it.
pub(super) struct Round {
    pub(super) inputs: Vec<RankInput>,
    /// What every rank must send.
    pub(super) sent: Vec<Vec<WireRow>>,
}

impl Round {
    pub(super) fn new(accepted: &Accepted, case: &Case, round: u64) -> Self {
        let inputs = accepted.inputs(case, round);
        let encoding = accepted.encoding(case);
        let sent = inputs.iter().map(|input| encoding.sent(case, input)).collect();
        Self { inputs, sent }
    }

    /// Checks what `rank` received and what combine gave it.
    pub(super) fn check(
        &self,
        (accepted, case): (&Accepted, &Case),
        rank: Rank,
        (arrivals, out): &(Arrivals, Vec<f32>),
        (values, in_bf16): (Values, bool),
    ) -> Check {
        let placement = &case.placement;
        conserved(arrivals, (&self.sent, placement), (rank, accepted.plan.kind()))?;
        let input = &self.inputs[rank.index()];
        // Weights that prepare multiplied into the rows are not applied again.
        let weighted = accepted.caps.combine == CombineKind::WeightAndReduce
            && accepted.plan.router_weight() == RouterWeight::OnOutput;
        let sent = &self.sent[rank.index()];
        let (partial_sums, combine_wire) = (accepted.plan.partial_sums(), accepted.plan.combine_wire());
        let how = (values, Returning { partial_sums, combine_wire });
        let want = Expected::new(sent, (placement, input, weighted), how, case.hidden);
        let exact = values == Values::Exact && combine_wire == CombineWire::InDtype;
        for (at, &got) in out.iter().enumerate() {
            let (sum, magnitude, bound) = (want.sums[at], want.magnitudes[at], want.bounds[at]);
            let (single, rounded) = (sum as f32, nearest(sum).to_f32());
            let right = match (exact, in_bf16) {
                (true, false) => got == single,
                (true, true) => got == rounded,
                (false, false) => (f64::from(got) - sum).abs() <= SUM_TOLERANCE * magnitude + bound,
                // What is off is rounded at the size that it has then.
                (false, true) => {
                    let most = sum.abs() + bound;
                    (f64::from(got) - sum).abs() <= most / 200.0 + 1e-5 * magnitude + bound
                }
            };
            if !right {
                let (token, column) = (at / case.hidden, at % case.hidden);
                let ids = &input.ids[token * case.top_k..][..case.top_k];
                return fail(format!(
                    "combine gives {got} for token {token} of {rank} at {column}, wanted {sum} within {bound}; its experts are {ids:?}"
                ));
            }
        }
        Ok(())
    }
}

/// Which inputs, which values, and whether the output is bf16.
const ROUNDS: [(usize, Values, bool); 5] = [
    (0, Values::Exact, false),
    (1, Values::Exact, true),
    (0, Values::Exact, false),
    (1, Values::Rounded, false),
    (1, Values::Rounded, false),
];

/// Five rounds on one handle: every row arrives as it was sent, every sum is right, the same round gives the same
/// bits, and nobody's tensors change.
pub(super) fn rows(target: &Target<'_>, case: &Case) -> Check {
    let accepted = target.accepts(case)?;
    let rounds = [Round::new(&accepted, case, 0), Round::new(&accepted, case, 1)];
    on_ranks(case, target.settings, |group| {
        let rank = group.rank();
        let mut handle = target.build(&accepted, &group)?;
        let mut outputs = Vec::new();
        for (number, (which, values, in_bf16)) in ROUNDS.into_iter().enumerate() {
            let round = &rounds[which];
            let before = round.inputs[rank.index()].clone();
            let got = handle.round(case, &round.inputs[rank.index()], (values, in_bf16));
            let checked = got.and_then(|got| {
                round.check((&accepted, case), rank, &got, (values, in_bf16))?;
                Ok(got)
            });
            outputs.push(checked.map_err(|e| e.within(format!("round {number}")))?.1);
            if round.inputs[rank.index()] != before {
                return fail(format!("round {number} changed the caller's tensors"));
            }
        }
        for (first, second) in [(0, 2), (3, 4)] {
            if bits(&outputs[first]) != bits(&outputs[second]) {
                return fail(format!("rounds {first} and {second} are the same and gave other bits"));
            }
        }
        Ok(())
    })?;
    Ok(())
}

/// Two handles of one group with their phases interleaved, as for two micro-batches in flight.
pub(super) fn two_handles(target: &Target<'_>, case: &Case) -> Check {
    let accepted = target.accepts(case)?;
    let rounds = [Round::new(&accepted, case, 0), Round::new(&accepted, case, 1)];
    on_ranks(case, target.settings, |group| {
        let rank = group.rank();
        let mut handles = [target.build(&accepted, &group)?, target.build(&accepted, &group)?];
        for swap in [false, true] {
            let round = |index: usize| &rounds[if swap { 1 - index } else { index }];
            interleaved(&mut handles, case, [round(0), round(1)], (&accepted, rank))?;
        }
        Ok(())
    })?;
    Ok(())
}

fn interleaved(
    handles: &mut [Handle; 2],
    case: &Case,
    rounds: [&Round; 2],
    (accepted, rank): (&Accepted, Rank),
) -> Check {
    let how = (Values::Exact, false);
    let [a, b] = handles;
    let inputs = rounds.map(|round| &round.inputs[rank.index()]);
    let sent_a = a.prepare_send(Lent::new(case, inputs[0])).or_else(fail)?;
    let sent_b = b.prepare_send(Lent::new(case, inputs[1])).or_else(fail)?;
    let (arrived_a, partial_a, routed_a) = a.prepare_recv(sent_a, how.0)?.or_else(fail)?;
    let sent_a = a.finalize_send(routed_a, Ok(&partial_a)).or_else(fail)?;
    let (arrived_b, partial_b, routed_b) = b.prepare_recv(sent_b, how.0)?.or_else(fail)?;
    let sent_b = b.finalize_send(routed_b, Ok(&partial_b)).or_else(fail)?;
    let out_a = a.finalize_recv(sent_a, [inputs[0].num_tokens, case.hidden], false).or_else(fail)?;
    let out_b = b.finalize_recv(sent_b, [inputs[1].num_tokens, case.hidden], false).or_else(fail)?;
    rounds[0]
        .check((accepted, case), rank, &(arrived_a, out_a), how)
        .map_err(|e| e.within("first handle"))?;
    rounds[1].check((accepted, case), rank, &(arrived_b, out_b), how).map_err(|e| e.within("second handle"))
}

/// A handle holds what its provider announced, before and after its rounds, for however many layers.
pub(super) fn bytes(target: &Target<'_>, case: &Case) -> Check {
    let accepted = target.accepts(case)?;
    let announced = target.provider.required_bytes(&accepted.config, &accepted.plan);
    let round = Round::new(&accepted, case, 0);
    on_ranks(case, target.settings, |group| {
        let mut handle = target.build(&accepted, &group)?;
        for layer in 0..58 {
            if handle.allocated_bytes() != announced {
                let held = handle.allocated_bytes();
                return fail(format!("{held} bytes held after {layer} layers, {announced} announced"));
            }
            handle.round(case, &round.inputs[group.rank().index()], (Values::Exact, false))?;
        }
        Ok(())
    })?;
    Ok(())
}

fn traffic_of(group: &Endpoint) -> Traffic {
    group.transport().traffic()
}

/// Tokens for remote experts only: what must cross between ranks was counted by the transport.
pub(super) fn traffic(target: &Target<'_>, case: &Case) -> Check {
    let case = Case { routing: RoutingPattern::RemoteOnly, ..case.clone() };
    let accepted = target.accepts(&case)?;
    let round = Round::new(&accepted, &case, 0);
    let moved = on_ranks(&case, target.settings, |group| {
        let mut handle = target.build(&accepted, &group)?;
        let before = traffic_of(&group);
        handle.round(&case, &round.inputs[group.rank().index()], (Values::Exact, false))?;
        Ok((traffic_of(&group) - before).remote_bytes)
    })?;
    let ids = round.inputs.iter().flat_map(|input| input.ids.chunks_exact(case.top_k));
    let copies: usize = ids
        .map(|ids| {
            let mut ranks: Vec<_> = ids.iter().filter_map(|&id| case.placement.rank_of_slot(id)).collect();
            ranks.sort_unstable();
            ranks.dedup();
            ranks.len()
        })
        .sum();
    let row = accepted.plan.wire().payload_bytes(case.hidden) + accepted.plan.wire().scale_bytes(case.hidden);
    // Every copy goes out as a row of the wire format and comes back in the input's type.
    let least = (copies * (row + case.hidden * accepted.config.in_dtype.size_bytes())) as u64;
    let moved: u64 = moved.iter().sum();
    match moved >= least {
        true => Ok(()),
        false => fail(format!("{moved} bytes counted between ranks, {copies} copies need at least {least}")),
    }
}
