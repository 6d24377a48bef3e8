//! Quantising activations to FP8 with one scale per 1x128 group, beside a copy of the same bytes in the same run.
//!
//! Both lines are in input bytes per second, so their quotient says how far quantising is from the speed of memory.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fused_moe_core::{DType, Fp8Format, QuantScheme, TensorView};
use half::bf16;
use quant::{Activations, Isa, Quantizer};

/// Tokens and hidden size of DeepSeek-V3; 7 MiB, which is beyond a second-level cache.
const TOKENS: usize = 512;
const HIDDEN: usize = 7168;

fn quantize(criterion: &mut Criterion) {
    // A sequence without structure that no scale group repeats.
    let element = |i: usize| bf16::from_f32((i.wrapping_mul(2_654_435_761) % 65_521) as f32 / 8192.0 - 4.0);
    let hidden: Vec<bf16> = (0..TOKENS * HIDDEN).map(element).collect();
    let view = TensorView::from_slice(&hidden, DType::Bf16, &[TOKENS, HIDDEN]).expect("the sizes are right");

    let mut group = criterion.benchmark_group("quantize 1x128");
    group.throughput(Throughput::Bytes(size_of_val(hidden.as_slice()) as u64));

    let mut copy = hidden.clone();
    group.bench_function("copy", |bencher| {
        bencher.iter(|| copy.copy_from_slice(std::hint::black_box(&hidden)))
    });

    for &isa in Isa::available() {
        let quantizer = Quantizer::for_scheme_with(isa, QuantScheme::Fp8Block(Fp8Format::E4M3Fn));
        let wire = quantizer.wire();
        let mut payload = vec![0; TOKENS * wire.payload_bytes(HIDDEN)];
        let mut scales = vec![0f32; TOKENS * wire.scales_per_token(HIDDEN)];
        group.bench_function(BenchmarkId::new("fp8", isa.name()), |bencher| {
            bencher.iter(|| {
                let activations = Activations::of(std::hint::black_box(view));
                quantizer.quantize_rows(activations, &mut payload, &mut scales).expect("the sizes are right");
            });
        });
    }
    group.finish();
}

criterion_group!(benches, quantize);
criterion_main!(benches);
