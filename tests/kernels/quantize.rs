//! Quantisation: the codes and scales of the host crate, bit for bit.

use std::num::NonZeroUsize;

use fused_moe_core::{Fp8Format, Granularity};
use half::bf16;
use moe_kernels::Arch;
use moe_kernels::host_simt::{Schedule, run};
use moe_kernels::quantize::{Quantize1x128, QuantizeBuffers, QuantizePerToken, ScaleOrder};
use quant::RowQuantizer;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use rstest::rstest;

const POISON: f32 = f32::from_bits(0x7fc0_dead);

/// Activations of all magnitudes, with groups that are zero and numbers that are none.
fn input(random: &mut Pcg64, len: usize) -> Vec<bf16> {
    let special =
        [0x0000, 0x8000, 0x0001, 0x7f80, 0xff80, 0x7fc0, 0xffff, 0x7f7f, 0x0080].map(bf16::from_bits);
    let mut scale = 1.0;
    let value = |index: usize| {
        if index.is_multiple_of(128) {
            scale = [0.0, 1.0, 1e-12, 3e4, 1e-3][random.random_range(0..5)];
        }
        match random.random_range(0..200) {
            0 => special[random.random_range(0..special.len())],
            _ => bf16::from_f32(scale * random.random_range(-2.0..2.0)),
        }
    };
    (0..len).map(value).collect()
}

#[rstest]
fn gives_the_bits_of_the_host(
    #[values(
        (Arch::Sm90a, Fp8Format::E4M3Fn),
        (Arch::Gfx942, Fp8Format::E4M3Fnuz),
        (Arch::Gfx942, Fp8Format::E4M3FnuzMax224),
        (Arch::Gfx950, Fp8Format::E4M3Fn)
    )]
    (arch, format): (Arch, Fp8Format),
    #[values(ScaleOrder::RowMajor, ScaleOrder::Transposed { stride: 11 })] order: ScaleOrder,
    #[values(8, 128, 200, 384)] hidden: usize,
) {
    let seed = rand::random();
    let mut random = Pcg64::seed_from_u64(seed);
    let (rows, input_stride) = (9, hidden + 16);
    let input = input(&mut random, rows * input_stride);
    let job = Quantize1x128 { rows, hidden, input_stride, scales: order, format };
    let mut codes = vec![0xaa; job.code_bytes()];
    let mut scales = vec![POISON; job.scale_len()];
    let buffers = QuantizeBuffers {
        input: input.as_ptr() as u64,
        codes: codes.as_mut_ptr() as u64,
        scales: scales.as_mut_ptr() as u64,
        count: 0,
    };
    // SAFETY: the buffers are as large as the job says.
    unsafe { run(arch, &job.launch(buffers).unwrap(), Schedule::of(seed)) }.unwrap();

    let groups = hidden.div_ceil(128);
    let mut wanted = vec![POISON; scales.len()];
    let quantizer = RowQuantizer::new(format);
    let granularity = Granularity::Group(NonZeroUsize::new(128).unwrap());
    for row in 0..rows {
        let mut row_codes = vec![0; hidden];
        let mut row_scales = vec![0.0; groups];
        let values = &input[row * input_stride..][..hidden];
        quantizer.quantize_per_group(values, granularity, &mut row_codes, &mut row_scales).unwrap();
        assert_eq!(&codes[row * hidden..][..hidden], row_codes, "codes of row {row}, seed {seed}");
        for (group, scale) in row_scales.into_iter().enumerate() {
            let at = match order {
                ScaleOrder::RowMajor => row * groups + group,
                ScaleOrder::Transposed { stride } => group * stride + row,
            };
            wanted[at] = scale;
        }
    }
    let bits = |scales: &[f32]| scales.iter().map(|scale| scale.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&scales), bits(&wanted), "scales, seed {seed}");
}

#[rstest]
fn rows_give_the_bits_of_the_host(
    #[values(
        (Arch::Sm90a, Fp8Format::E4M3Fn),
        (Arch::Gfx942, Fp8Format::E4M3Fnuz),
        (Arch::Gfx950, Fp8Format::E4M3Fn)
    )]
    (arch, format): (Arch, Fp8Format),
    #[values(8, 200, 4096)] hidden: usize,
) {
    let seed = rand::random();
    let mut random = Pcg64::seed_from_u64(seed);
    let (rows, input_stride) = (5, hidden + 8);
    let input = input(&mut random, rows * input_stride);
    let job = QuantizePerToken { rows, hidden, input_stride, format };
    let (mut codes, mut scales) = (vec![0xaa; rows * hidden], vec![POISON; rows]);
    let buffers = QuantizeBuffers {
        input: input.as_ptr() as u64,
        codes: codes.as_mut_ptr() as u64,
        scales: scales.as_mut_ptr() as u64,
        count: 0,
    };
    // SAFETY: the buffers are as large as the job says.
    unsafe { run(arch, &job.launch(buffers).unwrap(), Schedule::of(seed)) }.unwrap();
    for row in 0..rows {
        let mut wanted = vec![0; hidden];
        let values = &input[row * input_stride..][..hidden];
        let scale = RowQuantizer::new(format).quantize_per_token(values, &mut wanted).unwrap();
        assert_eq!(&codes[row * hidden..][..hidden], wanted, "codes of row {row}, seed {seed}");
        assert_eq!(scales[row].to_bits(), scale.to_bits(), "scale of row {row}, seed {seed}");
    }
}

#[test]
fn refuses_what_a_lane_cannot_read() {
    let job = Quantize1x128 {
        rows: 1,
        hidden: 7004,
        input_stride: 7168,
        scales: ScaleOrder::RowMajor,
        format: Fp8Format::E4M3Fn,
    };
    let refused = |job: Quantize1x128| {
        job.launch(QuantizeBuffers { input: 0, codes: 0, scales: 0, count: 0 }).unwrap_err().to_string()
    };
    assert_eq!(refused(job), "hidden 7004 is not a multiple of 8 (quantize_1x128)");
    let stride = Quantize1x128 { hidden: 7168, input_stride: 7169, ..job };
    assert_eq!(refused(stride), "input stride 7169 is not a multiple of 8 (quantize_1x128)");
    let rows = Quantize1x128 { hidden: 128, rows: 1 << 40, ..job };
    let refusal = refused(rows);
    assert!(refusal.starts_with("groups of all rows 1099511627776 is more than"), "{refusal}");
}
