//! Starting the ranks, and what they run.

use std::num::NonZeroUsize;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use crate::losses;
use ep_transport::{
    Deadline, Endpoint, ProcessOptions, Rendezvous, Result, Token, TransportError, join_processes,
};
use fused_moe::batched_comm::Batched;
use fused_moe::mori_comm::MoriBackend;
use fused_moe::naive_comm::{AllGatherReduceScatter, Naive};
use fused_moe::{ProcessGroup, Rank};
use libtest_mimic::{Arguments, Failed, Trial};
use moe_conformance::{GroupSpec, Outcome, Seed, Settings, Spmd, Suite};

/// Processes of a test: as many ranks as the largest case has.
const WORLD: usize = 8;

/// How long processes wait for each other between two cases. A case of one rank leaves seven waiting.
const BETWEEN_CASES: Duration = Duration::from_secs(300);

/// Backends, and how many of their cases pass at least: those that pass over threads, but for the four in which
/// ranks meet outside their group.
const BACKENDS: [(&str, usize); 5] = [
    ("mori_high_throughput", 127),
    ("mori_low_latency", 127),
    ("allgather_reducescatter", 122),
    ("naive", 122),
    ("batched", 113),
];

/// Runs the tests, or is a rank of one.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((first, rest)) if first == "rank" => return be_a_rank(rest),
        Some((first, rest)) if first == "survivor" => return losses::be_a_rank(rest),
        _ => {}
    }
    let suites =
        BACKENDS.map(|(backend, floor)| Trial::test(backend, move || over_processes(backend, floor)));
    let losses = BACKENDS.into_iter().flat_map(|(backend, _)| {
        // Over one node; where two take another kernel, over two as well.
        let nodes = if backend.starts_with("mori") { &[4, 2][..] } else { &[4] };
        let cases = nodes.iter().flat_map(|&per_node| losses::PHASES.map(|phase| (per_node, phase)));
        cases.map(move |(per_node, phase)| {
            let name = format!("{backend}_killed_{phase}_on_nodes_of_{per_node}");
            Trial::test(name, move || losses::killed(backend, phase, per_node))
        })
    });
    let trials: Vec<_> = suites.into_iter().chain(losses).collect();
    // One after the other: each has more processes than most machines have cores.
    let args = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&args, trials).exit_code()
}

/// Runs all cases of `backend` on all ranks.
fn over_processes(backend: &str, floor: usize) -> std::result::Result<(), Failed> {
    let token = Token::random()?;
    let rendezvous = Rendezvous::bind(([127, 0, 0, 1], 0).into(), WORLD, None, token)?;
    let program = std::env::current_exe()?;
    let common = [rendezvous.address().to_string(), token.to_string(), Seed::fresh().0.to_string()];
    let start = |rank: usize| {
        let mut command = Command::new(&program);
        command.args(["rank", backend, &floor.to_string(), &rank.to_string()]).args(&common);
        // All say the same; the first is enough.
        if rank > 0 {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        }
        command.spawn()
    };
    let mut ranks = (0..WORLD).map(start).collect::<std::io::Result<Vec<_>>>()?;
    let met = rendezvous.serve(Deadline::after(Duration::from_secs(60)));
    let ended = ranks.iter_mut().map(|rank| rank.wait()).collect::<std::io::Result<Vec<_>>>()?;
    met?;
    match ended.iter().position(|status| !status.success()) {
        None => Ok(()),
        Some(rank) => Err(format!("rank {rank} ends with {}", ended[rank]).into()),
    }
}

fn be_a_rank(args: &[String]) -> ExitCode {
    let [backend, floor, rank, address, token, seed] = args else { panic!("wrong arguments {args:?}") };
    let world = join_processes(&ProcessOptions {
        rank: Rank(rank.parse().expect("a rank")),
        world_size: WORLD,
        ranks_per_node: None,
        rendezvous: address.parse().expect("an address"),
        token: token.parse().expect("a token"),
        timeout: BETWEEN_CASES,
    });
    let world = Endpoint::new(world.expect("the ranks of a test meet"));
    let among = world.clone();
    let launcher = Spmd::new(world, move |spec| split(&among, spec));
    let settings = Settings::default()
        .with_seed(Seed(seed.parse().expect("a seed")))
        .with_launcher(Box::leak(Box::new(launcher)));
    let suite = match backend.as_str() {
        "mori_high_throughput" => Suite::comm(MoriBackend::HighThroughput),
        "mori_low_latency" => Suite::comm(MoriBackend::LowLatency),
        "allgather_reducescatter" => Suite::comm(AllGatherReduceScatter),
        "naive" => Suite::comm(Naive),
        "batched" => Suite::comm(Batched),
        other => panic!("no backend is called {other:?}"),
    };
    let suite = suite.with_settings(settings);
    let mut passed = 0;
    for case in suite.cases() {
        match suite.outcome(case) {
            Outcome::Fail(why) => {
                eprintln!("{case}: {why}");
                return ExitCode::FAILURE;
            }
            outcome => passed += usize::from(outcome.is_pass()),
        }
    }
    println!("{backend}: {passed} of {} cases pass", suite.cases().len());
    match passed >= floor.parse().expect("a floor") {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// A group of the first ranks of `world`, which meet anew for it.
fn split(world: &Endpoint, spec: GroupSpec) -> Result<Option<Endpoint>> {
    let rank = world.rank();
    let topology = TransportError::Topology { world_size: spec.ranks, ranks_per_node: spec.ranks_per_node };
    if spec.ranks > WORLD {
        return Err(topology);
    }
    let ranks_per_node = NonZeroUsize::new(spec.ranks_per_node);
    let transport = world.transport();
    let mut place = Vec::new();
    if rank == Rank(0) {
        let token = Token::random()?;
        let rendezvous = Rendezvous::bind(([127, 0, 0, 1], 0).into(), spec.ranks, ranks_per_node, token)?;
        place = format!("{} {token}", rendezvous.address()).into_bytes();
        let deadline = Deadline::after(spec.timeout);
        std::thread::spawn(move || rendezvous.serve(deadline));
    }
    let places = transport.all_gather(&place, transport.deadline())?;
    if rank.index() >= spec.ranks {
        return Ok(None);
    }
    let place = String::from_utf8_lossy(&places[0]);
    let (address, token) = place.split_once(' ').expect("rank 0 has said where");
    let joined = join_processes(&ProcessOptions {
        rank,
        world_size: spec.ranks,
        ranks_per_node,
        rendezvous: address.parse().expect("an address"),
        token: token.parse().expect("a token"),
        timeout: spec.timeout,
    })?;
    Ok(Some(Endpoint::new(joined)))
}
