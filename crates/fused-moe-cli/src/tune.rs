//! `fmoe tune`: measures block sizes and task grain of the grouped GEMM on this machine, and writes the table.

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use grouped_gemm::{
    Activation, ActivationScale, Activations, Bf16Rows, Epilogue, Executor, F32Rows, Fp8Kind, Fp8Weight,
    Group, GroupedGemm, Isa, PackedBf16, PackedFp8, PackedWeight, Rows, TuneFile, TuneKey, TuneRow, Tuning,
    TuningTable, Weight, WeightScale, cpu_model,
};
use half::bf16;
use rand::{Rng, RngCore, SeedableRng};
use rand_pcg::Pcg64;

use crate::args::{Quant, TuneArgs};
use crate::bench::calls::Calls;
use crate::bench::experts::Shape;
use crate::exit::{Failure, OrFailure, refused};
use crate::report::print;

/// A candidate has to be this much faster to be taken: less is within what repetitions differ by.
const WORTH: f64 = 0.98;

/// A table of `file`, for the rest of the program.
fn read(file: &Path) -> anyhow::Result<&'static TuningTable> {
    let of_file = || format!("in {}", file.display());
    let text = std::fs::read_to_string(file).with_context(of_file)?;
    let table: TuneFile = toml::from_str(&text).with_context(of_file)?;
    let here = cpu_model();
    anyhow::ensure!(
        table.cpu == here,
        "{} is of processor {}, this one is {here}",
        file.display(),
        table.cpu
    );
    Ok(Box::leak(Box::new(TuningTable::new(&table).with_context(of_file)?)))
}

/// What this machine multiplies with, tuned by the table of `file`.
pub fn executor(file: &Path) -> anyhow::Result<Executor> {
    Ok(Executor::detect().with_tuning(read(file)?))
}

/// Runs the command.
pub fn run(args: &TuneArgs) -> Result<(), Failure> {
    if args.reps == 0 {
        return refused("--reps 0: at least one call is needed");
    }
    let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let threads = args.threads.unwrap_or(cores);
    rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build_global().or_failed()?;
    let executor = Executor::new(Isa::detect(), threads).or_failed()?;
    let mut rows: Vec<TuneRow> = Vec::new();
    for name in &args.shapes {
        let shape = Shape::named(name).or_refused()?;
        let tokens = if args.tokens.is_empty() { &shape.tokens } else { &args.tokens };
        shape.check(tokens).or_refused()?;
        for &quant in &args.quant {
            let products = match quant {
                Quant::None => [Gemm::One, Gemm::Two].map(|gemm| gemm.bf16(&shape)).map(tune_bf16),
                Quant::Fp8Block => [Gemm::One, Gemm::Two].map(|gemm| gemm.fp8(&shape)).map(tune_fp8),
                _ => return refused("--quant: none and fp8-block are tuned; others take the same rows"),
            };
            for product in products {
                let product = product.or_failed()?;
                for &tokens in tokens {
                    let calls = Calls::uniform(shape.experts, shape.top_k, tokens, 1);
                    let groups = groups(&calls.ids[0], shape.experts);
                    let row = product.tune(executor, &groups, args.reps).or_failed()?;
                    eprintln!("{}: {:?}", row.key, row.tuning);
                    rows.retain(|known| known.key != row.key);
                    rows.push(row);
                }
            }
        }
    }
    // What the heuristic does as well needs no row.
    rows.retain(|row| row.tuning != Tuning::HEURISTIC);
    let file = toml::to_string(&TuneFile { cpu: cpu_model(), rows }).or_failed()?;
    match &args.output {
        Some(path) => {
            std::fs::write(path, file).with_context(|| format!("writing {}", path.display())).or_failed()
        }
        None => print(format_args!("{file}")).or_failed(),
    }
}

/// Rows sorted by expert.
fn groups(ids: &[i32], experts: usize) -> Vec<Group> {
    let mut start = 0;
    (0..experts)
        .map(|expert| {
            let end = start + ids.iter().filter(|&&id| id as usize == expert).count();
            let rows = start..end;
            start = end;
            Group { rows, expert }
        })
        .collect()
}

/// The two products of a layer.
#[derive(Clone, Copy)]
enum Gemm {
    /// Gate and up, `[2I, H]`.
    One,
    /// Down, `[H, I]`.
    Two,
}

/// A product of all experts, whose weights have the same values, each in memory of its own.
struct Product<W> {
    weights: Vec<W>,
    k: usize,
    columns: usize,
    epilogue: Epilogue,
}

/// Something that can be tuned, whatever its weights.
trait Tunable {
    fn tune(&self, executor: Executor, groups: &[Group], reps: usize) -> anyhow::Result<TuneRow>;
}

fn tune_bf16(product: anyhow::Result<Product<PackedBf16>>) -> anyhow::Result<Box<dyn Tunable>> {
    Ok(Box::new(product?))
}

fn tune_fp8(product: anyhow::Result<Product<PackedFp8>>) -> anyhow::Result<Box<dyn Tunable>> {
    Ok(Box::new(product?))
}

impl Gemm {
    /// Rows of one part of the weight, inner size, parts.
    fn sizes(self, shape: &Shape) -> (usize, usize) {
        match self {
            Gemm::One => (shape.intermediate, shape.hidden),
            Gemm::Two => (shape.hidden, shape.intermediate),
        }
    }

    fn product<W>(
        self,
        shape: &Shape,
        pack: impl Fn() -> Result<W, grouped_gemm::GemmError>,
    ) -> anyhow::Result<Product<W>> {
        let (n, k) = self.sizes(shape);
        let weights = (0..shape.experts).map(|_| pack()).collect::<Result<_, _>>()?;
        let epilogue = match self {
            Gemm::One => Epilogue::GateUp(Activation::Silu),
            Gemm::Two => Epilogue::Products,
        };
        Ok(Product { weights, k, columns: n, epilogue })
    }

    fn bf16(self, shape: &Shape) -> anyhow::Result<Product<PackedBf16>> {
        let (n, k) = self.sizes(shape);
        let mut random = Pcg64::seed_from_u64(7);
        let values: Vec<bf16> = (0..n * k).map(|_| bf16::from_f32(random.random::<f32>() - 0.5)).collect();
        let weight = Weight { values: &values, n, k };
        self.product(shape, || match self {
            Gemm::One => PackedBf16::pack_gate_up(weight, weight),
            Gemm::Two => PackedBf16::pack(weight),
        })
    }

    fn fp8(self, shape: &Shape) -> anyhow::Result<Product<PackedFp8>> {
        let (n, k) = self.sizes(shape);
        let mut codes = vec![0u8; n * k];
        Pcg64::seed_from_u64(7).fill_bytes(&mut codes);
        // Without the top exponent bit there is no NaN.
        codes.iter_mut().for_each(|code| *code &= 0xbf);
        let scale = WeightScale::Block128 { scales: vec![1.0; n.div_ceil(128) * k.div_ceil(128)] };
        let codes = Weight { values: &codes, n, k };
        let weight = Fp8Weight { codes, kind: Fp8Kind::E4M3Fn, scale: &scale };
        self.product(shape, || match self {
            Gemm::One => PackedFp8::pack_gate_up(weight, weight),
            Gemm::Two => PackedFp8::pack(weight),
        })
    }
}

impl<W: PackedWeight> Product<W> {
    /// Calls under each of the candidates in turn, and the candidates' medians in seconds.
    fn medians(
        &self,
        executor: Executor,
        groups: &[Group],
        candidates: &[Tuning],
        reps: usize,
    ) -> anyhow::Result<Vec<f64>> {
        let rows = groups.last().map_or(0, |group| group.rows.end);
        let x = Inputs::new(rows, self.k);
        let gemm = GroupedGemm {
            weights: &self.weights,
            activations: x.activations(W::KIND == grouped_gemm::WeightKind::Fp8),
            gather: None,
            groups,
            router_weights: None,
            epilogue: self.epilogue,
        };
        let mut scratch = vec![0; executor.scratch_bytes()];
        let mut times = vec![Vec::with_capacity(reps); candidates.len()];
        let (mut f32s, mut bf16s) = (vec![0f32; rows * self.columns], vec![bf16::ZERO; rows * self.columns]);
        let executors = candidates
            .iter()
            .map(|&tuning| Ok(executor.with_tuning(Box::leak(Box::new(TuningTable::forced(tuning)?)))))
            .collect::<anyhow::Result<Vec<_>>>()?;
        for rep in 0..=reps {
            for (executor, times) in executors.iter().zip(&mut times) {
                let start = Instant::now();
                match self.epilogue {
                    Epilogue::Products => {
                        executor.run(
                            &gemm,
                            &mut scratch,
                            &F32Rows::new(&mut f32s, self.columns, self.columns)?,
                        )?;
                    }
                    Epilogue::GateUp(_) => {
                        executor.run(
                            &gemm,
                            &mut scratch,
                            &Bf16Rows::new(&mut bf16s, self.columns, self.columns)?,
                        )?;
                    }
                }
                // The first round warms up.
                if rep > 0 {
                    times.push(start.elapsed().as_secs_f64());
                }
            }
        }
        Ok(times
            .into_iter()
            .map(|mut times| {
                times.sort_by(f64::total_cmp);
                times[times.len() / 2]
            })
            .collect())
    }
}

/// Rows of activations in both forms.
struct Inputs {
    values: Vec<bf16>,
    codes: Vec<u8>,
    scales: Vec<f32>,
    k: usize,
}

impl Inputs {
    fn new(rows: usize, k: usize) -> Self {
        let mut random = Pcg64::seed_from_u64(8);
        let mut codes = vec![0u8; rows * k];
        random.fill_bytes(&mut codes);
        codes.iter_mut().for_each(|code| *code &= 0xbf);
        let values = (0..rows * k).map(|_| bf16::from_f32(random.random::<f32>() - 0.5)).collect();
        Self { values, codes, scales: vec![1.0; rows * k.div_ceil(128)], k }
    }

    fn activations(&self, is_fp8: bool) -> Activations<'_> {
        let (k, groups) = (self.k, self.k.div_ceil(128));
        match is_fp8 {
            false => Activations::Bf16(Rows { values: &self.values, pitch: k }),
            true => Activations::Fp8 {
                codes: Rows { values: &self.codes, pitch: k },
                kind: Fp8Kind::E4M3Fn,
                scale: ActivationScale::Group128(Rows { values: &self.scales, pitch: groups }),
            },
        }
    }
}

impl<W: PackedWeight> Tunable for Product<W> {
    /// One value after the other, each with the best of those before.
    fn tune(&self, executor: Executor, groups: &[Group], reps: usize) -> anyhow::Result<TuneRow> {
        let active = groups.iter().filter(|group| !group.rows.is_empty()).count();
        let rows = groups.last().map_or(0, |group| group.rows.end);
        let shape = self.weights[0].shape();
        let key = TuneKey {
            weights: W::KIND,
            n: shape.n,
            k: shape.k,
            rows: TuneKey::rows_per_expert(rows, active),
            threads: executor.threads().get(),
        };
        let mut best = Tuning::HEURISTIC;
        let is_fp8 = W::KIND == grouped_gemm::WeightKind::Fp8;
        type Vary = fn(Tuning) -> Vec<Tuning>;
        let steps: [Vary; 4] = [
            |best| [72, 48, 24].map(|chunk_rows| Tuning { chunk_rows, ..best }).to_vec(),
            |best| [4, 8, 64].map(|tasks_per_thread| Tuning { tasks_per_thread, ..best }).to_vec(),
            |best| [1, 2, 16].map(|mib: usize| Tuning { span_bytes: mib << 20, ..best }).to_vec(),
            |best| [0, 2, 3].map(|fp8_tile_rows| Tuning { fp8_tile_rows, ..best }).to_vec(),
        ];
        for vary in &steps[..if is_fp8 { 4 } else { 3 }] {
            let candidates: Vec<Tuning> = std::iter::once(best).chain(vary(best)).collect();
            let medians = self.medians(executor, groups, &candidates, reps)?;
            let fastest = (0..medians.len()).min_by(|&a, &b| medians[a].total_cmp(&medians[b])).unwrap_or(0);
            if medians[fastest] < WORTH * medians[0] {
                best = candidates[fastest];
            }
        }
        Ok(TuneRow { key, tuning: best })
    }
}
