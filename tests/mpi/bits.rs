//! The same bits over MPI as over threads.

use std::time::Duration;

use ep_transport::Endpoint;
use fused_moe::{MoeConfig, Overlap, QuantScheme, default_backends};
use moe_conformance::{Case, GroupSpec, Launcher, Outcome, SCHEMES, Threads};

use crate::common::{PAIRS, Rank, pair};
use crate::{Failure, Job};

/// Every pair of backends, over every layout of nodes that the job has room for.
pub fn run(job: &Job) -> Result<(), Failure> {
    let quants = [QuantScheme::Unquantized, SCHEMES[1].1];
    let size = job.world.size();
    let layouts = (1..=size).flat_map(|ranks| (1..=ranks).map(move |node| (ranks, node)));
    let layouts =
        layouts.filter(|(ranks, node)| ranks.is_multiple_of(*node) && (*ranks == 2 || *ranks == size));
    let (mut compared, mut refused) = (0, 0);
    for (ranks, ranks_per_node) in layouts {
        for (names, quant) in PAIRS.into_iter().flat_map(|names| quants.map(|quant| (names, quant))) {
            let case = Case::small(quant, ranks, job.seed.derive(compared));
            let config = MoeConfig { ranks_per_node, ..case.config() };
            let selection = pair(names);
            let registry = default_backends();
            if registry.survey(&config, selection)?.fitting.is_empty() {
                refused += 1;
                continue;
            }
            let body = |group: Endpoint| {
                let layer = || -> Result<Vec<u8>, Failure> {
                    let weights = case.weights();
                    let mut rank = Rank::build(&registry, (&config, &weights), selection, &group)?;
                    let mut bytes = vec![1];
                    for round in 0..2 {
                        let out = rank.apply(&case.inputs(round)[rank.rank], Overlap::default())?;
                        bytes.extend(out.iter().flat_map(|x| x.to_bits().to_le_bytes()));
                    }
                    Ok(bytes)
                };
                layer().unwrap_or_else(|error| [&[0], error.to_string().as_bytes()].concat())
            };
            let spec = GroupSpec { ranks, ranks_per_node, timeout: Duration::from_secs(60) };
            let over_mpi = match job.launcher.launch(spec, &body) {
                Ok(outputs) => outputs,
                Err(Outcome::Refused(_)) => {
                    refused += 1;
                    continue;
                }
                Err(other) => return Err(other.to_string().into()),
            };
            let context = || format!("{names:?} {quant}, {ranks} ranks on nodes of {ranks_per_node}, {case}");
            if let Some(failed) = over_mpi.iter().find(|bytes| bytes[0] == 0) {
                return Err(format!("{}: {}", context(), String::from_utf8_lossy(&failed[1..])).into());
            }
            if job.is_first() {
                let over_threads = Threads.launch(spec, &body).map_err(|e| e.to_string())?;
                if over_mpi != over_threads {
                    return Err(format!("other bits than over threads: {}", context()).into());
                }
            }
            compared += 1;
        }
    }
    job.say(format_args!("bits: {compared} layers as over threads; {refused} cannot be had"));
    if compared == 0 { Err("nothing was compared".into()) } else { Ok(()) }
}
