//! FP8 and FP4 codecs and quantisers of the fused-moe pipeline, on the host.
//!
//! Activations meet this crate twice: before dispatch (stage 2, or before gemm1) and, once the activation
//! function's output has been rounded to bf16, before gemm2 (stage 3). Weights meet it at load.
//!
//! `x ≈ q·s` everywhere, and one formula is normative, in f32, with IEEE division, without flush to zero and
//! without contraction, so that every instruction set gives the same bits:
//!
//! ```text
//! amax = max(largest finite |x| of the scale group, 1e-10)
//! s    = amax · (1/max)                  max: 448 (OCP), 240 or 224 (FNUZ)
//! q    = round_to_nearest_even(clamp(x · (1/s), ±max))
//! ```
//!
//! NaN becomes the NaN code and ±Inf the largest code of its sign. Neither takes part in `amax`, so the other
//! elements of the group keep the codes that they would have had without it.
//!
//! ```
//! use fused_moe_core::{DType, Fp8Format, QuantScheme, TensorView};
//! use half::bf16;
//! use quant::{Activations, Quantizer};
//!
//! let hidden: Vec<bf16> = (0..300).map(|i| bf16::from_f32(i as f32 - 150.0)).collect();
//! let view = TensorView::from_slice(&hidden, DType::Bf16, &[1, 300])?;
//! let quantizer = Quantizer::for_scheme(QuantScheme::Fp8Block(Fp8Format::E4M3Fn));
//! let wire = quantizer.wire();
//! let mut payload = vec![0; wire.payload_bytes(300)];
//! let mut scales = vec![0; wire.scale_bytes(300)];
//! quantizer.prepare(Activations::of(view))?.row(0, &mut payload, &mut scales)?;
//! assert_eq!((payload[0], scales.len()), (0xfe, 3 * 4));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`fp4`] has MXFP4 and NVFP4, whose formulas stand there. [`sum_rows`] is the sum of a combine, with the same
//! instruction sets.
//!
//! What it does not do: no GPU code, no threads of its own (rows are independent; callers split them), no swizzled
//! or transposed scale layouts.

mod error;

mod codec;
mod isa;
mod kernel;

mod quantizer;
mod row;

mod convert;
mod sum;
mod weights;

pub mod fp4;

pub use codec::{decode, decode_table, decode_table_bf16, encode};
pub use convert::e4m3fn_to_e4m3fnuz;
pub use error::QuantError;
pub use isa::Isa;
pub use quantizer::{Activations, PerGroup, PerTensor, PerToken, PreparedRows, Quantizer, Unquantized};
pub use row::{QuantizedRow, RowQuantizer, Unrounded, scale_for_amax};
pub use sum::{SumElement, Term, sum_rows};
pub use weights::{QuantizedWeights, WeightQuantizer, WeightScales};
