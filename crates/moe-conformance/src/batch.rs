//! Batches as a dispatch would hand them to the experts of one rank, with garbage behind the valid rows.

use fused_moe_core::{
    ActivationFormat, Arrived, CombineKind, DType, Dispatched, DispatchedMonolithic, ExpertPlacement,
    ExpertsCaps, Fp8Format, KernelKind, Plan, PrepareCaps, QuantScheme, Rank, ReceivedRows, RouterWeight,
    ScaleLayout, TensorView, TokensPerExpert, TopK, Unsupported, WireFormat, negotiate,
};
use half::bf16;

use crate::case::{Case, RankInput};
use crate::device::{Bytes, Placed, TestDevice};
use crate::oracle::Codes;
use crate::outcome::{Check, fail};
use crate::wire::Encoding;

/// Garbage rows behind the valid ones.
const GARBAGE: usize = 5;

/// The rows that a rank received in a round.
pub(crate) struct Batch {
    format: ActivationFormat,
    wire: WireFormat,
    hidden: usize,
    top_k: usize,
    pub(crate) max_rows: usize,
    /// `[rows, hidden]` before any quantisation.
    raw: Vec<bf16>,
    /// `[rows, hidden]` as they were quantised by their sources; exact where they were not.
    decoded: Vec<f64>,
    /// `[rows, top_k]`.
    pub(crate) ids: Vec<i32>,
    /// `[rows, top_k]`.
    pub(crate) weights: Vec<f32>,
    logits: Vec<f32>,
    num_experts: usize,
    /// Positions of each local expert's rows, in order, for the batched format.
    pub(crate) of_expert: Vec<Vec<usize>>,
    codes: Vec<u8>,
    elements: Vec<bf16>,
    scales: Vec<f32>,
    counts: Vec<i32>,
}

/// What batches are made for.
#[derive(Clone, Copy)]
pub(crate) struct Receiver<'a> {
    pub(crate) case: &'a Case,
    pub(crate) rank: Rank,
    pub(crate) wire: WireFormat,
    pub(crate) format: ActivationFormat,
}

impl Batch {
    /// The rows of `inputs` that name an expert of the rank, and every third of the others: some comms send
    /// all. Each source has quantised its own.
    pub(crate) fn new(receiver: Receiver<'_>, inputs: &[RankInput]) -> Self {
        let Receiver { case, rank, wire, format } = receiver;
        let Case { hidden, top_k, num_experts, .. } = *case;
        let encoding = Encoding {
            wire,
            format: case.quant.fp8(),
            static_scale: case.static_scale(),
            router_weight: RouterWeight::OnOutput,
            kind: KernelKind::Modular,
        };
        let per_row = wire.scales_per_token(hidden);
        let (mut raw, mut decoded, mut payload, mut scales) = (vec![], vec![], vec![], vec![]);
        let (mut ids, mut weights, mut logits) = (vec![], vec![], vec![]);
        for input in inputs {
            let (bytes, scale_bytes) = encoding.encode(&input.hidden, hidden);
            let values = encoding.decoded(&input.hidden, hidden);
            let (scale_values, _) = scale_bytes.as_chunks::<4>();
            for token in 0..input.num_tokens {
                let row_ids = &input.ids[token * top_k..][..top_k];
                let needed = row_ids.iter().any(|&id| case.placement.rank_of_slot(id) == Some(rank));
                if !needed && token % 3 != 0 {
                    continue;
                }
                raw.extend_from_slice(&input.hidden[token * hidden..][..hidden]);
                decoded.extend_from_slice(&values[token * hidden..][..hidden]);
                let width = wire.payload_bytes(hidden);
                payload.extend_from_slice(&bytes[token * width..][..width]);
                let row_scales = &scale_values[token * per_row..][..per_row];
                scales.extend(row_scales.iter().map(|&s| f32::from_ne_bytes(s)));
                ids.extend_from_slice(row_ids);
                weights.extend_from_slice(&input.weights[token * top_k..][..top_k]);
                logits.extend_from_slice(&input.logits[token * num_experts..][..num_experts]);
            }
        }
        let mut batch = Self {
            format,
            wire,
            hidden,
            top_k,
            max_rows: 0,
            raw,
            decoded,
            of_expert: rows_of_experts(&case.placement, rank, (&ids, top_k)),
            ids,
            weights,
            logits,
            num_experts,
            codes: vec![],
            elements: vec![],
            scales: vec![],
            counts: vec![],
        };
        batch.lay_out(&payload, &scales, per_row);
        batch
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.raw.len() / self.hidden
    }

    /// Places the rows where the format wants them and fills the rest with garbage.
    fn lay_out(&mut self, payload: &[u8], scales: &[f32], per_row: usize) {
        let blocks: Vec<Vec<usize>> = match self.format {
            ActivationFormat::Standard => vec![(0..self.num_rows()).collect()],
            ActivationFormat::BatchedExperts => self.of_expert.clone(),
        };
        let most = blocks.iter().map(Vec::len).max().unwrap_or(0);
        self.max_rows = most + GARBAGE;
        self.counts = blocks.iter().map(|rows| rows.len() as i32).collect();
        let width = self.wire.payload_bytes(self.hidden);
        for block in &blocks {
            for place in 0..self.max_rows {
                // NaN catches who reads the row, a huge number catches who lets it take part in a scale.
                let (nan_or_huge, nan_code) = match place % 2 {
                    0 => (bf16::NAN, if self.wire.payload == DType::Fp8E4M3Fnuz { 0x80 } else { 0x7f }),
                    _ => (bf16::MAX, 0x7e),
                };
                match (block.get(place), self.wire.scale.is_some()) {
                    (Some(&row), true) => {
                        self.codes.extend_from_slice(&payload[row * width..][..width]);
                        self.scales.extend_from_slice(&scales[row * per_row..][..per_row]);
                    }
                    (Some(&row), false) => {
                        self.elements.extend_from_slice(&self.raw[row * self.hidden..][..self.hidden]);
                    }
                    (None, true) => {
                        self.codes.extend(std::iter::repeat_n(nan_code, self.hidden));
                        self.scales.extend(std::iter::repeat_n(f32::MAX, per_row));
                    }
                    (None, false) => self.elements.extend(std::iter::repeat_n(nan_or_huge, self.hidden)),
                }
            }
        }
        let rows = self.num_rows();
        let slots = self.max_rows.max(rows) * self.top_k;
        let (count, top_k) = (rows * self.top_k, self.top_k);
        // Behind the count every slot names an expert that exists.
        self.ids.extend((count..slots).map(|slot| (slot % top_k) as i32));
        self.weights.extend((count..slots).map(|_| f32::NAN));
        self.logits.resize(self.max_rows.max(rows) * self.num_experts, f32::NAN);
    }

    /// The rows as gemm1 must see them, for each reading of "per tensor" that is allowed where experts quantise:
    /// over all received rows, or over those that name a local expert.
    pub(crate) fn values(&self, case: &Case, rank: Rank, codes: Codes) -> Vec<Vec<f64>> {
        if self.wire.scale.is_some() {
            return vec![self.decoded.clone()];
        }
        let all = codes.through(&self.raw, self.hidden);
        if !codes.couples_rows() {
            return vec![all];
        }
        let mut needed = self.raw.clone();
        for (row, ids) in needed.chunks_exact_mut(self.hidden).zip(self.ids.chunks_exact(self.top_k)) {
            if ids.iter().all(|&id| case.placement.rank_of_slot(id) != Some(rank)) {
                row.fill(bf16::ZERO);
            }
        }
        vec![all, codes.through(&needed, self.hidden)]
    }

    fn front(&self) -> Vec<usize> {
        match self.format {
            ActivationFormat::Standard => vec![self.max_rows],
            ActivationFormat::BatchedExperts => vec![self.counts.len(), self.max_rows],
        }
    }

    fn payload(&self) -> (TensorView<'_>, Option<TensorView<'_>>) {
        let dims = [self.front(), vec![self.hidden]].concat();
        let hidden = match self.wire.scale {
            Some(_) => view(&self.codes, self.wire.payload, &dims),
            None => view(&self.elements, DType::Bf16, &dims),
        };
        let scale_dims = [self.front(), vec![self.wire.scales_per_token(self.hidden)]].concat();
        (hidden, self.wire.scale.map(|_| view(&self.scales, DType::F32, &scale_dims)))
    }

    pub(crate) fn dispatched(&self) -> Dispatched<'_> {
        let (hidden, scale) = self.payload();
        let arrived = match self.format {
            ActivationFormat::Standard => {
                let dims = [self.max_rows, self.top_k];
                let topk = TopK {
                    ids: view(&self.ids, DType::I32, &dims),
                    weights: view(&self.weights, DType::F32, &dims),
                };
                Arrived::Standard { topk, rows: ReceivedRows(view(&self.counts, DType::I32, &[1])) }
            }
            ActivationFormat::BatchedExperts => {
                let tokens = TokensPerExpert(view(&self.counts, DType::I32, &[self.counts.len()]));
                Arrived::Batched { tokens }
            }
        };
        Dispatched { hidden, scale, arrived, output: None }
    }

    /// The rows on a device; how many there are stays on the host.
    pub(crate) fn upload(&self, device: &dyn TestDevice) -> Check<Uploaded> {
        if self.format != ActivationFormat::Standard {
            return fail("on devices the suite makes rows of the standard format");
        }
        let (hidden, dtype) = match self.wire.scale {
            Some(_) => (self.codes.to_bytes(), self.wire.payload),
            None => (self.elements.to_bytes(), DType::Bf16),
        };
        let slots = [self.max_rows, self.top_k];
        let per_row = self.wire.scales_per_token(self.hidden);
        let scale = self.wire.scale.map(|_| {
            Placed::upload(device, &self.scales.to_bytes(), (DType::F32, &[self.max_rows, per_row]))
        });
        Ok(Uploaded {
            hidden: Placed::upload(device, &hidden, (dtype, &[self.max_rows, self.hidden]))?,
            scale: scale.transpose()?,
            ids: Placed::upload(device, &self.ids.to_bytes(), (DType::I32, &slots))?,
            weights: Placed::upload(device, &self.weights.to_bytes(), (DType::F32, &slots))?,
            rows: [self.num_rows() as i32],
        })
    }

    pub(crate) fn dispatched_monolithic(&self) -> DispatchedMonolithic<'_> {
        let (hidden, scale) = self.payload();
        DispatchedMonolithic {
            hidden,
            scale,
            logits: view(&self.logits, DType::F32, &[self.max_rows, self.num_experts]),
            rows: ReceivedRows(view(&self.counts, DType::I32, &[1])),
            output: None,
        }
    }
}

/// A batch on a device.
pub(crate) struct Uploaded {
    hidden: Placed,
    scale: Option<Placed>,
    ids: Placed,
    weights: Placed,
    rows: [i32; 1],
}

impl Uploaded {
    pub(crate) fn dispatched(&self) -> Check<Dispatched<'_>> {
        let topk = TopK { ids: self.ids.view()?, weights: self.weights.view()? };
        Ok(Dispatched {
            hidden: self.hidden.view()?,
            scale: self.scale.as_ref().map(Placed::view).transpose()?,
            arrived: Arrived::Standard { topk, rows: ReceivedRows(view(&self.rows, DType::I32, &[1])) },
            output: None,
        })
    }
}

fn view<'a, T: fused_moe_core::Element>(slice: &'a [T], dtype: DType, dims: &[usize]) -> TensorView<'a> {
    TensorView::from_slice(slice, dtype, dims).expect("the vector was made for these dimensions")
}

/// The rows that name each local expert, in local order.
fn rows_of_experts(
    placement: &ExpertPlacement,
    rank: Rank,
    (ids, top_k): (&[i32], usize),
) -> Vec<Vec<usize>> {
    let experts = placement.experts_of(rank);
    let rows = experts.map(|id| {
        let rows = ids.chunks_exact(top_k).enumerate();
        rows.filter(|(_, ids)| ids.contains(&(id.0 as i32))).map(|(row, _)| row).collect()
    });
    rows.collect()
}

/// The plan of experts with `caps` and a comm that hands over batches of `max_rows` in `wire`.
pub(crate) fn plan_for(
    case: &Case,
    caps: &ExpertsCaps,
    wire: WireFormat,
    max_rows: usize,
) -> Result<Plan, Vec<Unsupported>> {
    let mut comm = PrepareCaps::host("conformance_rows", caps.kind, vec![wire], max_rows);
    comm.format = caps.format;
    comm.topk_id = caps.topk_id;
    comm.devices = vec![case.device];
    if caps.weight_and_reduce.is_delegate() {
        comm.combine = CombineKind::WeightAndReduce;
    }
    negotiate(&case.config(), &comm, caps)
}

/// Whether this suite can write rows of `wire`: f32 scales, row by row, in the FP8 format of the scheme.
pub(crate) fn writable(wire: WireFormat, quant: QuantScheme) -> bool {
    match wire.scale {
        None => wire.payload == DType::Bf16,
        Some(scale) => {
            let dynamic = ScaleLayout::dynamic_f32(scale.granularity);
            let of_scheme = ScaleLayout { source: quant.scale_source(), ..dynamic };
            scale == of_scheme && quant.fp8().map(Fp8Format::dtype) == Some(wire.payload)
        }
    }
}
