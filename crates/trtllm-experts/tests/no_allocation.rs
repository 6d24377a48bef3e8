//! `apply` allocates nothing, routing included.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::*;
use fused_moe_core::*;
use grouped_gemm::{Executor, Isa};
use half::bf16;
use moe_conformance::Case;
use trtllm_experts::{TrtllmExperts, TrtllmRoutedExperts};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is forwarded to the system's allocator as it is; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

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
                ALLOCATIONS.with(Cell::get)
            };
            // The first call fills rayon's queues.
            let (before, after) = pool.install(|| {
                apply();
                (ALLOCATIONS.with(Cell::get), apply())
            });
            assert_eq!(before, after, "{} {quant}", provider.name());
        }
    }
}
