//! A replicated layer over threads as ranks: rebalanced between two calls, it gives what the layer without replicas
//! gives, and a rebalance that not all ranks agree on changes nothing.

use std::collections::HashSet;

use ep_transport::{Endpoint, ThreadOptions, run_ranks};
use fused_moe::router::eplb::{
    Balance, BalancedLayer, Demand, LoadRecorder, LoadShape, PlacedWeights, RebalanceError, ReplicaTable,
    Strategy, propose, sum_over_ranks,
};
use fused_moe::router::simulate::{Distribution, Simulator};
use fused_moe::{
    Call, DType, ErrorKind, ExecCx, ExpertOut, ExpertPlacement, ExpertWeights, ExpertsProvider, Fault,
    Fp8Format, FusedMoEKernel, ModularKernel, MoeConfig, Overlap, PrepareInput, ProcessGroup, QuantScheme,
    Rank, Registry, RouterWeight, Selection, Stream, TensorView, TensorViewMut, TopK, Workspace,
};
use moe_conformance::oracle::{InputScales, Layer, RankTokens};
use moe_conformance::{Case, LayerWeights, RankInput, Rounding, Seed};
use rstest::rstest;

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const RANKS: usize = 4;
const SLOTS_PER_RANK: usize = 3;
const SLOTS: usize = RANKS * SLOTS_PER_RANK;
/// Of the router.
const EXPERTS: usize = 8;
const TOKENS: usize = 96;

/// One layer whose busiest experts have replicas, and rounds of skewed tokens for it.
struct Fixture {
    registry: Registry,
    comm: &'static str,
    case: Case,
    config: MoeConfig,
    weights: LayerWeights,
    rounds: Vec<Vec<RankInput>>,
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
        let skewed = Distribution::Zipf { exponent: 1.2 };
        // Always the same draw: how even its load can become is a matter of the experts it names.
        let mut simulator = Simulator::new(skewed, EXPERTS, case.top_k, 7).unwrap();
        let rounds = (0..3).map(|round| {
            let mut inputs = case.inputs(round);
            for input in &mut inputs {
                input.ids = simulator.draw(input.num_tokens).ids;
                // Some slots have no expert.
                input.ids.iter_mut().step_by(13).for_each(|id| *id = -1);
            }
            inputs
        });
        let rounds = rounds.collect();
        Self { registry: fused_moe::default_backends(), comm, weights: case.weights(), case, config, rounds }
    }

    /// Whether the outputs of all ranks under `table` are those of the layer without replicas.
    ///
    /// The two differ in whose partial sum a token is in, and with it in what is rounded on the way: the bound is that of
    /// the layer over slots, whose exact values are those of the layer without replicas.
    fn check(&self, round: usize, table: &ReplicaTable, outputs: &[&[f32]]) -> Outcome<()> {
        let logical = self.weights.matrices();
        let (slots, top_k) = (table.physical_to_logical(), self.config.top_k);
        let slots: Vec<_> = slots.iter().map(|&expert| logical[expert as usize]).collect();
        let plain: Vec<_> = self.rounds[round].iter().map(RankInput::tokens).collect();
        let mut ids: Vec<_> = plain.iter().map(|tokens| tokens.ids.to_vec()).collect();
        ids.iter_mut().try_for_each(|ids| table.map_in_place(top_k, ids))?;
        let placed: Vec<_> =
            plain.iter().zip(&ids).map(|(tokens, ids)| RankTokens { ids, ..*tokens }).collect();
        let without = Layer {
            shape: self.case.shape(),
            quant: self.case.quant,
            activation: self.case.activation,
            padding: self.case.padding,
            router_weight: RouterWeight::OnOutput,
            input_scales: InputScales::OfSource,
            experts: &logical,
            placement: &self.case.placement,
            ranks: &plain,
        };
        let with = Layer { experts: &slots, placement: &self.config.placement, ranks: &placed, ..without };
        let selection = Selection { comm: Some(self.comm), experts: None };
        let survey = self.registry.survey(&self.config, selection)?;
        let rounding = Rounding::of_plan(&survey.fitting[0], DType::F32);
        let expected = with.expected(rounding)?;
        let far = |(a, b): (&f64, &f64)| (a - b).abs() > 1e-9 * a.abs().max(1e-3);
        let exact = without.run()?.concat();
        assert!(!exact.iter().zip(&expected.exact).any(far), "replicas change the layer");
        expected.check(&outputs.concat(), self.case.hidden)?;
        Ok(())
    }

    /// Runs `body` on every rank with its kernel and the layer as it starts, without any order in its experts.
    fn on_ranks<T: Send>(
        &self,
        body: impl Fn(&mut Engine<'_>, &mut BalancedLayer) -> Outcome<T> + Sync,
    ) -> Outcome<Vec<T>> {
        let ranks = run_ranks(RANKS, ThreadOptions::default(), |group| {
            let selection = Selection { comm: Some(self.comm), experts: None };
            let FusedMoEKernel::Modular(kernel) = self.registry.build(&self.config, selection, &group)?
            else {
                return Err("not modular".into());
            };
            let shape = LoadShape { layers: 1, physical: SLOTS, window: 4 };
            let recorder = LoadRecorder::new(shape)?;
            let table = ReplicaTable::identity(EXPERTS, SLOTS - EXPERTS)?;
            let placed = self.pack(&kernel, group.rank(), table)?;
            let mut layer = BalancedLayer::new(5, placed, &self.config, group.rank()).map_err(|e| e.error)?;
            body(&mut Engine { fixture: self, group, kernel, recorder }, &mut layer)
        })?;
        ranks.into_iter().collect()
    }

    /// The weights of the slots of `rank` under `table`.
    fn pack(&self, kernel: &ModularKernel, rank: Rank, table: ReplicaTable) -> Outcome<PlacedWeights> {
        let provider: &dyn ExpertsProvider = &**self.registry.experts(kernel.plan().experts())?;
        let logical = self.weights.matrices();
        let slots = self.config.placement.experts_of(rank).map(|slot| slot.0 as usize);
        let mine: Vec<_> = slots.map(|slot| logical[table.physical_to_logical()[slot] as usize]).collect();
        let weights = provider.pack(&self.config, rank, &mine)?;
        Ok(PlacedWeights { table, weights })
    }
}

/// What one rank of an engine holds.
struct Engine<'f> {
    fixture: &'f Fixture,
    group: Endpoint,
    kernel: ModularKernel,
    recorder: LoadRecorder,
}

impl<'f> Engine<'f> {
    /// Routes the tokens of `round` through `table` and runs them with `weights`.
    fn call(&mut self, round: usize, table: &ReplicaTable, weights: &ExpertWeights) -> Outcome<Vec<f32>> {
        let input = &self.fixture.rounds[round][self.group.rank().index()];
        let (tokens, config) = (input.num_tokens, &self.fixture.config);
        let mut ids = vec![i32::MIN; input.ids.len()];
        table.map(config.top_k, &input.ids, &mut ids)?;
        self.recorder.record(0, &ids)?;
        self.recorder.end_step();
        let mut out = vec![f32::NAN; tokens * config.hidden];
        self.kernel.apply(Call {
            stream: Stream::Host,
            weights,
            hidden: TensorView::from_slice(&input.hidden, DType::Bf16, &[tokens, config.hidden])?,
            routing: TopK {
                ids: TensorView::from_slice(&ids, DType::I32, &[tokens, config.top_k])?,
                weights: TensorView::from_slice(&input.weights, DType::F32, &[tokens, config.top_k])?,
            },
            overlap: Overlap::default(),
            out: TensorViewMut::from_slice(&mut out, DType::F32, &[tokens, config.hidden])?,
        })?;
        Ok(out)
    }

    fn pack(&self, table: ReplicaTable) -> Outcome<PlacedWeights> {
        self.fixture.pack(&self.kernel, self.group.rank(), table)
    }

    /// What all ranks have recorded, by slot.
    fn load(&self) -> Outcome<Vec<u64>> {
        Ok(sum_over_ranks(&self.group, &self.recorder.load(0))?)
    }

    /// Why a rebalance to `next` is refused. What was to be put in use comes back.
    fn refused(&mut self, layer: &mut BalancedLayer, next: PlacedWeights) -> RebalanceError {
        let (table, bytes) = (next.table.clone(), next.weights.bytes());
        let before = (layer.table().clone(), layer.generation());
        let refused = layer.rebalance(next, &mut [&mut self.kernel], &self.group).unwrap_err();
        assert_eq!((&refused.next.table, refused.next.weights.bytes()), (&table, bytes));
        assert_eq!((layer.table(), layer.generation()), (&before.0, before.1));
        refused.error
    }

    /// Drives a call by hand to the point where its combine is sent, and on to its end if `finish`; what is left of
    /// it is for the next call to settle. Experts do not run: the call fails on every rank, which is no matter here.
    fn stop_in_combine(&mut self, layer: &BalancedLayer, finish: bool) -> Outcome<()> {
        let mut workspace = Workspace::new(self.fixture.config.device, 0)?;
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let (ids, input) = self.routed(layer)?;
        let input = prepare_input(input, &ids, layer)?;
        let comm = self.kernel.prepare_finalize();
        let (_, routed) = comm.prepare(&mut cx.reborrow(), input)?;
        let sent = comm.finalize_send(&mut cx.reborrow(), routed, ExpertOut::Failed(Fault::ExpertsFailed))?;
        if finish {
            let out = TensorViewMut::from_slice::<f32>(&mut [], DType::F32, &[0, 0])?;
            let error = comm.finalize_recv(&mut cx, sent, out).unwrap_err();
            assert!(matches!(error.kind, ErrorKind::RankFailed { .. }), "{error}");
        }
        Ok(())
    }

    /// Sends the tokens of the first round and loses the ticket.
    fn abandon_call(&mut self, layer: &BalancedLayer) -> Outcome<()> {
        let mut workspace = Workspace::new(self.fixture.config.device, 0)?;
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let (ids, input) = self.routed(layer)?;
        let input = prepare_input(input, &ids, layer)?;
        drop(self.kernel.prepare_finalize().prepare_send(&mut cx, input)?);
        Ok(())
    }

    fn routed(&self, layer: &BalancedLayer) -> Outcome<(Vec<i32>, &'f RankInput)> {
        let input = &self.fixture.rounds[0][self.group.rank().index()];
        let mut ids = input.ids.clone();
        layer.table().map_in_place(self.fixture.config.top_k, &mut ids)?;
        Ok((ids, input))
    }
}

fn prepare_input<'a>(
    input: &'a RankInput,
    ids: &'a [i32],
    layer: &'a BalancedLayer,
) -> Outcome<PrepareInput<'a>> {
    let (tokens, top_k) = (input.num_tokens, ids.len() / input.num_tokens);
    let hidden = [tokens, input.hidden.len() / tokens];
    Ok(PrepareInput {
        hidden: TensorView::from_slice(&input.hidden, DType::Bf16, &hidden)?,
        topk: TopK {
            ids: TensorView::from_slice(ids, DType::I32, &[tokens, top_k])?,
            weights: TensorView::from_slice(&input.weights, DType::F32, &[tokens, top_k])?,
        },
        input_scale: layer.weights().input_scale(),
        fault: None,
    })
}

fn demand(load: &[u64]) -> Demand<'_> {
    let strategy = Strategy::Greedy;
    Demand {
        load,
        ranks: RANKS,
        slots_per_rank: SLOTS_PER_RANK,
        nodes: 1,
        groups: 1,
        strategy,
        current: None,
    }
}

/// What one rank has seen.
struct Observed {
    outputs: [Vec<f32>; 3],
    mixed: Vec<f32>,
    loads: [Vec<u64>; 2],
    tables: [ReplicaTable; 2],
}

#[rstest]
fn a_rebalance_between_two_calls_changes_the_load_and_not_the_outputs(
    #[values("mori_high_throughput", "allgather_reducescatter", "naive", "batched")] comm: &'static str,
    #[values(QuantScheme::Unquantized, QuantScheme::Fp8Block(Fp8Format::E4M3Fn))] quant: QuantScheme,
) -> Outcome<()> {
    let fixture = Fixture::new(comm, quant);
    let ranks = fixture.on_ranks(|engine, layer| {
        let first = engine.call(0, layer.table(), layer.weights())?;
        let before = engine.load()?;

        // Every rank proposes the same, from what all have recorded, and packs while the old weights serve.
        let load = layer.table().logical_load(&before);
        let proposal = propose(&Demand { current: Some(layer.table()), ..demand(&load) })?;
        let next = engine.pack(proposal.table)?;
        let changed: HashSet<usize> = layer.table().changed_slots(&next.table).collect();
        assert!(!changed.is_empty(), "nothing to move");
        let between = engine.call(1, layer.table(), layer.weights())?;
        engine.recorder.clear(0);

        let old = layer.rebalance(next, &mut [&mut engine.kernel], &engine.group).map_err(|e| e.error)?;
        assert_eq!(old.table, ReplicaTable::identity(EXPERTS, SLOTS - EXPERTS)?);
        assert_eq!((layer.layer(), layer.generation()), (5, 1));
        let second = engine.call(2, layer.table(), layer.weights())?;
        let after = engine.load()?;
        let again = engine.call(2, layer.table(), layer.weights())?;
        assert!(second.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()), "equal bits");
        // What the old weights give with the new table: a check that cannot fail shows nothing.
        let mixed = engine.call(2, layer.table(), &old.weights)?;
        let outputs = [first, between, second];
        Ok(Observed { outputs, mixed, loads: [before, after], tables: [old.table, layer.table().clone()] })
    })?;
    let [old, new] = &ranks[0].tables;
    for (round, table) in [old, old, new].into_iter().enumerate() {
        let outputs: Vec<&[f32]> = ranks.iter().map(|rank| &rank.outputs[round][..]).collect();
        fixture.check(round, table, &outputs).map_err(|e| format!("{comm}, round {round}: {e}"))?;
    }
    let mixed: Vec<&[f32]> = ranks.iter().map(|rank| &rank.mixed[..]).collect();
    assert!(fixture.check(2, new, &mixed).is_err(), "weights of another table pass");

    let [before, after] = &ranks[0].loads;
    let pairs: u64 = before.iter().sum();
    let named = fixture.rounds[0].iter().flat_map(|input| &input.ids).filter(|&&id| id != -1).count();
    assert_eq!(pairs, named as u64, "every pair is counted once");
    let balance = |load| Balance::measured(load, &fixture.config.placement).max_over_mean();
    let (before, after) = (balance(before), balance(after));
    println!("max/mean {before:.3} before, {after:.3} after");
    assert!(after < before && after < 1.25, "max/mean {before} before, {after} after");
    Ok(())
}

#[rstest]
fn a_rebalance_that_ranks_do_not_agree_on_changes_nothing(
    #[values("mori_high_throughput", "allgather_reducescatter", "naive", "batched")] comm: &'static str,
) -> Outcome<()> {
    let fixture = Fixture::new(comm, QuantScheme::Unquantized);
    let outputs = fixture.on_ranks(|engine, layer| {
        let rank = engine.group.rank();
        let other = ReplicaTable::new(EXPERTS, vec![7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0])?;

        // One rank brings another table.
        let mut slots = other.physical_to_logical().to_vec();
        if rank == Rank(1) {
            slots.swap(0, 11);
        }
        let next = engine.pack(ReplicaTable::new(EXPERTS, slots)?)?;
        let error = engine.refused(layer, next);
        let RebalanceError::Mismatch(mismatch) = &error else { panic!("{error}") };
        assert_eq!(mismatch.field, "physical_to_logical");
        assert_eq!(mismatch.rank, if rank == Rank(1) { Rank(0) } else { Rank(1) });

        // One rank brings weights that its kernel cannot run, another one a table of another size.
        let mut next = engine.pack(other.clone())?;
        if rank == Rank(2) {
            next.weights = ExpertWeights::new("other", (), 0);
        }
        if rank == Rank(3) {
            next.table = ReplicaTable::identity(EXPERTS, 0)?;
        }
        let error = engine.refused(layer, next).to_string();
        assert!(
            error.starts_with("rank 2 cannot change the layer: the weights were packed by other"),
            "{error}"
        );

        // One rank has brought its call to an end, the others not.
        engine.stop_in_combine(layer, rank == Rank(0))?;
        let next = engine.pack(other.clone())?;
        let error = engine.refused(layer, next);
        assert!(matches!(error, RebalanceError::InFlight { rank: Rank(1), round: 1 }), "{error}");

        // Nobody has.
        engine.abandon_call(layer)?;
        let next = engine.pack(other.clone())?;
        let error = engine.refused(layer, next);
        assert!(matches!(error, RebalanceError::InFlight { rank: Rank(0), round: 2 }), "{error}");

        // The group goes on as if nothing had happened, and can still be rebalanced.
        let before = engine.call(0, layer.table(), layer.weights())?;
        let next = engine.pack(other)?;
        let old = layer.rebalance(next, &mut [&mut engine.kernel], &engine.group).map_err(|e| e.error)?;
        let after = engine.call(1, layer.table(), layer.weights())?;
        Ok([(before, old.table), (after, layer.table().clone())])
    })?;
    for round in 0..2 {
        let table = &outputs[0][round].1;
        let outputs: Vec<&[f32]> = outputs.iter().map(|rounds| &rounds[round].0[..]).collect();
        fixture.check(round, table, &outputs).map_err(|e| format!("{comm}, round {round}: {e}"))?;
    }
    Ok(())
}

#[test]
fn two_layers_are_not_rebalanced_as_one() -> Outcome<()> {
    let fixture = Fixture::new("mori_high_throughput", QuantScheme::Unquantized);
    fixture.on_ranks(|engine, layer| {
        let rank = engine.group.rank();
        let table = ReplicaTable::identity(EXPERTS, SLOTS - EXPERTS)?;
        let placed = engine.pack(table.clone())?;
        let mut other = BalancedLayer::new(6, placed, &fixture.config, rank).map_err(|e| e.error)?;
        let next = engine.pack(table)?;
        let error = engine.refused(if rank == Rank(3) { &mut other } else { layer }, next);
        let RebalanceError::Mismatch(mismatch) = &error else { panic!("{error}") };
        assert_eq!((&*mismatch.field, mismatch.rank), ("layer", Rank(if rank == Rank(3) { 0 } else { 3 })));
        Ok(())
    })?;
    Ok(())
}

#[test]
fn a_layer_starts_with_the_experts_of_its_configuration() -> Outcome<()> {
    let fixture = Fixture::new("mori_high_throughput", QuantScheme::Unquantized);
    let placed = PlacedWeights {
        table: ReplicaTable::identity(EXPERTS, 1)?,
        weights: ExpertWeights::new("aiter", (), 0),
    };
    let refused = BalancedLayer::new(0, placed, &fixture.config, Rank(2)).unwrap_err();
    assert_eq!(
        refused.error.to_string(),
        "rank 2 cannot change the layer: the table is of 8 experts in 9 slots, the layer has 8 in 12"
    );
    Ok(())
}
