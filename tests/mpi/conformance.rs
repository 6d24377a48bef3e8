//! The comm suite over MPI ranks.

use std::time::{Duration, Instant};

use batched_comm::Batched;
use moe_conformance::{Outcome, Settings, Suite};
use mori_comm::MoriBackend;
use naive_comm::{AllGatherReduceScatter, Naive};

use crate::{Failure, Job};

/// Deadline of a wait inside a case: ranks share cores.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs every case on every backend. What the job is too small for is refused with that reason.
pub fn run(job: &Job, floor: usize) -> Result<(), Failure> {
    let settings = Settings::default().with_seed(job.seed).with_timeout(TIMEOUT).with_launcher(job.launcher);
    let suites = [
        ("naive", Suite::comm(Naive)),
        ("allgather_reducescatter", Suite::comm(AllGatherReduceScatter)),
        ("mori_high_throughput", Suite::comm(MoriBackend::HighThroughput)),
        ("mori_low_latency", Suite::comm(MoriBackend::LowLatency)),
        ("batched", Suite::comm(Batched)),
    ];
    let (mut passed, mut failed) = (0, 0);
    for (name, suite) in suites {
        let (suite, start, before) = (suite.with_settings(settings), Instant::now(), passed);
        let mut slowest = (Duration::ZERO, "");
        for case in suite.cases() {
            let start = Instant::now();
            match suite.outcome(case) {
                Outcome::Pass => passed += 1,
                Outcome::Refused(_) => {}
                Outcome::Fail(why) => {
                    failed += 1;
                    job.say(format_args!("{name}::{case} failed: {why}"));
                }
            }
            slowest = slowest.max((start.elapsed(), case));
        }
        let (seconds, cases) = (start.elapsed().as_secs_f64(), suite.cases().len());
        let (longest, case) = (slowest.0.as_secs_f64(), slowest.1);
        job.say(format_args!(
            "{name}: {} of {cases} cases pass, {seconds:.1} s, the slowest is {case} with {longest:.1} s",
            passed - before
        ));
    }
    match failed {
        0 if passed >= floor => Ok(()),
        0 => Err(format!("{passed} cases pass, the floor is {floor}").into()),
        _ => Err(format!("{failed} cases failed").into()),
    }
}
