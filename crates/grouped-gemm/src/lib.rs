//! Host grouped GEMM over packed expert weights.
//!
//! This is the arithmetic of stage 3 (experts) on a CPU: every expert multiplies its own rows with its
//! own weight, all in one call. Weights are packed once at load into [`PackedBf16`], [`PackedFp8`],
//! [`PackedFp4`] or [`PackedF32`]; fp8 weights stay one byte and fp4 weights half a byte each in memory and are widened
//! exactly, zeros and subnormals included. Rows are gathered by index while they are packed, so no permuted
//! copy of the activations exists, and scales, biases and the activation of gate and up are applied on the
//! tile.
//!
//! ```
//! use grouped_gemm::*;
//! use half::bf16;
//!
//! // Two experts with W = [N = 2, K = 3], three tokens; expert 0 gets token 2, expert 1 tokens 0 and 1.
//! let w = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0].map(bf16::from_f32);
//! let pack = || PackedBf16::pack(Weight { values: &w, n: 2, k: 3 });
//! let weights = [pack()?, pack()?];
//! let x = [1., 2., 3., 4., 5., 6., 7., 8., 9.].map(bf16::from_f32);
//! let gemm = GroupedGemm {
//!     weights: &weights,
//!     activations: Activations::Bf16(Rows { values: &x, pitch: 3 }),
//!     gather: Some(&[2, 0, 1]),
//!     groups: &[Group { rows: 0..1, expert: 0 }, Group { rows: 1..3, expert: 1 }],
//!     router_weights: None,
//!     epilogue: Epilogue::Products,
//! };
//! let executor = Executor::detect();
//! let mut scratch = vec![0; executor.scratch_bytes()];
//! let mut y = [0.0; 6];
//! executor.run(&gemm, &mut scratch, &F32Rows::new(&mut y, 2, 2)?)?;
//! assert_eq!(y, [7., 8., 1., 2., 4., 5.]);
//! # Ok::<(), GemmError>(())
//! ```
//!
//! [`experts`] has what every host experts backend does alike around the two GEMMs: packing a rank's
//! experts for a scheme of the configuration, and quantising activations.
//!
//! What it does not do: sort tokens by expert, add up the experts of a token, or read the environment. Operands are
//! multiplied as bf16, or as f32 if both are ([`PackedF32`]), with AVX-512 BF16, with AVX2 and FMA, or in plain Rust.

mod activation;
mod activations;
mod aligned;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod driver;
mod epilogue;
mod error;
pub mod experts;
mod f32;
mod fp4;
mod fp8;
mod gemm;
mod isa;
mod kernel;
mod panel;
mod portable;
pub mod probe;
mod scale;
mod sink;
mod tasks;
mod tuning;
mod weights;

pub use self::f32::PackedF32;
pub use error::GemmError;
pub use fp4::{Fp4Scale, Fp4Weight, PackedFp4};
pub use fp8::Fp8Kind;
pub use isa::Isa;
pub use panel::{Columns, PackedShape};
pub use scale::WeightScale;
pub use weights::{Fp8Weight, PackedBf16, PackedFp8, PackedWeight, Weight};

pub use activation::Activation;
pub use activations::{ActivationScale, Activations, Rows};
pub use epilogue::Epilogue;
pub use gemm::{Executor, Group, GroupedGemm};
pub use sink::{Bf16Rows, F32Rows, RowSink};
pub use tuning::{TuneFile, TuneKey, TuneRow, Tuning, TuningTable, WeightKind, cpu_model};
