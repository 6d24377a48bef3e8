//! One rank's part of a run as bytes, for ranks that do not share memory with the one that reports.

use std::time::Duration;

use anyhow::Context;
use fused_moe::transport::Traffic;
use fused_moe::{KernelBytes, StageTimes};

use crate::ep::{self, LayerRun, Times};
use crate::tokens::LayerOutput;

/// What kind of failure it was, as far as that decides which of several is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The caller's input.
    Input,
    /// Another rank, which is lost.
    Lost,
    /// Anything else.
    Other,
}

/// A failure on another rank.
#[derive(Debug)]
pub struct RemoteFailure {
    /// Its kind.
    pub blame: Blame,
    /// How many errors it consists of, with their causes.
    pub depth: usize,
    text: String,
}

impl std::fmt::Display for RemoteFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for RemoteFailure {}

/// Numbers in front of the tensors of a part.
const NUMBERS: usize = 3 + 6 + 5 + 3;

/// What a rank tells of its part.
pub fn encode(part: &anyhow::Result<LayerRun>) -> Vec<u8> {
    let run = match part {
        Ok(run) => run,
        Err(error) => {
            let blame = match error {
                error if ep::is_bad_input(error) => Blame::Input,
                error if ep::is_peer_lost(error) => Blame::Lost,
                _ => Blame::Other,
            };
            let text = format!("{error:#}");
            return [&[1, blame as u8, ep::depth(error).min(255) as u8], text.as_bytes()].concat();
        }
    };
    let LayerRun { output, slots, times, traffic, bytes } = run;
    let nanos = |time: Duration| time.as_nanos() as u64;
    let Times { router, stages, shared, total } = *times;
    let numbers: [u64; NUMBERS] = [
        output.tokens as u64,
        output.hidden as u64,
        output.top_k as u64,
        nanos(router),
        nanos(stages.dispatch),
        nanos(stages.experts),
        nanos(stages.combine),
        nanos(shared),
        nanos(total),
        traffic.remote_bytes,
        traffic.internode_bytes,
        traffic.remote_puts,
        traffic.local_bytes,
        traffic.signals,
        bytes.comm as u64,
        bytes.workspace as u64,
        bytes.expert_out as u64,
    ];
    let numbers = numbers.iter().flat_map(|n| n.to_le_bytes());
    let floats = [&output.output, &output.routed, &output.topk_weights];
    let floats = floats.into_iter().flatten().flat_map(|x| x.to_le_bytes());
    let ids = [&output.topk_ids, slots].into_iter().flatten().flat_map(|id| id.to_le_bytes());
    std::iter::once(0).chain(numbers).chain(floats).chain(ids).collect()
}

/// The part that a rank has told of.
pub fn decode(bytes: &[u8]) -> anyhow::Result<LayerRun> {
    match bytes.split_first() {
        Some((0, run)) => decode_run(run).context("a rank sent no readable part"),
        Some((1, [blame, depth, text @ ..])) => {
            let blames = [Blame::Input, Blame::Lost];
            let blame = blames.into_iter().find(|it| *it as u8 == *blame).unwrap_or(Blame::Other);
            let text = String::from_utf8_lossy(text).into_owned();
            Err(RemoteFailure { blame, depth: (*depth).into(), text }.into())
        }
        _ => anyhow::bail!("a rank sent no readable part"),
    }
}

fn decode_run(bytes: &[u8]) -> Option<LayerRun> {
    let (numbers, mut rest) = bytes.split_at_checked(8 * NUMBERS)?;
    let numbers: Vec<u64> = numbers.as_chunks().0.iter().map(|n| u64::from_le_bytes(*n)).collect();
    let size = |at: usize| numbers[at] as usize;
    let nanos = |at: usize| Duration::from_nanos(numbers[at]);
    let (tokens, hidden, top_k) = (size(0), size(1), size(2));
    let mut words = |columns: usize| -> Option<Vec<[u8; 4]>> {
        let (words, later) = rest.split_at_checked(tokens.checked_mul(columns)?.checked_mul(4)?)?;
        rest = later;
        Some(words.as_chunks().0.to_vec())
    };
    let mut floats = |columns| Some(words(columns)?.into_iter().map(f32::from_le_bytes).collect());
    let (output, routed, topk_weights) = (floats(hidden)?, floats(hidden)?, floats(top_k)?);
    let mut ids = || Some(words(top_k)?.into_iter().map(i32::from_le_bytes).collect());
    let (topk_ids, slots) = (ids()?, ids()?);
    rest.is_empty().then_some(LayerRun {
        output: LayerOutput { tokens, hidden, top_k, output, routed, topk_ids, topk_weights },
        slots,
        times: Times {
            router: nanos(3),
            stages: StageTimes { dispatch: nanos(4), experts: nanos(5), combine: nanos(6) },
            shared: nanos(7),
            total: nanos(8),
        },
        traffic: Traffic {
            remote_bytes: numbers[9],
            internode_bytes: numbers[10],
            remote_puts: numbers[11],
            local_bytes: numbers[12],
            signals: numbers[13],
        },
        bytes: KernelBytes { comm: size(14), workspace: size(15), expert_out: size(16) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_survives_the_journey() {
        let (tokens, hidden, top_k) = (3, 5, 2);
        let floats = |n: usize| (0..n).map(|i| (i as f32 - 2.5).exp()).collect::<Vec<_>>();
        let run = LayerRun {
            output: LayerOutput {
                tokens,
                hidden,
                top_k,
                output: floats(15),
                routed: floats(15),
                topk_ids: vec![4, -1, 0, 7, 2, 3],
                topk_weights: floats(6),
            },
            slots: vec![5, -1, 1, 8, 3, 4],
            times: Times { router: Duration::from_nanos(17), ..Times::default() },
            traffic: Traffic { signals: 9, ..Traffic::default() },
            bytes: KernelBytes { comm: 1, workspace: 2, expert_out: 3 },
        };
        let bytes = encode(&Ok(run.clone()));
        assert_eq!(format!("{:?}", decode(&bytes).unwrap()), format!("{run:?}"));
        for len in [0, 1, 80, bytes.len() - 1] {
            assert!(decode(&bytes[..len]).is_err());
        }
        assert!(decode(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn a_failure_keeps_its_kind_and_its_causes() {
        let error = anyhow::anyhow!("disk").context("cannot read").context("rank 2");
        let far = decode(&encode(&Err(error))).unwrap_err();
        assert_eq!(far.to_string(), "rank 2: cannot read: disk");
        let far = far.downcast_ref::<RemoteFailure>().unwrap();
        assert_eq!((far.blame, far.depth), (Blame::Other, 3));
    }
}
