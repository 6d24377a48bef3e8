//! `apply` allocates nothing, routing included.

mod common;

use common::*;
use counting_alloc::allocations;
use fused_moe_core::*;
use grouped_gemm::{Executor, Isa};
use half::bf16;
use moe_conformance::Case;
use trtllm_experts::{TrtllmExperts, TrtllmRoutedExperts};

#[global_allocator]
static ALLOCATOR: counting_alloc::Counting = counting_alloc::Counting;

/// On one thread: between several, rayon boxes a job per thread.
#[test]
fn apply_allocates_nothing() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let executor = Executor::new(Isa::detect(), std::num::NonZeroUsize::MIN).unwrap();
    for quant in SCHEMES {
        let case: Case = case(quant, 1);
        let (config, batch, weights) = (case.config(), Batch::of(&case), case.weights());
        let all = weights.matrices();
        let providers: [&dyn ExpertsProvider; 2] =
            [&TrtllmExperts::with_executor(executor), &TrtllmRoutedExperts::with_executor(executor)];
        for provider in providers {
            let built = Built::new(provider, &config, (&all, Rank(0)), batch.max_rows());
            let rows = [batch.max_rows(), config.hidden];
            let mut workspace = Workspace::new(DeviceKind::Host, built.experts.workspace_bytes()).unwrap();
            let mut out = vec![bf16::NAN; rows[0] * rows[1]];
            let mut apply = || {
                let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
                let out = TensorViewMut::from_slice(&mut out, DType::Bf16, &rows).unwrap();
                built.apply_in(&batch, &mut cx, out).unwrap();
            };
            // The first call fills rayon's queues.
            let allocated = pool.install(|| {
                apply();
                allocations(apply)
            });
            assert_eq!(allocated, 0, "{} {quant}", provider.name());
        }
    }
}
