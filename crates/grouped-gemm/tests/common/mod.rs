//! Random calls, and what they must give in f64.
#![allow(dead_code, reason = "every test file uses its own part")]

use grouped_gemm::{
    Activation, ActivationScale, Activations, Epilogue, Executor, F32Rows, Fp4Scale, Fp4Weight, Fp8Kind,
    Fp8Weight, GemmError, Group, GroupedGemm, PackedBf16, PackedF32, PackedFp4, PackedFp8, PackedWeight,
    Rows, Weight, WeightScale,
};
use half::bf16;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    Tensor,
    /// Per channel or per token.
    Vector,
    /// 128x128 or 1x128.
    Block,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operand {
    Bf16,
    /// Both sides or none.
    F32,
    Fp8(Fp8Kind, Scaling),
    /// Weights only.
    Mxfp4,
    Nvfp4,
}

/// `n` and `k` are those of gate alone when there is a pair.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub rows: &'static [usize],
    pub n: usize,
    pub k: usize,
    pub gate_up: bool,
    pub weight: Operand,
    pub activation: Operand,
    /// Of a pair.
    pub join: Activation,
    pub bias: bool,
}

impl Case {
    pub const PLAIN: Case = Case {
        rows: &[],
        n: 0,
        k: 0,
        gate_up: false,
        weight: Operand::Bf16,
        activation: Operand::Bf16,
        join: Activation::Silu,
        bias: false,
    };
}

/// A matrix in its stored form, and the values it stands for.
pub struct Matrix {
    pub bf16: Vec<bf16>,
    pub f32: Vec<f32>,
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
    pub values: Vec<f64>,
}

impl Matrix {
    /// `block_rows` is 128 for weights and 1 for activations.
    fn random(rng: &mut Pcg64Mcg, (rows, k): (usize, usize), operand: Operand, block_rows: usize) -> Self {
        let mut matrix = Matrix { bf16: vec![], f32: vec![], codes: vec![], scales: vec![], values: vec![] };
        if let Operand::Mxfp4 | Operand::Nvfp4 = operand {
            matrix.fp4(rng, (rows, k), operand);
            return matrix;
        }
        if operand == Operand::F32 {
            matrix.f32 = (0..rows * k).map(|_| rng.random_range(-1.0..1.0)).collect();
            matrix.values = matrix.f32.iter().map(|&v| f64::from(v)).collect();
            return matrix;
        }
        let Operand::Fp8(kind, scaling) = operand else {
            matrix.bf16 = (0..rows * k).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0))).collect();
            matrix.values = matrix.bf16.iter().map(|v| v.to_f64()).collect();
            return matrix;
        };
        let blocks = k.div_ceil(128);
        let count = match scaling {
            Scaling::Tensor => 1,
            Scaling::Vector => rows,
            Scaling::Block => rows.div_ceil(block_rows) * blocks,
        };
        matrix.scales = (0..count).map(|_| rng.random_range(0.01..0.1)).collect();
        while matrix.codes.len() < rows * k {
            let code: u8 = rng.random();
            if !kind.to_bf16(code).is_nan() {
                matrix.codes.push(code);
            }
        }
        for (at, &code) in matrix.codes.iter().enumerate() {
            let scale = matrix.scales[match scaling {
                Scaling::Tensor => 0,
                Scaling::Vector => at / k,
                Scaling::Block => at / k / block_rows * blocks + at % k / 128,
            }];
            matrix.values.push(kind.to_bf16(code).to_f64() * f64::from(scale));
        }
        matrix
    }

    /// `codes` become pairs and then group scales; `bf16` is what the two multiply to, for activations.
    fn fp4(&mut self, rng: &mut Pcg64Mcg, (rows, k): (usize, usize), operand: Operand) {
        let (group, global) = match operand {
            Operand::Mxfp4 => (32, 1.0),
            _ => (16, rng.random_range(0.001f32..0.01)),
        };
        let codes: Vec<u8> = (0..rows * k).map(|_| rng.random_range(0..16)).collect();
        let scales: Vec<u8> = (0..rows * k / group)
            .map(|_| match operand {
                Operand::Mxfp4 => rng.random_range(120..126),
                // Every scale that is not NaN, zeros and negative ones included.
                _ => rng.random_range(0..0x7fu8) | rng.random_range(0..2) << 7,
            })
            .collect();
        for (at, &code) in codes.iter().enumerate() {
            let scale = match operand {
                Operand::Mxfp4 => 2f64.powi(i32::from(scales[at / group]) - 127),
                _ => Fp8Kind::E4M3Fn.to_bf16(scales[at / group]).to_f64(),
            };
            let value = f64::from(quant::fp4::decode(code)) * scale;
            self.bf16.push(bf16::from_f64(value));
            self.values.push(value * f64::from(global));
        }
        self.codes = codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect();
        self.codes.extend(scales);
        self.scales = vec![global];
    }

    /// The other direction of [`Matrix::fp4`].
    fn fp4_weight(&self, (n, k): (usize, usize), operand: Operand) -> Fp4Weight<'_> {
        let (codes, scales) = self.codes.split_at(n * k / 2);
        let scale = match operand {
            Operand::Mxfp4 => Fp4Scale::Mx32(scales),
            _ => Fp4Scale::Nv16 { blocks: scales, global: self.scales[0] },
        };
        Fp4Weight { codes, n, k, scale }
    }
}

/// A call with everything random but its sizes.
pub struct Call {
    pub case: Case,
    /// Gate and up of every expert, or one matrix.
    pub weights: Vec<Vec<Matrix>>,
    /// Of every expert, gate before up.
    pub biases: Vec<Vec<f32>>,
    pub activations: Matrix,
    pub gather: Vec<u32>,
    pub groups: Vec<Group>,
    pub router_weights: Vec<f32>,
}

impl Case {
    pub fn make(self) -> Call {
        let seed = rand::random();
        println!("seed {seed}: {self:?}");
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        let Case { rows, n, k, gate_up, weight, activation, .. } = self;
        let experts = 3;
        let mut groups = Vec::new();
        let mut end = 0;
        for &len in rows {
            // A gap after every group: its rows must not be touched.
            groups.push(Group { rows: end..end + len, expert: rng.random_range(0..experts) });
            end += len + 1;
        }
        let tokens = end / 2 + 1;
        let mut part = || Matrix::random(&mut rng, (n, k), weight, 128);
        let weights = (0..experts).map(|_| (0..1 + usize::from(gate_up)).map(|_| part()).collect()).collect();
        Call {
            case: self,
            weights,
            biases: (0..experts)
                .map(|_| (0..n * (1 + usize::from(gate_up))).map(|_| rng.random_range(-2.0..2.0)).collect())
                .collect(),
            activations: Matrix::random(&mut rng, (tokens, k), activation, 1),
            // Entries of the gaps are out of range: nobody may follow them.
            gather: {
                let mut gather = vec![u32::MAX; end];
                for row in groups.iter().flat_map(|group| group.rows.clone()) {
                    gather[row] = rng.random_range(0..tokens as u32);
                }
                gather
            },
            groups: {
                groups.shuffle(&mut rng);
                groups.sort_by_key(|group| group.rows.start);
                groups
            },
            router_weights: (0..end).map(|_| rng.random_range(0.1..1.0)).collect(),
        }
    }
}

pub enum PackedSet {
    F32(Vec<PackedF32>),
    Bf16(Vec<PackedBf16>),
    Fp8(Vec<PackedFp8>),
    Fp4(Vec<PackedFp4>),
}

impl Call {
    pub fn pack(&self) -> PackedSet {
        let Case { n, k, weight, .. } = self.case;
        if let Operand::Mxfp4 | Operand::Nvfp4 = weight {
            let pack = |parts: &Vec<Matrix>| match parts.as_slice() {
                [plain] => PackedFp4::pack(plain.fp4_weight((n, k), weight)).unwrap(),
                [gate, up] => {
                    let [gate, up] = [gate, up].map(|part| part.fp4_weight((n, k), weight));
                    PackedFp4::pack_gate_up(gate, up).unwrap()
                }
                _ => unreachable!(),
            };
            return PackedSet::Fp4(self.biased(self.weights.iter().map(pack)));
        }
        if weight == Operand::F32 {
            let weight = |part: &'_ Matrix| part.f32.clone();
            return PackedSet::F32(self.biased(self.weights.iter().map(|parts| {
                let parts: Vec<_> = parts.iter().map(weight).collect();
                let weight = |part: usize| Weight { values: parts[part].as_slice(), n, k };
                match parts.len() {
                    1 => PackedF32::pack(weight(0)),
                    _ => PackedF32::pack_gate_up(weight(0), weight(1)),
                }
                .unwrap()
            })));
        }
        let Operand::Fp8(kind, scaling) = weight else {
            let part = |m: &'_ Matrix| -> Vec<bf16> { m.bf16.clone() };
            return PackedSet::Bf16(self.biased(self.weights.iter().map(|parts| {
                let parts: Vec<_> = parts.iter().map(part).collect();
                let weight = |part: usize| Weight { values: parts[part].as_slice(), n, k };
                match parts.len() {
                    1 => PackedBf16::pack(weight(0)),
                    _ => PackedBf16::pack_gate_up(weight(0), weight(1)),
                }
                .unwrap()
            })));
        };
        let scale = |m: &Matrix| match scaling {
            Scaling::Tensor => WeightScale::PerTensor(m.scales[0]),
            Scaling::Vector => WeightScale::PerChannel(m.scales.clone()),
            Scaling::Block => WeightScale::Block128 { scales: m.scales.clone() },
        };
        let pack = |parts: &Vec<Matrix>| {
            let scales: Vec<_> = parts.iter().map(scale).collect();
            let weight = |part: usize| Fp8Weight {
                codes: Weight { values: &parts[part].codes, n, k },
                kind,
                scale: &scales[part],
            };
            match parts.len() {
                1 => PackedFp8::pack(weight(0)),
                _ => PackedFp8::pack_gate_up(weight(0), weight(1)),
            }
            .unwrap()
        };
        PackedSet::Fp8(self.biased(self.weights.iter().map(pack)))
    }

    fn biased<W: PackedWeight>(&self, weights: impl Iterator<Item = W>) -> Vec<W> {
        let pairs = weights.zip(&self.biases);
        pairs.map(|(w, bias)| if self.case.bias { w.with_bias(bias).unwrap() } else { w }).collect()
    }

    pub fn activations(&self) -> Activations<'_> {
        let (k, matrix) = (self.case.k, &self.activations);
        match self.case.activation {
            Operand::Bf16 => Activations::Bf16(Rows { values: &matrix.bf16, pitch: k }),
            Operand::F32 => Activations::F32(Rows { values: &matrix.f32, pitch: k }),
            Operand::Mxfp4 => unreachable!("mxfp4 has no activations"),
            Operand::Nvfp4 => Activations::ScaledBf16 {
                values: Rows { values: &matrix.bf16, pitch: k },
                scale: matrix.scales[0],
            },
            Operand::Fp8(kind, scaling) => Activations::Fp8 {
                codes: Rows { values: &matrix.codes, pitch: k },
                kind,
                scale: match scaling {
                    Scaling::Tensor => ActivationScale::PerTensor(matrix.scales[0]),
                    Scaling::Vector => ActivationScale::PerToken(&matrix.scales),
                    Scaling::Block => {
                        ActivationScale::Group128(Rows { values: &matrix.scales, pitch: k.div_ceil(128) })
                    }
                },
            },
        }
    }

    /// The result rows, NaN where nothing is stored. Output and scratch start poisoned.
    pub fn run(&self, executor: &Executor) -> Vec<f32> {
        let run = |poison| match self.pack() {
            PackedSet::F32(weights) => self.run_with(executor, &weights, poison).unwrap(),
            PackedSet::Bf16(weights) => self.run_with(executor, &weights, poison).unwrap(),
            PackedSet::Fp8(weights) => self.run_with(executor, &weights, poison).unwrap(),
            PackedSet::Fp4(weights) => self.run_with(executor, &weights, poison).unwrap(),
        };
        let first = run(0xff);
        let second = run(0x7f);
        assert!(first.iter().zip(&second).all(|(a, b)| a.to_bits() == b.to_bits()), "scratch leaks");
        first
    }

    pub fn run_with<W: PackedWeight>(
        &self,
        executor: &Executor,
        weights: &[W],
        poison: u8,
    ) -> Result<Vec<f32>, GemmError> {
        let gemm = GroupedGemm {
            weights,
            activations: self.activations(),
            gather: Some(&self.gather),
            groups: &self.groups,
            router_weights: Some(&self.router_weights),
            epilogue: match self.case.gate_up {
                true => Epilogue::GateUp(self.case.join),
                false => Epilogue::Products,
            },
        };
        // One byte off, so that the scratch must be aligned inside.
        let mut scratch = vec![poison; executor.scratch_bytes() + 1];
        let pitch = self.case.n + 3;
        let mut out = vec![f32::NAN; self.gather.len() * pitch];
        executor.run(&gemm, &mut scratch[1..], &F32Rows::new(&mut out, self.case.n, pitch)?)?;
        for row in out.chunks(pitch) {
            assert!(row[self.case.n..].iter().all(|v| v.is_nan()), "written past the row");
        }
        Ok(out.chunks(pitch).flat_map(|row| row[..self.case.n].to_vec()).collect())
    }

    /// What sorted row `row` of `expert` must be, with the sum of magnitudes that its error scales with.
    fn expected(&self, row: usize, expert: usize, column: usize) -> (f64, f64) {
        let k = self.case.k;
        let x = &self.activations.values[self.gather[row] as usize * k..][..k];
        let weight = f64::from(self.router_weights[row]);
        let dot = |part: &Matrix, at: usize| {
            let w = &part.values[column * k..][..k];
            let sum: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            let size: f64 = x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum();
            let bias = if self.case.bias { f64::from(self.biases[expert][at]) } else { 0.0 };
            (sum, size, bias)
        };
        match self.weights[expert].as_slice() {
            [plain] => {
                let (sum, size, bias) = dot(plain, column);
                ((sum + bias) * weight, (size + bias.abs()) * weight)
            }
            [gate, up] => {
                let ((gate, gate_size, gate_bias), (up, up_size, up_bias)) =
                    (dot(gate, column), dot(up, self.case.n + column));
                let (gate, up) = (gate * weight + gate_bias, up * weight + up_bias);
                let gate_size = gate_size * weight + gate_bias.abs();
                let up_size = up_size * weight + up_bias.abs();
                let (gate, up) = joined(self.case.join, gate, up);
                // No activation of gate has a slope above 1.13.
                (gate * up, 1.13 * gate_size * up.abs() + gate.abs() * up_size)
            }
            _ => unreachable!(),
        }
    }

    pub fn check(&self, executor: &Executor) {
        self.check_rows(&self.run(executor));
    }

    pub fn check_rows(&self, out: &[f32]) {
        let n = self.case.n;
        let mut stored = vec![false; out.len()];
        for group in &self.groups {
            for row in group.rows.clone() {
                for column in 0..n {
                    let got = f64::from(out[row * n + column]);
                    let (want, size) = self.expected(row, group.expert, column);
                    let limit = size * 2e-6 + 1e-30;
                    assert!(
                        (got - want).abs() <= limit,
                        "row {row} column {column}: {got}, not {want} ± {limit}"
                    );
                    stored[row * n + column] = true;
                }
            }
        }
        for (value, stored) in out.iter().zip(stored) {
            assert!(stored || value.is_nan(), "a row of no group was written");
        }
    }
}

/// The two factors of an activation, from its definition.
fn joined(activation: Activation, gate: f64, up: f64) -> (f64, f64) {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Silu => (gate * sigmoid(gate), up),
        Activation::Gelu => (gate * normal(gate), up),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
            (gate * 0.5 * (1.0 + inner.tanh()), up)
        }
        Activation::SwigluOai { alpha, limit } => {
            let limit = f64::from(limit);
            let gate = gate.min(limit);
            (gate * sigmoid(f64::from(alpha) * gate), up.clamp(-limit, limit) + 1.0)
        }
        Activation::SiluClamped { limit } => {
            let limit = f64::from(limit);
            (gate.min(limit) * sigmoid(gate.min(limit)), up.clamp(-limit, limit))
        }
        other => unreachable!("{other:?}"),
    }
}

/// The distribution function of the normal distribution: Simpson's rule over its density.
fn normal(x: f64) -> f64 {
    let end = x.clamp(-12.0, 12.0);
    let (steps, density) = (2000, |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt());
    let step = end / f64::from(steps);
    let inner: f64 = (1..steps).map(|i| f64::from(2 + 2 * (i % 2)) * density(f64::from(i) * step)).sum();
    0.5 + (density(0.0) + inner + density(end)) * step / 3.0
}
