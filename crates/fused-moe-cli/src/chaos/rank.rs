//! A rank of `fmoe chaos`: a process that does as it is told and says what came of it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use fused_moe::router::eplb::ReplicaTable;
use fused_moe::router::survivors::{LostExpertPolicy, SurvivingExperts, SurvivorMapError, Survivors};
use fused_moe::transport::{Endpoint, ProcessOptions, join_processes};
use fused_moe::{
    Call, DType, Error, ErrorKind, ExpertPlacement, ExpertWeights, FusedMoEKernel, ModularKernel, MoeConfig,
    Overlap, QuantScheme, Rank, Registry, RouterWeight, Selection, Stage, Stream, TensorView, TensorViewMut,
    TopK,
};
use moe_conformance::oracle::{InputScales, Layer, RankTokens};
use moe_conformance::{Case, LayerWeights, Rounding, Seed};

use super::args::{ChaosRankArgs, Sabotage};
use super::messages::{Held, Join, LayerCall, Order, Outcome, Phase, Word};
use crate::exit::{Failure, OrFailure};

/// Tokens of a rank in the first call, and more than in the others.
const TOKENS: usize = 24;

/// The layer of a run: what every process of it makes from the seed.
pub struct Plot {
    /// Over logical experts.
    case: Case,
    /// Over slots and all seats.
    pub config: MoeConfig,
    /// Experts and replicas.
    pub table: ReplicaTable,
}

impl Plot {
    pub fn new(seed: u64, seats: usize) -> anyhow::Result<Self> {
        let case =
            Case { tokens: vec![TOKENS; seats], ..Case::small(QuantScheme::Unquantized, seats, Seed(seed)) };
        let redundant_experts = case.num_experts / 2;
        let table = ReplicaTable::identity(case.num_experts, redundant_experts)?;
        let placement = ExpertPlacement::linear(table.num_physical(), seats)?;
        let config = MoeConfig { redundant_experts, routing: None, placement, ..case.config() };
        Ok(Self { case, config, table })
    }

    /// The layer when only `members`, seats in the order of ranks, take part.
    pub fn over(&self, members: &[u32]) -> anyhow::Result<SurvivingExperts> {
        let ranks: Vec<Rank> = members.iter().copied().map(Rank).collect();
        let survivors = Survivors { ranks: &ranks, ranks_per_node: ranks.len() };
        Ok(SurvivingExperts::new(&self.config, &self.table, survivors)?)
    }
}

/// Runs the command.
pub fn run(args: &ChaosRankArgs) -> Result<(), Failure> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).or_failed()?;
    // There are as many processes as ranks.
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().or_failed()?;
    let plot = Plot::new(args.seed, args.seats).or_failed()?;
    let weights = plot.case.weights();
    let registry = fused_moe::default_backends();
    let packed = RefCell::default();
    let mut actor = Actor {
        plot,
        weights,
        registry,
        seat: Rank(args.seat),
        packed,
        sabotage: args.sabotage,
        kept: Vec::new(),
    };
    let mut joined: Option<Joined> = None;
    loop {
        let Some(order) = hear().or_failed()? else { return Ok(()) };
        match order {
            Order::Join(join) => match actor.join(&join) {
                Ok(group) => {
                    joined = Some(group);
                    say(&Word::Joined).or_failed()?;
                }
                Err(error) => say(&Word::Done(failed(&error))).or_failed()?,
            },
            Order::Call(call) => {
                let group = joined.as_mut().ok_or_else(|| anyhow!("a call without a group"));
                let outcome = group.and_then(|group| actor.call(group, &call));
                say(&Word::Done(outcome.unwrap_or_else(|error| failed(&error)))).or_failed()?;
            }
            Order::Leave => {
                joined = None;
                if actor.sabotage == Some(Sabotage::Leak) {
                    actor.kept.push(std::fs::File::open("/dev/null").or_failed()?);
                }
                say(&Word::Left(Held::now().or_failed()?)).or_failed()?;
            }
            Order::Go => {}
        }
    }
}

/// The next order; `None` if there will be no more.
fn hear() -> anyhow::Result<Option<Order>> {
    let mut line = String::new();
    match std::io::stdin().lock().read_line(&mut line)? {
        0 => Ok(None),
        _ => Ok(Some(serde_json::from_str(&line).context("an order")?)),
    }
}

fn say(word: &Word) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, word)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

fn failed(error: &anyhow::Error) -> Outcome {
    let kind = match error.downcast_ref::<Error>().map(|error| &error.kind) {
        Some(ErrorKind::PeerLost { .. }) => "PeerLost",
        Some(ErrorKind::RankFailed { .. }) => "RankFailed",
        Some(ErrorKind::Mismatch(_)) => "Mismatch",
        Some(ErrorKind::OutOfMemory { .. }) => "OutOfMemory",
        Some(ErrorKind::Contract) => "Contract",
        Some(ErrorKind::BadInput(_)) => "BadInput",
        Some(_) => "Other",
        None if error.downcast_ref::<fused_moe::transport::TransportError>().is_some() => "Transport",
        None => "Untyped",
    };
    Outcome::Error { kind: kind.into(), text: format!("{error:#}") }
}

/// One seat.
struct Actor {
    plot: Plot,
    weights: LayerWeights,
    registry: Registry,
    seat: Rank,
    /// This seat's weights by backend; packed once, whatever groups come and go.
    packed: RefCell<HashMap<&'static str, ExpertWeights>>,
    sabotage: Option<Sabotage>,
    kept: Vec<std::fs::File>,
}

/// Membership of a group. The kernel goes first.
struct Joined {
    kernel: ModularKernel,
    experts: SurvivingExperts,
    rank: Rank,
    _group: Endpoint,
}

impl Actor {
    fn join(&self, join: &Join) -> anyhow::Result<Joined> {
        let experts = self.plot.over(&join.members)?;
        let rank = experts.new_rank(self.seat).context("this seat is not in the group")?;
        let group = Endpoint::new(join_processes(&ProcessOptions {
            rank,
            world_size: join.members.len(),
            ranks_per_node: None,
            rendezvous: join.rendezvous,
            token: join.token.parse()?,
            timeout: Duration::from_millis(join.timeout_ms),
        })?);
        let selection = Selection { comm: Some(&join.all2all), experts: None };
        let FusedMoEKernel::Modular(kernel) = self.registry.build(experts.config(), selection, &group)?
        else {
            bail!("{} has got monolithic experts", join.all2all);
        };
        self.pack(kernel.plan().experts())?;
        Ok(Joined { kernel, experts, rank, _group: group })
    }

    fn pack(&self, backend: &'static str) -> anyhow::Result<()> {
        if self.packed.borrow().contains_key(backend) {
            return Ok(());
        }
        let Plot { config, table, .. } = &self.plot;
        let logical = self.weights.matrices();
        let slots = config.placement.experts_of(self.seat);
        let mine: Vec<_> =
            slots.map(|slot| logical[table.physical_to_logical()[slot.0 as usize] as usize]).collect();
        let weights = self.registry.experts(backend)?.pack(config, self.seat, &mine)?;
        self.packed.borrow_mut().insert(backend, weights);
        Ok(())
    }

    fn call(&self, joined: &mut Joined, call: &LayerCall) -> anyhow::Result<Outcome> {
        let policy = LostExpertPolicy::ALL.into_iter().find(|policy| policy.name() == call.policy);
        let policy = policy.with_context(|| format!("no policy {}", call.policy))?;
        let mut input = self.plot.case.inputs(call.number).swap_remove(self.seat.index());
        let (tokens, hidden, top_k) = (input.num_tokens, self.plot.case.hidden, self.plot.case.top_k);
        if call.wait == Some(Phase::Before) {
            wait()?;
        }
        match joined.experts.map(policy, top_k, &mut input.ids, &mut input.weights) {
            Ok(_) => {}
            Err(SurvivorMapError::Lost(lost)) => {
                return Err(joined.kernel.abstain(Stream::Host, lost.fault()).into());
            }
            Err(error) => return Err(error.into()),
        }
        let packed = self.packed.borrow();
        let weights = packed.get(joined.kernel.plan().experts()).context("the weights are not packed")?;
        let wait_at = |phase| {
            move |_: Stream| match call.wait == Some(phase) {
                true => wait().map_err(|error| Error::other(Stage::Experts, "chaos", error)),
                false => Ok(()),
            }
        };
        let (mut dispatch, mut combine) = (wait_at(Phase::Dispatch), wait_at(Phase::Combine));
        let mut out = vec![f32::NAN; tokens * hidden];
        joined.kernel.apply(Call {
            stream: Stream::Host,
            weights,
            hidden: TensorView::from_slice(&input.hidden, DType::Bf16, &[tokens, hidden])?,
            routing: TopK {
                ids: TensorView::from_slice(&input.ids, DType::I32, &[tokens, top_k])?,
                weights: TensorView::from_slice(&input.weights, DType::F32, &[tokens, top_k])?,
            },
            overlap: Overlap { dispatch: Some(&mut dispatch), combine: Some(&mut combine) },
            out: TensorViewMut::from_slice(&mut out, DType::F32, &[tokens, hidden])?,
        })?;
        match self.sabotage.filter(|_| call.number % 4 == 2) {
            Some(Sabotage::Wrong) => out[hidden + 1] += 1.0,
            Some(Sabotage::Hang) => loop {
                std::thread::park();
            },
            Some(Sabotage::Leak) | None => {}
        }
        Ok(match self.check(joined, input.tokens(), &out)? {
            None => Outcome::Right,
            Some(why) => Outcome::Wrong(why),
        })
    }

    /// What is wrong with the output of this rank's tokens; the others' do not matter to them.
    fn check(&self, joined: &Joined, mine: RankTokens<'_>, out: &[f32]) -> anyhow::Result<Option<String>> {
        let case = &self.plot.case;
        let logical = self.weights.matrices();
        let slots: Vec<_> =
            joined.experts.physical_to_logical().iter().map(|&e| logical[e as usize]).collect();
        let placement = &joined.experts.config().placement;
        let mut ranks = vec![RankTokens { hidden: &[], ids: &[], weights: &[] }; placement.ep_size()];
        ranks[joined.rank.index()] = mine;
        let layer = Layer {
            shape: case.shape(),
            quant: case.quant,
            activation: case.activation,
            padding: case.padding,
            router_weight: RouterWeight::OnOutput,
            input_scales: InputScales::OfSource,
            experts: &slots,
            placement,
            ranks: &ranks,
        };
        let expected = layer.expected(Rounding::of_plan(joined.kernel.plan(), DType::F32))?;
        Ok(expected.check(out, case.hidden).err().map(|far| far.to_string()))
    }
}

/// Says that this rank waits, and waits.
fn wait() -> anyhow::Result<()> {
    say(&Word::Waits)?;
    match hear()? {
        Some(Order::Go) => Ok(()),
        // The commander is gone, and so should this be.
        None => std::process::exit(0),
        Some(other) => bail!("waiting for a word to go on, got {other:?}"),
    }
}
