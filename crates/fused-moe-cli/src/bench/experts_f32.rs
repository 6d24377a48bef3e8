//! `fmoe bench experts --f32`: sort, both GEMMs and the weighted sum in f32, by the grouped GEMM alone.

use std::num::NonZeroUsize;

use grouped_gemm::{
    Activation, Activations, Epilogue, Executor, F32Rows, Group, GroupedGemm, Isa, PackedF32, PackedWeight,
    Rows, Weight,
};
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

use super::calls::Calls;
use super::clock::Clock;
use super::experts::{Measured, Shape};
use crate::synthetic::normal;

/// Times of all calls.
pub fn measure(
    shape: &Shape,
    calls: &[Calls],
    (threads, clock): (NonZeroUsize, Clock),
) -> anyhow::Result<Vec<Measured>> {
    let layer = Layer::new(shape, Executor::new(Isa::detect(), threads)?)?;
    calls.iter().map(|calls| layer.measure(calls, clock)).collect()
}

/// Random experts, packed. All hold the same values, each in memory of its own.
struct Layer<'s> {
    shape: &'s Shape,
    executor: Executor,
    w13: Vec<PackedF32>,
    w2: Vec<PackedF32>,
}

/// What a call writes.
struct Buffers {
    gather: Vec<u32>,
    /// Sorted row of each slot.
    positions: Vec<usize>,
    groups: Vec<Group>,
    activated: Vec<f32>,
    products: Vec<f32>,
    scratch: Vec<u8>,
    out: Vec<f32>,
}

impl<'s> Layer<'s> {
    fn new(shape: &'s Shape, executor: Executor) -> anyhow::Result<Self> {
        let &Shape { hidden, intermediate, experts, .. } = shape;
        let mut random = Pcg64::seed_from_u64(7);
        let mut matrix = |n: usize, k: usize| -> Vec<f32> {
            (0..n * k).map(|_| normal(&mut random) / (k as f32).sqrt()).collect()
        };
        let (gate, up) = (matrix(intermediate, hidden), matrix(intermediate, hidden));
        let down = matrix(hidden, intermediate);
        let [gate, up] = [&gate, &up].map(|values| Weight { values, n: intermediate, k: hidden });
        let down = Weight { values: &down, n: hidden, k: intermediate };
        Ok(Self {
            shape,
            executor,
            w13: (0..experts).map(|_| PackedF32::pack_gate_up(gate, up)).collect::<Result<_, _>>()?,
            w2: (0..experts).map(|_| PackedF32::pack(down)).collect::<Result<_, _>>()?,
        })
    }

    fn buffers(&self, tokens: usize) -> Buffers {
        let &Shape { hidden, intermediate, top_k, experts, .. } = self.shape;
        let slots = tokens * top_k;
        Buffers {
            gather: vec![0; slots],
            positions: vec![0; slots],
            groups: Vec::with_capacity(experts),
            activated: vec![0.0; slots * intermediate],
            products: vec![0.0; slots * hidden],
            scratch: vec![0; self.executor.scratch_bytes()],
            out: vec![0.0; tokens * hidden],
        }
    }

    fn measure(&self, calls: &Calls, clock: Clock) -> anyhow::Result<Measured> {
        let &Shape { hidden, intermediate, top_k, .. } = self.shape;
        let (tokens, slots) = (calls.tokens, calls.tokens * top_k);
        let mut random = Pcg64::seed_from_u64(tokens as u64);
        let x: Vec<f32> = (0..tokens * hidden).map(|_| normal(&mut random)).collect();
        let weights: Vec<f32> = (0..slots).map(|_| random.random::<f32>() / top_k as f32).collect();
        let mut buffers = self.buffers(tokens);
        // One call to warm up, then the timed ones.
        self.call((&x, &weights), &calls.ids[0], &mut buffers)?;
        let mut seconds = Vec::new();
        for ids in &calls.ids {
            let (took, done) = clock.time(|| self.call((&x, &weights), ids, &mut buffers));
            done?;
            seconds.push(took.as_secs_f64());
        }
        let per_expert = (self.w13[0].bytes() + self.w2[0].bytes()) as f64;
        Ok(Measured {
            scheme: "f32".to_owned(),
            tokens,
            seconds,
            flops: 6.0 * (hidden * intermediate * slots) as f64,
            bytes: calls.active().map(|active| active as f64 * per_expert).collect(),
        })
    }

    fn call(&self, (x, weights): (&[f32], &[f32]), ids: &[i32], buffers: &mut Buffers) -> anyhow::Result<()> {
        let &Shape { hidden, intermediate, experts, top_k, .. } = self.shape;
        let Buffers { gather, positions, groups, activated, products, scratch, out } = buffers;
        groups.clear();
        let mut next = 0;
        for expert in 0..experts {
            let start = next;
            for slot in (0..ids.len()).filter(|&slot| ids[slot] as usize == expert) {
                (gather[next], positions[slot]) = ((slot / top_k) as u32, next);
                next += 1;
            }
            groups.push(Group { rows: start..next, expert });
        }
        let gemm1 = GroupedGemm {
            weights: &self.w13,
            activations: Activations::F32(Rows { values: x, pitch: hidden }),
            gather: Some(gather),
            groups,
            router_weights: None,
            epilogue: Epilogue::GateUp(Activation::Silu),
        };
        self.executor.run(&gemm1, scratch, &F32Rows::new(activated, intermediate, intermediate)?)?;
        let gemm2 = GroupedGemm {
            weights: &self.w2,
            activations: Activations::F32(Rows { values: activated, pitch: intermediate }),
            gather: None,
            epilogue: Epilogue::Products,
            ..gemm1
        };
        self.executor.run(&gemm2, scratch, &F32Rows::new(products, hidden, hidden)?)?;
        out.fill(0.0);
        for (slot, &position) in positions.iter().enumerate() {
            let sums = &mut out[slot / top_k * hidden..][..hidden];
            let product = &products[position * hidden..][..hidden];
            sums.iter_mut().zip(product).for_each(|(sum, product)| *sum += weights[slot] * product);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is timed is the layer, against its definition in f64.
    #[test]
    fn the_layer_is_what_its_name_says() {
        let [hidden, intermediate, experts, top_k, tokens] = [20, 12, 3, 2, 5];
        let shape = Shape { name: String::new(), hidden, intermediate, experts, top_k, tokens: vec![] };
        let layer = Layer::new(&shape, Executor::detect()).unwrap();
        let calls = Calls::uniform(experts, top_k, tokens, 1);
        let value = |i: usize| ((i * 37 % 64) as f32 - 31.0) / 32.0;
        let x: Vec<f32> = (0..tokens * hidden).map(value).collect();
        let weights: Vec<f32> = (0..tokens * top_k).map(|i| 0.1 + i as f32 / 20.0).collect();
        let mut buffers = layer.buffers(tokens);
        layer.call((&x, &weights), &calls.ids[0], &mut buffers).unwrap();
        let dot = |w: &[f32], x: &[f64]| w.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum::<f64>();
        let expected = |token: usize, column: usize| -> f64 {
            let x: Vec<f64> = x[token * hidden..][..hidden].iter().map(|&x| f64::from(x)).collect();
            let of_slot = |slot: usize| {
                let expert = calls.ids[0][slot] as usize;
                let (w13, w2) = (layer.w13[expert].unpack(), layer.w2[expert].unpack());
                let (gate, up) = w13.split_at(intermediate * hidden);
                let act = gate.chunks(hidden).zip(up.chunks(hidden)).map(|(gate, up)| {
                    let gate = dot(gate, &x);
                    gate / (1.0 + (-gate).exp()) * dot(up, &x)
                });
                let act: Vec<f64> = act.collect();
                f64::from(weights[slot]) * dot(&w2[column * intermediate..][..intermediate], &act)
            };
            (0..top_k).map(|slot| of_slot(token * top_k + slot)).sum()
        };
        for (i, &got) in buffers.out.iter().enumerate() {
            let want = expected(i / hidden, i % hidden);
            assert!((f64::from(got) - want).abs() < 1e-5, "element {i}: {got}, not {want}");
        }
        assert!((0..hidden).any(|column| expected(0, column).abs() > 1e-2), "all of it is zero");
    }
}
