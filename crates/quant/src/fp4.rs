//! FP4: E2M1 codes in pairs, the scales that go with them, and their quantisers.
//!
//! E2M1 has a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6. It has a negative zero and
//! neither infinity nor NaN. Two neighbours of a row share a byte, the even column in the low half.
//!
//! | format | group | scale | value |
//! |---|---|---|---|
//! | MXFP4 | 1x32 | E8M0 (a power of two) | `code · 2^(scale - 127)` |
//! | NVFP4 | 1x16 | E4M3 (OCP), and one f32 for the tensor | `code · scale · global` |
//!
//! A row is whole groups: a ragged row is [`QuantError::RaggedGroup`].
//!
//! ```
//! use half::bf16;
//! use quant::fp4;
//!
//! let row: Vec<bf16> = (0..16).map(|i| bf16::from_f32(i as f32 - 7.0)).collect();
//! let (mut codes, mut scales) = ([0; 8], [0; 1]);
//! let rows = fp4::Nvfp4Rows::new(8.0 / 2688.0)?;
//! rows.quantize(&row, &mut codes, &mut scales)?;
//! // -7 and -6 are -6 and -4 times a scale near 8/6; the largest magnitude gets the largest code.
//! assert_eq!((codes[0], codes[7]), (0xef, 0x77));
//! # Ok::<(), quant::QuantError>(())
//! ```

mod rows;
mod weights;

pub use rows::Nvfp4Rows;
pub use weights::{Fp4Scales, Fp4Weights, quantize_mxfp4, quantize_nvfp4};

use crate::error::{QuantError, check_len};

/// Columns under one E8M0 scale of MXFP4.
pub const MX_GROUP: usize = 32;
/// Columns under one E4M3 scale of NVFP4.
pub const NV_GROUP: usize = 16;
/// Largest magnitude.
pub const MAX: f32 = 6.0;
/// The E8M0 code of NaN.
pub const E8M0_NAN: u8 = 0xff;

/// The values of all sixteen codes.
pub const VALUES: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The value of the code in the low half of `code`.
pub const fn decode(code: u8) -> f32 {
    VALUES[(code & 0xf) as usize]
}

/// The code nearest to `x`, ties to the even code, ±6 beyond. NaN, which has no code, becomes 6 as NVIDIA's `cvt`
/// has it; the quantisers of this module never come to that.
#[inline(always)]
pub fn encode(x: f32) -> u8 {
    // Below each of these the next smaller code is nearest; at a midpoint the even one of two codes is taken.
    let a = x.abs();
    let odd = u8::from(a > 0.25) + u8::from(a > 1.25) + u8::from(a > 2.5) + u8::from(a > 5.0);
    let even = u8::from(a >= 0.75) + u8::from(a >= 1.75) + u8::from(a >= 3.5);
    let magnitude = if x.is_nan() { 7 } else { odd + even };
    let sign = if x.is_nan() { 0 } else { (x.to_bits() >> 28) as u8 & 8 };
    magnitude | sign
}

/// The value of an E8M0 code, `2^(code - 127)`, exactly: code 0 is a subnormal f32, 0xFF is NaN.
pub const fn decode_e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        E8M0_NAN => f32::NAN,
        _ => f32::from_bits((code as u32) << 23),
    }
}

/// Packs codes, one in the low half of every byte, into pairs. `packed` is half as long.
///
/// # Errors
/// [`QuantError::RaggedGroup`] for an odd number of codes, [`QuantError::BufferLength`].
pub fn pack(codes: &[u8], packed: &mut [u8]) -> Result<(), QuantError> {
    whole_groups(codes.len(), 2)?;
    check_len("packed codes", codes.len() / 2, packed.len())?;
    for (packed, [even, odd]) in packed.iter_mut().zip(codes.as_chunks().0) {
        *packed = (even & 0xf) | odd << 4;
    }
    Ok(())
}

/// Undoes [`pack`]. `codes` is twice as long as `packed`.
///
/// # Errors
/// [`QuantError::BufferLength`].
pub fn unpack(packed: &[u8], codes: &mut [u8]) -> Result<(), QuantError> {
    check_len("codes", 2 * packed.len(), codes.len())?;
    for (packed, [even, odd]) in packed.iter().zip(codes.as_chunks_mut().0) {
        (*even, *odd) = (packed & 0xf, packed >> 4);
    }
    Ok(())
}

/// Refuses a row of `columns` elements that is not whole groups.
pub(crate) fn whole_groups(columns: usize, group: usize) -> Result<(), QuantError> {
    if columns.is_multiple_of(group) { Ok(()) } else { Err(QuantError::RaggedGroup { columns, group }) }
}
