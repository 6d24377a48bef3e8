// Numbers as the host crates `quant` and `router` have them, bit for bit.
#pragma once

#include "platform.h"

namespace moe {
// The two bf16 of a word.
MOE_DEVICE float low_bf16(u32 word) { return from_bits(word << 16); }
MOE_DEVICE float high_bf16(u32 word) { return from_bits(word & 0xffff0000); }

// The nearest bf16, ties to even; of finite numbers.
MOE_DEVICE u16 to_bf16(float x) {
    const u32 bits = to_bits(x);
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
MOE_DEVICE u32 two_bf16(float low, float high) { return u32(to_bf16(high)) << 16 | to_bf16(low); }

// Magnitudes of the two bf16 of a word, as bits that compare as the numbers do.
MOE_DEVICE u32 magnitudes(u32 word) { return word & 0x7fff7fff; }

// The same with 0 for NaN and infinity.
MOE_DEVICE u32 finite_magnitudes(u32 word) {
    constexpr u32 INFINITY_BITS = 0x7f80;
    u32 low = word & 0x7fff, high = word >> 16 & 0x7fff;
    low = low < INFINITY_BITS ? low : 0;
    high = high < INFINITY_BITS ? high : 0;
    return high << 16 | low;
}

MOE_DEVICE float larger(float a, float b) { return a > b ? a : b; }

// Codes of the four bf16 of two words, times `factor`.
MOE_DEVICE u32 scaled_fp8x4(u32 first, u32 second, float factor, float max) {
    return to_fp8x4(low_bf16(first) * factor, high_bf16(first) * factor, low_bf16(second) * factor,
                    high_bf16(second) * factor, max);
}

// The scale of a group whose largest finite magnitude is `amax`, for codes up to 1 / inverse_max.
MOE_DEVICE float scale_for_amax(float amax, float inverse_max) { return larger(amax, 1e-10f) * inverse_max; }
} // namespace moe
