//! One rank of the tests that need MPI. `cargo xtask mpi-test` starts this program under `mpirun`; alone it is a job of
//! one rank.
//!
//! All ranks run the same tests in the same order, and rank 0 prints. The argument says which:
//!
//! - `transport`: puts, signals, collectives, traffic
//! - `bits`: layers give the bits that they give over threads, for the same nodes
//! - `conformance [FLOOR]`: the comm suite on every backend; at least FLOOR cases pass over all of them
//! - `lose HOW [PHASE]`: a rank falls silent, is stopped or is killed, among plain rows or in a phase of a layer; the
//!   job must be aborted

mod bits;
#[path = "../regressions/common.rs"]
#[expect(dead_code, reason = "the regressions use the rest")]
mod common;
mod conformance;
mod lose;
mod transport;

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use ep_transport::{Endpoint, MpiOptions, MpiWorld, Transport};
use moe_conformance::{GroupSpec, Launcher, Outcome, Seed, Spmd};
use rand::SeedableRng;
use rand_pcg::Pcg64;

/// Deadline of what the whole job does together: beyond any single case.
const PATIENCE: Duration = Duration::from_secs(180);

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The launcher of this job: in a static, as the suite wants it, and gone when MPI ends.
static LAUNCHER: OverMpi = OverMpi(RwLock::new(None));

#[derive(Debug)]
struct OverMpi(RwLock<Option<Box<dyn Launcher>>>);

impl Launcher for OverMpi {
    fn launch(
        &self,
        spec: GroupSpec,
        body: &(dyn Fn(Endpoint) -> Vec<u8> + Sync),
    ) -> Result<Vec<Vec<u8>>, Outcome> {
        let launcher = self.0.read().expect("no one panics with the lock");
        launcher.as_ref().expect("MPI has not ended").launch(spec, body)
    }

    fn refusal(&self, spec: GroupSpec) -> Option<Outcome> {
        self.0.read().expect("no one panics with the lock").as_ref()?.refusal(spec)
    }

    fn is_judge(&self) -> bool {
        self.0
            .read()
            .expect("no one panics with the lock")
            .as_ref()
            .is_some_and(|launcher| launcher.is_judge())
    }

    fn is_one_process(&self) -> bool {
        false
    }
}

/// This rank, and what all tests need.
struct Job {
    world: Arc<MpiWorld>,
    /// All ranks of the job.
    everyone: Endpoint,
    launcher: &'static dyn Launcher,
    /// The same on all ranks.
    seed: Seed,
}

impl Job {
    fn join() -> ep_transport::Result<Self> {
        let world = Arc::new(MpiWorld::init(PATIENCE)?);
        let single = NonZeroUsize::new(1);
        let options = MpiOptions { ranks_per_node: single, timeout: PATIENCE, ..MpiOptions::default() };
        let everyone = world.group(options)?.expect("the group is the whole job");
        let drawn = everyone.all_gather(&Seed::fresh().0.to_le_bytes(), everyone.deadline())?;
        let seed = Seed(u64::from_le_bytes(drawn[0].as_slice().try_into().expect("8 bytes were sent")));
        let everyone = Endpoint::new(everyone);
        let split = {
            let world = Arc::clone(&world);
            move |spec| Ok(group(&world, spec)?.map(Endpoint::new))
        };
        let launcher: Box<dyn Launcher> = Box::new(Spmd::new(everyone.clone(), split));
        *LAUNCHER.0.write().expect("no one panics with the lock") = Some(launcher);
        Ok(Self { world, everyone, launcher: &LAUNCHER, seed })
    }

    fn is_first(&self) -> bool {
        self.world.rank() == 0
    }

    /// Random numbers that are the same on all ranks.
    fn random(&self, stream: u64) -> Pcg64 {
        Pcg64::seed_from_u64(self.seed.derive(stream).0)
    }

    /// Prints on one rank.
    fn say(&self, text: impl std::fmt::Display) {
        if self.is_first() {
            println!("{text}");
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        *LAUNCHER.0.write().expect("no one panics with the lock") = None;
    }
}

fn group(world: &MpiWorld, spec: GroupSpec) -> ep_transport::Result<Option<Arc<dyn Transport>>> {
    let GroupSpec { ranks, ranks_per_node, timeout } = spec;
    let [ranks, ranks_per_node] = [ranks, ranks_per_node].map(NonZeroUsize::new);
    Ok(world.group(MpiOptions { ranks, ranks_per_node, timeout })?.map(|rank| rank as _))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let job = match Job::join() {
        Ok(job) => job,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    job.say(format_args!(
        "{} ranks on machines of {:?}, seed {}",
        job.world.size(),
        job.world.ranks_per_host(),
        job.seed
    ));
    let outcome = match *arguments {
        [] => transport::run(&job).and_then(|()| bits::run(&job)),
        ["transport"] => transport::run(&job),
        ["bits"] => bits::run(&job),
        ["conformance"] => conformance::run(&job, 0),
        ["conformance", floor] => {
            floor.parse().map_err(Failure::from).and_then(|n| conformance::run(&job, n))
        }
        ["lose", how] => lose::run(&job, how),
        ["lose", how, phase] => lose::in_layer(&job, how, phase),
        _ => Err(format!("unknown arguments {arguments:?}").into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A rank that fails alone has left the others waiting; the end of this process ends the job.
            eprintln!("rank {}: {error}", job.world.rank());
            std::process::exit(1)
        }
    }
}
