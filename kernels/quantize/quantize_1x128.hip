// Stage 2: bf16 activations to FP8 with one scale per 128 columns of a row.
//
// Sixteen lanes have a group, eight elements each: one load of 16 bytes, four shuffles for the largest magnitude, one
// store of 8 bytes. Nothing is read twice and shared memory is not used. What limits it is the number of instructions, so
// magnitudes are compared two at a time as integers, and whether they are finite is asked once per group.

#include "../common/numbers.h"
#include "quantize.h"

using namespace moe;

namespace {
constexpr u32 LANES = 16;
constexpr u32 ELEMENTS = 8;

// The larger half of `pairs` over the lanes of the group.
MOE_DEVICE u32 group_max(u32 pairs) {
    MOE_UNROLL for (u32 mask = LANES / 2; mask > 0; mask /= 2) pairs = max_u16x2(pairs, shuffle_xor(pairs, mask));
    return max_u16x2(pairs, pairs >> 16) & 0xffff;
}
// Group `group`, by sixteen lanes; `part` is the number of this one. Lanes beyond the end take part in the shuffles: all
// lanes of a warp have to.
MOE_DEVICE void quantize(const Quantize1x128Params &p, u32 group, u32 part, u32 rows) {
    const u32 row = group / p.groups, column_group = group - row * p.groups;
    const u32 column = column_group * (LANES * ELEMENTS) + part * ELEMENTS;
    const bool inside = row < rows && column < p.hidden;

    u32x4 words = {{0, 0, 0, 0}};
    if (inside) words = load_once(ptr<const u32x4>(p.input + 2 * (u64(row) * p.input_stride + column)));
    u32 largest = 0;
    MOE_UNROLL for (u32 i = 0; i < 4; i++) largest = max_u16x2(largest, magnitudes(words.v[i]));
    u32 amax = group_max(largest);
    if (any_lane(amax >= 0x7f80)) {
        // Some group of the warp has numbers that are none, which do not count.
        largest = 0;
        MOE_UNROLL for (u32 i = 0; i < 4; i++) largest = max_u16x2(largest, finite_magnitudes(words.v[i]));
        amax = group_max(largest);
    }

    const float scale = scale_for_amax(low_bf16(amax), p.inverse_max);
    const float inverse_scale = 1.0f / scale;
    u32 codes[2];
    MOE_UNROLL for (u32 i = 0; i < 2; i++) codes[i] = scaled_fp8x4(words.v[2 * i], words.v[2 * i + 1], inverse_scale, p.max);
    if (!inside) return;
    store_once(ptr<u64>(p.codes + u64(row) * p.hidden + column), u64(codes[1]) << 32 | codes[0]);
    if (part == 0) {
        ptr<float>(p.scales)[u64(row) * p.scale_row_stride + u64(column_group) * p.scale_group_stride] = scale;
    }
}
} // namespace

MOE_KERNEL(quantize_1x128, Quantize1x128Params, QUANTIZE_1X128_THREADS) {
    constexpr u32 GROUPS = QUANTIZE_1X128_THREADS / LANES;
    const u32 rows = row_count(p.rows, p.count);
    // All threads of a block go round alike.
    for (u32 first = block_index() * GROUPS; first < rows * p.groups; first += p.blocks * GROUPS) {
        quantize(p, first + thread_index() / LANES, thread_index() % LANES, rows);
    }
}
