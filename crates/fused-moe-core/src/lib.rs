//! The seam of an expert-parallel fused MoE layer: vocabulary, stage traits, negotiation, composition.
//!
//! ```text
//!            stage 1          stage 2               stage 3           stage 4
//! logits ─▶ [Router] ─▶ [Quantize-Dispatch] ─▶ [Experts] ─▶ [Combine] ─▶ output
//!                        └──── PrepareAndFinalize*  ─────────────┘
//!                                              Experts*
//! ```
//!
//! A layer is a *prepare/finalize* backend (stages 2 and 4: it owns the wire) and an *experts* backend (stage 3),
//! made by providers in a [`Registry`]. Both publish capabilities as data; [`negotiate`] turns two of them into a
//! [`Plan`] or into every reason why they do not fit, before anything is allocated. [`FusedMoEKernel`] runs a plan.
//!
//! ```
//! use fused_moe_core::*;
//!
//! let config = MoeConfig {
//!     hidden: 7168,
//!     intermediate: 2048,
//!     top_k: 8,
//!     max_tokens_per_rank: 128,
//!     quant: QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
//!     ..MoeConfig::new(ExpertPlacement::linear(256, 8)?)
//! };
//! let quantized = config.quant.quantized_wire(config.in_dtype);
//! let comm = PrepareCaps::host("bf16-only", KernelKind::Modular, vec![WireFormat::unquantized(DType::Bf16)], 1024);
//! let experts = ExpertsCaps::host("fp8-only", vec![quantized]);
//! let reasons = negotiate(&config, &comm, &experts).unwrap_err();
//! assert_eq!(
//!     reasons[0].to_string(),
//!     "quantisation: needs wire fp8_e4m3fn + dynamic f32 scale per 1x128, found bf16"
//! );
//! # Ok::<(), PlacementError>(())
//! ```
//!
//! What this crate does not do: it holds no backend, no device code and no transport, reads no environment, and
//! allocates no tensor except the workspaces of a built kernel.

#![deny(unsafe_code)]

mod config;
mod dtype;
mod error;
#[allow(unsafe_code)] // Hands out pieces of a lent range, and takes streams that are lent.
mod exec;
mod experts;
mod factory;
mod fault;
mod group;
mod kernel;
mod kind;
mod layout;
mod negotiate;
mod placement;
mod prepare_finalize;
mod provider;
mod quantization;
mod reduce;
mod router;
mod routing;
#[allow(unsafe_code)] // Views are addresses; their safety is argued there.
mod tensor;
mod ticket;
mod traffic;
mod validate;
#[allow(unsafe_code)] // Views of its own allocation, and what an allocator promises.
mod workspace;

pub use dtype::{DType, Device, DeviceKind, Element};
pub use layout::{Layout, MAX_DIMS, ViewError};
pub use tensor::{Allocation, Lease, TensorView, TensorViewMut};

pub use config::{Activation, MoeConfig, Padding};
pub use placement::{
    ExpertMap, ExpertMask, ExpertPlacement, GlobalExpertId, LocalExpertId, NO_EXPERT, PlacementError, Rank,
};
pub use quantization::{
    Accumulation, BLOCK, CombineWire, Fp8Format, Granularity, QuantScheme, ScaleLayout, ScaleOrder,
    ScaleSource, WireFormat,
};
pub use routing::{ExpertGroups, RoutingConfig, RoutingMethod, UnknownRoutingMethod};

pub use error::{Error, ErrorKind, Mismatch, Result, Source, Stage};
pub use fault::Fault;
pub use group::{ProcessGroup, SingleRank, first_mismatch};

pub use exec::{ARENA_ALIGN, Arena, DeviceStream, ExecCx, Stream};
pub use router::{Router, RouterInput, RouterOutput, TopK, TopKMut};
pub use ticket::{Outstanding, Routed, Routing, Sent, TicketLedger, phase};

pub use prepare_finalize::{
    Arrived, Dispatched, DispatchedMonolithic, ExpertOut, MonolithicInput, PrepareAndFinalize,
    PrepareAndFinalizeModular, PrepareAndFinalizeMonolithic, PrepareInput, ReceivedRows, TokensPerExpert,
    check_output,
};

pub use experts::{
    ExpertMatrices, ExpertWeights, ExpertsModular, ExpertsMonolithic, WeightMatrix, WeightScale,
};
pub use reduce::{Contiguous, Delegate, NaiveBatched, NoOp, ReduceError, ReduceInput, TopKWeightAndReduce};

pub use negotiate::{
    ActivationFormat, Axis, CombineKind, ExpertsCaps, KernelKind, PartialSums, Plan, PrepareCaps,
    RouterWeight, Support, Unsupported, negotiate,
};
pub use provider::{
    Experts, ExpertsProvider, PrepareFinalize, PrepareFinalizeProvider, WireBytes, check_expert_count,
};
pub use traffic::{
    CommTraffic, ExpectedSpread, PerLink, Protocol, copies_per_slot, copies_to_all, expected_remote_ranks,
};

pub use factory::{MakeError, RefusedPair, Registry, Selection, Survey, maybe_make_prepare_finalize};
pub use kernel::{
    Call, ComposedKernel, FusedMoEKernel, KernelBytes, ModularKernel, MonolithicKernel, Overlap, OverlapFn,
    StageTimes,
};
pub use kind::{Logits, Modular, Monolithic};
pub use workspace::{DeviceAllocator, DeviceMemory, Workspace};
