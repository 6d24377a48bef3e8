//! The objects that were built: every kernel is in them for every device, and takes an argument of the size that Rust gives.

use moe_kernels::grouped_gemm::GroupedGemmParams;
use moe_kernels::metadata::CodeObject;
use moe_kernels::quantize::{Quantize1x128Params, QuantizePerTokenParams};
use moe_kernels::router::RouterParams;
use moe_kernels::sorting::MoeSortingParams;
use moe_kernels::weighted_sum::WeightedSumParams;
use moe_kernels::{Arch, object};
use object::{Object, ObjectSection};
use rstest::rstest;

/// Object, kernel, bytes of its argument, and whether it is for Hopper alone.
const KERNELS: [(&str, &str, usize, bool); 10] = [
    ("quantize_1x128", "quantize_1x128", size_of::<Quantize1x128Params>(), false),
    ("quantize_per_token", "quantize_per_token", size_of::<QuantizePerTokenParams>(), false),
    ("moe_sorting", "moe_sorting", size_of::<MoeSortingParams>(), false),
    ("moe_sorting", "moe_sorting_place", size_of::<MoeSortingParams>(), false),
    ("router", "router_128", size_of::<RouterParams>(), false),
    ("router", "router_1024", size_of::<RouterParams>(), false),
    ("weighted_sum", "weighted_sum", size_of::<WeightedSumParams>(), false),
    ("grouped_gemm_bf16_sm90", "grouped_gemm_bf16_8", size_of::<GroupedGemmParams>(), true),
    ("grouped_gemm_fp8_block_sm90", "grouped_gemm_fp8_block_16", size_of::<GroupedGemmParams>(), true),
    ("grouped_gemm_fp8_row_sm90", "grouped_gemm_fp8_row_128", size_of::<GroupedGemmParams>(), true),
];

/// The attribute of `.nv.info.<kernel>` with where the argument is and its size, and how its value is stored.
const PARAM_CBANK: [u8; 2] = [0x04, 0x0a];

#[rstest]
fn kernels_take_what_rust_gives(#[values(Arch::Sm90a, Arch::Gfx942, Arch::Gfx950)] arch: Arch) {
    for (name, kernel, bytes, of_hopper) in KERNELS {
        if of_hopper && arch != Arch::Sm90a {
            assert!(object(arch, name).is_err(), "{name} for {arch}");
            continue;
        }
        let image = object(arch, name).unwrap();
        let found = match arch {
            Arch::Sm90a => nvidia_argument(image, kernel),
            Arch::Gfx942 | Arch::Gfx950 => amd_argument(image, kernel),
        };
        assert_eq!(found, bytes, "{kernel} for {arch}");
    }
}

/// Attributes are `format, attribute, u16`, and where the format is 4, as many bytes more as the last says.
fn nvidia_argument(image: &[u8], kernel: &str) -> usize {
    let file = object::File::parse(image).unwrap();
    let section = file.section_by_name(&format!(".nv.info.{kernel}")).expect("the kernel has attributes");
    let mut rest = section.data().unwrap();
    while let [format, attribute, low, high, tail @ ..] = rest {
        let len = if *format == 4 { usize::from(u16::from_le_bytes([*low, *high])) } else { 0 };
        if [*format, *attribute] == PARAM_CBANK {
            return usize::from(u16::from_le_bytes([tail[6], tail[7]]));
        }
        rest = &tail[len..];
    }
    panic!("{kernel} has no attribute with the size of its argument");
}

/// Nothing of the kernel may be spilled.
fn amd_argument(image: &[u8], kernel: &str) -> usize {
    let object = CodeObject::parse(image).unwrap();
    let found = object.kernel(kernel).unwrap_or_else(|| panic!("no kernel {kernel}"));
    assert_eq!((found.spills, found.stack_bytes), (0, 0), "spills and stack of {kernel}");
    found.kernarg_bytes
}
