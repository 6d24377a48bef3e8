//! Stage 2: activations to FP8.

use fused_moe_core::{Fp8Format, ScaleOrder};

use crate::launch::{BadLaunch, KernelParams, Launch};

const NAME: &str = "quantize_1x128";
const PER_TOKEN: &str = "quantize_per_token";
/// Columns that share a scale.
const GROUP: usize = 128;
/// Columns of a lane: 16 bytes of bf16.
const LANE: usize = 8;
const THREADS: u32 = 256;
/// More blocks than any device runs at once; beyond them, blocks go round.
const MAX_BLOCKS: u32 = 1 << 15;
const GROUPS_PER_BLOCK: u32 = THREADS / (GROUP / LANE) as u32;

/// Rows to quantise: bf16 to FP8 with one f32 scale per 128 columns.
///
/// `scale = max(amax, 1e-10) · (1/max)` and `code = rne(clamp(x · (1/scale), ±max))`, bit for bit as the crate `quant` does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantize1x128 {
    /// Rows; may be 0.
    pub rows: usize,
    /// Columns, a multiple of 8. The last group of a row may be short.
    pub hidden: usize,
    /// From one row of the input to the next, in elements, a multiple of 8.
    pub input_stride: usize,
    /// The order of the scales, `[rows, groups]` or transposed.
    pub scales: ScaleOrder,
    /// The codes; must be those of the device.
    pub format: Fp8Format,
}

/// Addresses in the device's memory, aligned to 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantizeBuffers {
    /// `[rows, hidden]` bf16, rows `input_stride` apart.
    pub input: u64,
    /// `[rows, hidden]` FP8, written.
    pub codes: u64,
    /// f32 scales, written.
    pub scales: u64,
    /// u32: how many of the rows there are; 0 if all are there. So a call can be for the worst case, and be recorded.
    pub count: u64,
}

/// Rows to quantise: bf16 to FP8 with one f32 scale per row, by the same formulas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantizePerToken {
    /// Rows; may be 0.
    pub rows: usize,
    /// Columns, a multiple of 8.
    pub hidden: usize,
    /// From one row of the input to the next, in elements, a multiple of 8.
    pub input_stride: usize,
    /// The codes; must be those of the device.
    pub format: Fp8Format,
}

/// The argument of the kernel: `QuantizePerTokenParams` in `kernels/quantize/quantize.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantizePerTokenParams {
    input: u64,
    codes: u64,
    scales: u64,
    count: u64,
    rows: u32,
    hidden: u32,
    input_stride: u32,
    max: f32,
    inverse_max: f32,
    blocks: u32,
}

const _: () = assert!(size_of::<QuantizePerTokenParams>() == 56);

// SAFETY: `repr(C)`, four fields of 8 bytes and six of 4, 56 bytes in all, so there is no padding; the struct in
// `kernels/quantize/quantize.h` has the same fields in the same order.
unsafe impl KernelParams for QuantizePerTokenParams {}

impl QuantizePerToken {
    /// The call; the scales are `[rows]`.
    ///
    /// # Errors
    /// [`BadLaunch`] for sizes that are no multiples of 8 or are too large.
    pub fn launch(&self, buffers: QuantizeBuffers) -> Result<Launch<QuantizePerTokenParams>, BadLaunch> {
        let narrow = |what, size| BadLaunch::narrow(PER_TOKEN, what, size);
        BadLaunch::multiple(PER_TOKEN, "hidden", self.hidden, LANE)?;
        BadLaunch::multiple(PER_TOKEN, "input stride", self.input_stride, LANE)?;
        let (QuantizeBuffers { input, codes, scales, count }, max) = (buffers, self.format.max());
        let rows = narrow("rows", self.rows)?;
        let blocks = rows.min(MAX_BLOCKS);
        Ok(Launch {
            kernel: PER_TOKEN,
            grid: blocks,
            block: THREADS,
            shared_bytes: 0,
            params: QuantizePerTokenParams {
                input,
                codes,
                scales,
                count,
                rows,
                hidden: narrow("hidden", self.hidden)?,
                input_stride: narrow("input stride", self.input_stride)?,
                max,
                inverse_max: 1.0 / max,
                blocks,
            },
        })
    }
}

/// The argument of the kernel: `Quantize1x128Params` in `kernels/quantize/quantize.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantize1x128Params {
    input: u64,
    codes: u64,
    scales: u64,
    count: u64,
    rows: u32,
    hidden: u32,
    groups: u32,
    input_stride: u32,
    scale_row_stride: u32,
    scale_group_stride: u32,
    max: f32,
    inverse_max: f32,
    blocks: u32,
    unused: u32,
}

const _: () = assert!(size_of::<Quantize1x128Params>() == 72);

// SAFETY: `repr(C)`, four fields of 8 bytes and ten of 4, 72 bytes in all, so there is no padding; the struct in
// `kernels/quantize/quantize.h` has the same fields in the same order.
unsafe impl KernelParams for Quantize1x128Params {}

impl Quantize1x128 {
    /// FP8 codes that are written.
    pub fn code_bytes(&self) -> usize {
        self.rows * self.hidden
    }

    /// From one row to the next, and from one group to the next, in scales.
    fn scale_strides(&self) -> Result<(usize, usize), BadLaunch> {
        match self.scales {
            ScaleOrder::RowMajor => Ok((self.hidden.div_ceil(GROUP), 1)),
            ScaleOrder::Transposed { stride } => Ok((1, stride)),
            order => Err(BadLaunch::ScaleOrder { kernel: NAME, order }),
        }
    }

    /// Scales that are written or skipped over.
    ///
    /// # Errors
    /// [`BadLaunch::ScaleOrder`].
    pub fn scale_len(&self) -> Result<usize, BadLaunch> {
        let (row_stride, group_stride) = self.scale_strides()?;
        Ok((self.rows * row_stride).max(self.hidden.div_ceil(GROUP) * group_stride))
    }

    /// The call. A grid of 0 blocks means that there is nothing to do.
    ///
    /// # Errors
    /// [`BadLaunch`] for sizes that are no multiples of 8 or are too large, and for swizzled scales.
    pub fn launch(&self, buffers: QuantizeBuffers) -> Result<Launch<Quantize1x128Params>, BadLaunch> {
        let narrow = |what, size| BadLaunch::narrow(NAME, what, size);
        BadLaunch::multiple(NAME, "hidden", self.hidden, LANE)?;
        BadLaunch::multiple(NAME, "input stride", self.input_stride, LANE)?;
        let groups = self.hidden.div_ceil(GROUP);
        let all_groups = self.rows.saturating_mul(groups);
        // The kernel counts them in 32 bits, up to one round of blocks beyond the last.
        let limit = (u32::MAX - MAX_BLOCKS * GROUPS_PER_BLOCK) as usize;
        if all_groups > limit {
            let what = "groups of all rows";
            return Err(BadLaunch::TooLarge { kernel: NAME, what, size: all_groups, limit });
        }
        let (scale_row_stride, scale_group_stride) = self.scale_strides()?;
        let max = self.format.max();
        let blocks = narrow("groups of all rows", all_groups)?.div_ceil(GROUPS_PER_BLOCK).min(MAX_BLOCKS);
        Ok(Launch {
            kernel: NAME,
            grid: blocks,
            block: THREADS,
            shared_bytes: 0,
            params: Quantize1x128Params {
                input: buffers.input,
                codes: buffers.codes,
                scales: buffers.scales,
                count: buffers.count,
                rows: narrow("rows", self.rows)?,
                hidden: narrow("hidden", self.hidden)?,
                groups: narrow("groups", groups)?,
                input_stride: narrow("input stride", self.input_stride)?,
                scale_row_stride: narrow("scale stride", scale_row_stride)?,
                scale_group_stride: narrow("scale stride", scale_group_stride)?,
                max,
                inverse_max: 1.0 / max,
                blocks,
                unused: 0,
            },
        })
    }
}
