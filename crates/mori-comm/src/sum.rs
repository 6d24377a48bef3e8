//! Rows of outputs, how they travel, and their sums.

use std::num::NonZeroUsize;

use fused_moe_core::{CombineWire, Granularity, MoeConfig, Plan};
use half::bf16;
use quant::{Isa, RowQuantizer, Term, decode_table, sum_rows};
use smallvec::SmallVec;

use crate::record::copy_bytes;

/// Room for the rows of a sum, in their order. More than these are rare, and cost an allocation.
pub(crate) type FewRows<T> = SmallVec<[T; 16]>;

/// A row of the layer's output.
pub(crate) enum OutputRow<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

/// Adds up rows as they travel, in bf16 or in FP8.
pub(crate) struct Sums {
    fp8: Option<Fp8>,
}

impl Sums {
    pub fn new(config: &MoeConfig, plan: &Plan) -> Self {
        Self { fp8: Fp8::of_plan(config, plan) }
    }

    /// Bytes of bookkeeping.
    pub fn local_bytes(config: &MoeConfig, plan: &Plan) -> usize {
        match plan.combine_wire() {
            CombineWire::Fp8Block(_) => {
                (config.hidden + GROUPS.scales_per_token(config.hidden)) * size_of::<f32>()
            }
            _ => 0,
        }
    }

    /// What is allocated of it.
    pub fn allocated_bytes(&self) -> usize {
        self.fp8.as_ref().map_or(0, |fp8| size_of_val(&*fp8.sum) + size_of_val(&*fp8.scales))
    }

    /// Writes the sum of `rows`, in f32 and rounded once.
    pub fn write<'a>(&mut self, rows: impl Iterator<Item = &'a [u8]>, out: OutputRow<'_>) {
        match (&mut self.fp8, out) {
            (None, out) => {
                let terms: FewRows<_> = rows.map(|row| Term::of(elements_of(row))).collect();
                match out {
                    OutputRow::F32(out) => sum_rows(Isa::detect(), &terms, out),
                    OutputRow::Bf16(out) => sum_rows(Isa::detect(), &terms, out),
                }
            }
            (Some(fp8), OutputRow::F32(out)) => out.copy_from_slice(fp8.sum(rows)),
            (Some(fp8), OutputRow::Bf16(out)) => {
                out.iter_mut().zip(fp8.sum(rows)).for_each(|(out, &sum)| *out = bf16::from_f32(sum));
            }
        }
    }

    /// Whether rows are quantised before they travel.
    pub fn quantises(&self) -> bool {
        self.fp8.is_some()
    }

    /// Writes `row` as it travels.
    pub fn pack(&mut self, row: &[bf16], out: &mut [u8]) {
        match &mut self.fp8 {
            None => out.copy_from_slice(bytes_of(row)),
            Some(fp8) => fp8.pack(row, out),
        }
    }
}

/// Columns that share a scale.
const GROUP: usize = 128;
const GROUPS: Granularity = Granularity::Group(NonZeroUsize::new(GROUP).unwrap());

/// Rows of FP8 codes, with their scales behind them.
struct Fp8 {
    quantizer: RowQuantizer,
    values: &'static [f32; 256],
    sum: Vec<f32>,
    scales: Vec<f32>,
}

impl Fp8 {
    fn of_plan(config: &MoeConfig, plan: &Plan) -> Option<Self> {
        let CombineWire::Fp8Block(format) = plan.combine_wire() else { return None };
        Some(Self {
            quantizer: RowQuantizer::new(format),
            values: decode_table(format),
            sum: vec![0.0; config.hidden],
            scales: vec![0.0; GROUPS.scales_per_token(config.hidden)],
        })
    }

    fn pack(&mut self, row: &[bf16], out: &mut [u8]) {
        let (codes, scales) = out.split_at_mut(row.len());
        let packed = self.quantizer.quantize_per_group(row, GROUPS, codes, &mut self.scales);
        packed.expect("codes and scales have the lengths of a row");
        copy_bytes(scales, &self.scales, f32::to_ne_bytes);
    }

    fn sum<'a>(&mut self, rows: impl Iterator<Item = &'a [u8]>) -> &[f32] {
        let Self { values, sum, .. } = self;
        sum.fill(0.0);
        for row in rows {
            let (codes, scales) = row.split_at(sum.len());
            let groups = codes.chunks(GROUP).zip(sum.chunks_mut(GROUP));
            for ((codes, sum), &scale) in groups.zip(scales.as_chunks::<4>().0) {
                let scale = f32::from_ne_bytes(scale);
                sum.iter_mut().zip(codes).for_each(|(sum, &code)| *sum += values[usize::from(code)] * scale);
            }
        }
        sum
    }
}

/// Bytes of a row that travels.
pub(crate) fn travelling_bytes(config: &MoeConfig, plan: &Plan) -> usize {
    let format = plan.combine_wire().format(config.in_dtype);
    format.payload_bytes(config.hidden) + format.scale_bytes(config.hidden)
}

/// The bytes of `elements`.
pub(crate) fn bytes_of(elements: &[bf16]) -> &[u8] {
    // SAFETY: a bf16 is two initialised bytes without padding, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) }
}

/// `bytes` of a region as elements.
pub(crate) fn elements_of(bytes: &[u8]) -> &[bf16] {
    // SAFETY: any two bytes are a bf16.
    let (before, elements, behind) = unsafe { bytes.align_to() };
    assert!(before.is_empty() && behind.is_empty(), "a row of a region begins and ends with an element");
    elements
}
