// What codes stand for, for instructions that host SIMT plays.
#pragma once

#include "platform.h"

namespace moe {
inline float bf16_of(u16 code) { return from_bits(u32(code) << 16); }

// e4m3: OCP has exponents from -6 on and no infinity; FNUZ has them from -7 on, and one NaN in the place of -0.
inline float fp8_of(u8 code, bool fnuz) {
    const u32 exponent = code >> 3 & 15, mantissa = code & 7;
    if (fnuz ? code == 0x80 : (code & 0x7f) == 0x7f) return __builtin_nanf("");
    const u32 bias = fnuz ? 8 : 7;
    // A unit in the last place of a number, and how many of them it is.
    const float unit = from_bits((127 + (exponent > 1 ? exponent : 1) - bias - 3) << 23);
    const float magnitude = unit * float(exponent == 0 ? mantissa : 8 + mantissa);
    return code & 0x80 ? -magnitude : magnitude;
}
} // namespace moe
