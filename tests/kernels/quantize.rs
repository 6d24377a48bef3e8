//! Quantisation: the codes and scales of the host crate, bit for bit.

use std::num::NonZeroUsize;

use fused_moe_core::{Fp8Format, Granularity, ScaleOrder};
use half::bf16;
use moe_kernels::host_simt::{Schedule, run};
use moe_kernels::quantize::{Quantize1x128, QuantizeBuffers, QuantizePerToken};
use moe_kernels::{Arch, BadLaunch, KernelParams, Launch};
use quant::RowQuantizer;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use rstest::rstest;

const POISON: f32 = f32::from_bits(0x7fc0_dead);
/// A code that no number here has: that of negative NaN.
const UNWRITTEN: u8 = 0xff;

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

/// Codes and scales that a kernel writes over poison, as `arch` runs it. If `count` is given, the kernel is told that there are so
/// many rows.
fn quantized<P: KernelParams>(
    arch: Arch,
    seed: u64,
    (input, codes, scales): (&[bf16], usize, usize),
    count: Option<u32>,
    launch: impl Fn(QuantizeBuffers) -> Result<Launch<P>, BadLaunch>,
) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut scales) = (vec![UNWRITTEN; codes], vec![POISON; scales]);
    let launch = launch(QuantizeBuffers {
        input: input.as_ptr() as u64,
        codes: codes.as_mut_ptr() as u64,
        scales: scales.as_mut_ptr() as u64,
        count: count.as_ref().map_or(0, |count| std::ptr::from_ref(count) as u64),
    });
    // SAFETY: the buffers are as large as the callers' jobs say.
    unsafe { run(arch, &launch.unwrap(), Schedule::of(seed)) }.unwrap();
    (codes, scales)
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
    let sizes = (job.code_bytes(), job.scale_len().unwrap());
    let buffers = (&input[..], sizes.0, sizes.1);
    let (codes, scales) = quantized(arch, seed, buffers, None, |buffers| job.launch(buffers));

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
                order => panic!("no kernel writes {order:?}"),
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
    let (codes, scales) =
        quantized(arch, seed, (&input, rows * hidden, rows), None, |buffers| job.launch(buffers));
    for row in 0..rows {
        let mut wanted = vec![0; hidden];
        let values = &input[row * input_stride..][..hidden];
        let scale = RowQuantizer::new(format).quantize_per_token(values, &mut wanted).unwrap();
        assert_eq!(&codes[row * hidden..][..hidden], wanted, "codes of row {row}, seed {seed}");
        assert_eq!(scales[row].to_bits(), scale.to_bits(), "scale of row {row}, seed {seed}");
    }
}

/// A call for the worst case leaves alone what is beyond the rows that there are.
#[rstest]
fn rows_are_counted_on_the_device(#[values(0, 1, 4, 9, 1000)] count: u32) {
    let (rows, hidden, format) = (9, 256, Fp8Format::E4M3Fn);
    let input = input(&mut Pcg64::seed_from_u64(1), rows * hidden);
    let there = rows.min(count as usize);
    let groups = Quantize1x128 { rows, hidden, input_stride: hidden, scales: ScaleOrder::RowMajor, format };
    let all = (&input[..], rows * hidden, rows * 2);
    let (codes, scales) = quantized(Arch::Sm90a, 1, all, Some(count), |buffers| groups.launch(buffers));
    let (whole, whole_scales) = quantized(Arch::Sm90a, 1, all, None, |buffers| groups.launch(buffers));
    assert_eq!(codes[..there * hidden], whole[..there * hidden]);
    assert_eq!(scales[..there * 2], whole_scales[..there * 2]);
    assert!(codes[there * hidden..].iter().all(|&code| code == UNWRITTEN));
    assert!(scales[there * 2..].iter().all(|scale| scale.to_bits() == POISON.to_bits()));

    let tokens = QuantizePerToken { rows, hidden, input_stride: hidden, format };
    let all = (&input[..], rows * hidden, rows);
    let (codes, scales) = quantized(Arch::Gfx950, 1, all, Some(count), |buffers| tokens.launch(buffers));
    assert!(scales[..there].iter().all(|scale| scale.is_finite()));
    assert!(codes[there * hidden..].iter().all(|&code| code == UNWRITTEN));
    assert!(scales[there..].iter().all(|scale| scale.to_bits() == POISON.to_bits()));
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
    let swizzled = Quantize1x128 { hidden: 128, input_stride: 128, scales: ScaleOrder::Swizzled128x4, ..job };
    assert!(refused(swizzled).starts_with("scales in the order Swizzled128x4"));
    let refusal = refused(rows);
    assert!(refusal.starts_with("groups of all rows 1099511627776 is more than"), "{refusal}");
}
