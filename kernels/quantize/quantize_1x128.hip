// Stage 2: bf16 activations to FP8 with one scale per 128 columns of a row.
//
// Sixteen lanes have a group, eight elements each: one load of 16 bytes, four shuffles for the largest magnitude, one
// store of 8 bytes. Nothing is read twice and shared memory is not used, so the kernel runs at the rate of a copy.

#include "../common/numbers.h"
#include "quantize.h"

using namespace moe;

MOE_KERNEL(quantize_1x128, Quantize1x128Params, QUANTIZE_1X128_THREADS) {
    constexpr u32 LANES = 16, ELEMENTS = 8;
    const u64 group = (u64(block_index()) * QUANTIZE_1X128_THREADS + thread_index()) / LANES;
    const u32 part = thread_index() % LANES;
    const u32 row = u32(group / p.groups), column_group = u32(group % p.groups);
    const u32 column = column_group * (LANES * ELEMENTS) + part * ELEMENTS;
    // Lanes beyond the end take part in the shuffles: all lanes of a warp have to.
    const bool inside = row < p.rows && column < p.hidden;

    u32x4 words = {{0, 0, 0, 0}};
    if (inside) words = load_once(ptr<const u32x4>(p.input + 2 * (u64(row) * p.input_stride + column)));
    float x[ELEMENTS];
    float amax = 0.0f;
    MOE_UNROLL for (u32 i = 0; i < ELEMENTS / 2; i++) {
        x[2 * i] = low_bf16(words.v[i]);
        x[2 * i + 1] = high_bf16(words.v[i]);
        amax = larger(amax, larger(finite_magnitude(x[2 * i]), finite_magnitude(x[2 * i + 1])));
    }
    MOE_UNROLL for (u32 mask = LANES / 2; mask > 0; mask /= 2) amax = larger(amax, shuffle_xor(amax, mask));

    const float scale = scale_for_amax(amax, p.inverse_max);
    const float inverse_scale = 1.0f / scale;
    MOE_UNROLL for (u32 i = 0; i < ELEMENTS; i++) x[i] = clamped(x[i] * inverse_scale, p.max);
    const u64 codes = u64(to_fp8x4(x[4], x[5], x[6], x[7])) << 32 | to_fp8x4(x[0], x[1], x[2], x[3]);
    if (inside) store_once(ptr<u64>(p.codes + u64(row) * p.hidden + column), codes);
    if (inside && part == 0) {
        ptr<float>(p.scales)[u64(row) * p.scale_row_stride + u64(column_group) * p.scale_group_stride] = scale;
    }
}
