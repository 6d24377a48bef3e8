//! Expert-parallel fused MoE layers for inference engines.
//!
//! The façade: everything of [`fused_moe_core`], the transports and the router under their own names, and a
//! [`Registry`] with the backends of this workspace ([`default_backends`]). Backends of other crates are added with
//! [`Registry::with_comm`] and [`Registry::with_experts`].
//!
//! Two ranks, in threads of this process, run one layer:
//!
//! ```
//! use fused_moe::transport::{ThreadOptions, run_ranks};
//! use fused_moe::*;
//! use half::bf16;
//!
//! let config = MoeConfig {
//!     hidden: 64,
//!     intermediate: 32,
//!     top_k: 1,
//!     max_tokens_per_rank: 1,
//!     ..MoeConfig::new(ExpertPlacement::linear(2, 2)?)
//! };
//! let registry = fused_moe::default_backends();
//! let selection = Selection { comm: Some("mori_high_throughput"), experts: None };
//!
//! let outputs = run_ranks(2, ThreadOptions::default(), |group| -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
//!     let FusedMoEKernel::Modular(mut kernel) = registry.build(&config, selection, &group)? else {
//!         unreachable!("mori is modular");
//!     };
//!     // Every rank packs the experts it holds: here one, all of whose weights are 1/64.
//!     let ones = vec![bf16::from_f32(1.0 / 64.0); 64 * 32];
//!     let matrix = |dims: &[usize]| -> Result<_, ViewError> {
//!         Ok(WeightMatrix::unquantized(TensorView::from_slice(&ones, DType::Bf16, dims)?))
//!     };
//!     let expert = ExpertMatrices { gate: matrix(&[32, 64])?, up: matrix(&[32, 64])?, down: matrix(&[64, 32])? };
//!     let weights = registry.experts(kernel.plan().experts())?.pack(&config, group.rank(), &[expert])?;
//!
//!     // One token per rank, sent to the other rank's expert.
//!     let hidden = vec![bf16::ONE; 64];
//!     let (ids, gates) = ([1 - group.rank().0 as i32], [0.5f32]);
//!     let mut out = vec![0f32; 64];
//!     kernel.apply(Call {
//!         stream: Stream::Host,
//!         weights: &weights,
//!         hidden: TensorView::from_slice(&hidden, DType::Bf16, &[1, 64])?,
//!         routing: TopK {
//!             ids: TensorView::from_slice(&ids, DType::I32, &[1, 1])?,
//!             weights: TensorView::from_slice(&gates, DType::F32, &[1, 1])?,
//!         },
//!         overlap: Overlap::default(),
//!         out: TensorViewMut::from_slice(&mut out, DType::F32, &[1, 64])?,
//!     })?;
//!     Ok(out)
//! })?;
//! // silu(1)·1 = 0.7311 in each of 32 columns, times 1/64 each, times the routing weight 0.5.
//! for out in outputs {
//!     let out = out.map_err(|e| e.to_string())?;
//!     assert!(out.iter().all(|y| (y - 0.1828).abs() < 2e-3));
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What this crate does not do: it has no logic of its own.

#![forbid(unsafe_code)]

pub use fused_moe_core::*;

/// Stage 1 on the host.
pub use router;

/// FP8 codecs and quantisers.
pub use quant;

/// What host experts multiply with.
pub use grouped_gemm;

/// Ranks and how they reach each other.
pub use device_runtime as device;
pub use ep_transport as transport;
pub use moe_kernels as kernels;

#[cfg(feature = "aiter")]
pub use aiter_experts;
#[cfg(feature = "batched")]
pub use batched_comm;
#[cfg(feature = "batched")]
pub use batched_experts;
#[cfg(feature = "gpu")]
pub use gpu_experts;
#[cfg(feature = "mori")]
pub use mori_comm;
#[cfg(feature = "naive")]
pub use naive_comm;
#[cfg(feature = "trtllm")]
pub use trtllm_experts;

/// The examples of the README, so that they are tested.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

/// What the backends of this build can be told when they are registered.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct BackendOptions {
    /// How experts `aiter` sort rows by expert.
    #[cfg(feature = "aiter")]
    pub sort_policy: aiter_experts::SortPolicy,
    /// What host experts multiply with: instruction set, threads, tuning table. Detected if not given.
    pub executor: Option<grouped_gemm::Executor>,
}

/// The backends that this build was made with, best first.
pub fn default_backends() -> Registry {
    backends(BackendOptions::default())
}

/// As [`default_backends`], with options.
///
/// ```
/// let mut options = fused_moe::BackendOptions::default();
/// options.sort_policy = fused_moe::aiter_experts::SortPolicy::MultiPhase;
/// assert_eq!(fused_moe::backends(options).experts_names(), fused_moe::default_backends().experts_names());
/// ```
pub fn backends(options: BackendOptions) -> Registry {
    let BackendOptions {
        #[cfg(feature = "aiter")]
        sort_policy,
        #[cfg(any(feature = "aiter", feature = "batched", feature = "trtllm"))]
        executor,
        ..
    } = options;
    #[cfg(any(feature = "aiter", feature = "batched", feature = "trtllm"))]
    let executor = executor.unwrap_or_else(grouped_gemm::Executor::detect);
    let registry = Registry::new();
    #[cfg(feature = "naive")]
    let registry = registry.with_comm(naive_comm::Local);
    #[cfg(feature = "mori")]
    let registry = mori_comm::MoriBackend::ALL.into_iter().fold(registry, Registry::with_comm);
    #[cfg(feature = "naive")]
    let registry = registry.with_comm(naive_comm::AllGatherReduceScatter).with_comm(naive_comm::Naive);
    #[cfg(feature = "batched")]
    let registry = registry.with_comm(batched_comm::Batched);
    #[cfg(feature = "aiter")]
    let registry = registry
        .with_experts(aiter_experts::AiterExperts::with_executor(executor).with_sort_policy(sort_policy));
    #[cfg(feature = "batched")]
    let registry = registry.with_experts(batched_experts::BatchedExperts::with_executor(executor));
    // Behind the others, and monolithic experts last: `auto` keeps the router outside where both fit.
    #[cfg(feature = "trtllm")]
    let registry = registry
        .with_experts(trtllm_experts::TrtllmRoutedExperts::with_executor(executor))
        .with_experts(trtllm_experts::TrtllmExperts::with_executor(executor));
    registry
}

/// The backends for layers that run on `device`: those of [`default_backends`] for the host, else those that this build has for
/// such a device, with its memory.
///
/// A device that cannot be opened is no error here: every pair is refused with the reason.
///
/// ```
/// use fused_moe::*;
///
/// let registry = fused_moe::backends_on(Device { kind: DeviceKind::Cuda, index: 1 << 20 });
/// let config = MoeConfig {
///     hidden: 256,
///     intermediate: 128,
///     top_k: 2,
///     max_tokens_per_rank: 8,
///     device: DeviceKind::Cuda,
///     ..MoeConfig::new(ExpertPlacement::linear(8, 1)?)
/// };
/// let survey = registry.survey(&config, Selection::default())?;
/// assert!(survey.fitting.is_empty());
/// assert!(survey.refused.iter().all(|pair| pair.to_string().contains("no Cuda device")));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn backends_on(device: Device) -> Registry {
    if device.kind == DeviceKind::Host {
        return default_backends();
    }
    device_backends(kernels::Target::open(device))
}

/// As [`backends_on`], for a device that may be open already.
pub fn device_backends(target: kernels::Target) -> Registry {
    let registry = Registry::new();
    let registry = match target.gpu() {
        Ok(gpu) => registry.with_memory(std::sync::Arc::new(gpu.runtime().clone())),
        Err(_) => registry,
    };
    #[cfg(feature = "naive")]
    let registry = registry.with_comm(naive_comm::DeviceLocal::new(target.clone()));
    #[cfg(feature = "gpu")]
    let registry = registry.with_experts(gpu_experts::GpuExperts::new(target));
    registry
}
