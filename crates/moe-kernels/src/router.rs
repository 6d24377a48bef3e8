//! Stage 1 and the sort before stage 3: logits to experts, weights and pairs.
//!
//! Up to [`FusedRouter::max_sorted_rows`] rows it is one launch, beyond them two. Ids and weights have the bits of
//! [`router::HostRouter`], and the sort is that of [`crate::sorting`].

use device_runtime::{DeviceError, Stream};
use fused_moe_core::RoutingConfig;
use router::{Division, Recipe, RoutingError, Score};

use crate::launch::{BadLaunch, Float, KernelParams, Launch};
use crate::loaded::Kernels;
use crate::sorting::{MoeSorting, SortPolicy, SortingBuffers, SortingLaunches};

/// Kernels by how many experts they can do.
const KERNELS: [(&str, usize); 4] =
    [("router_128", 128), ("router_256", 256), ("router_512", 512), ("router_1024", 1024)];
/// What a block's memory has room for.
const MAX_EXPERTS: usize = 1024;
const MAX_TOP_K: usize = 32;
const THREADS: u32 = 256;
/// Blocks that wait for each other.
const MAX_SORTING_BLOCKS: usize = 128;
/// Rows of such a block.
const MAX_BLOCK_ROWS: usize = 32;
/// Of a block that waits for nobody: a row of each of eight warps of 32 lanes.
const BLOCK_ROWS: usize = 8;
/// Words in front of the counts.
const WORKSPACE_HEAD: usize = 4;

/// Why there is no kernel for a routing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RouterError {
    /// No router would do it.
    #[error(transparent)]
    Routing(#[from] RoutingError),
    /// More experts than lanes have room for, or more local ones than a block's memory has.
    #[error("{what} {experts} is not in 1..={MAX_EXPERTS} (router)")]
    Experts {
        /// Which experts.
        what: &'static str,
        /// How many.
        experts: usize,
    },
    /// More experts of a token than lanes.
    #[error("top_k {top_k} is more than {MAX_TOP_K} (router)")]
    TopK {
        /// Experts of a token.
        top_k: usize,
    },
    /// No number of experts of a lane divides a group and lets a warp have all experts.
    #[error("{n_group} groups of {size} experts do not divide into parts of lanes (router)")]
    Groups {
        /// Groups.
        n_group: usize,
        /// Experts of each.
        size: usize,
    },
    /// A device that runs nothing.
    #[error("0 multiprocessors (router)")]
    NoComputeUnits,
}

/// A routing on a device: checked, and with its kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FusedRouter {
    kernel: &'static str,
    logits: Float,
    num_experts: usize,
    experts: usize,
    top_k: usize,
    has_bias: bool,
    /// As they are for all calls; the rest is 0.
    params: RouterParams,
    /// Of a launch that sorts.
    max_blocks: usize,
}

/// Addresses in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterBuffers {
    /// `[rows, num_experts]` as [`FusedRouter::new`] was told, aligned to 16 bytes.
    pub logits: u64,
    /// `[num_experts]` f32, aligned to 16 bytes: the correction bias. Read only if the routing has one.
    pub bias: u64,
    /// `[rows, top_k]` i32, written: global experts, best first. -1 in rows with a logit that is NaN or +∞.
    pub ids: u64,
    /// `[rows, top_k]` f32, written; 0 in such rows.
    pub weights: u64,
    /// u32, written: `row · num_experts + expert` of the first logit that is NaN or +∞, `u32::MAX` if there is none.
    pub fault: u64,
    /// [`FusedRouter::workspace_bytes`], zero before the first call and left to the router. One call at a time.
    pub workspace: u64,
    /// As [`SortingBuffers`] has it.
    pub map: u64,
    /// As [`SortingBuffers`] has it, written.
    pub offsets: u64,
    /// As [`SortingBuffers`] has it, written.
    pub pair_rows: u64,
    /// As [`SortingBuffers`] has it, written.
    pub positions: u64,
}

/// The argument of the kernels: `RouterParams` in `kernels/router/router.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RouterParams {
    logits: u64,
    bias: u64,
    ids: u64,
    weights: u64,
    fault: u64,
    map: u64,
    offsets: u64,
    pair_rows: u64,
    positions: u64,
    workspace: u64,
    rows: u32,
    num_experts: u32,
    top_k: u32,
    n_group: u32,
    topk_group: u32,
    lane_experts_32: u32,
    lane_experts_64: u32,
    group_lanes_32: u32,
    group_lanes_64: u32,
    score: u32,
    by_score: u32,
    is_divided: u32,
    epsilon: f32,
    factor: f32,
    logits_are_bf16: u32,
    experts: u32,
    blocks: u32,
    block_rows: u32,
}

const _: () = assert!(size_of::<RouterParams>() == 152);

// SAFETY: `repr(C)`, ten fields of 8 bytes and eighteen of 4, 152 bytes in all, so there is no padding; the struct in
// `kernels/router/router.h` has the same fields in the same order.
unsafe impl KernelParams for RouterParams {}

/// The launches of a call, in order.
#[derive(Clone, Copy, Debug)]
pub struct RouterLaunches {
    /// Routes, and sorts if there is no other launch that does. Its blocks wait for each other if it sorts.
    pub route: Launch<RouterParams>,
    /// Sorts.
    pub sort: Option<SortingLaunches>,
}

impl FusedRouter {
    /// A router for `config`, whose pairs are sorted over `experts` local experts. `compute_units` are the multiprocessors of the
    /// device.
    ///
    /// # Errors
    /// [`RouterError`].
    pub fn new(
        config: &RoutingConfig,
        logits: Float,
        experts: usize,
        compute_units: u32,
    ) -> Result<Self, RouterError> {
        let recipe = Recipe::new(config)?;
        let &RoutingConfig { num_experts, top_k, .. } = config;
        for (what, experts) in [("num_experts", num_experts), ("local experts", experts)] {
            if experts == 0 || experts > MAX_EXPERTS {
                return Err(RouterError::Experts { what, experts });
            }
        }
        if top_k > MAX_TOP_K {
            return Err(RouterError::TopK { top_k });
        }
        if compute_units == 0 {
            return Err(RouterError::NoComputeUnits);
        }
        // Groups matter where some are left out.
        let groups = config.groups.filter(|groups| groups.topk_group < groups.n_group);
        let size = num_experts / groups.map_or(1, |groups| groups.n_group);
        let lanes = KERNELS.into_iter().filter(|(_, capacity)| num_experts <= *capacity).find_map(
            |(kernel, most)| {
                let of = |warp| lane_experts(num_experts, groups.map(|_| size), warp, most / warp);
                Some((kernel, of(32)?, of(64)?))
            },
        );
        let n_group = groups.map_or(1, |groups| groups.n_group);
        let (kernel, lane_experts_32, lane_experts_64) =
            lanes.ok_or(RouterError::Groups { n_group, size })?;
        let has_bias = config.correction_bias.is_some();
        let (is_divided, epsilon) = match recipe.division {
            Division::Always(epsilon) => (true, epsilon),
            Division::IfAsked(epsilon) => (config.renormalize, epsilon),
            Division::Never => (false, 0.0),
        };
        let params = RouterParams {
            num_experts: num_experts as u32,
            top_k: top_k as u32,
            n_group: n_group as u32,
            topk_group: groups.map_or(1, |groups| groups.topk_group) as u32,
            lane_experts_32: lane_experts_32 as u32,
            lane_experts_64: lane_experts_64 as u32,
            // At least 1, as the kernel divides by it.
            group_lanes_32: (size / lane_experts_32).max(1) as u32,
            group_lanes_64: (size / lane_experts_64).max(1) as u32,
            score: match recipe.score {
                Score::Softmax => 0,
                Score::SoftmaxOfChosen => 1,
                Score::Sigmoid => 2,
                Score::SqrtSoftplus => 3,
                Score::Logit => 4,
            },
            by_score: u32::from(recipe.chooses_by_score(has_bias)),
            is_divided: u32::from(is_divided),
            epsilon,
            factor: config.routed_scaling_factor,
            logits_are_bf16: logits.is_bf16(),
            ..RouterParams::default()
        };
        let max_blocks = (compute_units as usize).min(MAX_SORTING_BLOCKS);
        Ok(Self { kernel, logits, num_experts, experts, top_k, has_bias, params, max_blocks })
    }

    /// What the logits are.
    pub fn logits(&self) -> Float {
        self.logits
    }

    /// Rows up to which routing and sorting are one launch.
    pub fn max_sorted_rows(&self) -> usize {
        self.max_blocks * MAX_BLOCK_ROWS
    }

    /// Bytes of workspace of a call of any number of rows.
    pub fn workspace_bytes(&self) -> usize {
        self.router_workspace_bytes() + MoeSorting::counts_bytes(self.experts)
    }

    /// Of these, the first ones are the router's.
    fn router_workspace_bytes(&self) -> usize {
        (WORKSPACE_HEAD + MAX_SORTING_BLOCKS / 4 * self.experts) * 4
    }

    /// The launches of a call of `rows` rows, which may be 0.
    ///
    /// # Errors
    /// [`BadLaunch`] for more logits than 32 bits count.
    pub fn launches(&self, rows: usize, buffers: RouterBuffers) -> Result<RouterLaunches, BadLaunch> {
        let narrow = |what, size| BadLaunch::narrow(self.kernel, what, size);
        // `u32::MAX` is none of them.
        narrow("logits", rows.saturating_mul(self.num_experts).saturating_add(1))?;
        let RouterBuffers {
            logits,
            bias,
            ids,
            weights,
            fault,
            workspace,
            map,
            offsets,
            pair_rows,
            positions,
        } = buffers;
        let sorts = rows <= self.max_sorted_rows();
        let most = if sorts { self.max_blocks } else { rows };
        let block_rows = rows.div_ceil(most).max(BLOCK_ROWS);
        let blocks = rows.div_ceil(block_rows).max(1);
        let (top_k, experts, num_experts) = (self.top_k, self.experts, self.num_experts);
        let sort = MoeSorting { rows, top_k, experts, num_experts, policy: SortPolicy::Auto };
        let counts = workspace + self.router_workspace_bytes() as u64;
        let sort = sort.launches(SortingBuffers { ids, map, offsets, pair_rows, positions, counts })?;
        let route = Launch {
            kernel: self.kernel,
            grid: narrow("blocks", blocks)?,
            block: THREADS,
            shared_bytes: 0,
            params: RouterParams {
                logits,
                bias: if self.has_bias { bias } else { 0 },
                ids,
                weights,
                fault,
                map,
                offsets,
                pair_rows,
                positions,
                workspace,
                rows: narrow("rows", rows)?,
                experts: if sorts { self.experts as u32 } else { 0 },
                blocks: narrow("blocks", blocks)?,
                block_rows: narrow("rows of a block", block_rows)?,
                ..self.params
            },
        };
        Ok(RouterLaunches { route, sort: (!sorts).then_some(sort) })
    }
}

/// Experts of a lane, so that a warp has all and, where there are groups, none has those of two; `None` if that is more than
/// `most`. Four at a time are loaded at once.
fn lane_experts(num_experts: usize, group: Option<usize>, warp: usize, most: usize) -> Option<usize> {
    let least = num_experts.div_ceil(warp);
    let fits = |of_lane: &usize| group.is_none_or(|size| size.is_multiple_of(*of_lane));
    let mut all = (least..=most).filter(fits);
    let smallest = all.next()?;
    Some([smallest].into_iter().chain(all).find(|of_lane| of_lane.is_multiple_of(4)).unwrap_or(smallest))
}

impl RouterLaunches {
    /// Puts the call on `stream`.
    ///
    /// # Errors
    /// Of the driver.
    ///
    /// # Safety
    /// All buffers are in memory of the device, as large as [`RouterBuffers`] says, and stay there until the call has run;
    /// nobody else writes them, or reads what the call writes, meanwhile. Nothing keeps the device from running as many blocks at
    /// once as it has multiprocessors, as another kernel would whose blocks wait for this one.
    pub unsafe fn enqueue(&self, kernels: &Kernels, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: the caller vouches for the memory and for the blocks; the kernels run in order.
        unsafe {
            kernels.launch(&self.route, stream)?;
            self.sort.as_ref().map_or(Ok(()), |sort| sort.enqueue(kernels, stream))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_have_parts_of_groups() {
        // DeepSeek-V3, V2; no groups; groups that a warp cannot have in equal parts.
        assert_eq!(lane_experts(256, Some(32), 32, 8), Some(8));
        assert_eq!(lane_experts(160, Some(20), 32, 8), Some(5));
        assert_eq!(lane_experts(160, Some(20), 64, 4), Some(4));
        assert_eq!(lane_experts(384, None, 32, 16), Some(12));
        assert_eq!(lane_experts(100, None, 32, 4), Some(4));
        assert_eq!(lane_experts(100, None, 64, 2), Some(2));
        assert_eq!(lane_experts(74, Some(37), 32, 32), None);
    }
}
