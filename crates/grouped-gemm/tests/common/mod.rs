//! Random calls, and what they must give in f64.
#![allow(dead_code, reason = "every test file uses its own part")]

use grouped_gemm::{
    Activation, ActivationScale, Activations, Epilogue, Executor, F32Rows, Fp8Kind, Fp8Weight, GemmError,
    Group, GroupedGemm, PackedBf16, PackedFp8, PackedWeight, Rows, Weight, WeightScale,
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
    Fp8(Fp8Kind, Scaling),
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
}

/// A matrix in its stored form, and the values it stands for.
pub struct Matrix {
    pub bf16: Vec<bf16>,
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
    pub values: Vec<f64>,
}

impl Matrix {
    /// `block_rows` is 128 for weights and 1 for activations.
    fn random(rng: &mut Pcg64Mcg, (rows, k): (usize, usize), operand: Operand, block_rows: usize) -> Self {
        let mut matrix = Matrix { bf16: vec![], codes: vec![], scales: vec![], values: vec![] };
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
}

/// A call with everything random but its sizes.
pub struct Call {
    pub case: Case,
    /// Gate and up of every expert, or one matrix.
    pub weights: Vec<Vec<Matrix>>,
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
        let Case { rows, n, k, gate_up, weight, activation } = self;
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
    Bf16(Vec<PackedBf16>),
    Fp8(Vec<PackedFp8>),
}

impl Call {
    pub fn pack(&self) -> PackedSet {
        let Case { n, k, weight, .. } = self.case;
        let Operand::Fp8(kind, scaling) = weight else {
            let part = |m: &'_ Matrix| -> Vec<bf16> { m.bf16.clone() };
            return PackedSet::Bf16(
                self.weights
                    .iter()
                    .map(|parts| {
                        let parts: Vec<_> = parts.iter().map(part).collect();
                        let weight = |part: usize| Weight { values: parts[part].as_slice(), n, k };
                        match parts.len() {
                            1 => PackedBf16::pack(weight(0)),
                            _ => PackedBf16::pack_gate_up(weight(0), weight(1)),
                        }
                        .unwrap()
                    })
                    .collect(),
            );
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
        PackedSet::Fp8(self.weights.iter().map(pack).collect())
    }

    pub fn activations(&self) -> Activations<'_> {
        let (k, matrix) = (self.case.k, &self.activations);
        match self.case.activation {
            Operand::Bf16 => Activations::Bf16(Rows { values: &matrix.bf16, pitch: k }),
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
            PackedSet::Bf16(weights) => self.run_with(executor, &weights, poison).unwrap(),
            PackedSet::Fp8(weights) => self.run_with(executor, &weights, poison).unwrap(),
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
                true => Epilogue::GateUp(Activation::Silu),
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
        let dot = |part: &Matrix| {
            let w = &part.values[column * k..][..k];
            let sum: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            let size: f64 = x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum();
            let weight = f64::from(self.router_weights[row]);
            (sum * weight, size * weight)
        };
        match self.weights[expert].as_slice() {
            [weight] => dot(weight),
            [gate, up] => {
                let ((gate, gate_size), (up, up_size)) = (dot(gate), dot(up));
                let sigmoid = 1.0 / (1.0 + (-gate).exp());
                // |silu'| < 1.1, and |silu(g)| <= |g|.
                (gate * sigmoid * up, 1.1 * gate_size * up.abs() + gate.abs() * up_size)
            }
            _ => unreachable!(),
        }
    }

    pub fn check(&self, executor: &Executor) {
        let out = self.run(executor);
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
