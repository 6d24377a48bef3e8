//! What every host experts backend does alike: resolve a scheme, pack a rank's experts, quantise activations, run the
//! two GEMMs.
//!
//! How rows reach their experts and what becomes of the products differs between backends and is not here.
//!
//! ```
//! use fused_moe_core::{Fp8Format, QuantScheme};
//! use grouped_gemm::experts::{Scaling, Scheme};
//!
//! let Some(Scheme::Fp8(fp8)) = Scheme::of(QuantScheme::Fp8Block(Fp8Format::E4M3Fn)) else { unreachable!() };
//! assert_eq!(fp8.scaling, Scaling::Block);
//! assert_eq!(fp8.scaling.scales_per_row(257), 3);
//! ```

mod error;
mod layout;
mod matrix;
mod quantize;
mod received;
mod rows;
mod scheme;
mod scratch;
mod sum;
mod support;
mod two_gemms;
mod weights;

pub use error::ExpertsError;
pub use scheme::{Fp8Scheme, Scaling, Scheme, epilogue};
pub use support::{Supported, accepted_wires, check_plan};

pub use layout::WeightLayout;
pub use weights::{Gemms, PackedExperts, PackedGemms};

pub use quantize::Codes;
pub use received::{Received, SCALES, check_scale, visit_local};
pub use rows::{Pitched, PitchedMut};
pub use scratch::{CodeSizes, GroupSlots, Word, words};
pub use sum::sum_slots;
pub use two_gemms::{Between, GemmPieces, GemmRows, GemmSizes, TwoGemms};
