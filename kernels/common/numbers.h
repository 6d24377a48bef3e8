// Numbers as the host crates `quant` and `router` have them, bit for bit.
#pragma once

#include "platform.h"

namespace moe {
// The two bf16 of a word.
MOE_DEVICE float low_bf16(u32 word) { return from_bits(word << 16); }
MOE_DEVICE float high_bf16(u32 word) { return from_bits(word & 0xffff0000); }

// Magnitude, 0 for NaN and infinity.
MOE_DEVICE float finite_magnitude(float x) {
    const float magnitude = from_bits(to_bits(x) & 0x7fffffff);
    return magnitude < from_bits(0x7f800000) ? magnitude : 0.0f;
}

MOE_DEVICE float larger(float a, float b) { return a > b ? a : b; }

// Clamped to ±limit; NaN stays NaN.
MOE_DEVICE float clamped(float x, float limit) {
    x = x > limit ? limit : x;
    return x < -limit ? -limit : x;
}

// The scale of a group whose largest finite magnitude is `amax`, for codes up to 1 / inverse_max.
MOE_DEVICE float scale_for_amax(float amax, float inverse_max) { return larger(amax, 1e-10f) * inverse_max; }
} // namespace moe
