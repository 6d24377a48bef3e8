//! Random layers and batches, a call with everything poisoned, and what it must give in f64.
#![allow(dead_code, reason = "every test file uses its own part")]

pub mod reference;

use aiter_experts::AiterExperts;
use fused_moe_core::*;
use half::bf16;
use quant::{Activations as QuantRows, Quantizer, WeightQuantizer, WeightScales};
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

pub const FN: Fp8Format = Fp8Format::E4M3Fn;
pub const FNUZ: Fp8Format = Fp8Format::E4M3Fnuz;

/// A fresh generator whose seed is printed if the test fails.
pub fn fresh_rng() -> Pcg64Mcg {
    let seed = rand::random();
    println!("seed {seed}");
    Pcg64Mcg::seed_from_u64(seed)
}

/// Sizes of a test layer.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub hidden: usize,
    pub intermediate: usize,
    pub experts: usize,
    pub top_k: usize,
}

pub const RAGGED: Shape = Shape { hidden: 160, intermediate: 96, experts: 8, top_k: 3 };

pub fn config(quant: QuantScheme, shape: Shape, placement: ExpertPlacement) -> MoeConfig {
    MoeConfig {
        hidden: shape.hidden,
        intermediate: shape.intermediate,
        top_k: shape.top_k,
        max_tokens_per_rank: 64,
        in_dtype: DType::Bf16,
        quant,
        activation: Activation::Silu,
        apply_router_weight_on_input: false,
        expert_bias: false,
        padding: Default::default(),
        redundant_experts: 0,
        max_received_rows: None,
        combine_wire: Default::default(),
        routing: None,
        ranks_per_node: placement.ep_size(),
        placement,
        device: DeviceKind::Host,
    }
}

pub fn on_one_rank(quant: QuantScheme, shape: Shape) -> MoeConfig {
    config(quant, shape, ExpertPlacement::linear(shape.experts, 1).unwrap())
}

/// A weight in its stored form, and the values it stands for.
pub struct Matrix {
    pub dims: [usize; 2],
    pub bf16: Vec<bf16>,
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
    pub values: Vec<f64>,
    quant: QuantScheme,
}

impl Matrix {
    fn random(rng: &mut Pcg64Mcg, quant: QuantScheme, dims: [usize; 2]) -> Self {
        let [n, k] = dims;
        let size = 2.0 / (k as f32).sqrt();
        let values = (0..n * k).map(|_| bf16::from_f32(rng.random_range(-size..size)));
        let bf16: Vec<bf16> = values.collect();
        let mut matrix = Matrix { dims, values: vec![], codes: vec![], scales: vec![], bf16, quant };
        let Some(format) = quant.fp8() else {
            matrix.values = matrix.bf16.iter().map(|v| v.to_f64()).collect();
            return matrix;
        };
        let scales = match quant {
            QuantScheme::Fp8Block(_) => WeightScales::Block,
            QuantScheme::Fp8Ptpc(_) => WeightScales::Channel,
            _ => WeightScales::Tensor,
        };
        matrix.codes = vec![0; n * k];
        matrix.scales = vec![0.0; scales.count(n, k)];
        let view = TensorView::from_slice(&matrix.bf16, DType::Bf16, &dims).unwrap();
        let quantizer = WeightQuantizer::new(format, scales);
        quantizer.quantize(view, &mut matrix.codes, &mut matrix.scales).unwrap();
        let scale_of = |row: usize, column: usize| match scales {
            WeightScales::Block => row / 128 * k.div_ceil(128) + column / 128,
            WeightScales::Channel => row,
            _ => 0,
        };
        matrix.values = (0..n * k)
            .map(|i| {
                let scale = matrix.scales[scale_of(i / k, i % k)];
                f64::from(quant::decode(format, matrix.codes[i])) * f64::from(scale)
            })
            .collect();
        matrix
    }

    pub fn lend(&self) -> WeightMatrix<'_> {
        let [n, k] = self.dims;
        let Some(format) = self.quant.fp8() else {
            return WeightMatrix::unquantized(
                TensorView::from_slice(&self.bf16, DType::Bf16, &self.dims).unwrap(),
            );
        };
        let scales = |dims: &[usize]| TensorView::from_slice(&self.scales, DType::F32, dims).unwrap();
        let scale = match self.quant {
            QuantScheme::Fp8Block(_) => WeightScale::Block128(scales(&[n.div_ceil(128), k.div_ceil(128)])),
            QuantScheme::Fp8Ptpc(_) => WeightScale::Channel(scales(&[n])),
            _ => WeightScale::Tensor(self.scales[0]),
        };
        let values = TensorView::from_slice(&self.codes, format.dtype(), &self.dims).unwrap();
        WeightMatrix { values, scale: Some(scale), bias: None, input_scale: None }
    }
}

/// gate, up and down of one expert.
pub struct Expert {
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
}

impl Expert {
    pub fn lend(&self) -> ExpertMatrices<'_> {
        ExpertMatrices { gate: self.gate.lend(), up: self.up.lend(), down: self.down.lend() }
    }
}

/// All experts of a layer.
pub struct Layer {
    pub experts: Vec<Expert>,
}

impl Layer {
    pub fn random(rng: &mut Pcg64Mcg, config: &MoeConfig) -> Self {
        let (h, i) = (config.hidden, config.intermediate);
        let mut matrix = |dims| Matrix::random(rng, config.quant, dims);
        let experts = (0..config.num_experts())
            .map(|_| Expert { gate: matrix([i, h]), up: matrix([i, h]), down: matrix([h, i]) })
            .collect();
        Layer { experts }
    }

    pub fn pack(&self, config: &MoeConfig, rank: Rank) -> ExpertWeights {
        let local = config.placement.experts_of(rank).map(|id| self.experts[id.0 as usize].lend());
        AiterExperts::new().pack(config, rank, &local.collect::<Vec<_>>()).unwrap()
    }
}

/// Rows that arrived on a rank. Everything behind `rows` is poison.
#[derive(Clone, Debug)]
pub struct Batch {
    pub rows: usize,
    pub x: Vec<bf16>,
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
}

impl Batch {
    /// `rows` of `max_rows` rows, distinct experts in every row, some slots -1.
    pub fn random(rng: &mut Pcg64Mcg, config: &MoeConfig, [rows, max_rows]: [usize; 2]) -> Self {
        let (hidden, top_k) = (config.hidden, config.top_k);
        let mut batch = Batch {
            rows,
            x: vec![bf16::NAN; max_rows * hidden],
            ids: vec![i32::MAX; max_rows * top_k],
            weights: vec![f32::NAN; max_rows * top_k],
        };
        for row in 0..rows {
            // Rows of different magnitude, so that a scale of another row is noticed.
            let size = rng.random_range(0.1f32..4.0);
            for x in &mut batch.x[row * hidden..][..hidden] {
                *x = bf16::from_f32(size * rng.random_range(-1.0..1.0));
            }
            let chosen = sample(rng, config.num_experts(), top_k);
            for (slot, expert) in chosen.iter().enumerate() {
                let padded = rng.random_bool(0.1);
                batch.ids[row * top_k + slot] = if padded { -1 } else { expert as i32 };
                batch.weights[row * top_k + slot] = rng.random_range(0.1..1.0);
            }
        }
        batch
    }

    /// The batch of one of its rows.
    pub fn only(&self, config: &MoeConfig, row: usize) -> Self {
        let cut = |k: usize| row * k..(row + 1) * k;
        Batch {
            rows: 1,
            x: self.x[cut(config.hidden)].to_vec(),
            ids: self.ids[cut(config.top_k)].to_vec(),
            weights: self.weights[cut(config.top_k)].to_vec(),
        }
    }

    pub fn max_rows(&self, config: &MoeConfig) -> usize {
        self.x.len() / config.hidden
    }
}

/// Rows as dispatch brings them: quantised, or the batch's own bf16.
pub struct Payload {
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
}

impl Payload {
    /// Quantises the valid rows as two source ranks would, each its half; poison behind them.
    pub fn quantize(config: &MoeConfig, batch: &Batch) -> Self {
        let (hidden, max_rows) = (config.hidden, batch.max_rows(config));
        let groups = config.quant.quantized_wire(DType::Bf16).scales_per_token(hidden);
        let nan = quant::encode(config.quant.fp8().unwrap(), f32::NAN);
        let mut payload =
            Payload { codes: vec![nan; max_rows * hidden], scales: vec![f32::NAN; max_rows * groups] };
        let quantizer = Quantizer::for_scheme(config.quant);
        for half in source_ranks(batch.rows) {
            let x = &batch.x[half.start * hidden..half.end * hidden];
            let view = TensorView::from_slice(x, DType::Bf16, &[half.len(), hidden]).unwrap();
            let codes = &mut payload.codes[half.start * hidden..half.end * hidden];
            let scales = &mut payload.scales[half.start * groups..half.end * groups];
            quantizer.quantize_rows(QuantRows::of(view), codes, scales).unwrap();
        }
        payload
    }
}

/// The rows of the two source ranks that [`Payload::quantize`] imitates.
pub fn source_ranks(rows: usize) -> [std::ops::Range<usize>; 2] {
    [0..rows / 2, rows / 2..rows]
}

/// How rows arrive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrival {
    Quantised,
    Bf16,
}

/// A plan for rows that arrive in that way.
pub fn plan(config: &MoeConfig, max_rows: usize, arrival: Arrival) -> Plan {
    let wire = match arrival {
        Arrival::Quantised => config.quant.quantized_wire(DType::Bf16),
        Arrival::Bf16 => WireFormat::unquantized(DType::Bf16),
    };
    let comm = PrepareCaps::host("test", KernelKind::Modular, vec![wire], max_rows);
    let Support::Supported(caps) = AiterExperts::new().supports(config) else { panic!("refused") };
    negotiate(config, &comm, &caps).unwrap()
}

pub fn build(
    provider: &AiterExperts,
    config: &MoeConfig,
    plan: &Plan,
    rank: Rank,
) -> Box<dyn ExpertsModular> {
    match provider.build(config, plan, rank).unwrap() {
        Experts::Modular(kernel) => kernel,
        other => panic!("{other:?}"),
    }
}

/// Everything a call lends, so that a test can spoil a part of it.
pub struct Lent<'a> {
    pub hidden: TensorView<'a>,
    pub scale: Option<TensorView<'a>>,
    pub ids: TensorView<'a>,
    pub weights: TensorView<'a>,
}

impl<'a> Lent<'a> {
    pub fn new(config: &MoeConfig, batch: &'a Batch, payload: Option<&'a Payload>) -> Self {
        let max_rows = batch.max_rows(config);
        let (hidden, scale) = match payload {
            None => (TensorView::from_slice(&batch.x, DType::Bf16, &[max_rows, config.hidden]), None),
            Some(payload) => {
                let dtype = config.quant.fp8().unwrap().dtype();
                let groups = payload.scales.len() / max_rows;
                let scale = TensorView::from_slice(&payload.scales, DType::F32, &[max_rows, groups]);
                let codes = TensorView::from_slice(&payload.codes, dtype, &[max_rows, config.hidden]);
                (codes, Some(scale.unwrap()))
            }
        };
        let dims = [max_rows, config.top_k];
        Lent {
            hidden: hidden.unwrap(),
            scale,
            ids: TensorView::from_slice(&batch.ids, DType::I32, &dims).unwrap(),
            weights: TensorView::from_slice(&batch.weights, DType::F32, &dims).unwrap(),
        }
    }

    /// Runs `kernel` in a workspace of exactly its size, full of NaN and -1.
    pub fn apply(
        self,
        kernel: &dyn ExpertsModular,
        weights: &ExpertWeights,
        rows: usize,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        let bytes = kernel.workspace_bytes();
        let mut workspace = Workspace::new(DeviceKind::Host, bytes).unwrap();
        workspace.tensor_mut(DType::U8, &[bytes]).unwrap().as_mut_slice::<u8>().unwrap().fill(0xff);
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let count = [rows as i32];
        let arrived = Arrived::Standard {
            topk: TopK { ids: self.ids, weights: self.weights },
            rows: ReceivedRows(TensorView::from_slice(&count, DType::I32, &[1]).unwrap()),
        };
        let input = Dispatched { hidden: self.hidden, scale: self.scale, arrived, output: None };
        kernel.apply(&mut cx, weights, &input, out)
    }
}

/// Runs the experts of `rank` and returns the valid rows; the others must still be poison.
pub fn run_with(
    provider: &AiterExperts,
    config: &MoeConfig,
    (layer, rank): (&Layer, Rank),
    batch: &Batch,
    arrival: Arrival,
) -> Vec<bf16> {
    let max_rows = batch.max_rows(config);
    let plan = plan(config, max_rows, arrival);
    let kernel = build(provider, config, &plan, rank);
    assert_eq!(provider.workspace_bytes(config, &plan), kernel.workspace_bytes());
    let is_quantised = plan.wire().scale.is_some();
    let payload = is_quantised.then(|| Payload::quantize(config, batch));
    let poison = bf16::from_bits(0x7fab);
    let mut out = vec![poison; max_rows * config.hidden];
    let view = TensorViewMut::from_slice(&mut out, DType::Bf16, &[max_rows, config.hidden]).unwrap();
    let lent = Lent::new(config, batch, payload.as_ref());
    lent.apply(&*kernel, &layer.pack(config, rank), batch.rows, view).unwrap();
    let behind = out.split_off(batch.rows * config.hidden);
    assert!(
        behind.iter().all(|v| v.to_bits() == poison.to_bits()),
        "a row behind the valid ones was written"
    );
    out
}

pub fn run(config: &MoeConfig, layer: &Layer, batch: &Batch, arrival: Arrival) -> Vec<bf16> {
    run_with(&AiterExperts::new(), config, (layer, Rank(0)), batch, arrival)
}

pub fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Relative L2 distance.
pub fn distance(found: impl IntoIterator<Item = f64>, wanted: &[f64]) -> f64 {
    let (mut error, mut norm, mut len) = (0.0, 0.0, 0);
    for (found, &wanted) in found.into_iter().zip(wanted) {
        error += (found - wanted).powi(2);
        norm += wanted.powi(2);
        len += 1;
    }
    assert_eq!(len, wanted.len());
    if norm == 0.0 { error } else { (error / norm).sqrt() }
}
