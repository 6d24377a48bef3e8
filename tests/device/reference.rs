//! A layer with its weights as they are, and what it gives in f64.

use std::num::NonZeroUsize;

use fused_moe_core::Granularity;
use half::bf16;
use libtest_mimic::Failed;
use moe_kernels::experts::ExpertsShape;
use moe_kernels::grouped_gemm::GemmScheme;
use moe_kernels::pack;
use quant::{RowQuantizer, decode};
use rand::Rng;
use rand_pcg::Pcg64;

const BLOCK: usize = 128;

/// `[rows, columns]` codes with scales as a checkpoint has them.
#[derive(Clone)]
struct Matrix {
    columns: usize,
    /// bf16 or FP8.
    bytes: Vec<u8>,
    /// Of 128x128 blocks, or of rows, or none.
    scales: Vec<f32>,
}

/// Rows that stage 3 is given.
#[derive(Clone)]
pub struct Tokens {
    pub rows: usize,
    /// bf16 or FP8.
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
}

/// The experts of a rank.
#[derive(Clone)]
pub struct Layer {
    shape: ExpertsShape,
    /// Gate, up, down.
    experts: Vec<[Matrix; 3]>,
}

/// What is uploaded.
#[derive(Default)]
pub struct Packed {
    pub gate_up: Vec<u8>,
    pub gate_up_scales: Vec<f32>,
    pub down: Vec<u8>,
    pub down_scales: Vec<f32>,
}

/// The value of element `column` of a row.
fn value(shape: &ExpertsShape, row: &[u8], column: usize) -> f64 {
    match shape.scheme {
        GemmScheme::Bf16 => f64::from(bf16::from_le_bytes([row[2 * column], row[2 * column + 1]]).to_f32()),
        _ => f64::from(decode(shape.arch.fp8(), row[column])),
    }
}

impl Matrix {
    fn random(random: &mut Pcg64, shape: &ExpertsShape, rows: usize, columns: usize) -> Self {
        let scale = 2.0 / (columns as f32).sqrt();
        let (bytes, scales) = match shape.scheme {
            GemmScheme::Bf16 => {
                let value = |_| bf16::from_f32(random.random_range(-scale..scale)).to_le_bytes();
                ((0..rows * columns).flat_map(value).collect(), Vec::new())
            }
            _ => {
                // Neither of the codes of NaN, which are others in FNUZ.
                let code = |_| random.random_range(1..0x7f_u8) | (random.random::<u8>() & 0x80);
                let bytes = (0..rows * columns).map(code).collect();
                let scales = match shape.scheme {
                    GemmScheme::Fp8Block => rows.div_ceil(BLOCK) * columns.div_ceil(BLOCK),
                    _ => rows,
                };
                (bytes, (0..scales).map(|_| scale / 150.0 * random.random_range(0.5..2.0)).collect())
            }
        };
        Self { columns, bytes, scales }
    }

    /// The scale of element `[row, column]`.
    fn scale(&self, scheme: GemmScheme, row: usize, column: usize) -> f64 {
        f64::from(match scheme {
            GemmScheme::Bf16 => 1.0,
            GemmScheme::Fp8Block => self.scales[row / BLOCK * self.columns.div_ceil(BLOCK) + column / BLOCK],
            GemmScheme::Fp8Row => self.scales[row],
        })
    }

    /// The product with a vector.
    fn times(&self, shape: &ExpertsShape, x: &[f64]) -> Vec<f64> {
        let row_bytes = self.columns * shape.scheme.bytes();
        let product = |(row, bytes): (usize, &[u8])| {
            let term = |column: usize| {
                value(shape, bytes, column) * self.scale(shape.scheme, row, column) * x[column]
            };
            (0..self.columns).map(term).sum()
        };
        self.bytes.chunks(row_bytes).enumerate().map(product).collect()
    }
}

impl Tokens {
    /// Numbers of several sizes, quantised as a dispatch would have.
    pub fn random(random: &mut Pcg64, shape: &ExpertsShape, rows: usize) -> Self {
        let values: Vec<bf16> = (0..rows * shape.hidden)
            .map(|i| bf16::from_f32(random.random_range(-1.0..1.0) * (1 << (i / BLOCK % 4)) as f32))
            .collect();
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for row in values.chunks(shape.hidden) {
            let (row_codes, row_scales) = quantized(shape, row);
            codes.extend(row_codes);
            scales.extend(row_scales);
        }
        Self { rows, codes, scales }
    }

    /// The same with the largest scale of a row off by a factor.
    pub fn with_a_scale_off(&self, row: usize, by: f32) -> Self {
        let mut scales = self.scales.clone();
        let per_row = scales.len() / self.rows;
        if let Some(largest) = scales[row * per_row..][..per_row].iter_mut().max_by(|a, b| a.total_cmp(b)) {
            *largest *= by;
        }
        Self { rows: self.rows, codes: self.codes.clone(), scales }
    }

    fn row(&self, shape: &ExpertsShape, row: usize) -> Vec<f64> {
        let row_bytes = shape.hidden * shape.scheme.bytes();
        let per_row = self.scales.len() / self.rows.max(1);
        dequantized(
            shape,
            &self.codes[row * row_bytes..][..row_bytes],
            &self.scales[row * per_row..][..per_row],
        )
    }
}

/// A row as the layer quantises it: codes, or bf16, and scales.
pub fn quantized(shape: &ExpertsShape, row: &[bf16]) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut scales) = (vec![0; row.len()], vec![0.0; row.len().div_ceil(BLOCK)]);
    let quantizer = RowQuantizer::new(shape.arch.fp8());
    match shape.scheme {
        GemmScheme::Bf16 => return (row.iter().flat_map(|x| x.to_le_bytes()).collect(), Vec::new()),
        GemmScheme::Fp8Block => {
            let granularity = Granularity::Group(NonZeroUsize::new(BLOCK).expect("128 is not 0"));
            quantizer
                .quantize_per_group(row, granularity, &mut codes, &mut scales)
                .expect("lengths are right");
        }
        GemmScheme::Fp8Row => {
            scales = vec![quantizer.quantize_per_token(row, &mut codes).expect("lengths are right")];
        }
    }
    (codes, scales)
}

fn dequantized(shape: &ExpertsShape, codes: &[u8], scales: &[f32]) -> Vec<f64> {
    let scale = |column: usize| match shape.scheme {
        GemmScheme::Bf16 => 1.0,
        GemmScheme::Fp8Block => f64::from(scales[column / BLOCK]),
        GemmScheme::Fp8Row => f64::from(scales[0]),
    };
    (0..codes.len() / shape.scheme.bytes())
        .map(|column| value(shape, codes, column) * scale(column))
        .collect()
}

impl Layer {
    pub fn random(random: &mut Pcg64, shape: ExpertsShape) -> Self {
        let ExpertsShape { hidden, intermediate, .. } = shape;
        let expert = |_| {
            let mut matrix = |rows, columns| Matrix::random(random, &shape, rows, columns);
            [matrix(intermediate, hidden), matrix(intermediate, hidden), matrix(hidden, intermediate)]
        };
        Self { shape, experts: (0..shape.experts).map(expert).collect() }
    }

    /// The same with the scales of every matrix turned by one.
    pub fn with_shifted_scales(&self) -> Self {
        let mut experts = self.experts.clone();
        for matrix in experts.iter_mut().flatten() {
            matrix.scales.rotate_left(1);
        }
        Self { experts, ..*self }
    }

    /// The same with one scale of a matrix of an expert (gate, up, down) off by a factor.
    pub fn with_a_scale_off(&self, expert: usize, matrix: usize, by: f32) -> Self {
        let mut experts = self.experts.clone();
        experts[expert][matrix].scales[0] *= by;
        Self { experts, ..*self }
    }

    /// What local expert `expert` makes of a row of `tokens` up to gemm2, before it is rounded.
    pub fn activated(&self, expert: usize, tokens: &Tokens, row: usize) -> Vec<f64> {
        let [gate, up, _] = &self.experts[expert];
        let x = tokens.row(&self.shape, row);
        let (gate, up) = (gate.times(&self.shape, &x), up.times(&self.shape, &x));
        gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
    }

    /// What gemm2 of local expert `expert` makes of a quantised row.
    pub fn product(&self, expert: usize, codes: &[u8], scales: &[f32]) -> Vec<f64> {
        self.experts[expert][2].times(&self.shape, &dequantized(&self.shape, codes, scales))
    }

    pub fn packed(&self) -> Result<Packed, Failed> {
        let ExpertsShape { arch, scheme, hidden, intermediate, .. } = self.shape;
        let (hidden_bytes, intermediate_bytes) = (hidden * scheme.bytes(), intermediate * scheme.bytes());
        let mut packed = Packed::default();
        for [gate, up, down] in &self.experts {
            packed.gate_up.extend(pack::gate_up(arch, &gate.bytes, &up.bytes, intermediate, hidden_bytes)?);
            packed.down.extend(pack::down(arch, &down.bytes, hidden, intermediate_bytes)?);
            match scheme {
                GemmScheme::Bf16 => {}
                GemmScheme::Fp8Block => {
                    let (gate, up) = (&gate.scales, &up.scales);
                    let scales = pack::gate_up_block_scales(gate, up, intermediate, hidden.div_ceil(BLOCK));
                    packed.gate_up_scales.extend(scales);
                    packed.down_scales.extend(pack::down_block_scales(&down.scales));
                }
                GemmScheme::Fp8Row => {
                    packed.gate_up_scales.extend(pack::gate_up_row_scales(&gate.scales, &up.scales));
                    packed.down_scales.extend(&down.scales);
                }
            }
        }
        Ok(packed)
    }

    /// `[rows, hidden]`: for every row its local experts, weighted.
    pub fn run(&self, tokens: &Tokens, ids: &[i32], weights: &[f32], map: &[i32]) -> Vec<f64> {
        let ExpertsShape { hidden, top_k, .. } = self.shape;
        let mut out = vec![0.0; tokens.rows * hidden];
        for row in 0..tokens.rows {
            let x = tokens.row(&self.shape, row);
            for slot in row * top_k..(row + 1) * top_k {
                let local = usize::try_from(ids[slot]).ok().and_then(|id| usize::try_from(map[id]).ok());
                let Some([gate, up, down]) = local.map(|local| &self.experts[local]) else { continue };
                let (gate, up) = (gate.times(&self.shape, &x), up.times(&self.shape, &x));
                let activated =
                    gate.iter().zip(&up).map(|(g, u)| bf16::from_f32((g / (1.0 + (-g).exp()) * u) as f32));
                let activated: Vec<bf16> = activated.collect();
                let (codes, scales) = quantized(&self.shape, &activated);
                let product = down.times(&self.shape, &dequantized(&self.shape, &codes, &scales));
                for (out, product) in out[row * hidden..][..hidden].iter_mut().zip(product) {
                    *out += product * f64::from(weights[slot]);
                }
            }
        }
        out
    }
}
