//! Quantisation on the device: the bits of the host crate.

use std::num::NonZeroUsize;

use fused_moe_core::{Granularity, ScaleOrder};
use half::bf16;
use libtest_mimic::Failed;
use moe_kernels::quantize::{Quantize1x128, QuantizeBuffers};
use quant::RowQuantizer;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

use crate::{Gpu, OnGpu};

pub const TESTS: [(&str, OnGpu); 2] =
    [("quantize_1x128_has_the_bits_of_the_host", bits), ("quantize_1x128_of_no_rows", no_rows)];

/// What no scale is.
const POISON: u8 = 0xff;

fn bits(gpu: &Gpu) -> Result<(), Failed> {
    for (rows, hidden) in [(1, 128), (3, 200), (17, 7168), (4096, 2048), (129, 8)] {
        for scales in [ScaleOrder::RowMajor, ScaleOrder::Transposed { stride: rows + 3 }] {
            let format = gpu.kernels.arch().fp8();
            let job = Quantize1x128 { rows, hidden, input_stride: hidden + 8, scales, format };
            let seed = rand::random();
            compare(gpu, &job, seed).map_err(|error| format!("{job:?}, seed {seed}: {}", text(&error)))?;
        }
    }
    Ok(())
}

fn text(error: &Failed) -> &str {
    error.message().unwrap_or("failed")
}

fn no_rows(gpu: &Gpu) -> Result<(), Failed> {
    let format = gpu.kernels.arch().fp8();
    let job =
        Quantize1x128 { rows: 0, hidden: 7168, input_stride: 7168, scales: ScaleOrder::RowMajor, format };
    compare(gpu, &job, 1)
}

fn compare(gpu: &Gpu, job: &Quantize1x128, seed: u64) -> Result<(), Failed> {
    let mut random = Pcg64::seed_from_u64(seed);
    let input: Vec<bf16> = (0..job.rows * job.input_stride)
        .map(|_| match random.random_range(0..100) {
            0 => bf16::from_bits(random.random()),
            1 => bf16::ZERO,
            _ => bf16::from_f32(random.random_range(-4.0..4.0)),
        })
        .collect();
    let bytes: Vec<u8> = input.iter().flat_map(|x| x.to_le_bytes()).collect();
    let stream = gpu.runtime.stream()?;
    let mut device_input = gpu.runtime.alloc(bytes.len())?;
    device_input.write(&bytes)?;
    let mut codes = gpu.runtime.alloc(job.code_bytes())?;
    let mut scales = gpu.runtime.alloc(job.scale_len()? * 4)?;
    let launch = job.launch(QuantizeBuffers {
        input: device_input.address(),
        codes: codes.address(),
        scales: scales.address(),
        count: 0,
    })?;
    let (wanted_codes, wanted_scales) = on_host(job, &input)?;
    // Once as it is, once from a graph; both over poison.
    // SAFETY: the buffers are as large as the job says and are there until the stream has been waited for.
    let graph = stream.capture(|stream| unsafe { gpu.kernels.launch(&launch, stream) })?;
    for replayed in [false, true] {
        codes.fill(POISON, &stream)?;
        scales.fill(POISON, &stream)?;
        // SAFETY: as above.
        unsafe { if replayed { graph.replay(&stream)? } else { gpu.kernels.launch(&launch, &stream)? } }
        stream.wait()?;
        let mut got_codes = vec![0; codes.bytes()];
        codes.read(&mut got_codes)?;
        let mut got_scales = vec![0; scales.bytes()];
        scales.read(&mut got_scales)?;
        if got_codes != wanted_codes {
            let at = got_codes.iter().zip(&wanted_codes).position(|(got, wanted)| got != wanted);
            return Err(format!("codes differ at {at:?}, from a graph: {replayed}").into());
        }
        if got_scales != wanted_scales {
            return Err(format!("scales differ, from a graph: {replayed}").into());
        }
    }
    Ok(())
}

/// Codes and the bytes of the scales.
fn on_host(job: &Quantize1x128, input: &[bf16]) -> Result<(Vec<u8>, Vec<u8>), Failed> {
    let groups = job.hidden.div_ceil(128);
    let granularity = Granularity::Group(NonZeroUsize::new(128).ok_or("zero")?);
    let quantizer = RowQuantizer::new(job.format);
    let mut codes = vec![POISON; job.code_bytes()];
    let mut scales = vec![POISON; job.scale_len()? * 4];
    for row in 0..job.rows {
        let mut row_scales = vec![0.0; groups];
        let values = &input[row * job.input_stride..][..job.hidden];
        let row_codes = &mut codes[row * job.hidden..][..job.hidden];
        quantizer.quantize_per_group(values, granularity, row_codes, &mut row_scales)?;
        for (group, scale) in row_scales.into_iter().enumerate() {
            let at = match job.scales {
                ScaleOrder::RowMajor => row * groups + group,
                ScaleOrder::Transposed { stride } => group * stride + row,
                order => return Err(format!("no kernel writes {order:?}").into()),
            };
            scales[at * 4..][..4].copy_from_slice(&scale.to_le_bytes());
        }
    }
    Ok((codes, scales))
}
