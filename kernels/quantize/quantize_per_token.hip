// Stage 2: bf16 activations to FP8 with one scale per row (PTPC). A block has a row, and reads it twice: the second time
// from the cache.

#include "../common/numbers.h"
#include "quantize.h"

using namespace moe;

namespace {
constexpr u32 ELEMENTS = 8;

MOE_DEVICE u32x4 load(const QuantizePerTokenParams &p, u32 row, u32 column) {
    return *ptr<const u32x4>(p.input + 2 * (u64(row) * p.input_stride + column));
}

// A row, by all threads of the block.
MOE_DEVICE void quantize(const QuantizePerTokenParams &p, u32 row, u32 *largest_of) {
    constexpr u32 WARPS = QUANTIZE_PER_TOKEN_THREADS / WARP, STEP = QUANTIZE_PER_TOKEN_THREADS * ELEMENTS;
    u32 largest = 0;
    for (u32 column = thread_index() * ELEMENTS; column < p.hidden; column += STEP) {
        const u32x4 words = load(p, row, column);
        MOE_UNROLL for (u32 i = 0; i < 4; i++) largest = max_u16x2(largest, finite_magnitudes(words.v[i]));
    }
    MOE_UNROLL for (u32 mask = WARP / 2; mask > 0; mask /= 2) largest = max_u16x2(largest, shuffle_xor(largest, mask));
    if (lane() == 0) largest_of[thread_index() / WARP] = largest;
    sync_block();
    for (u32 w = 0; w < WARPS; w++) largest = max_u16x2(largest, largest_of[w]);
    const u32 amax = max_u16x2(largest, largest >> 16) & 0xffff;

    const float scale = scale_for_amax(low_bf16(amax), p.inverse_max);
    const float inverse_scale = 1.0f / scale;
    for (u32 column = thread_index() * ELEMENTS; column < p.hidden; column += STEP) {
        const u32x4 words = load(p, row, column);
        u32 codes[2];
        MOE_UNROLL for (u32 i = 0; i < 2; i++) codes[i] = scaled_fp8x4(words.v[2 * i], words.v[2 * i + 1], inverse_scale, p.max);
        store_once(ptr<u64>(p.codes + u64(row) * p.hidden + column), u64(codes[1]) << 32 | codes[0]);
    }
    if (thread_index() == 0) ptr<float>(p.scales)[row] = scale;
}
} // namespace

MOE_KERNEL(quantize_per_token, QuantizePerTokenParams, QUANTIZE_PER_TOKEN_THREADS) {
    MOE_SHARED(u32, largest_of, QUANTIZE_PER_TOKEN_THREADS / WARP);
    const u32 rows = row_count(p.rows, p.count);
    for (u32 row = block_index(); row < rows; row += p.blocks) {
        quantize(p, row, largest_of);
        // The next row uses the same shared memory.
        sync_block();
    }
}
