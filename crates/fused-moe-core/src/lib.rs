//! wip
mod dtype;
mod error;
mod exec;
mod fault;
mod group;
mod layout;
mod placement;
mod quantization;
mod router;
mod routing;
mod tensor;

pub use dtype::{DType, Device, DeviceKind, Element};
pub use error::{Error, ErrorKind, Result, Source, Stage};
pub use exec::{ARENA_ALIGN, Arena, ExecCx, Stream};
pub use fault::Fault;
pub use group::{ProcessGroup, SingleRank};
pub use layout::{Layout, MAX_DIMS, ViewError};
pub use placement::{
    ExpertMap, ExpertMask, ExpertPlacement, GlobalExpertId, LocalExpertId, NO_EXPERT, PlacementError, Rank,
};
pub use quantization::{
    BLOCK, Fp8Format, Granularity, QuantScheme, ScaleLayout, ScaleOrder, ScaleSource, WireFormat,
};
pub use router::{Router, TopK, TopKMut};
pub use routing::{ExpertGroups, RoutingConfig, RoutingMethod};
pub use tensor::{Allocation, Lease, TensorView, TensorViewMut};
