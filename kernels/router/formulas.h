// Scores with the bits of the crate `router`: every operation rounds once, and none are joined.
#pragma once

#include "../common/numbers.h"

namespace moe {
MOE_DEVICE float infinity() { return from_bits(0x7f800000); }

// elementary::exp, for x <= 0, which says what the constants are.
MOE_DEVICE float exponential(float x) {
    constexpr float ROUND = 12582912.0f, LOG2_E = 1.44269504088896340736f;
    const float shifted = x * LOG2_E + ROUND;
    const u32 power = to_bits(shifted) - to_bits(ROUND);
    const float whole = shifted - ROUND;
    const float rest = (x - whole * 0.693359375f) - whole * -2.1219444e-4f;
    float p = 1.3814318e-3f;
    p = p * rest + 8.368852e-3f;
    p = p * rest + 4.16684e-2f;
    p = p * rest + 1.666652e-1f;
    p = p * rest + 0.49999994f;
    const float fraction = (p * (rest * rest) + rest) + 1.0f;
    const float y = from_bits(to_bits(fraction) + (power << 23));
    return x < -87.0f ? 0.0f : y;
}

// elementary::ln_1p.
MOE_DEVICE float ln_1p(float x) {
    const float s = x * reciprocal(x + 2.0f);
    const float square = s * s;
    float p = 2.0f / 13.0f;
    p = p * square + 2.0f / 11.0f;
    p = p * square + 2.0f / 9.0f;
    p = p * square + 2.0f / 7.0f;
    p = p * square + 0.4f;
    p = p * square + 2.0f / 3.0f;
    return (p * square) * s + 2.0f * s;
}

MOE_DEVICE float magnitude(float x) { return from_bits(to_bits(x) & 0x7fffffff); }

MOE_DEVICE float sigmoid(float x) {
    const float e = exponential(-magnitude(x));
    const float larger = reciprocal(1.0f + e);
    return x < 0.0f ? e * larger : larger;
}

MOE_DEVICE float sqrt_softplus(float x) {
    const bool is_far = x < -20.0f;
    const float term = exponential(is_far ? 0.5f * x : -magnitude(x));
    return is_far ? term : square_root((x > 0.0f ? x : 0.0f) + ln_1p(term));
}

// A term of a softmax in units of 2^-40 of the largest: sums of integers do not depend on their order.
MOE_DEVICE u64 softmax_units(float term) { return u64(term * 1099511627776.0f); }
MOE_DEVICE float from_units(u64 units) { return float(units) / 1099511627776.0f; }
// A sum over the lanes of the warp, of at most 2^46 each.
MOE_DEVICE u64 sum_units(u64 units) {
    constexpr u32 LOW = 24;
    const u64 low = sum_lanes(u32(units) & ((1u << LOW) - 1)), high = sum_lanes(u32(units >> LOW));
    return low + (high << LOW);
}

// A number that is not NaN as an integer of the same order, above 0; both zeros are one.
MOE_DEVICE u32 to_order(float x) {
    const u32 bits = to_bits(x + 0.0f);
    return bits ^ (u32(i32(bits) >> 31) | 0x80000000);
}
MOE_DEVICE float from_order(u32 order) { return from_bits(order >> 31 ? order ^ 0x80000000 : ~order); }

MOE_DEVICE u32 larger(u32 a, u32 b) { return a > b ? a : b; }
} // namespace moe
