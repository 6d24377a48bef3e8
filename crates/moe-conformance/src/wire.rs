//! Rows as they travel: what a source must send and what a rank has received, byte for byte.

use fused_moe_core::{Fp8Format, Granularity, KernelKind, RouterWeight, WireFormat};
use half::bf16;

use crate::case::{Case, RankInput};
use crate::oracle::{QuantizedRows, dequantize_rows, quantize_rows_scaled, weighted_rows};

/// One row with everything that travels with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct WireRow {
    pub(crate) payload: Vec<u8>,
    pub(crate) scales: Vec<u8>,
    pub(crate) ids: Vec<i32>,
    /// Bits of the f32 weights.
    pub(crate) weights: Vec<u32>,
    /// Bits of the f32 logits of a monolithic round.
    pub(crate) logits: Vec<u32>,
}

impl WireRow {
    /// A number that stands for payload and scales, whatever else came with them.
    pub(crate) fn key(&self) -> u64 {
        let bytes = self.payload.iter().chain(&self.scales);
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    }

    /// What differs from `other`, in words.
    pub(crate) fn difference(&self, other: &Self) -> String {
        let first = |a: &[u8], b: &[u8]| a.iter().zip(b).position(|(a, b)| a != b);
        let mut found = Vec::new();
        if self.payload != other.payload {
            let at = first(&self.payload, &other.payload);
            found.push(format!("payload differs from byte {at:?} on"));
        }
        if self.scales != other.scales {
            found.push(format!("scale bytes are {:?}, not {:?}", self.scales, other.scales));
        }
        if self.ids != other.ids {
            found.push(format!("ids are {:?}, not {:?}", self.ids, other.ids));
        }
        if self.weights != other.weights {
            let floats = |bits: &[u32]| bits.iter().map(|&b| f32::from_bits(b)).collect::<Vec<_>>();
            found.push(format!("weights are {:?}, not {:?}", floats(&self.weights), floats(&other.weights)));
        }
        if self.logits != other.logits {
            found.push("logits differ".into());
        }
        found.join("; ")
    }
}

/// How rows are written for a wire format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Encoding {
    pub(crate) wire: WireFormat,
    /// The format of the codes, with its largest magnitude.
    pub(crate) format: Option<Fp8Format>,
    /// The static scale of the layer, if the scheme has one.
    pub(crate) static_scale: Option<f32>,
    pub(crate) router_weight: RouterWeight,
    /// Whether ids and weights travel with a row, or logits.
    pub(crate) kind: KernelKind,
}

impl Encoding {
    fn quantized(&self) -> Option<(Fp8Format, Granularity)> {
        self.wire.scale.zip(self.format).map(|(scale, format)| (format, scale.granularity))
    }

    /// The rows that a source must send for its tokens of one round.
    pub(crate) fn sent(&self, case: &Case, input: &RankInput) -> Vec<WireRow> {
        let Case { hidden, top_k, num_experts, .. } = *case;
        let early = self.router_weight == RouterWeight::OnInputByPrepare;
        let rows = match early {
            true => weighted_rows(&input.hidden, &input.weights, hidden),
            false => input.hidden.clone(),
        };
        let (codes, scales) = self.encode(&rows, hidden);
        let (width, per_row) = (self.wire.payload_bytes(hidden), self.wire.scale_bytes(hidden));
        let weight = |w: &f32| if early { 1f32.to_bits() } else { w.to_bits() };
        let row = |token: usize| {
            let payload = codes[token * width..][..width].to_vec();
            let scales = scales[token * per_row..][..per_row].to_vec();
            let slots = token * top_k..(token + 1) * top_k;
            match self.kind {
                KernelKind::Modular => {
                    let ids = input.ids[slots.clone()].to_vec();
                    let weights = input.weights[slots].iter().map(weight).collect();
                    WireRow { payload, scales, ids, weights, ..WireRow::default() }
                }
                KernelKind::Monolithic => {
                    let logits = &input.logits[token * num_experts..][..num_experts];
                    let logits = logits.iter().map(|l| l.to_bits()).collect();
                    WireRow { payload, scales, logits, ..WireRow::default() }
                }
            }
        };
        (0..input.num_tokens).map(row).collect()
    }

    /// Payload and scales of `rows`, `[tokens, hidden]`, all of one source.
    pub(crate) fn encode(&self, rows: &[bf16], hidden: usize) -> (Vec<u8>, Vec<u8>) {
        match self.quantized() {
            Some((format, granularity)) => {
                let QuantizedRows { codes, scales } =
                    quantize_rows_scaled(format, granularity, (rows, hidden), self.static_scale);
                (codes, scales.iter().flat_map(|s| s.to_ne_bytes()).collect())
            }
            None => (rows.iter().flat_map(|x| x.to_ne_bytes()).collect(), Vec::new()),
        }
    }

    /// The values of `rows` after the trip, as the receiver reads them; exact without quantisation.
    pub(crate) fn decoded(&self, rows: &[bf16], hidden: usize) -> Vec<f64> {
        match self.quantized() {
            Some((format, granularity)) => {
                let quantized = quantize_rows_scaled(format, granularity, (rows, hidden), self.static_scale);
                dequantize_rows(format, granularity, &quantized, hidden)
            }
            None => rows.iter().map(|x| x.to_f64()).collect(),
        }
    }
}
