//! A rank is killed in a phase of a layer call: the others name it, go on without it, and are right.

use std::num::NonZeroUsize;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use ep_transport::{Deadline, Endpoint, ProcessOptions, Rendezvous, Token, join_processes, transport_of};
use fused_moe::{
    Call, DType, Error, ErrorKind, ExpertWeights, FusedMoEKernel, Overlap, ProcessGroup, QuantScheme, Rank,
    Registry, Selection, Stream, TensorView, TensorViewMut, TopK,
};
use libtest_mimic::Failed;
use moe_conformance::{Case, Outcome, RankInput, Seed, Settings, Spmd, layer};

/// Ranks of a group, and the one of them that is killed.
const RANKS: usize = 4;
const VICTIM: Rank = Rank(2);

/// Where the victim is killed: before it dispatches, while its tokens travel, while the results do.
pub const PHASES: [&str; 3] = ["between", "in_dispatch", "in_combine"];

/// Why a view of a case's tensors cannot fail.
const FITS: &str = "a case's tensors have its shape";

/// Rounds before that.
const GOOD_ROUNDS: usize = 2;

/// Starts the ranks; the victim must be killed, the others end well.
pub fn killed(backend: &str, phase: &str, ranks_per_node: usize) -> Result<(), Failed> {
    let token = Token::random()?;
    let nodes = NonZeroUsize::new(ranks_per_node);
    let rendezvous = Rendezvous::bind(([127, 0, 0, 1], 0).into(), RANKS, nodes, token)?;
    let seed = Seed::fresh();
    println!("{backend} {phase}: seed {seed}");
    let start = |rank: usize| {
        let options = ProcessOptions {
            rank: Rank(rank as u32),
            world_size: RANKS,
            ranks_per_node: nodes,
            rendezvous: rendezvous.address(),
            token,
            timeout: Duration::from_secs(30),
        };
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["survivor", backend, phase, &seed.0.to_string()]).envs(options.to_vars()).spawn()
    };
    let mut ranks = (0..RANKS).map(start).collect::<std::io::Result<Vec<_>>>()?;
    rendezvous.serve(Deadline::after(Duration::from_secs(60)))?;
    for (rank, process) in ranks.iter_mut().enumerate() {
        let status = process.wait()?;
        let as_wanted = match Rank(rank as u32) {
            VICTIM => status.signal() == Some(9),
            _ => status.success(),
        };
        if !as_wanted {
            return Err(format!("rank {rank} ends with {status}").into());
        }
    }
    Ok(())
}

/// One rank of the above.
pub fn be_a_rank(args: &[String]) -> ExitCode {
    let [backend, phase, seed] = args else { panic!("wrong arguments {args:?}") };
    let options = ProcessOptions::from_vars(|name| std::env::var(name).ok());
    let joined = join_processes(&options.expect("readable").expect("a rank")).expect("the ranks meet");
    let seed = Seed(seed.parse().expect("a seed"));
    let registry = fused_moe::default_backends();
    let selection = Selection { comm: Some(backend), experts: None };
    let group = Endpoint::new(joined);
    let case = case_of(RANKS, group.transport().ranks_per_node(), seed);
    let mut rank = RankRun::new(&registry, &case, selection, &group);

    let mut lost = None;
    for round in 0..GOOD_ROUNDS + 3 {
        let dies = (group.rank() == VICTIM && round == GOOD_ROUNDS).then_some(phase.as_str());
        if let Err(error) = rank.round(&case, dies) {
            lost = Some((round, error));
            break;
        }
    }
    let (round, error) = lost.expect("a round fails once a rank is killed");
    assert!(round >= GOOD_ROUNDS, "round {round}: {error}");
    assert!(matches!(error.kind, ErrorKind::PeerLost { rank: VICTIM, .. }), "round {round}: {error}");

    let transport = transport_of(&group).expect("an endpoint has a transport");
    let shrunk = transport.shrink(transport.deadline()).expect("three ranks are left");
    assert_eq!(shrunk.survivors, [Rank(0), Rank(1), Rank(3)]);
    let per_node = shrunk.transport.ranks_per_node();
    let left = Endpoint::new(shrunk.transport);
    let world = left.clone();
    let launcher = Spmd::new(world, move |_| Ok(Some(left.clone())));
    let settings = Settings::default().with_seed(seed).with_launcher(Box::leak(Box::new(launcher)));
    let case = case_of(RANKS - 1, per_node, seed.derive(1));
    assert_eq!(layer::run(&registry, &case, selection, settings), Outcome::Pass);
    ExitCode::SUCCESS
}

/// A case of `ranks` on nodes of `ranks_per_node`.
fn case_of(ranks: usize, ranks_per_node: usize, seed: Seed) -> Case {
    Case { nodes: ranks / ranks_per_node, ..Case::small(QuantScheme::Unquantized, ranks, seed) }
}

/// One rank's end of a layer.
struct RankRun {
    kernel: FusedMoEKernel,
    weights: ExpertWeights,
    input: RankInput,
}

impl RankRun {
    fn new(registry: &Registry, case: &Case, selection: Selection<'_>, group: &Endpoint) -> Self {
        let config = case.config();
        let kernel = registry.build(&config, selection, group).expect("the backend takes the case");
        let all = case.weights();
        let matrices = all.matrices();
        let mine: Vec<_> =
            config.placement.experts_of(group.rank()).map(|id| matrices[id.0 as usize]).collect();
        let experts = registry.experts(kernel.plan().experts()).expect("the plan's experts are registered");
        let weights = experts.pack(&config, group.rank(), &mine).expect("weights that fit");
        Self { kernel, weights, input: case.inputs(0).swap_remove(group.rank().index()) }
    }

    /// One round, in which this rank dies in the phase `dies`.
    fn round(&mut self, case: &Case, dies: Option<&str>) -> Result<(), Error> {
        let (tokens, input) = (self.input.num_tokens, &self.input);
        let mut out = vec![f32::NAN; tokens * case.hidden];
        let mut in_dispatch = |_| {
            die_if(dies == Some("in_dispatch"));
            Ok(())
        };
        let mut in_combine = |_| {
            die_if(dies == Some("in_combine"));
            Ok(())
        };
        die_if(dies == Some("between"));
        let FusedMoEKernel::Modular(kernel) = &mut self.kernel else { panic!("the first pair is modular") };
        kernel.apply(Call {
            stream: Stream::Host,
            weights: &self.weights,
            hidden: TensorView::from_slice(&input.hidden, DType::Bf16, &[tokens, case.hidden]).expect(FITS),
            routing: TopK {
                ids: TensorView::from_slice(&input.ids, DType::I32, &[tokens, case.top_k]).expect(FITS),
                weights: TensorView::from_slice(&input.weights, DType::F32, &[tokens, case.top_k])
                    .expect(FITS),
            },
            overlap: Overlap { dispatch: Some(&mut in_dispatch), combine: Some(&mut in_combine) },
            out: TensorViewMut::from_slice(&mut out, DType::F32, &[tokens, case.hidden]).expect(FITS),
        })?;
        assert!(out.iter().all(|x| x.is_finite()));
        Ok(())
    }
}

fn die_if(now: bool) {
    if now {
        let me = std::process::id().to_string();
        let killed = Command::new("kill").args(["-KILL", &me]).status();
        panic!("still alive after {killed:?}");
    }
}
