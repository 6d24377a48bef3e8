//! On the host: the crate `router`, on one thread.

use std::time::Duration;

use fused_moe::router::HostRouter;
use fused_moe::{Arena, DType, ExecCx, Router, RoutingConfig, Stream, TensorView, TensorViewMut, TopKMut};

use super::{Row, logits};
use crate::args::BenchRouterArgs;
use crate::bench::clock::Clock;
use crate::exit::{Failure, OrFailure};

pub fn measure(args: &BenchRouterArgs, configs: &[RoutingConfig]) -> Result<Vec<Row>, Failure> {
    let clock = Clock::for_threads(1);
    let mut rows = Vec::new();
    for config in configs {
        let router = HostRouter::new(config.clone()).or_refused()?;
        for &tokens in &args.tokens {
            let logits: Vec<f32> = logits(tokens, args.experts).into_iter().map(f32::from).collect();
            let (mut ids, mut weights) = (vec![0; tokens * args.top_k], vec![0f32; tokens * args.top_k]);
            let mut call = || -> anyhow::Result<()> {
                let dims = [tokens, args.top_k];
                let workspace = Arena::new(TensorViewMut::from_slice(&mut [0u8; 0], DType::U8, &[0])?);
                let mut cx = ExecCx { stream: Stream::Host, workspace };
                let out = TopKMut {
                    ids: TensorViewMut::from_slice(&mut ids, DType::I32, &dims)?,
                    weights: TensorViewMut::from_slice(&mut weights, DType::F32, &dims)?,
                };
                let logits = TensorView::from_slice(&logits, DType::F32, &[tokens, args.experts])?;
                Ok(router.route(&mut cx, logits, out)?)
            };
            call().or_failed()?;
            let times: anyhow::Result<Vec<Duration>> = (0..args.reps)
                .map(|_| {
                    let (took, done) = clock.time(&mut call);
                    done.map(|()| took)
                })
                .collect();
            rows.push(Row::new(config.method.name(), tokens, 0, times.or_failed()?));
        }
    }
    Ok(rows)
}
