//! Times on a GPU: of graphs, so that the host does not count.

#![expect(unsafe_code, reason = "what a graph recorded has to be there")]

use std::time::Duration;

use fused_moe::device::{DeviceResult, Graph, Runtime, Stream};

/// Larger than the last cache of any device here.
pub const BEYOND_CACHES: usize = 400 << 20;
/// A replay should take milliseconds, so that its start does not count.
pub const CALLS: usize = 40;
const WARM: usize = 3;

/// Times of one of the `calls` that `graph` has, from `reps` replays.
pub fn replays(
    runtime: &Runtime,
    stream: &Stream,
    graph: &Graph,
    (calls, reps): (usize, usize),
) -> DeviceResult<Vec<Duration>> {
    let (mut start, mut end) = (runtime.event()?, runtime.event()?);
    let mut times = Vec::with_capacity(reps);
    for rep in 0..WARM + reps {
        start.record(stream)?;
        // SAFETY: whoever recorded the graph still has its buffers.
        unsafe { graph.replay(stream)? };
        end.record(stream)?;
        let took = end.elapsed(&start)?;
        if rep >= WARM {
            times.push(took / calls as u32);
        }
    }
    Ok(times)
}

/// Bytes that a copy larger than the caches reads and writes per second, in GB/s.
pub fn copy_rate(runtime: &Runtime, stream: &Stream, reps: usize) -> DeviceResult<f64> {
    let (from, mut to) = (runtime.alloc(BEYOND_CACHES)?, runtime.alloc(BEYOND_CACHES)?);
    let graph = stream.capture(|stream| (0..CALLS).try_for_each(|_| to.copy_from(&from, stream)))?;
    let mut times = replays(runtime, stream, &graph, (CALLS, reps))?;
    times.sort_unstable();
    Ok(2.0 * BEYOND_CACHES as f64 / times[times.len() / 2].as_secs_f64() / 1e9)
}
