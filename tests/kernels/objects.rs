//! The objects that were built: every kernel is in them for every device, and takes an argument of the size that Rust gives.

use moe_kernels::grouped_gemm::{GemmScheme, GroupedGemmParams};
use moe_kernels::metadata::CodeObject;
use moe_kernels::quantize::{Quantize1x128Params, QuantizePerTokenParams};
use moe_kernels::router::RouterParams;
use moe_kernels::sorting::MoeSortingParams;
use moe_kernels::weighted_sum::WeightedSumParams;
use moe_kernels::{Arch, object};
use object::{Object, ObjectSection};
use rstest::rstest;

/// Object, kernel, and bytes of its argument, of what all devices have.
const FOR_ALL: [(&str, &str, usize); 7] = [
    ("quantize_1x128", "quantize_1x128", size_of::<Quantize1x128Params>()),
    ("quantize_per_token", "quantize_per_token", size_of::<QuantizePerTokenParams>()),
    ("moe_sorting", "moe_sorting", size_of::<MoeSortingParams>()),
    ("moe_sorting", "moe_sorting_place", size_of::<MoeSortingParams>()),
    ("router", "router_128", size_of::<RouterParams>()),
    ("router", "router_1024", size_of::<RouterParams>()),
    ("weighted_sum", "weighted_sum", size_of::<WeightedSumParams>()),
];

/// An instruction, and what its encoding begins with.
type Instruction = (&'static str, u16);

/// The instructions that multiply, by the upper half of their first word: MFMA has the encoding VOP3P-MAI, 0xd380 and the opcode.
const MFMA: [(Arch, GemmScheme, [Instruction; 2]); 6] = [
    (
        Arch::Gfx942,
        GemmScheme::Bf16,
        [("v_mfma_f32_16x16x16_bf16", 0xd3e1), ("v_mfma_f32_32x32x8_bf16", 0xd3e0)],
    ),
    (
        Arch::Gfx942,
        GemmScheme::Fp8Block,
        [("v_mfma_f32_16x16x32_fp8_fp8", 0xd3f3), ("v_mfma_f32_32x32x16_fp8_fp8", 0xd3f7)],
    ),
    (
        Arch::Gfx942,
        GemmScheme::Fp8Row,
        [("v_mfma_f32_16x16x32_fp8_fp8", 0xd3f3), ("v_mfma_f32_32x32x16_fp8_fp8", 0xd3f7)],
    ),
    (
        Arch::Gfx950,
        GemmScheme::Bf16,
        [("v_mfma_f32_16x16x32_bf16", 0xd3b5), ("v_mfma_f32_32x32x16_bf16", 0xd3b7)],
    ),
    (
        Arch::Gfx950,
        GemmScheme::Fp8Block,
        [("v_mfma_f32_16x16x128_f8f6f4", 0xd3ad), ("v_mfma_f32_32x32x64_f8f6f4", 0xd3ae)],
    ),
    (
        Arch::Gfx950,
        GemmScheme::Fp8Row,
        [("v_mfma_f32_16x16x128_f8f6f4", 0xd3ad), ("v_mfma_f32_32x32x64_f8f6f4", 0xd3ae)],
    ),
];

/// The attribute of `.nv.info.<kernel>` with where the argument is and its size, and how its value is stored.
const PARAM_CBANK: [u8; 2] = [0x04, 0x0a];

#[rstest]
fn kernels_take_what_rust_gives(#[values(Arch::Sm90a, Arch::Gfx942, Arch::Gfx950)] arch: Arch) {
    let gemms = GemmScheme::ALL.into_iter().flat_map(|scheme| {
        let (object, kernels) = scheme.kernels(arch);
        kernels.map(|kernel| (object, kernel, size_of::<GroupedGemmParams>()))
    });
    for (name, kernel, bytes) in FOR_ALL.into_iter().chain(gemms) {
        let image = object(arch, name).unwrap();
        let found = match arch {
            Arch::Sm90a => nvidia_argument(image, kernel),
            Arch::Gfx942 | Arch::Gfx950 => amd_argument(image, kernel),
        };
        assert_eq!(found, bytes, "{kernel} for {arch}");
    }
}

/// What multiplies are the instructions that are meant for it, each in the kernels of some tiles.
#[test]
fn products_are_those_of_matrix_cores() {
    for (arch, scheme, wanted) in MFMA {
        let (name, _) = scheme.kernels(arch);
        let file = object::File::parse(object(arch, name).unwrap()).unwrap();
        let code = file.section_by_name(".text").expect("there is code").data().unwrap();
        let count = |half: u16| {
            let halves = code.as_chunks::<4>().0.iter().map(|word| u16::from_le_bytes([word[2], word[3]]));
            halves.filter(|&found| found == half).count()
        };
        for (instruction, half) in wanted {
            assert!(count(half) >= 8, "{} of {instruction} in {name}", count(half));
        }
        for (other, _, instructions) in MFMA {
            for (instruction, half) in instructions {
                let is_wanted = wanted.iter().any(|&(_, wanted)| wanted == half);
                assert!(is_wanted || count(half) == 0, "{instruction} of {other} in {name}");
            }
        }
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
