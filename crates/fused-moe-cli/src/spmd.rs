//! A run by ranks that each load their own share of the layer: they agree on whether to start, and rank 0 gets what
//! all of them made.

use anyhow::{Context, anyhow};
use fused_moe::transport::{Endpoint, TransportError};

use crate::ep::{self, LayerRun};
use crate::exit::Failure;
use crate::part;

/// Lets all ranks go on with what they `loaded`, or none: the failure of the lowest rank that has one is that of all.
pub fn agree<T>(group: &Endpoint, loaded: Result<T, Failure>) -> Result<T, Failure> {
    let mine = match &loaded {
        Ok(_) => Vec::new(),
        Err(failure) => {
            let reason = failure.reason().map(|error| format!("{error:#}")).unwrap_or_default();
            [&[failure.code()], reason.as_bytes()].concat()
        }
    };
    let all = gather(group, &mine).map_err(|error| Failure::Failed(error.into()))?;
    let first = all.iter().enumerate().find_map(|(rank, told)| Some((rank, told.split_first()?)));
    match (first, loaded) {
        (None, loaded) => loaded,
        (Some((rank, (code, text))), _) => {
            let error = anyhow!("{}", String::from_utf8_lossy(text)).context(format!("rank {rank}"));
            Err(if *code == 2 { Failure::Refused(error) } else { Failure::Failed(error) })
        }
    }
}

/// The whole run, of which `part` is this rank's. All ranks get it, or the same failure.
pub fn collect(group: &Endpoint, part: anyhow::Result<LayerRun>) -> anyhow::Result<LayerRun> {
    match gather(group, &part::encode(&part)) {
        Ok(parts) => ep::whole(parts.iter().map(|part| part::decode(part)).collect()),
        // Who could not finish knows better why than who finds it gone.
        Err(error) => part.and_then(|_| Err(error).context("collecting the outputs")),
    }
}

fn gather(group: &Endpoint, mine: &[u8]) -> Result<Vec<Vec<u8>>, TransportError> {
    let transport = group.transport();
    transport.all_gather(mine, transport.deadline())
}
