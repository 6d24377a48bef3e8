//! A rank dies in a call, the others go on as a smaller group with the weights that they have, and the layer is the one
//! without the experts that are gone.

use ep_transport::{Endpoint, ThreadOptions, run_ranks};
use fused_moe::router::eplb::ReplicaTable;
use fused_moe::router::survivors::{
    Dropped, ExpertsLost, LostExpertPolicy, SurvivingExperts, SurvivorMapError, Survivors,
};
use fused_moe::{
    Call, DType, ErrorKind, ExpertPlacement, ExpertWeights, Fault, Fp8Format, FusedMoEKernel, ModularKernel,
    MoeConfig, Overlap, ProcessGroup, QuantScheme, Rank, Registry, RouterWeight, Selection, Stream,
    TensorView, TensorViewMut, TopK,
};
use moe_conformance::oracle::{InputScales, Layer, RankTokens};
use moe_conformance::{Case, LayerWeights, RankInput, Rounding, Seed, relative_l2};
use rstest::rstest;

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const RANKS: usize = 4;
const DEAD: Rank = Rank(1);
const LEFT: [Rank; 3] = [Rank(0), Rank(2), Rank(3)];
/// Three on each rank. The last four are replicas of experts 0 to 3, so that expert 3 survives and 4 and 5 do not.
const SLOTS: usize = 12;
const EXPERTS: usize = 8;
const GONE: [i32; 2] = [4, 5];
const TOKENS: usize = 40;

struct Fixture {
    registry: Registry,
    comm: &'static str,
    case: Case,
    config: MoeConfig,
    weights: LayerWeights,
    inputs: Vec<RankInput>,
}

/// Top-k of one rank.
struct Routed {
    ids: Vec<i32>,
    weights: Vec<f32>,
}

impl Fixture {
    fn new(comm: &'static str, quant: QuantScheme) -> Self {
        let seed = Seed::fresh();
        println!("seed {seed}");
        let case = Case { tokens: vec![TOKENS; RANKS], ..Case::small(quant, RANKS, seed) };
        let config = MoeConfig {
            placement: ExpertPlacement::linear(SLOTS, RANKS).unwrap(),
            redundant_experts: SLOTS - EXPERTS,
            ..case.config()
        };
        assert_eq!(case.config().num_experts(), EXPERTS);
        let (weights, inputs) = (case.weights(), case.inputs(0));
        Self { registry: fused_moe::default_backends(), comm, case, config, weights, inputs }
    }

    fn kernel(&self, config: &MoeConfig, group: &Endpoint) -> Outcome<ModularKernel> {
        let selection = Selection { comm: Some(self.comm), experts: None };
        match self.registry.build(config, selection, group)? {
            FusedMoEKernel::Modular(kernel) => Ok(kernel),
            FusedMoEKernel::Monolithic(_) => Err("not modular".into()),
        }
    }

    /// Runs the tokens of `old`, a rank of the first group.
    fn call(
        &self,
        kernel: &mut ModularKernel,
        weights: &ExpertWeights,
        old: Rank,
        routed: &Routed,
    ) -> fused_moe::Result<Vec<f32>> {
        let (input, hidden, top_k) = (&self.inputs[old.index()], self.config.hidden, self.config.top_k);
        let view = "the vectors have these dimensions";
        let mut out = vec![f32::NAN; TOKENS * hidden];
        kernel.apply(Call {
            stream: Stream::Host,
            weights,
            hidden: TensorView::from_slice(&input.hidden, DType::Bf16, &[TOKENS, hidden]).expect(view),
            routing: TopK {
                ids: TensorView::from_slice(&routed.ids, DType::I32, &[TOKENS, top_k]).expect(view),
                weights: TensorView::from_slice(&routed.weights, DType::F32, &[TOKENS, top_k]).expect(view),
            },
            overlap: Overlap::default(),
            out: TensorViewMut::from_slice(&mut out, DType::F32, &[TOKENS, hidden]).expect(view),
        })?;
        Ok(out)
    }

    /// The first group: one rank stops taking part, the others lose it and keep their weights.
    fn lose_a_rank(&self, table: &ReplicaTable) -> Outcome<Vec<ExpertWeights>> {
        let logical = self.weights.matrices();
        let ranks = run_ranks(RANKS, ThreadOptions::default(), |group| -> Outcome<Option<ExpertWeights>> {
            let rank = group.rank();
            let mut kernel = self.kernel(&self.config, &group)?;
            let slots = self.config.placement.experts_of(rank).map(|slot| slot.0 as usize);
            let mine: Vec<_> =
                slots.map(|slot| logical[table.physical_to_logical()[slot] as usize]).collect();
            let provider = self.registry.experts(kernel.plan().experts())?;
            let weights = provider.pack(&self.config, rank, &mine)?;
            if rank == DEAD {
                return Ok(None);
            }
            let RankInput { ids, weights: of_slots, .. } = &self.inputs[rank.index()];
            let mut routed = Routed { ids: ids.clone(), weights: of_slots.clone() };
            table.map_in_place(self.config.top_k, &mut routed.ids)?;
            let lost = self.call(&mut kernel, &weights, rank, &routed).unwrap_err();
            assert!(matches!(lost.kind, ErrorKind::PeerLost { rank: DEAD, .. }), "{lost}");
            Ok(Some(weights))
        })?;
        Ok(ranks.into_iter().collect::<Outcome<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// What routing means without the lost experts, in the router's numbers.
    fn masked(&self, policy: LostExpertPolicy, old: Rank) -> Routed {
        let RankInput { ids, weights, .. } = &self.inputs[old.index()];
        let mut routed = Routed { ids: ids.clone(), weights: weights.clone() };
        let top_k = self.config.top_k;
        for (ids, weights) in routed.ids.chunks_mut(top_k).zip(routed.weights.chunks_mut(top_k)) {
            let sum = |weights: &[f32], ids: &[i32]| -> f32 {
                ids.iter().zip(weights).filter(|&(&id, _)| id != -1).map(|(_, &weight)| weight).sum()
            };
            let before = sum(weights, ids);
            ids.iter_mut().filter(|id| GONE.contains(id)).for_each(|id| *id = -1);
            let after = sum(weights, ids);
            if policy == LostExpertPolicy::DropAndRenormalise && after > 0.0 && after != before {
                weights.iter_mut().for_each(|weight| *weight *= before / after);
            }
        }
        routed
    }

    /// The survivors' tokens with another routing.
    fn tokens<'a>(&'a self, routed: impl Iterator<Item = &'a Routed>) -> Vec<RankTokens<'a>> {
        let tokens = |(&old, Routed { ids, weights }): (&Rank, &'a Routed)| RankTokens {
            ids,
            weights,
            ..self.inputs[old.index()].tokens()
        };
        LEFT.iter().zip(routed).map(tokens).collect()
    }

    /// Whether the outputs of the survivors are those of the layer whose lost experts are masked by `policy`. `slots`
    /// are what they were mapped to: whose partial sum a token is in decides what is rounded on the way.
    fn check(
        &self,
        after: &SurvivingExperts,
        policy: LostExpertPolicy,
        slots: &[&Routed],
        outputs: &[&[f32]],
    ) -> Outcome<()> {
        let logical = self.weights.matrices();
        let placed: Vec<_> = after.physical_to_logical().iter().map(|&e| logical[e as usize]).collect();
        let masked: Vec<Routed> = LEFT.iter().map(|&old| self.masked(policy, old)).collect();
        let (plain, with) = (self.tokens(masked.iter()), self.tokens(slots.iter().copied()));
        let without = Layer {
            shape: self.case.shape(),
            quant: self.case.quant,
            activation: self.case.activation,
            padding: self.case.padding,
            router_weight: RouterWeight::OnOutput,
            input_scales: InputScales::OfSource,
            experts: &logical,
            placement: &ExpertPlacement::linear(EXPERTS, LEFT.len())?,
            ranks: &plain,
        };
        let with = Layer { experts: &placed, placement: &after.config().placement, ranks: &with, ..without };
        let selection = Selection { comm: Some(self.comm), experts: None };
        let survey = self.registry.survey(after.config(), selection)?;
        let expected = with.expected(Rounding::of_plan(&survey.fitting[0], DType::F32))?;
        // The weights were scaled in another order of f32 operations.
        let masked = relative_l2(&as_f32(&without.run()?.concat()), &expected.exact);
        if masked > 1e-5 {
            return Err(format!("{masked:.1e} from the layer masked by {policy}").into());
        }
        expected.check(&outputs.concat(), self.case.hidden)?;
        Ok(())
    }
}

fn as_f32(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&value| value as f32).collect()
}

/// What one rank has seen.
struct Observed {
    /// By policy that drops.
    mapped: [Routed; 2],
    outputs: [Vec<f32>; 2],
    dropped: Dropped,
    failed: (ErrorKind, Option<ExpertsLost>),
}

const DROPPING: [LostExpertPolicy; 2] = [LostExpertPolicy::DropAndRenormalise, LostExpertPolicy::DropRaw];

#[rstest]
fn survivors_go_on_without_the_lost_experts(
    #[values("mori_high_throughput", "allgather_reducescatter", "naive", "batched")] comm: &'static str,
    #[values(QuantScheme::Unquantized, QuantScheme::Fp8Block(Fp8Format::E4M3Fn))] quant: QuantScheme,
) -> Outcome<()> {
    let mut fixture = Fixture::new(comm, quant);
    // The first survivor has no token of a lost expert, and the second one's first token loses all it has.
    fixture.inputs[0].ids.iter_mut().filter(|id| GONE.contains(id)).for_each(|id| *id = -1);
    let top_k = fixture.config.top_k;
    fixture.inputs[2].ids[..top_k].fill(-1);
    fixture.inputs[2].ids[0] = GONE[1];
    let table = ReplicaTable::identity(EXPERTS, SLOTS - EXPERTS)?;
    let weights = fixture.lose_a_rank(&table)?;
    let left = Survivors { ranks: &LEFT, ranks_per_node: LEFT.len() };
    let after = SurvivingExperts::new(&fixture.config, &table, left)?;
    assert_eq!(
        after.lost().iter().map(|lost| (lost.expert as i32, lost.rank)).collect::<Vec<_>>(),
        GONE.map(|id| (id, DEAD))
    );

    let observed = run_ranks(LEFT.len(), ThreadOptions::default(), |group| -> Outcome<Observed> {
        let (rank, old) = (group.rank(), after.old_ranks()[group.rank().index()]);
        let mut kernel = fixture.kernel(after.config(), &group)?;
        let RankInput { ids, weights: of_slots, .. } = &fixture.inputs[old.index()];
        let map = |policy| {
            let mut routed = Routed { ids: ids.clone(), weights: of_slots.clone() };
            let dropped = after.map(policy, top_k, &mut routed.ids, &mut routed.weights);
            dropped.map(|dropped| (routed, dropped))
        };
        let weights = &weights[rank.index()];
        let mut run = |routed: &Routed| fixture.call(&mut kernel, weights, old, routed);
        let (renormalised, dropped) = map(LostExpertPolicy::DropAndRenormalise)?;
        let first = run(&renormalised)?;
        let failed = match map(LostExpertPolicy::Fail) {
            Ok((routed, _)) => (run(&routed).unwrap_err().kind, None),
            Err(SurvivorMapError::Lost(lost)) => {
                (kernel.abstain(Stream::Host, lost.fault()).kind, Some(lost))
            }
            Err(other) => return Err(other.into()),
        };
        let (raw, again) = map(LostExpertPolicy::DropRaw)?;
        assert_eq!(again, dropped);
        let second = fixture.call(&mut kernel, weights, old, &raw)?;
        Ok(Observed { mapped: [renormalised, raw], outputs: [first, second], dropped, failed })
    })?;
    let observed: Vec<Observed> = observed.into_iter().collect::<Outcome<_>>()?;

    // The lowest rank with such a token is at fault, on all of them.
    let fault = Fault::ExpertLost { token: 0, expert: GONE[1] as u32, rank: DEAD.0 };
    for rank in &observed {
        assert_eq!(rank.failed.0, ErrorKind::RankFailed { rank: Rank(1), fault }, "{comm}");
    }
    let Observed { dropped, failed: (_, lost), .. } = &observed[1];
    assert_eq!(lost.as_ref().unwrap().dropped, *dropped);
    assert!(dropped.empty_tokens >= 1 && dropped.slots >= dropped.tokens, "{dropped:?}");
    assert_eq!((observed[0].dropped, &observed[0].failed.1), (Dropped::default(), &None));

    for (index, policy) in DROPPING.into_iter().enumerate() {
        let mapped: Vec<&Routed> = observed.iter().map(|rank| &rank.mapped[index]).collect();
        let outputs: Vec<&[f32]> = observed.iter().map(|rank| &rank.outputs[index][..]).collect();
        assert!(
            outputs[1][..fixture.config.hidden].iter().all(|&y| y == 0.0),
            "nothing is left of this token"
        );
        fixture.check(&after, policy, &mapped, &outputs).map_err(|e| format!("{comm}, {policy}: {e}"))?;
        // A check that any policy passes would show nothing.
        let other = DROPPING[1 - index];
        assert!(fixture.check(&after, other, &mapped, &outputs).is_err(), "{policy} passes as {other}");
    }
    Ok(())
}
