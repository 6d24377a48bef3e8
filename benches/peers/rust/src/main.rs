//! The loop over experts that Rust engines write today, in f32, with the matrix product of three libraries: gather an
//! expert's rows, two products, SiLU and multiply, one product, add up.
//!
//! Prints what `benches/peers/experts.py` prints.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use candle_core::{Device, Tensor};
use clap::Parser;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;
use serde::Deserialize;
use serde_json::json;

#[derive(Parser)]
struct Cli {
    /// A file of benches/definitions.
    #[arg(long)]
    shape: PathBuf,
    /// `{"calls": [[id, …], …]}`.
    #[arg(long)]
    routing: PathBuf,
    #[arg(long)]
    threads: usize,
    /// candle-f32, faer-f32, gemm-f32.
    #[arg(long, value_delimiter = ',')]
    kernels: Vec<String>,
}

#[derive(Deserialize)]
struct Shape {
    name: String,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    top_k: usize,
}

#[derive(Deserialize)]
struct Recorded {
    calls: Vec<Vec<usize>>,
}

/// `y[m, n] = x[m, k] · w[n, k]ᵀ`, all row-major.
trait Product {
    fn multiply(&self, x: &[f32], w: &[f32], dims: Dims, y: &mut [f32]) -> Result<()>;
}

#[derive(Clone, Copy)]
struct Dims {
    m: usize,
    n: usize,
    k: usize,
}

struct Faer {
    threads: usize,
}

impl Product for Faer {
    fn multiply(&self, x: &[f32], w: &[f32], Dims { m, n, k }: Dims, y: &mut [f32]) -> Result<()> {
        use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};

        let par = if self.threads == 1 { Par::Seq } else { Par::rayon(self.threads) };
        let x = MatRef::from_row_major_slice(x, m, k);
        let w = MatRef::from_row_major_slice(w, n, k);
        matmul(MatMut::from_row_major_slice_mut(y, m, n), Accum::Replace, x, w.transpose(), 1.0, par);
        Ok(())
    }
}

struct Gemm {
    threads: usize,
}

impl Product for Gemm {
    fn multiply(&self, x: &[f32], w: &[f32], Dims { m, n, k }: Dims, y: &mut [f32]) -> Result<()> {
        use gemm::Parallelism;

        assert!(x.len() == m * k && w.len() == n * k && y.len() == m * n);
        let parallelism =
            if self.threads == 1 { Parallelism::None } else { Parallelism::Rayon(self.threads) };
        // SAFETY: the lengths are those of the three matrices, and `y` is borrowed alone.
        unsafe {
            gemm::gemm(
                m, n, k, y.as_mut_ptr(), 1, n as isize, false, x.as_ptr(), 1, k as isize, w.as_ptr(),
                k as isize, 1, 0.0, 1.0, false, false, false, parallelism,
            );
        }
        Ok(())
    }
}

/// The layer of all experts, and the buffers of the loop.
struct Layer {
    shape: Shape,
    gate_up: Vec<Vec<f32>>,
    down: Vec<Vec<f32>>,
}

impl Layer {
    /// All experts hold the same values, each in memory of its own.
    fn new(shape: Shape) -> Self {
        let mut random = Pcg64Mcg::seed_from_u64(7);
        let mut matrix = |len: usize, k: usize| -> Vec<f32> {
            let size = 1.0 / (k as f32).sqrt();
            (0..len).map(|_| (random.random::<f32>() - 0.5) * size).collect()
        };
        let (hidden, inter) = (shape.hidden, shape.intermediate);
        let (one, two) = (matrix(2 * inter * hidden, hidden), matrix(hidden * inter, inter));
        let gate_up = (0..shape.experts).map(|_| one.clone()).collect();
        let down = (0..shape.experts).map(|_| two.clone()).collect();
        Self { shape, gate_up, down }
    }

    fn run(&self, product: &dyn Product, x: &[f32], weights: &[f32], ids: &[usize]) -> Result<Vec<f32>> {
        let Shape { hidden, intermediate: inter, experts, top_k, .. } = self.shape;
        let mut out = vec![0.0; x.len()];
        for expert in 0..experts {
            let slots: Vec<usize> = (0..ids.len()).filter(|&slot| ids[slot] == expert).collect();
            if slots.is_empty() {
                continue;
            }
            let m = slots.len();
            let rows: Vec<f32> =
                slots.iter().flat_map(|slot| &x[slot / top_k * hidden..][..hidden]).copied().collect();
            let mut both = vec![0.0; m * 2 * inter];
            product.multiply(&rows, &self.gate_up[expert], Dims { m, n: 2 * inter, k: hidden }, &mut both)?;
            let act: Vec<f32> = both
                .chunks(2 * inter)
                .flat_map(|row| {
                    let (gate, up) = row.split_at(inter);
                    gate.iter().zip(up).map(|(&gate, &up)| gate / (1.0 + (-gate).exp()) * up)
                })
                .collect();
            let mut result = vec![0.0; m * hidden];
            product.multiply(&act, &self.down[expert], Dims { m, n: hidden, k: inter }, &mut result)?;
            for (&slot, result) in slots.iter().zip(result.chunks(hidden)) {
                let token = &mut out[slot / top_k * hidden..][..hidden];
                token.iter_mut().zip(result).for_each(|(out, y)| *out += weights[slot] * y);
            }
        }
        Ok(out)
    }
}

/// candle keeps its own tensors, so the loop is written with its operations.
struct CandleLayer {
    shape: Shape,
    gate_up: Vec<Tensor>,
    down: Vec<Tensor>,
}

impl CandleLayer {
    fn new(layer: Layer) -> Result<Self> {
        let (hidden, inter) = (layer.shape.hidden, layer.shape.intermediate);
        let tensors = |matrices: Vec<Vec<f32>>, dims: (usize, usize)| -> Result<Vec<Tensor>> {
            Ok(matrices
                .into_iter()
                .map(|matrix| Tensor::from_vec(matrix, dims, &Device::Cpu))
                .collect::<Result<_, _>>()?)
        };
        Ok(Self {
            gate_up: tensors(layer.gate_up, (2 * inter, hidden))?,
            down: tensors(layer.down, (hidden, inter))?,
            shape: layer.shape,
        })
    }

    fn run(&self, x: &Tensor, weights: &[f32], ids: &[usize]) -> Result<Tensor> {
        let Shape { experts, top_k, intermediate: inter, .. } = self.shape;
        let mut out = x.zeros_like()?;
        for expert in 0..experts {
            let slots: Vec<usize> = (0..ids.len()).filter(|&slot| ids[slot] == expert).collect();
            if slots.is_empty() {
                continue;
            }
            let tokens: Vec<u32> = slots.iter().map(|slot| (slot / top_k) as u32).collect();
            let weights: Vec<f32> = slots.iter().map(|&slot| weights[slot]).collect();
            let tokens = Tensor::new(tokens, &Device::Cpu)?;
            let both = x.index_select(&tokens, 0)?.matmul(&self.gate_up[expert].t()?)?;
            let gate = both.narrow(1, 0, inter)?;
            let y = (gate.silu()? * both.narrow(1, inter, inter)?)?.matmul(&self.down[expert].t()?)?;
            let y = y.broadcast_mul(&Tensor::new(weights, &Device::Cpu)?.unsqueeze(1)?)?;
            out = out.index_add(&tokens, &y, 0)?;
        }
        Ok(out)
    }
}

/// One thread is measured by CPU time, several by the time that passes.
fn timed<T>(threads: usize, call: impl FnOnce() -> Result<T>) -> Result<f64> {
    let ran = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
    };
    let (before, start) = (ran(), Instant::now());
    std::hint::black_box(call()?);
    let took = if threads == 1 { ran() - before } else { start.elapsed() };
    Ok(took.as_secs_f64() * 1e3)
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    rayon::ThreadPoolBuilder::new().num_threads(cli.threads).build_global()?;
    let text = std::fs::read_to_string(&cli.shape)?;
    let Recorded { calls } = serde_json::from_str(&std::fs::read_to_string(&cli.routing)?)?;
    let name = toml::from_str::<Shape>(&text)?.name;
    let mut rows = Vec::new();
    for kernel in &cli.kernels {
        let shape: Shape = toml::from_str(&text)?;
        let (hidden, top_k) = (shape.hidden, shape.top_k);
        let layer = Layer::new(shape);
        let threads = cli.threads;
        let run: Box<dyn Fn(&[f32], &[f32], &[usize]) -> Result<f64>> = match kernel.as_str() {
            "faer-f32" => Box::new(move |x, w, ids| {
                timed(threads, || layer.run(&Faer { threads }, x, w, ids))
            }),
            "gemm-f32" => Box::new(move |x, w, ids| {
                timed(threads, || layer.run(&Gemm { threads }, x, w, ids))
            }),
            "candle-f32" => {
                let layer = CandleLayer::new(layer)?;
                Box::new(move |x, w, ids| {
                    let x = Tensor::from_slice(x, (x.len() / hidden, hidden), &Device::Cpu)?;
                    timed(threads, || layer.run(&x, w, ids))
                })
            }
            other => bail!("no kernel {other}; there are candle-f32, faer-f32, gemm-f32"),
        };
        let mut by_tokens: BTreeMap<usize, Vec<&[usize]>> = BTreeMap::new();
        for ids in &calls {
            by_tokens.entry(ids.len() / top_k).or_default().push(ids);
        }
        for (tokens, calls) in by_tokens {
            let mut random = Pcg64Mcg::seed_from_u64(tokens as u64);
            let x: Vec<f32> = (0..tokens * hidden).map(|_| random.random::<f32>() - 0.5).collect();
            let weights: Vec<f32> = (0..tokens * top_k).map(|_| random.random::<f32>() / top_k as f32).collect();
            run(&x, &weights, calls[0])?;
            let mut times = calls.iter().map(|ids| run(&x, &weights, ids)).collect::<Result<Vec<_>>>()?;
            times.sort_by(f64::total_cmp);
            rows.push(json!({
                "kernel": kernel, "tokens": tokens, "median_ms": times[times.len() / 2],
                "min_ms": times[0], "max_ms": times[times.len() - 1],
            }));
        }
    }
    println!("{}", json!({ "shape": name, "threads": cli.threads, "rows": rows }));
    Ok(())
}
