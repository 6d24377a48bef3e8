//! Stage 2: activations to FP8.

use fused_moe_core::Fp8Format;

use crate::launch::{BadLaunch, KernelParams, Launch};

const NAME: &str = "quantize_1x128";
/// Columns that share a scale.
const GROUP: usize = 128;
/// Columns of a lane: 16 bytes of bf16.
const LANE: usize = 8;
const THREADS: u32 = 256;
const GROUPS_PER_BLOCK: u32 = THREADS / (GROUP / LANE) as u32;

/// In which order scales lie, as f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleOrder {
    /// `[rows, groups]`.
    RowMajor,
    /// `[groups, stride]`, of which the first `rows` columns are used.
    Transposed {
        /// From one group of a row to the next.
        stride: usize,
    },
}

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
    /// The order of the scales.
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
}

/// The argument of the kernel: `Quantize1x128Params` in `kernels/quantize/quantize.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantize1x128Params {
    input: u64,
    codes: u64,
    scales: u64,
    rows: u32,
    hidden: u32,
    groups: u32,
    input_stride: u32,
    scale_row_stride: u32,
    scale_group_stride: u32,
    max: f32,
    inverse_max: f32,
}

const _: () = assert!(size_of::<Quantize1x128Params>() == 56);

// SAFETY: `repr(C)`, three fields of 8 bytes and eight of 4, 56 bytes in all, so there is no padding; the struct in
// `kernels/quantize/quantize.h` has the same fields in the same order.
unsafe impl KernelParams for Quantize1x128Params {}

impl Quantize1x128 {
    /// FP8 codes that are written.
    pub fn code_bytes(&self) -> usize {
        self.rows * self.hidden
    }

    /// Scales that are written or skipped over.
    pub fn scale_len(&self) -> usize {
        match self.scales {
            ScaleOrder::RowMajor => self.rows * self.hidden.div_ceil(GROUP),
            ScaleOrder::Transposed { stride } => self.hidden.div_ceil(GROUP) * stride,
        }
    }

    /// The call. A grid of 0 blocks means that there is nothing to do.
    ///
    /// # Errors
    /// [`BadLaunch`] for sizes that are no multiples of 8 or are too large.
    pub fn launch(&self, buffers: QuantizeBuffers) -> Result<Launch<Quantize1x128Params>, BadLaunch> {
        let narrow = |what, size| BadLaunch::narrow(NAME, what, size);
        BadLaunch::multiple(NAME, "hidden", self.hidden, LANE)?;
        BadLaunch::multiple(NAME, "input stride", self.input_stride, LANE)?;
        let groups = self.hidden.div_ceil(GROUP);
        // The kernel counts them in 32 bits, up to the end of the last block.
        let all_groups = self.rows.saturating_mul(groups).next_multiple_of(GROUPS_PER_BLOCK as usize);
        let (scale_row_stride, scale_group_stride) = match self.scales {
            ScaleOrder::RowMajor => (groups, 1),
            ScaleOrder::Transposed { stride } => (1, stride),
        };
        let max = self.format.max();
        Ok(Launch {
            object: NAME,
            kernel: NAME,
            grid: narrow("groups of all rows", all_groups)?.div_ceil(GROUPS_PER_BLOCK),
            block: THREADS,
            shared_bytes: 0,
            params: Quantize1x128Params {
                input: buffers.input,
                codes: buffers.codes,
                scales: buffers.scales,
                rows: narrow("rows", self.rows)?,
                hidden: narrow("hidden", self.hidden)?,
                groups: narrow("groups", groups)?,
                input_stride: narrow("input stride", self.input_stride)?,
                scale_row_stride: narrow("scale stride", scale_row_stride)?,
                scale_group_stride: narrow("scale stride", scale_group_stride)?,
                max,
                inverse_max: 1.0 / max,
            },
        })
    }
}
