//! What the reference all-gather hands to the experts.

use fused_moe_core::{DType, Element, KernelKind, MoeConfig, Plan, ReceivedRows, TensorView};
use half::bf16;

use super::message::Gathered;

/// All tokens of all ranks, in rank order.
pub(super) struct Received {
    payload: DType,
    bf16_rows: Vec<bf16>,
    codes: Vec<u8>,
    scales: Vec<f32>,
    pub(super) ids: Vec<i32>,
    pub(super) weights: Vec<f32>,
    pub(super) logits: Vec<f32>,
    pub(super) count: [i32; 1],
    pub(super) dims: RowDims,
}

/// Elements per row.
#[derive(Clone, Copy)]
pub(super) struct RowDims {
    max_rows: usize,
    hidden: usize,
    scales: usize,
    pub(super) top_k: usize,
    pub(super) experts: usize,
}

impl Received {
    pub(super) fn new(config: &MoeConfig, plan: &Plan) -> Self {
        let (max_rows, wire) = (plan.max_rows(), plan.wire());
        let modular = plan.kind() == KernelKind::Modular;
        let dims = RowDims {
            max_rows,
            hidden: config.hidden,
            scales: wire.scales_per_token(config.hidden),
            top_k: if modular { config.top_k } else { 0 },
            experts: if modular { 0 } else { config.num_experts() },
        };
        let (in_bf16, in_codes) = if wire.payload == DType::Bf16 { (1, 0) } else { (0, 1) };
        Self {
            payload: wire.payload,
            bf16_rows: vec![bf16::ZERO; in_bf16 * max_rows * dims.hidden],
            codes: vec![0; in_codes * max_rows * dims.hidden],
            scales: vec![0.0; max_rows * dims.scales],
            ids: vec![0; max_rows * dims.top_k],
            weights: vec![0.0; max_rows * dims.top_k],
            logits: vec![0.0; max_rows * dims.experts],
            count: [0],
            dims,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.bf16_rows.as_slice())
            + size_of_val(self.codes.as_slice())
            + 4 * (self.scales.len() + self.ids.len() + self.weights.len() + self.logits.len())
    }

    /// Fills the tensors from the messages. Rows behind the count become NaN: nobody may read them.
    pub(super) fn fill(&mut self, gathered: &Gathered) {
        self.bf16_rows.fill(bf16::NAN);
        self.codes.fill(0xff);
        self.scales.fill(f32::NAN);
        let mut first = 0;
        for (_, count, mut rest) in gathered.parts() {
            let mut take = |width: usize| {
                let (head, tail) = rest.split_at((count * width).min(rest.len()));
                rest = tail;
                head
            };
            let RowDims { hidden, scales, top_k, experts, .. } = self.dims;
            if self.codes.is_empty() {
                words(take(hidden * 2), &mut self.bf16_rows[first * hidden..], bf16::from_le_bytes);
            } else {
                words(take(hidden), &mut self.codes[first * hidden..], u8::from_le_bytes);
            }
            words(take(scales * 4), &mut self.scales[first * scales..], f32::from_ne_bytes);
            words(take(top_k * 4), &mut self.ids[first * top_k..], i32::from_le_bytes);
            words(take(top_k * 4), &mut self.weights[first * top_k..], f32::from_le_bytes);
            words(take(experts * 4), &mut self.logits[first * experts..], f32::from_le_bytes);
            first += count;
        }
        self.count = [first as i32];
    }

    pub(super) fn hidden(&self) -> TensorView<'_> {
        let dims = [self.dims.max_rows, self.dims.hidden];
        let view = match self.codes.is_empty() {
            true => TensorView::from_slice(&self.bf16_rows, DType::Bf16, &dims),
            false => TensorView::from_slice(&self.codes, self.payload, &dims),
        };
        view.expect("the vector was made for these dimensions")
    }

    pub(super) fn view<'a, T: Element>(&self, slice: &'a [T], dtype: DType, width: usize) -> TensorView<'a> {
        let view = TensorView::from_slice(slice, dtype, &[self.dims.max_rows, width]);
        view.expect("the vector was made for these dimensions")
    }

    pub(super) fn scale(&self) -> Option<TensorView<'_>> {
        (self.dims.scales > 0).then(|| self.view(&self.scales, DType::F32, self.dims.scales))
    }

    pub(super) fn rows(&self) -> ReceivedRows<'_> {
        ReceivedRows(TensorView::from_slice(&self.count, DType::I32, &[1]).expect("one element"))
    }
}

fn words<T, const N: usize>(bytes: &[u8], to: &mut [T], decode: impl Fn([u8; N]) -> T) {
    let (chunks, _) = bytes.as_chunks::<N>();
    to.iter_mut().zip(chunks).for_each(|(to, &chunk)| *to = decode(chunk));
}
