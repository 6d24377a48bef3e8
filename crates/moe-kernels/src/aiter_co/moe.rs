//! One call of a one-stage kernel.

use super::arguments::FusedMoeParams;
use super::manifest::{Scheme, Tile};
use crate::launch::BadLaunch;

const NAME: &str = "AITER's one-stage kernel";

/// Values of a matrix that share a scale, along either side.
const BLOCK: usize = 128;

/// A sorted id has 24 bits for the row and 8 for the slot.
const MAX_ROWS: usize = (1 << 24) - 1;
const MAX_TOP_K: usize = (1 << 8) - 1;

/// Sizes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Most rows; how many there are, the device reads.
    pub rows: usize,
    /// Hidden size.
    pub hidden: usize,
    /// Intermediate size.
    pub intermediate: usize,
    /// Local experts.
    pub experts: usize,
    /// Slots of a row.
    pub top_k: usize,
}

impl Sizes {
    /// Most blocks of `block_rows` sorted rows: every expert may pad its last.
    pub fn blocks(&self, block_rows: u32) -> usize {
        let pairs = self.rows.saturating_mul(self.top_k);
        let block = block_rows as usize;
        let active = self.experts.min(pairs);
        pairs.saturating_add(active * (block - 1)) / block
    }
}

/// Addresses in the device's memory, aligned to 16 bytes. FP8 is the device's own: e4m3fnuz on gfx942, e4m3fn on gfx950.
/// Sorted arrays are what `moe_sorting` of `aiter-experts` defines, padded to [`Tile::rows`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeBuffers {
    /// `[rows, hidden]` bf16. Has to be zero before: blocks add to it, in no fixed order.
    pub output: u64,
    /// `[rows, hidden]` FP8.
    pub rows_fp8: u64,
    /// f32: `[rows]`, or of blocks `[hidden / 128, rows]`, so transposed.
    pub row_scales: u64,
    /// `[experts, 2 · intermediate, hidden]` FP8, gate before up, each expert as [`shuffle_weights`](super::shuffle_weights).
    pub gate_up: u64,
    /// f32: `[experts, 2 · intermediate]`, or `[experts, 2 · intermediate / 128, hidden / 128]`.
    pub gate_up_scales: u64,
    /// `[experts, hidden, intermediate]` FP8, each expert shuffled.
    pub down: u64,
    /// f32: `[experts, hidden]`, or `[experts, hidden / 128, intermediate / 128]`.
    pub down_scales: u64,
    /// `[blocks · Tile::rows]` u32: slot · 2²⁴ + row.
    pub sorted_ids: u64,
    /// `[blocks · Tile::rows]` f32: the routing weight of each.
    pub sorted_weights: u64,
    /// `[blocks]` i32: local expert of each block.
    pub sorted_experts: u64,
    /// `[2]` i32: sorted rows with their padding, rows.
    pub valid_ids: u64,
}

/// Stage 3 in one kernel.
#[derive(Clone, Copy, Debug)]
pub struct FusedMoe<'t> {
    /// Sizes.
    pub sizes: Sizes,
    /// The kernel.
    pub tile: &'t Tile,
    /// Of the device.
    pub compute_units: u32,
}

/// A call of a one-stage kernel, but for its stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OneStageLaunch {
    /// Blocks.
    pub grid: u32,
    /// The argument.
    pub params: FusedMoeParams,
}

impl FusedMoe<'_> {
    /// The call.
    ///
    /// # Errors
    /// [`BadLaunch`]: the intermediate size is no multiple of the tile, a size of a scheme with blocks none of 128, weights do not
    /// fit the shuffle, an intermediate row has more tiles than there are blocks, an expert has 4 GiB of weights, or a sorted id
    /// cannot count the rows or slots.
    pub fn launch(&self, buffers: &MoeBuffers) -> Result<OneStageLaunch, BadLaunch> {
        let Self { sizes: Sizes { rows, hidden, intermediate, experts, top_k }, tile, .. } = *self;
        let narrow = |what, size| BadLaunch::narrow(NAME, what, size);
        let at_most = |what, size, limit| match size <= limit {
            true => narrow(what, size),
            false => Err(BadLaunch::TooLarge { kernel: NAME, what, size, limit }),
        };
        // Weights are shuffled in pieces of 16 rows and 32 columns.
        let unit = if tile.scheme == Scheme::Block { BLOCK } else { 32 };
        BadLaunch::multiple(NAME, "hidden size", hidden, unit)?;
        BadLaunch::multiple(NAME, "intermediate size", intermediate, unit)?;
        BadLaunch::multiple(NAME, "intermediate size", intermediate, tile.columns as usize)?;
        let grid = narrow("blocks", tile.blocks_per_unit as usize * self.compute_units as usize)?;
        let tiles =
            at_most("tiles of an intermediate row", intermediate / tile.columns as usize, grid as usize)?;
        let (gate_up_scales, down_scales) = match tile.scheme {
            Scheme::PerToken | Scheme::PerTokenWeightFirst => (2 * intermediate, hidden),
            Scheme::Block => {
                let blocks = (intermediate / BLOCK) * (hidden / BLOCK);
                (2 * blocks, blocks)
            }
        };
        let matrix = hidden.saturating_mul(intermediate);
        let params = FusedMoeParams {
            output: buffers.output.into(),
            rows_fp8: buffers.rows_fp8.into(),
            gate_up: buffers.gate_up.into(),
            valid_ids: buffers.valid_ids.into(),
            down: buffers.down.into(),
            row_scales: buffers.row_scales.into(),
            gate_up_scales: buffers.gate_up_scales.into(),
            down_scales: buffers.down_scales.into(),
            smooth_scales: 0u64.into(),
            sorted_ids: buffers.sorted_ids.into(),
            sorted_weights: buffers.sorted_weights.into(),
            sorted_experts: buffers.sorted_experts.into(),
            hidden: narrow("hidden size", hidden)?.into(),
            intermediate: narrow("intermediate size", intermediate)?.into(),
            rows: at_most("rows", rows, MAX_ROWS)?.into(),
            experts: narrow("local experts", experts)?.into(),
            row_stride: narrow("bytes of a row", hidden)?.into(),
            gate_up_stride: narrow("bytes of a row of gate and up", hidden)?.into(),
            down_stride: narrow("bytes of a row of down", intermediate)?.into(),
            output_stride: narrow("bytes of a row of the output", 2 * hidden)?.into(),
            gate_up_expert: narrow("bytes of gate and up", matrix.saturating_mul(2))?.into(),
            down_expert: narrow("bytes of down", matrix)?.into(),
            gate_up_scales_expert: narrow("bytes of scales of gate and up", 4 * gate_up_scales)?.into(),
            down_scales_expert: narrow("bytes of scales of down", 4 * down_scales)?.into(),
            smooth_scales_expert: narrow("bytes of smoothing scales", 4 * intermediate)?.into(),
            top_k: at_most("top-k", top_k, MAX_TOP_K)?.into(),
            blocks: (grid - grid % tiles.max(1)).into(),
            tiles: tiles.into(),
        };
        Ok(OneStageLaunch { grid, params })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Arch;
    use crate::launch::KernelParams;

    const SIZES: Sizes = Sizes { rows: 128, hidden: 7168, intermediate: 2048, experts: 32, top_k: 8 };

    fn buffers() -> MoeBuffers {
        let [output, rows_fp8, gate_up, valid_ids, down] = [1 << 40, 2, 3, 4, 5];
        let [row_scales, gate_up_scales, down_scales] = [6, 7, 8];
        let [sorted_ids, sorted_weights, sorted_experts] = [10, 11, 12];
        MoeBuffers {
            output,
            rows_fp8,
            row_scales,
            gate_up,
            gate_up_scales,
            down,
            down_scales,
            sorted_ids,
            sorted_weights,
            sorted_experts,
            valid_ids,
        }
    }

    fn launch(scheme: Scheme, sizes: Sizes, columns: u32) -> Result<OneStageLaunch, BadLaunch> {
        let tile = Tile {
            kernel: "k".to_owned(),
            path: "k.co".into(),
            arch: Arch::Gfx942,
            scheme,
            blocks_per_unit: 1,
            rows: 32,
            columns,
        };
        FusedMoe { sizes, tile: &tile, compute_units: 304 }.launch(&buffers())
    }

    /// The numbers of every slot as the device finds them, and what is beside them.
    fn slots(launch: &OneStageLaunch) -> Vec<u64> {
        let slots = launch.params.as_bytes().chunks_exact(16);
        slots
            .map(|slot| {
                assert_eq!(slot[8..], [0; 8]);
                u64::from_le_bytes(slot[..8].try_into().unwrap())
            })
            .collect()
    }

    #[test]
    fn every_number_is_in_its_slot() {
        let addresses = [1 << 40, 2, 3, 4, 5, 6, 7, 8, 0, 10, 11, 12];
        let sizes = [7168, 2048, 128, 32, 7168, 7168, 2048, 14336, 2 * 2048 * 7168, 2048 * 7168];
        // 304 blocks are 60 times the 5 tiles of 2560 and 4 more, and 38 times the 8 of 2048.
        let block = launch(Scheme::Block, SIZES, 256).unwrap();
        let rest = [2 * 16 * 56 * 4, 16 * 56 * 4, 2048 * 4, 8, 304, 8];
        assert_eq!(slots(&block), [&addresses[..], &sizes, &rest].concat());
        assert_eq!(block.grid, 304);
        let token = launch(Scheme::PerToken, Sizes { intermediate: 2560, ..SIZES }, 512).unwrap();
        assert_eq!(slots(&token)[22..], [2 * 2560 * 4, 7168 * 4, 2560 * 4, 8, 300, 5]);
    }

    #[test]
    fn what_a_kernel_cannot_do_is_refused() {
        let refused = |scheme, sizes| launch(scheme, sizes, 256).unwrap_err().to_string();
        let text = refused(Scheme::Block, Sizes { hidden: 7200, ..SIZES });
        assert!(text.starts_with("hidden size 7200 is not a multiple of 128"), "{text}");
        let text = refused(Scheme::PerToken, Sizes { intermediate: 2176, ..SIZES });
        assert!(text.starts_with("intermediate size 2176 is not a multiple of 256"), "{text}");
        let text = refused(Scheme::PerToken, Sizes { rows: 1 << 24, ..SIZES });
        assert!(text.starts_with("rows 16777216 is more than 16777215"), "{text}");
        let text = refused(Scheme::PerToken, Sizes { top_k: 256, ..SIZES });
        assert!(text.starts_with("top-k 256 is more than 255"), "{text}");
        let text = refused(Scheme::PerToken, Sizes { intermediate: 256 * 305, ..SIZES });
        assert!(text.starts_with("tiles of an intermediate row 305 is more than 304"), "{text}");
        let text = refused(Scheme::PerToken, Sizes { hidden: 1 << 17, intermediate: 1 << 14, ..SIZES });
        assert!(text.starts_with("bytes of gate and up 4294967296 is more than 4294967295"), "{text}");
    }

    /// By trying all ways of giving pairs to experts.
    #[test]
    fn no_routing_has_more_blocks() {
        for (rows, top_k, experts) in [(0, 2, 3), (1, 1, 3), (2, 3, 2), (5, 2, 3), (9, 1, 3)] {
            let pairs = rows * top_k;
            let sizes = Sizes { rows, top_k, experts, ..SIZES };
            let of = |counts: &[usize]| counts.iter().map(|n| n.div_ceil(4)).sum::<usize>();
            let worst = (0..=pairs)
                .flat_map(|a| (0..=pairs - a).map(move |b| [a, b, pairs - a - b]))
                .filter(|counts| experts == 3 || counts[2] == 0)
                .map(|counts| of(&counts))
                .max();
            assert_eq!(Some(sizes.blocks(4)), worst, "{rows} rows, top-{top_k}, {experts} experts");
        }
    }
}
